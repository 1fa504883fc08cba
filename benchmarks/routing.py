"""How long requests wait, by dispatch policy: the real broker core against its ancestors' rules and the optimum.

A discrete-event simulation without sockets. All rules see the same requests at the same times; waits are in units of
the mean service time, which is 5 s, with the 95 % confidence of the mean over several seeds. The optimum is one
queue for all workers (M/G/k); the ancestors' rules choose a worker on arrival, by what its last heartbeat told.
Lengths are a bounded Pareto distribution (shape 1.5, 64 to 8,192 tokens). "bursty": the rate of arrivals is 3 times
the mean for 30 s on average, then half of it for 120 s.

Run: make routing, or python benchmarks/routing.py. On 2 cores the default takes ten minutes, --full some
hours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

from routing_broker import Simulation
from routing_figures import Estimate, Figures, ratio, table
from routing_load import ARRIVALS, BURSTY, POISSON, Cluster, Job, jobs_of
from routing_plots import draw
from routing_rules import Outcome, central_queue, lottery, shortest_queue

from tokenmq.broker.dispatch import DEFAULT_POLICY, POLICIES

OPTIMUM = "central queue"
LOTTERY = "ancestors' lottery"
STALE = "ancestors' s.q., 15 s"
EXACT = "ancestors' s.q., exact"
#: Of the ancestors' workers.
HEARTBEAT_S = 15.0
EQUAL, UNLIKE = (1.0,), (1.0, 2.0, 4.0)
LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
#: What the ancestors' workers run at a time.
SLOTS = 5
#: A run lasts for so many requests of each slot at least: a large cluster fills slowly.
_JOBS_PER_SLOT = 40
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to simulate.

    Attributes:
        workers: how many.
        slots: requests that each runs at a time.
        ratios: of their speeds, in turn.
        load: what arrives over what they can do.
        arrivals: POISSON or BURSTY.
        brokers: that share the workers, each for a part of the requests.
        stale: these hear of each other's requests with a worker's heartbeats only, each 15 s, instead of when a
            worker notices that it matters, as it is.
    """

    workers: int = 16
    slots: int = SLOTS
    ratios: tuple[float, ...] = EQUAL
    load: float = 0.9
    arrivals: str = POISSON
    brokers: int = 1
    stale: bool = False

    def __str__(self) -> str:
        """Return it for a person."""
        speeds = "equal speeds" if self.ratios == EQUAL else "speeds " + ":".join(f"{each:g}" for each in self.ratios)
        reports = f", {HEARTBEAT_S:g} s stale" if self.stale else ""
        shared = f", {self.brokers} brokers{reports}" if self.brokers > 1 else ""
        return f"{self.workers} workers x {self.slots}, {speeds}, {self.arrivals}, load {self.load:g}{shared}"


Results = dict[Case, dict[str, list[Figures]]]


def usual_cases() -> list[Case]:
    """Return what is simulated by default: one thing varies at a time."""
    cases = [Case(load=load) for load in LOADS]
    cases += [Case(load=load, ratios=UNLIKE) for load in LOADS]
    cases += [Case(load=load, arrivals=BURSTY) for load in (0.5, 0.7, 0.9)]
    cases += [
        Case(workers=workers, slots=1, ratios=ratios) for ratios in (EQUAL, UNLIKE) for workers in (4, 16, 64, 256)
    ]
    return cases + [Case(brokers=2, stale=stale) for stale in (False, True)]


def all_cases() -> list[Case]:
    """Return all combinations of sizes, speeds, arrivals and loads."""
    sizes = ((4, 1), (16, 1), (16, SLOTS), (64, 1), (256, 1), (1000, 1))
    cases = [
        Case(workers, slots, ratios, load, arrivals)
        for workers, slots in sizes
        for ratios in (EQUAL, UNLIKE)
        for arrivals in ARRIVALS
        for load in LOADS
    ]
    return cases + [Case(load=load, brokers=2, stale=stale) for load in LOADS for stale in (False, True)]


def rules_of(
    case: Case, cluster: Cluster, policies: Iterable[str], seed: str
) -> dict[str, Callable[[list[Job]], Outcome]]:
    """Return what to run, by name: the optimum first, then our policies, then the ancestors' rules."""
    rules: dict[str, Callable[[list[Job]], Outcome]] = {OPTIMUM: partial(central_queue, cluster=cluster)}
    for policy in policies:
        rules[policy] = Simulation(
            cluster, policy, seed=seed, brokers=case.brokers, report_s=HEARTBEAT_S, early=not case.stale
        ).run
    rules[LOTTERY] = partial(lottery, cluster=cluster, random=Random(f"{seed}/lottery"))
    for name, heartbeat_s in ((STALE, HEARTBEAT_S), (EXACT, None)):
        rules[name] = partial(
            shortest_queue, cluster=cluster, heartbeat_s=heartbeat_s, random=Random(f"{seed}/heartbeats")
        )
    return rules


