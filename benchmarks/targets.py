"""What speed is asked for, and how each of it follows from the figures of the benchmarks.

A target is met when the median over the rounds is within its bound. Cases and figures have the names that the scripts
give them; what a run does not have was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import scale
from relays import BARE, BROKER, NATS, PROXY
from rounds import Row, figures_of
from runs import Run, Spread, ratios, spread

#: Takes all rounds of a benchmark; None where they do not have what it needs.
Measure = Callable[[Sequence[Row]], Spread | None]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure must be: `words` a number, such as "at least 0.3", by a comparison."""

    words: str
    number: float
    holds: Callable[[float, float], bool]


def at_least(number: float) -> Bound:
    """Return the bound of what must not be less."""
    return Bound("at least", number, lambda value, bound: value >= bound)


def at_most(number: float) -> Bound:
    """Return the bound of what must not be more."""
    return Bound("at most", number, lambda value, bound: value <= bound)


def above(number: float) -> Bound:
    """Return the bound of what must be more."""
    return Bound("above", number, lambda value, bound: value > bound)


def below(number: float) -> Bound:
    """Return the bound of what must be less."""
    return Bound("below", number, lambda value, bound: value < bound)


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that is asked for.

    Attributes:
        what: what is measured, for people.
        unit: what the number is a number of, such as "ms" or "times the C proxy's".
        benchmark: the name of the benchmark.
        measure: how the figure follows from its rounds.
        bound: what it must be; None where it is only told.
        aim: it is hoped for, not asked for.
        case: where a relay that did not keep up in some round has missed the bound, whatever the others say.
    """

    what: str
    unit: str
    benchmark: str
    measure: Measure
    bound: Bound | None = None
    aim: bool = False
    case: str = ""

    def value(self, runs: Mapping[str, Run]) -> Spread | None:
        """Return the figure; None where it was not measured."""
        return self.measure(runs[self.benchmark].rows) if self.benchmark in runs else None

    def asked(self) -> str:
        """Return the bound for a table."""
        if self.bound is None:
            return "no bound"
        return f"{'aim: ' if self.aim else ''}{self.bound.words} {self.bound.number:,g} {self.unit}"

    def verdict(self, runs: Mapping[str, Run]) -> str:
        """Return whether it is met; a quick run says nothing of that."""
        run, value = runs.get(self.benchmark), self.value(runs)
        if run is not None and figures_of(run.rows, self.case, BROKER, scale.BEHIND):
            return "**not met**: did not keep up"
        if run is None or value is None:
            return "not measured"
        if run.quick:
            return "quick run"
        if self.bound is None:
            return "told"
        held = self.bound.holds(value.median, self.bound.number)
        if self.aim:
            return "reached" if held else "not reached"
        return "met" if held else "**not met**"


def share(case: str, name: str, base: str, relay: str = BROKER) -> Measure:
    """Return what divides a relay's figure by the base's of the same round."""
    return lambda rows: ratios(rows, name, (case, relay), (case, base))


def plain(case: str, name: str, relay: str = BROKER) -> Measure:
    """Return what takes a figure as it is."""
    return lambda rows: spread(rows, case, relay, name)


def grown(name: str, last: str, first: str, relay: str = BROKER) -> Measure:
    """Return what divides a figure in one case by the same one in another case."""
    return lambda rows: ratios(rows, name, (last, relay), (first, relay))


def flood_harm(rows: Sequence[Row], name: str) -> Spread | None:
    """Return a figure of bystanders in a flood by that of the same round without one, of the kind that is worst."""
    kinds = dict.fromkeys(row.case for row in rows)
    found = [harm for kind in kinds if (harm := ratios(rows, name, (kind, "flooded"), (kind, "quiet")))]
    return max(found, key=lambda harm: harm.median, default=None)


def scaled(bound: scale.Bound) -> Target:
    """Return the target that a bound of scale.py is."""
    return Target(
        _SCALE[bound.case],
        bound.unit,
        "scale",
        lambda rows: Spread.of(scale.values(rows, bound)),
        below(bound.below),
        case=bound.case,
    )


#: What the bounds of scale.py are about.
_SCALE = {
    "held-20000": "20,000 streams over 1,000 connections, 1 token/s each, 2 in a message: p99 of the added latency",
    "held-20000-apart": "20,000 streams over 1,000 connections, 1 token/s each, a message each: p99",
    "held-8000": "8,000 streams over 8,000 connections, 1 token/s each: p99",
    "kept-512": "512 streams over 8 connections, a token each 20 ms: p99",
    "kept-1536": "1,536 streams over 8 connections, a token each 20 ms: p99",
    "kept-4096": "4,096 streams over 8 connections, a token each 20 ms: p99",
    "memory-shared": "the broker's memory for each idle stream, 10 connections of 1,000",
    "memory-apart": "the broker's memory for each idle stream with its own connection",
    "idle-1000": "1,000 workers with heartbeats, no requests",
    "streams-20000": "growth: CPU for a token beyond what is idle, 20,000 streams against 100",
    "workers-1000": "growth: CPU for a token beyond what is idle, 1,000 workers against 1",
}


_TOKENS, _CPU = "tokens_per_s", "cpu_s_per_million_tokens"
_OF_BARE, _OF_PROXY, _OF_NATS = "of the bare forwarder's", "times the C proxy's", "times NATS's"
_RATE_WHAT = "requests of one token a second through full routing, 64 in flight"

RATE = Target(_RATE_WHAT, _OF_BARE, "request_rate", share("one-reply", "requests_per_s", BARE), at_least(0.3))
FLAT_1 = Target(
    "tokens/s flat out, one stream for each client connection", _OF_BARE, "relay",
    share("flat-1", _TOKENS, BARE), at_least(0.75),
)  # fmt: skip
FLAT_16 = Target(
    "tokens/s flat out, 16 streams for each client connection", _OF_NATS, "relay",
    share("flat-16", _TOKENS, NATS), above(1),
)  # fmt: skip
SHARED = Target(
    "CPU for a million tokens, 256 streams paced at 20 ms, 64 for each client connection", _OF_PROXY, "relay",
    share("paced-256x64", _CPU, PROXY), below(1),
)  # fmt: skip
P50 = Target(
    "added latency from worker to client, 32 paced streams, one for each client: p50", _OF_PROXY, "latency",
    share("spread-1", "p50_ms", PROXY), below(1.5),
)  # fmt: skip

TARGETS: Sequence[Target] = (
    RATE,
    Target(_RATE_WHAT, _OF_BARE, "request_rate", RATE.measure, at_least(0.5), aim=True),
    FLAT_1,
    FLAT_16,
    Target(FLAT_16.what, _OF_PROXY, "relay", share("flat-16", _TOKENS, PROXY), at_least(1), aim=True),
    SHARED,
    Target(
        "CPU for a million tokens, 256 streams paced at 20 ms, one for each client connection",
        "times the bare forwarder's", "relay", share("paced-256x1", _CPU, BARE), at_most(1.3),
    ),
    P50,
    Target(
        "added latency from worker to client, 32 paced streams, one for each client: p99", _OF_PROXY, "latency",
        share("spread-1", "p99_ms", PROXY), below(2),
    ),
    Target(
        "added latency from worker to client, 32 paced streams, 8 for each client: p50", _OF_PROXY, "latency",
        share("spread-8", "p50_ms", PROXY), below(1.5),
    ),
    Target(
        "added latency from worker to client, 32 paced streams, 8 for each client: p99", _OF_PROXY, "latency",
        share("spread-8", "p99_ms", PROXY), below(2),
    ),
    *map(scaled, scale.BOUNDS),
    Target(
        "growth: all CPU for a token, heartbeats too, 20,000 streams against 100", "times", "scale",
        grown("cpu_us_per_token", "streams-20000", "streams-100"), below(1.5), case="streams-20000",
    ),
    Target(
        "growth: all CPU for a token, heartbeats too, 1,000 workers against 1", "times", "scale",
        grown("cpu_us_per_token", "workers-1000", "workers-1"), below(1.5), case="workers-1000",
    ),
    Target(
        "the worst of all kinds of flood by one peer: p99 of the others' tokens", "times quiet", "flood",
        lambda rows: flood_harm(rows, "p99_ms"), at_most(2),
    ),
    Target(
        "the worst of all kinds of flood by one peer: p99 of the others' requests", "times quiet", "flood",
        lambda rows: flood_harm(rows, "request_p99_ms"), at_most(2),
    ),
    Target(
        "CURVE: tokens/s, one stream for each client connection", "of those without", "curve",
        share("flat", "per_s", "plain", "curve"),
    ),
    Target(
        "CURVE: the broker's CPU for a token, paced at 20 ms", "times that without", "curve",
        share("paced", "cpu_us_each", "plain", "curve"),
    ),
    Target(
        "CURVE: requests/s", "of those without", "curve", share("requests", "per_s", "plain", "curve"),
    ),
    Target(
        "CURVE: time of a new connection until its session, p50", "times that without", "curve",
        share("connect", "p50_ms", "plain", "curve"),
    ),
    Target(
        "start-up: a program with a client until its first token", "times `import zmq`", "startup",
        share("start", "wall_ms", "import zmq", "first token"),
    ),
    Target(
        "start-up: `zmq-broker` until it listens", "times `import zmq`", "startup",
        share("start", "wall_ms", "import zmq", "broker listens"),
    ),
)  # fmt: skip

#: What the README tells: ratios, each with the command that shows it.
HEADLINES: Mapping[str, Target] = {
    "python benchmarks/relay.py --cases flat-1": FLAT_1,
    "python benchmarks/relay.py --cases flat-16": FLAT_16,
    "python benchmarks/relay.py --cases paced-256x64": SHARED,
    "python benchmarks/request_rate.py --cases one-reply": RATE,
    "python benchmarks/latency.py --cases spread-1": P50,
    "python benchmarks/scale.py --cases streams-100 streams-20000": next(
        target for target in TARGETS if target.case == "streams-20000"
    ),
}
