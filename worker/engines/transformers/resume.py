"""How the engine goes on behind tokens that another worker has generated: by prefill or by replay.

- `prefill` computes prompt and prior together, as if the prior were a part of the prompt. It is quick. The keys and
  values come out of other kernels than the undisturbed stream's, so they differ from those by rounding.
- `replay` prefills the prompt alone, as it was prefilled the first time, and then decodes the prior's tokens in the
  batch as they were decoded the first time. Where a decode does not depend on the other rows, the stream goes on bit
  for bit.

docs/numerics.md has the figures behind the choice.
"""

from __future__ import annotations

from enum import Enum

import torch


class Resume(Enum):
    """A way to resume."""

    PREFILL = "prefill"
    REPLAY = "replay"


#: What the user may say: a way, or the engine's own choice.
AUTO = "auto"
CHOICES = (AUTO, *(way.value for way in Resume))


def choose_way(wish: str, device: torch.device, dtype: torch.dtype) -> Resume:
    """Return the way to resume.

    Args:
        wish: one of CHOICES.
        device: where the model is.
        dtype: what it computes in.

    """
    if wish != AUTO:
        return Resume(wish)
    # Half precision on a CPU is where a prefill's rounding would be seen, and where a decode has none of its own.
    return Resume.REPLAY if device.type == "cpu" and dtype != torch.float32 else Resume.PREFILL
