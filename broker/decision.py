"""Why a worker was chosen, for those who ask."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest

from ..protocol.limits import MAX_CONSIDERED, MAX_COUNT
from ..protocol.messages import Considered, Decision
from .registry import WorkerSession

#: The greatest cost that the wire carries.
_MOST_COST = 1e15


def explain(broker: str, policy: str, chosen: WorkerSession, candidates: Iterable[WorkerSession]) -> Decision:
    """Return the decision for a worker, with the best of the candidates as they are before it gets the request."""
    workers = list(candidates)
    best = nsmallest(MAX_CONSIDERED, workers, key=lambda worker: (worker.cost, worker.last_used))
    if chosen not in best:
        best = [*best[: MAX_CONSIDERED - 1], chosen]
    # Workers report what they like, and it must still be a message: the client's session would end over it.
    considered = tuple(
        Considered(
            worker.name, min(worker.load, MAX_COUNT), worker.slots, worker.speed, min(worker.cost, _MOST_COST)
        )
        for worker in best
    )  # fmt: skip
    return Decision(broker, policy, chosen.name, len(workers), considered)
