"""Where and in which number format a model runs, and what is said when there is no memory."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path

import torch

from ..base import EngineLoadError

_MEMORY_FILE = Path("/proc/meminfo")
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


class Memory:
    """How much of a device's memory is taken, asked for at most once in REFRESH_S."""

    REFRESH_S = 1.0

    def __init__(self, device: torch.device | None = None) -> None:
        """Ask `device`; without one nothing is known."""
        self._device = device
        self._known = (0, 0)
        self._asked_at = -math.inf

    def __call__(self) -> tuple[int, int]:
        """Return the bytes that are taken, by anybody, and those that there are; zeros where that is not known."""
        now = time.monotonic()
        if self._device is not None and now - self._asked_at >= self.REFRESH_S:
            self._asked_at = now
            self._known = _memory(self._device)
        return self._known


def _memory(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        free, there = torch.cuda.mem_get_info(device)
        return there - free, there
    if device.type == "mps":
        return torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    page = os.sysconf("SC_PAGE_SIZE")
    there = os.sysconf("SC_PHYS_PAGES") * page
    if not _MEMORY_FILE.exists():  # not Linux
        return there - os.sysconf("SC_AVPHYS_PAGES") * page, there
    # What the system would give to a program, files that it has cached included, in kB.
    available = re.search(r"^MemAvailable:\s+(\d+)", _MEMORY_FILE.read_text("ascii"), re.MULTILINE)
    return (there - int(available[1]) * 1024, there) if available else (0, 0)


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
