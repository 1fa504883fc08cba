"""When to look for the peer of a connection that broke."""

from __future__ import annotations

from dataclasses import dataclass

#: The monitor tells of a broken connection a moment before sends to it fail; a busy machine makes the moment longer.
#: So probes follow after these times. There may be thousands of clients, and a probe is a heartbeat to each: one.
CLIENT_DELAYS_S = (0.05,)
#: Workers are few, and readers wait for the news of a dead one: a quick look first.
WORKER_DELAYS_S = (0.01, 0.05)


@dataclass(slots=True)
class Probe:
    """A break is followed by probes after all the delays; the first of several breaks has one at once, too.

    Attributes:
        delays_s: seconds between one probe and the next.
        again_at: when the next one is due; None while none is.
        made: how many of the delays have passed.
        more: connections have broken since the first of these probes.
    """

    delays_s: tuple[float, ...]
    again_at: float | None = None
    made: int = 0
    more: bool = False

    def broken(self, now: float) -> bool:
        """Note that a connection broke; tell whether to probe at once."""
        if self.again_at is not None:
            self.more = True
            return False
        self.made = 0
        self.again_at = now + self.delays_s[0]
        return True

    def due(self, now: float) -> bool:
        """Tell whether a later probe is due; once."""
        if self.again_at is None or now < self.again_at:
            return False
        self.made += 1
        if self.made == len(self.delays_s) and self.more:
            self.made, self.more = 0, False  # for those that broke meanwhile: all the delays once more
        self.again_at = now + self.delays_s[self.made] if self.made < len(self.delays_s) else None
        return True
