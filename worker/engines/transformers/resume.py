"""How the engine goes on behind tokens that another worker has generated: by prefill or by replay.

- `prefill` computes prompt and prior together, as if the prior were a part of the prompt. It is quick. The keys and
  values come out of other kernels than the undisturbed stream's, so they differ from those by rounding.
- `replay` prefills the prompt alone, as it was prefilled the first time, and then puts the prior's tokens through the
  kernels of a decode, as they went the first time, but many to a forward, each as a row of its own. Where a decode
  does not depend on the other rows, the stream goes on bit for bit.

docs/numerics.md has the figures behind the choice.
"""

from __future__ import annotations

import os
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
    # Replay where it was found exact. In bfloat16 that matters, too: by prefill half of the streams went another way.
    exact = device.type == "cpu" and (dtype == torch.bfloat16 or (dtype == torch.float32 and _mkl_is_strict()))
    return Resume.REPLAY if exact else Resume.PREFILL


def _mkl_is_strict() -> bool:
    """Whether the user has asked MKL, which multiplies float32, for the same bits whatever the number of rows."""
    return os.environ.get("MKL_CBWR", "").upper().endswith(",STRICT")
