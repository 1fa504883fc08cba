"""The waiting room against a naive model: who waits in which line, what each share was served, who may push whom out.

The model keeps plain lists and knows no tags. What it checks of fairness is the bound of the paper: as long as two
shares both wait in one class, what they are served, by their weights, differs by no more than one request of each.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import inf
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenmq.broker import queue
from tokenmq.broker.queue import AGEING_S, WaitingRoom
from tokenmq.broker.requests import RequestRecord

SHARES = "abcde"
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 3.0, "d": 0.25, "e": 1.0}
RESUMED = 20
#: Places and bytes: either, neither or both may be short.
BOUNDS = [(7, 10_000), (12, 10_000), (0, 10_000), (1_000, 60), (1_000, 10_000), (8, 60)]
Line = tuple[int, str]


def level_of(record: RequestRecord) -> int:
    return RESUMED if record.resumed else record.priority


def line_of(record: RequestRecord) -> Line:
    return level_of(record), record.share


class Account:
    """What two shares were served while both waited: the greatest and the least difference so far."""

    def __init__(self) -> None:
        self.difference = self.greatest = self.least = 0.0

    def add(self, amount: float) -> None:
        self.difference += amount
        self.greatest = max(self.greatest, self.difference)
        self.least = min(self.least, self.difference)


class Books(RuleBasedStateMachine):
    """A room, the model's books of it, and what must hold at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = mock.patch.object(queue, "MAX_WAITING_BYTES", 0)
        self.patch.start()
        self.now = 0.0
        self.number = 0
        self.room = WaitingRoom(0)
        self.limit = self.max_bytes = 0
        #: In the order of arrival; only lines in which somebody waits.
        self.lines: dict[Line, list[RequestRecord]] = {}
        self.served_at: dict[Line, float] = {}
        self.accounts: dict[tuple[int, str, str], Account] = {}
        #: The costliest request by line, since the class was last empty.
        self.dearest: dict[Line, float] = {}
        #: Classes in which somebody was passed over: fairness there is no promise until they are empty.
        self.passed_over: set[int] = set()

    def teardown(self) -> None:
        self.patch.stop()

    def open(self, limit: int, max_bytes: int) -> None:
        self.limit, self.max_bytes = limit, max_bytes
        queue.MAX_WAITING_BYTES = max_bytes
        self.room = WaitingRoom(limit, WEIGHTS.__getitem__)

    def record(
        self, share: str, priority: int, tokens: int, size_bytes: int = 0, resumes: bool = False
    ) -> RequestRecord:
        self.number += 1
        return RequestRecord(
            self.number.to_bytes(16, "big"), "m", 1, None, b"r" * 16, None, size_bytes, self.now,
            prior_tokens=int(resumes), share=share, priority=priority, expected_tokens=tokens,
            avoid=frozenset({f"w{self.number % 7}"}),
        )  # fmt: skip

    # What happens.
    @precondition(lambda self: self.lines)
    @rule(times=st.integers(1, 8))
    def serve(self, times: int) -> None:
        for _ in range(min(times, len(self.room))):
            found = self.room.first(lambda record: True)
            assert found is not None
            record = found[1]
            line = line_of(record)
            assert record is self.lines[line][0], "a share is out of order"
            self.check_urgency(*found)
            self.charge(record)
            self.room.serve(record, self.now)
            self.served_at[line] = self.now
            self.drop(record)

    @precondition(lambda self: self.lines)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from([each for records in self.lines.values() for each in records]))
        self.room.remove(record)
        self.drop(record)

    @rule(seconds=st.sampled_from([0.1, 3.0, 15.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    # What must hold.

    @invariant()
    def holds_together(self) -> None:
        self.room.validate()
        waiting = [record for records in self.lines.values() for record in records]
        assert set(self.room) == set(waiting)
        assert len(self.room) == len(waiting)
        assert self.room.bytes == sum(record.size_bytes for record in waiting)
        assert set(self.room.resumed()) == {record for record in waiting if record.resumed}
        summary = self.room.summary(self.now)
        assert summary["clients"] == len({record.share for record in waiting})
        assert summary["oldest_s"] == max((self.now - record.arrived_at for record in waiting), default=0.0)
        assert all(0.05 <= self.room.turn_away(share, self.now) <= 30.0 for share in SHARES)

    @invariant()
    def is_fair(self) -> None:
        for (level, one, other), account in self.accounts.items():
            if level not in self.passed_over:
                bound = self.dearest[level, one] / WEIGHTS[one] + self.dearest[level, other] / WEIGHTS[other]
                assert account.greatest - account.least <= bound + 1e-6, f"{one} and {other} in {level}"

    def urgency(self, record: RequestRecord) -> float:
        since = max(record.arrived_at, self.served_at.get(line_of(record), -inf))
        return since - level_of(record) * AGEING_S

    def check_urgency(self, urgency: float, record: RequestRecord) -> None:
        assert urgency == self.urgency(record)
        for level in {level for level, _ in self.lines}:
            heads = [records[0] for (at, _), records in self.lines.items() if at == level]
            # Another class has at least one share that may be its next and is not more urgent.
            assert level == level_of(record) or max(map(self.urgency, heads)) >= urgency

    # The model's books.

    def file(self, record: RequestRecord) -> None:
        line = line_of(record)
        level, share = line
        cost = float(record.cost_tokens)
        self.dearest[line] = max(self.dearest.get(line, 0.0), cost)
        if line not in self.lines:
            for other in {share for at, share in self.lines if at == level}:
                one, two = sorted((share, other))
                self.accounts[level, one, two] = Account()
        self.lines.setdefault(line, []).append(record)

    def drop(self, record: RequestRecord) -> None:
        line = line_of(record)
        level, share = line
        self.lines[line].remove(record)
        if self.lines[line]:
            return
        del self.lines[line]
        for one, two in combinations(SHARES, 2):
            if share in (one, two):
                self.accounts.pop((level, one, two), None)
        if not any(at == level for at, _ in self.lines):
            self.passed_over.discard(level)
            self.dearest = {line: cost for line, cost in self.dearest.items() if line[0] != level}

    def charge(self, record: RequestRecord) -> None:
        level, share = line_of(record)
        amount = record.cost_tokens / WEIGHTS[share]
        for (at, one, two), account in self.accounts.items():
            if at == level and share in (one, two):
                account.add(amount if share == one else -amount)


class WaitingRoomMachine(Books):
    """Requests of all kinds come, are served and leave in any order; places are short."""

    @initialize(bounds=st.sampled_from(BOUNDS))
    def begin(self, bounds: tuple[int, int]) -> None:
        self.open(*bounds)

    @rule(
        share=st.sampled_from(SHARES),
        priority=st.sampled_from([0, 5, 5, 5, 9]),
        tokens=st.one_of(st.integers(1, 3), st.integers(1, 1000)),
        size_bytes=st.one_of(st.integers(0, 3), st.integers(0, 40)),
        resumes=st.integers(0, 4).map(lambda drawn: drawn == 0),
    )
    def come(self, share: str, priority: int, tokens: int, size_bytes: int, resumes: bool) -> None:
        record = self.record(share, priority, tokens, size_bytes, resumes)
        before = list(self.room)
        company = self.company(record)
        pushed_out = self.room.admit(record)
        if len(company) < self.limit and self.excess(company, record) <= 0:
            assert pushed_out == [], "there was room"
        elif self.excess(company, record) <= 0:
            self.check_number(record, company, pushed_out)
        else:
            self.check_bytes(record, company, pushed_out)
        if pushed_out is None:
            assert list(self.room) == before
            return
        for each in pushed_out:
            self.drop(each)
        self.file(record)

    @precondition(lambda self: self.lines)
    @rule(blocked=st.sets(st.integers(0, 6)), serve=st.booleans())
    def serve_what_can_be_served(self, blocked: set[int], serve: bool) -> None:
        def servable(record: RequestRecord) -> bool:
            return not any(f"w{number}" in record.avoid for number in blocked)

        candidates = [record for records in self.lines.values() for record in records if servable(record)]
        found = self.room.first(servable)
        assert (found is None) == (not candidates), "something servable is not found"
        if found is None:
            return
        record = found[1]
        line = line_of(record)
        assert record is next(each for each in self.lines[line] if servable(each)), "a share is out of order"
        assert found[0] == self.urgency(record)
        if serve:
            self.passed_over.add(line[0])
            self.room.serve(record, self.now)
            self.served_at[line] = self.now
            self.drop(record)

    @rule(number=st.integers(0, 6))
    def forgive(self, number: int) -> None:
        self.room.forgive(f"w{number}")
        assert not any(f"w{number}" in record.avoid for record in self.room)

    # Who may push whom out.

    def company(self, record: RequestRecord) -> list[RequestRecord]:
        """What has its places in common with the request, the first to leave first."""
        levels = [RESUMED] if record.resumed else range(10)
        found = [each for (level, _), records in self.lines.items() if level in levels for each in records]
        return sorted(found, key=lambda each: (level_of(each), -int.from_bytes(each.id, "big")))

    def excess(self, company: list[RequestRecord], record: RequestRecord) -> int:
        return sum(each.size_bytes for each in company) + record.size_bytes - self.max_bytes

    def check_number(
        self, record: RequestRecord, company: list[RequestRecord], pushed_out: list[RequestRecord] | None
    ) -> None:
        number = Counter(each.share for each in company)
        most = max(number.values(), default=0)
        lower = [each for each in company if each.share == record.share and level_of(each) < level_of(record)]
        if most - 1 >= number[record.share] + 1:
            richest = {share for share in number if number[share] == most}
            expected = [next(each for each in company if each.share == share) for share in richest]
            assert pushed_out is not None
            assert pushed_out in [[each] for each in expected], "another one should have left"
        else:
            assert pushed_out == (lower[:1] or None)

    def check_bytes(
        self, record: RequestRecord, company: list[RequestRecord], pushed_out: list[RequestRecord] | None
    ) -> None:
        excess = self.excess(company, record)
        size = Counter[str]()
        for each in company:
            size[each.share] += each.size_bytes
        mine = size[record.share] + record.size_bytes
        lower = [each for each in company if each.share == record.share and level_of(each) < level_of(record)]
        if pushed_out is None:
            assert sum(each.size_bytes for each in lower) < excess, "its own of lower priority should have left"
            for share in [share for share in size if size[share] == max(size.values())]:
                largest = max(each.size_bytes for each in company if each.share == share)
                assert size[share] - mine < excess + largest, "who has most should have made room"
            return
        freed = sum(each.size_bytes for each in pushed_out)
        assert freed >= excess
        assert all(freed - each.size_bytes < excess for each in pushed_out), "one left for nothing"
        (rival,) = {each.share for each in pushed_out}
        if rival == record.share:
            assert set(pushed_out) <= set(lower)
        else:
            assert size[rival] == max(size.values())
            assert size[rival] - freed >= mine, "one was left with less than the newcomer got"


class FairnessMachine(Books):
    """Clients of one priority come with as much as they like, and somebody always waits."""

    @initialize()
    def begin(self) -> None:
        self.open(100_000, 1)

    @rule(
        share=st.sampled_from(SHARES),
        number=st.integers(1, 10),
        tokens=st.one_of(st.integers(1, 20), st.integers(1, 1000), st.just(100_000)),
    )
    def come(self, share: str, number: int, tokens: int) -> None:
        for _ in range(number):
            record = self.record(share, 5, tokens)
            assert self.room.admit(record) == []
            self.file(record)


TestWaitingRoomMachine = WaitingRoomMachine.TestCase
TestWaitingRoomMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)

TestFairnessMachine = FairnessMachine.TestCase
TestFairnessMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
