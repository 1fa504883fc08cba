"""What a broker says of itself at another one, where it is a worker: all that its own workers can do, as one.

It is looked at when something may have changed, and never for each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..protocol.limits import FASTEST_TOKENS_PER_S, MAX_BROKERS, MAX_COUNT, MAX_MODELS, MAX_SLOTS
from ..protocol.messages import Load, ModelInfo, Ready, WorkerState
from .breaker import State
from .registry import Registry, WorkerSession

#: The most that Load can say.
_MAX_TOKENS_PER_S = 1e12
#: Speeds are measured with each request: those above hear of it when it makes a difference.
_SPEED_CHANGE = 0.1


@dataclass(frozen=True, slots=True)
class Summary:
    """What READY tells of a broker's workers.

    Attributes:
        models: the union of theirs.
        brokers: this broker's id, and those of all brokers below it.
        slots: requests that they run at a time, all together.
        speed: the sum of the speeds of those that take requests, so that a queue here is compared with others by what
            works it off; None before any of them is known.
        ready: one of them takes requests.
    """

    models: tuple[ModelInfo, ...] = ()
    brokers: tuple[str, ...] = ()
    slots: int = 1
    speed: float | None = None
    ready: bool = False


class Summarizer:
    """Makes the summary of a broker again and again.

    Attributes:
        summary: the last one.
        left_out: models and brokers that did not fit into it.
    """

    def __init__(self, id: str, registry: Registry) -> None:
        """Have one of no workers; `id` is the broker's."""
        self.left_out = 0
        self._id = id
        self._registry = registry
        self._readies: list[Ready] = []
        self.summary = Summary(brokers=(id,))

    def differs(self) -> bool:
        """Make the summary anew; tell whether it is another one."""
        before = self.summary
        workers = list(self._registry)
        usable = [worker for worker in workers if _usable(worker)]
        # One that takes nothing at the moment just has room for what it holds: without that its requests would seem
        # to fill the others' slots, since the load has them, too.
        spent = sum(min(worker.load, worker.slots) for worker in workers if not _usable(worker))
        after = replace(
            before,
            slots=max(1, min(sum(worker.slots for worker in usable) + spent, MAX_SLOTS)),
            speed=_speed(usable, before.speed),
            ready=any(worker.takes_requests for worker in workers),
        )
        readies = [worker.ready for worker in workers]
        # Most of the time these are the very same objects: a thousand comparisons, and not ten thousand models.
        if readies != self._readies:
            self._readies = readies
            after = self._catalogued(after)
        self.summary = after
        return after != before

    def _catalogued(self, summary: Summary) -> Summary:
        models = _models(self._readies)
        brokers = (self._id, *sorted({broker for ready in self._readies for broker in ready.brokers}))
        self.left_out = max(0, len(models) - MAX_MODELS) + max(0, len(brokers) - MAX_BROKERS)
        return replace(summary, models=models[:MAX_MODELS], brokers=brokers[:MAX_BROKERS])


def _models(readies: Iterable[Ready]) -> tuple[ModelInfo, ...]:
    found: dict[str, ModelInfo] = {}
    for ready in readies:
        for info in ready.models:
            known = found.get(info.name)
            if known is None:
                found[info.name] = info
            elif known != info:
                # A prompt that fits into the smallest context fits wherever it goes; 0 is no bound.
                contexts = [tokens for tokens in (known.context_tokens, info.context_tokens) if tokens]
                found[info.name] = replace(
                    known,
                    context_tokens=min(contexts, default=0),
                    chat=known.chat and info.chat,
                    resumes=known.resumes or info.resumes,
                    generates=known.generates and info.generates,
                    embeds=known.embeds and info.embeds,
                    images=known.images and info.images,
                )
    return tuple(found[name] for name in sorted(found))


def _usable(worker: WorkerSession) -> bool:
    return worker.takes_requests and worker.breaker.state is not State.OPEN


def _speed(workers: Sequence[WorkerSession], told: float | None) -> float | None:
    known = [worker.ready.speed or worker.speed_set or worker.measured.measured for worker in workers]
    if not any(known):
        return None  # all are reckoned alike: that says nothing in comparison with others
    total = min(FASTEST_TOKENS_PER_S, sum(worker.speed for worker in workers))
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
    # Workers say what they like, and the sum must still be a message.
    return Load(
        state=state,
        running=min(MAX_COUNT, sum(worker.load for worker in workers)),
        waiting=min(MAX_COUNT, waiting),
        held=held,
        steps=min(MAX_COUNT, sum(report.steps for report in reports)),
        tokens_per_s=min(_MAX_TOKENS_PER_S, sum(report.tokens_per_s for report in reports)),
        kv_use=_mean([report.kv_use for report in reports]),
        steps_per_s=min(_MAX_TOKENS_PER_S, sum(report.steps_per_s for report in reports)),
        prefill_use=_mean([report.prefill_use for report in reports]),
        decode_use=_mean([report.decode_use for report in reports]),
        prefix_hits=_mean([report.prefix_hits for report in reports]),
        memory_used_bytes=min(MAX_COUNT, sum(report.memory_used_bytes for report in reports)),
        memory_bytes=min(MAX_COUNT, sum(report.memory_bytes for report in reports)),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
