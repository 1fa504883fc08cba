"""One socket of a client: a DEALER, its monitor, and what could not leave yet. It lives as long as one session."""

from __future__ import annotations

from collections import deque

import zmq

from ..protocol.codec import encode
from ..protocol.messages import Message
from ..transport.monitor import ConnectionEvent, Monitor
from ..transport.pump import Outcome, Pump, send
from ..transport.sockets import connect, dealer
from .events import Connected, Lost

#: Messages kept for a broker that does not read, on top of libzmq's own queue of as many. A client that has more
#: has lost its broker, whatever TCP says.
_OUTBOX_MESSAGES = 10_000


class Wire:
    """A DEALER to one endpoint.

    Attributes:
        socket: the DEALER.
        monitor: tells its changes.
        overflown: messages had to be thrown away: the session cannot go on.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], pump: Pump, endpoint: str) -> None:
        """Make the socket, begin to connect, and let the pump watch it.

        Raises:
            EndpointError: the endpoint cannot be used; nothing is left behind.
        """
        self._pump = pump
        self.overflown = False
        self._outbox: deque[list[bytes]] = deque()
        self.socket = dealer(context, endpoint)
        self.monitor = Monitor(self.socket)
        pump.watch(self.socket)
        pump.watch(self.monitor.socket)
        try:
            connect(self.socket, endpoint)
        except BaseException:
            self.close()
            raise

    def changes(self) -> list[Connected | Lost]:
        """Return what has happened to the connection since the last call."""
        return [
            Connected() if event is ConnectionEvent.CONNECTED else Lost(f"connection {event.value}")
            for event in self.monitor.events()
        ]

    def send(self, message: Message) -> None:
        """Send a message now, or as soon as there is room; when too many wait already, set `overflown`."""
        frames = encode(message)
        if not self._outbox:
            if send(self.socket, frames) is Outcome.SENT:
                return
            self._pump.watch(self.socket, writable=True)
        if len(self._outbox) < _OUTBOX_MESSAGES:
            self._outbox.append(frames)
        else:
            self.overflown = True

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        while self._outbox:
            if send(self.socket, self._outbox[0]) is not Outcome.SENT:
                return
            self._outbox.popleft()
        self._pump.watch(self.socket)

    def close(self) -> None:
        """Close socket and monitor; what libzmq has queued may still leave within the linger."""
        self._pump.forget(self.socket)
        self._pump.forget(self.monitor.socket)
        self.monitor.close()
        self.socket.close()
