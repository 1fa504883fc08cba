"""The policies, as pure choosers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from tokenmq.broker.dispatch import DEFAULT_POLICY, POLICIES, lottery, shortest_queue


@dataclass(frozen=True)
class Worker:
    name: str
    load: int = 0
    speed: float = 1.0
    last_used: int = 0


RANDOM = Random(1)


def test_the_shortest_queue_wins() -> None:
    workers = [Worker("a", load=3), Worker("b", load=1), Worker("c", load=2)]
    assert shortest_queue(workers, RANDOM).name == "b"


def test_a_queue_is_measured_by_the_workers_speed() -> None:
    workers = [Worker("slow", load=1, speed=0.5), Worker("fast", load=6, speed=4.0), Worker("normal", load=2)]
    assert shortest_queue(workers, RANDOM).name == "fast"


def test_a_tie_goes_to_the_one_that_was_used_least_recently() -> None:
    workers = [Worker("a", last_used=3), Worker("b", last_used=1), Worker("c", last_used=2)]
    assert shortest_queue(workers, RANDOM).name == "b"
    assert shortest_queue([Worker("a", 2, 2.0, 9), Worker("b", 1, 1.0, 8)], RANDOM).name == "b"


def test_the_lottery_draws_in_proportion_to_speed() -> None:
    workers = [Worker("a", speed=1.0), Worker("b", speed=2.0, load=99), Worker("c", speed=5.0)]
    random = Random(42)
    drawn = Counter(lottery(workers, random).name for _ in range(8000))
    assert drawn["a"] == pytest.approx(1000, rel=0.1)
    assert drawn["b"] == pytest.approx(2000, rel=0.1)
    assert drawn["c"] == pytest.approx(5000, rel=0.1)


def test_the_lottery_copes_with_the_extremes_of_speed() -> None:
    workers = [Worker("a", speed=1e-6), Worker("b", speed=1e6)]
    assert {lottery(workers, Random(3)).name for _ in range(100)} == {"b"}
    assert lottery(workers[:1], Random(3)).name == "a"


@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_lone_candidate_is_chosen(policy: object) -> None:
    only = Worker("a", load=5)
    assert policy([only], RANDOM) is only  # type: ignore[operator]


def test_the_default_is_one_of_them() -> None:
    assert DEFAULT_POLICY in POLICIES
