"""An engine whose model's name tells what its process may use; `--engine threads_engine:ThreadsEngine`."""

from __future__ import annotations

import os

from tokenmq.protocol.messages import ModelInfo
from tokenmq.worker.engines.synthetic import SyntheticEngine


class ThreadsEngine(SyntheticEngine):
    """Serves `MODEL-THREADS`."""

    def __init__(self, model: str, name: str, slots: int) -> None:
        """Make one; `model` is no more than a name here."""
        super().__init__(name=name, slots=slots)

    def load(self) -> list[ModelInfo]:
        """Return the one model."""
        return [ModelInfo(f"{self._model}-{os.environ.get('OMP_NUM_THREADS')}")]
