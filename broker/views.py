"""What management answers show, as plain data: pure functions of what the broker knows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from heapq import nsmallest
from typing import TYPE_CHECKING, Any

from ..protocol.messages import Decision, ModelInfo
from .ordering import MODEL_ORDERS
from .registry import WorkerSession

if TYPE_CHECKING:
    from .core import BrokerCore

#: Workers that are gone, with orders that still hold, in an answer about the status.
MAX_REMEMBERED = 100


def models(core: BrokerCore, order: str) -> list[dict[str, Any]]:
    """Return the models, by one of MODEL_ORDERS."""
    # One pass over the workers: a worker may serve a thousand models, and anybody may ask.
    running = Counter(record.model for worker in core.registry for record in worker.in_flight.values())
    infos: dict[str, list[ModelInfo]] = {}
    for worker in core.registry:
        for info in worker.ready.models:
            infos.setdefault(info.name, []).append(info)
    names = sorted(core.registry.models(), key=MODEL_ORDERS[order])
    return [_model(core, name, infos[name], running[name]) for name in names]


def _model(core: BrokerCore, name: str, infos: Sequence[ModelInfo], running: int) -> dict[str, Any]:
    workers = list(core.registry.serving(name))
    return {
        "name": name,
        "workers": len(workers),
        "ready": sum(worker.takes_requests for worker in workers),
        "slots": sum(worker.ready.slots for worker in workers),
        "running": running,
        "waiting": core.exchange.waiting(name),
        # Workers may differ: a request that fits the smallest fits all. 0 is no bound.
        "context_tokens": min((info.context_tokens for info in infos if info.context_tokens), default=0),
        "chat": all(info.chat for info in infos),
        "images": all(info.images for info in infos),
        "generates": all(info.generates for info in infos),
        "embeds": all(info.embeds for info in infos),
    }


def workers(core: BrokerCore, now: float) -> list[dict[str, Any]]:
    """Return the workers by name."""
    return [worker_row(worker, now) for worker in sorted(core.registry, key=lambda worker: worker.name)]


def worker_row(worker: WorkerSession, now: float) -> dict[str, Any]:
    """Return what is known of a worker."""
    load = worker.reported
    return {
        "name": worker.name,
        "state": worker.state.value,
        "held": worker.held,
        "breaker": worker.breaker.state.value,
        "broker": worker.is_broker,
        "engine": worker.ready.engine,
        "models": [info.name for info in worker.ready.models],
        "slots": worker.ready.slots,
        "in_flight": len(worker.in_flight),
        "parked": worker.parked,
        "outstanding_tokens": worker.outstanding_tokens,
        "running": load.running,
        "waiting": load.waiting,
        "speed": worker.speed,
        "speed_set": worker.speed_set,
        "tokens_per_s": load.tokens_per_s,
        "kv_use": load.kv_use,
        "steps": load.steps,
        "steps_per_s": load.steps_per_s,
        "step_age_s": load.step_age_s,
        "prefill_use": load.prefill_use,
        "decode_use": load.decode_use,
        "prefix_hits": load.prefix_hits,
        "memory_used_bytes": load.memory_used_bytes,
        "memory_bytes": load.memory_bytes,
        "heard_s": max(0.0, now - worker.liveness.heard_at),
        "incarnation": worker.incarnation,
        "software": worker.ready.software,
    }


def status(core: BrokerCore, now: float) -> dict[str, Any]:
    """Return the broker's own figures."""
    return {
        "broker": core.settings.name,
        "software": core.software,
        "uptime_s": now - core.started_at,
        "draining": core.exchange.draining,
        "policy": core.exchange.chooser.policy_name,
        "clients": len(core.clients),
        "workers": len(core.registry),
        "models": core.registry.models(),
        "slots": sum(worker.ready.slots for worker in core.registry),
        "remembered": _remembered(core),
        "waiting": core.exchange.rooms(now),
        "pending": dataclasses.asdict(core.pending),
        "connections": core.connections(),
        "requests": core.exchange.tally(),
        "counters": dataclasses.asdict(core.counters),
    }


def _remembered(core: BrokerCore) -> list[dict[str, Any]]:
    """Return what operators have ordered of workers that are gone: it holds for whoever comes back by their names."""
    held, speeds = core.registry.held, core.registry.speeds
    names = nsmallest(MAX_REMEMBERED, (held | speeds.keys()) - core.registry.by_name.keys())
    return [{"worker": name, "held": name in held, "speed_set": speeds.get(name)} for name in names]


def route(core: BrokerCore, model: str, decision: Decision | None) -> dict[str, Any]:
    """Return whom a policy would take for a model, and why."""
    return {
        "model": model,
        "worker": decision.worker if decision else None,
        "policy": core.exchange.chooser.policy_name,
        "candidates": decision.candidates if decision else 0,
        "considered": [dataclasses.asdict(each) for each in decision.considered] if decision else [],
        "waiting": core.exchange.waiting(model),
    }
