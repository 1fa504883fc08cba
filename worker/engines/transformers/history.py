"""Which tokens a request has had, for the penalties: kept up to date from step to step, never counted anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class History:
    """The distinct tokens of one request, and how often its completion has each."""

    def __init__(self, *, with_prompt: bool) -> None:
        """Count from nothing.

        Args:
            with_prompt: the prompt's tokens are among them.
        """
        self._prompt_due = with_prompt
        self._taken = 0
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.zeros(64, np.float32)

    def follow(
        self, prompt: Sequence[int], generated: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Take what is new.

        Args:
            prompt: always the same.
            generated: longer each time, or as long.

        Returns:
            The tokens, each once, and how often the completion has each.
        """
        if self._prompt_due:
            self._prompt_due = False
            for token in dict.fromkeys(prompt):
                self._place(token)
        for token in generated[self._taken :]:
            place = self._place(token)  # first: it may make larger arrays
            self._counts[place] += 1
        self._taken = len(generated)
        return self._ids[: len(self._index)], self._counts[: len(self._index)]

    def _place(self, token: int) -> int:
        place = self._index.setdefault(token, len(self._index))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        return place
