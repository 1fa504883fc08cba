"""Which requests run out of time, and when."""

from __future__ import annotations

import heapq

from .requests import RequestRecord


class Deadlines:
    """A heap of deadlines. Ended requests stay in it until their time comes or they are the larger part of it."""

    def __init__(self) -> None:
        """Make an empty one."""
        self._heap: list[tuple[float, int, RequestRecord]] = []
        self._added = 0

    def add(self, record: RequestRecord) -> None:
        """Watch the request, if it has a deadline."""
        if record.deadline_at is not None:
            self._added += 1  # breaks ties, since records do not compare
            heapq.heappush(self._heap, (record.deadline_at, self._added, record))

    def expired(self, now: float) -> list[RequestRecord]:
        """Take out the requests whose time has come; those that have ended are among them."""
        records = []
        while self._heap and self._heap[0][0] <= now:
            records.append(heapq.heappop(self._heap)[2])
        return records

    def next(self) -> float | None:
        """Return the earliest deadline."""
        return self._heap[0][0] if self._heap else None

    def compact(self, live: int, is_live: dict[bytes, RequestRecord]) -> None:
        """Drop ended requests when they are more than the `live` ones: a deadline an hour ahead must not keep the
        records of an hour."""
        if len(self._heap) > 2 * live + 64:
            self._heap = [entry for entry in self._heap if is_live.get(entry[2].id) is entry[2]]
            heapq.heapify(self._heap)
