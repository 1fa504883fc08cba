"""Names and paths across brokers."""

from __future__ import annotations

import pytest

from tokenmq.broker.hops import answer_from, avoid_below, loop_in, name_below, parents_of
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.limits import MAX_AVOIDED, MAX_HOPS, MAX_NAME_CHARS
from tokenmq.protocol.messages import Considered, Decision, Error, Finish, FinishReason, Timings, Usage

ID = b"i" * 16


@pytest.mark.parametrize(
    ("worker", "name"), [("gpu-3", "west/gpu-3"), ("north/gpu-3", "west/north/gpu-3"), ("", "west")]
)
def test_a_name_grows_by_the_broker_it_comes_through(worker: str, name: str) -> None:
    assert name_below("west", worker) == name


@pytest.mark.parametrize(
    ("worker", "parents"), [("gpu-3", []), ("west/gpu-3", ["west"]), ("west/north/gpu-3", ["west", "west/north"])]
)
def test_who_a_worker_may_be_behind(worker: str, parents: list[str]) -> None:
    assert list(parents_of(worker)) == parents


def test_the_longest_names_together_are_still_a_name() -> None:
    name = "w" * MAX_NAME_CHARS
    answer = Error(ID, 1, "busy", "no", worker=name_below(name, name))
    assert decode(encode(answer)) == answer


def test_a_child_is_told_whom_to_avoid_as_it_knows_them() -> None:
    avoid = ["west/gpu-2", "west/gpu-1", "west", "west/", "east/gpu-1", "westward/gpu-1", "gpu-1", "west/north/a"]
    assert avoid_below("west", avoid) == ("gpu-1", "gpu-2", "north/a")
    many = [f"west/{number:02}" for number in range(MAX_AVOIDED + 3)]
    assert len(avoid_below("west", many)) == MAX_AVOIDED


def test_an_answer_from_below_has_longer_names_everywhere() -> None:
    inner = Decision("west", "lottery", "gpu-1", 2, (Considered("gpu-1", 1), Considered("gpu-2", 3)))
    timings = Timings(0.5, 0.25, 0.125, 1.0, (inner,))
    finish = Finish(ID, 1, FinishReason.STOP, Usage(3, 4), timings, "gpu-1")
    grown = answer_from("west", finish)
    assert isinstance(grown, Finish)
    assert grown.worker == "west/gpu-1"
    assert grown.timings.broker_queue_s == 0.5
    [decision] = grown.timings.routing
    assert (decision.broker, decision.worker) == ("west", "west/gpu-1")
    assert [each.worker for each in decision.considered] == ["west/gpu-1", "west/gpu-2"]
    assert [each.load for each in decision.considered] == [1, 3]


def test_an_answer_of_the_broker_itself_has_its_name() -> None:
    assert answer_from("west", Error(ID, 1, "busy", "full")).worker == "west"


def test_a_path_with_this_broker_or_of_too_many_is_a_loop() -> None:
    path = tuple(f"broker-{number}" for number in range(MAX_HOPS))
    assert loop_in((), "mine") is None
    assert loop_in(path[:-1], "mine") is None
    assert "8 brokers" in str(loop_in(path, "mine"))
    assert "circle" in str(loop_in(("mine",), "mine"))
