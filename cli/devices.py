"""Which devices the worker processes of `--devices` and `--tensor-parallel` get, and how they are told."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

#: In a process of its own: torch takes seconds and hundreds of MiB, and a supervisor is to start and stay small. What
#: torch counts is what the workers will find, with CUDA_VISIBLE_DEVICES, MIG and other builds than CUDA's respected.
_PROBE = """
import torch
count = torch.cuda.device_count()
print(*([f"cuda:{number}" for number in range(count)] or ["mps" if torch.backends.mps.is_available() else "cpu"]))
"""
_DEVICE = re.compile(r"[a-z]+(:\d+)?")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def parse_devices(text: str) -> list[str]:
    """Return the devices that `--devices` names.

    Args:
        text: `all`, or names of torch devices and numbers of CUDA devices, with commas between them.

    Raises:
        ValueError: it is none of these; the message tells a person why.
    """
    if text.strip() == "all":
        return found_devices()
    devices = [f"cuda:{word}" if word.isdigit() else word for word in (part.strip() for part in text.split(","))]
    wrong = [device for device in devices if not _DEVICE.fullmatch(device) or device == "all"]
    if wrong:
        raise ValueError(f"--devices: {wrong[0]!r} is no device; expected all, or a list such as 0,1 or cpu,cpu")
    return ["cuda:0" if device == "cuda" else device for device in devices]


def found_devices() -> list[str]:
    """Return every CUDA device, or else the one mps or cpu; cpu too where torch is not installed."""
    asked = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)  # noqa: S603
    return asked.stdout.split() if asked.returncode == 0 else ["cpu"]


def parallel_devices(device: str, size: int) -> list[str]:
    """Return the devices of one worker of `size` processes, where only `--device` is given.

    Raises:
        ValueError: there are not so many.
    """
    if device not in ("auto", "cuda"):
        return [device]
    found = found_devices()
    cuda = [name for name in found if name.startswith("cuda")]
    if len(cuda) < size and (cuda or device == "cuda"):
        raise ValueError(f"--tensor-parallel {size}: CUDA devices here: {len(cuda)}; it needs one for each process")
    return cuda[:size] or found


def teams(devices: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Divide devices among workers of `size` processes each.

    A CUDA device is one process's. Any other stands for all processes of a worker: they share the machine's cores.

    Raises:
        ValueError: the CUDA devices cannot be divided so, or a device cannot take part.
    """
    cuda = [device for device in devices if device.startswith("cuda")]
    others = [device for device in devices if device not in cuda]
    if size == 1:
        return [(device,) for device in devices]
    if len(cuda) % size:
        raise ValueError(
            f"--tensor-parallel {size}: {len(cuda)} CUDA devices cannot be divided into workers of {size} each"
        )
    for device in others:
        if device != "cpu":
            raise ValueError(f"--tensor-parallel {size}: only CUDA devices and cpu can be several, not {device}")
    return [tuple(cuda[first : first + size]) for first in range(0, len(cuda), size)] + [
        (device,) * size for device in others
    ]


def device_environment(team: Sequence[str], environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return what `--device` a worker's processes get, and the environment that shows them their devices.

    CUDA devices are hidden rather than chosen by number: libraries that allocate on "the" device, without asking
    which one, then find the worker's own. The processes of one worker see those of all of them, as under torchrun.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES does not show such a device.
    """
    if not team[0].startswith("cuda"):
        # transformers would have several processes compute on the CUDA devices that they see.
        return team[0], {} if len(team) == 1 else {_VISIBLE: ""}
    numbers = [int(device.partition(":")[2]) for device in team]
    if _VISIBLE not in environment:
        return "cuda", {_VISIBLE: ",".join(map(str, numbers))}
    visible = [name.strip() for name in environment[_VISIBLE].split(",") if name.strip()]
    for number in numbers:
        if number >= len(visible):
            raise ValueError(f"device cuda:{number}: {_VISIBLE}={environment[_VISIBLE]} shows {len(visible)} devices")
    return "cuda", {_VISIBLE: ",".join(visible[number] for number in numbers)}


def threads_environment(processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the threads that each of so many processes may use, so that they do not take each other's cores.

    torch gives each process as many as there are cores. What a user has set stays.
    """
    if processes == 1 or "OMP_NUM_THREADS" in environment:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // processes))}


def loopback_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what keeps the connections among a worker's processes on the loopback interface, unless a user says."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {variable: names[0] for variable in variables if names and variable not in environment}


def cores() -> int:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # a container or taskset may allow fewer than there are
    return os.cpu_count() or 1  # macOS does not tell
