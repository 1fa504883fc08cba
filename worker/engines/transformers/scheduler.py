"""Who runs, who is being prefilled, who waits; and which slot of the cache each has. Pure: no tensors, no clock.

Rows that run are in slots 0 to n - 1, in any order, because a decode reads neighbouring slots only. At most one
prompt is partly prefilled, in slot n: one that is longer than a step's budget. Prompts start by priority, then in the
order in which they came, when a slot is free, the cache has room and they fit into what is left of the budget; one
that is longer than the whole budget starts alone. Nobody overtakes within a priority. While rows replay a prior, that
comes first: their readers wait in mid-sentence. A row that leaves is replaced by the last one, so that the slots in
use stay neighbours.

When the rows that run outgrow the cache, those of the lowest priority are put back, the newest first; they begin anew
when there is room, with all that they have.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from .prefix import PrefixIndex, chain
from .sequence import Sequence
from .space import Space

#: Room for so many new tokens is asked for before a sequence starts, so that it is not put back a few steps later.
HEADROOM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Move:
    """The cache must copy the `tokens` of slot `source` to slot `target`."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's prefill.

    Attributes:
        chunk: the sequence to prefill partly, or to its end, in the slot behind the running rows; it comes first.
        chunk_tokens: how many of its tokens.
        whole: sequences to prefill to their ends at once, in the slots behind that.
        found: blocks of the prefix store that have the beginning of a sequence that starts with this step, by its
            ticket.
        stride: what the cache needs for all that.
    """

    chunk: Sequence | None
    chunk_tokens: int
    whole: tuple[Sequence, ...]
    found: dict[int, list[int]]
    stride: int


class Scheduler:
    """The engine's sequences.

    Attributes:
        space: the shape of the cache.
        slots: most sequences that may run; those that ran when it was lowered go on.
        ceiling: the same, for as long as the device's memory has no room for more.
        budget: most tokens to prefill in a step, 1 or more.
        waiting: sequences without a slot, those that start first in front.
        running: sequences whose prefill is done; the index is the slot.
        partial: the sequence that is partly prefilled, in slot `len(running)`.
    """

    def __init__(self, space: Space, budget: int, prefixes: PrefixIndex | None = None) -> None:
        """Schedule rows of `space` and `budget` prefill tokens a step; without `prefixes` nothing is kept."""
        self.space = space
        self.slots = space.rows
        self.ceiling = space.rows
        self.budget = budget
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.partial: Sequence | None = None
        self._prefixes = prefixes

    @property
    def rows(self) -> list[Sequence]:
        """All that have a slot, by slot."""
        return self.running if self.partial is None else [*self.running, self.partial]

    def resize(self, slots: int) -> int:
        """Let at most `slots` sequences run, and no more than the cache has room for; return how many that is."""
        self.slots = min(slots, self.space.rows)
        return self.slots

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that was put back stands in front of those that came after it."""
        insort(self.waiting, sequence, key=_turn)

    def find(self, ticket: int) -> Sequence | None:
        """Return the sequence of a ticket, or None."""
        return next((found for found in (*self.rows, *self.waiting) if found.ticket == ticket), None)

    # --- room -------------------------------------------------------------------------------------------------------

    def crowd(self) -> Sequence | None:
        """Return who must be put back before the running rows can take a token each; None when all have room."""
        return self.least() if self._room([]) is None else None

    def stride(self) -> int:
        """Return the stride that the rows need for their next tokens; nobody may be crowded out."""
        stride = self._room([])
        assert stride is not None, "somebody is crowded out"
        return stride

    def least(self) -> Sequence:
        """Return who leaves first: of those with a slot one of the lowest priority, and of these the newest."""
        return max(self.rows, key=_turn)

    def put_back(self, sequence: Sequence, *, replay: bool) -> list[Move]:
        """Let a sequence with a slot wait again, with all that it has; return what the cache must do."""
        moves = self._take_out(sequence)
        sequence.rewind(replay=replay)
        self.add(sequence)
        return moves

    def _longest(self) -> int:
        """Return the most tokens that a row will have in the cache when its replay, or its prefill, is done."""
        longest = max((row.length for row in self.running), default=0)
        return longest if self.partial is None else max(longest, len(self.partial.head))

    # --- a step -----------------------------------------------------------------------------------------------------

    def replays(self) -> list[tuple[int, int]]:
        """Choose what running rows replay in a step: slots, and how many tokens."""
        left, chosen = self.budget, []
        for slot, row in enumerate(self.running):
            tokens = min(left, row.behind)
            if tokens:
                chosen.append((slot, tokens))
                left -= tokens
        return chosen

    def plan(self, used: int = 0) -> Plan:
        """Choose the prefill of a step, `used` tokens of whose budget were replayed.

        A chunk always has the whole budget, and ends where a multiple of it does: where a prompt is cut must depend
        on nothing but its length, or else its keys and values would depend on its company. While a prompt in chunks
        waits for that, nobody overtakes it.

        What is found in the prefix store is held there until the caller has copied it. The sequences of `whole` leave
        the queue here; each must be handed to `join` or `put_back`, or dropped. That
        of `chunk` becomes `partial` until `join` or `remove`.
        """
        found: dict[int, list[int]] = {}
        if used and self.partial is not None:
            return Plan(None, 0, (), found, self.space.stride)
        left = self.budget - used
        tokens = 0
        if self.partial is not None:
            tokens = self._piece(self.partial)
            left = self._left(self.partial, left, tokens)
        whole: list[Sequence] = []
        coming: set[bytes] = set()
        while left > 0 and self.waiting and self._admits(self.waiting[0], whole):
            sequence = self.waiting[0]
            blocks = self._look(sequence)
            begun = 0 if self._prefixes is None else len(blocks) * self._prefixes.block_tokens
            if coming.intersection(sequence.keys[len(blocks) :]):
                break  # another one brings its beginning with this step: a step later it is found
            if self._prefixes is not None:
                self._prefixes.hold(sequence.keys[: len(blocks)])
            todo = len(sequence.head) - begun
            if sequence.given.inputs:
                if whole or left < self.budget:
                    break
            elif todo > left or sequence.wants_prompt_logprobs:
                if left < self.budget or whole:
                    break
                self.partial = self.waiting.pop(0)
                self.partial.stored, found[sequence.ticket] = begun, blocks
                tokens = self._piece(sequence)
                left = self._left(sequence, left, tokens)
                coming.update(sequence.keys)
                continue
            sequence.stored, found[sequence.ticket] = begun, blocks
            whole.append(self.waiting.pop(0))
            left -= todo
            coming.update(sequence.keys)
        stride = self._room(whole)
        assert stride is not None, "more was admitted than there is room for"
        return Plan(self.partial, tokens, tuple(whole), found, stride)

    def _piece(self, sequence: Sequence) -> int:
        end = (sequence.stored // self.budget + 1) * self.budget
        return min(len(sequence.head), end) - sequence.stored

    @staticmethod
    def _left(sequence: Sequence, left: int, tokens: int) -> int:
        """Return what a chunk leaves of the budget: nothing unless it is the last one, for nobody may pass it."""
        return left - tokens if sequence.stored + tokens == len(sequence.head) else 0

    def _admits(self, sequence: Sequence, others: list[Sequence]) -> bool:
        """Tell whether there is a slot and room for one more beside the rows and `others`, which start with it."""
        more = [*others, sequence]
        return len(self.rows) + len(more) <= min(self.slots, self.ceiling) and self._room(more) is not None

    def _room(self, more: list[Sequence]) -> int | None:
        """Return the stride for the rows and those that start now; None where they do not fit."""
        longest = max([self._longest(), *map(_wanted, more)])
        return self.space.room(len(self.rows) + len(more), longest)

    def _look(self, sequence: Sequence) -> list[int]:
        """Return the blocks that have the sequence's beginning; the last token is always left to be computed."""
        if self._prefixes is None or sequence.wants_prompt_logprobs or sequence.given.inputs:
            return []
        size = self._prefixes.block_tokens
        if not sequence.keys:
            sequence.keys = chain(sequence.head, size, sequence.seed)
        return self._prefixes.find(sequence.keys[: (len(sequence.head) - 1) // size])

    def join(self, sequence: Sequence) -> None:
        """Let a sequence run whose prefill is complete, in slot `len(running)`: the partial one before any other."""
        if sequence is self.partial:
            self.partial = None
        self.running.append(sequence)

    # --- ends -------------------------------------------------------------------------------------------------------

    def remove(self, sequence: Sequence) -> list[Move]:
        """Take a sequence out for good, wherever it is; return what the cache must do, in this order."""
        sequence.left = True
        return self._take_out(sequence)

    def _take_out(self, sequence: Sequence) -> list[Move]:
        if sequence is self.partial:
            self.partial = None
            return []
        if sequence not in self.running:
            self.waiting.remove(sequence)
            return []
        slot, last = self.running.index(sequence), len(self.running) - 1
        moves = []
        if slot != last:
            moves.append(Move(last, slot, self.running[last].stored))
            self.running[slot] = self.running[last]
        self.running.pop()
        if self.partial is not None and self.partial.stored:
            moves.append(Move(last + 1, last, self.partial.stored))
        return moves

    def clear(self) -> None:
        """Forget all sequences."""
        for sequence in (*self.rows, *self.waiting):
            sequence.left = True
        self.waiting.clear()
        self.running.clear()
        self.partial = None

    def validate(self) -> None:
        """Check every invariant that holds between steps.

        Raises:
            AssertionError: one does not.
        """
        partial = [] if self.partial is None else [self.partial]
        everyone = [*self.rows, *self.waiting]
        _demand(len({sequence.ticket for sequence in everyone}) == len(everyone), "a ticket is there twice")
        _demand(not any(sequence.left for sequence in everyone), "a sequence that has left is still there")
        _demand(len(self.rows) <= self.space.rows_at(self.space.stride), "more rows than the cache has room for")
        _demand(self.waiting == sorted(self.waiting, key=_turn), "the queue is out of order")
        for row in self.running:
            # Its first one may be on its way, where the next step is launched ahead.
            _demand(bool(row.generated) or row.complete, "a running row has no token")
            _demand(len(row.head) <= row.stored, "the cache lacks the prompt")
            _demand(row.stored <= self.space.stride, "a row is longer than the stride")
            _demand(not row.owed or row.first_at is None, "text is still owed after the first new token")
        for sequence in partial:
            _demand(sequence.stored < len(sequence.head), "a prompt that is done is still prefilled")
        for sequence in self.waiting:
            _demand(sequence.stored == 0, "a waiting sequence has tokens in the cache")


def _turn(sequence: Sequence) -> tuple[int, int]:
    return -sequence.priority, sequence.ticket


def _wanted(sequence: Sequence) -> int:
    """Return the tokens for which a sequence asks for room before it starts."""
    left = sequence.sampling.max_tokens - len(sequence.generated)
    return min(sequence.context, sequence.length + min(left, HEADROOM_TOKENS))


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
