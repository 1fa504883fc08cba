"""What several brokers do on several cores: `zmq-broker --shards N`, each shard with ends of its own.

1, 2, 4 ...   so many shards, each on a core of its own
1-apart       one shard on a core of its own with its ends on another one: what one broker does at best

Ends are what benchmarks/relay.py has: plain sockets that cost little. Those of each shard are a process of their own.
On a machine with a core for each shard and for each process of ends, they have one; on a smaller one the ends of a
shard share its core, for every number of shards alike. So N shards on N cores stand against one shard on one core,
and "1" is less than "1-apart" by what the ends take.

flat-1      tokens flat out: 64 streams, one for each of 64 clients, for each shard
flat-16     tokens flat out: 64 streams, 16 for each of 4 clients, for each shard
requests    requests of one token, 64 at a time at each shard, each answered by CHUNKS and FINISH

per_s is tokens or requests a second of all shards together; it grows with them where the cores have nothing else to
do. per_core_s is the same for each second of CPU time that shards and their ends got: it stays what it is where
shards cost one another nothing, also on a machine that is busy with other work. cpu_us_each is the CPU time of the
shards, all threads, for each token or request.
Run: python benchmarks/shards.py.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryDirectory

import rounds
from closed_loop import ClosedLoop
from kinds import ends_of
from relays import BROKER, LIFTED, Relay, on_core
from rounds import BenchmarkError
from streams import Case, flat_out

from tokenmq.client.local import LocalProcess, free_ports

CASES = {"flat-1": Case(64, 1), "flat-16": Case(4, 16), "requests": None}
COLUMNS = {
    "per_s": "a second, all",
    "per_core_s": "a second of a core",
    "cpu_us_each": "CPU us for each",
    "shard_cpu_share": "a shard's core",
    "ends_cpu_share": "its ends' core",
}
APART = "1-apart"
CLIENTS, WORKERS, SLOTS, IN_FLIGHT = 8, 4, 32, 64
_START_S = 20.0
_PATIENCE_S = 60.0


def places(count: int, cores: Sequence[int], *, apart: bool) -> list[tuple[int, int]]:
    """Return a core for each shard and one for its ends.

    Args:
        count: how many shards.
        cores: those of this machine.
        apart: the ends have cores of their own.

    Raises:
        BenchmarkError: there are too few.
    """
    if count * (1 + apart) > len(cores):
        raise BenchmarkError(f"{count} shards need {count * (1 + apart)} cores; here are {len(cores)}")
    shards, ends = cores[:count], cores[count : 2 * count] if apart else cores[:count]
    return list(zip(shards, ends, strict=True))


def numbers(cores: int) -> list[int]:
    """Return the numbers of shards that so many cores can hold: powers of two."""
    return [2**power for power in range(cores.bit_length())]


@contextmanager
def shards(on: Sequence[int]) -> Iterator[list[Relay]]:
    """Run the command with a shard on each of these cores.

    Raises:
        BenchmarkError: it does not start.
    """
    count = len(on)
    port = _free_block(2 * count)
    with TemporaryDirectory(prefix="tokenmq-bench-") as folder:
        log = Path(folder) / "broker.log"
        listen = (f"--frontend=tcp://127.0.0.1:{port}", f"--backend=tcp://127.0.0.1:{port + 1}")
        process = LocalProcess(
            "broker", [sys.executable, "-m", "tokenmq.cli.broker", "--shards", str(count), *listen, *LIFTED], log
        )
        try:
            end = time.monotonic() + _START_S
            while log.read_text().count("broker_started") < count:
                if process.exit_code is not None or time.monotonic() > end:
                    raise BenchmarkError(f"zmq-broker does not start: {process.log_tail()}")
                time.sleep(0.02)
            pids = [int(pid) for pid in re.findall(r"shard_started .*pid=(\d+)", log.read_text())] or [process.pid]
            for pid, core in zip(pids, on, strict=True):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), {core})
            yield [Relay(BROKER, port + 2 * k, port + 2 * k + 1, pid) for k, pid in enumerate(pids)]
        except BenchmarkError as error:
            last = log.read_text().splitlines()[-1:]
            raise BenchmarkError(f"{error}; the last that zmq-broker says is {last}") from error
        finally:
            process.kill()  # its shards end with it, and with them streams that would never end


def _free_block(size: int) -> int:
    """Return the first of so many free ports that follow one another."""
    free = set(free_ports(2_000))
    return next(port for port in sorted(free) if all(port + more in free for more in range(size)))


def work(pipe: Pipe, relay: Relay, case: str, seconds: float, core: int) -> None:
    """Be the ends of one shard, in a process of its own: connect, wait for the word, measure, tell."""
    shape = CASES[case]
    sizes = (
        {"workers": WORKERS, "clients": CLIENTS, "slots": SLOTS}
        if shape is None
        else {"clients": shape.clients, "streams": shape.streams, "slots": shape.clients * shape.streams}
    )
    with on_core(core):
        try:
            with ends_of(relay, **sizes) as ends:
                pipe.send(None)
                pipe.recv()
                if shape is None:
                    found = ClosedLoop(ends, IN_FLIGHT, finish=True).run(relay, seconds)
                    per_s, each = found["requests_per_s"], found["cpu_us_per_request"]
                else:
                    found = flat_out(ends, relay, shape, seconds)
                    per_s, each = found["tokens_per_s"], found["cpu_s_per_million_tokens"]
                pipe.send((per_s, each, found["relay_cpu_share"], found["ends_cpu_share"]))
        except (BenchmarkError, OSError) as error:
            pipe.send(BenchmarkError(str(error)))


def measure(case: str, at: Sequence[tuple[int, int]], seconds: float) -> dict[str, float]:
    """Run a case at shards and ends on these cores; return the figures of all together.

    Raises:
        BenchmarkError: one of them did not do its part.
    """
    start = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = []
        for running, (_, core) in zip(stack.enter_context(shards([shard for shard, _ in at])), at, strict=True):
            ours, theirs = start.Pipe()
            process = start.Process(target=work, args=(theirs, running, case, seconds, core), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            pipes.append(ours)
        for pipe in pipes:
            _hear(pipe)
        for pipe in pipes:
            pipe.send(None)
        found = [_hear(pipe) for pipe in pipes]
    per_s = sum(one[0] for one in found)
    return {
        "per_s": per_s,
        "per_core_s": per_s / sum(one[2] + one[3] for one in found),
        "cpu_us_each": sum(one[0] * one[1] for one in found) / per_s,
        "shard_cpu_share": sum(one[2] for one in found) / len(found),
        "ends_cpu_share": sum(one[3] for one in found) / len(found),
    }


def _hear(pipe: Pipe) -> tuple[float, float, float, float]:
    if not pipe.poll(_PATIENCE_S):
        raise BenchmarkError(f"the ends of a shard have said nothing for {_PATIENCE_S:g} s")
    try:
        said = pipe.recv()
    except EOFError as error:
        raise BenchmarkError("the ends of a shard have failed") from error
    if isinstance(said, BenchmarkError):
        raise said
    heard: tuple[float, float, float, float] = said
    return heard


def main() -> None:
    """Measure what the command line asks for."""
    cores = sorted(os.sched_getaffinity(0))
    known = [*map(str, numbers(len(cores))), APART]
    options = rounds.parse(rounds.parser(__doc__, list(CASES), known, seconds=3.0))
    most = max(int(name) for name in options.relays if name != APART) if options.relays != [APART] else 1
    roomy = 2 * most <= len(cores)

    def run(case: str, name: str) -> Mapping[str, float]:
        count = 1 if name == APART else int(name)
        return measure(case, places(count, cores, apart=roomy or name == APART), options.seconds)

    def notes() -> list[str]:
        where = "the ends of each shard have a core of their own" if roomy else "the ends share their shard's core"
        return [f"{len(cores)} cores: {where}"]

    rounds.run("shards", options, run, COLUMNS, "1", notes)


if __name__ == "__main__":
    main()
