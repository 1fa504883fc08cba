"""The rounds of an I/O loop: one time for everything in a round, and how much later it began than it was to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .pump import MAX_WAIT_S, Pump

#: A loop that is this much later than it meant to be was stopped or starved: nobody is given up for it.
LATE_S = 0.5


class Rounds:
    """Waits for a pump, and keeps the time.

    Attributes:
        now: when the present round began, in seconds of the clock.
        late_s: how much later that was than it was to be; 0 where it is not worth speaking of.
    """

    def __init__(self, pump: Pump, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin the first round now."""
        self._pump = pump
        self._clock = clock
        self.now = clock()
        self.late_s = 0.0

    def wait(self, until: float | None) -> dict[Any, int]:
        """Begin the next round at a time, None for the latest there is, or as soon as something is ready.

        Returns:
            What is ready, as `Pump.wait` does.
        """
        wait_s = MAX_WAIT_S if until is None else min(max(0.0, until - self._clock()), MAX_WAIT_S)
        ready = self._pump.wait(wait_s)
        # From one time to the next: the process may be stopped, or this thread kept from the interpreter, anywhere.
        before, self.now = self.now, self._clock()
        late_s = self.now - before - wait_s
        self.late_s = late_s if late_s > LATE_S else 0.0
        return ready
