"""Interleaved rounds of a benchmark: every relay in turn on every case, medians, ratios, and one JSON form for all.

Machines differ, and one machine differs from minute to minute. So the relays take turns within each round, and what
counts is the ratio of figures of the same round; the median of these ratios is printed. Scripts say what to measure:

    rows = interleave(["flat-1"], ["bare", "zmq-broker"], rounds=5, measure=measure)
    print("\\n".join(table(rows, {"tokens_per_s": "tokens/s"}, base="bare")))
    write(path, "relay", {"rounds": 5}, rows)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import zmq

from tokenmq.protocol.version import VERSION

ROUNDS = 5
_HERE = Path(__file__).parent


class BenchmarkError(RuntimeError):
    """A measurement that cannot be done, or whose figures would mean nothing; the message says why."""


class NotHereError(BenchmarkError):
    """A relay that this machine does not have: its row is skipped."""


class BehindError(BenchmarkError):
    """A relay does not keep up with paced work."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one relay did in one case of one round.

    Attributes:
        relay: its name.
        case: the name of the work.
        round: which round, from 1.
        figures: numbers by name, with the unit in the name.
    """

    relay: str
    case: str
    round: int
    figures: Mapping[str, float]


def interleave(
    cases: Sequence[str],
    relays: Sequence[str],
    rounds: int,
    measure: Callable[[str, str], Mapping[str, float]],
    tell: Callable[[str], None] = print,
    suits: Callable[[str, str], bool] = lambda _case, _relay: True,
) -> list[Row]:
    """Measure each case with each relay in turn, and all of it in so many rounds.

    Args:
        cases: names of the work.
        relays: names of those who do it.
        rounds: how many rounds.
        measure: takes a case and a relay, returns the figures; NotHereError skips this relay from then on.
        tell: takes a line after each measurement.
        suits: whether this case is there for this relay.

    Raises:
        BenchmarkError: a measurement failed; the message says which one.
    """
    rows = []
    missing: set[str] = set()
    for number in range(1, rounds + 1):
        for case in cases:
            for relay in relays:
                if relay in missing or not suits(case, relay):
                    continue
                try:
                    figures = measure(case, relay)
                except NotHereError as error:
                    missing.add(relay)
                    tell(f"{relay}: skipped: {error}")
                    continue
                except BenchmarkError as error:
                    raise BenchmarkError(f"round {number}: {case}: {relay}: {error}") from error
                rows.append(Row(relay, case, number, dict(figures)))
                shown = ", ".join(f"{name} {brief(value)}" for name, value in figures.items())
                tell(f"round {number}: {case}: {relay}: {shown}")
    return rows


def figures_of(rows: Iterable[Row], case: str, relay: str, name: str) -> dict[int, float]:
    """Return one figure of a relay in a case, by round."""
    return {
        row.round: row.figures[name] for row in rows if (row.case, row.relay) == (case, relay) and name in row.figures
    }


def median(rows: Iterable[Row], case: str, relay: str, name: str) -> float | None:
    """Return the median of a figure over the rounds; None where it was not measured."""
    values = figures_of(rows, case, relay, name)
    return statistics.median(values.values()) if values else None


def ratio(rows: Sequence[Row], case: str, name: str, relay: str, base: str) -> float | None:
    """Return the median over the rounds of a relay's figure divided by the base's of the same round.

    None where no round has both.
    """
    ours, theirs = figures_of(rows, case, relay, name), figures_of(rows, case, base, name)
    ratios = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    return statistics.median(ratios) if ratios else None


def table(rows: Sequence[Row], columns: Mapping[str, str], base: str) -> list[str]:
    """Return lines with the medians of each case, and in brackets each one's ratio to the base's.

    Args:
        rows: all rounds.
        columns: headings by the name of the figure, in this order.
        base: the relay that the others are divided by.
    """
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        lines.append(f"{case}: medians; in brackets the ratio to {base}, median over the rounds")
        lines.append(" " * 16 + "".join(f"{heading:>24}" for heading in columns.values()))
        for relay in dict.fromkeys(row.relay for row in rows if row.case == case):
            cells = (_cell(rows, case, relay, name, base) for name in columns)
            lines.append(f"  {relay:14}" + "".join(f"{cell:>24}" for cell in cells))
    return lines


def _cell(rows: Sequence[Row], case: str, relay: str, name: str, base: str) -> str:
    value, part = median(rows, case, relay, name), ratio(rows, case, name, relay, base)
    if value is None:
        return "-"
    return brief(value) + ("" if part is None or relay == base else f" ({part:.2f})")


def brief(value: float) -> str:
    """Return a number with three digits or all before the point, for people."""
    if value and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def machine() -> dict[str, Any]:
    """Return what figures depend on: the processor, the kernel, and the versions of all that took part."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "tokenmq": VERSION,
        "commit": _first_line(["git", "-C", str(_HERE), "describe", "--always", "--dirty"]),
        "nats": _first_line([nats_server(), "--version"]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def nats_server() -> str:
    """Return where nats-server is; only its name where it is not. Packages put it where users do not look."""
    return (
        shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/sbin") or "nats-server"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _first_line(command: Sequence[str]) -> str | None:
    """Return the first line that a command prints; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def document(benchmark: str, arguments: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """Return the common form: the machine, what was asked for, and every row of every round."""
    return {
        "benchmark": benchmark,
        "machine": machine(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "rounds": [asdict(row) for row in rows],
    }


def write(path: Path, benchmark: str, arguments: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Write the common form as a JSON file."""
    path.write_text(json.dumps(document(benchmark, arguments, rows), indent=1) + "\n")


def read(path: Path) -> list[Row]:
    """Return the rows of a JSON file."""
    return [Row(**row) for row in json.loads(path.read_text())["rounds"]]


def positive(word: str) -> int:
    """Return the number that an option was given: an integer above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (word.isascii() and word.isdigit() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {word!r}")
    return int(word)


def above_zero(word: str) -> float:
    """Return the number that an option was given: a finite one above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {word!r}")
    return value


def parser(about: str | None, cases: Sequence[str], relays: Sequence[str], seconds: float) -> argparse.ArgumentParser:
    """Return a parser with the options that all these benchmarks have.

    Args:
        about: what --help begins with.
        cases: the names of the work.
        relays: the names of those who do it.
        seconds: how long one measurement lasts by default.
    """
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=positive, default=ROUNDS, help="rounds (default: %(default)s)")
    made.add_argument(
        "--seconds", type=above_zero, default=seconds, help="seconds of each measurement (default: %(default)s)"
    )
    made.add_argument(
        "--relays", nargs="+", choices=relays, default=list(relays), metavar="NAME",
        help=f"only these of {', '.join(relays)} (default: all)",
    )  # fmt: skip
    made.add_argument(
        "--cases", nargs="+", choices=cases, default=list(cases), metavar="NAME",
        help=f"only these of {', '.join(cases)} (default: all)",
    )  # fmt: skip
    made.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there (default: nowhere)")
    made.add_argument(
        "--quick", action="store_true", help="one round of 0.3 seconds each, to see that it runs (default: off)"
    )
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line; --quick shortens what they ask for."""
    options = made.parse_args()
    if options.json is not None and not options.json.parent.is_dir():
        made.error(f"--json: there is no folder {options.json.parent}")
    if options.quick:
        options.rounds, options.seconds = 1, 0.3
    return options


def run(
    benchmark: str,
    options: argparse.Namespace,
    measure: Callable[[str, str], Mapping[str, float]],
    columns: Mapping[str, str],
    base: str,
    notes: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Measure what the options ask for, print the medians and ratios, write the file.

    Args:
        benchmark: its name in the file.
        options: from `parse`.
        measure: takes a case and a relay, returns the figures.
        columns: the figures of the table with their headings.
        base: the relay that the others are divided by.
        notes: returns lines that stand below the table.

    Raises:
        SystemExit: a measurement failed; its message is one line.
    """
    try:
        rows = interleave(
            options.cases, options.relays, options.rounds, measure, lambda line: print(line, flush=True)
        )
    except BenchmarkError as error:
        raise SystemExit(f"error: {error}") from error
    print()
    print("\n".join([*table(rows, columns, base), *notes()]))
    if options.json is not None:
        write(options.json, benchmark, vars(options), rows)
