"""The answers to management queries: plain data, made from the registry and the exchange.

One query does something, too: `drain` asks a worker to leave.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..protocol.errors import BadRequestError, ProtocolError
from ..protocol.messages import ModelInfo, WorkerState
from ..protocol.schema import Check, seconds, text

if TYPE_CHECKING:
    from .core import BrokerCore


def answer(core: BrokerCore, method: str, arguments: Mapping[str, Any], now: float) -> Any:
    """Return the answer to a query.

    Raises:
        BadRequestError: there is no such method, or it does not take these arguments.
    """
    found = _METHODS.get(method)
    if found is None:
        raise BadRequestError(f"unknown query {method!r}; known are {', '.join(sorted(_METHODS))}")
    return found.answer(core, now, **_checked(method, found, arguments))


def _checked(method: str, found: _Method, arguments: Mapping[str, Any]) -> dict[str, Any]:
    known = {**found.required, **found.optional}
    if unknown := sorted(arguments.keys() - known.keys()):
        takes = f"only {', '.join(known)}" if known else "no arguments"
        raise BadRequestError(f"query {method!r} takes {takes}, got {', '.join(unknown)[:256]}")
    if missing := [name for name in found.required if arguments.get(name) is None]:
        raise BadRequestError(f"query {method!r} needs {', '.join(missing)}")
    try:
        # As everywhere on the wire, nil means that an optional one was left out.
        return {name: known[name](value, name) for name, value in arguments.items() if value is not None}
    except ProtocolError as error:
        raise BadRequestError(f"query {method!r}: {error.message}") from error


def _models(core: BrokerCore, _now: float) -> list[dict[str, Any]]:
    # One pass over the workers: a worker may serve a thousand models, and anybody may ask.
    running = Counter(record.model for worker in core.registry for record in worker.in_flight.values())
    infos: dict[str, list[ModelInfo]] = {}
    for worker in core.registry:
        for info in worker.ready.models:
            infos.setdefault(info.name, []).append(info)
    return [_model(core, name, infos[name], running[name]) for name in core.registry.models()]


def _model(core: BrokerCore, name: str, infos: Sequence[ModelInfo], running: int) -> dict[str, Any]:
    workers = list(core.registry.serving(name))
    return {
        "name": name,
        "workers": len(workers),
        "ready": sum(worker.state is WorkerState.READY for worker in workers),
        "slots": sum(worker.ready.slots for worker in workers),
        "running": running,
        "waiting": core.exchange.waiting(name),
        # Workers may differ: a request that fits the smallest fits all. 0 is no bound.
        "context_tokens": min((info.context_tokens for info in infos if info.context_tokens), default=0),
        "chat": all(info.chat for info in infos),
    }


def _workers(core: BrokerCore, now: float) -> list[dict[str, Any]]:
    return [
        {
            "name": worker.name,
            "state": worker.state.value,
            "engine": worker.ready.engine,
            "models": [info.name for info in worker.ready.models],
            "slots": worker.ready.slots,
            "in_flight": len(worker.in_flight),
            "parked": worker.parked,
            "running": worker.reported.running,
            "waiting": worker.reported.waiting,
            "speed": worker.speed,
            "tokens_per_s": worker.reported.tokens_per_s,
            "kv_use": worker.reported.kv_use,
            "steps": worker.reported.steps,
            "step_age_s": worker.reported.step_age_s,
            "heard_s": max(0.0, now - worker.liveness.heard_at),
            "incarnation": worker.incarnation,
            "software": worker.ready.software,
        }
        for worker in sorted(core.registry, key=lambda worker: worker.name)
    ]


def _status(core: BrokerCore, now: float) -> dict[str, Any]:
    return {
        "broker": core.settings.name,
        "software": core.software,
        "uptime_s": now - core.started_at,
        "draining": core.exchange.draining,
        "policy": core.settings.policy,
        "clients": len(core.clients),
        "workers": len(core.registry),
        "models": core.registry.models(),
        "slots": sum(worker.ready.slots for worker in core.registry),
        "pending": dataclasses.asdict(core.pending),
        "requests": core.exchange.tally(),
        "counters": dataclasses.asdict(core.counters),
    }


def _drain(core: BrokerCore, _now: float, worker: str, grace_s: float | None = None) -> dict[str, Any]:
    session = core.registry.by_name.get(worker)
    if session is None:
        here = ", ".join(sorted(core.registry.by_name)) or "none"
        raise BadRequestError(f"no worker {worker!r} here; workers: {here}")
    core.drain_worker(session, grace_s)
    return {"worker": worker, "in_flight": len(session.in_flight)}


@dataclass(frozen=True, slots=True)
class _Method:
    """How to answer a query, and the checks of the arguments that it takes."""

    answer: Callable[..., Any]
    required: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)


_METHODS = {
    "models": _Method(_models),
    "workers": _Method(_workers),
    "status": _Method(_status),
    "drain": _Method(_drain, {"worker": text(empty=False)}, {"grace_s": seconds}),
}
