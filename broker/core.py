"""BrokerCore: sessions with clients and workers, and who is told what when. No sockets, no clock, no threads.

The rules:

- A peer without a session may say HELLO or READY; whatever else it says is answered with DISCONNECT, and it registers
  anew. That repairs everything after a restart of the broker.
- Any message is a sign of life. A peer that is silent for the expiry is given up; but when this core itself was not
  called in time, nobody is given up for the time in which nobody listened.
- A session ends with all that hangs on it: a client's requests are cancelled, a worker's requests fail.

Requests themselves are in `exchange.py`; what this broker is to brokers above it, in `uplink.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from random import Random
from secrets import token_hex
from typing import Any

from ..protocol.errors import ErrorCode, ProtocolError
from ..protocol.links import Connected, LinkEvent, Lost, Malformed, Received, Refused
from ..protocol.liveness import Liveness, negotiate
from ..protocol.messages import (
    Accepted,
    Cancel,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    Drain,
    Draining,
    Error,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Message,
    Parked,
    Query,
    Ready,
    Reply,
    Request,
    Started,
    Welcome,
)
from .dispatch import find_policy
from .errands import MAX_OF_PARENT, Asker
from .events import (
    Action,
    BadClient,
    BadWorker,
    ClientGone,
    Event,
    FromClient,
    FromWorker,
    ToClient,
    ToWorker,
    WorkerGone,
)
from .exchange import Exchange
from .guests import Guest
from .management import Management
from .metrics import Counters, Pending
from .outbox import Outbox, clip
from .probe import CLIENT_DELAYS_S, WORKER_DELAYS_S, Probe
from .registry import ClientSession, Registry, Session, WorkerSession
from .settings import BrokerSettings
from .uplink import Uplink

#: The id of a broker: 16 hexadecimal digits are not drawn twice.
_ID_BYTES = 8
#: Sessions are looked at this often in one heartbeat interval: a beat is late by a quarter of it at most.
_TICKS_PER_HEARTBEAT = 4
#: Malformed messages are logged at most once in this time, with their number: a flood must not fill the disk.
_MALFORMED_LOG_S = 1.0


class BrokerCore:
    """The broker's state machine: events and the time in, actions out.

    Attributes:
        clients: sessions by the peer's routing id.
        registry: the workers.
        exchange: the requests.
        management: the queries.
        uplink: the brokers above this one.
        id: this broker's own, among brokers below brokers.
        counters: what has happened so far.
        pending: what peers have not taken at present, as the server writes it down.
        stopped: everything is said; the loop may end.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        software: str,
        now: float,
        random: Random | None = None,
        id: str | None = None,
        incarnation: int = 0,
    ) -> None:
        """Make a broker that knows nobody yet.

        Args:
            settings: how it behaves.
            software: its name and version.
            now: the time.
            random: serves the policies that draw lots.
            id: its own, which no other broker has; None to draw one.
            incarnation: grows with each start of a broker of this name: nanoseconds since the epoch. Brokers above it
                tell by it which of two is the later one.
        """
        self.settings = settings
        self.id = id or token_hex(_ID_BYTES)
        self.software = software
        self.started_at = now
        self.counters = Counters()
        self.pending = Pending()
        self.clients: dict[bytes, ClientSession] = {}
        self.registry = Registry(find_policy(settings.policy))
        self.stopped = False
        self._outbox = Outbox()
        random = random or Random()  # noqa: S311 (dispatch, not secrets)
        self.exchange = Exchange(
            self.registry,
            self._outbox,
            self.counters,
            settings,
            random,
            now,
            self.id,
        )
        self.management = Management(self, self._outbox, random)
        self._tick_s = settings.heartbeat_s / _TICKS_PER_HEARTBEAT
        self._next_tick = now + self._tick_s
        self._client_probe = Probe(CLIENT_DELAYS_S)
        self._worker_probe = Probe(WORKER_DELAYS_S)
        self._routes = 0
        self.uplink = Uplink(
            self.id,
            incarnation,
            software,
            settings,
            self.registry,
            self.exchange,
            self._outbox,
            new_route=self._new_route,
            query=self._asked_by_parent,
            asker_lost=self.management.asker_lost,
        )
        self._drain_until: float | None = None
        self._malformed_logged_at = now - _MALFORMED_LOG_S
        self._malformed_unlogged = 0

    # In and out.

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take an event; return what to do, in order."""
        self._outbox.now = now
        _EVENTS[type(event)](self, event, now)
        self.uplink.touched(now)
        return self._outbox.take()

    def route_chunks(self, peer: bytes, header: bytes, now: float) -> ClientSession | None:
        """Return the client that a CHUNKS message goes to: the hot path, one look-up.

        Args:
            peer: the worker's routing id.
            header: the header, known to be one of CHUNKS.
            now: the time.

        Returns:
            The client, where it is a Guest one of a broker above: it goes there with that one's header. None when
            the worker has no session or holds no request of such a client: then the message must go through `handle`,
            which knows what to do about it.
        """
        worker = self.registry.by_peer.get(peer)
        if worker is None:
            return None
        hold = worker.routes.get(header[8:])
        if hold is None or hold.client is None:
            return None
        worker.received += 1
        worker.liveness.heard_at = now
        client = hold.client
        client.sent += 1
        if type(client) is Guest:
            client.passed(client.parent)
        self.counters.chunk_messages += 1
        return client

    def tick(self, now: float) -> list[Action]:
        """Do what is due; call it whenever `next_deadline` is reached, and after each batch of events."""
        self._outbox.now = now
        self.exchange.expire(now)
        self.management.expire(now)
        if self._client_probe.due(now):
            self._say_to_clients()
        if self._worker_probe.due(now):
            self.greet_workers()
        if now >= self._next_tick:
            self._forgive_lag(now)
            self._next_tick = now + self._tick_s
            self._watch_clients(now)
            self._watch_workers(now)
        self.uplink.tick(now)
        self._advance_drain(now)
        actions = self._outbox.take()
        if actions:
            # Whatever has changed is told to somebody, or to the log.
            self.uplink.touched(now)
        return actions

    def next_deadline(self) -> float:
        """Return the time by which `tick` must be called."""
        others = (
            self.exchange.next_deadline(),
            self.management.next_deadline(),
            self._drain_until,
            self._client_probe.again_at,
            self._worker_probe.again_at,
        )
        return min([self._next_tick, self.uplink.next_deadline(), *(time for time in others if time is not None)])

    def probe_clients(self, now: float) -> list[Action]:
        """Say something to every client, since one connection of theirs broke: the one that is gone shows itself.

        At once and shortly after, since the news may overtake the end of the connection; then not before that
        again, since anybody may open and close connections.
        """
        self._outbox.now = now
        if self._client_probe.broken(now):
            self._say_to_clients()
        return self._outbox.take()

    def probe_workers(self, now: float) -> list[Action]:
        """Say something to every worker, since one connection of theirs broke; see `probe_clients`."""
        self._outbox.now = now
        if self._worker_probe.broken(now):
            self.greet_workers()
        return self._outbox.take()

    def _say_to_clients(self) -> None:
        for client in self.clients.values():
            self._outbox.heartbeat_client(client)

    def greet_workers(self) -> None:
        """Say something to every worker: the one that is gone shows itself. Call it from within a step."""
        for worker in self.registry:
            self._outbox.heartbeat_worker(worker)

    def drain(self, now: float, grace_s: float) -> list[Action]:
        """Accept nothing more, let what there is end within the grace time, then say goodbye and be `stopped`."""
        self._outbox.now = now
        if self._drain_until is None:
            self.exchange.draining = True
            tally = self.exchange.tally()
            self._outbox.log("broker_draining", grace_s=grace_s, waiting=tally["waiting"], running=tally["running"])
            for client in self.clients.values():
                self._outbox.to_client(client, Draining())
            self.uplink.withdraw(now)
        self._drain_until = now + grace_s
        self._advance_drain(now)
        return self._outbox.take()

    def drain_worker(self, worker: WorkerSession, grace_s: float | None) -> None:
        """Ask a worker to leave; call it from within `handle`. It says DRAINING when it does."""
        self._outbox.to_worker(worker, Drain(grace_s))
        self._outbox.log("worker_told_to_drain", worker=worker.name, in_flight=len(worker.in_flight))

    def undrain_worker(self, worker: WorkerSession) -> None:
        """Ask a worker not to leave; call it from within `handle`. It says READY when it stays."""
        self._outbox.to_worker(worker, Drain(undo=True))
        self._outbox.log("worker_told_to_stay", worker=worker.name)

    def remove_worker(self, worker: WorkerSession, now: float) -> None:
        """Send a worker away for good; call it from within `handle`."""
        self._disconnect_worker(worker, DisconnectCode.REMOVED, "an operator has removed it", now)

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        self.registry.validate()
        self.exchange.validate()
        self.management.validate()
        self.uplink.validate()
        clients = [*self.clients.values(), *self.uplink.guests()]
        mine = {record.key: record for client in clients for record in client.requests.values()}
        attended = {key: record for key, record in self.exchange.records.items() if record.client is not None}
        assert mine == attended, "a client's list of requests is wrong"
        for peer, client in self.clients.items():
            assert client.peer == peer
            assert all(record.client is client for record in client.requests.values())
            attempts = {record.key: record for alive in client.attempts.values() for record in alive}
            assert attempts == client.requests, "attempts are filed wrong"
            assert all(record.id == id for id, alive in client.attempts.items() for record in alive)
        for record in attended.values():
            assert record.client is not None
            assert self._is_here(record.client), "a request of a client that is gone"
        for worker in self.registry:
            for hold in worker.routes.values():
                assert hold.client is None or self._is_here(hold.client), "a way to a client that is gone"

    def _is_here(self, client: ClientSession) -> bool:
        if isinstance(client, Guest):
            return self.uplink.knows(client)
        return self.clients.get(client.peer) is client

    # Clients.

    def _from_client(self, event: FromClient, now: float) -> None:
        message = event.message
        client = self.clients.get(event.peer)
        if client is None:
            self._from_new_client(event.peer, message, now)
            return
        client.received += 1
        client.liveness.heard(now)
        if isinstance(message, Request):
            self.exchange.submit(client, message, now)
        elif isinstance(message, Credit):
            self.exchange.credit(client, message)
        elif isinstance(message, Cancel):
            self.exchange.cancel(client, message)
        elif isinstance(message, Heartbeat):
            if message.sent != client.received - 1:
                self._disconnect_client(client, DisconnectCode.LOST_MESSAGES, _lost(message, client))
        elif isinstance(message, Query):
            self.management.ask(self.management.client(client), message, now)
        elif isinstance(message, Goodbye):
            self._drop_client(client, "goodbye", level=logging.DEBUG)
        else:
            why = f"{message.command.name} is not allowed from a client in a session"
            self._disconnect_client(client, DisconnectCode.PROTOCOL, why)

    def _from_new_client(self, peer: bytes, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            heartbeat_s, expiry_s = self._intervals(message.heartbeat_s)
            client = ClientSession(
                peer=peer,
                liveness=Liveness(heartbeat_s, expiry_s, now, now),
                name=message.client,
                route=self._new_route(),
            )
            self.clients[peer] = client
            self._outbox.to_client(client, Welcome(self.settings.name, self.software, heartbeat_s, expiry_s))
            if self.exchange.draining:
                self._outbox.to_client(client, Draining())
            self._outbox.log("client_connected", level=logging.DEBUG, client=client.name)
        elif not isinstance(message, Goodbye):
            self._refuse(ToClient(peer, _unknown(message, "HELLO")))

    def _new_route(self) -> bytes:
        self._routes += 1
        return self._routes.to_bytes(16, "big")

    def _asked_by_parent(self, parent: str, query: Query, now: float) -> None:
        # Who may have orders relayed is the parent's to decide; it was our operator who dialled it.
        asker = Asker(parent, parent, lambda answer: self.uplink.answer(parent, answer), True, MAX_OF_PARENT)
        self.management.ask(asker, query, now)

    def _client_gone(self, event: ClientGone, _now: float) -> None:
        client = self.clients.get(event.peer)
        if client is not None:
            self.counters.clients_lost += 1
            if event.stalled:
                self.counters.peers_stalled += 1
                self._refuse(ToClient(client.peer, Disconnect(DisconnectCode.EXPIRED, clip(event.why))))
            self._drop_client(client, event.why, level=logging.WARNING if event.stalled else logging.INFO)

    def _bad_client(self, event: BadClient, now: float) -> None:
        self._malformed("client", event.error, now)
        client = self.clients.get(event.peer)
        if client is None:
            self._refuse(ToClient(event.peer, _protocol(event.error)))
        elif event.error.subject is not None:
            client.received += 1
            client.liveness.heard(now)
            answer = Error(event.error.subject, 0, ErrorCode.BAD_REQUEST.value, clip(event.error.message))
            self._outbox.to_client(client, answer)
        else:
            self._disconnect_client(client, DisconnectCode.PROTOCOL, event.error.message)

    def _disconnect_client(self, client: ClientSession, code: DisconnectCode, why: str) -> None:
        self._refuse(ToClient(client.peer, Disconnect(code, clip(why))))
        self.counters.clients_lost += 1
        self._drop_client(client, f"{code.value}: {why}", level=logging.WARNING)

    def _drop_client(self, client: ClientSession, why: str, *, level: int = logging.INFO) -> None:
        del self.clients[client.peer]
        self._outbox.log("client_left", level=level, client=client.name, why=why, requests=len(client.requests))
        self.exchange.client_lost(client)
        self.management.asker_lost(client)

    # Workers.

    def _from_worker(self, event: FromWorker, now: float) -> None:
        message = event.message
        worker = self.registry.by_peer.get(event.peer)
        if worker is None:
            self._from_new_worker(event.peer, message, now)
            return
        worker.received += 1
        worker.liveness.heard(now)
        if isinstance(message, Heartbeat):
            self._worker_heartbeat(worker, message, now)
        elif isinstance(message, (Reply, Error)) and self.management.answered(worker, message):
            pass
        elif isinstance(message, (Finish, Error)):
            self.exchange.answered(worker, message, now)
        elif isinstance(message, Parked):
            self.exchange.parked(worker, message, now)
        elif isinstance(message, Started) and worker.is_broker:
            self.exchange.started(worker, message)
        elif isinstance(message, Chunks):
            self.counters.chunk_messages_dropped += 1  # `route_chunks` would have found its client
        elif isinstance(message, Ready):
            self._worker_changed(worker, message, now)
        elif isinstance(message, Reply) and worker.is_broker:
            pass  # nobody waits for it any more
        elif isinstance(message, Draining):
            worker.draining = True
            self.registry.changed(worker, now)
            self._outbox.log("worker_draining", worker=worker.name, in_flight=len(worker.in_flight))
            self._worker_differs(worker, now)
        elif isinstance(message, Goodbye):
            self._drop_worker(worker, "it said goodbye", now)
        else:
            why = f"{message.command.name} is not allowed from a worker in a session"
            self._disconnect_worker(worker, DisconnectCode.PROTOCOL, why, now)

    def _from_new_worker(self, peer: bytes, message: Message, now: float) -> None:
        if isinstance(message, Ready):
            self._register(peer, message, now)
        elif not isinstance(message, Goodbye):
            self._refuse(ToWorker(peer, _unknown(message, "READY")))

    def _register(self, peer: bytes, ready: Ready, now: float) -> None:
        if self.id in ready.brokers:
            self._refuse(ToWorker(peer, self._loop(ready)))
            return
        known = self.registry.by_name.get(ready.worker)
        if known is not None:
            superseded = Disconnect(DisconnectCode.SUPERSEDED, f"a newer worker {ready.worker} has registered")
            if known.incarnation > ready.incarnation:
                self._refuse(ToWorker(peer, superseded))
                return
            if known.incarnation < ready.incarnation:
                self._refuse(ToWorker(known.peer, superseded))
            self.registry.remove(known)
        heartbeat_s, expiry_s = self._intervals(ready.heartbeat_s)
        worker = WorkerSession(
            peer=peer,
            liveness=Liveness(heartbeat_s, expiry_s, now, now),
            name=ready.worker,
            incarnation=ready.incarnation,
            ready=ready,
            reported=ready.load,
        )
        if known is not None:
            worker.measured = known.measured
        self.registry.add(worker, now)
        models = [info.name for info in ready.models]
        self.exchange.registered(worker)
        self._outbox.to_worker(worker, Accepted(self.settings.name, self.software, heartbeat_s, expiry_s))
        self._outbox.log(
            "worker_registered", worker=worker.name, engine=ready.engine, models=",".join(models)[:256],
            slots=ready.slots, speed=ready.speed, state=worker.state.value,
        )  # fmt: skip
        if known is not None:
            # After the new one is known: what waits for a model that both serve goes on waiting.
            self._worker_left(known, "it has registered anew", now)
        self._worker_differs(worker, now)

    def _worker_changed(self, worker: WorkerSession, ready: Ready, now: float) -> None:
        if (ready.worker, ready.incarnation) != (worker.name, worker.incarnation):
            why = "READY with another name or incarnation within a session"
            self._disconnect_worker(worker, DisconnectCode.PROTOCOL, why, now)
            return
        if self.id in ready.brokers:
            loop = self._loop(ready)
            self._disconnect_worker(worker, loop.code, loop.message, now)
            return
        before = [info.name for info in worker.ready.models]
        after = [info.name for info in ready.models]
        worker.draining = False  # who says READY stays
        self.registry.update(worker, ready, now)
        self.exchange.refusals.models_served(after)
        self._take_load(worker, ready.load, now)
        self.exchange.workers_changed([*before, *after], now)

    def _loop(self, ready: Ready) -> Disconnect:
        """Tell that a broker that registers here has this one below it."""
        doing = "start one of the brokers of the circle without the --uplink that closes it"
        self._outbox.log("uplink_loop", level=logging.WARNING, child=ready.worker, doing=doing)
        why = f"broker {self.settings.name} stands below {ready.worker}, and cannot stand above it: {doing}"
        return Disconnect(DisconnectCode.LOOP, clip(why))

    def _worker_heartbeat(self, worker: WorkerSession, beat: Heartbeat, now: float) -> None:
        if beat.sent != worker.received - 1:
            self._disconnect_worker(worker, DisconnectCode.LOST_MESSAGES, _lost(beat, worker), now)
            return
        if beat.load is not None:
            self._take_load(worker, beat.load, now)
            self._worker_differs(worker, now)

    def _take_load(self, worker: WorkerSession, load: Load, now: float) -> None:
        before = worker.state
        worker.report(load)
        self.registry.changed(worker, now)
        if worker.state is not before:
            self._outbox.log("worker_state", worker=worker.name, state=worker.state.value, before=before.value)

    def _worker_gone(self, event: WorkerGone, now: float) -> None:
        worker = self.registry.by_peer.get(event.peer)
        if worker is not None:
            self.counters.workers_lost += 1
            if event.stalled:
                self.counters.peers_stalled += 1
                self._refuse(ToWorker(worker.peer, Disconnect(DisconnectCode.EXPIRED, clip(event.why))))
            self._drop_worker(worker, event.why, now, level=logging.WARNING if event.stalled else logging.INFO)

    def _bad_worker(self, event: BadWorker, now: float) -> None:
        self._malformed("worker", event.error, now)
        worker = self.registry.by_peer.get(event.peer)
        if worker is None:
            self._refuse(ToWorker(event.peer, _protocol(event.error)))
        else:
            self._disconnect_worker(worker, DisconnectCode.PROTOCOL, event.error.message, now)

    def _disconnect_worker(self, worker: WorkerSession, code: DisconnectCode, why: str, now: float) -> None:
        self._refuse(ToWorker(worker.peer, Disconnect(code, clip(why))))
        self.counters.workers_lost += 1
        self._drop_worker(worker, f"{code.value}: {why}", now, level=logging.WARNING)

    def _drop_worker(self, worker: WorkerSession, why: str, now: float, *, level: int = logging.INFO) -> None:
        self.registry.remove(worker)
        self._worker_left(worker, why, now, level=level)

    def _worker_left(self, worker: WorkerSession, why: str, now: float, *, level: int = logging.INFO) -> None:
        self._outbox.log("worker_left", level=level, worker=worker.name, why=why, in_flight=len(worker.in_flight))
        self.exchange.worker_lost(worker, why, now)
        self.management.worker_lost(worker, why)

    def _worker_differs(self, worker: WorkerSession, now: float) -> None:
        self.exchange.workers_changed([info.name for info in worker.ready.models], now)

    # Brokers above this one.

    def _from_parent(self, event: LinkEvent, now: float) -> None:
        self.uplink.handle(event, now)

    # All.

    def _intervals(self, wish_s: float | None) -> tuple[float, float]:
        return negotiate(self.settings.heartbeat_s, self.settings.expiry_s, wish_s)

    def _refuse(self, action: ToClient | ToWorker) -> None:
        self.counters.disconnected += 1
        self._outbox.to_stranger(action)

    def _malformed(self, side: str, error: ProtocolError, now: float) -> None:
        self.counters.malformed += 1
        self._malformed_unlogged += 1
        if now < self._malformed_logged_at + _MALFORMED_LOG_S:
            return
        self._outbox.log(
            "malformed_message", level=logging.WARNING, side=side, count=self._malformed_unlogged, last=error.message
        )
        self._malformed_unlogged = 0
        self._malformed_logged_at = now

    def _forgive_lag(self, now: float) -> None:
        """Take the time by which this tick is late off everybody's silence: nobody listened then."""
        lag_s = now - self._next_tick
        if lag_s > self._tick_s:
            self._outbox.log("loop_late", level=logging.WARNING, s=lag_s)
            self.uplink.forgive(lag_s)
            for session in self._sessions():
                # At most up to now: who was heard since is not to be taken for alive in times to come.
                session.liveness.forgive(max(0.0, min(lag_s, now - session.liveness.heard_at)))

    def _sessions(self) -> list[Session]:
        return [*self.clients.values(), *self.registry]

    def _watch_clients(self, now: float) -> None:
        for client in list(self.clients.values()):
            if client.liveness.expired(now):
                why = f"silent for {now - client.liveness.heard_at:.3f} s"
                self._disconnect_client(client, DisconnectCode.EXPIRED, why)
            elif client.liveness.due(now):
                self._outbox.heartbeat_client(client)

    def _watch_workers(self, now: float) -> None:
        for worker in self.registry:
            if worker.liveness.expired(now):
                why = f"silent for {now - worker.liveness.heard_at:.3f} s"
                self._disconnect_worker(worker, DisconnectCode.EXPIRED, why, now)
            elif worker.liveness.due(now):
                self._outbox.heartbeat_worker(worker)

    def _advance_drain(self, now: float) -> None:
        if self._drain_until is None or self.stopped:
            return
        tally = self.exchange.tally()
        if (tally["waiting"] or tally["running"]) and now < self._drain_until:
            return
        self.exchange.give_up("the broker has shut down")
        for client in self.clients.values():
            self._outbox.to_client(client, Goodbye())
        for worker in self.registry:
            self._outbox.to_worker(worker, Goodbye())
        self.uplink.leave()
        self._outbox.log("broker_stopped", unfinished=tally["waiting"] + tally["running"])
        self.stopped = True


