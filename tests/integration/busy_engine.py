"""An engine whose steps last for seconds, as a first compilation does; `--engine busy_engine:BusyEngine`."""

from __future__ import annotations

import os
import time

from tokenmq.worker.engines.base import Output
from tokenmq.worker.engines.synthetic import SyntheticEngine


class BusyEngine(SyntheticEngine):
    """Sleeps in its first step, for as long as BUSY_S says."""

    def __init__(self, model: str, name: str, slots: int) -> None:
        """Make one; `model` is no more than a name here."""
        super().__init__(name=name, slots=slots)
        self._pause_s = float(os.environ["BUSY_S"])

    def step(self) -> list[Output]:
        """Sleep once, then step."""
        pause_s, self._pause_s = self._pause_s, 0.0
        time.sleep(pause_s)
        return list(super().step())
