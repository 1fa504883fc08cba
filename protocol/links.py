"""What happens at the sockets of a peer that has one for each of its brokers, and what it orders of them, as values.

A broker is named by its endpoint.
"""

from __future__ import annotations

from typing import TypeAlias

from .errors import ProtocolError
from .messages import Message
from .refusal import Refusal
from .values import value

# --- events ---------------------------------------------------------------------------------------------------------


@value
class Connected:
    """The socket of this broker has a connection."""

    broker: str


@value
class Lost:
    """The connection to this broker is gone, or of no more use; `reason` is for people."""

    broker: str
    reason: str = "connection lost"


@value
class Refused:
    """The handshake with this broker failed, which ends the link: libzmq would mostly not try again."""

    broker: str
    refusal: Refusal


@value
class Received:
    """A message came from this broker."""

    broker: str
    message: Message


@value
class Malformed:
    """Frames came from this broker that are no message."""

    broker: str
    error: ProtocolError


LinkEvent: TypeAlias = Connected | Lost | Refused | Received | Malformed

# --- actions --------------------------------------------------------------------------------------------------------


@value
class Open:
    """Make a new socket and connect it to this broker."""

    broker: str


@value
class Shut:
    """Close the socket of this broker; what was sent before may still leave."""

    broker: str


@value
class Send:
    """Send this message to this broker, after all earlier ones."""

    broker: str
    message: Message


LinkAction: TypeAlias = Open | Shut | Send
