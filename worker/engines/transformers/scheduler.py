"""Who runs, who is being prefilled, who waits; and which slot of the cache each has. Pure: no tensors, no clock.

Rows that run are in slots 0 to n - 1, in any order, because a decode reads neighbouring slots only. At most one
prompt is partly prefilled, in slot n: one that is longer than a step's budget. Prompts start in the order in which
they came, when a slot is free and they fit into what is left of the budget; one that is longer than the whole budget
starts alone. While rows replay a prior, that comes first: their readers wait in mid-sentence. A row that leaves is
replaced by the last one, so that the slots in use stay neighbours.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .sequence import Sequence


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
        whole: sequences to prefill at once, in the slots behind that.
    """

    chunk: Sequence | None
    chunk_tokens: int
    whole: tuple[Sequence, ...]


class Scheduler:
    """The engine's sequences.

    Attributes:
        slots: most sequences that may run; those that ran when it was lowered go on.
        budget: most tokens to prefill in a step, 1 or more.
        waiting: sequences without a slot, oldest first.
        running: sequences whose prefill is done; the index is the slot.
        partial: the sequence that is partly prefilled, in slot `len(running)`.
    """

    def __init__(self, slots: int, budget: int) -> None:
        """Schedule for `slots` rows and `budget` prefill tokens a step."""
        self.slots = slots
        self._rows = slots
        self.budget = budget
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.partial: Sequence | None = None

    def resize(self, slots: int) -> int:
        """Let at most `slots` sequences run, and no more than the cache has room for; return how many that is."""
        self.slots = min(slots, self._rows)
        return self.slots

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def find(self, ticket: int) -> Sequence | None:
        """Return the sequence of a ticket, or None."""
        partial = [] if self.partial is None else [self.partial]
        return next((found for found in (*self.running, *partial, *self.waiting) if found.ticket == ticket), None)

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

        A chunk always has the whole budget: where a prompt is cut must depend on nothing but its length, or else its
        keys and values would depend on its company. While a prompt in chunks waits for that, nobody overtakes it.

        The sequences of `whole` leave the queue here; each must be handed to `join` or dropped. That of `chunk`
        becomes `partial` until `join` or `remove`.
        """
        if used and self.partial is not None:
            return Plan(None, 0, ())
        left = self.budget - used
        free = self.slots - len(self.running)  # less than 0 after `resize`
        if not used and self.partial is None and self.waiting and free > 0 and len(self.waiting[0].head) > left:
            self.partial = self.waiting.popleft()
        tokens = 0
        if self.partial is not None:
            tokens = min(left, len(self.partial.head) - self.partial.stored)
            left -= tokens
            free -= 1
        whole = []
        while self.waiting and free > 0 and len(self.waiting[0].head) <= left:
            sequence = self.waiting.popleft()
            left -= len(sequence.head)
            free -= 1
            whole.append(sequence)
        return Plan(self.partial, tokens, tuple(whole))

    def join(self, sequence: Sequence) -> None:
        """Let a sequence run whose prefill is complete, in slot `len(running)`: the partial one before any other."""
        if sequence is self.partial:
            self.partial = None
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> list[Move]:
        """Take a sequence out, wherever it is; return what the cache must do, in this order."""
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
        self.waiting.clear()
        self.running.clear()
        self.partial = None

    def validate(self) -> None:
        """Check every invariant that holds between steps.

        Raises:
            AssertionError: one does not.
        """
        partial = [] if self.partial is None else [self.partial]
        everyone = [*self.running, *partial, *self.waiting]
        _demand(len({sequence.ticket for sequence in everyone}) == len(everyone), "a ticket is there twice")
        _demand(len(self.running) + len(partial) <= self._rows, "more rows than slots")
        for row in self.running:
            _demand(bool(row.generated), "a running row has no token")
            _demand(len(row.head) <= row.stored < row.length, "the cache lacks the prompt, or holds the newest token")
            _demand(not row.owed or row.first_at is None, "text of a prior is still owed after the first new token")
            _demand(row.length < row.context, "a row has no room for its next token")
            _demand(row.generated[-1] not in row.end_ids and not row.text.stopped, "a finished row still runs")
            _demand(len(row.generated) < row.sampling.max_tokens, "a row runs beyond its max_tokens")
        for sequence in partial:
            _demand(sequence.stored < len(sequence.head), "a prompt that is done is still prefilled")
            _demand(sequence.first_at is None, "a prompt that is not done has new tokens")
        for sequence in self.waiting:
            _demand(sequence.stored == 0 and sequence.first_at is None, "a waiting sequence was begun")


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
