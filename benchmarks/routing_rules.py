"""The rules that tokenmq's broker is measured against, simulated directly: no broker, no messages.

The optimum is one queue for all workers, first come, first served (M/G/k): a request waits only while all slots are
busy. The ancestors (FastChat, LLaVA and their family) choose a worker as a request arrives, and it waits there, in a
queue of that worker's own. Their two rules:

- lottery: at random, in proportion to speed;
- shortest_queue: the least `queue_length / speed`, the first of equals, where `queue_length` is what the worker's
  last heartbeat told (running and waiting), and 1 more for each request sent there since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from random import Random

from routing_load import Cluster, Job


@dataclass(slots=True)
class Outcome:
    """What became of the requests, in the order of their arrival.

    Attributes:
        waits_s: from the arrival until the worker began.
        responses_s: from the arrival until the last token.
        workers: who ran them, by number.
    """

    waits_s: list[float] = field(default_factory=list)
    responses_s: list[float] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)

    def add(self, job: Job, began: float, ended: float, worker: int) -> None:
        """Add the next one."""
        self.waits_s.append(began - job.arrived_at)
        self.responses_s.append(ended - job.arrived_at)
        self.workers.append(worker)


def central_queue(jobs: Sequence[Job], cluster: Cluster) -> Outcome:
    """Simulate one queue for all; of several free slots the fastest is taken."""
    outcome = Outcome()
    idle = [(-speed, number) for number, speed in enumerate(cluster.speeds) for _ in range(cluster.slots)]
    heapify(idle)
    busy: list[tuple[float, int]] = []
    for job in jobs:
        while busy and busy[0][0] <= job.arrived_at:
            _, worker = heappop(busy)
            heappush(idle, (-cluster.speeds[worker], worker))
        began = job.arrived_at
        if idle:
            _, worker = heappop(idle)
        else:
            began, worker = heappop(busy)  # nobody overtakes: this one begins when the next slot is free
        ended = began + job.tokens / cluster.speeds[worker]
        heappush(busy, (ended, worker))
        outcome.add(job, began, ended, worker)
    return outcome


class _Queue:
    """A worker with a queue of its own."""

    def __init__(self, speed: float, slots: int) -> None:
        self.speed = speed
        self._free_at = [0.0] * slots
        self._ends: list[float] = []

    def take(self, job: Job) -> tuple[float, float]:
        """Return when the request begins and when it ends."""
        began = max(job.arrived_at, heappop(self._free_at))
        ended = began + job.tokens / self.speed
        heappush(self._free_at, ended)
        heappush(self._ends, ended)
        return began, ended

    def length(self, now: float) -> int:
        """Return how many requests it has, running and waiting. The time must not go back."""
        while self._ends and self._ends[0] <= now:
            heappop(self._ends)
        return len(self._ends)


def lottery(jobs: Sequence[Job], cluster: Cluster, random: Random) -> Outcome:
    """Simulate the ancestors' lottery."""
    outcome = Outcome()
    queues = [_Queue(speed, cluster.slots) for speed in cluster.speeds]
    numbers = range(len(queues))
    for job, worker in zip(jobs, random.choices(numbers, cluster.speeds, k=len(jobs)), strict=True):
        outcome.add(job, *queues[worker].take(job), worker)
    return outcome


def shortest_queue(jobs: Sequence[Job], cluster: Cluster, heartbeat_s: float | None, random: Random) -> Outcome:
    """Simulate the ancestors' shortest_queue.

    Args:
        jobs: what arrives.
        cluster: the workers.
        heartbeat_s: seconds between the reports of a worker, each at a phase of its own; None for a report at the
            end of each request, so that the figures are exact.
        random: what the phases are drawn from.
    """
    outcome = Outcome()
    queues = [_Queue(speed, cluster.slots) for speed in cluster.speeds]
    known = [0] * len(queues)
    #: (queue over speed, number) as of each change: what has changed since is skipped.
    ranks = [(0.0, number) for number in range(len(queues))]
    reports: list[tuple[float, int]] = []
    if heartbeat_s is not None:
        reports = [(random.uniform(0, heartbeat_s), number) for number in range(len(queues))]
        heapify(reports)
    for job in jobs:
        for at, worker in _due(reports, job.arrived_at):
            known[worker] = queues[worker].length(at)
            heappush(ranks, (known[worker] / queues[worker].speed, worker))
            if heartbeat_s is not None:
                heappush(reports, (at + heartbeat_s, worker))
        rank, worker = ranks[0]
        while rank != known[worker] / queues[worker].speed:
            heappop(ranks)
            rank, worker = ranks[0]
        known[worker] += 1
        heappush(ranks, (known[worker] / queues[worker].speed, worker))
        began, ended = queues[worker].take(job)
        if heartbeat_s is None:
            heappush(reports, (ended, worker))
        outcome.add(job, began, ended, worker)
    return outcome


def _due(reports: list[tuple[float, int]], now: float) -> Iterator[tuple[float, int]]:
    while reports and reports[0][0] <= now:
        yield heappop(reports)
