"""A TCP connection of an end: never waits once it is set up, and keeps what is not whole or not sent yet."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from rounds import BenchmarkError

_PATIENCE_S = 10.0
_PAUSE_S = 0.0002
_RECEIVE_BYTES = 1 << 18


class Connection:
    """A connection to a relay.

    Attributes:
        number: which one of its side.
        socket: for selectors.
        sent: messages that were sent in its session.
        rest: what has arrived of a message that is not whole yet.
    """

    def __init__(self, port: int, number: int) -> None:
        """Connect to a port of this machine."""
        self.number = number
        self.socket = socket.create_connection(("127.0.0.1", port), _PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.sent = 0
        self.rest = b""
        self._unsent = b""

    def send(self, data: bytes | bytearray, messages: int = 1) -> None:
        """Send, or keep what the system does not take: `flush` sends it later."""
        self.sent += messages
        if self._unsent:
            self._unsent += data
            return
        try:
            count = self.socket.send(data)
        except BlockingIOError:
            count = 0
        except OSError as error:
            raise BenchmarkError(f"a connection broke: {error.strerror}") from error
        if count < len(data):
            self._unsent = bytes(data[count:])

    def flush(self) -> bool:
        """Send what was kept; tell whether nothing is kept any more."""
        if self._unsent:
            kept, self._unsent = self._unsent, b""
            self.send(kept, 0)
        return not self._unsent

    def receive(self) -> bytes:
        """Return what has arrived since; empty when nothing has.

        Raises:
            BenchmarkError: the relay has closed the connection.
        """
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise BenchmarkError(f"a connection broke: {error.strerror}") from error
        if not data:
            raise BenchmarkError("the relay has closed a connection")
        return data

    def until(self, whole: Callable[[bytes], bool]) -> None:
        """Receive until `rest` is enough; for the time before the measurement.

        Raises:
            BenchmarkError: it does not come.
        """
        end = time.monotonic() + _PATIENCE_S
        while not whole(self.rest):
            self.flush()
            data = self.receive()
            self.rest += data
            if not data:
                if time.monotonic() > end:
                    raise BenchmarkError(f"no answer for {_PATIENCE_S:g} s")
                time.sleep(_PAUSE_S)
