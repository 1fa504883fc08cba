"""What workers say to the broker, and when their sessions begin and end.

What is known of them is in `registry.py`, what becomes of the requests they hold in `exchange.py`. Clients are none
of its business. A broker below this one is a worker like any other, and may say a little more.
"""

from __future__ import annotations

import logging
from typing import Any

from ..protocol.codec import PREFIX
from ..protocol.identity import Allowed, Identity, Role
from ..protocol.liveness import Liveness, negotiate
from ..protocol.messages import (
    Accepted,
    Command,
    DisconnectCode,
    Drain,
    Draining,
    Error,
    Finish,
    Goodbye,
    Heartbeat,
    Load,
    Message,
    Parked,
    Ready,
    Reply,
    Started,
)
from .accounts import Accounts, KeyedWorker
from .disconnects import REVOKED, Disconnects, foreign, lost, outside, silent, unknown
from .events import BadWorker, FromWorker, StrayChunks, WorkerGone
from .exchange import Exchange
from .management import Management
from .meters import Strays
from .metrics import Counters
from .outbox import Outbox
from .probe import WORKER_DELAYS_S, Probe
from .registry import READY_PER_S, Registry, WorkerSession
from .rota import Rota
from .settings import BrokerSettings

_READY_PREFIX = PREFIX[Command.READY]
#: Whose keys open a session at a backend: those of brokers below this one, too.
ROLES = (Role.WORKER,)


