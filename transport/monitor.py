"""What happens to the connections of a socket, as events: how a dead peer is seen in milliseconds."""

from __future__ import annotations

import struct
from enum import Enum

import zmq

from .pump import another

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class ConnectionEvent(Enum):
    """A change of one connection."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    REFUSED = "refused"


_MEANING = {
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): ConnectionEvent.CONNECTED,
    int(zmq.EVENT_DISCONNECTED): ConnectionEvent.DISCONNECTED,
}


class Monitor:
    """Watches one socket. `socket` becomes readable when there are events."""

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        """Start watching; do it before the socket connects or binds."""
        self._watched = watched
        self.socket: zmq.Socket[bytes] = watched.get_monitor_socket(_EVENTS)

    def events(self) -> list[ConnectionEvent]:
        """Return what has happened since the last call, in order; never waits."""
        found: list[ConnectionEvent] = []
        while another(self.socket):
            frames = self.socket.recv_multipart(zmq.DONTWAIT)
            # struct, not pyzmq's parser: that one makes an enum of the value, which may be an errno it lacks.
            number = struct.unpack_from("=H", frames[0])[0]
            found.append(_MEANING.get(number, ConnectionEvent.REFUSED))
        return found

    def close(self) -> None:
        """Stop watching; call it before the watched socket closes."""
        self._watched.disable_monitor()
        self.socket.close(linger=0)
