"""Interleaving, medians and ratios of the benchmarks, and the file that they write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rounds(load: Callable[[str], Any]) -> Any:
    return load("rounds")


def rows_of(rounds: Any, *values: tuple[str, int, float]) -> list[Any]:
    return [rounds.Row(relay, "case", number, {"rate": value}) for relay, number, value in values]


def test_every_relay_has_its_turn_in_each_case_of_each_round(rounds: Any) -> None:
    asked: list[tuple[str, str]] = []
    told: list[str] = []

    def measure(case: str, relay: str) -> Mapping[str, float]:
        asked.append((case, relay))
        return {"rate": float(len(asked))}

    rows = rounds.interleave(["x", "y"], ["a", "b"], 2, measure, told.append)
    assert asked == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")] * 2
    assert [(row.case, row.relay, row.round, row.figures["rate"]) for row in rows] == [
        (case, relay, 1 + number // 4, number + 1.0) for number, (case, relay) in enumerate(asked)
    ]
    assert len(told) == len(rows)


def test_a_relay_that_is_not_here_is_skipped_once_and_told(rounds: Any) -> None:
    told: list[str] = []

    def measure(_case: str, relay: str) -> Mapping[str, float]:
        if relay == "nats":
            raise rounds.NotHereError("not installed")
        return {"rate": 1.0}

    rows = rounds.interleave(["x", "y"], ["nats", "b"], 2, measure, told.append)
    assert {row.relay for row in rows} == {"b"}
    assert [line for line in told if "nats" in line] == ["nats: skipped: not installed"]


def test_a_failed_measurement_ends_the_run(rounds: Any) -> None:
    def measure(_case: str, _relay: str) -> Mapping[str, float]:
        raise rounds.BenchmarkError("cut off")

    with pytest.raises(rounds.BenchmarkError, match="round 1: x: a: cut off"):
        rounds.interleave(["x"], ["a"], 1, measure, lambda _line: None)


def test_the_ratio_is_of_figures_of_the_same_round(rounds: Any) -> None:
    # The medians are 20 and 40; within each round but one the ratio is 2 or less.
    rows = rows_of(
        rounds,
        ("base", 1, 10),
        ("base", 2, 20),
        ("base", 3, 90),
        ("other", 1, 20),
        ("other", 2, 40),
        ("other", 3, 90),
    )
    assert rounds.median(rows, "case", "base", "rate") == 20
    assert rounds.ratio(rows, "case", "rate", "other", "base") == 2.0
    lone = rows_of(rounds, ("base", 1, 10), ("other", 2, 40))
    assert rounds.ratio(lone, "case", "rate", "other", "base") is None
    assert rounds.median(lone, "case", "nobody", "rate") is None


def test_no_division_by_nothing(rounds: Any) -> None:
    rows = rows_of(rounds, ("base", 1, 0), ("base", 2, 10), ("other", 1, 5), ("other", 2, 5))
    assert rounds.ratio(rows, "case", "rate", "other", "base") == 0.5


def test_the_table_shows_medians_and_ratios(rounds: Any) -> None:
    rows = rows_of(rounds, ("base", 1, 1000), ("other", 1, 2500))
    lines = rounds.table(rows, {"rate": "messages/s", "lag": "lag"}, "base")
    assert lines[2].split() == ["base", "1,000", "-"]
    assert lines[3].split() == ["other", "2,500", "(2.50)", "-"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (0.01234, "0.0123"), (99.94, "99.9"), (123456.7, "123,457")]
)
def test_numbers_for_people(rounds: Any, value: float, shown: str) -> None:
    assert rounds.brief(value) == shown


def test_what_is_written_is_read_again(rounds: Any, tmp_path: Path) -> None:
    rows = rows_of(rounds, ("base", 1, 10.5), ("other", 1, 21.0))
    path = tmp_path / "rows.json"
    rounds.write(path, "relay", {"rounds": 1, "json": path}, rows)
    assert rounds.read(path) == rows
    written = json.loads(path.read_text())
    assert list(written) == ["benchmark", "machine", "arguments", "rounds"]
    assert written["rounds"][0] == {"relay": "base", "case": "case", "round": 1, "figures": {"rate": 10.5}}
    assert {"cpu", "cores", "kernel", "python", "pyzmq", "libzmq", "tokenmq", "nats", "date"} <= written[
        "machine"
    ].keys()
