"""Heartbeat bookkeeping of one session: when to send, when to give the other side up.

Any message counts as a sign of life. Times are seconds of one monotonic clock; the caller owns the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Defaults: a dead host is noticed after five missed beats, a lost second costs nobody anything.
HEARTBEAT_S = 1.0
EXPIRY_S = 5.0
#: A peer may ask for a longer interval than the broker's, up to this.
MAX_HEARTBEAT_S = 60.0


def negotiate(own_heartbeat_s: float, own_expiry_s: float, wish_s: float | None) -> tuple[float, float]:
    """Return (heartbeat_s, expiry_s) of a session.

    A peer may wish for a longer interval than the broker's (a phone, a laptop that sleeps), never a shorter one,
    since that would cost the broker work; the expiry keeps its ratio to the interval.
    """
    if wish_s is None:
        return own_heartbeat_s, own_expiry_s
    heartbeat_s = max(own_heartbeat_s, min(wish_s, MAX_HEARTBEAT_S))
    return heartbeat_s, own_expiry_s * heartbeat_s / own_heartbeat_s


@dataclass(slots=True)
class Liveness:
    """What one side of a session knows about the time.

    Attributes:
        heartbeat_s: interval in which this side says something.
        expiry_s: silence after which the other side is given up.
        heard_at: when the other side was last heard.
        spoke_at: when this side last sent.
    """

    heartbeat_s: float
    expiry_s: float
    heard_at: float
    spoke_at: float

    def heard(self, now: float) -> None:
        """Note that a message arrived."""
        self.heard_at = now

    def spoke(self, now: float) -> None:
        """Note that a message was sent."""
        self.spoke_at = now

    def due(self, now: float) -> bool:
        """Tell whether it is time to send a heartbeat."""
        return now >= self.spoke_at + self.heartbeat_s

    def expired(self, now: float) -> bool:
        """Tell whether the other side has been silent for the whole expiry."""
        return now >= self.heard_at + self.expiry_s

    def forgive(self, lag_s: float) -> None:
        """Take `lag_s` seconds in which this side did not listen off the other side's silence."""
        self.heard_at += lag_s

    def next_deadline(self) -> float:
        """Return the next time at which `due` or `expired` changes."""
        return min(self.spoke_at + self.heartbeat_s, self.heard_at + self.expiry_s)
