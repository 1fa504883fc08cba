"""Why a request is refused, or cannot wait any longer: what the broker knows of its models, past ones included."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ..protocol.errors import ErrorCode
from ..protocol.messages import Error
from .outbox import clip
from .registry import Registry
from .requests import RequestRecord

#: Models that nobody serves any more are remembered up to this number: workers choose their names.
_MAX_SEEN_MODELS = 16_384


class Refusals:
    """The broker's own ERRORs about models."""

    def __init__(self, registry: Registry, now: float, expiry_s: float) -> None:
        """Know no models yet."""
        self._registry = registry
        self._started_at = now
        #: Until then workers may still be on their way back to a broker that has been started again.
        self._young_until = now + expiry_s
        #: Models that were served once: asking for one is no mistake of the client's. The latest come last.
        self._seen_models: OrderedDict[str, None] = OrderedDict()

    def models_served(self, models: Iterable[str]) -> None:
        """Note that a worker has registered for these models."""
        for model in models:
            self._seen_models[model] = None
            self._seen_models.move_to_end(model)
        while len(self._seen_models) > _MAX_SEEN_MODELS:
            self._seen_models.popitem(last=False)

    def unserved(self, record: RequestRecord) -> Error:
        """Return the ERROR for a request whose model has no worker."""
        model, here = record.model, ", ".join(self._registry.models()) or "none"
        if model in self._seen_models:
            message = f"no worker serves {model!r} at the moment; models here: {here}"
            return error(record, ErrorCode.NO_WORKER, message, retryable=True)
        if record.arrived_at < self._young_until:
            age_s = record.arrived_at - self._started_at
            message = f"no worker serves {model!r} yet; this broker started {age_s:.1f} s ago; models here: {here}"
            return error(record, ErrorCode.NO_WORKER, message, retryable=True)
        message = f"no worker serves {model!r}; models here: {here}"
        return error(record, ErrorCode.MODEL_NOT_FOUND, message, retryable=False)

    def cannot_resume(self, record: RequestRecord, now: float) -> Error:
        """Return the ERROR for a request that no worker of its model can go on with."""
        if now < self._young_until:
            message = f"no worker that can go on with {record.model!r} is back yet; this broker has just started"
            return error(record, ErrorCode.NO_WORKER, message, retryable=True)
        message = (
            f"the stream broke after {record.prior_tokens} tokens, and no worker of {record.model!r} can go on with "
            "what another one has begun"
        )
        return error(record, ErrorCode.CANNOT_RESUME, message, retryable=False)


def error(record: RequestRecord, code: ErrorCode, message: str, *, retryable: bool) -> Error:
    """Return an ERROR of the broker's about a request."""
    # Names in it are a peer's choice; a longer message would be malformed, and end the client's session.
    worker = record.worker.name if record.worker else ""
    return Error(record.id, record.attempt, code.value, clip(message), retryable, worker=worker)
