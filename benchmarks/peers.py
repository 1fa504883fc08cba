"""What real clients and workers cost while they are idle: processes of their own, connected to a broker."""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from idle import resident_bytes
from relays import Relay
from rounds import BenchmarkError

from tokenmq.client import Client
from tokenmq.client.local import LocalProcess

_START_S = 60.0
_LOOK_S = 0.05
_KB = 1024
_SCRIPT = Path(__file__).parent / "idle_clients.py"
_MODEL = "toy"


def idle_clients(relay: Relay, count: int, seconds: float) -> dict[str, float]:
    """Connect so many Client objects of one process to a broker; return what they take while they do nothing.

    Raises:
        BenchmarkError: they do not connect.
    """
    command = [sys.executable, str(_SCRIPT), f"tcp://127.0.0.1:{relay.frontend}", str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = process.stdout.readline() if select.select([process.stdout], [], [], _START_S)[0] else ""
            if not told:
                raise BenchmarkError(f"{count} clients did not connect within {_START_S:g} s")
            client_s, relay_s = shares(process.pid, relay, seconds)
            grown = resident_bytes(process.pid) - int(told)
        finally:
            process.kill()
    return {
        "process_megabytes": int(told) / _KB / _KB,
        "kb_each": grown / count / _KB,
        "cpu_share_each": client_s / count,
        "broker_cpu_share_each": relay_s / count,
    }


def idle_worker(relay: Relay, seconds: float) -> dict[str, float]:
    """Connect a worker process with the synthetic engine to a broker; return what it takes while it does nothing.

    Raises:
        BenchmarkError: it does not get ready.
    """
    backend, frontend = (f"tcp://127.0.0.1:{port}" for port in (relay.backend, relay.frontend))
    command = ["--broker", backend, "--worker-name", "idle", "--engine", "synthetic", "--model", _MODEL]
    with tempfile.TemporaryDirectory(prefix="tokenmq-bench-") as folder:
        process = LocalProcess(
            "worker", [sys.executable, "-m", "tokenmq.cli.worker", *command], Path(folder) / "worker.log"
        )
        try:
            _await_ready(frontend, process)
            worker_s, relay_s = shares(process.pid, relay, seconds)
            size = resident_bytes(process.pid)
        finally:
            process.kill()
    return {
        "process_megabytes": size / _KB / _KB,
        "cpu_share_each": worker_s,
        "broker_cpu_share_each": relay_s,
    }


def shares(pid: int, relay: Relay, seconds: float) -> Sequence[float]:
    """Return the shares of a core that a process and a broker take in so many seconds."""
    process = Relay("process", 0, 0, pid)
    began, before = time.monotonic(), (process.cpu_s(), relay.cpu_s())
    time.sleep(seconds)
    lasted = time.monotonic() - began
    return [(now - then) / lasted for now, then in zip((process.cpu_s(), relay.cpu_s()), before, strict=True)]


def _await_ready(frontend: str, process: LocalProcess) -> None:
    end = time.monotonic() + _START_S
    with Client(frontend) as client:
        while not any(model["ready"] for model in client.models()):
            if process.exit_code is not None or time.monotonic() > end:
                raise BenchmarkError(f"a worker does not get ready: {process.log_tail()}")
            time.sleep(_LOOK_S)
