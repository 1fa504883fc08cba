"""A worker's own endpoint on the fake network, where clients take their chunks past the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import Message
from tokenmq.worker import events

from .net import Link

if TYPE_CHECKING:
    from .worker import SimWorker

_DOWN = True
#: ZMTP's own heartbeats: how often they are looked at, and after how many seconds in silence a connection is broken.
_PING_S = 1.0
_PATIENCE_S = 5.0


class Door:
    """The worker's ROUTER, and the connections of clients; to these it is what a broker is.

    Attributes:
        name: its endpoint.
        peers: connections and clients by routing id.
    """

    def __init__(self, worker: SimWorker, endpoint: str) -> None:
        self.name = endpoint
        self.peers: dict[bytes, tuple[Link, Any]] = {}
        self._worker = worker
        self._clock = worker.clock
        self._opened = 0

    @property
    def alive(self) -> bool:
        return self._worker.alive

    @property
    def reached_at(self) -> float:
        return self._worker.reached_at

    def connect(self, peer: Any, *, client: bool) -> Link:
        assert client
        self._opened += 1
        # Connections keep what is sent: what brokers' counts find out, nobody would here.
        link = Link(self._worker.net, self.name, self._opened.to_bytes(5, "big"), lossless=True)
        self.peers[link.routing_id] = (link, peer)
        self._ping(link, 0.0)
        return link

    def cut(self, link: Link) -> None:
        """Break one connection. The client is told; a ROUTER finds out when it has something to send."""
        entry = self.peers.pop(link.routing_id, None)
        if entry is not None:
            link.broken = True
            self._clock.after(self._worker.random.uniform(0, 0.01), entry[1].lost, link)

    def closed_by_peer(self, link: Link) -> None:
        """The client has closed its socket; what it sent before has arrived."""
        link.broken = True
        self.peers.pop(link.routing_id, None)

    def from_client(self, link: Link, message: Message | ProtocolError) -> None:
        if link.routing_id in self.peers:
            self._worker.take(events.Came(link.routing_id, message))

    def send(self, peer: bytes, message: Message) -> None:
        """Send by a connection, or tell that it does not take the message."""
        entry = self.peers.get(peer)
        if entry is None or entry[0].full:
            self._clock.after(0.0, self._worker.take, events.Deaf(peer, gone=entry is None))
            return
        link, client = entry
        link.carry(_DOWN, message, client.received, link)

    def close(self, *, killed: bool) -> None:
        """Break all connections; what a process that ends by itself has sent before still arrives."""
        for link, _ in list(self.peers.values()):
            if killed:
                self.cut(link)
            else:
                link.later(_DOWN, self.cut, link)

    def _ping(self, link: Link, silent_s: float) -> None:
        if link.broken:
            return
        _, client = self.peers[link.routing_id]
        dead = any(link.silent) or link.full or self._worker.paused or client.paused
        if dead and silent_s >= _PATIENCE_S:
            self.cut(link)
            return
        self._clock.after(_PING_S, self._ping, link, silent_s + _PING_S if dead else 0.0)
