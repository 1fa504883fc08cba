"""A member's session with one broker: its phase, its counters, its heartbeats and the back-off before the next one.

    RESTING --Open--> OPENING --Connected--> CONNECTED --READY--> JOINING --ACCEPTED--> ACTIVE
       ^                 |                       |                   |                    |
       +-----------------+---------- end (Shut, then back-off) ------+--------------------+
    DISCONNECT `superseded` or `removed`, and the member's own end, lead to BARRED, from where nothing leads back.
    A member that drains comes to RESTING as well, but opens nothing until it is told to stay.

One socket is one session: it is never used for a second READY after an end, so that no message of an old session
can be taken for one of the new.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from .liveness import EXPIRY_S, HEARTBEAT_S, Liveness
from .refusal import Refusal

#: A restarted broker is back in about this time; the doubling keeps many workers from storming it.
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
#: A loop of brokers, or a key that may not do this, lasts until somebody has changed how one of them is started, or
#: what the key may do.
FIRST_LASTING_BACKOFF_S = 1.0
MAX_LASTING_BACKOFF_S = 60.0
#: A broker that has cut a member off for sending too much wants a pause that can be noticed.
LIMITED_PAUSE_S = 3.0
#: A broker that is there answers in milliseconds; after this somebody should know that it is not, and then again
#: from time to time.
UNREACHED_S = 3.0
UNREACHED_AGAIN_S = 60.0


class Phase(Enum):
    """Where a session stands; see the module."""

    RESTING = "resting"
    OPENING = "opening"
    #: Connected, and no model to register with yet.
    CONNECTED = "connected"
    #: READY was sent.
    JOINING = "joining"
    ACTIVE = "active"
    BARRED = "barred"


def _unused_liveness() -> Liveness:
    return Liveness(HEARTBEAT_S, EXPIRY_S, 0.0, 0.0)


@dataclass(slots=True)
class Enlistment:
    """The session with one broker, or the pause between two.

    Attributes:
        broker: the broker's endpoint.
        phase: where it stands.
        wanted: another session is to follow this one.
        retry_at: when to open the next socket; means something while RESTING.
        backoff_s: the pause after the next end.
        lasting_backoff_s: the same after the next DISCONNECT `loop` or `forbidden`. Two brokers that register at each
            other at one moment are both accepted before they know; that does not shorten it.
        sent: messages sent in this session.
        received: messages received in this session.
        told_others: requests that others than this broker had here, as it was told last.
        refusal: why the last handshake failed, as was told; None where it did not, or nothing was told.
        refusal_again_at: when to tell the same again.
        unreached_at: when to tell that there is still no connection; means something while OPENING.
        liveness: heartbeats; means something from JOINING on. Until ACCEPTED tells the broker's intervals, the
            defaults hold.
    """

    broker: str
    phase: Phase = Phase.RESTING
    wanted: bool = True
    retry_at: float = -math.inf
    backoff_s: float = FIRST_BACKOFF_S
    lasting_backoff_s: float = FIRST_LASTING_BACKOFF_S
    sent: int = 0
    received: int = 0
    told_others: int = 0
    refusal: Refusal | None = None
    refusal_again_at: float = -math.inf
    unreached_at: float = math.inf
    liveness: Liveness = field(default_factory=_unused_liveness)

    @property
    def has_socket(self) -> bool:
        """Tell whether there is a socket to close."""
        return self.phase not in (Phase.RESTING, Phase.BARRED)

    @property
    def registered(self) -> bool:
        """Tell whether READY was sent: then the broker is told of changes."""
        return self.phase in (Phase.JOINING, Phase.ACTIVE)

    def open(self, now: float) -> None:
        """Note that a new socket is being made."""
        self.phase = Phase.OPENING
        self.unreached_at = now + UNREACHED_S
        self.sent = self.received = 0

    def join(self, now: float) -> None:
        """Note that READY is being sent."""
        self.phase = Phase.JOINING
        self.liveness = Liveness(HEARTBEAT_S, EXPIRY_S, now, now)

    def accept(self, heartbeat_s: float, expiry_s: float) -> bool:
        """Take the broker's intervals; tell whether this opened the session (READY may be sent again in it)."""
        opened = self.phase is Phase.JOINING
        self.refusal = None
        self.phase = Phase.ACTIVE
        self.backoff_s = FIRST_BACKOFF_S
        self.liveness.heartbeat_s = heartbeat_s
        self.liveness.expiry_s = expiry_s
        return opened

    def rest(self, now: float, *, lasting: bool = False, least_s: float = 0.0) -> float:
        """End the session, for a reason that lasts or another one, and for at least so many seconds.

        Returns:
            The seconds until the next one is opened.
        """
        if lasting:
            pause = self.lasting_backoff_s
            self.lasting_backoff_s = min(2 * pause, MAX_LASTING_BACKOFF_S)
        else:
            pause = max(self.backoff_s, least_s)
            self.backoff_s = min(2 * self.backoff_s, MAX_BACKOFF_S)
        self.phase = Phase.RESTING
        self.retry_at = now + pause
        return pause

    def bar(self) -> None:
        """End the session for good."""
        self.phase = Phase.BARRED

    def next_deadline(self) -> float:
        """Return the next time at which there is something to do; infinity for none."""
        if self.phase is Phase.RESTING:
            return self.retry_at if self.wanted else math.inf
        if self.phase is Phase.OPENING:
            return self.unreached_at
        return self.liveness.next_deadline() if self.registered else math.inf
