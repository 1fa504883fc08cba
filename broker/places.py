"""Who has how many places of a waiting room, and how many bytes of it."""

from __future__ import annotations

from collections import Counter

from .requests import RequestRecord


class Places:
    """Who has how many of the places, and of the bytes."""

    def __init__(self) -> None:
        """Have all places free."""
        self.taken = 0
        self.bytes = 0
        self.number_of: dict[str, int] = {}
        self.bytes_of: dict[str, int] = {}
        #: The shares by their number of requests, and the greatest such number: the one with most is found at once.
        self._by_number: dict[int, dict[str, None]] = {}
        self._most = 0

    def take(self, record: RequestRecord) -> None:
        """Count a request in."""
        self.taken += 1
        self.bytes += record.size_bytes
        self.bytes_of[record.share] = self.bytes_of.get(record.share, 0) + record.size_bytes
        number = self._move(record.share, +1)
        self._most = max(self._most, number)

    def release(self, record: RequestRecord) -> None:
        """Count a request out."""
        self.taken -= 1
        self.bytes -= record.size_bytes
        self.bytes_of[record.share] -= record.size_bytes
        number = self._move(record.share, -1)
        if self._most not in self._by_number:
            self._most = number
        if not number:
            del self.bytes_of[record.share]

    def most_requests(self) -> tuple[str, int]:
        """Return the share with most requests, of several the latest that has got so many, and their number."""
        return next(reversed(self._by_number[self._most])), self._most

    def validate(self, records: list[RequestRecord]) -> None:
        """Check the counts against the requests that there are.

        Raises:
            AssertionError: they do not agree.
        """
        assert self.taken == len(records), "places do not add up"
        assert self.bytes == sum(record.size_bytes for record in records), "bytes do not add up"
        assert self.number_of == Counter(record.share for record in records), "the places of a share are wrong"
        bytes_of = dict.fromkeys(self.number_of, 0)
        for record in records:
            bytes_of[record.share] += record.size_bytes
        assert self.bytes_of == bytes_of, "the bytes of a share are wrong"
        found = {name: number for number, names in self._by_number.items() for name in names}
        assert found == self.number_of, "a share is filed wrongly"
        assert all(self._by_number.values()), "an empty file is kept"
        assert self._most == max(self.number_of.values(), default=0), "another share has most"

    def _move(self, share: str, change: int) -> int:
        number = self.number_of.get(share, 0)
        if number:
            del self._by_number[number][share]
            if not self._by_number[number]:
                del self._by_number[number]
        number += change
        if number:
            self.number_of[share] = number
            self._by_number.setdefault(number, {})[share] = None
        else:
            del self.number_of[share]
        return number
