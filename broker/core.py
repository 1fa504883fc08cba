"""BrokerCore: the broker as a whole, what comes in and what goes out. No sockets, no clock, no threads.

The rules:

- A peer without a session may say HELLO or READY; whatever else it says is answered with DISCONNECT, and it registers
  anew. That repairs everything after a restart of the broker.
- Any message is a sign of life. A peer that is silent for the expiry is given up; but when this core itself was not
  called in time, nobody is given up for the time in which nobody listened.
- A session ends with all that hangs on it: a client's requests are cancelled, a worker's requests fail.

What clients say is in `clients.py`, what workers say in `workers.py`, what becomes of requests in `exchange.py`; what
this broker is to brokers above it, in `uplink.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from random import Random
from secrets import token_hex
from typing import Any

from ..protocol.identity import Allowed
from ..protocol.links import Connected, Lost, Malformed, Received, Refused
from ..protocol.messages import Draining, Goodbye, Query
from .clients import Clients
from .disconnects import Disconnects
from .dispatch import find_policy
from .errands import MAX_OF_PARENT, Asker
from .events import Action, BadClient, BadWorker, ClientGone, Event, FromClient, FromWorker, StrayChunks, WorkerGone
from .exchange import Exchange
from .guests import Guest
from .management import Management
from .metrics import Counters, Pending
from .outbox import Outbox
from .registry import ClientSession, Registry, Session
from .rota import parts_of
from .settings import BrokerSettings
from .uplink import Uplink
from .workers import Workers

#: The id of a broker: 16 hexadecimal digits are not drawn twice.
_ID_BYTES = 8
#: Sessions are looked at this often in one heartbeat interval: a beat is late by a quarter of it at most.
_TICKS_PER_HEARTBEAT = 4
#: Fewer of them wake the loop so seldom that nothing is gained by hearing them together.
_MANY_WORKERS = 50


class BrokerCore:
    """The broker's state machine: events and the time in, actions out.

    Attributes:
        clients: sessions by the peer's routing id.
        workers: what workers say, and what they are told.
        registry: the sessions with workers.
        exchange: the requests.
        management: the queries.
        uplink: the brokers above this one.
        id: this broker's own, among brokers below brokers.
        counters: what has happened so far.
        pending: what peers have not taken at present, as the server writes it down.
        connections: returns figures of the connections of each side, as the server counts them.
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
        self.connections: Callable[[], dict[str, dict[str, int]]] = dict
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
        disconnects = Disconnects(self._outbox, self.counters, now)
        self._frontend = Clients(
            software,
            settings,
            self.exchange,
            self.management,
            disconnects,
            self._outbox,
            self.counters,
        )
        self.clients = self._frontend.by_peer
        self.workers = Workers(
            self.id,
            software,
            settings,
            self.registry,
            self.exchange,
            self.management,
            disconnects,
            self._outbox,
            self.counters,
        )
        self._tick_s = settings.heartbeat_s / _TICKS_PER_HEARTBEAT
        self._next_tick = now + self._tick_s
        self.uplink = Uplink(
            self.id,
            incarnation,
            software,
            settings,
            self.registry,
            self.exchange,
            self._outbox,
            new_route=self._frontend.new_route,
            query=self._asked_by_parent,
            asker_lost=self.management.asker_lost,
        )
        self._drain_until: float | None = None
        self._receivers: dict[type[Event], Callable[[Any, float], None]] = {
            FromClient: self._frontend.received,
            BadClient: self._frontend.malformed,
            ClientGone: self._frontend.gone,
            FromWorker: self.workers.received,
            BadWorker: self.workers.malformed,
            StrayChunks: self.workers.stray,
            WorkerGone: self.workers.gone,
            **dict.fromkeys((Connected, Lost, Malformed, Received, Refused), self.uplink.handle),
        }

    # In and out.

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take an event; return what to do, in order: nothing more once all have been told goodbye."""
        if self.stopped:
            return []
        self._outbox.now = now
        self._receivers[type(event)](event, now)
        self.uplink.touched(now)
        return self._outbox.take()

    def allow(self, allowed: Allowed, now: float) -> list[Action]:
        """Take the keys that are on the list from now on; whose key is not any more is cut off."""
        self._outbox.now = now
        self._frontend.cut_off(allowed)
        self.workers.cut_off(allowed, now)
        self.uplink.touched(now)
        return self._outbox.take()

    @property
    def quiet(self) -> bool:
        """Whether nobody waits for what workers say: nothing but heartbeats is to come, and from many of them."""
        return (
            not self.exchange.records
            and len(self.registry) >= _MANY_WORKERS
            and self.management.next_deadline() is None
            and self._drain_until is None
        )

    def log_level(self, level: int) -> None:
        """Make no lines below this level of the logging module, since nobody would write them."""
        self._outbox.log_level = level

    def route_chunks(self, peer: bytes, route: bytes, now: float) -> ClientSession | None:
        """Return the client that a CHUNKS message goes to: the hot path, one look-up.

        Args:
            peer: the worker's routing id.
            route: the id in the message's header.
            now: the time.

        Returns:
            The client, where it is a Guest one of a broker above: it goes there with that one's header. None when
            the worker has no session or holds no request of such a client: then the message must go through `handle`,
            which knows what to do about it.
        """
        worker = self.registry.by_peer.get(peer)
        if worker is None:
            return None
        hold = worker.routes.get(route)
        if hold is None or hold.client is None:
            return None
        worker.received += 1
        worker.liveness.heard_at = now
        client = hold.client
        client.sent += 1
        client.liveness.spoke_at = now
        if type(client) is Guest:
            client.passed(client.parent)
        self.counters.chunk_messages += 1
        return client

    def tick(self, now: float) -> list[Action]:
        """Do what is due; call it whenever `next_deadline` is reached, and after each batch of events."""
        self._outbox.now = now
        tried = self.exchange.expire(now)
        self.management.expire(now)
        if self._frontend.probe.due(now):
            self._frontend.greet()
        if self.workers.probe.due(now):
            self.workers.greet()
        if now >= self._next_tick:
            self._forgive_lag(now)
            parts = parts_of(len(self.clients) + len(self.registry))
            self._next_tick = now + self._tick_s / parts
            self._frontend.watch(now, parts)
            self.workers.watch(now, parts)
        self.uplink.tick(now)
        self._advance_drain(now)
        actions = self._outbox.take()
        if actions or tried:
            # Whatever else has changed is told to somebody.
            self.uplink.touched(now)
        return actions

    def next_deadline(self) -> float:
        """Return the time by which `tick` must be called."""
        others = (
            self.exchange.next_deadline(),
            self.management.next_deadline(),
            self._drain_until,
            self._frontend.probe.again_at,
            self.workers.probe.again_at,
        )
        return min([self._next_tick, self.uplink.next_deadline(), *(time for time in others if time is not None)])

    def probe_clients(self, now: float) -> list[Action]:
        """Say something to every client, since one connection of theirs broke: the one that is gone shows itself.

        At once and shortly after, since the news may overtake the end of the connection; then not before that
        again, since anybody may open and close connections.
        """
        self._outbox.now = now
        if self._frontend.probe.broken(now):
            self._frontend.greet()
        return self._outbox.take()

    def probe_workers(self, now: float) -> list[Action]:
        """Say something to every worker, since one connection of theirs broke; see `probe_clients`."""
        self._outbox.now = now
        if self.workers.probe.broken(now):
            self.workers.greet()
        return self._outbox.take()

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

    # All.

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        self.registry.validate()
        self._frontend.validate()
        self.exchange.validate()
        self.management.validate()
        self.uplink.validate()
        clients = [*self.clients.values(), *self.uplink.guests()]
        mine = {record.key: record for client in clients for record in client.requests.values()}
        attended = {key: record for key, record in self.exchange.records.items() if record.client is not None}
        assert mine == attended, "a client's list of requests is wrong"
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

    def _asked_by_parent(self, parent: str, query: Query, now: float) -> None:
        # Who may have orders relayed is the parent's to decide; it was our operator who dialled it.
        asker = Asker(parent, parent, lambda answer: self.uplink.answer(parent, answer), True, MAX_OF_PARENT)
        self.management.ask(asker, query, now)

    def excuse(self, sessions: Iterable[Session], seconds: float, now: float) -> None:
        """Take so many seconds, which are just over, off the silence of peers that were not listened to."""
        for session in sessions:
            # At most up to now: who was heard since is not to be taken for alive in times to come.
            session.liveness.forgive(max(0.0, min(seconds, now - session.liveness.heard_at)))

    def _forgive_lag(self, now: float) -> None:
        """Take the time by which this tick is late off everybody's silence: nobody listened then."""
        lag_s = now - self._next_tick
        if lag_s > self._tick_s:
            self._outbox.log("loop_late", level=logging.WARNING, s=lag_s)
            self.uplink.forgive(lag_s)
            self.excuse(self._sessions(), lag_s, now)

    def _sessions(self) -> list[Session]:
        return [*self.clients.values(), *self.registry]

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
