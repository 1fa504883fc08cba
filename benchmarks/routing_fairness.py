"""What a client that floods costs the others: waits of an ordinary client with and without 10,000 requests beside it.

The same simulation as routing.py. One client in five is watched; all of them together load the workers by half. Then
one more client sends 10,000 requests at once. The watched client's waits are compared with those of the same requests
without the flood; they are in mean service times. Beside it: with a priority above all others for the watched client,
which is the best that can be had without interrupting what runs, and one queue for all, first come, first served.

Shares are shares of tokens: after a long request of its own, a client that others compete with is behind them for as
long as its share of the workers takes to make up for it. In a small cluster that is a long time. So there is a second
table, with lengths that are exponentially distributed.

Run: python benchmarks/routing_fairness.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from chaos_figures import percentile
from routing_broker import Simulation
from routing_figures import Estimate
from routing_load import EXPONENTIAL, PARETO, POISSON, SERVICE_S, Cluster, Job, bound_of, draw_tokens, jobs_of
from routing_rules import Outcome, central_queue

from tokenmq.broker.dispatch import DEFAULT_POLICY
from tokenmq.protocol.limits import MAX_PRIORITY

FLOOD = 10_000
#: Clients besides the one that floods; the first of them is watched.
CLIENTS = 5
LOAD = 0.5
#: Seconds between heartbeats: nothing depends on them here.
HEARTBEAT_S = 15.0
#: The flood comes after so many mean service times; it takes the workers by half at least, and so ends in twice its
#: own time.
_BEGIN = 20
_LASTS = 2.0
SIZES = ((4, 1), (16, 1), (16, 5), (64, 5))


@dataclass(frozen=True, slots=True)
class Harm:
    """What the flood does to the client that is watched, in mean service times.

    Attributes:
        alone: its p99 wait without the flood.
        beside: with it.
        preferred: with it, where the client has the greatest priority.
        in_order: with it, first come, first served.
    """

    alone: float
    beside: float
    preferred: float
    in_order: float

    @property
    def raised(self) -> float:
        """By how much its p99 wait is more."""
        return self.beside - self.alone


def with_flood(jobs: Sequence[Job], flood: int, at: float, seed: str, lengths: str) -> list[Job]:
    """Put requests of one more client among the others, all at one moment; number all anew."""
    sizes = Random(f"{seed}/flood")
    drawn = [draw_tokens(lengths, sizes) for _ in range(flood)]
    burst = [Job(0, at, tokens, bound_of(tokens), client=CLIENTS) for tokens in drawn]
    ordered = sorted([*jobs, *burst], key=lambda job: job.arrived_at)
    return [replace(job, number=number) for number, job in enumerate(ordered)]


def harm(cluster: Cluster, flood: int, seed: str, lengths: str = PARETO) -> Harm:
    """Simulate one cluster with and without a flood."""
    slots = len(cluster.speeds) * cluster.slots
    begins_at = _BEGIN * SERVICE_S
    ends_at = begins_at + _LASTS * flood * SERVICE_S / slots
    who = Random(f"{seed}/clients")
    arriving = jobs_of(cluster, LOAD, POISSON, int(LOAD * slots * ends_at / SERVICE_S), seed, lengths=lengths)
    calm = [replace(job, client=who.randrange(CLIENTS)) for job in arriving]
    flooded = with_flood(calm, flood, begins_at, seed, lengths)

    def simulated(jobs: list[Job]) -> Outcome:
        names = [f"client-{number}" for number in range(CLIENTS + 1)]
        return Simulation(cluster, DEFAULT_POLICY, seed=seed, report_s=HEARTBEAT_S, clients=names).run(jobs)

    def watched(jobs: list[Job], outcome: Outcome) -> float:
        waits = [
            wait
            for job, wait in zip(jobs, outcome.waits_s, strict=True)
            if job.client == 0 and begins_at <= job.arrived_at
        ]
        return percentile(waits, 0.99) / SERVICE_S

    preferring = [replace(job, priority=MAX_PRIORITY) if job.client == 0 else job for job in flooded]
    return Harm(
        alone=watched(calm, simulated(calm)),
        beside=watched(flooded, simulated(flooded)),
        preferred=watched(preferring, simulated(preferring)),
        in_order=watched(flooded, central_queue(flooded, cluster)),
    )


def main() -> None:
    """Simulate all sizes; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flood", type=int, default=FLOOD, help=f"requests of the flood (default: {FLOOD})")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each size (default: 3)")
    options = parser.parse_args()
    print(f"p99 wait of a client, in mean service times, while another sends {options.flood:,} requests at once")
    for heading, lengths in (("heavy-tailed lengths", PARETO), ("exponential lengths", EXPONENTIAL)):
        print(f"  {heading:20} {'without':>15} {'with':>15} {'more':>15} {'preferred':>15} {'first come':>15}")
        for workers, slots in SIZES:
            cluster = Cluster.of(workers, slots=slots)
            runs = [harm(cluster, options.flood, f"fair/{number}", lengths) for number in range(options.seeds)]
            names = ("alone", "beside", "raised", "preferred", "in_order")
            columns = [Estimate.of([getattr(run, name) for run in runs]) for name in names]
            print(f"  {f'{workers} workers x {slots}':20} {' '.join(map(str, columns))}", flush=True)


if __name__ == "__main__":
    main()
