"""Host to device without waiting for what the device does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def upload(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return the values as a tensor on a device; on a CPU it may share their memory.

    A plain copy to a GPU would wait until all that was launched before it is done: only one from pinned memory does
    not.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
