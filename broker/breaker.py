"""A worker's breaker: after repeated failures of its engine it gets nothing for a while, then one request to try.

    CLOSED --failures in a row--> OPEN --pause over--> HALF_OPEN --success--> CLOSED
                                   ^                       |
                                   +-------failure---------+   (each time a longer pause)

Only what the engine does counts: an error that is the client's fault says nothing of the worker, and one that says
`busy` or `draining` lives (Nygard, Release It!, 2007; what is new is who may be suspended: see pool.py, which still
uses the last worker of a model).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..protocol.errors import ErrorCode

#: Errors that are the engine's own.
ENGINE_FAULTS = frozenset({ErrorCode.ENGINE_FAILED.value, ErrorCode.OUT_OF_MEMORY.value})
#: One failure may be the request's, two a coincidence.
FAILURES = 3
#: The first pause; an engine that was reset needs about as long.
PAUSE_S = 1.0
MAX_PAUSE_S = 30.0


class State(str, Enum):
    """Where a breaker stands; see the module."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


#: Python 3.11 takes three times as long for a member by its class, and each request asks for a few.
_CLOSED, _OPEN, _HALF_OPEN = State.CLOSED, State.OPEN, State.HALF_OPEN


@dataclass(slots=True)
class Breaker:
    """The breaker of one worker.

    Attributes:
        state: where it stands.
        failures: engine failures since the last success; those of one request count once.
        again_at: when the worker is tried again; means something while OPEN.
        pause_s: how long it is left alone after the next opening.
        blamed: ids of the requests that failed while it was closed: fewer than FAILURES.
        trial: what tries the worker while HALF_OPEN; None while nothing does.
    """

    state: State = State.CLOSED
    failures: int = 0
    again_at: float = 0.0
    pause_s: float = PAUSE_S
    blamed: set[bytes] = field(default_factory=set)
    trial: bytes | None = None

    @property
    def suspends(self) -> bool:
        """Whether the worker is to get nothing now, if there is another one."""
        return self.trial is not None or self.state is _OPEN

    def failed(self, now: float, request: bytes) -> bool:
        """Note that the engine has failed the request of this id; tell whether this opened the breaker."""
        if self.state is State.CLOSED:
            if request in self.blamed:
                return False  # it is tried again and again: one that breaks every engine must not suspend them all
            self.blamed.add(request)
        self.failures += 1
        if self.state is State.OPEN or (self.state is State.CLOSED and self.failures < FAILURES):
            return False  # what it still ran when it was opened says nothing new
        self.state = State.OPEN
        self.trial = None
        self.again_at = now + self.pause_s
        self.pause_s = min(2 * self.pause_s, MAX_PAUSE_S)
        self.blamed.clear()
        return True

    def succeeded(self) -> bool:
        """Note that the engine has finished a request; tell whether this closed the breaker."""
        if not self.failures and self.state is _CLOSED:
            return False
        closed = self.state is not State.CLOSED
        self.state = State.CLOSED
        self.trial = None
        self.failures = 0
        self.pause_s = PAUSE_S
        self.blamed.clear()
        return closed

    def try_again(self) -> None:
        """Let one request through: the pause is over."""
        self.state = State.HALF_OPEN

    def given(self, request: bytes) -> None:
        """Note that the worker gets this request: the first one after the pause tries it."""
        if self.state is _HALF_OPEN and self.trial is None:
            self.trial = request

    def freed(self, request: bytes) -> None:
        """Note that the worker needs no slot for this request any more: if it said nothing, another one tries it."""
        if self.trial == request:
            self.trial = None
