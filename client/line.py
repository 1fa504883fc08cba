"""The requests that wait for a broker, in the order in which they were submitted, however often they come back."""

from __future__ import annotations

import heapq

#: Those who have left are swept out when they are more than this, and more than those who stay.
_SWEPT_FROM = 1024


class Line:
    """Who waits, by turn."""

    def __init__(self) -> None:
        """Begin without anybody."""
        self._heap: list[tuple[int, bytes]] = []
        #: Who stands in the heap and has left.
        self._gone: set[bytes] = set()
        self._turns = 0

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._heap) - len(self._gone)

    def draw(self) -> int:
        """Return the turn of somebody new."""
        self._turns += 1
        return self._turns

    def join(self, turn: int, key: bytes) -> None:
        """Wait, before all with a later turn; whoever has left the line does not come back to it."""
        heapq.heappush(self._heap, (turn, key))

    def pop(self) -> bytes:
        """Return and remove the first of those who wait."""
        while True:
            _, key = heapq.heappop(self._heap)
            if key not in self._gone:
                return key
            self._gone.remove(key)

    def leave(self, key: bytes) -> None:
        """Wait no longer, wherever in the line that is."""
        self._gone.add(key)
        if len(self._gone) > max(_SWEPT_FROM, len(self)):
            self._heap = [entry for entry in self._heap if entry[1] not in self._gone]
            heapq.heapify(self._heap)
            self._gone.clear()
