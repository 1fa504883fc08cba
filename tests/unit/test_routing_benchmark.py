"""The simulation of routing: its physics against queueing theory, the ancestors' rules by hand, the real core."""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tokenmq.broker.dispatch import DEFAULT_POLICY, POLICIES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_OURS = {path.stem for path in BENCHMARKS.glob("*.py")}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import modules of benchmarks/, which is no package, and forget them again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module
    for name in _OURS & sys.modules.keys():
        del sys.modules[name]


@pytest.fixture
def load(modules: Any) -> Any:
    return modules("routing_load")


@pytest.fixture
def rules(modules: Any) -> Any:
    return modules("routing_rules")


@pytest.fixture
def broker(modules: Any) -> Any:
    return modules("routing_broker")


def mean_wait(load: Any, outcome: Any) -> float:
    """Return the mean wait in mean service times, without the tenth that came first."""
    return statistics.fmean(outcome.waits_s[len(outcome.waits_s) // 10 :]) / load.SERVICE_S


def erlang_c(servers: int, share: float) -> float:
    """Return the mean wait of M/M/k in service times (Erlang 1917)."""
    offered = servers * share
    busy = offered**servers / math.factorial(servers) / (1 - share)
    waits = busy / (sum(offered**n / math.factorial(n) for n in range(servers)) + busy)
    return waits / (servers * (1 - share))


# Requests.


def test_lengths_are_what_they_are_said_to_be(load: Any) -> None:
    random = Random(1)
    drawn = [load.draw_tokens("pareto", random) for _ in range(50_000)]
    mean = statistics.fmean(drawn)
    assert min(drawn) == load.LEAST_TOKENS
    assert load.MOST_TOKENS / 2 < max(drawn) <= load.MOST_TOKENS
    assert mean == pytest.approx(load.mean_tokens(), rel=0.02)
    assert statistics.pvariance(drawn) / mean**2 == pytest.approx(3.1, rel=0.1)
    for kind in ("exponential", "fixed"):
        same = statistics.fmean(load.draw_tokens(kind, random) for _ in range(20_000))
        assert same == pytest.approx(load.mean_tokens(), rel=0.02)


def test_arrivals_have_the_rate_asked_for_and_bursts_are_bursts(load: Any) -> None:
    spread = {}
    for kind in load.ARRIVALS:
        times = list(islice(load.arrival_times(kind, 10.0, Random(1)), 100_000))
        assert times == sorted(times)
        assert len(times) / times[-1] == pytest.approx(10.0, rel=0.05)
        counts = Counter(int(at // 10) for at in times)
        each = [counts[number] for number in range(int(times[-1] // 10))]
        spread[kind] = statistics.pvariance(each) / statistics.fmean(each)
    assert spread["poisson"] == pytest.approx(1.0, rel=0.1)
    assert spread["bursty"] > 20


def test_requests_are_the_same_for_everybody(load: Any) -> None:
    cluster = load.Cluster.of(4, (1.0, 3.0))
    assert cluster.speeds[1] == pytest.approx(3 * cluster.speeds[0])
    assert cluster.tokens_per_s == pytest.approx(4 * load.mean_tokens() / load.SERVICE_S)
    jobs = load.jobs_of(cluster, 0.5, "poisson", 50, "a")
    assert jobs == load.jobs_of(cluster, 0.5, "poisson", 50, "a")
    assert jobs != load.jobs_of(cluster, 0.5, "poisson", 50, "b")
    assert [job.number for job in jobs] == list(range(50))
    assert all(job.tokens <= job.bound_tokens for job in jobs)


# Theory.


@pytest.mark.parametrize(
    ("workers", "share", "lengths", "wait"),
    [
        (1, 0.5, "exponential", 1.0),
        (1, 0.5, "fixed", 0.5),
        (1, 0.5, "pareto", 0.5 * (1 + 3.13) / (2 * 0.5)),  # Pollaczek and Khinchine: the variance counts
        (4, 0.8, "exponential", erlang_c(4, 0.8)),
        (16, 0.9, "exponential", erlang_c(16, 0.9)),
    ],
)
def test_the_central_queue_waits_as_theory_says(
    load: Any, rules: Any, workers: int, share: float, lengths: str, wait: float
) -> None:
    cluster = load.Cluster.of(workers)
    jobs = load.jobs_of(cluster, share, "poisson", 80_000, "theory", lengths=lengths)
    assert mean_wait(load, rules.central_queue(jobs, cluster)) == pytest.approx(wait, rel=0.1)


def test_the_lottery_makes_a_queue_of_its_own_of_each_worker(load: Any, rules: Any) -> None:
    cluster = load.Cluster.of(3, (1.0, 2.0, 4.0))
    jobs = load.jobs_of(cluster, 0.5, "poisson", 40_000, "theory", lengths="exponential")
    outcome = rules.lottery(jobs, cluster, Random(1))
    counts = Counter(outcome.workers)
    assert [counts[number] / len(jobs) for number in range(3)] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.01)
    # Each is M/M/1 at load 0.5 and waits for one service of its own: 1/7 of 7/3, and so on, is 1 again.
    assert mean_wait(load, outcome) == pytest.approx(1.0, rel=0.1)


# The rules, by hand.


def jobs_at(load: Any, *times: float, tokens: int = 100) -> list[Any]:
    return [load.Job(number, at, tokens, tokens) for number, at in enumerate(times)]


def test_of_free_slots_the_central_queue_takes_the_fastest(load: Any, rules: Any) -> None:
    cluster = load.Cluster((10.0, 20.0), 1)
    outcome = rules.central_queue(jobs_at(load, 0, 1, 2, 20), cluster)
    assert outcome.workers == [1, 0, 1, 1]
    assert outcome.waits_s == [0, 0, 3, 0]
    assert outcome.responses_s == [5, 10, 8, 5]


class _Phases:
    """In place of a Random: heartbeats of all workers at one time."""

    def uniform(self, _least: float, _most: float) -> float:
        return 15.0


def test_the_ancestors_queue_is_as_old_as_the_last_heartbeat(load: Any, rules: Any) -> None:
    cluster = load.Cluster((100.0, 100.0), 1)
    # Each request takes a second, and all have ended when the next one comes; what counts is what was sent there.
    times = [0, 2, 4, 6, 8]
    stale = rules.shortest_queue(jobs_at(load, *times), cluster, 15.0, _Phases())
    assert stale.workers == [0, 1, 0, 1, 0]
    # The heartbeat at 15 s tells that both are empty: of equals it is the first again.
    again = rules.shortest_queue(jobs_at(load, *times, 16), cluster, 15.0, _Phases())
    assert again.workers == [0, 1, 0, 1, 0, 0]
    exact = rules.shortest_queue(jobs_at(load, *times), cluster, None, Random(1))
    assert exact.workers == [0, 0, 0, 0, 0]


def test_what_a_heartbeat_tells_holds_for_the_next_15_s(load: Any, rules: Any) -> None:
    # At 15 s the first worker has two long requests and the second none; at 17 s both are idle, which nobody knows.
    jobs = [*jobs_at(load, 0, tokens=1_600), load.Job(1, 0.0, 100, 100), load.Job(2, 0.0, 100, 100)]
    jobs += [load.Job(3 + number, 18.0 + number, 10, 10) for number in range(3)]
    outcome = rules.shortest_queue(jobs, load.Cluster((100.0, 100.0), 1), 15.0, _Phases())
    assert outcome.workers == [0, 1, 0, 1, 1, 0]


def test_the_ancestors_rule_divides_by_the_speed(load: Any, rules: Any) -> None:
    outcome = rules.shortest_queue(jobs_at(load, *[0.0] * 5), load.Cluster((10.0, 30.0), 1), None, Random(1))
    assert outcome.workers == [0, 1, 1, 1, 0]


# The real core.


def run(broker: Any, cluster: Any, jobs: list[Any], policy: str = DEFAULT_POLICY, **options: Any) -> Any:
    simulation = broker.Simulation(cluster, policy, seed="test", **options)
    outcome = simulation.run(jobs)
    simulation.validate()
    assert len(outcome.waits_s) == len(jobs)
    return outcome


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_with_equal_workers_every_policy_is_the_central_queue(
    load: Any, rules: Any, broker: Any, policy: str
) -> None:
    cluster = load.Cluster.of(4, slots=2)
    jobs = load.jobs_of(cluster, 0.9, "bursty", 500, "core")
    expected = rules.central_queue(jobs, cluster)
    outcome = run(broker, cluster, jobs, policy)
    assert outcome.waits_s == pytest.approx(expected.waits_s)
    assert outcome.responses_s == pytest.approx(expected.responses_s)


def test_the_default_finds_out_who_is_fast(load: Any, rules: Any, broker: Any) -> None:
    cluster = load.Cluster.of(6, (1.0, 2.0, 4.0))
    jobs = load.jobs_of(cluster, 0.5, "poisson", 1_500, "core")
    best = statistics.fmean(rules.central_queue(jobs, cluster).responses_s)
    own = statistics.fmean(run(broker, cluster, jobs).responses_s)
    blind = statistics.fmean(run(broker, cluster, jobs, "round-robin").responses_s)
    assert own < 1.1 * best < blind


def test_two_brokers_share_workers_by_what_these_report(load: Any, broker: Any) -> None:
    cluster = load.Cluster.of(4, slots=4)
    jobs = load.jobs_of(cluster, 0.8, "poisson", 1_500, "core")
    fresh = mean_wait(load, run(broker, cluster, jobs, brokers=2, report_s=15.0))
    stale = mean_wait(load, run(broker, cluster, jobs, brokers=2, report_s=15.0, early=False))
    assert fresh < stale / 2


def test_what_is_turned_away_comes_again(load: Any, broker: Any) -> None:
    cluster = load.Cluster((100.0,), 1)
    simulation = broker.Simulation(cluster, DEFAULT_POLICY, max_waiting=2)
    outcome = simulation.run(jobs_at(load, *[0.0] * 6))
    assert simulation.refused >= 3
    assert len(outcome.waits_s) == 6
    assert max(outcome.waits_s) >= 5


def test_a_flood_harms_others_less_than_in_one_queue(modules: Any, load: Any) -> None:
    harm = modules("routing_fairness").harm(load.Cluster.of(16, slots=2), 200, "test")
    assert 0 < harm.raised < harm.in_order / 4
    assert harm.preferred <= harm.beside


# Figures.


def test_estimates_have_the_confidence_of_student(modules: Any) -> None:
    figures = modules("routing_figures")
    estimate = figures.Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.30 / math.sqrt(3))
    assert figures.Estimate.of([1.0]).half_width == math.inf
    assert figures.ratio([2.0, 3.0], [1.0, 2.0]).mean == pytest.approx(1.75)
    assert figures.ratio([2.0, 3.0], [1.0, 0.0]) is None


def test_a_small_run_has_a_table(modules: Any) -> None:
    routing = modules("routing")
    case = routing.Case(workers=4, slots=1)
    _, figures = routing.simulate((case, "1"), 200, [DEFAULT_POLICY])
    lines = list(routing.report({case: {rule: [each] for rule, each in figures.items()}}))
    assert [line.split("  ")[1] for line in lines if line.startswith("  ") and line[2] != " "][:5] == [
        "central queue", "shortest-queue", "ancestors' lottery", "ancestors' s.q., 15 s", "ancestors' s.q., exact",
    ]  # fmt: skip
    [verdict] = [line for line in lines if line.startswith("  4 workers x 1, equal speeds, poisson, load 0.9 ")]
    assert float(verdict.split()[-2]) == pytest.approx(1.0)


def test_plots_are_drawn_of_what_was_simulated(modules: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    routing = modules("routing")
    figures = routing.Figures(mean=1.0, p50=0.5, p99=3.0, response=2.0)
    results = {case: {"central queue": [figures], DEFAULT_POLICY: [figures]} for case in routing.usual_cases()}
    drawn = routing.plot(results, tmp_path)
    assert [path.name for path in drawn] == ["routing-load.svg", "routing-size.svg"]
    assert all(DEFAULT_POLICY in path.read_text() for path in drawn)


def test_decisions_leave_the_broker_as_it_was(modules: Any) -> None:
    decisions = modules("decisions")
    for policy in POLICIES:
        broker = decisions.Broker(policy, 10)
        running = len(broker.core.exchange.records)
        assert running == 10 * decisions.SLOTS // 2
        broker.decision(40)
        broker.whole(40)
        broker.core.validate()
        assert len(broker.core.exchange.records) == running
