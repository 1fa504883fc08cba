"""The waiting rooms: per model, first in first out, bounded in number and in bytes.

Requests that resume a stream have a line of their own, before the others: they had a slot already, and a reader waits
in mid-sentence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from .requests import RequestRecord

#: Prompts and images that one line of a model's waiting room may hold, whatever their number.
MAX_WAITING_BYTES = 1024 * 1024 * 1024
#: Before there is a measured rate, a caller that was turned away is told to come back after this.
_FIRST_RETRY_S = 1.0
_LEAST_RETRY_S = 0.05
_MOST_RETRY_S = 30.0
#: Weight of the newest interval in the smoothed one: the last ten or so count.
_SMOOTHING = 0.2


class _Line:
    """Requests in the order of their arrival, by key, and their size."""

    def __init__(self) -> None:
        self.records: OrderedDict[bytes, RequestRecord] = OrderedDict()
        self.bytes = 0

    def append(self, record: RequestRecord) -> None:
        self.records[record.key] = record
        self.bytes += record.size_bytes

    def remove(self, record: RequestRecord) -> None:
        del self.records[record.key]
        self.bytes -= record.size_bytes


class WaitingRoom:
    """Requests of one model that wait for a slot. Every operation takes constant time."""

    def __init__(self, limit: int) -> None:
        """Make a room for `limit` requests, and as many that resume."""
        self.limit = limit
        self._resumed = _Line()
        self._fresh = _Line()
        self._left_at: float | None = None
        self._interval_s = _FIRST_RETRY_S

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._resumed.records) + len(self._fresh.records)

    def __iter__(self) -> Iterator[RequestRecord]:
        """Iterate in the order in which they are to be served."""
        return chain(self._resumed.records.values(), self._fresh.records.values())

    @property
    def bytes(self) -> int:
        """The size of all that waits."""
        return self._resumed.bytes + self._fresh.bytes

    def resumed(self) -> list[RequestRecord]:
        """Return those that resume a stream."""
        return list(self._resumed.records.values())

    def has_place_for(self, record: RequestRecord) -> bool:
        """Tell whether the request fits."""
        line = self._line(record)
        return len(line.records) < self.limit and line.bytes + record.size_bytes <= MAX_WAITING_BYTES

    def append(self, record: RequestRecord) -> None:
        """Let the request wait, behind all others of its kind."""
        self._line(record).append(record)

    def serve(self, record: RequestRecord, now: float) -> None:
        """Take out one because a worker takes it."""
        self._line(record).remove(record)
        if self._left_at is not None:
            self._interval_s += _SMOOTHING * (now - self._left_at - self._interval_s)
        # Only time in which somebody waited counts: an idle night says nothing of how fast places become free.
        self._left_at = now if self else None

    def remove(self, record: RequestRecord) -> None:
        """Take out one that will not be served."""
        self._line(record).remove(record)
        if not self:
            self._left_at = None

    def retry_after_s(self) -> float:
        """Return seconds until a place is likely to be free: the smoothed time between two that left."""
        return min(max(self._interval_s, _LEAST_RETRY_S), _MOST_RETRY_S)

    def _line(self, record: RequestRecord) -> _Line:
        return self._resumed if record.resumed else self._fresh
