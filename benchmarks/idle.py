"""What a relay costs while nothing but heartbeats passes, and how much memory a process has."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from ends import Ends
from relays import Relay
from rounds import BenchmarkError

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has at the moment, without what is swapped out.

    Raises:
        BenchmarkError: there is no such process.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError as error:
        raise BenchmarkError(f"process {pid} has ended") from error


def idle(ends: Ends, relay: Relay, seconds: float) -> dict[str, float]:
    """Send heartbeats and read what comes for so long; return the shares of their cores that relay and ends took.

    Raises:
        BenchmarkError: the relay has ended a session.
    """
    clients = {client.socket.fileno(): client for client in ends.clients}
    for number in clients:
        ends.poll.register(number, select.EPOLLIN)
    began, own_s, relay_s = time.monotonic(), time.process_time(), relay.cpu_s()
    try:
        while (left := began + seconds - time.monotonic()) > 0:
            for worker in ends.beat():
                ends.listen(worker)
            for number, _ in ends.poll.poll(max(0.0, min(left, ends.next_beat - time.monotonic()))):
                ends.listen(clients[number])
    finally:
        for number in clients:
            ends.poll.unregister(number)
    lasted = time.monotonic() - began
    return {
        "relay_cpu_share": (relay.cpu_s() - relay_s) / lasted,
        "ends_cpu_share": (time.process_time() - own_s) / lasted,
    }
