"""Which plots docs/performance.md has, and which figures are in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import charts
import scale
from rounds import Row
from runs import Run, Spread, spread

_PERCENTILES = {"p50_ms": "p50", "p90_ms": "p90", "p99_ms": "p99", "p999_ms": "p99.9"}


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot.

    Attributes:
        benchmark: whose figures it shows.
        name: of the file in docs/figures, without its ending.
        title: what it shows.
        draw: writes a file.
    """

    benchmark: str
    name: str
    title: str
    draw: Callable[[Path], None]


def plots(runs: Mapping[str, Run]) -> Iterator[Plot]:
    """Yield the plots that the runs have figures for."""
    bars: Sequence[tuple[str, str, str, str, Sequence[str], str]] = (
        (
            "relay", "performance-tokens", "Tokens a second, flat out", "tokens/s",
            ("flat-1", "flat-16"), "tokens_per_s",
        ),
        (
            "relay", "performance-cpu", "CPU of the relay, 256 streams paced at 20 ms", "CPU s for a million tokens",
            ("paced-256x1", "paced-256x64"), "cpu_s_per_million_tokens",
        ),
        (
            "request_rate", "performance-requests", "Requests of one token a second, 64 in flight", "requests/s",
            ("one-reply", "with-finish"), "requests_per_s",
        ),
    )  # fmt: skip
    for benchmark, name, title, axis, cases, figure in bars:
        groups = _groups(_rows(runs, benchmark), cases, figure)
        if groups:
            draw = partial(charts.bars, title=title, axis=axis, groups=groups, logarithmic=figure.endswith("_per_s"))
            yield Plot(benchmark, name, title, draw)
    yield from _latency(_rows(runs, "latency"))
    yield from _startup(_rows(runs, "startup"))
    yield from _growth(_rows(runs, "scale"))


def _latency(rows: Sequence[Row]) -> Iterator[Plot]:
    panels = {}
    for case in dict.fromkeys(row.case for row in rows):
        relays = dict.fromkeys(row.relay for row in rows if row.case == case)
        lines = {relay: _points(rows, case, relay) for relay in relays}
        panels[case] = {relay: points for relay, points in lines.items() if points}
    if any(panels.values()):
        title = "Time that a relay adds"
        ticks = list(_PERCENTILES.values())
        draw = partial(
            charts.lines, title=title, axes=("percentile", "ms"), panels=panels, ticks=ticks, logarithmic="y"
        )
        yield Plot("latency", "performance-latency", title, draw)


def _points(rows: Sequence[Row], case: str, relay: str) -> list[tuple[float, float]]:
    found = [spread(rows, case, relay, name) for name in _PERCENTILES]
    return [(at, each.median) for at, each in enumerate(found) if each is not None]


def _startup(rows: Sequence[Row]) -> Iterator[Plot]:
    title = "From the start of a process"
    groups = {}
    for relay in dict.fromkeys(row.relay for row in rows):
        value = spread(rows, "start", relay, "wall_ms")
        if value is not None:
            groups[relay] = {"": value}
    if groups:
        yield Plot(
            "startup", "performance-startup", title, partial(charts.bars, title=title, axis="ms", groups=groups)
        )


def _growth(rows: Sequence[Row]) -> Iterator[Plot]:
    panels = {}
    for family in ("streams", "workers"):
        cases = [case for case, work in scale.CASES.items() if work.family == family]
        groups = _groups(rows, cases, "cpu_us_per_token")
        relays = dict.fromkeys(relay for group in groups.values() for relay in group)
        panels[family] = {
            relay: [
                (float(case.rpartition("-")[2]), group[relay].median)
                for case, group in groups.items()
                if relay in group
            ]
            for relay in relays
        }
    panels = {family: lines for family, lines in panels.items() if lines}
    if panels:
        title = "CPU of the relay for a token, 10,000 tokens a second"
        draw = partial(charts.lines, title=title, axes=("how many", "us"), panels=panels, logarithmic="x")
        yield Plot("scale", "performance-growth", title, draw)


def _rows(runs: Mapping[str, Run], benchmark: str) -> Sequence[Row]:
    return runs[benchmark].rows if benchmark in runs else ()


def _groups(rows: Sequence[Row], cases: Sequence[str], name: str) -> dict[str, dict[str, Spread]]:
    """Return a figure by case and relay, without what was not measured."""
    groups = {}
    for case in cases:
        relays = dict.fromkeys(row.relay for row in rows if row.case == case)
        found = {relay: spread(rows, case, relay, name) for relay in relays}
        known = {relay: value for relay, value in found.items() if value is not None}
        if known:
            groups[case] = known
    return groups
