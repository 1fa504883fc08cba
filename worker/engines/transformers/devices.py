"""Where and in which number format a model runs, and what is said when there is no memory."""

from __future__ import annotations

import torch

from ..base import EngineLoadError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wish: str) -> torch.device:
    """Return the device of that name; `auto` takes cuda, else mps, else cpu.

    Raises:
        EngineLoadError: there is no such device here.
    """
    if wish == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.empty(1, device=device)
    except Exception as error:
        raise EngineLoadError(f"device {wish!r} is not available here: {first_line(error)}") from error
    return device


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; `auto` takes bfloat16 on cuda, float32 elsewhere.

    Raises:
        EngineLoadError: there is no such dtype.
    """
    if wish == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wish not in DTYPES:
        raise EngineLoadError(f"dtype {wish!r} is unknown; there are auto, {', '.join(DTYPES)}")
    return DTYPES[wish]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The allocator of the CPU raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    """Give what torch's allocator keeps unused back to the device, so that a second try has it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def first_line(error: BaseException) -> str:
    """Return an error's first line of text, for a message that a person reads."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
