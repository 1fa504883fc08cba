"""An engine with a common beat, as a batch on one device has: `--engine beat_engine:BeatEngine`.

The synthetic engine gives each stream a pace of its own, which begins when it comes: its steps are many and small.
"""

from __future__ import annotations

import os
import time

from tokenmq.worker.engines.base import Output
from tokenmq.worker.engines.synthetic import SyntheticEngine

#: The environment's variable with the steps a second.
STEPS = "BEAT_STEPS_PER_S"


class BeatEngine(SyntheticEngine):
    """Brings one token of each stream with each beat."""

    def __init__(self, model: str, name: str, slots: int) -> None:
        """Make one; `model` is no more than a name here."""
        super().__init__(name=name, slots=slots)
        self._period_s = 0.0  # of the engine below: all streams advance in each step
        self._beat_s = 1.0 / float(os.environ[STEPS])
        self._next = time.monotonic()

    def step(self) -> list[Output]:
        """Wait for the beat, then step."""
        now = time.monotonic()
        self._next = max(self._next + self._beat_s, now - self._beat_s)  # one that is late does not race
        time.sleep(max(0.0, self._next - now))
        return list(super().step())
