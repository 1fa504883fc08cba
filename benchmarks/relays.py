"""The relays that the traffic benchmarks compare: each a process of its own, alone on one core, and what it costs.

c-proxy     libzmq's proxy: two sockets and a loop in C
bare        the least that Python can do: two ROUTERs, one look-up in a dict (forwarders.py)
nats        nats-server, where this machine has it
zmq-broker  the command itself; its limits for one peer are lifted, since few peers here do the work of thousands
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rounds import BenchmarkError, NotHereError, nats_server

from tokenmq.client.local import LocalCluster, LocalProcess, free_ports

BROKER, BARE, PROXY, NATS = "zmq-broker", "bare", "c-proxy", "nats"
RELAYS = (PROXY, BARE, NATS, BROKER)
#: Options of zmq-broker that lift what is meant for one peer among many: here one client asks for all.
LIFTED = ("--requests-per-s", "0", "--max-open-requests", "0", "--queries-per-s", "0")
_START_S = 20.0
_FORWARDERS = Path(__file__).parent / "forwarders.py"
#: The kernel's number of "CPU time of this process, all threads, in nanoseconds" (clock_getcpuclockid).
_CPU_CLOCK = 2


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay that runs.

    Attributes:
        name: one of RELAYS.
        frontend: the port for clients.
        backend: the port for workers; NATS has one for both.
        pid: its process.
    """

    name: str
    frontend: int
    backend: int
    pid: int

    def cpu_s(self) -> float:
        """Return the CPU seconds that all its threads have used so far.

        Raises:
            BenchmarkError: it has ended.
        """
        try:
            return time.clock_gettime((~self.pid << 3) | _CPU_CLOCK)
        except OSError as error:
            raise BenchmarkError("the relay has ended") from error


def cores() -> tuple[int, int]:
    """Return the core of the ends and the core of the relay; the same one where there is only one.

    Raises:
        BenchmarkError: this system cannot hold a process to a core.
    """
    if not sys.platform.startswith("linux"):
        raise BenchmarkError(
            "this needs Linux: processes are held to cores, and their CPU time is read by its clocks"
        )
    here = sorted(os.sched_getaffinity(0))
    return here[0], here[min(1, len(here) - 1)]


def notes() -> list[str]:
    """Return what a reader of the figures must know of this machine."""
    ends_core, relay_core = cores()
    return [] if ends_core != relay_core else ["one core only: relays and ends took it from each other"]


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run on this core alone, and so does what is started meanwhile, with all its threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def relay(name: str, options: Sequence[str] = LIFTED) -> Iterator[Relay]:
    """Start a relay on its core, and hold this process to the other one, until both have done their work.

    Args:
        name: one of RELAYS.
        options: of zmq-broker.

    Raises:
        NotHereError: this machine does not have it.
        BenchmarkError: it does not start.
    """
    ends_core, relay_core = cores()
    with tempfile.TemporaryDirectory(prefix="tokenmq-bench-") as folder, on_core(ends_core):
        if name == BROKER:
            with on_core(relay_core):
                cluster = LocalCluster(*options, folder=Path(folder))
            with cluster:
                frontend, backend = (int(each.rpartition(":")[2]) for each in (cluster.frontend, cluster.backend))
                _await(cluster.broker, frontend, backend)
                try:
                    yield Relay(name, frontend, backend, cluster.broker.pid)
                finally:
                    cluster.broker.kill()  # it would let the streams end, which they never do
            return
        frontend, backend = free_ports(2)
        if name == NATS:
            if shutil.which(nats_server()) is None:
                raise NotHereError("nats-server is not installed; apt-get install nats-server")
            backend = frontend
            command = [nats_server(), "--addr", "127.0.0.1", "--port", str(frontend)]
        else:
            ports = [f"tcp://127.0.0.1:{port}" for port in (frontend, backend)]
            command = [sys.executable, str(_FORWARDERS), name, *ports]
        with on_core(relay_core):
            process = LocalProcess(name, command, Path(folder) / f"{name}.log")
        try:
            _await(process, frontend, backend)
            yield Relay(name, frontend, backend, process.pid)
        finally:
            process.kill()


def _await(process: LocalProcess, *ports: int) -> None:
    end = time.monotonic() + _START_S
    for port in ports:
        while not _listens(port):
            if process.exit_code is not None or time.monotonic() > end:
                raise BenchmarkError(f"the relay does not start: {_last(process.log_tail().splitlines())}")
            time.sleep(0.01)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _last(lines: Sequence[str]) -> str:
    return lines[-1].strip() if lines else "it has said nothing"
