"""The scheduler alone: slots stay neighbours, the cache follows, first come is first served, all have room."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenmq.protocol.payload import Prior, Sampling
from tokenmq.worker.engines.transformers.prefix import PrefixIndex
from tokenmq.worker.engines.transformers.scheduler import Move, Plan, Scheduler
from tokenmq.worker.engines.transformers.sequence import Prompt, Sequence
from tokenmq.worker.engines.transformers.space import Space
from tokenmq.worker.engines.transformers.textstream import TextStream

from .conftest import make_tokenizer

BACKEND = make_tokenizer().backend_tokenizer
ROWS, BUDGET, BLOCK, CONTEXT, CAPACITY = 3, 10, 4, 160, 220


def sequence(
    ticket: int,
    tokens: int,
    known: int = 0,
    *,
    replay: bool = True,
    priority: int = 5,
    kind: int = 1,
    context: int = 300,
) -> Sequence:
    prompt = Prompt(tuple(range(kind, kind + tokens)))
    sampling = Sampling(max_tokens=1000)
    made = Sequence(ticket, prompt, sampling, frozenset(), context, TextStream(BACKEND, ()), 0.0, priority)
    if known:
        assert made.resume(Prior((5,) * known), replay=replay) == []
    return made


def scheduler_of(rows: int = 4, capacity: int = 4 * 300) -> Scheduler:
    return Scheduler(Space(capacity, rows, 300), BUDGET)


class Slots(RuleBasedStateMachine):
    """Drives a scheduler as the batch does, with a model of the cache: what each slot holds, column by column.

    What a slot holds is told by token and place, so that a beginning that was found is as good as one's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = PrefixIndex(12, BLOCK)
        self.scheduler = Scheduler(Space(CAPACITY, ROWS, CONTEXT), BUDGET, self.prefixes)
        self.cache: list[list[tuple[int, int]]] = [[] for _ in range(ROWS)]
        self.blocks: dict[int, list[tuple[int, int]]] = {}
        self.tickets = 0

    def tokens(self, row: Sequence, start: int, end: int) -> list[tuple[int, int]]:
        known = (*row.prompt, *row.generated)
        return [(place, known[place]) for place in range(start, end)]

    def write(self, slot: int, row: Sequence, end: int) -> None:
        self.cache[slot] = self.cache[slot][: row.stored] + self.tokens(row, row.stored, end)
        row.stored = end
        assert end <= self.scheduler.space.stride, "no row is longer than the stride"

    def keep(self, slot: int, row: Sequence) -> None:
        for part, block in self.prefixes.keep(row.keys[: row.stored // BLOCK]):
            self.blocks[block] = self.cache[slot][part * BLOCK : (part + 1) * BLOCK]

    def recall(self, slot: int, row: Sequence, plan: Plan) -> None:
        found = plan.found[row.ticket]
        self.cache[slot] = [entry for block in found for entry in self.blocks[block]]
        assert row.stored == len(self.cache[slot])
        assert self.cache[slot] == self.tokens(row, 0, row.stored), "what was found is its beginning"

    def move(self, moves: list[Move]) -> None:
        for move in moves:
            self.cache[move.target] = self.cache[move.source][: move.tokens]

    @rule(
        tokens=st.integers(1, 100),
        known=st.sampled_from([0, 0, 1, 2, 5, 11, 30]),
        replay=st.booleans(),
        priority=st.sampled_from([5, 5, 5, 1, 9]),
        kind=st.integers(1, 3),
    )
    def submit(self, tokens: int, known: int, replay: bool, priority: int, kind: int) -> None:
        self.scheduler.add(
            sequence(
                self.tickets,
                tokens,
                known,
                replay=replay,
                priority=priority,
                kind=kind,
                context=min(CONTEXT, tokens + 60),
            )
        )
        self.tickets += 1

    @rule(fails=st.booleans(), steps=st.sampled_from([1, 1, 1, 20]))
    def step(self, fails: bool, steps: int) -> None:
        for _ in range(steps):
            self.one_step(fails)

    def one_step(self, fails: bool) -> None:
        scheduler = self.scheduler
        while (crowded := scheduler.crowd()) is not None:
            assert len(scheduler.rows) > 1, "one that is alone always has room"
            assert crowded.priority == min(row.priority for row in scheduler.rows)
            same = [row.ticket for row in scheduler.rows if row.priority == crowded.priority]
            assert crowded.ticket == max(same), "the newest of the lowest priority"
            self.move(scheduler.put_back(crowded, replay=False))
        scheduler.space.stride = scheduler.stride()
        replays = scheduler.replays()
        used = sum(tokens for _, tokens in replays)
        assert used == min(BUDGET, sum(row.behind for row in scheduler.running)), "all that the budget allows"
        for slot, tokens in replays:
            row = scheduler.running[slot]
            assert 0 < tokens <= row.behind, "the newest token is left to the decode"
            self.write(slot, row, row.stored + tokens)
        for slot, row in enumerate(scheduler.running):
            self.write(slot, row, row.stored + 1)
        running, first = len(scheduler.running), scheduler.waiting[0] if scheduler.waiting else None
        begun = None if scheduler.partial is None else scheduler.partial.ticket
        plan = scheduler.plan(used)
        scheduler.space.stride = plan.stride
        newcomers = [row for row in (plan.chunk, *plan.whole) if row is not None and row.ticket in plan.found]
        assert len(newcomers) <= max(0, scheduler.slots - running), "nobody begins without a slot"
        assert not newcomers or newcomers[0] is first or newcomers[0].ticket == begun, "nobody overtakes"
        work = plan.chunk_tokens + sum(len(row.head) - row.stored for row in plan.whole)
        assert used + work <= BUDGET
        if plan.chunk is not None:
            end = plan.chunk.stored + plan.chunk_tokens
            assert end == len(plan.chunk.head) or end % BUDGET == 0 or used, "cut where its length alone says"
        if plan.chunk is not None and plan.chunk_tokens:
            if plan.chunk.ticket in plan.found:
                self.recall(running, plan.chunk, plan)
            if fails:
                self.move(scheduler.remove(plan.chunk))
            else:
                self.write(running, plan.chunk, plan.chunk.stored + plan.chunk_tokens)
                self.keep(running, plan.chunk)
                if plan.chunk.stored == len(plan.chunk.head):
                    scheduler.join(plan.chunk)
        for row in plan.whole[fails:]:
            slot = len(scheduler.running)
            self.recall(slot, row, plan)
            self.write(slot, row, len(row.head))
            self.keep(slot, row)
            scheduler.join(row)
        for row in list(scheduler.running):
            if row.complete:
                row.take(5, 0.0)
                row.tell()
                if row.length >= row.context:
                    self.move(scheduler.remove(row))

    @rule(slots=st.integers(1, 5))
    def resize(self, slots: int) -> None:
        assert self.scheduler.resize(slots) == min(slots, ROWS)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = self.scheduler.find(data.draw(st.integers(0, self.tickets - 1)))
        if row is not None:
            self.move(self.scheduler.remove(row))
            assert self.scheduler.find(row.ticket) is None

    @rule(data=st.data())
    def out_of_memory(self, data: st.DataObject) -> None:
        rows = self.scheduler.rows
        if rows:
            self.move(self.scheduler.put_back(data.draw(st.sampled_from(rows)), replay=data.draw(st.booleans())))

    @invariant()
    def all_is_well(self) -> None:
        self.scheduler.validate()
        for slot, row in enumerate(self.scheduler.rows):
            assert self.cache[slot][: row.stored] == self.tokens(row, 0, row.stored)

    def teardown(self) -> None:
        """Whatever happened, all that is there comes to its end."""
        self.scheduler.resize(ROWS)
        for _ in range(3000):
            if not (self.scheduler.rows or self.scheduler.waiting):
                break
            self.one_step(fails=False)
        assert not self.scheduler.rows
        assert not self.scheduler.waiting


Slots.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestSlots = Slots.TestCase


def run(scheduler: Scheduler, *rows: Sequence) -> None:
    """Let short sequences run."""
    for row in rows:
        scheduler.add(row)
    assert scheduler.plan().whole == rows
    for row in rows:
        row.stored = len(row.head)
        scheduler.join(row)
        if row.complete:
            row.take(5, 0.0)


def test_a_leaving_row_is_replaced_by_the_last_and_that_by_the_partial_one() -> None:
    scheduler = scheduler_of()
    rows = [sequence(ticket, 3) for ticket in range(3)]
    run(scheduler, *rows)
    long = sequence(9, 25)
    scheduler.add(long)
    assert scheduler.plan().chunk is long
    long.stored = 10
    assert scheduler.remove(rows[0]) == [Move(2, 0, 3), Move(3, 2, 10)]
    assert scheduler.running == [rows[2], rows[1]]
    assert scheduler.remove(rows[1]) == [Move(2, 1, 10)]
    scheduler.validate()


def test_validate_sees_what_is_wrong() -> None:
    scheduler = scheduler_of(rows=1)
    row = sequence(0, 3)
    scheduler.join(row)
    with pytest.raises(AssertionError, match="no token"):
        scheduler.validate()


def test_replay_comes_before_prefill_and_nobody_overtakes_a_prompt_in_chunks() -> None:
    scheduler = scheduler_of()
    row = sequence(0, 3, known=13)
    run(scheduler, row)
    long, short = sequence(1, 25), sequence(2, 2)
    scheduler.add(long)
    scheduler.add(short)
    assert scheduler.replays() == [(0, 10)]
    assert scheduler.plan(10).chunk is None
    row.stored = 13
    assert scheduler.replays() == [(0, 2)]
    plan = scheduler.plan(2)
    assert (plan.chunk, plan.whole) == (None, ()), "the long one is first, and begins with a whole budget"
    row.stored = 15
    scheduler.validate()
    assert scheduler.replays() == []
    plan = scheduler.plan()
    assert (plan.chunk, plan.chunk_tokens, plan.whole) == (long, 10, ())


def test_with_fewer_slots_than_rows_nobody_begins_behind_a_prompt_in_chunks() -> None:
    scheduler = scheduler_of(rows=3)
    run(scheduler, sequence(0, 2), sequence(1, 2))
    long, short = sequence(2, 12), sequence(3, 2)
    scheduler.add(long)
    scheduler.add(short)
    assert scheduler.plan().chunk is long
    long.stored = 10
    assert scheduler.resize(2) == 2
    plan = scheduler.plan()
    assert (plan.chunk, plan.chunk_tokens, plan.whole) == (long, 2, ()), "the cache has no row for the short one"
    long.stored = 12
    scheduler.join(long)
    scheduler.remove(scheduler.waiting[0])
    scheduler.add(sequence(4, 12))
    assert scheduler.resize(1) == 1
    assert scheduler.plan().chunk is None


def test_a_greater_priority_starts_first_and_leaves_last() -> None:
    scheduler = scheduler_of(rows=3)
    scheduler.resize(1)
    low, normal, high = sequence(0, 2, priority=1), sequence(1, 2), sequence(2, 2, priority=9)
    for row in (low, normal, high):
        scheduler.add(row)
    assert scheduler.waiting == [high, normal, low]
    scheduler.resize(3)
    assert scheduler.plan().whole == (high, normal, low)
    for row in (high, normal, low):
        row.stored = 2
        scheduler.join(row)
    assert scheduler.least() is low
    scheduler.put_back(low, replay=False)
    assert scheduler.least() is normal


def test_rows_that_outgrow_the_cache_put_the_newest_back_which_starts_again_with_all_it_has() -> None:
    scheduler = scheduler_of(rows=2, capacity=320)
    old, new = sequence(0, 4), sequence(1, 4)
    run(scheduler, old, new)
    for row in (old, new):
        for _ in range(155):
            row.stored += 1
            row.take(7, 0.0)
    assert scheduler.crowd() is None
    assert (scheduler.space.stride, old.stored) == (160, 159)
    for row in (old, new):
        row.stored += 1
        row.take(7, 0.0)
    assert scheduler.crowd() is new, "two rows of 161 tokens need a stride of 192"
    assert scheduler.put_back(new, replay=False) == []
    assert scheduler.crowd() is None
    assert scheduler.stride() == 192
    scheduler.space.stride = 192
    assert new.head == (*new.prompt, *new.generated)
    assert scheduler.plan().whole == (), "there is no room for both"
    scheduler.remove(old)
    assert scheduler.plan().chunk is new


def test_a_prompt_that_shares_its_beginning_waits_a_step_and_then_finds_it() -> None:
    prefixes = PrefixIndex(8, BLOCK)
    scheduler = Scheduler(Space(1200, 4, 300), 100, prefixes)
    first, second, other = sequence(0, 10), sequence(1, 10), sequence(2, 10, kind=50)
    for row in (first, second, other):
        scheduler.add(row)
    plan = scheduler.plan()
    assert plan.whole == (first,), "the second would compute the same once more"
    first.stored = 10
    scheduler.join(first)
    assert prefixes.keep(first.keys[:2]) == [(0, prefixes.find(first.keys)[0]), (1, prefixes.find(first.keys)[1])]
    plan = scheduler.plan()
    assert plan.whole == (second, other)
    assert (second.stored, other.stored) == (8, 0)


def test_the_last_token_of_a_prompt_is_never_found() -> None:
    prefixes = PrefixIndex(8, BLOCK)
    scheduler = Scheduler(Space(1200, 4, 300), 100, prefixes)
    first, second = sequence(0, 8), sequence(1, 8)
    scheduler.add(first)
    scheduler.plan()
    prefixes.keep(first.keys)
    assert len(prefixes) == 2
    scheduler.add(second)
    assert scheduler.plan().whole == (second,)
    assert second.stored == 4, "its logits are needed"
