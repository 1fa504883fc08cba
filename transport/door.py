"""A worker's own entrance for clients: a bound ROUTER without sessions (SPEC.md, 14)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import ProtocolError
from ..protocol.messages import Attach, Disconnect, DisconnectCode, Message
from .claims import Claims
from .connections import ConnectionId, Entrance, id_of
from .endpoints import announced
from .keys import KeyPair
from .pump import DONTWAIT, Outcome, Pump, Swallow, another, raw_recv, send
from .sockets import router
from .visitors import Visitors

#: Messages taken in one round: they are small, and sessions with brokers come before them.
_BATCH = 200
#: What clients say here is far shorter; whatever else comes must cost neither memory nor time.
_MOST_BYTES = 1024
#: Connections at a time: each client of the worker has one.
MOST_CONNECTIONS = 4096
#: How often to look for connections that are silent, and at what the others bring; and what one may bring meanwhile:
#: honest ones a few kilobytes. Libzmq keeps a message of any number of frames until its last one has come.
_LOOK_S = 1.0
_MOST_INFLOW_BYTES = 4 * 1024 * 1024
_NO_IDENTITY = "a client must not give itself an identity (ZMQ_ROUTING_ID): leave that to the worker"


class Door:
    """The socket, and who comes in through it.

    Attributes:
        endpoint: where clients reach it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        pump: Pump,
        curve: KeyPair | None = None,
        *,
        most: int = MOST_CONNECTIONS,
    ) -> None:
        """Listen, and have the pump wait for what comes.

        Args:
            context: where the socket lives.
            endpoint: what it listens on.
            pump: waits for it.
            curve: the worker's key pair: then clients must speak CURVE, and know its public half from their broker.
                Any key of theirs will do: what lets a client have chunks is the request's key, which it attaches
                with, and which it has from a broker that knows it.
            most: connections at a time. A burst is above it for as long as it takes to cut what is too much.

        Raises:
            EndpointError: the endpoint cannot be bound.
        """
        self._pump = pump
        made: list[tuple[Claims, Entrance]] = []
        self._socket, (bound,) = router(
            context,
            [endpoint],
            heartbeats=True,
            most_bytes=_MOST_BYTES,
            curve=curve,
            prepare=lambda socket: made.append((Claims(socket), Entrance(socket))),  # who watches sees no claims
        )
        ((self._claims, self._entrance),) = made
        self._swallow = Swallow(self._socket)
        self._visitors = Visitors(most)
        #: What each of them had brought at the last look, in bytes.
        self._brought: dict[ConnectionId, int] = {}
        self._now = self._look_at = 0.0
        self.endpoint = announced(endpoint, bound)
        pump.watch(self._socket)
        pump.watch(self._entrance.socket)

    def among(self, ready: Mapping[Any, int]) -> bool:
        """Tell whether the pump has found something to do here."""
        return self._socket in ready or self._entrance.socket in ready

    def receive(self) -> Iterator[tuple[bytes, Message | ProtocolError]]:
        """Go through what has come, each with the connection that it came by; what is no message is an error.

        All messages here are one frame. One of more costs its connection, and is taken off in portions, since there
        may be millions.
        """
        for _ in range(_BATCH):
            if not self._swallow.go_on() or not another(self._socket):
                return
            peer = raw_recv(self._socket, DONTWAIT)
            frame = raw_recv(self._socket, DONTWAIT, False)
            if frame.more:
                self._swallow.begin()
                self._send_away(peer, frame, "a message to a worker is one frame")
                continue
            if self._visitors.knows(peer):
                yield peer, _decoded([frame.bytes])
                continue
            connection = self._meet(peer, frame)
            if connection is None:
                continue
            message = _decoded([frame.bytes])
            if isinstance(message, Attach):
                self._visitors.attached(connection, peer)
            yield peer, message

    def _meet(self, peer: bytes, frame: zmq.Frame) -> ConnectionId | None:
        """Return the connection of one who has not shown anything; None where it is not to be heard."""
        connection = id_of(frame)
        if connection is None:
            return None
        # It may be younger than the last look. Its coming was told before its message came.
        while not self._is_welcome(connection, peer) and another(self._entrance.socket):
            self._greet()
        if self._is_welcome(connection, peer):
            return connection
        if connection in self._visitors:
            self._send_away(peer, frame, _NO_IDENTITY)
        return None  # or it is gone, or was cut before

    def _send_away(self, peer: bytes, frame: zmq.Frame, why: str) -> None:
        """Say why, and cut the connection that a message came by; nothing where that is gone.

        Its descriptor may be another one's then, who has done nothing. Libzmq closes a descriptor after it has told
        so, and takes note when it is asked for events. Whoever can be sent to after that, even if there is no room,
        had its connection still when the descriptor was looked at.
        """
        connection = id_of(frame)
        another(self._socket)
        if connection is not None and self.send(peer, Disconnect(DisconnectCode.PROTOCOL, why)) is not Outcome.GONE:
            self._cut(connection)

    def _is_welcome(self, connection: ConnectionId, peer: bytes) -> bool:
        return connection in self._visitors and self._claims.drawn(peer, self._entrance.accepted)

    def look(self, now: float) -> None:
        """Cut connections that are too many, silent or too busy; call it in each round, at least once a second."""
        self._now = now
        self._greet()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        for connection in self._visitors.overdue(now):
            self._cut(connection)
        for connection, before in list(self._brought.items()):
            brought = self._entrance.bytes_in(connection)
            if brought is not None:
                self._brought[connection] = brought
                if brought - before > _MOST_INFLOW_BYTES:
                    self._cut(connection)

    def _greet(self) -> None:
        """Take note of who has come and gone, up to a bound."""
        seen = self._entrance.look()
        for connection in seen.closed:
            self._visitors.left(connection)
            self._brought.pop(connection, None)
        for arrival in seen.arrived:
            self._brought[arrival.connection] = 0
            odd = self._visitors.arrived(arrival.connection, self._now)
            if odd is not None:
                self._cut(odd)

    def _cut(self, connection: ConnectionId) -> None:
        """Close a connection, and hear nothing by it any more."""
        self._visitors.left(connection)
        self._entrance.cut(connection)

    def send(self, peer: bytes, message: Message) -> Outcome:
        """Send through one of the connections; tell what became of the message."""
        return send(self._socket, [peer, *encode(message)])

    def close(self) -> None:
        """Close; what was sent may still leave for a moment (ZMQ_LINGER)."""
        self._pump.forget(self._entrance.socket)
        self._pump.forget(self._socket)
        self._entrance.close()
        self._socket.close()


def _decoded(frames: list[bytes]) -> Message | ProtocolError:
    try:
        return decode(frames)
    except ProtocolError as error:
        return error
