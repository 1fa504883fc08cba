"""Whom the broker sends away, and what it says of messages that are none.

What becomes of a session that ends so is the matter of `clients.py` and `workers.py`.
"""

from __future__ import annotations

import logging

from ..protocol.errors import ProtocolError
from ..protocol.identity import Identity
from ..protocol.messages import Disconnect, DisconnectCode, Heartbeat, Hello, Message, Ready
from .events import ToClient, ToWorker
from .metrics import Counters
from .outbox import Outbox, clip
from .registry import Session

#: Malformed messages are logged at most once in this time, with their number: a flood must not fill the disk.
_MALFORMED_LOG_S = 1.0
#: What a peer is told whose key was taken off the list while it was here.
REVOKED = "its key was revoked, or has another role or name now"
#: Who begins a session at the wrong socket, a HELLO at the workers' or a READY at the clients', is told of the other.
_STRAYS: dict[type[Message], str] = {
    Ready: "; this is a frontend, for clients: workers, and brokers with --uplink, belong at a broker's backend",
    Hello: "; this is a backend, for workers: clients belong at a broker's frontend",
}


class Disconnects:
    """DISCONNECT to peers of both sockets, whether they have a session or not; it counts them."""

    def __init__(self, outbox: Outbox, counters: Counters, now: float) -> None:
        """Have sent nobody away."""
        self._outbox = outbox
        self._counters = counters
        self._malformed_logged_at = now - _MALFORMED_LOG_S
        self._malformed_unlogged = 0

    def client(self, peer: bytes, code: DisconnectCode, why: str) -> None:
        """Send a peer of the frontend away."""
        self._counters.disconnected += 1
        self._outbox.to_stranger(ToClient(peer, Disconnect(code, clip(why))))

    def worker(self, peer: bytes, code: DisconnectCode, why: str) -> None:
        """Send a peer of the backend away."""
        self._counters.disconnected += 1
        self._outbox.to_stranger(ToWorker(peer, Disconnect(code, clip(why))))

    def malformed(self, side: str, error: ProtocolError, now: float) -> None:
        """Count a message that is none and log it in its time; who sent it is for the caller to send away."""
        self._counters.malformed += 1
        self._malformed_unlogged += 1
        if now < self._malformed_logged_at + _MALFORMED_LOG_S:
            return
        self._outbox.log(
            "malformed_message", level=logging.WARNING, side=side, count=self._malformed_unlogged, last=error.message
        )
        self._malformed_unlogged = 0
        self._malformed_logged_at = now


def unknown(message: Message, expected: str) -> str:
    """Tell a peer without a session how one begins."""
    why = f"no session with this peer: expected {expected}, got {message.command.name}"
    return why + _STRAYS.get(type(message), "")


def foreign(identity: Identity | None, expected: str) -> str:
    """Tell a peer that its key is of no use at this socket."""
    found = "it is unknown or revoked" if identity is None else f"it is the key of a {identity.role.value}"
    return f"this key is not admitted here: {found}; expected the key of {expected}"


def outside(seconds: float) -> str:
    """Tell a peer whose key was cut off when it may come again."""
    return f"cut off, since it went on and on beyond its limits: let in again in {seconds:.1f} s"


def lost(beat: Heartbeat, session: Session) -> str:
    """Tell a peer how many of its messages are missing."""
    return f"{beat.sent} messages were sent, {session.received - 1} arrived"


def silent(session: Session, now: float) -> str:
    """Tell a peer for how long nothing was heard of it."""
    return f"silent for {now - session.liveness.heard_at:.3f} s"
