"""docs/performance.md and the README's figures: how they follow from what the benchmarks have left, and do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
MACHINE = {"cpu": "A processor", "cores": 2, "date": "2026-01-02T03:04:05+00:00", "nats": "nats-server: v2.9.10"}
RELAYS = ["c-proxy", "bare", "nats", "zmq-broker"]


@pytest.fixture
def report(load: Callable[[str], Any]) -> Any:
    return load("report")


@pytest.fixture
def runs(load: Callable[[str], Any]) -> Any:
    return load("runs")


@pytest.fixture
def targets(load: Callable[[str], Any]) -> Any:
    return load("targets")


@pytest.fixture
def row(load: Callable[[str], Any]) -> Callable[..., Any]:
    """Make one row, by relay, case, round and figures."""
    make = load("rounds").Row
    return lambda relay, case, number, **figures: make(relay, case, number, figures)


def run_of(runs: Any, rows: list[Any], **changes: Any) -> Any:
    return runs.Run(**{"machine": MACHINE, "arguments": {"rounds": 2, "relays": RELAYS}, "rows": rows, **changes})


def text(lines: Iterator[str]) -> str:
    return "\n".join(lines)


# Figures over the rounds.


def test_ratios_are_of_one_round_and_told_with_their_spread(runs: Any, row: Any) -> None:
    rows = [row("b", "x", 1, f=10.0), row("b", "x", 2, f=20.0), row("a", "x", 1, f=5.0), row("a", "x", 2, f=40.0)]
    assert runs.ratios(rows, "f", ("x", "a"), ("x", "b")) == runs.Spread(1.25, 0.5, 2.0)
    assert str(runs.Spread(1.25, 0.5, 2.0)) == "1.25 (0.5 to 2)"
    assert str(runs.Spread(3.0, 3.0, 3.0)) == "3"
    assert runs.ratios(rows[:2], "f", ("x", "a"), ("x", "b")) is None
    assert runs.spread(rows, "x", "nobody", "f") is None


def test_a_file_that_is_none_of_a_benchmark_is_refused_in_one_line(runs: Any, load: Any, tmp_path: Path) -> None:
    (tmp_path / "relay.json").write_text('{"rounds": [{"relay": 1}]}')
    with pytest.raises(load("rounds").BenchmarkError, match=r"relay\.json is not what a benchmark writes"):
        runs.load(tmp_path)


# Targets.


@pytest.mark.parametrize(
    ("bound", "met", "missed"),
    [
        ("at_least", [1.0, 1.1], [0.999]),
        ("at_most", [1.0, 0.9], [1.001]),
        ("above", [1.001], [1.0, 0.9]),
        ("below", [0.999], [1.0, 1.1]),
    ],
)
def test_what_meets_a_bound(
    targets: Any, runs: Any, row: Any, bound: str, met: list[float], missed: list[float]
) -> None:
    def verdict(value: float, aim: bool = False) -> str:
        target = targets.Target("w", "u", "relay", targets.plain("x", "f"), getattr(targets, bound)(1), aim)
        told: str = target.verdict({"relay": run_of(runs, [row("zmq-broker", "x", 1, f=value)])})
        return told

    assert [verdict(value) for value in met] == ["met"] * len(met)
    assert [verdict(value) for value in missed] == ["**not met**"] * len(missed)
    assert (verdict(met[0], aim=True), verdict(missed[0], aim=True)) == ("reached", "not reached")


def test_the_median_decides_and_what_is_not_there_was_not_measured(targets: Any, runs: Any, row: Any) -> None:
    rows = [row("zmq-broker", "x", number, f=value) for number, value in enumerate([1.0, 2.0, 9.0], start=1)]
    target = targets.Target("w", "u", "relay", targets.plain("x", "f"), targets.at_most(2))
    assert target.verdict({"relay": run_of(runs, rows)}) == "met"
    assert target.verdict({"relay": run_of(runs, [])}) == "not measured"
    assert target.verdict({}) == "not measured"
    assert target.verdict({"relay": run_of(runs, rows, arguments={"quick": True})}) == "quick run"
    told = targets.Target("w", "u", "relay", targets.plain("x", "f"))
    assert (told.asked(), told.verdict({"relay": run_of(runs, rows)})) == ("no bound", "told")


def test_growth_is_one_case_by_another(targets: Any, runs: Any, row: Any) -> None:
    rows = [
        row("zmq-broker", "streams-100", 1, cpu_us_per_token=4.0, cpu_us_above_idle=2.0),
        row("zmq-broker", "streams-20000", 1, cpu_us_per_token=7.0, cpu_us_above_idle=2.5),
    ]
    grown = [target for target in targets.TARGETS if target.case == "streams-20000"]
    found = {"scale": run_of(runs, rows)}
    assert sorted(target.value(found).median for target in grown) == [1.25, 1.75]
    assert sorted(target.verdict(found) for target in grown) == ["**not met**", "met"]


def test_who_did_not_keep_up_in_one_round_has_not_met_the_bound(targets: Any, runs: Any, row: Any) -> None:
    held = next(target for target in targets.TARGETS if target.case == "held-8000")
    rows = [row("zmq-broker", "held-8000", 1, p99_ms=1.0), row("zmq-broker", "held-8000", 2, p99_ms=1.0)]
    assert held.verdict({"scale": run_of(runs, rows)}) == "met"
    others = [row("bare", "held-8000", 3, behind=1.0)]
    assert held.verdict({"scale": run_of(runs, rows + others)}) == "met"
    late = [row("zmq-broker", "held-8000", 3, behind=1.0)]
    assert held.verdict({"scale": run_of(runs, rows + late)}) == "**not met**: did not keep up"


def test_the_shares_that_targets_take_are_those_of_the_rivals(targets: Any, runs: Any, row: Any) -> None:
    rates = {"bare": 100.0, "nats": 400.0, "c-proxy": 800.0, "zmq-broker": 200.0}
    rows = [
        row(relay, case, 1, tokens_per_s=rate, cpu_s_per_million_tokens=rate)
        for case in ("flat-1", "flat-16", "paced-256x1", "paced-256x64")
        for relay, rate in rates.items()
    ]
    found = {
        target.what: target.value({"relay": run_of(runs, rows)}).median
        for target in (targets.FLAT_1, targets.FLAT_16, targets.SHARED)
    }
    assert list(found.values()) == [2.0, 0.5, 0.25]


# The document.


def test_a_table_has_medians_spreads_and_ratios(load: Any, row: Any) -> None:
    tables = load("tables")
    rows = [
        row("b", "x", 1, f=10.0),
        row("b", "x", 2, f=20.0),
        row("a", "x", 1, f=5.0, g=7.0),
        row("a", "y", 1, f=1.0),
    ]
    columns = [tables.Column("f", "f", compared=True), tables.Column("g", "g"), tables.Column("h", "h")]
    table = tables.Table(("x",), columns, "b")
    assert list(tables.lines(table, rows)) == [
        "| case | relay | f | ratio to b | g |",
        "| --- | --- | --- | --- | --- |",
        "| x | b | 15 (10 to 20) | 1 | - |",
        "| x | a | 5 | 0.50 | 7 |",
    ]
    assert next(tables.lines(tables.Table((), columns, "b", "who"), rows[:3])) == "| who | f | ratio to b | g |"
    assert next(tables.lines(tables.Table((), (tables.Column("f", "f"),), "b"), rows)) == "| case | relay | f |"
    assert list(tables.lines(tables.Table(("z",), (tables.Column("f", "f"),), "b"), rows)) == []


def test_what_was_not_measured_is_told(report: Any, runs: Any, row: Any) -> None:
    assert "**Not measured**: it was not run." in text(report.section("relay", {}))
    failed = run_of(runs, [], error="round 3: cut off")
    assert "it failed: round 3: cut off" in text(report.section("relay", {"relay": failed}))
    assert "**failed**: round 3: cut off" in text(report.machine({"relay": failed}))
    assert text(report.machine({})).count("**not run**") == len(runs.NAMES)

    rows = [row(relay, "flat-1", 1, tokens_per_s=1.0) for relay in RELAYS if relay != "nats"]
    lacking = run_of(runs, rows, machine={**MACHINE, "nats": None})
    told = text(report.section("relay", {"relay": lacking}))
    assert "**Not measured**: nats; nats-server is not installed there." in told
    assert "**Not measured**: paced-256x1, paced-256x64, paced-32." in told
    assert "**Not measured**: flat-16." in told
    assert "not measured" in text(report.targets({"relay": lacking}))
    whole = run_of(runs, [*rows, row("nats", "flat-1", 1, tokens_per_s=1.0)])
    assert "nats;" not in text(report.section("relay", {"relay": whole}))


def test_a_quick_run_is_told_wherever_its_figures_stand(report: Any, runs: Any, row: Any) -> None:
    rows = [row(relay, "flat-1", 1, tokens_per_s=1.0) for relay in RELAYS]
    for quick in (True, False):
        found = {"relay": run_of(runs, rows, arguments={"rounds": 1, "relays": RELAYS, "quick": quick})}
        for lines in (report.machine(found), report.section("relay", found), report.headlines(found)):
            assert ("quick run" in text(lines)) is quick


def test_machines_that_differ_are_told_apart(report: Any, runs: Any) -> None:
    other = run_of(runs, [], machine={**MACHINE, "cpu": "Another one", "nats": None})
    told = text(report.machine({"relay": run_of(runs, []), "latency": other}))
    assert re.search(r"^- relay: A processor, 2 cores.*nats-server 2\.9\.10", told, re.MULTILINE)
    assert re.search(r"^- latency: Another one, 2 cores.*no NATS", told, re.MULTILINE)


def block(name: str, body: str = "") -> str:
    return f"<!-- {name}: made by benchmarks/report.py -->\n{body}<!-- end -->"


def test_blocks_are_made_anew_and_prose_stays(report: Any) -> None:
    made = report.fill(f"Before.\n{block('a', 'old')}\nAfter.\n", {"a": lambda: iter(["new"])}, Path("d.md"))
    assert made == f"Before.\n{block('a', chr(10) + 'new' + chr(10) * 2)}\nAfter.\n"
    assert report.fill(made, {"a": lambda: iter(["new"])}, Path("d.md")) == made


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("", r"d\.md has 0 blocks <!-- a"),
        (block("a") + block("a"), r"d\.md has 2 blocks <!-- a"),
        (block("a") + block("b"), r"d\.md has a block 'b', which nobody makes; there are a"),
    ],
)
def test_blocks_that_cannot_be(report: Any, load: Any, document: str, told: str) -> None:
    with pytest.raises(load("rounds").BenchmarkError, match=told):
        report.fill(document, {"a": lambda: iter(["new"])}, Path("d.md"))


# The measuring of all.

GOOD = """
import json, pathlib, sys
pathlib.Path(sys.argv[2]).write_text(json.dumps(sys.argv[3:]))
"""


def test_a_benchmark_gets_the_arguments_and_writes_its_file(load: Any, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    assert load("suite").measure("good", ["--rounds", "2"], tmp_path, tmp_path) == ""
    assert json.loads((tmp_path / "good.json").read_text()) == ["--rounds", "2"]


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import sys; print('more', file=sys.stderr); raise SystemExit('error: no core')", "no core"),
        ("raise SystemExit(3)", "it ended with status 3"),
        (GOOD + "raise SystemExit('error: at the end')", "at the end"),
        (None, "there is no benchmarks/bad.py"),
    ],
)
def test_a_benchmark_that_fails_leaves_why(
    load: Any, runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str | None, told: str
) -> None:
    if program is not None:
        (tmp_path / "bad.py").write_text(program)
    assert load("suite").measure("bad", ["--quick"], tmp_path, tmp_path) == told
    monkeypatch.setattr(runs, "NAMES", ("bad",))
    found = runs.load(tmp_path)["bad"]
    assert (found.error, found.quick, list(found.rows)) == (told, True, [])


# What stands in the repository.


def test_document_and_readme_are_what_the_files_of_the_benchmarks_say(report: Any, runs: Any) -> None:
    found = runs.load()
    for path, make in ((report.DOCUMENT, report.document), (report.README, report.readme)):
        shown = path.read_text()
        assert make(shown, found) == shown, f"{path.name} is old: run python benchmarks/report.py"


def test_the_readme_has_at_most_six_figures_each_with_a_command_that_exists(targets: Any, load: Any) -> None:
    assert 0 < len(targets.HEADLINES) <= 6
    for command in targets.HEADLINES:
        words = command.split()
        assert (words[0], words[2]) == ("python", "--cases")
        script = load(Path(words[1]).stem)
        assert Path(script.__file__) == ROOT / words[1]
        known = script.SPREAD if words[1].endswith("latency.py") else script.CASES
        assert set(words[3:]) <= known.keys()


def test_every_target_is_measured_where_its_benchmark_ran_whole(targets: Any, runs: Any) -> None:
    found: Mapping[str, Any] = {
        name: run for name, run in runs.load().items() if not (run.error or run.missing or run.quick)
    }
    unknown = [each.what for each in targets.TARGETS if each.benchmark in found and each.value(found) is None]
    assert not unknown


def test_every_plot_is_there(report: Any) -> None:
    shown = re.findall(r"!\[.*?\]\((\S+)\)", report.DOCUMENT.read_text())
    assert len(shown) == len(set(shown)) > 0
    assert [name for name in shown if not (report.DOCUMENT.parent / name).is_file()] == []


def test_plots_are_drawn_alike_each_time(load: Any, runs: Any, row: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(relay, case, 1, tokens_per_s=9.0, p50_ms=1.0) for relay in RELAYS for case in ("flat-1", "spread-1")]
    found = {"relay": run_of(runs, rows[:]), "latency": run_of(runs, rows[:])}
    plots = list(load("performance_plots").plots(found))
    assert {plot.name for plot in plots} == {"performance-tokens", "performance-latency"}
    for plot in plots:
        files = [tmp_path / "one.svg", tmp_path / "two.svg"]
        for path in files:
            plot.draw(path)
        assert "zmq-broker" in files[0].read_text()
        assert files[0].read_bytes() == files[1].read_bytes()
