"""What the latest run of each benchmark has left in benchmarks/results, and what its figures are over the rounds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rounds import BenchmarkError, Row, brief, figures_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: In this order they are measured and told.
NAMES = ("relay", "request_rate", "latency", "startup", "scale", "shards", "direct", "curve", "flood")


@dataclass(frozen=True, slots=True)
class Run:
    """One benchmark's latest run.

    Attributes:
        machine: what figures depend on.
        arguments: what was asked for.
        rows: every round; none where it failed.
        error: why it failed, in one line; "" where it did not.
    """

    machine: Mapping[str, Any]
    arguments: Mapping[str, Any]
    rows: Sequence[Row]
    error: str = ""

    @property
    def quick(self) -> bool:
        """Whether it was only to see that it runs, so that its figures mean little."""
        return bool(self.arguments.get("quick"))

    @property
    def asked(self) -> list[str]:
        """The relays that it was to measure."""
        return list(self.arguments.get("relays") or self.arguments.get("commands") or ())

    @property
    def missing(self) -> list[str]:
        """Those of them that it has no row of."""
        here = {row.relay for row in self.rows}
        return [name for name in self.asked if name not in here]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return that of some values; None without any."""
        known = list(values)
        return cls(statistics.median(known), min(known), max(known)) if known else None

    def __str__(self) -> str:
        """Return it for a table; what does not differ is told once."""
        middle, least, most = brief(self.median), brief(self.least), brief(self.most)
        return middle if least == most else f"{middle} ({least} to {most})"


def spread(rows: Iterable[Row], case: str, relay: str, name: str) -> Spread | None:
    """Return a figure over the rounds; None where it was not measured."""
    return Spread.of(figures_of(rows, case, relay, name).values())


def ratios(rows: Sequence[Row], name: str, above: tuple[str, str], below: tuple[str, str]) -> Spread | None:
    """Return one figure divided by another of the same round, over the rounds; None where no round has both.

    Args:
        rows: all rounds.
        name: the figure.
        above: case and relay of what is divided.
        below: case and relay of what it is divided by.
    """
    ours, theirs = figures_of(rows, *above, name), figures_of(rows, *below, name)
    return Spread.of(ours[number] / theirs[number] for number in ours if theirs.get(number))


def load(folder: Path = RESULTS) -> dict[str, Run]:
    """Return the latest runs by the name of the benchmark; without those that were never run.

    Raises:
        BenchmarkError: a file is not in the common form.
    """
    found = {}
    for name in NAMES:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            said = json.loads(path.read_text())
            rows = [Row(**row) for row in said["rounds"]]
            found[name] = Run(said["machine"], said["arguments"], rows, said.get("error", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path} is not what a benchmark writes: {error!r}") from error
    return found
