"""docs/performance.md and the README's figures from what the benchmarks have left in benchmarks/results.

The prose of both is written by hand. What stands between `<!-- NAME: made by benchmarks/report.py -->` and the next
`<!-- end -->` is made here, and so are the plots in docs/figures. Nothing is measured.
Run: python benchmarks/report.py; make bench measures all before.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import charts
from performance_plots import plots
from rounds import BenchmarkError, brief
from runs import NAMES, ROOT, Run, load
from sections import TABLES
from tables import lines, missing, row
from targets import HEADLINES, TARGETS

DOCUMENT = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures"
_BLOCK = re.compile(r"(<!-- (\w+): made by benchmarks/report\.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)
#: What makes figures comparable; two runs that differ in nothing else are of one machine.
_MACHINE = ("cpu", "cores", "system", "kernel", "python", "pyzmq", "libzmq", "nats", "tokenmq")
_QUICK = "quick run: one round of an instant, to see that it works; its figures mean nothing"


def machine(runs: Mapping[str, Run]) -> Iterator[str]:
    """Yield what figures depend on, and when and how each benchmark ran."""
    quick = [name for name, run in runs.items() if run.quick and not run.error]
    if quick:
        yield f"**Not measured yet.** This is a {_QUICK}. So ran: {', '.join(quick)}."
        yield ""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, run in runs.items():
        kinds.setdefault(tuple(str(run.machine.get(key)) for key in _MACHINE), []).append(name)
    for kind, names in kinds.items():
        known = dict(zip(_MACHINE, kind, strict=True))
        nats = "no NATS" if known["nats"] == "None" else known["nats"].replace("nats-server: v", "nats-server ")
        where = "" if len(kinds) == 1 else f"{', '.join(names)}: "
        yield (
            f"- {where}{known['cpu']}, {known['cores']} cores; {known['system']} {known['kernel']}; "
            f"Python {known['python']}, pyzmq {known['pyzmq']}, libzmq {known['libzmq']}, {nats}; "
            f"tokenmq {known['tokenmq']}"
        )
    yield ""
    yield row(["benchmark", "when (UTC)", "commit", "rounds", "seconds of each measurement", "how it went"])
    yield row(["---"] * 6)
    for name in NAMES:
        if name not in runs:
            yield row([f"`{name}.py`", "-", "-", "-", "-", "**not run**"])
            continue
        run = runs[name]
        went = f"**failed**: {run.error}" if run.error else "quick run" if run.quick else "whole"
        asked = [str(run.arguments.get(key, "-")) for key in ("rounds", "seconds")]
        when = str(run.machine.get("date"))[:16].replace("T", " ")
        yield row([f"`{name}.py`", when, str(run.machine.get("commit") or "-"), *asked, went])


def targets(runs: Mapping[str, Run]) -> Iterator[str]:
    """Yield what is asked for, what was measured, and whether it is met."""
    yield row(["what", "asked for", "measured", "met?", "by"])
    yield row(["---"] * 5)
    for target in TARGETS:
        value = target.value(runs)
        measured = "-" if value is None else str(value) if target.bound else f"{value} {target.unit}"
        yield row([target.what, target.asked(), measured, target.verdict(runs), f"`{target.benchmark}.py`"])


def section(name: str, runs: Mapping[str, Run]) -> Iterator[str]:
    """Yield what a benchmark has found: what is missing, its tables, its plots."""
    yield f"`python benchmarks/{name}.py`"
    yield ""
    run = runs.get(name)
    if run is None:
        yield "**Not measured**: it was not run."
        return
    if run.error:
        yield f"**Not measured**: it failed: {run.error}"
        return
    if run.quick:
        yield f"**A {_QUICK}.**"
        yield ""
    if run.missing:
        why = "; nats-server is not installed there" if "nats" in run.missing and not run.machine.get("nats") else ""
        yield f"**Not measured**: {', '.join(run.missing)}{why}."
        yield ""
    for table in TABLES[name]:
        yield from lines(table, run.rows)
        yield ""
        if left := missing(table, run.rows):
            yield f"**Not measured**: {', '.join(left)}."
            yield ""
    for plot in plots(runs):
        if plot.benchmark == name:
            yield f"![{plot.title}](figures/{plot.name}.svg)"
            yield ""


def headlines(runs: Mapping[str, Run]) -> Iterator[str]:
    """Yield the README's figures, each with the command that shows it."""
    used = [runs[name] for name in dict.fromkeys(each.benchmark for each in HEADLINES.values()) if name in runs]
    if any(run.quick for run in used):
        yield f"**Not measured yet**: this is a {_QUICK}."
        yield ""
    yield row(["what", "ratio", "command"])
    yield row(["---"] * 3)
    for command, target in HEADLINES.items():
        value = target.value(runs)
        told = "not measured" if value is None else f"{brief(value.median)} {target.unit}"
        yield row([target.what, told, f"`{command}`"])


def fill(text: str, blocks: Mapping[str, Callable[[], Iterator[str]]], path: Path) -> str:
    """Return a document with its blocks made anew.

    Args:
        text: the document.
        blocks: what makes the lines of each block, by name.
        path: where the document is, for messages.

    Raises:
        BenchmarkError: the document has a block that is not known, or lacks one, or has it twice.
    """
    found = [match[2] for match in _BLOCK.finditer(text)]
    for name in blocks:
        if found.count(name) != 1:
            raise BenchmarkError(f"{path} has {found.count(name)} blocks <!-- {name}: ... -->; there must be one")
    for name in found:
        if name not in blocks:
            raise BenchmarkError(f"{path} has a block {name!r}, which nobody makes; there are {', '.join(blocks)}")

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{chr(10).join(blocks[match[2]]()).strip()}\n\n{match[4]}"

    return _BLOCK.sub(made, text)


def document(text: str, runs: Mapping[str, Run]) -> str:
    """Return docs/performance.md with its blocks made anew."""
    blocks: dict[str, Callable[[], Iterator[str]]] = {
        "machine": lambda: machine(runs),
        "targets": lambda: targets(runs),
        **{name: partial(section, name, runs) for name in NAMES},
    }
    return fill(text, blocks, DOCUMENT)


def readme(text: str, runs: Mapping[str, Run]) -> str:
    """Return README.md with its block made anew."""
    return fill(text, {"figures": lambda: headlines(runs)}, README)


def main() -> None:
    """Make all of it anew.

    Raises:
        SystemExit: there is nothing to tell, or a file is not as it should be; the message is one line.
    """
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        runs = load()
        if not runs:
            raise BenchmarkError("there are no results in benchmarks/results; `make bench` measures")
        for path, make in ((DOCUMENT, document), (README, readme)):
            path.write_text(make(path.read_text(), runs))
    except (BenchmarkError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if not charts.can_draw():
        raise SystemExit("error: the texts are written, the plots are not: pip install '.[bench]'")
    for plot in plots(runs):
        plot.draw(FIGURES / f"{plot.name}.svg")
    print(f"written: {DOCUMENT.relative_to(ROOT)}, {README.name}, {FIGURES.relative_to(ROOT)}/performance-*.svg")


if __name__ == "__main__":
    main()
