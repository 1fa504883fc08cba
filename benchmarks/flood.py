"""What a flood by one hostile peer costs all others: their latency, quiet and meanwhile, in turns.

The others are 32 clients with a stream each, a token each 20 ms, evenly spread, and 200 requests of one token a
second, all at one worker: times are from write to read, p50 and p99. The ends are as in latency.py. The broker has
its default limits. Its loop has a core of its own, and libzmq's I/O thread is on that of the ends: where the two
share one, each waits for the other for as long as the kernel's slices last, some milliseconds. The flooder is a
process of its own (flooder.py) on the core of the ends, with the policy SCHED_IDLE: it takes only what these leave,
which is nearly all. It comes back as soon as it is cut off.

quiet      without the flooder
neighbour  the flooder floods another broker, which runs on the same core as ours: what of the harm is the machine's
flooded    it floods ours

As many messages as it can of each kind, by one connection (frontend, without reading what it should not send for):

requests         good requests for a worker of its own, without a wait for refusals; all that comes is read
shared           the same for the model and the worker of the others, which then have that to wait for, too
shared-unread    the same, and nothing is read
nobody           requests for a model that nobody has
malformed        requests whose envelopes are none
controls         CREDIT and CANCEL of no request
queries          QUERY `status`
hellos           GOODBYE and HELLO in turns
large            requests of 16 MiB for a model that nobody has
images           the same of 63 MiB in 64 attachments
large-kept       requests of 16 MiB that wait for a worker of the flooder's own, which is busy for ever
frames           one message that never ends, of frames of one octet; 32 MiB for each connection
frames-large     the same of frames of one MiB; 512 MiB for each connection
garbage          what is no message, without a session; from a new connection each time it is cut
noise            octets that are no ZMTP
connects         connections, opened and closed
silent, half     2,000 connections left open: nothing said; half of the handshake said
greets           connections that say HELLO and GOODBYE
strays           a worker: tokens of requests that it does not hold
ends             a worker: FINISH of requests that it does not hold
readies          a worker: READY with a thousand models, others each time
unread           a worker of the flooder's own brings tokens of 16 streams to a client that never reads
tokens           the same to one that reads: nothing in it is wrong but the number

Run: python benchmarks/flood.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import rounds
from attacks import ATTACKS
from bystanders import Bystanders
from kinds import ends_of
from relays import BROKER, Relay, cores, notes, relay
from rounds import BenchmarkError

QUIET, NEIGHBOUR, FLOODED = "quiet", "neighbour", "flooded"
#: Those that are no blocks of messages by one connection after the other.
_OTHERS = ("requests", "large-kept", "unread", "tokens", "greets", "connects", "silent", "half")
CASES = (*_OTHERS, *ATTACKS)
CLIENTS, SLOTS = 32, 64
COLUMNS = {
    "p50_ms": "token p50 ms",
    "p99_ms": "token p99 ms",
    "request_p50_ms": "request p50 ms",
    "request_p99_ms": "request p99 ms",
    "unanswered": "unanswered",
    "missing": "tokens missing",
    "relay_cpu_share": "broker's core",
    "peak_mib": "broker's peak MiB",
    "flood_messages_per_s": "messages/s",
    "flood_mib_per_s": "MiB/s",
    "flood_connections_per_s": "connections/s",
    "flood_cut_per_s": "cut/s",
}
_FLOODER = Path(__file__).parent / "flooder.py"
_END_S = 10.0
_MIB = 1 << 20


@contextmanager
def flooder(kind: str, at: Relay, found: dict[str, float]) -> Iterator[None]:
    """Flood a broker meanwhile; what the flooder has done is in `found` then.

    Raises:
        BenchmarkError: it did not do its part.
    """
    command = [sys.executable, str(_FLOODER), kind, str(at.frontend), str(at.backend)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "floods\n":
            raise BenchmarkError("the flooder does not start")
        yield
        process.send_signal(signal.SIGTERM)
        try:
            said, _ = process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"the flooder did not end within {_END_S:g} s") from error
        if process.returncode:
            raise BenchmarkError(f"the flooder has failed with status {process.returncode}")
        found.update(json.loads(said))
    finally:
        process.kill()
        process.wait()


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process has had.

    Raises:
        BenchmarkError: there is no such process.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError as error:
        raise BenchmarkError("the broker has ended") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def apart(running: Relay) -> None:
    """Move libzmq's threads of a broker to the core of the ends."""
    ends_core, _ = cores()
    for thread in os.listdir(f"/proc/{running.pid}/task"):
        if int(thread) != running.pid:
            os.sched_setaffinity(int(thread), {ends_core})


def observe(running: Relay, kind: str, victim: Relay | None, seconds: float) -> dict[str, float]:
    """Return the figures of the bystanders of a broker, while somebody floods the victim."""
    with ends_of(running, clients=CLIENTS, streams=1, slots=CLIENTS + SLOTS) as ends:
        bystanders = Bystanders(ends)
        if victim is None:
            return bystanders.run(running, seconds) | {"peak_mib": peak_bytes(running.pid) / _MIB}
        done: dict[str, float] = {}
        with flooder(kind, victim, done):
            figures = bystanders.run(running, seconds)
        lasted = seconds
    return figures | {
        "peak_mib": peak_bytes(victim.pid) / _MIB,
        "flood_messages_per_s": done["messages"] / lasted,
        "flood_mib_per_s": done["bytes"] / _MIB / lasted,
        "flood_connections_per_s": done["connections"] / lasted,
        "flood_cut_per_s": done["cut"] / lasted,
    }


def measure(case: str, how: str, seconds: float) -> Mapping[str, float]:
    """Return the figures of one measurement.

    Raises:
        BenchmarkError: one of those that take part does not do so.
    """
    with relay(BROKER, ()) as running:
        apart(running)
        if how != NEIGHBOUR:
            return observe(running, case, running if how == FLOODED else None, seconds)
        with relay(BROKER, ()) as other:
            apart(other)
            return observe(running, case, other, seconds)


def main() -> None:
    """Measure what the command line asks for."""
    options = rounds.parse(rounds.parser(__doc__, list(CASES), [QUIET, NEIGHBOUR, FLOODED], seconds=4.0))
    rounds.run("flood", options, lambda case, how: measure(case, how, options.seconds), COLUMNS, QUIET, notes)


if __name__ == "__main__":
    main()
