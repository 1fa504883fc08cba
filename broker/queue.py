"""The waiting rooms: per model, first in first out, bounded in number and in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from .requests import RequestRecord

#: Prompts and images that one model's waiting room may hold, whatever their number.
MAX_WAITING_BYTES = 1024 * 1024 * 1024
#: Before there is a measured rate, a caller that was turned away is told to come back after this.
_FIRST_RETRY_S = 1.0
_LEAST_RETRY_S = 0.05
_MOST_RETRY_S = 30.0
#: Weight of the newest interval in the smoothed one: the last ten or so count.
_SMOOTHING = 0.2


class WaitingRoom:
    """Requests of one model that wait for a slot. Every operation takes constant time."""

    def __init__(self, limit: int) -> None:
        """Make a room for `limit` requests."""
        self.limit = limit
        self.bytes = 0
        self._records: OrderedDict[bytes, RequestRecord] = OrderedDict()
        self._left_at: float | None = None
        self._interval_s = _FIRST_RETRY_S

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._records)

    def __iter__(self) -> Iterator[RequestRecord]:
        """Iterate from the one that has waited longest."""
        return iter(self._records.values())

    def has_place_for(self, record: RequestRecord) -> bool:
        """Tell whether the request fits."""
        return len(self._records) < self.limit and self.bytes + record.size_bytes <= MAX_WAITING_BYTES

    def append(self, record: RequestRecord) -> None:
        """Let the request wait, behind all others."""
        self._records[record.id] = record
        self.bytes += record.size_bytes

    def first(self) -> RequestRecord:
        """Return the one that has waited longest."""
        return next(iter(self._records.values()))

    def pop(self, now: float) -> RequestRecord:
        """Take out the one that has waited longest, because a slot is free."""
        record = self._records.popitem(last=False)[1]
        self.bytes -= record.size_bytes
        if self._left_at is not None:
            self._interval_s += _SMOOTHING * (now - self._left_at - self._interval_s)
        # Only time in which somebody waited counts: an idle night says nothing of how fast places become free.
        self._left_at = now if self._records else None
        return record

    def remove(self, record: RequestRecord) -> None:
        """Take out one that will not be served."""
        del self._records[record.id]
        self.bytes -= record.size_bytes
        if not self._records:
            self._left_at = None

    def retry_after_s(self) -> float:
        """Return seconds until a place is likely to be free: the smoothed time between two that left."""
        return min(max(self._interval_s, _LEAST_RETRY_S), _MOST_RETRY_S)
