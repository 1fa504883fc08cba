"""What happens to the connections of a socket, as events: how a dead peer is seen in milliseconds."""

from __future__ import annotations

import struct
from enum import Enum

import zmq

from ..protocol.refusal import Refusal
from .pump import another

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class ConnectionEvent(Enum):
    """A change of one connection. Each of the last three is followed by DISCONNECTED."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    #: Who connects has a key that the server does not let in. libzmq does not try again.
    FORBIDDEN = "forbidden"
    #: One side speaks CURVE and the other does not. libzmq does not try again.
    MISMATCH = "mismatch"
    #: The handshake broke off: the server has another key, is no ZMTP peer, or has just ended.
    BROKEN_OFF = "broken off"


#: What ends a handshake, by what it is called elsewhere.
REFUSALS = {
    ConnectionEvent.FORBIDDEN: Refusal.FORBIDDEN,
    ConnectionEvent.MISMATCH: Refusal.MISMATCH,
    ConnectionEvent.BROKEN_OFF: Refusal.BROKEN_OFF,
}

_MEANING = {
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): ConnectionEvent.CONNECTED,
    int(zmq.EVENT_DISCONNECTED): ConnectionEvent.DISCONNECTED,
}
#: The ZAP handler's word for a key that it does not know; others (300, 500) tell of a handler that is in trouble.
_ZAP_REFUSED = 400


def _meaning(number: int, value: int) -> ConnectionEvent:
    if number == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == _ZAP_REFUSED:
        return ConnectionEvent.FORBIDDEN
    if number == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return ConnectionEvent.MISMATCH
    return _MEANING.get(number, ConnectionEvent.BROKEN_OFF)


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
            found.append(_meaning(*struct.unpack_from("=HI", frames[0])))
        return found

    def close(self) -> None:
        """Stop watching; call it before the watched socket closes."""
        self._watched.disable_monitor()
        self.socket.close(linger=0)
