"""The way in at one ROUTER: which connections it has, whose they are, and which must go.

A session and its connection end together: whoever is sent away, or says goodbye, loses the connection a moment later.
What still comes by it until then is dropped unread, so that nobody gains anything by going on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import zmq

from ..protocol.identity import Identity
from ..protocol.log import Log, write
from ..transport.claims import Claims
from ..transport.connections import ConnectionId, Entrance, id_of
from ..transport.pump import another
from .doorman import Close, Doorman, Why
from .limits import Limits

logger = logging.getLogger("tokenmq.broker")

#: Connections that are closed are logged at most once in this time, with their number.
_CLOSED_LOG_S = 1.0
_NO_IDENTITY = "a peer must not give itself an identity (ZMQ_ROUTING_ID): leave that to the broker"


class Entry:
    """One ROUTER's connections.

    Attributes:
        socket: becomes readable when connections have come or gone.
        broke: one has gone, and nobody has asked since.
    """

    def __init__(self, router: zmq.Socket[bytes], side: str, limits: Limits, now: float) -> None:
        """Watch a ROUTER that is not bound yet.

        Args:
            router: the socket.
            side: what it is called in logs.
            limits: how many connections it may have.
            now: the time.
        """
        self._side = side
        self._claims = Claims(router)  # first: what watches must not see it draw
        self._entrance = Entrance(router)
        self._doorman = Doorman(limits)
        self.socket = self._entrance.socket
        self.broke = False
        self._closed = 0
        self._closed_logged_at = now - _CLOSED_LOG_S

    def look(self, now: float) -> bool:
        """Take note of the connections that have come and gone; tell whether any has gone since it was asked last."""
        self._read(now)
        broke, self.broke = self.broke, False
        return broke

    def _read(self, now: float) -> None:
        seen = self._entrance.look()
        for connection in seen.closed:
            self._doorman.closed(connection)
        for arrival in seen.arrived:
            self._close(self._doorman.accepted(arrival.connection, arrival.address, now), now)
        self.broke = self.broke or seen.broken

    def meet(self, peer: bytes, frame: zmq.Frame, now: float) -> tuple[ConnectionId | None, str]:
        """Look at who has sent a message without having a session.

        Args:
            peer: its routing id.
            frame: a frame of the message, uncopied.
            now: the time.

        Returns:
            Its connection, None where that is gone or going, and nothing is to be heard by it any more; and what is
            wrong with it, "" for nothing.
        """
        connection = id_of(frame)
        if connection is None or self._doorman.is_leaving(connection):
            return None, ""
        while not self._claims.drawn(peer, self._entrance.accepted):
            if not another(self.socket):
                return connection, _NO_IDENTITY
            self._read(now)  # the connection may be younger than the last look
        return connection, ""

    def introduce(self, connection: ConnectionId, peer: bytes, identity: Identity | None, now: float) -> None:
        """Take note that a peer has begun a session."""
        key = None if identity is None else identity.key
        self._close(self._doorman.introduced(connection, peer, key, now), now)

    def dismiss(self, connection: ConnectionId, now: float) -> None:
        """Close a connection in a moment: it has brought nothing that begins a session."""
        self._doorman.dismiss(connection, now)

    def end(self, peer: bytes, now: float) -> None:
        """Close a peer's connection in a moment: its session is over."""
        connection = self._doorman.of_peer(peer)
        if connection is not None:
            self._doorman.dismiss(connection, now)

    def tick(self, now: float) -> None:
        """Close the connections whose time is up."""
        self._close(self._doorman.tick(now), now)

    def connections(self, received: Callable[[bytes], int | None]) -> Iterator[tuple[ConnectionId, int | None]]:
        """Go through all connections, each with how many messages of it were read in its session, None without one.

        Args:
            received: returns that for a peer.
        """
        for connection, peer in self._doorman.peers():
            yield connection, None if peer is None else received(peer)

    def bytes_in(self, connection: ConnectionId) -> int | None:
        """Return how many bytes a connection of either side has brought, None where that is not known."""
        return self._entrance.bytes_in(connection)

    def cut_endless(self, connection: ConnectionId, now: float) -> None:
        """Close a connection that brings a message without an end."""
        self._entrance.cut(connection)
        self._closed += 1
        self._tell("it brings a message without an end", "", now)

    def next_deadline(self) -> float | None:
        """Return when to call `tick`, None for never."""
        return self._doorman.next_deadline()

    def figures(self) -> dict[str, int]:
        """Return how many connections there are, how many were closed, and how many handshakes have failed."""
        closed = sum(self._doorman.closed_by.values()) - self._doorman.closed_by[Why.DISMISSED]
        failed = {f"handshakes_failed_{why}": count for why, count in self._entrance.failed.items()}
        return {"open": self._doorman.open, "strangers": self._doorman.strangers, "turned_away": closed, **failed}

    def close(self) -> None:
        """Stop watching; before the ROUTER is closed."""
        self._entrance.close()

    def _close(self, closes: Iterable[Close], now: float) -> None:
        for close in closes:
            self._entrance.cut(close.connection)
            if close.why is Why.DISMISSED:
                continue
            self._closed += 1
            self._tell(close.why.value, close.who, now)

    def _tell(self, why: str, who: str, now: float) -> None:
        if now >= self._closed_logged_at + _CLOSED_LOG_S:
            told = {"side": self._side, "why": why, "whose": who, "count": self._closed}
            write(logger, Log("connections_closed", told, level=logging.WARNING))
            self._closed, self._closed_logged_at = 0, now
