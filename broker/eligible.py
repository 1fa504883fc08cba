"""Which workers may take a request: who can resume it, and who has failed it before. Knows nothing of policies."""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol.messages import WorkerState
from .registry import Registry, WorkerSession
from .requests import RequestRecord


def candidates(registry: Registry, record: RequestRecord) -> list[WorkerSession]:
    """Return the workers with a free slot that may take the request now.

    A worker that failed it before may, if the model has no other that is ready: while there is one, the request waits
    for that one's slot.
    """
    able = registry.resuming(record.model) if record.resumed else list(registry.serving(record.model))
    if record.avoid:
        others = [worker for worker in able if worker.name not in record.avoid and worker.state is WorkerState.READY]
        able = others or able
    return [worker for worker in able if worker.free]


def first_served(
    registry: Registry, waiting: Iterable[RequestRecord]
) -> tuple[RequestRecord, list[WorkerSession]] | None:
    """Return the first of these requests (all of one model) that a worker may take now, with those workers.

    Requests with the same wishes have the same candidates, so that many that cannot be served cost a look-up each.
    """
    unserved: set[tuple[bool, frozenset[str]]] = set()
    for record in waiting:
        wishes = (record.resumed, record.avoid)
        if wishes in unserved:
            continue
        found = candidates(registry, record)
        if found:
            return record, found
        unserved.add(wishes)
        if wishes == (False, frozenset()):
            return None  # whoever is free may take such a one: nobody is
    return None
