"""The scheduler alone: slots stay neighbours, the cache follows, first come is first served."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenmq.protocol.payload import Prior, Sampling
from tokenmq.worker.engines.transformers.scheduler import Move, Plan, Scheduler
from tokenmq.worker.engines.transformers.sequence import Sequence
from tokenmq.worker.engines.transformers.textstream import TextStream

from .conftest import make_tokenizer

BACKEND = make_tokenizer().backend_tokenizer


def sequence(ticket: int, tokens: int, known: int = 0, *, replay: bool = True) -> Sequence:
    sampling = Sampling(max_tokens=1000)
    made = Sequence(ticket, (1,) * tokens, sampling, frozenset(), 10_000, TextStream(BACKEND, ()), 0.0)
    if known:
        assert made.resume(Prior((5,) * known), replay=replay) == []
    return made


class Slots(RuleBasedStateMachine):
    """Drives a scheduler as the batch does, with a model of the cache: what each slot holds, column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(slots=3, budget=10)
        self.cache: list[list[tuple[int, int]]] = [[] for _ in range(3)]
        self.tickets = 0
        self.begun: list[int] = []

    def write(self, slot: int, row: Sequence, end: int) -> None:
        self.cache[slot] = self.cache[slot][: row.stored] + [(row.ticket, i) for i in range(row.stored, end)]
        row.stored = end

    def move(self, moves: list[Move]) -> None:
        for move in moves:
            self.cache[move.target] = self.cache[move.source][: move.tokens]

    @rule(tokens=st.integers(1, 35), known=st.sampled_from([0, 0, 1, 2, 5, 11, 30]), replay=st.booleans())
    def submit(self, tokens: int, known: int, replay: bool) -> None:
        self.scheduler.add(sequence(self.tickets, tokens, known, replay=replay))
        self.tickets += 1

    @rule(fails=st.booleans())
    def step(self, fails: bool) -> None:
        replays = self.scheduler.replays()
        used = sum(tokens for _, tokens in replays)
        assert used <= 10
        assert used == min(10, sum(row.behind for row in self.scheduler.running)), "all that the budget allows"
        for slot, tokens in replays:
            row = self.scheduler.running[slot]
            assert 0 < tokens <= row.behind, "the newest token is left to the decode"
            self.write(slot, row, row.stored + tokens)
        for slot, row in enumerate(self.scheduler.running):
            self.write(slot, row, row.stored + 1)
        running, slots = len(self.scheduler.running), self.scheduler.slots
        idle = self.scheduler.partial is None and running < slots and bool(self.scheduler.waiting)
        plan = self.scheduler.plan(used)
        newcomers = len(plan.whole) + (plan.chunk is not None and not plan.chunk.stored)
        assert newcomers <= max(0, slots - running), "nobody begins without a slot"
        work = plan.chunk_tokens + sum(len(row.head) for row in plan.whole)
        assert used + work <= 10
        assert used or work > 0 or not (idle or plan.chunk), "a free slot and a waiting prompt must give work"
        if plan.chunk is not None:
            whole_chunk = min(10, len(plan.chunk.head) - plan.chunk.stored)
            assert plan.chunk_tokens == whole_chunk, "its borders depend on the prompt's length alone"
        for row in ([plan.chunk] if plan.chunk and not plan.chunk.stored else []) + list(plan.whole):
            self.begun.append(row.ticket)
        if plan.chunk is not None:
            if fails:
                self.move(self.scheduler.remove(plan.chunk))
            else:
                self.write(len(self.scheduler.running), plan.chunk, plan.chunk.stored + plan.chunk_tokens)
                if plan.chunk.stored == len(plan.chunk.head):
                    self.scheduler.join(plan.chunk)
        for row in plan.whole[fails:]:
            self.write(len(self.scheduler.running), row, len(row.head))
            self.scheduler.join(row)
        for row in self.scheduler.running:
            if row.complete:
                row.generated.append(5)

    @rule(slots=st.integers(1, 5))
    def resize(self, slots: int) -> None:
        assert self.scheduler.resize(slots) == min(slots, 3)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = self.scheduler.find(data.draw(st.integers(0, self.tickets - 1)))
        if row is not None:
            self.move(self.scheduler.remove(row))
            assert self.scheduler.find(row.ticket) is None

    @invariant()
    def all_is_well(self) -> None:
        self.scheduler.validate()
        rows = [*self.scheduler.running, *([self.scheduler.partial] if self.scheduler.partial else [])]
        for slot, row in enumerate(rows):
            assert self.cache[slot][: row.stored] == [(row.ticket, i) for i in range(row.stored)]
        assert self.begun == sorted(self.begun), "first come, first served"


Slots.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSlots = Slots.TestCase


def test_a_leaving_row_is_replaced_by_the_last_and_that_by_the_partial_one() -> None:
    scheduler = Scheduler(slots=4, budget=10)
    rows = [sequence(ticket, 3) for ticket in range(3)]
    for row in rows:
        scheduler.add(row)
    assert scheduler.plan().whole == tuple(rows)
    for row in rows:
        row.stored = 3
        row.generated.append(1)
        scheduler.join(row)
    long = sequence(9, 25)
    scheduler.add(long)
    assert scheduler.plan().chunk is long
    long.stored = 10
    assert scheduler.remove(rows[0]) == [Move(2, 0, 3), Move(3, 2, 10)]
    assert scheduler.running == [rows[2], rows[1]]
    assert scheduler.remove(rows[1]) == [Move(2, 1, 10)]
    scheduler.validate()


def test_validate_sees_what_is_wrong() -> None:
    scheduler = Scheduler(slots=1, budget=10)
    row = sequence(0, 3)
    scheduler.join(row)
    with pytest.raises(AssertionError, match="no token"):
        scheduler.validate()


def test_replay_comes_before_prefill_and_nobody_overtakes_a_prompt_in_chunks() -> None:
    scheduler = Scheduler(slots=4, budget=10)
    row = sequence(0, 3, known=13)
    scheduler.add(row)
    assert scheduler.plan().whole == (row,)
    row.stored = 3
    scheduler.join(row)
    long, short = sequence(1, 25), sequence(2, 2)
    scheduler.add(long)
    scheduler.add(short)
    assert scheduler.replays() == [(0, 10)]
    assert scheduler.plan(10) == Plan(None, 0, ())
    row.stored = 13
    assert scheduler.replays() == [(0, 2)]
    assert scheduler.plan(2) == Plan(None, 0, ()), "the long one is first, and begins with a whole budget"
    row.stored = 15
    scheduler.validate()
    assert scheduler.replays() == []
    assert scheduler.plan() == Plan(long, 10, ())


def test_with_fewer_slots_than_rows_nobody_begins_behind_a_prompt_in_chunks() -> None:
    scheduler = Scheduler(slots=3, budget=10)
    rows = [sequence(ticket, 2) for ticket in range(2)]
    for row in rows:
        scheduler.add(row)
    scheduler.plan()
    for row in rows:
        row.stored = 2
        row.generated.append(5)
        scheduler.join(row)
    long, short = sequence(2, 12), sequence(3, 2)
    scheduler.add(long)
    scheduler.add(short)
    assert scheduler.plan() == Plan(long, 10, ())
    long.stored = 10
    assert scheduler.resize(2) == 2
    assert scheduler.plan() == Plan(long, 2, ()), "the cache has no row for the short one"
    long.stored = 12
    long.generated.append(5)
    scheduler.join(long)
    scheduler.remove(scheduler.waiting[0])
    scheduler.add(sequence(4, 12))
    assert scheduler.resize(1) == 1
    assert scheduler.plan() == Plan(None, 0, ())
