"""The waiting rooms: per model, fair between clients, by priority, bounded in number and in bytes.

**Classes.** Requests that resume a stream are one class, above all others: they had a slot already, and their readers
wait in mid-sentence. Each priority is one more. The class with the most urgent next request goes first: the greater
the class the earlier, but waiting counts, too, so that none starves. It counts how long the *client* went without
being served there: old requests of one that is served all the time are no reason to lift them over others.

**Shares.** Within a class clients share by tokens, see fairness.py.

**Places.** In a full room a newcomer may take the place of another client's request, of the lowest priority and the
latest, if that client keeps at least as much as the newcomer's then has: requests where their number is the limit,
bytes where bytes are (then of as many requests as it takes). Hence clients with equal parts never push each other
out. Else it may take the place of its own client's requests of lower priority. Those that resume have places of their
own.

`first` changes nothing; what it passes over because no free worker may take it keeps its tag, and comes first later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from .fairness import ShareClass
from .places import Places
from .requests import RequestRecord

#: Prompts and images that may wait for one model, whatever their number; as much again of requests that resume.
MAX_WAITING_BYTES = 1024 * 1024 * 1024
#: So long a client must go without being served to be lifted by one priority.
AGEING_S = 10.0
#: The class of requests that resume, on the scale of priorities (0 to 9): 110 s ahead of the greatest.
_RESUMED = 20
#: Before there is a measured rate, a caller that was turned away is told to come back after this.
_FIRST_RETRY_S = 1.0
_LEAST_RETRY_S = 0.05
_MOST_RETRY_S = 30.0
#: Weight of the newest interval in the smoothed one: the last ten or so count.
_SMOOTHING = 0.2
#: What a rate is computed from at least: slots that become free at once would make it infinite.
_LEAST_INTERVAL_S = 1e-6


class WaitingRoom:
    """Requests of one model that wait for a slot.

    To let one wait, to find the next and to take one out takes a binary search among the clients; looking further
    because something is not servable takes as long as it is far.
    """

    def __init__(
        self,
        limit: int,
        weight_of: Callable[[str], float] = lambda share: 1.0,
        running_of: Callable[[str], int] = lambda share: 0,
    ) -> None:
        """Make a room for `limit` requests, and as many that resume.

        Args:
            limit: how many; 0 lets nobody wait.
            weight_of: how much of the workers a share gets in relation to others, greater than 0. Asked when the
                share begins to wait.
            running_of: how many requests of a share run; of two whose turn it is, the one with fewer is served.
        """
        self.limit = limit
        self._weight_of = weight_of
        self._running_of = running_of
        self._classes: dict[int, ShareClass] = {}
        self._fresh = Places()
        self._resumed = Places()
        self._requests_of: Counter[str] = Counter()
        self._arrivals = 0
        self._left_at: float | None = None
        self._interval_s: float | None = None
        #: When the one who was turned away last is to come back.
        self._back_at = -math.inf

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return self._fresh.taken + self._resumed.taken

    def __bool__(self) -> bool:
        """Tell whether anything waits."""
        return bool(self._classes)

    def __iter__(self) -> Iterator[RequestRecord]:
        """Iterate by class, the greatest first, then by share, then in the order of arrival."""
        return chain.from_iterable(self._classes[level] for level in sorted(self._classes, reverse=True))

    @property
    def bytes(self) -> int:
        """The size of all that waits."""
        return self._fresh.bytes + self._resumed.bytes

    def resumed(self) -> list[RequestRecord]:
        """Return those that resume a stream."""
        return list(self._classes.get(_RESUMED, ()))

    def admit(self, record: RequestRecord) -> list[RequestRecord] | None:
        """Let a request wait, if need be in the place of others.

        Args:
            record: the request; its share, priority and size stay what they are while it waits.

        Returns:
            Those that had to leave for it; they wait no more, and somebody must tell their clients. None where it has
            no place itself: then nothing has changed.
        """
        pushed_out = self._in_the_way_of(record)
        if pushed_out is None:
            return None
        for each in pushed_out:
            self._take_out(each)
        level = _level(record)
        if level not in self._classes:
            self._classes[level] = ShareClass(self._weight_of, self._running_of)
        self._arrivals += 1
        self._classes[level].append(record, self._arrivals)
        self._places(record).take(record)
        self._requests_of[record.share] += 1
        return pushed_out

    def first(self, servable: Callable[[RequestRecord], bool]) -> tuple[float, RequestRecord] | None:
        """Return the next request. The time decides nothing: waiting makes all more urgent alike.

        Args:
            servable: whether a worker is free for a request; the others are passed over. It must follow from whether
                the request resumes, and from whom it avoids.

        Returns:
            Its urgency in seconds, less for what is to be served sooner, comparable between rooms; and the request.
            None if nothing is servable.
        """
        best: tuple[float, int, RequestRecord] | None = None
        for level, each in self._classes.items():
            found = each.first(servable)
            if found is not None:
                urgency = found[0] - level * AGEING_S
                if best is None or (urgency, -level) < best[:2]:
                    best = urgency, -level, found[1]
        return best and (best[0], best[2])

    def forgive(self, worker: str) -> None:
        """Let nobody avoid a worker any longer: it has begun anew."""
        for each in self._classes.values():
            for share in each.shares.values():
                share.forgive(worker)

    def serve(self, record: RequestRecord, now: float) -> None:
        """Take out one because a worker takes it."""
        self._classes[_level(record)].serve(record, now)
        self._count_out(record)
        if self._left_at is not None:
            former_s = _FIRST_RETRY_S if self._interval_s is None else self._interval_s
            self._interval_s = former_s + _SMOOTHING * (now - self._left_at - former_s)
        # Only time in which somebody waited counts: an idle night says nothing of how fast places become free.
        self._left_at = now if self else None

    def remove(self, record: RequestRecord) -> None:
        """Take out one that will not be served."""
        self._take_out(record)
        if not self:
            self._left_at = None

    def turn_away(self, share: str, now: float) -> float:
        """Return seconds after which somebody who finds no place is to come back.

        Until all shares have had a turn; and each one who is turned away comes back one departure after the one
        before, since thousands that come back at one moment would be turned away again.

        Args:
            share: who asks; one more to share with where it has nothing waiting.
            now: the time.
        """
        interval_s = _FIRST_RETRY_S if self._interval_s is None else self._interval_s
        shares = len(self._requests_of) + (share not in self._requests_of)
        self._back_at = min(max(self._back_at, now) + interval_s, now + _MOST_RETRY_S)
        return min(max(interval_s * shares, self._back_at - now, _LEAST_RETRY_S), _MOST_RETRY_S)

    def summary(self, now: float) -> dict[str, Any]:
        """Return what an operator is to know of the room."""
        rate = None if self._interval_s is None else 1 / max(self._interval_s, _LEAST_INTERVAL_S)
        fresh = Counter(str(record.priority) for record in self if not record.resumed)
        return {
            "waiting": len(self),
            "bytes": self.bytes,
            "clients": len(self._requests_of),
            "oldest_s": max((now - record.arrived_at for record in self), default=0.0),
            "rate_per_s": rate,
            "by_priority": dict(fresh),
            "resumed": self._resumed.taken,
        }

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        for level, each in self._classes.items():
            each.validate()
            assert each, "an empty class is kept"
            assert all(_level(record) == level for record in each), "a request is in another class"
        records = list(self)
        self._fresh.validate([record for record in records if not record.resumed])
        self._resumed.validate([record for record in records if record.resumed])
        assert self._requests_of == Counter(record.share for record in records), "the requests of a share are wrong"
        assert all(self._requests_of.values()), "a share is kept that has nothing"
        for places in (self._fresh, self._resumed):
            assert places.taken <= self.limit, "too many wait"
            assert places.bytes <= MAX_WAITING_BYTES, "too much waits"
        assert records or self._left_at is None, "time is counted in which nobody waits"

    # Who has to leave for whom.

    def _in_the_way_of(self, record: RequestRecord) -> list[RequestRecord] | None:
        places = self._places(record)
        excess = places.bytes + record.size_bytes - MAX_WAITING_BYTES
        if excess > 0:
            return self._too_large(record, places, excess)  # who leaves for its size leaves a place as well
        if places.taken >= self.limit:
            return self._one_too_many(record, places)
        return []

    def _one_too_many(self, record: RequestRecord, places: Places) -> list[RequestRecord] | None:
        if not places.taken:
            return None
        rival, number = places.most_requests()
        # Both have as many afterwards, or the rival has more. So it is another share, and it has more than one.
        if number - 1 >= places.number_of.get(record.share, 0) + 1:
            return [next(self._latest_first(rival, self._levels(record)))]
        return list(islice(self._less_important(record), 1)) or None

    def _too_large(self, record: RequestRecord, places: Places, excess: int) -> list[RequestRecord] | None:
        rival, most = max(places.bytes_of.items(), key=itemgetter(1), default=(record.share, 0))
        spare = most - places.bytes_of.get(record.share, 0) - record.size_bytes
        theirs = self._latest_first(rival, self._levels(record)) if spare >= excess else iter(())
        for candidates, bound in ((theirs, float(spare)), (self._less_important(record), math.inf)):
            chosen = _fewest(candidates, excess)
            if chosen and sum(each.size_bytes for each in chosen) <= bound:
                return chosen
        return None

    def _less_important(self, record: RequestRecord) -> Iterator[RequestRecord]:
        """Iterate over what waits of the same share with a lower priority."""
        levels = [level for level in self._levels(record) if level < record.priority]
        return self._latest_first(record.share, levels)

    def _latest_first(self, share: str, levels: Iterable[int]) -> Iterator[RequestRecord]:
        for level in levels:
            mine = self._classes[level].shares.get(share)
            if mine is not None:
                yield from reversed(mine.records)

    def _levels(self, record: RequestRecord) -> list[int]:
        """Return the classes that have places in common with the request's, in ascending order."""
        if record.resumed:
            return [level for level in self._classes if level == _RESUMED]
        return sorted(level for level in self._classes if level != _RESUMED)

    # Inside.

    def _take_out(self, record: RequestRecord) -> None:
        self._classes[_level(record)].remove(record)
        self._count_out(record)

    def _count_out(self, record: RequestRecord) -> None:
        level = _level(record)
        if not self._classes[level]:
            del self._classes[level]
        self._places(record).release(record)
        self._requests_of[record.share] -= 1
        if not self._requests_of[record.share]:
            del self._requests_of[record.share]

    def _places(self, record: RequestRecord) -> Places:
        return self._resumed if record.resumed else self._fresh


def _level(record: RequestRecord) -> int:
    return _RESUMED if record.resumed else record.priority


def _fewest(candidates: Iterable[RequestRecord], excess: int) -> list[RequestRecord]:
    """Return the first that free so many bytes, but for those that are not needed; [] if all of them are too few."""
    chosen: list[RequestRecord] = []
    freed = 0
    for each in candidates:
        if freed >= excess:
            break
        chosen.append(each)
        freed += each.size_bytes
    if freed < excess:
        return []
    for each in sorted(chosen, key=lambda record: record.size_bytes):
        if freed - each.size_bytes >= excess:
            chosen.remove(each)
            freed -= each.size_bytes
    return chosen
