"""What operators change while the broker runs: who gets requests, how they are chosen, who stays.

What is said of a worker holds for its name: the registry remembers it when the worker is gone, and lets whoever comes
back under that name have it. It lasts as long as this broker runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..protocol.errors import BadRequestError
from ..protocol.messages import WorkerState
from .errands import Errand
from .registry import WorkerSession

if TYPE_CHECKING:
    from .core import BrokerCore

#: How long a refresh waits for what its probes find. A send to a connection that is gone fails at once, but that one
#: which breaks at this moment is gone takes a little to see.
REFRESH_S = 0.1


def knows(core: BrokerCore, name: str) -> bool:
    """Tell whether a name is that of a worker here, or of one that is gone and remembered."""
    registry = core.registry
    return name in registry.by_name or name in registry.held or name in registry.speeds


def refresh(core: BrokerCore, _now: float) -> Errand:
    """Say something to every worker: who is gone shows itself and is dropped."""
    before = list(core.registry)
    core.workers.greet()

    def finish(_answers: object) -> dict[str, Any]:
        by_peer = core.registry.by_peer
        dropped = [worker.name for worker in before if by_peer.get(worker.peer) is not worker]
        return {"workers": len(by_peer), "dropped": sorted(dropped)}

    return Errand(REFRESH_S, finish)


def remove(core: BrokerCore, now: float, worker: str) -> dict[str, Any]:
    """End a worker's session, and tell it not to come back; its requests go on elsewhere."""
    session = _session(core, worker)
    core.registry.held.discard(worker)
    core.registry.speeds.pop(worker, None)
    in_flight = len(session.in_flight)
    core.workers.remove(session, now)
    return {"worker": worker, "in_flight": in_flight}


def drain(
    core: BrokerCore, now: float, worker: str, grace_s: float | None = None, stay: bool = False
) -> dict[str, Any]:
    """Have a worker finish what it holds: and leave, or `stay` without new requests from this broker."""
    session = _session(core, worker)
    if stay and grace_s is not None:
        raise BadRequestError("a worker that is to stay takes no grace_s: what it holds is finished in any case")
    if stay:
        core.exchange.hold(session, True, now)
    else:
        core.workers.drain(session, grace_s)
    return {"worker": worker, "in_flight": len(session.in_flight)}


def undrain(core: BrokerCore, now: float, worker: str) -> dict[str, Any]:
    """Take back a drain of either kind."""
    held = worker in core.registry.held
    if held and worker not in core.registry.by_name:
        core.registry.held.discard(worker)
        return {"worker": worker, "held": True, "told": False}
    session = _session(core, worker)
    if held:
        core.exchange.hold(session, False, now)
    # Also to one that does not drain as far as is known here: its DRAINING may be on its way.
    told = session.state is WorkerState.DRAINING or not held
    if told:
        core.workers.undrain(session)
    return {"worker": worker, "held": held, "told": told}


def set_policy(core: BrokerCore, _now: float, policy: str) -> dict[str, Any]:
    """Choose workers by another policy from now on."""
    before = core.exchange.chooser.policy_name
    try:
        core.exchange.chooser.set_policy(policy)
    except ValueError as error:
        raise BadRequestError(str(error)) from error
    return {"policy": core.exchange.chooser.policy_name, "before": before}


def set_speed(core: BrokerCore, now: float, worker: str, speed: float | None = None) -> dict[str, Any]:
    """Reckon with this speed of a worker; without one, with what it tells or what is measured.

    One that is gone can only be taken back.
    """
    if speed is None and worker not in core.registry.by_name and core.registry.speeds.pop(worker, None) is not None:
        return {"worker": worker, "speed": None, "speed_set": None}
    session = _session(core, worker)
    core.exchange.set_speed(session, speed, now)
    return {"worker": worker, "speed": session.speed, "speed_set": session.speed_set}


def _session(core: BrokerCore, name: str) -> WorkerSession:
    session = core.registry.by_name.get(name)
    if session is None:
        here = ", ".join(sorted(core.registry.by_name)) or "none"
        raise BadRequestError(f"no worker {name!r} here; workers: {here}")
    return session