def simulate(work: tuple[Case, str], jobs: int, policies: Sequence[str]) -> tuple[Case, dict[str, Figures]]:
    """Run all rules on the requests of one case and seed."""
    case, seed = work
    cluster = Cluster.of(case.workers, case.ratios, case.slots)
    arriving = jobs_of(cluster, case.load, case.arrivals, max(jobs, _JOBS_PER_SLOT * case.workers * case.slots), seed)
    return case, {name: Figures.of(run(arriving)) for name, run in rules_of(case, cluster, policies, seed).items()}


def measure(options: argparse.Namespace, cases: Sequence[Case]) -> Results:
    """Simulate all cases with all seeds, on all cores; tell how far it is."""
    results: Results = {case: {} for case in cases}
    # The large ones first: else one of them is left over when the other cores have nothing to do.
    order = sorted(cases, key=lambda case: -case.workers * case.slots)
    work = [(case, f"{options.seed}/{number}") for case in order for number in range(options.seeds)]
    run = partial(simulate, jobs=options.jobs, policies=options.policies)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        # In order, so that the figures of one rule and of another are of the same seeds.
        for number, (case, figures) in enumerate(pool.imap(run, work), 1):
            for rule, each in figures.items():
                results[case].setdefault(rule, []).append(each)
            print(f"{number} of {len(work)}: {case}", file=sys.stderr, flush=True)
    return results


def report(results: Results) -> Iterable[str]:
    """Return all tables, and what is promised of the default policy."""
    yield "waits in mean service times; ± is the 95 % confidence of the mean over seeds"
    for case, rules in results.items():
        yield ""
        yield f"{case}:"
        yield from table(rules, OPTIMUM)
    yield ""
    yield f"{DEFAULT_POLICY} at load 0.9, equal speeds, one broker: mean / {OPTIMUM}, and p99 of {STALE} / its own"
    for case, rules in results.items():
        if (case.load, case.ratios, case.brokers) == (0.9, EQUAL, 1) and DEFAULT_POLICY in rules:
            own = rules[DEFAULT_POLICY]
            close = ratio([each.mean for each in own], [each.mean for each in rules[OPTIMUM]])
            better = ratio([each.p99 for each in rules[STALE]], [each.p99 for each in own])
            yield f"  {case!s:60} {close or '-'!s:>16} {better or 'its p99 is 0'!s:>16}"


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw what varies by load and by size; return the files."""
    p99 = {
        case: {rule: Estimate.of([each.p99 for each in runs]).mean for rule, runs in rules.items()}
        for case, rules in results.items()
    }
    by_load, by_size = {}, {}
    for heading, ratios in (("equal speeds", EQUAL), ("speeds 1:2:4", UNLIKE)):
        loads = sorted((case.load, case) for case in p99 if case == Case(load=case.load, ratios=ratios))
        sizes = sorted((case.workers, case) for case in p99 if case == Case(case.workers, 1, ratios))
        by_load[heading], by_size[heading] = (
            {rule: [(x, p99[case][rule]) for x, case in points] for rule in (p99[points[0][1]] if points else ())}
            for points in (loads, sizes)
        )
    paths = folder / "routing-load.svg", folder / "routing-size.svg"
    titles = (
        "99 % of requests wait for less: 16 workers x 5",
        "99 % of requests wait for less: load 0.9, one request at a time",
    )
    drawn = []
    if all(by_load.values()) and draw(paths[0], titles[0], "load", by_load, dashed=OPTIMUM):
        drawn.append(paths[0])
    if all(by_size.values()) and draw(paths[1], titles[1], "workers", by_size, dashed=OPTIMUM, logarithmic=True):
        drawn.append(paths[1])
    return drawn


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all combinations, 4 to 1,000 workers")
    parser.add_argument("--jobs", type=int, help="requests of a run (default: 10000, with --full 50000)")
    parser.add_argument("--seeds", type=int, help="runs of each case (default: 3, with --full 5)")
    parser.add_argument("--seed", type=int, default=1, help="what all seeds are made of (default: 1)")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="only these")
    parser.add_argument("--processes", type=int, default=None, help="at a time (default: one a core)")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for plots (default: docs/figures)")
    parser.add_argument("--json", type=Path, default=None, help="a file for all figures")
    options = parser.parse_args(arguments)
    options.jobs = options.jobs or (50_000 if options.full else 10_000)
    options.seeds = options.seeds or (5 if options.full else 3)
    return options


def main() -> None:
    """Simulate, print the tables, draw the plots."""
    options = parse()
    results = measure(options, all_cases() if options.full else usual_cases())
    for line in report(results):
        print(line)
    if options.json is not None:
        rows = [
            {"case": asdict(case), "rule": rule, "runs": [asdict(each) for each in runs]}
            for case, rules in results.items()
            for rule, runs in rules.items()
        ]
        options.json.write_text(json.dumps(rows))
    drawn = plot(results, options.figures)
    print("drawn: " + ", ".join(map(str, drawn)) if drawn else "no plots: matplotlib is not installed")


if __name__ == "__main__":
    main()
