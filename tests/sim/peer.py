"""What workers, clients and brokers below others have in common on the fake network: a socket for each broker.

Clients have sockets to workers besides, which are used alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import Message

from .net import Link, Net, Node

if TYPE_CHECKING:
    from .broker import SimBroker
    from .door import Door

_UP, _DOWN = False, True


class Peer(Node):
    """A process with sockets to brokers."""

    is_client = False

    def __init__(self, net: Net, brokers: dict[str, SimBroker]) -> None:
        super().__init__(net)
        self.brokers = brokers
        self.links: dict[str, Link] = {}
        #: Grows with each socket that is opened, so that a late connect for an old one does nothing.
        self._sockets: dict[str, int] = {}

    def host(self, endpoint: str) -> SimBroker | Door:
        """Return who listens at an endpoint."""
        return self.brokers.get(endpoint) or self.net.doors[endpoint]

    def open(self, endpoint: str) -> None:
        socket = self._sockets[endpoint] = self._sockets.get(endpoint, 0) + 1
        self._try_soon(endpoint, socket)

    def _try_soon(self, endpoint: str, socket: int) -> None:
        self.clock.after(self.random.uniform(0.001, 0.1), self._try, endpoint, socket)

    def _try(self, endpoint: str, socket: int) -> None:
        if not self.alive or self._sockets.get(endpoint) != socket:
            return
        host = self.host(endpoint)
        if not host.alive or self.clock.now < max(self.reached_at, host.reached_at):
            self._try_soon(endpoint, socket)
            return
        link = self.links[endpoint] = host.connect(self, client=self.is_client)
        self.do(self._connected, link)

    def shut(self, endpoint: str) -> None:
        self._sockets[endpoint] = self._sockets.get(endpoint, 0) + 1
        link = self.links.pop(endpoint, None)
        if link is not None:
            link.later(_UP, self.host(endpoint).closed_by_peer, link)

    def send(self, endpoint: str, message: Message) -> None:
        link = self.links.get(endpoint)
        if link is not None:
            deliver = self.host(endpoint).from_client if self.is_client else self.brokers[endpoint].from_worker
            link.carry(_UP, message, deliver, link)

    def die(self) -> None:
        """SIGKILL: the connections break; the brokers' monitors see it."""
        self.alive = False
        self.hang_up()

    def hang_up(self) -> None:
        """Let the connections break, and make none any more."""
        for endpoint in self._sockets:
            self._sockets[endpoint] += 1
        for endpoint, link in list(self.links.items()):
            self.host(endpoint).cut(link)
        self.links.clear()

    def received(self, link: Link, message: Message | ProtocolError) -> None:
        self.do(self._take, link, message)

    def lost(self, link: Link) -> None:
        self.do(self._lose, link)

    def _connected(self, link: Link) -> None:
        if self.links.get(link.endpoint) is link:
            self.connected(link.endpoint)

    def _take(self, link: Link, message: Message | ProtocolError) -> None:
        if self.links.get(link.endpoint) is link:
            self.took(link.endpoint, message)

    def _lose(self, link: Link) -> None:
        if self.links.get(link.endpoint) is link:
            del self.links[link.endpoint]
            self.disconnected(link.endpoint)

    def connected(self, endpoint: str) -> None:
        raise NotImplementedError

    def disconnected(self, endpoint: str) -> None:
        raise NotImplementedError

    def took(self, endpoint: str, message: Message | ProtocolError) -> None:
        raise NotImplementedError