class Workers:
    """The sessions with all workers of the backend.

    Attributes:
        probe: when to look for the one whose connection broke.
    """

    def __init__(
        self,
        id: str,
        software: str,
        settings: BrokerSettings,
        registry: Registry,
        exchange: Exchange,
        management: Management,
        disconnects: Disconnects,
        outbox: Outbox,
        counters: Counters,
    ) -> None:
        """Have no session yet.

        Args:
            id: the broker's own, by which it knows that it would stand below itself.
            software: its name and version.
            settings: what it is called, its intervals.
            registry: holds the sessions.
            exchange: takes what they say of requests.
            management: takes what brokers below answer to its questions.
            disconnects: sends them away.
            outbox: takes what is to be done.
            counters: what has happened so far.
        """
        self.probe = Probe(WORKER_DELAYS_S)
        self._accounts = Accounts(KeyedWorker, settings.limits)
        self._id = id
        self._software = software
        self._settings = settings
        self._registry = registry
        self._rota = Rota(registry.by_peer)
        self._exchange = exchange
        self._management = management
        self._disconnects = disconnects
        self._outbox = outbox
        self._counters = counters

    # What happens at the backend.

    def received(self, event: FromWorker, now: float) -> None:
        """Take a message."""
        message = event.message
        worker = self._registry.by_peer.get(event.peer)
        if worker is None:
            self._from_new(event.peer, message, event.identity, now)
            return
        worker.received += 1
        worker.liveness.heard_at = now
        if not worker.account.message(now):
            self._cut(worker, f"more than {self._settings.limits.worker_messages_per_s} messages a second", now)
        elif isinstance(message, Finish):
            self._exchange.answered(worker, message, now, event.frames)
        elif isinstance(message, Heartbeat):
            self._heartbeat(worker, message, now)
        elif isinstance(message, (Reply, Error)) and self._management.answered(worker, message):
            pass
        elif isinstance(message, Error):
            self._exchange.answered(worker, message, now, event.frames)
        elif isinstance(message, Parked):
            self._exchange.parked(worker, message, now)
        elif isinstance(message, Started) and worker.is_broker:
            self._exchange.started(worker, message)
        elif isinstance(message, Ready):
            self._ready_again(worker, message, now)
        elif isinstance(message, Reply) and worker.is_broker:
            pass  # nobody waits for it any more
        elif isinstance(message, Draining):
            worker.draining = True
            self._registry.changed(worker, now)
            self._outbox.log("worker_draining", worker=worker.name, in_flight=len(worker.in_flight))
            self._differs(worker, now)
        elif isinstance(message, Goodbye):
            self._drop(worker, "it said goodbye", now)
        else:
            why = f"{message.command.name} is not allowed from a worker in a session"
            self._disconnect(worker, DisconnectCode.PROTOCOL, why, now)

    def stray(self, event: StrayChunks, now: float) -> None:
        """Drop and count CHUNKS that `BrokerCore.route_chunks` has found no client for; some are honest."""
        worker = self._registry.by_peer.get(event.peer)
        if worker is None:
            why = "no session with this peer: expected READY, got CHUNKS"
            self._disconnects.worker(event.peer, DisconnectCode.UNKNOWN_PEER, why)
            return
        worker.received += 1
        worker.liveness.heard_at = now
        self._counters.chunk_messages_dropped += 1
        # Of a client that is gone some are on their way still, until the worker has heard of it.
        if event.route not in worker.routes and not worker.strays.take(now):
            limit = self._settings.limits.stray_chunks_per_s
            self._cut(
                worker, f"more than {limit} messages a second with tokens of requests that it does not hold", now
            )

    def too_much(self, peer: bytes, message: bytes, now: float) -> str:
        """Return why a longer message of a peer is not to be read at all, "" where it may be.

        A READY of a thousand models takes milliseconds, and an honest worker has few occasions for one.
        """
        worker = self._registry.by_peer.get(peer)
        if worker is None or not message.startswith(_READY_PREFIX) or not worker.readies.take(1, now):
            return ""
        return f"more than {READY_PER_S} READY of many models a second"

    def _cut(self, worker: WorkerSession, why: str, now: float) -> None:
        """End the session of a worker that keeps on, and let its key not in for a while."""
        self._counters.cut_off += 1
        self._accounts.punish(worker.identity, now)
        self._disconnect(worker, DisconnectCode.RATE_LIMITED, why, now)

    def malformed(self, event: BadWorker, now: float) -> None:
        """Take what is no message."""
        error = event.error
        self._disconnects.malformed("worker", error, now)
        worker = self._registry.by_peer.get(event.peer)
        if worker is None:
            self._disconnects.worker(event.peer, DisconnectCode.PROTOCOL, error.message)
        elif self._accounts.garbage(worker.identity, event.size_bytes, now):
            self._disconnect(worker, DisconnectCode.PROTOCOL, error.message, now)
        else:
            self._cut(worker, error.message, now)

    def gone(self, event: WorkerGone, now: float) -> None:
        """Take the news that nothing can be sent to a worker."""
        worker = self._registry.by_peer.get(event.peer)
        if worker is not None:
            self._counters.workers_lost += 1
            if event.stalled:
                self._counters.peers_stalled += 1
                self._disconnects.worker(worker.peer, DisconnectCode.EXPIRED, event.why)
            self._drop(worker, event.why, now, level=logging.WARNING if event.stalled else logging.INFO)

    # What the core calls.

    def watch(self, now: float, parts: int) -> None:
        """Give up who has been silent for too long, and say something to whom the broker was silent.

        Once in `parts` calls for each.
        """
        expired, due = self._rota.look(now, parts)
        for worker in due:
            self._outbox.heartbeat_worker(worker)
        for worker in expired:
            self._disconnect(worker, DisconnectCode.EXPIRED, silent(worker, now), now)

    def cut_off(self, allowed: Allowed, now: float) -> None:
        """End the sessions of those whose keys are not as they were any more."""
        self._accounts.keep(allowed)
        for worker in self._registry:
            if not allowed.has(worker.identity):
                self._disconnect(worker, DisconnectCode.FORBIDDEN, REVOKED, now)

    def greet(self) -> None:
        """Say something to every worker: the one that is gone shows itself."""
        for worker in self._registry:
            self._outbox.heartbeat_worker(worker)

    def drain(self, worker: WorkerSession, grace_s: float | None) -> None:
        """Ask a worker to leave. It says DRAINING when it does."""
        self._outbox.to_worker(worker, Drain(grace_s))
        self._outbox.log("worker_told_to_drain", worker=worker.name, in_flight=len(worker.in_flight))

    def undrain(self, worker: WorkerSession) -> None:
        """Ask a worker not to leave. It says READY when it stays."""
        self._outbox.to_worker(worker, Drain(undo=True))
        self._outbox.log("worker_told_to_stay", worker=worker.name)

    def remove(self, worker: WorkerSession, now: float) -> None:
        """Send a worker away for good."""
        self._disconnect(worker, DisconnectCode.REMOVED, "an operator has removed it", now)

    # How sessions begin.

    def _from_new(self, peer: bytes, message: Message, identity: Identity | None, now: float) -> None:
        if isinstance(message, Ready):
            if self._settings.curve and (identity is None or identity.role not in ROLES):
                self._disconnects.worker(peer, DisconnectCode.FORBIDDEN, foreign(identity, "a worker"))
                return
            if outside_s := self._accounts.outside_s(identity, now):
                self._disconnects.worker(peer, DisconnectCode.RATE_LIMITED, outside(outside_s))
                return
            if too_many := self._accounts.begin(identity, now, len(message.models)):
                self._disconnects.worker(peer, DisconnectCode.RATE_LIMITED, too_many)
                return
            self._register(peer, message, identity, now)
        elif not isinstance(message, Goodbye):
            self._disconnects.worker(peer, DisconnectCode.UNKNOWN_PEER, unknown(message, "READY"))

    def _register(self, peer: bytes, ready: Ready, identity: Identity | None, now: float) -> None:
        if self._id in ready.brokers:
            self._disconnects.worker(peer, DisconnectCode.LOOP, self._loop(ready))
            return
        known = self._registry.by_name.get(ready.worker)
        if known is not None:
            if known.identity != identity:
                # Else whoever holds some worker's key could take the place, and the requests, of any other.
                taken = f"the name {ready.worker} belongs to a worker with another key: choose another --name"
                self._disconnects.worker(peer, DisconnectCode.FORBIDDEN, taken)
                return
            superseded = f"a newer worker {ready.worker} has registered"
            if known.incarnation > ready.incarnation:
                self._disconnects.worker(peer, DisconnectCode.SUPERSEDED, superseded)
                return
            if known.incarnation < ready.incarnation:
                self._disconnects.worker(known.peer, DisconnectCode.SUPERSEDED, superseded)
            self._registry.remove(known)
        settings = self._settings
        heartbeat_s, expiry_s = negotiate(settings.heartbeat_s, settings.expiry_s, ready.heartbeat_s)
        worker = WorkerSession(
            peer=peer,
            liveness=Liveness(heartbeat_s, expiry_s, now, now),
            identity=identity,
            name=ready.worker,
            account=self._accounts.of(identity),
            strays=Strays(settings.limits),
            incarnation=ready.incarnation,
            ready=ready,
            reported=ready.load,
        )
        if known is not None:
            worker.measured = known.measured
        worker.account.sessions += 1
        self._registry.add(worker, now)
        models = [info.name for info in ready.models]
        self._exchange.registered(worker)
        self._outbox.to_worker(worker, Accepted(settings.name, self._software, heartbeat_s, expiry_s))
        key: dict[str, Any] = {"key": identity.name} if identity else {}
        self._outbox.log(
            "worker_registered", worker=worker.name, engine=ready.engine, models=",".join(models)[:256],
            slots=ready.slots, speed=ready.speed, state=worker.state.value, **key,
        )  # fmt: skip
        if known is not None:
            # After the new one is known: what waits for a model that both serve goes on waiting.
            self._left(known, "it has registered anew", now)
        self._differs(worker, now)

    def _loop(self, ready: Ready) -> str:
        """Tell that a broker that registers here has this one below it."""
        doing = "start one of the brokers of the circle without the --uplink that closes it"
        self._outbox.log("uplink_loop", level=logging.WARNING, child=ready.worker, doing=doing)
        return f"broker {self._settings.name} stands below {ready.worker}, and cannot stand above it: {doing}"

    # What changes within a session.

    def _ready_again(self, worker: WorkerSession, ready: Ready, now: float) -> None:
        if (ready.worker, ready.incarnation) != (worker.name, worker.incarnation):
            why = "READY with another name or incarnation within a session"
            self._disconnect(worker, DisconnectCode.PROTOCOL, why, now)
            return
        if self._id in ready.brokers:
            self._disconnect(worker, DisconnectCode.LOOP, self._loop(ready), now)
            return
        before = [info.name for info in worker.ready.models]
        after = [info.name for info in ready.models]
        worker.draining = False  # who says READY stays
        self._registry.update(worker, ready, now)
        self._exchange.refusals.models_served(after)
        self._take_load(worker, ready.load, now)
        self._exchange.workers_changed([*before, *after], now)

    def _heartbeat(self, worker: WorkerSession, beat: Heartbeat, now: float) -> None:
        if beat.sent != worker.received - 1:
            self._disconnect(worker, DisconnectCode.LOST_MESSAGES, lost(beat, worker), now)
            return
        if beat.load is None:
            return
        if beat.load == worker.reported:  # as an idle worker's
            self._registry.changed(worker, now)  # what was measured of it has become older
            return
        self._take_load(worker, beat.load, now)
        self._differs(worker, now)

    def _take_load(self, worker: WorkerSession, load: Load, now: float) -> None:
        before = worker.state
        worker.report(load)
        self._registry.changed(worker, now)
        if worker.state is not before:
            self._outbox.log("worker_state", worker=worker.name, state=worker.state.value, before=before.value)

    def _differs(self, worker: WorkerSession, now: float) -> None:
        self._exchange.workers_changed([info.name for info in worker.ready.models], now)

    # How sessions end.

    def _disconnect(self, worker: WorkerSession, code: DisconnectCode, why: str, now: float) -> None:
        self._disconnects.worker(worker.peer, code, why)
        self._counters.workers_lost += 1
        self._drop(worker, f"{code.value}: {why}", now, level=logging.WARNING)

    def _drop(self, worker: WorkerSession, why: str, now: float, *, level: int = logging.INFO) -> None:
        self._registry.remove(worker)
        self._left(worker, why, now, level=level)

    def _left(self, worker: WorkerSession, why: str, now: float, *, level: int = logging.INFO) -> None:
        worker.account.sessions -= 1
        self._outbox.log("worker_left", level=level, worker=worker.name, why=why, in_flight=len(worker.in_flight))
        self._exchange.worker_lost(worker, why, now)
        self._management.worker_lost(worker, why)
