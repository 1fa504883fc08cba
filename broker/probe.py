"""When to look for the peer of a connection that broke."""

from __future__ import annotations

from dataclasses import dataclass

#: The monitor tells of a broken connection a moment before sends to it fail; a busy machine makes the moment longer.
PROBE_AGAIN_S = 0.05


@dataclass(slots=True)
class Probe:
    """At least one probe follows a break by `PROBE_AGAIN_S` or more; the first of several has one at once, too.

    Attributes:
        again_at: when the next one is due; None while none is.
        more: connections have broken since that was set.
    """

    again_at: float | None = None
    more: bool = False

    def broken(self, now: float) -> bool:
        """Note that a connection broke; tell whether to probe at once."""
        if self.again_at is not None:
            self.more = True
            return False
        self.again_at = now + PROBE_AGAIN_S
        return True

    def due(self, now: float) -> bool:
        """Tell whether a later probe is due; once."""
        if self.again_at is None or now < self.again_at:
            return False
        self.again_at = now + PROBE_AGAIN_S if self.more else None
        self.more = False
        return True
