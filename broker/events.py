"""What comes into BrokerCore and what goes out of it.

What happens at the sockets of parents, and what is ordered of them, is in `protocol/links.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from ..protocol.errors import ProtocolError
from ..protocol.identity import Identity
from ..protocol.links import LinkAction, LinkEvent
from ..protocol.log import Log
from ..protocol.messages import Message
from ..protocol.values import value


@value
class FromClient:
    """A client sent a message.

    `frames` is the message as it came, where it is at hand. `identity` is who the peer's key says it is; it counts
    where a session begins.
    """

    peer: bytes
    message: Message
    frames: Sequence[bytes] | None = None
    identity: Identity | None = None


@value
class FromWorker:
    """A worker sent a message; see FromClient for `frames` and `identity`."""

    peer: bytes
    message: Message
    frames: Sequence[bytes] | None = None
    identity: Identity | None = None


@value
class BadClient:
    """A peer of the frontend sent something that is not a message, of so many bytes."""

    peer: bytes
    error: ProtocolError
    size_bytes: int = 0


@value
class BadWorker:
    """A peer of the backend sent something that is not a message, of so many bytes."""

    peer: bytes
    error: ProtocolError
    size_bytes: int = 0


@value
class StrayChunks:
    """A peer of the backend sent CHUNKS for a client that it holds no request of; nobody has read them.

    `route` is what the client is called in their header.
    """

    peer: bytes
    route: bytes = b""


@value
class ClientGone:
    """A message to a client could not be sent: its connection is gone, or it is there and has stopped reading."""

    peer: bytes
    why: str
    stalled: bool = False


@value
class WorkerGone:
    """A message to a worker could not be sent: its connection is gone, or it is there and has stopped reading."""

    peer: bytes
    why: str
    stalled: bool = False


Event: TypeAlias = FromClient | FromWorker | BadClient | BadWorker | StrayChunks | ClientGone | WorkerGone | LinkEvent


@value
class ToClient:
    """Send this to a client; `frames` is the message encoded, where it is at hand."""

    peer: bytes
    message: Message
    frames: Sequence[bytes] | None = None


@value
class ToWorker:
    """Send this to a worker; `frames` is what it gets, where that is at hand: then `message` lacks the route."""

    peer: bytes
    message: Message
    frames: Sequence[bytes] | None = None


Action: TypeAlias = ToClient | ToWorker | LinkAction | Log
