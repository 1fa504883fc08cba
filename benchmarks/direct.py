"""What chunks past the broker save: a real worker and real clients, brokered and direct.

The worker runs an engine without a model that brings a token of each of 64 streams with each beat, as a batch on one
device does. Clients are processes of their own that read their streams with AsyncClient. All share the machine's
cores.

one-50      64 streams of one client, 50 beats a second
four-50     64 streams, 16 for each of 4 clients, 50 beats a second
four-200    the same, 200 beats a second

    brokered   clients take their chunks through the broker
    direct     they take them from the worker (`zmq-worker --direct`, `Client(direct=...)`)

broker_cpu_s_per_million_tokens is the CPU time of the broker, all threads, for a million tokens that readers got; the
worker's is told besides, since it has more connections to serve then.
Run: python benchmarks/direct.py.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import rounds
from beat_engine import STEPS
from rounds import BenchmarkError

from tokenmq.client import AsyncClient, Client, TokenmqError
from tokenmq.client.local import LocalCluster, LocalClusterError
from tokenmq.protocol.limits import MAX_NEW_TOKENS

BROKERED, DIRECT = "brokered", "direct"
COLUMNS = {
    "tokens_per_s": "tokens/s",
    "broker_cpu_s_per_million_tokens": "broker's CPU s/million",
    "worker_cpu_s_per_million_tokens": "worker's CPU s/million",
    "broker_messages_per_s": "chunk messages/s there",
}
_MODEL, _LOOPBACK = "toy", "127.0.0.0/8"
_START_S = 30.0
#: How often a client that waits looks, and tells.
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Case:
    """Work: so many clients with so many streams each, and so many beats a second."""

    clients: int
    streams: int
    beats: int


CASES = {"one-50": Case(1, 64, 50), "four-50": Case(4, 16, 50), "four-200": Case(4, 16, 200)}


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that all threads of a process have used so far.

    Raises:
        BenchmarkError: there is no such process.
    """
    try:
        # The kernel's number of "CPU time of this process, all threads" (clock_getcpuclockid).
        return time.clock_gettime((~pid << 3) | 2)
    except OSError as error:
        raise BenchmarkError(f"process {pid} has ended") from error


async def read(frontend: str, streams: int, direct: bool, tokens: Any, running: Any) -> None:
    """Read streams until the process ends; count the tokens, and tell when all run as they are to.

    Args:
        frontend: the broker's endpoint.
        streams: how many.
        direct: take chunks from the worker.
        tokens: where they are counted.
        running: set to 1 when every stream has brought something.
    """
    async with AsyncClient(frontend, direct=_LOOPBACK if direct else None, name=f"bench-{os.getpid()}") as client:
        while True:
            first = client.generate(_MODEL, "x", max_tokens=1)
            await first.text()
            if first.attempts[-1].direct == direct:
                break
        begun = 0

        async def one(seed: int) -> None:
            nonlocal begun
            stream, new = client.generate(_MODEL, "x", max_tokens=MAX_NEW_TOKENS, seed=seed), True
            async for chunk in stream:
                tokens.value += len(chunk.token_ids)
                if new:
                    new, begun = False, begun + 1
                    running.value = int(begun == streams)

        await asyncio.gather(*map(one, range(streams)))


def client_process(*arguments: Any) -> None:
    """Run `read` in a process of its own; the parent ends it."""
    try:
        asyncio.run(read(*arguments))
    except TokenmqError as error:
        raise SystemExit(f"a client failed: {error}") from error


@contextmanager
def clients(frontend: str, case: Case, direct: bool) -> Iterator[list[Any]]:
    """Start the clients, and give where they count when all streams run.

    Raises:
        BenchmarkError: they do not, within half a minute.
    """
    context = multiprocessing.get_context("spawn")
    counts = [RawValue("Q", 0) for _ in range(case.clients)]
    running = [RawValue("b", 0) for _ in range(case.clients)]
    processes = [
        context.Process(target=client_process, args=(frontend, case.streams, direct, *cells), daemon=True)
        for cells in zip(counts, running, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        until = time.monotonic() + _START_S
        while not all(each.value for each in running):
            if time.monotonic() > until or not all(process.is_alive() for process in processes):
                raise BenchmarkError(f"the streams did not begin within {_START_S:g} s")
            time.sleep(_LOOK_S)
        yield counts
    finally:
        for process in processes:
            process.kill()
            process.join()


def measure(name: str, relay: str, seconds: float) -> Mapping[str, float]:
    """Return the figures of one case.

    Raises:
        BenchmarkError: something did not start, or ended meanwhile.
    """
    case, direct = CASES[name], relay == DIRECT
    os.environ |= {"PYTHONPATH": str(Path(__file__).parent), STEPS: str(case.beats)}
    try:
        with LocalCluster() as cluster:
            offer = ("--direct", "tcp://127.0.0.1:*") if direct else ()
            slots = str(case.clients * case.streams)
            engine = ("--engine", "beat_engine:BeatEngine", "--model", _MODEL)
            cluster.start_worker(*engine, "--slots", slots, *offer)
            cluster.wait_ready(_MODEL)
            with clients(cluster.frontend, case, direct) as counts, Client(cluster.frontend) as asker:

                def look() -> tuple[float, int, float, float, int]:
                    done = sum(count.value for count in counts)
                    used = cpu_s(cluster.broker.pid), cpu_s(cluster.workers[0].pid)
                    return time.monotonic(), done, *used, asker.status()["counters"]["chunk_messages"]

                before = look()
                time.sleep(seconds)
                after = look()
    except (LocalClusterError, TokenmqError) as error:
        raise BenchmarkError(str(error)) from error
    lasted, tokens, broker_s, worker_s, messages = (now - then for now, then in zip(after, before, strict=True))
    if not tokens:
        raise BenchmarkError("no token came")
    return {
        "tokens_per_s": tokens / lasted,
        "broker_cpu_s_per_million_tokens": 1e6 * broker_s / tokens,
        "worker_cpu_s_per_million_tokens": 1e6 * worker_s / tokens,
        "broker_messages_per_s": messages / lasted,
    }


def main() -> None:
    """Run what the command line asks for."""
    options = rounds.parse(rounds.parser(__doc__, list(CASES), [BROKERED, DIRECT], 5.0))
    rounds.run("direct", options, lambda case, relay: measure(case, relay, options.seconds), COLUMNS, base=BROKERED)


if __name__ == "__main__":
    main()
