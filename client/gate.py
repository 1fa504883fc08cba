"""How fast a client submits to a broker that has told it that it submits too much.

A gate is open until the broker refuses a request for the client's rate. From then on requests pass one by one:

    free --refused--> shut for what the broker asked --> paced: one request, then shut for 1/rate, and so on
      ^                              ^                                     |
      |                              +----------- refused: rate falls -----+
      +------------------- rate has grown beyond what matters -------------+

The rate falls by a part at a refusal and grows while there is none, so that it stays about where the broker's limit
is: a burst of many requests costs few refusals, and takes the time that the limit gives it.

Where the limit is on how many are open at a time, a place is free as soon as one of our own has ended. Which limit
it was, a refusal does not say. So for each request that ends, one more may pass early, before its time. One of these
that is refused nevertheless says nothing of the rate, but keeps others from trying for a while.

It knows no broker and no request, only times.
"""

from __future__ import annotations

import math
from collections import deque

#: A broker that names no time means: soon.
DEFAULT_PAUSE_S = 0.1
#: The rate after a refusal, as a part of what it was: near the limit, since it was within it before it grew.
_FALL = 0.75
#: Seconds in which the rate doubles. Until the second refusal nothing is known of the limit, so faster at first.
_FIRST_GROWTH_S = 0.25
_GROWTH_S = 2.0
#: Requests a second: less is said with longer pauses, and at more there is no gate.
_LEAST_RATE = 1.0
_MOST_RATE = 20_000.0
#: What a loop that is late may catch up on at once.
_CATCH_UP_S = 0.02
#: Nobody passes early for so long after one that did and was refused; doubled each time that this happens again soon.
_EARLY_PAUSE_S = 0.1
_EARLY_PAUSE_MAX_S = 3.2
#: Places that wait for somebody to pass early: of a rate that is limited, they know nothing, so no burst.
_MOST_PLACES = 16


class Gate:
    """The gate in front of one broker.

    Attributes:
        open: whether a request may pass; `tick` opens a gate whose time has come.
        moved_at: when the broker last took a request, as far as is known, or began to refuse; means something while
            the gate is not free.
    """

    def __init__(self) -> None:
        """Let everything pass."""
        self.open = True
        self.moved_at = -math.inf
        self._opens_at = -math.inf
        #: Requests a second at the last refusal; 0 while the gate is free.
        self._rate = 0.0
        self._refused_at = -math.inf
        self._growth_s = _FIRST_GROWTH_S
        #: Requests that have ended, and whose places nobody has taken early.
        self._places = 0
        #: From when on requests may pass early, and when the last ones did.
        self._early_from = -math.inf
        self._early_at: deque[float] = deque(maxlen=_MOST_PLACES)
        self._early_refused_at = -math.inf
        self._early_pause_s = _EARLY_PAUSE_S

    @property
    def free(self) -> bool:
        """Whether nothing is counted."""
        return not self._rate

    def refused(self, pause_s: float | None, left_at: float, now: float) -> None:
        """Take a refusal.

        Args:
            pause_s: how long the broker wants no request; None where it does not say.
            left_at: when the refused request passed: one that had passed when the rate fell last says nothing new.
            now: the time.
        """
        pause_s = DEFAULT_PAUSE_S if pause_s is None else max(pause_s, 1 / _MOST_RATE)
        if self.free:
            self.moved_at = now
            # One request may leave in the time that the broker named: the best guess there is.
            self._fall(1 / pause_s, _FIRST_GROWTH_S, now)
        elif left_at in self._early_at:
            self._no_more_early(now)
        elif left_at > self._refused_at:
            self._fall(self._present(now) * _FALL, _GROWTH_S, now)
        self._shut(max(self._opens_at, now + pause_s), now)

    def _no_more_early(self, now: float) -> None:
        if now >= self._early_from:  # of some that passed together, once
            again = now < self._early_refused_at + 4 * self._early_pause_s
            self._early_pause_s = min(2 * self._early_pause_s, _EARLY_PAUSE_MAX_S) if again else _EARLY_PAUSE_S
            self._early_refused_at = now
            self._early_from = now + self._early_pause_s
        self._places = 0

    def _fall(self, rate: float, growth_s: float, now: float) -> None:
        self._rate = min(max(rate, _LEAST_RATE), _MOST_RATE)
        self._growth_s = growth_s
        self._refused_at = now

    def _present(self, now: float) -> float:
        """Return the rate that it has grown to."""
        return self._rate * math.pow(2.0, min((now - self._refused_at) / self._growth_s, 30.0))

    def passed(self, now: float) -> None:
        """Count a request that leaves."""
        if self.free:
            return
        rate = self._present(now)
        if rate >= _MOST_RATE:
            self._rate = 0.0
            self._places = 0
        elif now < self._opens_at:
            self._places -= 1
            self._early_at.append(now)
            self._shut(max(self._opens_at, now + 1 / rate), now)
        else:
            self._shut(max(self._opens_at, now - _CATCH_UP_S) + 1 / rate, now)

    def _shut(self, until: float, now: float) -> None:
        self._opens_at = until
        self.open = self._due_at() <= now

    def _due_at(self) -> float:
        """Return when the next request may pass."""
        return min(self._opens_at, self._early_from) if self._places else self._opens_at

    def moved(self, now: float) -> None:
        """Note that the broker has taken a request, or has one of ours."""
        self.moved_at = now

    def freed(self, now: float) -> None:
        """Note that a request has ended which the broker had taken; `tick` lets another one have its place."""
        self.moved_at = now
        if not self.free:
            self._places = min(self._places + 1, _MOST_PLACES)

    def tick(self, now: float) -> bool:
        """Open it if it is time; tell whether that was now."""
        if self.open or now < self._due_at():
            return False
        self.open = True
        return True

    def next_deadline(self) -> float | None:
        """Return when `tick` opens it; None for never."""
        return None if self.open else self._due_at()
