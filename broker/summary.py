"""What a broker says of itself at another one, where it is a worker: all that its own workers can do, as one.

Pure functions of the registry: they are called when something may have changed, and never for each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..protocol.limits import MAX_BROKERS, MAX_COUNT, MAX_MODELS, MAX_SLOTS
from ..protocol.messages import Load, ModelInfo, WorkerState
from .breaker import State
from .registry import Registry, WorkerSession

#: The most that Load and READY can say.
_MAX_TOKENS_PER_S = 1e12
_MAX_SPEED = 1e6
#: Speeds are measured with each request: those above hear of it when it makes a difference.
_SPEED_CHANGE = 0.1


@dataclass(frozen=True, slots=True)
class Summary:
    """What READY tells of a broker's workers.

    Attributes:
        models: the union of theirs.
        slots: requests that they run at a time, all together.
        brokers: this broker's id, and those of all brokers below it.
        speed: the sum of the speeds of those that take requests, so that a queue here is compared with others by what
            works it off; None before any of them is known.
        ready: one of them takes requests.
        left_out: models and brokers that did not fit into READY.
    """

    models: tuple[ModelInfo, ...]
    slots: int
    brokers: tuple[str, ...]
    speed: float | None
    ready: bool
    left_out: int = 0


def summarize(id: str, registry: Registry, told_speed: float | None = None) -> Summary:
    """Return the summary of a broker with this id; a speed that is much the same as the one told stays as it was."""
    workers = list(registry)
    models = _models(workers)
    below = sorted({broker for worker in workers for broker in worker.ready.brokers} - {id})
    slots = sum(_slots(worker) for worker in workers)
    return Summary(
        models=models[:MAX_MODELS],
        slots=max(1, min(slots, MAX_SLOTS)),
        brokers=(id, *below)[:MAX_BROKERS],
        speed=_speed([worker for worker in workers if _usable(worker)], told_speed),
        ready=any(worker.takes_requests for worker in workers),
        left_out=max(0, len(models) - MAX_MODELS) + max(0, 1 + len(below) - MAX_BROKERS),
    )


def _models(workers: Iterable[WorkerSession]) -> tuple[ModelInfo, ...]:
    found: dict[str, ModelInfo] = {}
    for worker in workers:
        for info in worker.ready.models:
            resumes = worker.resumes(info.name)
            known = found.get(info.name)
            if known is None:
                found[info.name] = replace(info, resumes=resumes)
            else:
                # A prompt that fits into the smallest context fits wherever it goes; 0 is no bound.
                contexts = [tokens for tokens in (known.context_tokens, info.context_tokens) if tokens]
                found[info.name] = ModelInfo(
                    info.name, min(contexts, default=0), known.chat and info.chat, known.resumes or resumes
                )
    return tuple(found[name] for name in sorted(found))


def _slots(worker: WorkerSession) -> int:
    """Return what a worker adds to the slots: one that takes nothing at the moment just has room for what it holds.

    Without that its requests would seem to fill the others' slots, since the load has them, too.
    """
    return worker.slots if _usable(worker) else min(worker.load, worker.slots)


def _usable(worker: WorkerSession) -> bool:
    return worker.takes_requests and worker.breaker.state is not State.OPEN


def _speed(workers: Sequence[WorkerSession], told: float | None) -> float | None:
    known = [worker.ready.speed or worker.speed_set or worker.measured.measured for worker in workers]
    if not any(known):
        return None  # all are reckoned alike: that says nothing in comparison with others
    total = min(_MAX_SPEED, sum(worker.speed for worker in workers))
    return told if told is not None and abs(total - told) <= _SPEED_CHANGE * told else total


def load_of(registry: Registry, *, state: WorkerState, waiting: int, held: int) -> Load:
    """Return the load of all workers together.

    Args:
        registry: the workers.
        state: what this broker can do.
        waiting: requests in its waiting rooms.
        held: requests of the broker that the report goes to.
    """
    workers = list(registry)
    reports = [worker.reported for worker in workers]
    used = [report.kv_use for report in reports]
    # Workers say what they like, and the sum must still be a message.
    return Load(
        state=state,
        running=min(MAX_COUNT, sum(worker.load for worker in workers)),
        waiting=min(MAX_COUNT, waiting),
        held=held,
        steps=min(MAX_COUNT, sum(report.steps for report in reports)),
        tokens_per_s=min(_MAX_TOKENS_PER_S, sum(report.tokens_per_s for report in reports)),
        kv_use=sum(used) / len(used) if used else 0.0,
    )
