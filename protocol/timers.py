"""One deadline for each of many ids: a heap whose cancelled entries are left to be found later."""

from __future__ import annotations

import heapq


class Timers:
    """Deadlines by id. Setting and dropping cost O(log n) and O(1), whatever the number of open requests."""

    def __init__(self) -> None:
        """Make it empty."""
        self._when: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def __contains__(self, key: bytes) -> bool:
        """Tell whether the id has a deadline."""
        return key in self._when

    def __len__(self) -> int:
        """Return how many ids have a deadline."""
        return len(self._when)

    def set(self, key: bytes, when: float) -> None:
        """Give the id this deadline, in the place of an earlier one."""
        self._when[key] = when
        heapq.heappush(self._heap, (when, key))
        self._tidy()

    def drop(self, key: bytes) -> None:
        """Take the id's deadline away; none is fine too."""
        self._when.pop(key, None)
        self._tidy()

    def _tidy(self) -> None:
        # Entries that nobody looks at are thrown away before they outnumber the others.
        if len(self._heap) > 64 + 2 * len(self._when):
            self._heap = [(when, found) for found, when in self._when.items()]
            heapq.heapify(self._heap)

    def due(self, now: float) -> list[bytes]:
        """Take out and return the ids whose deadline has come, earliest first."""
        found = []
        while (when := self.next()) is not None and when <= now:
            key = heapq.heappop(self._heap)[1]
            del self._when[key]
            found.append(key)
        return found

    def next(self) -> float | None:
        """Return the earliest deadline, None where there is none."""
        while self._heap:
            when, key = self._heap[0]
            if self._when.get(key) == when:
                return when
            heapq.heappop(self._heap)
        return None
