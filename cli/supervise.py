"""`zmq-worker --devices` and `--tensor-parallel`: which processes the command stands for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..transport.endpoints import MAX_PORT, check_destination
from ..worker.settings import WorkerSettings, default_name
from .devices import (
    device_environment,
    loopback_environment,
    parallel_devices,
    parse_devices,
    teams,
    threads_environment,
)
from .processes import Supervisor, Team


def supervise(
    worker_settings: WorkerSettings, devices: str | None, device: str, size: int, worker_name: str | None
) -> NoReturn:
    """Run processes of this command, `size` for each worker, and exit with their supervisor's code.

    Raises:
        ValueError: a setting is wrong: better told once, here, than by each process.
    """
    if devices and device != "auto":
        raise ValueError("--device and --devices: give one of them")
    for endpoint in worker_settings.brokers:
        check_destination(endpoint)
    found = parse_devices(devices) if devices else parallel_devices(device, size)
    teams = make_teams(
        sys.argv[1:],
        devices=found,
        size=size,
        name=worker_name,
        numbered=devices is not None,
        direct=worker_settings.direct,
    )
    raise SystemExit(Supervisor(teams, worker_settings.grace_s).run())


def make_teams(
    arguments: Sequence[str],
    *,
    devices: Sequence[str],
    size: int,
    name: str | None,
    numbered: bool,
    direct: str = "",
) -> list[Team]:
    """Return the teams that `zmq-worker` with these arguments stands for.

    Args:
        arguments: the command's own; each process gets them too, and behind them what is its own: the last counts.
        devices: one for each worker, or `size` CUDA devices for each.
        size: processes of each worker.
        name: the workers' name, None for one that is this process's own.
        numbered: the workers' numbers are put behind the name.
        direct: the first worker's own endpoint for clients; "" for none.

    Raises:
        ValueError: the devices cannot be divided so, or not each worker can have an endpoint.
    """
    divided = teams(devices, size)
    shared = threads_environment(len(divided) * size, os.environ)
    if size > 1:
        shared |= loopback_environment(os.environ)
    made = []
    for number, team in enumerate(divided):
        suffix = f"-{number}" if numbered else ""
        own_name = default_name(suffix) if name is None else name + suffix
        device, shown = device_environment(team, os.environ)
        ranks = [{}] if size == 1 else [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            for rank in range(size)
        ]  # fmt: skip
        own = ["--supervised", f"--worker-name={own_name}", f"--device={device}"]
        if direct:
            own.append(f"--direct={direct_of(direct, number)}")
        made.append(
            Team(
                name=own_name,
                command=(sys.executable, "-m", "tokenmq.cli.worker", *arguments, *own),
                environments=[{**shown, **shared, **rank} for rank in ranks],
                shown={"device": ",".join(team)},
            )
        )
    return made


def direct_of(endpoint: str, number: int) -> str:
    """Return the endpoint for clients of the worker of this number, from 0: each has the next port, or a free one.

    Raises:
        ValueError: there is no such port, or no such endpoint.
    """
    address, _, port = endpoint.rpartition(":")
    if number == 0 or port in ("*", "0"):
        return endpoint
    if endpoint.startswith("ipc://"):
        return f"{endpoint}.{number}"
    if int(port) + number > MAX_PORT:
        raise ValueError(f"--direct {endpoint}: worker {number} would need port {int(port) + number}")
    return f"{address}:{int(port) + number}"
