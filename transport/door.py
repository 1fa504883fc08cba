"""A worker's own entrance for clients: a bound ROUTER without sessions (SPEC.md, 14)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import ProtocolError
from ..protocol.messages import Message
from .connections import ConnectionId, Entrance, id_of
from .endpoints import announced
from .keys import KeyPair
from .pump import DONTWAIT, Outcome, Pump, Swallow, another, raw_recv, send
from .sockets import router

#: Messages taken in one round: they are small, and sessions with brokers come before them.
_BATCH = 200
#: What clients say here is far shorter; whatever else comes must cost neither memory nor time.
_MOST_BYTES = 1024
#: Connections at a time: each client of the worker has one.
_MOST_CONNECTIONS = 4096
#: How often to look at what connections bring, and what one may bring meanwhile: honest ones a few kilobytes. Libzmq
#: keeps a message of any number of frames until its last one has come.
_LOOK_S = 1.0
_MOST_INFLOW_BYTES = 4 * 1024 * 1024


class Door:
    """The socket, and who comes in through it.

    Attributes:
        endpoint: where clients reach it.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, pump: Pump, curve: KeyPair | None = None
    ) -> None:
        """Listen, and have the pump wait for what comes.

        Args:
            context: where the socket lives.
            endpoint: what it listens on.
            pump: waits for it.
            curve: the worker's key pair: then clients must speak CURVE, and know its public half from their broker.
                Any key of theirs will do: what lets a client have chunks is the request's key, which it attaches
                with, and which it has from a broker that knows it.

        Raises:
            EndpointError: the endpoint cannot be bound.
        """
        self._pump = pump
        made: list[Entrance] = []
        self._socket, (bound,) = router(
            context,
            [endpoint],
            heartbeats=True,
            most_bytes=_MOST_BYTES,
            curve=curve,
            prepare=lambda socket: made.append(Entrance(socket)),
        )
        self._entrance = made[0]
        self._swallow = Swallow(self._socket)
        #: The connections that are open, and what each had brought at the last look, in bytes.
        self._open: dict[ConnectionId, int] = {}
        self._look_at = 0.0
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
                connection = id_of(frame)
                if connection is not None:
                    self._entrance.cut(connection)
                continue
            yield peer, _decoded([frame.bytes])

    def look(self, now: float) -> None:
        """Cut connections that are too many, or that bring more than anybody has to say; call it in each round."""
        seen = self._entrance.look()
        for connection in seen.closed:
            self._open.pop(connection, None)
        for arrival in seen.arrived:
            self._open[arrival.connection] = 0
            if len(self._open) > _MOST_CONNECTIONS:
                self._entrance.cut(arrival.connection)
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        for connection, before in list(self._open.items()):
            brought = self._entrance.bytes_in(connection)
            if brought is not None:
                self._open[connection] = brought
                if brought - before > _MOST_INFLOW_BYTES:
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
