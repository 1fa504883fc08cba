"""The policies, as pure choosers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from random import Random
from typing import Any

import pytest

from tokenmq.broker import dispatch
from tokenmq.broker.dispatch import DEFAULT_POLICY, POLICIES, Policy, find_policy, policy_names


@dataclass(frozen=True)
class Worker:
    name: str
    load: int = 0
    speed: float = 1.0
    last_used: int = 0
    slots: int = 8
    outstanding_tokens: int = 0

    @property
    def cost(self) -> float:
        return (self.load + 1) / self.speed


@dataclass(frozen=True)
class Job:
    affinity: str = ""
    model: str = "m"
    prompt_tokens: int = 1
    expected_tokens: int = 1


class Workers:
    """Candidates as the pool gives them, without the pool."""

    def __init__(self, policy: Policy, *workers: Worker) -> None:
        self.policy, self.workers = policy, workers

    def __len__(self) -> int:
        return len(self.workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers)

    def __getitem__(self, index: int) -> Worker:
        return self.workers[index]

    def least(self) -> Worker:
        return min(self.workers, key=lambda worker: (self.policy.rank(worker), worker.last_used))


def choose(name: str, *workers: Worker, job: Job = Job(), random: Random | None = None) -> str:
    policy = find_policy(name)
    return policy.choose(job, Workers(policy, *workers), random or Random(1)).name


class TestShortestQueue:
    def test_the_shortest_queue_wins(self) -> None:
        assert choose("shortest-queue", Worker("a", load=3), Worker("b", load=1), Worker("c", load=2)) == "b"

    def test_a_queue_is_measured_by_the_workers_speed(self) -> None:
        workers = [Worker("slow", load=1, speed=0.5), Worker("fast", load=6, speed=4.0), Worker("normal", load=2)]
        assert choose("shortest-queue", *workers) == "fast"

    def test_an_idle_worker_that_is_fast_is_better_than_an_idle_one_that_is_slow(self) -> None:
        assert choose("shortest-queue", Worker("slow"), Worker("fast", speed=2.0, last_used=9)) == "fast"

    def test_a_tie_goes_to_the_one_that_was_used_longest_ago(self) -> None:
        workers = [Worker("a", last_used=3), Worker("b", last_used=1), Worker("c", last_used=2)]
        assert choose("shortest-queue", *workers) == "b"


class TestLottery:
    def test_it_draws_in_proportion_to_speed(self) -> None:
        workers = [Worker("a", speed=1.0), Worker("b", speed=2.0, load=99), Worker("c", speed=5.0)]
        random = Random(42)
        drawn = Counter(choose("lottery", *workers, random=random) for _ in range(8000))
        assert drawn["a"] == pytest.approx(1000, rel=0.1)
        assert drawn["b"] == pytest.approx(2000, rel=0.1)
        assert drawn["c"] == pytest.approx(5000, rel=0.1)

    def test_it_copes_with_the_extremes_of_speed(self) -> None:
        workers = [Worker("a", speed=1e-6), Worker("b", speed=1e6)]
        assert {choose("lottery", *workers, random=Random(number)) for number in range(100)} == {"b"}


def test_round_robin_takes_turns_whatever_the_load() -> None:
    assert choose("round-robin", Worker("a", load=0, last_used=3), Worker("b", load=9, last_used=1)) == "b"


class TestPowerOfTwo:
    def test_the_better_of_two_is_taken(self) -> None:
        assert choose("power-of-two", Worker("a", load=2), Worker("b", load=1)) == "b"

    def test_the_worst_of_three_is_never_taken_and_the_others_by_chance(self) -> None:
        workers = [Worker("a", load=0), Worker("b", load=1), Worker("c", load=2)]
        random = Random(5)
        drawn = Counter(choose("power-of-two", *workers, random=random) for _ in range(3000))
        assert drawn["c"] == 0
        assert drawn["a"] == pytest.approx(2000, rel=0.1)  # in two of the three pairs


def test_least_tokens_counts_what_requests_may_cost() -> None:
    workers = [Worker("a", load=1, outstanding_tokens=900), Worker("b", load=5, outstanding_tokens=500)]
    assert choose("least-tokens", *workers) == "b"
    assert choose("least-tokens", Worker("fast", speed=2.0, outstanding_tokens=900), workers[1]) == "fast"


class TestPrefixAffinity:
    WORKERS = [Worker(f"w{number}", load=4) for number in range(8)]  # noqa: RUF012

    def test_the_same_prefix_goes_to_the_same_worker(self) -> None:
        assert len({choose("prefix-affinity", *self.WORKERS, job=Job("abc")) for _ in range(5)}) == 1

    def test_prefixes_are_spread_over_all(self) -> None:
        taken = Counter(choose("prefix-affinity", *self.WORKERS, job=Job(f"p{number}")) for number in range(4000))
        assert all(taken[worker.name] == pytest.approx(500, rel=0.2) for worker in self.WORKERS)

    def test_only_what_a_lost_worker_had_goes_elsewhere(self) -> None:
        for number in range(300):
            before = choose("prefix-affinity", *self.WORKERS, job=Job(f"p{number}"))
            after = choose("prefix-affinity", *self.WORKERS[1:], job=Job(f"p{number}"))
            assert before in (after, "w0")

    def test_a_worker_that_has_more_than_its_part_is_spared(self) -> None:
        favourite = choose("prefix-affinity", *self.WORKERS, job=Job("abc"))
        full = [Worker(worker.name, load=7 if worker.name == favourite else 4) for worker in self.WORKERS]
        assert choose("prefix-affinity", *full, job=Job("abc")) != favourite

    def test_a_fast_worker_may_have_more(self) -> None:
        favourite = choose("prefix-affinity", *self.WORKERS, job=Job("abc"))
        fast = [
            Worker(worker.name, load=7, speed=2.0) if worker.name == favourite else worker for worker in self.WORKERS
        ]
        assert choose("prefix-affinity", *fast, job=Job("abc")) == favourite

    def test_what_has_no_prefix_goes_to_the_shortest_queue(self) -> None:
        assert choose("prefix-affinity", Worker("a", load=3), Worker("b", load=1)) == "b"


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("job", [Job(), Job("abc")])
def test_a_lone_candidate_is_chosen(name: str, job: Job) -> None:
    assert choose(name, Worker("a", load=5), job=job) == "a"


def test_the_default_is_one_of_them() -> None:
    assert DEFAULT_POLICY in POLICIES


# Policies of one's own.

LONGEST = Policy(rank=lambda worker: -worker.load)
NO_POLICY = "longest"


def install(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    def points(*, group: str) -> Any:
        return [EntryPoint(name, value, dispatch.ENTRY_POINTS)] if group == dispatch.ENTRY_POINTS else []

    monkeypatch.setattr("importlib.metadata.entry_points", points)


def test_an_installed_policy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "longest", f"{__name__}:LONGEST")
    assert "longest" in policy_names()
    monkeypatch.setattr(EntryPoint, "load", lambda self: LONGEST)
    assert choose("longest", Worker("a", load=3), Worker("b", load=1)) == "a"


def test_what_is_no_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "longest", "somewhere:NO_POLICY")
    monkeypatch.setattr(EntryPoint, "load", lambda self: NO_POLICY)
    with pytest.raises(ValueError, match=r"policy 'longest' \(somewhere:NO_POLICY\) is a str, not a Policy"):
        find_policy("longest")


def test_what_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "longest", "no_such_module:LONGEST")
    with pytest.raises(ValueError, match=r"policy 'longest' .* cannot be loaded: No module named 'no_such_module'"):
        find_policy("longest")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown policy 'shortest'; known are least-tokens, lottery, power-of-two"):
        find_policy("shortest")
