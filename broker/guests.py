"""Clients of a broker above this one, whose requests come through it: sessions that no client of ours has opened."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..protocol.codec import header
from ..protocol.liveness import Liveness
from ..protocol.messages import Command, Message
from .registry import ClientSession


@dataclass(slots=True, eq=False, kw_only=True)
class Guest(ClientSession):
    """A client of a parent. What it sends and is sent goes through the session with the parent, and counts there.

    Attributes:
        parent: the parent's endpoint.
        parent_route: what the parent knows it by.
        header: the header that its CHUNKS have on the way up.
        tell: sends it a message.
        passed: notes that CHUNKS went to it unread.
    """

    parent: str
    parent_route: bytes
    header: bytes
    tell: Callable[[Guest, Message], None]
    passed: Callable[[str], None]


def guest_of(
    parent: str,
    parent_route: bytes,
    route: bytes,
    tell: Callable[[Guest, Message], None],
    passed: Callable[[str], None],
) -> Guest:
    """Return a new guest.

    Args:
        parent: the parent's endpoint.
        parent_route: what the parent knows the client by.
        route: what workers here are to know it by.
        tell: sends it a message.
        passed: notes that CHUNKS went to it.
    """
    return Guest(
        # No ROUTER makes such ids, and no other guest has it.
        peer=parent.encode() + parent_route,
        # It has no connection of its own that could fall silent.
        liveness=Liveness(math.inf, math.inf, 0.0, 0.0),
        # Each has a share of the workers, as if it had come here by itself.
        name=f"{parent}#{parent_route.hex().lstrip('0')}",
        route=route,
        parent=parent,
        parent_route=parent_route,
        header=header(Command.CHUNKS, parent_route),
        tell=tell,
        passed=passed,
    )
