"""The arithmetic of the chaos run: percentiles, which fault a gap came from, what counts as a finding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from tokenmq.client import Attempt, Chunk, WorkerLostError
from tokenmq.worker.engines.synthetic import text_of
from tokenmq.worker.engines.synthetic import token_at as synthetic_token

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import modules of benchmarks/, which is no package, and forget them again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module
    for name in [name for name in sys.modules if name.startswith("chaos_")]:
        del sys.modules[name]


@pytest.fixture
def figures(load: Any) -> ModuleType:
    return load("chaos_figures")  # type: ignore[no-any-return]


@pytest.fixture
def readers(load: Any) -> ModuleType:
    return load("chaos_readers")  # type: ignore[no-any-return]


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)])
def test_a_percentile_is_the_nearest_rank(figures: ModuleType, share: float, value: int) -> None:
    assert figures.percentile(Random(1).sample(range(1, 101), 100), share) == value


def test_a_percentile_of_few_and_of_none(figures: ModuleType) -> None:
    assert figures.percentile([3.0], 0.5) == figures.percentile([3.0], 0.99) == 3.0
    assert figures.percentile([1.0, 2.0], 0.5) == 1.0
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 0.5)


def attributed(figures: ModuleType, faults: list[Any], before: float, after: float) -> str:
    targets = frozenset(["worker-1", "broker-1", "worker-1>broker-1"])
    return str(figures.attribute(faults, targets, before, after))


def test_a_gap_comes_from_the_fault_on_its_way(figures: ModuleType) -> None:
    kill = figures.Fault("worker killed", frozenset(["worker-1"]), at=10.0)
    elsewhere = figures.Fault("broker killed", frozenset(["broker-2"]), at=10.0)
    later = figures.Fault("broker killed", frozenset(["broker-1"]), at=10.2)
    assert attributed(figures, [kill, elsewhere], 9.99, 10.05) == "worker killed"
    assert attributed(figures, [kill, later], 10.01, 10.25) == "worker killed"  # nearer to the last token
    assert attributed(figures, [elsewhere], 9.99, 10.05) == "not attributed"
    assert attributed(figures, [later], 9.99, 10.05) == "not attributed"  # it had not happened yet
    assert attributed(figures, [kill], 11.0, 11.05) == "not attributed"  # long ago


def test_a_drain_breaks_streams_at_the_end_of_its_grace_time(figures: ModuleType) -> None:
    drain = figures.Fault("worker drained", frozenset(["worker-1"]), at=10.0, lasts_s=1.5)
    assert attributed(figures, [drain], 11.5, 11.55) == "worker drained"
    assert attributed(figures, [drain], 13.0, 13.05) == "not attributed"


def test_silence_explains_more_than_a_kill_beside_it(figures: ModuleType) -> None:
    silence = figures.Fault("worker frozen", frozenset(["worker-1"]), at=10.0, lasts_s=3.0, silent=True)
    kill = figures.Fault("broker killed", frozenset(["broker-1"]), at=10.1)
    assert attributed(figures, [silence, kill], 10.1, 12.0) == "worker frozen"


def test_a_tally_counts_what_clients_tell(figures: ModuleType) -> None:
    tally = figures.Tally()
    assert not tally.clean  # nothing was tried
    tally.take("client-1", {"tokens": 70, "open": 3})
    tally.take("client-1", {"outcome": "read", "attempts": 3, "gaps": [{"before": 1.0, "after": 1.5}]})
    assert (tally.tokens, tally.resumes, tally.outcomes["read"]) == (70, 2, 1)
    assert tally.gaps == [{"before": 1.0, "after": 1.5, "client": "client-1"}]
    assert tally.clean
    tally.left("client-1")
    tally.left("client-1")
    assert tally.left_behind == 3
    tally.take("client-2", {"outcome": "lost", "attempts": 1, "gaps": [], "detail": "why"})
    assert not tally.clean
    assert tally.findings == {"lost": 1}
    assert tally.details == [{"kind": "lost", "client": "client-2", "attempts": 1, "detail": "why"}]
    assert "wrong 0, lost 1, hung 0" in tally.progress()


def test_a_table_has_a_row_for_each_kind(figures: ModuleType) -> None:
    heading, *rows = figures.table({"a": [0.001, 0.003], "c": [2.0]}, {"first": ["a", "b"]})
    assert heading.split() == ["streams", "median", "p99", "worst"]
    assert [row.split() for row in rows] == [
        ["first:"],
        ["a", "2", "1.0", "ms", "3.0", "ms", "3.0", "ms"],
        ["other:"],
        ["c", "1", "2,000.0", "ms", "2,000.0", "ms", "2,000.0", "ms"],
    ]


def plan_of(readers: ModuleType, tokens: int = 12, reason: str = "length") -> Any:
    ids = tuple(synthetic_token(7, position) for position in range(tokens))
    text = "".join(map(text_of, ids))
    return readers.Plan(7, tokens, "", ids, text, reason, pause_at=None, pause_s=0.0, cancel_at=None)


def chunk_of(plan: Any, begin: int, end: int) -> Chunk:
    ids = plan.token_ids[begin:end]
    return Chunk(bytes(16), 1, 0, begin, ids, "".join(map(text_of, ids)))


def test_a_whole_stream_passes(readers: ModuleType) -> None:
    reading = readers.Reading(plan := plan_of(readers))
    for begin in range(0, 12, 3):
        reading.take(chunk_of(plan, begin, begin + 3))
    reading.end("length", 12)


@pytest.mark.parametrize(
    ("begin", "end", "error"), [(4, 5, "LostError"), (2, 4, "WrongError"), (0, 3, "WrongError")]
)  # after three tokens: a hole, a repeat in part, a repeat
def test_a_chunk_out_of_place_is_found(readers: ModuleType, begin: int, end: int, error: str) -> None:
    reading = readers.Reading(plan := plan_of(readers))
    reading.take(chunk_of(plan, 0, 3))
    with pytest.raises(getattr(readers, error)):
        reading.take(chunk_of(plan, begin, end))


def test_other_tokens_and_other_text_are_found(readers: ModuleType) -> None:
    plan = plan_of(readers)
    right = chunk_of(plan, 0, 2)
    with pytest.raises(readers.WrongError, match="must come"):
        readers.Reading(plan).take(Chunk(right.request_id, 1, 0, 0, (right.token_ids[0], 5000), right.text))
    with pytest.raises(readers.WrongError, match="text"):
        readers.Reading(plan).take(Chunk(right.request_id, 1, 0, 0, right.token_ids, right.text.upper()))


def test_an_end_that_is_early_or_another_one_is_found(readers: ModuleType) -> None:
    reading = readers.Reading(plan := plan_of(readers))
    reading.take(chunk_of(plan, 0, 11))
    with pytest.raises(readers.LostError, match="11 of 12 tokens"):
        reading.end("length", 11)
    reading.take(chunk_of(plan, 11, 12))
    with pytest.raises(readers.WrongError, match="ended as stop"):
        reading.end("stop", 12)
    with pytest.raises(readers.WrongError, match="with 11 tokens"):
        reading.end("length", 11)


def test_plans_with_a_stop_string_end_right_before_it(readers: ModuleType) -> None:
    random = Random(3)
    plans = [readers.Plan.draw(random, 80) for _ in range(200)]
    stopped = [plan for plan in plans if plan.stop]
    assert stopped
    for plan in stopped:
        whole = "".join(map(text_of, plan.token_ids))
        assert plan.reason == "stop"
        assert plan.text == whole[: whole.index(plan.stop)]
        assert plan.stop not in "".join(map(text_of, plan.token_ids[:-1]))  # the last token completes it
    assert all(plan.max_tokens == len(plan.token_ids) for plan in plans if not plan.stop)


def test_the_gap_is_where_the_attempt_changed(readers: ModuleType) -> None:
    reading = readers.Reading(plan := plan_of(readers))
    reading.take(chunk_of(plan, 0, 4))
    reading.take(chunk_of(plan, 4, 12))
    reading.end("length", 12)
    moments = [moment for _, moment in reading.moments]
    lost = WorkerLostError("gone", retryable=True)
    attempts = (
        Attempt(1, "tcp://b:1", "worker-1", 0, lost),
        Attempt(2, "tcp://b:1", "worker-2", 4, lost),
        Attempt(3, "tcp://b:1", "worker-3", 4),
    )
    assert reading.gaps(attempts) == [
        {
            "before": moments[0],
            "after": moments[1],
            "places": [
                ("worker-1", "tcp://b:1", "worker_lost"),
                ("worker-2", "tcp://b:1", "worker_lost"),
                ("worker-3", "tcp://b:1", ""),
            ],
        }
    ]
    assert reading.gaps(attempts[:1]) == []
