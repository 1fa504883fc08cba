"""A worker's own entrance for clients: a bound ROUTER without sessions (SPEC.md, 14)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import ProtocolError
from ..protocol.messages import Message
from .endpoints import announced
from .keys import KeyPair
from .pump import Outcome, Pump, receive, send
from .sockets import router

#: Messages taken in one round: they are small, and sessions with brokers come before them.
_BATCH = 200
#: What clients say here is far shorter; whatever else comes must cost neither memory nor time.
_MOST_BYTES = 1024


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
        self._socket, (bound,) = router(context, [endpoint], heartbeats=True, most_bytes=_MOST_BYTES, curve=curve)
        self.endpoint = announced(endpoint, bound)
        pump.watch(self._socket)

    def among(self, ready: Mapping[Any, int]) -> bool:
        """Tell whether the pump has found something to do here."""
        return self._socket in ready

    def receive(self) -> Iterator[tuple[bytes, Message | ProtocolError]]:
        """Go through what has come, each with the connection that it came by; what is no message is an error."""
        for peer, *frames in receive(self._socket, _BATCH):
            yield peer, _decoded(frames)

    def send(self, peer: bytes, message: Message) -> Outcome:
        """Send through one of the connections; tell what became of the message."""
        return send(self._socket, [peer, *encode(message)])

    def close(self) -> None:
        """Close; what was sent may still leave for a moment (ZMQ_LINGER)."""
        self._pump.forget(self._socket)
        self._socket.close()


def _decoded(frames: list[bytes]) -> Message | ProtocolError:
    try:
        return decode(frames)
    except ProtocolError as error:
        return error
