"""Whose turn it is to be looked at: all sessions in a round, a part of them at a time.

Thousands of peers that connected together would else be sent their heartbeats together, for ever: a wave of two
thousand messages takes tens of milliseconds, and tokens wait behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from ..protocol.liveness import Liveness

#: So many are looked at together: a fraction of a millisecond.
_TOGETHER = 500
#: More parts would only wake the loop.
_MOST_PARTS = 16


class _Session(Protocol):
    peer: bytes
    liveness: Liveness


SessionT = TypeVar("SessionT", bound=_Session)


def parts_of(sessions: int) -> int:
    """Return in how many parts a round over so many sessions is to be divided."""
    return min(1 + sessions // _TOGETHER, _MOST_PARTS)


class Rota(Generic[SessionT]):
    """The sessions of one side, in rounds."""

    def __init__(self, sessions: Mapping[bytes, SessionT]) -> None:
        """Go through these sessions by routing id, and through those that are added."""
        self._sessions = sessions
        self._left: list[SessionT] = []
        self._each = 0

    def turn(self, parts: int) -> list[SessionT]:
        """Return those whose turn it is: each at least once in `parts` turns after it came."""
        if not self._left:
            self._left = list(self._sessions.values())
            self._each = math.ceil(len(self._left) / parts)
        here, self._left = self._left[: self._each], self._left[self._each :]
        return [session for session in here if self._sessions.get(session.peer) is session]

    def look(self, now: float, parts: int) -> tuple[list[SessionT], list[SessionT]]:
        """Return, of those whose turn it is, who has been silent too long, and to whom the broker was."""
        expired, due = [], []
        for session in self.turn(parts):
            liveness = session.liveness  # its methods would be most of what an idle peer costs
            if now >= liveness.heard_at + liveness.expiry_s:
                expired.append(session)
            elif now >= liveness.spoke_at + liveness.heartbeat_s:
                due.append(session)
        return expired, due
