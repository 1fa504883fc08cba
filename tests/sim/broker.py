"""A broker process on the fake network: the real core, with the I/O of broker/server.py simulated.

To the brokers above it, it is a peer like a worker.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from tokenmq.broker import events
from tokenmq.broker.core import BrokerCore
from tokenmq.broker.guests import Guest
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol import links
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import Chunks, Message

from .engine import MODEL
from .net import Link, Net
from .peer import Peer


class SimBroker(Peer):
    """A broker process. A restart makes a new core that knows nobody.

    Attributes:
        name: its endpoint.
        peers: by routing id: the connection, the peer, and whether it is a client.
        starts: how often it was started.
        incarnation: which of all starts the present one is.
        was_blind: at some time it was older than its expiry and had seen no worker of the model yet.
    """

    def __init__(self, net: Net, brokers: dict[str, SimBroker], name: str, settings: BrokerSettings) -> None:
        super().__init__(net, brokers)
        self.name = name
        self.settings = settings
        self.starts = 0
        self.was_blind = False
        self._seeing = False
        self._ids = count(1)
        self.peers: dict[bytes, tuple[Link, Any, bool]] = {}
        self._restart_s = 0.0
        self.start()

    def start(self) -> None:
        if self.starts and self.alive:
            return
        self.starts += 1
        self.incarnation = next(self.net.incarnations)
        self.core = BrokerCore(
            self.settings, software="sim", now=self.clock.now, random=self.random, incarnation=self.incarnation,
            id=f"{self.random.getrandbits(64):016x}",
        )  # fmt: skip
        self.alive = True
        self._seeing = False
        self._paused_at = None
        self._tick_at = math.inf
        self._backlog.clear()
        self.settle()

    def kill(self, restart_s: float) -> None:
        """SIGKILL: every connection breaks. It is started again after so many seconds."""
        if self.alive:
            self._end()
            self.clock.after(restart_s, self.start)

    def drain(self, grace_s: float, restart_s: float) -> None:
        """SIGTERM: it says goodbye when all that it has is done, or after the grace time; and is started again."""
        self._restart_s = restart_s
        self.do(self._drain, grace_s)

    def connect(self, peer: Any, *, client: bool) -> Link:
        link = Link(self.net, self.name, next(self._ids).to_bytes(5, "big"))
        self.peers[link.routing_id] = (link, peer, client)
        return link

    def all_links(self) -> list[Link]:
        """Return all its connections, also those with brokers above it."""
        return [*(link for link, _, _ in self.peers.values()), *self.links.values()]

    @property
    def children(self) -> list[SimBroker]:
        """The brokers directly below it, whether they run or not."""
        return [broker for broker in self.brokers.values() if self.name in broker.settings.uplinks]

    def has_left(self) -> bool:
        """Tell whether a broker above has sent it away: nothing but a new start brings it back there."""
        return not all(session.wanted for session in self.core.uplink._membership.sessions.values())

    def cut(self, link: Link) -> None:
        """Break one connection: both ends notice, the broker through its monitor."""
        entry = self.peers.pop(link.routing_id, None)
        if entry is not None:
            self._break(link, entry[1])
            self._monitor(entry[2])

    def closed_by_peer(self, link: Link) -> None:
        """The peer has closed its socket; what it sent before has arrived."""
        link.broken = True
        entry = self.peers.pop(link.routing_id, None)
        if entry is not None:
            self._monitor(entry[2])

    def from_client(self, link: Link, message: Message | ProtocolError) -> None:
        if link.routing_id not in self.peers:
            return  # it was sent to a process that is no more
        if isinstance(message, ProtocolError):
            self.do(self._handle, events.BadClient(link.routing_id, message))
        else:
            self.do(self._handle, events.FromClient(link.routing_id, message))

    def from_worker(self, link: Link, message: Message | ProtocolError) -> None:
        if link.routing_id not in self.peers:
            return
        if isinstance(message, ProtocolError):
            self.do(self._handle, events.BadWorker(link.routing_id, message))
        elif isinstance(message, Chunks):
            self.do(self._route, link.routing_id, message)
        else:
            self.do(self._handle, events.FromWorker(link.routing_id, message))

    def connected(self, endpoint: str) -> None:
        self._handle(links.Connected(endpoint))

    def disconnected(self, endpoint: str) -> None:
        self._handle(links.Lost(endpoint))

    def took(self, endpoint: str, message: Message | ProtocolError) -> None:
        kind = links.Malformed if isinstance(message, ProtocolError) else links.Received
        self._handle(kind(endpoint, message))

    def tick(self) -> None:
        self._perform(self.core.tick(self.clock.now))

    def settle(self) -> None:
        super().settle()
        if not self._seeing:
            self._seeing = self.core.registry.serves(MODEL)
            self.was_blind |= self.clock.now >= self.core.started_at + self.settings.expiry_s
        if self.core.stopped:
            self._end()
            self.clock.after(self._restart_s, self.start)

    def _drain(self, grace_s: float) -> None:
        self._perform(self.core.drain(self.clock.now, grace_s))

    def _end(self) -> None:
        self.alive = False
        for link, peer, _ in list(self.peers.values()):
            # What was sent before still arrives where the process ended by itself.
            if self.core.stopped:
                link.later(True, self._break, link, peer)
            else:
                self._break(link, peer)
        self.peers.clear()
        self.hang_up()

    def _break(self, link: Link, peer: Any) -> None:
        link.broken = True
        self.clock.after(self.random.uniform(0, 0.01), peer.lost, link)

    def _monitor(self, client: bool) -> None:
        self.clock.after(0.001, self.do, self._probe, client)

    def _probe(self, client: bool) -> None:
        probe = self.core.probe_clients if client else self.core.probe_workers
        self._perform(probe(self.clock.now))

    def _handle(self, event: events.Event) -> None:
        self._perform(self.core.handle(event, self.clock.now))

    def _route(self, worker: bytes, message: Chunks) -> None:
        """Pass chunks on as broker/server.py does: with one look-up."""
        now = self.clock.now
        target = self.core.route_chunks(worker, message.route, now)
        if target is None:
            self._perform(self.core.handle(events.StrayChunks(worker), now))
        elif isinstance(target, Guest):
            self.send(target.parent, replace(message, route=target.parent_route))
        elif (gone := self._send(events.ToClient(target.peer, message))) is not None:
            self._perform(self.core.handle(gone, now))

    def _perform(self, actions: Sequence[events.Action]) -> None:
        queue = deque(actions)  # as in broker/server.py: what follows from a peer that is gone goes behind the rest
        while queue:
            action = queue.popleft()
            if isinstance(action, links.Send):
                self.send(action.broker, action.message)
            elif isinstance(action, links.Open):
                self.open(action.broker)
            elif isinstance(action, links.Shut):
                self.shut(action.broker)
            elif not isinstance(action, Log) and (gone := self._send(action)) is not None:
                queue.extend(self.core.handle(gone, self.clock.now))

    def _send(self, action: events.ToClient | events.ToWorker) -> events.Event | None:
        entry = self.peers.get(action.peer)
        if entry is None or entry[0].full:
            gone = events.ClientGone if isinstance(action, events.ToClient) else events.WorkerGone
            return gone(action.peer, "its connection is gone, or it has stopped reading", stalled=entry is not None)
        link, peer, _ = entry
        link.carry(True, action.message, peer.received, link)
        return None
