"""What many streams, clients and workers cost a broker: latency, CPU and memory, against bounds.

Relay and ends as in relay.py: each on a core of its own, workers and clients plain sockets of one process, which send
the heartbeats of real ones, spread over the second. A worker makes a step each 20 ms; several take turns, so that
their steps are spread over these 20 ms.

held-20000        20,000 streams of 1,000 clients at 10 workers, 1 token a second each. A step brings the tokens of a
                  fiftieth of the worker's clients: one message for each of these, with its two streams there
held-20000-apart  the same, but a client's two streams have their tokens in different steps: each is a message
held-8000         8,000 streams of 8,000 clients at 8 workers, 1 token a second each, in the same way
kept-512, -1536, -4096
                  so many streams of 8 clients at one worker, which brings a token of all of them each 20 ms, in one
                  message for each client
memory-shared     the broker's memory for each of 10,000 idle streams of 10 clients
memory-apart      the same for 4,000 idle streams of 4,000 clients; with `bare`, which has no streams, for 4,000
                  connections: libzmq's own share. Then what stays of it when all have gone, and what is taken beyond
                  it when as many come again
idle-1 ... -1000  so many workers that send a heartbeat each second, and no client
streams-100 ... -20000
                  100 clients, 10 workers, 10,000 tokens a second, each a message, of so many streams
workers-1 ... -1000
                  100 clients, 10,000 streams, 10,000 tokens a second, each a message, 10 a step, of so many workers
clients-1, -10, -100
                  so many idle Client objects in a process
worker            an idle zmq-worker with the synthetic engine

The last two have no plain sockets, but the real thing. cpu_us_per_token is all that the relay did in that time,
heartbeats too; cpu_us_above_idle is without what the same ends cost before the first token, and what must not grow.
Times are from a worker's write to a client's read, tokens_per_s is what arrived, of_the_plan its part of what should.
Every token that is sent must arrive, else the run fails.

A round of all takes some ten minutes; --quick makes everything tiny and, without --cases, runs one of each kind.
Run: python benchmarks/scale.py.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import rounds
from idle import idle
from kinds import ends_of
from memory import memory
from peers import idle_clients, idle_worker
from relays import BARE, BROKER, PROXY, Relay, notes, relay
from rounds import BehindError, BenchmarkError, Row, brief, figures_of
from streams import Case, paced

RELAYS = (PROXY, BARE, BROKER)
_STEP_S = 0.02
#: For a relay's and an end's own: sockets, monitors, modules.
_OTHER_FILES = 100
BEHIND = "behind"


@dataclass(frozen=True, slots=True)
class Work:
    """What one case asks for.

    Attributes:
        family: whose table it stands in.
        relays: for whom it is.
        shape: streams, clients and workers; of idle peers only how many.
        quick: the same with --quick, tiny.
    """

    family: str
    relays: Sequence[str]
    shape: Case
    quick: Case


def _held(clients: int, streams: int, workers: int, *, together: bool = False) -> Work:
    steps, few = round(1 / _STEP_S), 5
    full = Case(clients, streams, 1.0, steps * workers, workers, together)
    tiny = Case(few * 2, streams, few * _STEP_S, few * workers, workers, together)
    if streams == 1:
        tiny = Case(few * 2 * workers, 1, few * _STEP_S, few * workers, workers)
    return Work("held", RELAYS, full, tiny)


def _kept(streams: int) -> Work:
    return Work("kept", RELAYS, Case(8, streams // 8, _STEP_S), Case(8, streams // 64, _STEP_S))


def _growth(family: str, streams: int, workers: int) -> Work:
    """10,000 tokens a second, ten in each millisecond, from one worker."""
    full = Case(100, streams // 100, streams / 10_000, streams // 10, workers)
    few = max(10, workers // 10)
    return Work(family, (BARE, BROKER), full, Case(10, few, few / 1_000, few * 10, min(few, workers)))


_BOTH, _OURS = (BARE, BROKER), (BROKER,)
CASES = {
    "held-20000": _held(1_000, 20, 10, together=True),
    "held-20000-apart": _held(1_000, 20, 10),
    "held-8000": _held(8_000, 1, 8),
    **{f"kept-{streams}": _kept(streams) for streams in (512, 1_536, 4_096)},
    "memory-shared": Work("memory", _OURS, Case(10, 1_000), Case(2, 50)),
    "memory-apart": Work("memory", _BOTH, Case(4_000, 1), Case(40, 1)),
    **{f"idle-{number}": Work("idle", _OURS, Case(0, 0, workers=number), Case(0, 0, workers=min(number, 20)))
       for number in (1, 10, 100, 1_000)},
    **{f"streams-{streams}": _growth("streams", streams, 10) for streams in (100, 1_000, 20_000)},
    **{f"workers-{workers}": _growth("workers", 10_000, workers) for workers in (1, 10, 100, 1_000)},
    **{f"clients-{number}": Work("peers", _OURS, Case(number, 0), Case(min(number, 3), 0))
       for number in (1, 10, 100)},
    "worker": Work("peers", _OURS, Case(0, 0), Case(0, 0)),
}  # fmt: skip
#: What --quick runs where no case is named: one of each kind.
QUICK = ("held-20000", "kept-512", "memory-shared", "idle-10", "streams-100", "worker")
_TIMES = {"p50_ms": "p50 ms", "p99_ms": "p99 ms", "max_ms": "max ms"}
_SHARES = {"relay_cpu_share": "relay's core", "ends_cpu_share": "ends' core"}
_PACED = {"tokens_per_s": "tokens/s", "of_the_plan": "of the plan", **_TIMES, **_SHARES, BEHIND: "did not keep up"}
_GROWTH = {"cpu_us_per_token": "CPU us/token", "cpu_us_above_idle": "above idle", **_PACED}
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "held": _PACED,
    "kept": _PACED,
    "memory": {
        "kb_per_stream": "KiB a stream", "kb_that_stay": "that stay", "kb_more_again": "more again",
        "megabytes_before": "MiB before", "megabytes": "MiB with all",
    },
    "idle": _SHARES,
    "streams": _GROWTH,
    "workers": _GROWTH,
    "peers": {
        "process_megabytes": "MiB of the process", "kb_each": "KiB more for each", "cpu_share_each": "core for each",
        "broker_cpu_share_each": "broker's core for each",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bound:
    """What is asked of zmq-broker.

    Attributes:
        case: in this case,
        figure: this figure,
        below: is to be below this,
        unit: of these,
        than: as a multiple of what it is in this case; "" for the figure itself.
    """

    case: str
    figure: str
    below: float
    unit: str
    than: str = ""


BOUNDS = (
    *(Bound(case, "p99_ms", 100.0, "ms") for case, work in CASES.items() if work.family in ("held", "kept")),
    Bound("memory-shared", "kb_per_stream", 4.0, "KiB"),
    Bound("memory-apart", "kb_per_stream", 40.0, "KiB"),
    Bound("idle-1000", "relay_cpu_share", 0.05, "of a core"),
    Bound("streams-20000", "cpu_us_above_idle", 1.5, "times", "streams-100"),
    Bound("workers-1000", "cpu_us_above_idle", 1.5, "times", "workers-1"),
)


def values(rows: Sequence[Row], bound: Bound) -> list[float]:
    """Return what a bound is about, of each round that has it."""
    found = figures_of(rows, bound.case, BROKER, bound.figure)
    if not bound.than:
        return list(found.values())
    base = figures_of(rows, bound.than, BROKER, bound.figure)
    return [value / base[number] for number, value in found.items() if number in base]


def verdict(rows: Sequence[Row], bound: Bound) -> str:
    """Return a line that tells whether a bound is kept; empty where nothing was measured."""
    against = f" against {bound.than}" if bound.than else ""
    asked = f"{bound.case}: {bound.figure}{against}: asked for below {brief(bound.below)} {bound.unit}"
    if figures_of(rows, bound.case, BROKER, BEHIND):
        return f"{asked}, did not keep up: NOT MET"
    measured = values(rows, bound)
    if not measured:
        return ""
    middle = statistics.median(measured)
    spread = f"{brief(min(measured))} to {brief(max(measured))}"
    return f"{asked}, measured {brief(middle)} ({spread}): {'met' if middle < bound.below else 'NOT MET'}"


def files(shape: Case) -> int:
    """Return how many open files the ends of a case, or its relay, need."""
    return shape.clients + shape.workers + _OTHER_FILES


def tokens(shape: Case, running: Relay, seconds: float, *, above_idle: bool) -> dict[str, float]:
    """Return the figures of a case with tokens.

    Args:
        shape: clients, streams and workers.
        running: the relay.
        seconds: how long.
        above_idle: also measure, before the first token, what the ends cost without any.
    """
    assert shape.interval_s is not None
    with ends_of(
        running, workers=shape.workers, clients=shape.clients, streams=shape.streams, slots=shape.slots
    ) as ends:
        idle_share = idle(ends, running, seconds / 2)["relay_cpu_share"] if above_idle else 0.0
        try:
            figures = paced(ends, running, shape, seconds)
        except BehindError:
            return {BEHIND: 1.0}
    rate = figures["tokens_per_s"]
    figures["of_the_plan"] = rate * shape.interval_s / (shape.clients * shape.streams)
    if above_idle:
        figures["cpu_us_per_token"] = figures["cpu_s_per_million_tokens"]
        figures["cpu_us_above_idle"] = (figures["relay_cpu_share"] - idle_share) / rate * 1e6
    return figures


def measure(name: str, shape: Case, on: str, seconds: float) -> Mapping[str, float]:
    """Return the figures of a case.

    Raises:
        BenchmarkError: the relay, or an end, does not do its part.
    """
    family = CASES[name].family
    with relay(on) as running:
        if family == "memory":
            return memory(running, shape.clients, shape.streams)
        if family == "idle":
            with ends_of(running, workers=shape.workers, clients=0, slots=8) as ends:
                idle(ends, running, seconds / 5)
                return idle(ends, running, seconds)
        if family == "peers":
            return idle_clients(running, shape.clients, seconds) if shape.clients else idle_worker(running, seconds)
        return tokens(shape, running, seconds, above_idle=family in ("streams", "workers"))


def report(rows: Sequence[Row]) -> list[str]:
    """Return the tables of all families, and below them the bounds."""
    lines = []
    for family, columns in COLUMNS.items():
        own = [row for row in rows if CASES[row.case].family == family]
        if own:
            lines += [f"-- {family}", *rounds.table(own, columns, BARE if len(_of(own)) > 1 else BROKER)]
    return lines + [line for bound in BOUNDS if (line := verdict(rows, bound))]


def _of(rows: Sequence[Row]) -> set[str]:
    return {row.relay for row in rows}


def _options() -> argparse.Namespace:
    made = rounds.parser(__doc__, list(CASES), RELAYS, seconds=10.0)
    made.set_defaults(rounds=3, cases=None)
    options = rounds.parse(made)
    if options.cases is None:
        options.cases = list(QUICK if options.quick else CASES)
    return options


def main() -> None:
    """Measure what the command line asks for.

    Raises:
        SystemExit: a measurement failed; its message is one line.
    """
    options = _options()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    shapes = {name: CASES[name].quick if options.quick else CASES[name].shape for name in options.cases}
    for name in [name for name, shape in shapes.items() if files(shape) > most != resource.RLIM_INFINITY]:
        print(f"{name}: skipped: needs {files(shapes.pop(name))} open files, the hard limit is {most} (ulimit -Hn)")
    try:
        rows = rounds.interleave(
            list(shapes),
            options.relays,
            options.rounds,
            lambda case, on: measure(case, shapes[case], on, options.seconds),
            lambda line: print(line, flush=True),
            lambda case, on: on in CASES[case].relays,
        )
    except BenchmarkError as error:
        raise SystemExit(f"error: {error}") from error
    print()
    print("\n".join([*report(rows), *notes()]))
    if options.quick:
        print("--quick: everything is tiny, and the bounds say nothing")
    if options.json is not None:
        rounds.write(options.json, "scale", vars(options), rows)


if __name__ == "__main__":
    main()