_EVENTS: dict[type[Event], Callable[[BrokerCore, Any, float], None]] = {
    FromClient: BrokerCore._from_client,
    FromWorker: BrokerCore._from_worker,
    BadClient: BrokerCore._bad_client,
    BadWorker: BrokerCore._bad_worker,
    ClientGone: BrokerCore._client_gone,
    WorkerGone: BrokerCore._worker_gone,
    **dict.fromkeys((Connected, Lost, Malformed, Received, Refused), BrokerCore._from_parent),
}

#: Who begins a session at the wrong socket, a HELLO at the workers' or a READY at the clients', is told of the other.
_STRAYS: dict[type[Message], str] = {
    Ready: "; this is a frontend, for clients: workers, and brokers with --uplink, belong at a broker's backend",
    Hello: "; this is a backend, for workers: clients belong at a broker's frontend",
}


def _unknown(message: Message, expected: str) -> Disconnect:
    why = f"no session with this peer: expected {expected}, got {message.command.name}"
    return Disconnect(DisconnectCode.UNKNOWN_PEER, why + _STRAYS.get(type(message), ""))


def _protocol(error: ProtocolError) -> Disconnect:
    return Disconnect(DisconnectCode.PROTOCOL, clip(error.message))


def _lost(beat: Heartbeat, session: Session) -> str:
    return f"{beat.sent} messages were sent, {session.received - 1} arrived"
