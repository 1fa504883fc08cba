"""The batch: one step is some replay, a decode of all running rows, some prefill, and one sampling pass over both.

A prompt that fails in its prefill or replay fails alone. What fails in the decode concerns everybody and is raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import torch

from ....protocol.errors import ErrorCode
from ....protocol.messages import FinishReason
from ..base import Failed, Output
from .devices import first_line, is_out_of_memory, release_memory
from .runner import Runner
from .sampling import NOT_A_NUMBER, Draw, choose
from .scheduler import Move, Scheduler
from .sequence import Sequence

_log = logging.getLogger("tokenmq.worker")

#: Most prompts in one forward. The model gives logits for every length in every row of a group, so that their number
#: grows with its square.
MAX_GROUP = 8


class Batch:
    """Sequences that advance together over one runner.

    Attributes:
        scheduler: who runs and who waits.
    """

    def __init__(self, runner: Runner, budget: int, *, device: torch.device, grouped: bool) -> None:
        """Run on `runner`.

        Args:
            runner: the model.
            budget: most tokens to prefill in a step.
            device: where the model is.
            grouped: prefill prompts of like length in one forward.
        """
        self.scheduler = Scheduler(runner.cache.slots, budget)
        self._runner = runner
        self._device = device
        self._grouped = grouped

    def step(self) -> list[Output]:
        """Advance by one token each; let waiting sequences join.

        Raises:
            Exception: the decode or the sampling failed; `reset` before the next step.
        """
        outputs: list[Output] = []
        replayed = self._replay(outputs)
        logits = [self._decode()] if self.scheduler.running else []
        logits += self._prefill(replayed, outputs)
        if logits:
            outputs += self._advance(torch.cat(logits) if len(logits) > 1 else logits[0])
        return outputs

    def cancel(self, ticket: int) -> list[Output]:
        """Take a sequence out; return its Done, or nothing where there is none."""
        sequence = self.scheduler.find(ticket)
        if sequence is None:
            return []
        self._move(self.scheduler.remove(sequence))
        return [sequence.done(FinishReason.CANCELLED, time.monotonic())]

    def reset(self) -> None:
        """Drop all sequences, and whatever a failed step left in the cache."""
        self.scheduler.clear()
        release_memory(self._device)
        self._runner.cache.clear()

    def kv_use(self) -> float:
        """Return the part of the cache that holds tokens, 0 to 1."""
        scheduler, cache = self.scheduler, self._runner.cache
        stored = sum(row.stored for row in scheduler.running)
        stored += 0 if scheduler.partial is None else scheduler.partial.stored
        return stored / (cache.slots * cache.context)

    def _replay(self, outputs: list[Output]) -> int:
        """Do a step's replay; append Failed for what fails. Return the tokens that were replayed."""
        replays = self.scheduler.replays()
        for slot, tokens in reversed(replays):  # from the end, so that moves leave lower slots as they are
            row = self.scheduler.running[slot]
            first = row.stored - len(row.prompt)
            try:
                self._runner.replay(slot, row.stored, row.generated[first : first + tokens])
            except Exception as error:  # noqa: BLE001 (a model may raise anything; the others go on)
                self._move(self.scheduler.remove(row))
                outputs.append(self._failure(row, error))
                continue
            row.stored += tokens
        return sum(tokens for _, tokens in replays)

    def _decode(self) -> torch.Tensor:
        rows = self.scheduler.running
        token_ids = [row.next_input for row in rows]
        lengths = [row.stored for row in rows]
        try:
            logits = self._runner.decode(token_ids, lengths)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_memory(self._device)  # a fragmented allocator often has it after all
            logits = self._runner.decode(token_ids, lengths)
        for row in rows:
            row.stored += 1
        return logits

    def _prefill(self, replayed: int, outputs: list[Output]) -> list[torch.Tensor]:
        """Do a step's prefill; append Failed for what fails. Return the logits of the rows that joined, in order."""
        plan = self.scheduler.plan(replayed)
        logits: list[torch.Tensor] = []
        if plan.chunk is not None:
            logits += self._prefill_chunk(plan.chunk, plan.chunk_tokens, outputs)
        for group in self._groups(plan.whole):
            logits += self._prefill_group(group, outputs)
        return logits

    def _prefill_chunk(self, sequence: Sequence, tokens: int, outputs: list[Output]) -> list[torch.Tensor]:
        self._begin([sequence])
        start, end = sequence.stored, sequence.stored + tokens
        try:
            logits = self._runner.prefill_chunk(len(self.scheduler.running), start, sequence.head[start:end])
        except Exception as error:  # noqa: BLE001 (a model may raise anything; the others go on)
            self._move(self.scheduler.remove(sequence))
            outputs.append(self._failure(sequence, error))
            return []
        sequence.stored = end
        if end < len(sequence.head):
            return []
        self.scheduler.join(sequence)
        return [logits]

    def _prefill_group(self, group: list[Sequence], outputs: list[Output]) -> list[torch.Tensor]:
        self._begin(group)
        try:
            logits = self._runner.prefill(len(self.scheduler.running), [sequence.head for sequence in group])
        except Exception as error:  # noqa: BLE001 (as above)
            release_memory(self._device)
            if len(group) == 1:
                outputs.append(self._failure(group[0], error))
                return []
            _log.warning("prefill of %d prompts failed (%s): each alone", len(group), first_line(error))
            return [one for sequence in group for one in self._prefill_group([sequence], outputs)]
        for sequence in group:
            sequence.stored = len(sequence.head)
            self.scheduler.join(sequence)
        return [logits]

    def _groups(self, sequences: Iterable[Sequence]) -> list[list[Sequence]]:
        """Put prompts of like length together: no row is padded by more than half of its own length."""
        groups: list[list[Sequence]] = []
        for sequence in sorted(sequences, key=lambda sequence: len(sequence.head)):
            group = groups[-1] if groups else []
            fits = group and len(group) < MAX_GROUP and len(sequence.head) * 2 <= len(group[0].head) * 3
            if self._grouped and fits:
                group.append(sequence)
            else:
                groups.append([sequence])
        return groups

    def _advance(self, logits: torch.Tensor) -> list[Output]:
        """Choose a token for every running row that has no known one to come; end those that are done."""
        rows = self.scheduler.running
        slots = [slot for slot, row in enumerate(rows) if row.complete]
        if len(slots) < len(rows):
            logits = logits[torch.tensor(slots, dtype=torch.long, device=logits.device)]
        chosen = [(slot, rows[slot]) for slot in slots]
        tokens = choose(logits, [Draw(row.sampling, row.length) for _, row in chosen]) if chosen else []
        now = time.monotonic()
        outputs: list[Output] = []
        # From the end, so that moves leave lower slots as they are.
        for (slot, row), token in zip(reversed(chosen), reversed(tokens), strict=True):
            if token == NOT_A_NUMBER:
                message = "the model gave values that are not numbers (NaN) for this request"
                _log.error("request %d: %s", row.ticket, message)
                self._runner.cache.clear(slot)  # no mask would hide them from the next row in this slot
                self._move(self.scheduler.remove(row))
                outputs.append(Failed(row.ticket, ErrorCode.ENGINE_FAILED.value, message))
                continue
            brought, reason = row.accept(token, now)
            outputs.append(brought)
            if reason is not None:
                self._move(self.scheduler.remove(row))
                outputs.append(row.done(reason, now))
        return outputs

    def _begin(self, sequences: Iterable[Sequence]) -> None:
        now = time.monotonic()
        for sequence in sequences:
            if sequence.started_at is None:
                sequence.started_at = now

    def _failure(self, sequence: Sequence, error: Exception) -> Failed:
        if is_out_of_memory(error):
            release_memory(self._device)
            tokens = len(sequence.head)
            message = f"the device has no memory left for the prefill of this prompt of {tokens} tokens"
            _log.warning("request %d: %s", sequence.ticket, message)
            return Failed(sequence.ticket, ErrorCode.OUT_OF_MEMORY.value, message, retryable=True)
        _log.error("request %d: its prefill failed", sequence.ticket, exc_info=error)
        message = f"the model failed on this prompt: {first_line(error)}"
        return Failed(sequence.ticket, ErrorCode.ENGINE_FAILED.value, message)

    def _move(self, moves: Iterable[Move]) -> None:
        for move in moves:
            self._runner.cache.move(move.source, move.target, move.tokens)
