"""A peer's socket to one broker: a DEALER, its monitor, and an outbox for what the socket does not take at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import zmq

from .keys import Curve
from .monitor import REFUSALS, ConnectionEvent, Monitor
from .pump import Outcome, Pump, receive, send
from .sockets import connect, dealer

#: What waits for a broker that does not read, behind libzmq's own queue. Credit bounds what is in flight far below:
#: a broker that lets this fill up is broken, and its session is given up.
OUTBOX_BYTES = 16 * 1024 * 1024


class Link:
    """The socket of one session."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        pump: Pump,
        *,
        heartbeats: bool = False,
        curve: Curve | None = None,
    ) -> None:
        """Begin to connect, and have the pump wait for it.

        Args:
            context: where the socket lives.
            endpoint: what it is connected to.
            pump: waits for it.
            heartbeats: ZMTP finds out when the other side is gone, where no session does.
            curve: the keys of both sides; None for no CURVE.

        Raises:
            EndpointError: libzmq refuses the endpoint. Nothing is left open.
        """
        self._pump = pump
        self._outbox: deque[Sequence[bytes]] = deque()
        self._outbox_bytes = 0
        self._connected = False
        self._broken = False
        self.socket = dealer(context, endpoint, heartbeats=heartbeats, curve=curve)
        self._monitor = Monitor(self.socket)
        pump.watch(self.socket)
        pump.watch(self._monitor.socket)
        try:
            connect(self.socket, endpoint)
        except BaseException:
            self.close()
            raise

    def among(self, ready: Mapping[Any, int]) -> bool:
        """Tell whether the pump has found something to do here."""
        return self.socket in ready or self._monitor.socket in ready

    def events(self) -> list[ConnectionEvent]:
        """Return what has happened to the connection; a link that was refused or disconnected is of no more use."""
        found = self._monitor.events()
        self._connected = self._connected or ConnectionEvent.CONNECTED in found
        if ConnectionEvent.DISCONNECTED in found:
            self._broken = True
            if not self._connected and REFUSALS.keys().isdisjoint(found):
                # What is no ZMTP peer at all may be left without a word about the handshake.
                found.append(ConnectionEvent.BROKEN_OFF)
        return found

    def receive(self, limit: int) -> list[list[bytes]]:
        """Return up to `limit` messages that are there."""
        return receive(self.socket, limit)

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send after everything before; return False when the outbox is full, and the link of no more use."""
        if not self._outbox and send(self.socket, frames) is Outcome.SENT:
            return True
        if not self._outbox:
            self._pump.watch(self.socket, writable=True)
        self._outbox.append(frames)
        self._outbox_bytes += sum(map(len, frames))
        return self._outbox_bytes <= OUTBOX_BYTES

    def flush(self) -> bool:
        """Send what waits, as far as the socket takes it; tell whether nothing waits any more."""
        if not self._outbox:
            return True
        while self._outbox:
            frames = self._outbox[0]
            if send(self.socket, frames) is not Outcome.SENT:
                return False
            self._outbox.popleft()
            self._outbox_bytes -= sum(map(len, frames))
        self._pump.watch(self.socket)
        return True

    def close(self) -> None:
        """Close; through a connection that stands, what was sent may still leave for a moment (ZMQ_LINGER)."""
        self.flush()
        self._pump.forget(self._monitor.socket)
        self._pump.forget(self.socket)
        self._monitor.close()
        # What is left of a broken session must not reach a broker that has come back: it belongs to no session there.
        self.socket.close(linger=0 if self._broken else None)
