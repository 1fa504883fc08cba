"""Why a worker was chosen, for those who ask."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest

from ..protocol.limits import MAX_CONSIDERED
from ..protocol.messages import Considered, Decision
from .registry import WorkerSession


def explain(broker: str, policy: str, chosen: WorkerSession, candidates: Iterable[WorkerSession]) -> Decision:
    """Return the decision for a worker, with the best of the candidates as they are before it gets the request."""
    workers = list(candidates)
    best = nsmallest(MAX_CONSIDERED, workers, key=lambda worker: (worker.cost, worker.last_used))
    if chosen not in best:
        best = [*best[: MAX_CONSIDERED - 1], chosen]
    considered = tuple(
        Considered(worker.name, worker.load, worker.slots, worker.speed, worker.cost) for worker in best
    )
    return Decision(broker, policy, chosen.name, len(workers), considered)
