"""Shares of one priority: start-time fair queueing between clients. Knows nothing of priorities, places or workers.

Within a class clients share by tokens: start-time fair queueing (Goyal, Vin, Cheng 1996). Who waits has a
start tag, and the least is next. Being served moves it on by the request's tokens over the share's weight; who comes
back after a while begins at the virtual time, so nobody saves up credit by staying away. Deficit round robin would
need a quantum: one below the largest request goes round in loops that serve nobody, one above it lets a share with
short requests send a burst of a million tokens. Tags need none and take one binary search, and two clients that both
wait never differ by more than one request of each. Of equal tags, the client with less running goes first: a flood
has most slots already when somebody else comes.

The paper's virtual time, the start tag served last, has a flaw where clients come for one request each and go: all
get the same tag, and who has been served once starves behind them (their tags could never be forgotten, either). So
newcomers begin at the *fluid* time: each request moves it on by its tokens over the weight of all who wait, as if all
were served at once (the idea of WF2Q+, Bennett and Zhang 1996). It puts nobody back by more than his own request, and
so the bound above holds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from operator import itemgetter

from .requests import RequestRecord

#: Whom the requests of one client may avoid, in so many different ways: a few failed workers make a few.
_MOST_LINES = 16


class Share:
    """One client in one class.

    Attributes:
        records: what waits, in the order of arrival, each with its number among all arrivals.
        lines: the same by whom the requests avoid. Nothing else tells them apart when workers are free for some and
            not for others, so that only the first of each line has to be looked at.
        finish: the finish tag of what was served last.
        tag: the start tag of the next one; `finish` while nothing waits.
        running: requests of the client that ran when its next one came to be the next.
        weight: how much of the class is the client's; as of when it began to wait.
        served_at: when a request of it was served here.
    """

    __slots__ = ("finish", "lines", "records", "running", "served_at", "tag", "weight")

    def __init__(self) -> None:
        """Have nothing waiting, and nothing served."""
        self.records: OrderedDict[RequestRecord, int] = OrderedDict()
        self.lines: dict[frozenset[str], OrderedDict[RequestRecord, None]] = {}
        self.finish = self.tag = 0.0
        self.running = 0
        self.weight = 1.0
        self.served_at = -math.inf

    def add(self, record: RequestRecord, number: int) -> None:
        """Let a request wait behind the others."""
        if record.avoid not in self.lines and len(self.lines) >= _MOST_LINES:
            record.avoid = frozenset()  # no more than a wish, and this one is costly
        self.records[record] = number
        self.lines.setdefault(record.avoid, OrderedDict())[record] = None

    def drop(self, record: RequestRecord) -> None:
        """Take a request out."""
        del self.records[record]
        line = self.lines[record.avoid]
        del line[record]
        if not line:
            del self.lines[record.avoid]

    def first(self, servable: Callable[[RequestRecord], bool]) -> RequestRecord | None:
        """Return the first request that is servable."""
        heads = [next(iter(line)) for line in self.lines.values()]
        if len(heads) > 1:
            heads.sort(key=self.records.__getitem__)
        return next((head for head in heads if servable(head)), None)

    def forgive(self, worker: str) -> None:
        """Avoid a worker no longer."""
        if any(worker in avoid for avoid in self.lines):
            self.lines = {}
            for record in self.records:
                record.avoid -= {worker}
                self.lines.setdefault(record.avoid, OrderedDict())[record] = None


class ShareClass:
    """The requests of one priority: start-time fair queueing. It is forgotten when nothing waits."""

    def __init__(self, weight_of: Callable[[str], float], running_of: Callable[[str], int]) -> None:
        """Have no shares; see `WaitingRoom` for the arguments."""
        self.shares: dict[str, Share] = {}
        self._weight_of = weight_of
        self._running_of = running_of
        #: Those that wait, by tag, then by what they have running (a flooder and a newcomer often have the same tag),
        #: then first come, first served. Sorted lists: to move a few kilobytes costs less than the dead entries of a
        #: heap, and they can be walked.
        self._order: list[tuple[float, int, int, str]] = []
        #: Those that do not, by tag: as soon as the virtual time is there, they are as good as strangers.
        self._idle: list[tuple[float, str]] = []
        #: The greatest start tag that was served.
        self._virtual_time = 0.0
        self._fluid_time = 0.0
        self._greatest_finish = 0.0
        #: How far what was served last moves it on, once it is done: when the next is served.
        self._fluid_step = 0.0
        #: Of all shares that wait.
        self._weight = 0.0

    def __bool__(self) -> bool:
        """Tell whether anything waits."""
        return bool(self._order)

    def __iter__(self) -> Iterator[RequestRecord]:
        """Iterate over all that waits, by share."""
        return chain.from_iterable(share.records for share in self.shares.values())

    def append(self, record: RequestRecord, number: int) -> None:
        """Let the request wait, behind all others of its share."""
        share = self.shares.get(record.share)
        if share is None:
            share = self.shares[record.share] = Share()
        elif not share.records:
            del self._idle[bisect_left(self._idle, (share.tag, record.share))]
        share.add(record, number)
        if len(share.records) == 1:
            share.weight = self._weight_of(record.share)
            share.tag = max(share.finish, self._joining_tag(record.cost_tokens / share.weight))
            self._weight += share.weight
            self._line_up(share, record.share, self._running_of(record.share))

    def first(self, servable: Callable[[RequestRecord], bool]) -> tuple[float, RequestRecord] | None:
        """Return the next request that is servable, and since when its client waits to be served."""
        for *_, name in self._order:
            share = self.shares[name]
            record = share.first(servable)
            if record is not None:
                return max(record.arrived_at, share.served_at), record
        return None

    def serve(self, record: RequestRecord, now: float) -> None:
        """Take the request out and charge it to its share."""
        share = self.shares[record.share]
        start, cost = share.tag, record.cost_tokens
        share.finish = start + cost / share.weight
        self._fluid_time = max(start, min(self._fluid_time + self._fluid_step, self._greatest_finish))
        self._fluid_step = cost / self._weight
        self._virtual_time = max(start, self._virtual_time)
        self._greatest_finish = max(share.finish, self._greatest_finish)
        share.served_at = now
        self._take_out(record, share, share.finish, self._running_of(record.share) + 1)
        self._forget_idle()

    def remove(self, record: RequestRecord) -> None:
        """Take the request out; its share pays nothing."""
        share = self.shares[record.share]
        self._take_out(record, share, share.tag, self._running_of(record.share))
        self._forget_idle()

    def validate(self) -> None:
        """Check every invariant of tags.

        Raises:
            AssertionError: one does not hold.
        """
        waiting = {name: share for name, share in self.shares.items() if share.records}
        heads = [_entry(share, name) for name, share in waiting.items()]
        assert self._order == sorted(heads), "the order is not that of the tags"
        idle = [(share.tag, name) for name, share in self.shares.items() if not share.records]
        assert self._idle == sorted(idle), "an idle share is lost or left over"
        assert all(tag > self._virtual_time for tag, _ in idle), "a share is kept that has nothing"
        assert math.isclose(self._weight, sum(share.weight for share in waiting.values())), "weights do not add up"
        assert self._virtual_time <= self._fluid_time <= self._greatest_finish, "time runs ahead of service"
        for name, share in waiting.items():
            numbers = list(share.records.values())
            assert numbers == sorted(numbers), "a share is out of order"
            assert share.tag >= share.finish, "a share does not pay for what was served"
            assert all(record.share == name for record in share.records), "a request is in another's share"
            for avoid, line in share.lines.items():
                assert list(line) == [record for record in share.records if record.avoid == avoid], "a line is wrong"
            assert sum(map(len, share.lines.values())) == len(share.records), "a request is in no line"
            assert all(share.lines.values()), "an empty line is kept"

    def _joining_tag(self, cost: float) -> float:
        if not self._order:
            return self._virtual_time
        return max(self._virtual_time, min(self._fluid_time, self._order[0][0] + cost))

    def _line_up(self, share: Share, name: str, running: int) -> None:
        share.running = running
        insort(self._order, _entry(share, name))

    def _take_out(self, record: RequestRecord, share: Share, tag: float, running: int) -> None:
        del self._order[bisect_left(self._order, _entry(share, record.share))]
        share.drop(record)
        if share.records:
            share.tag = tag
            self._line_up(share, record.share, running)
        else:
            share.tag = share.finish
            self._weight -= share.weight
            insort(self._idle, (share.tag, record.share))

    def _forget_idle(self) -> None:
        past = bisect_right(self._idle, self._virtual_time, key=itemgetter(0))
        for _, name in self._idle[:past]:
            del self.shares[name]
        del self._idle[:past]


def _entry(share: Share, name: str) -> tuple[float, int, int, str]:
    return share.tag, share.running, next(iter(share.records.values())), name
