"""The batch: one step is some replay, a decode of all running rows, some prefill, and one sampling pass over both.

A step has two halves. The launch hands the device its work and waits for nothing; the landing fetches the tokens,
once for all rows. Where the device works by itself (`ahead`), the next launch goes out as soon as the tokens are
there, and they become text while the device computes; else a step is a launch and its landing.

A prompt that fails in its prefill or replay fails alone. What fails in the decode concerns everybody and is raised;
but out of memory puts rows back until the rest has room.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ....protocol.errors import ErrorCode
from ....protocol.messages import FinishReason, TokenLogprobs
from ..base import Failed, Output
from .devices import first_line, is_out_of_memory, release_memory
from .prefix import PrefixIndex, chain
from .runner import Runner
from .sampling import NOTHING_LEFT, Picked, choose, logprobs_of
from .scheduler import Move, Plan, Scheduler
from .sequence import Sequence
from .space import whole_vectors
from .tokentexts import TokenTexts

_log = logging.getLogger("tokenmq.worker")

#: Most prompts in one forward. The model gives logits for every length in every row of a group, so that their number
#: grows with its square.
MAX_GROUP = 8
#: Steps without a failure, after which the device is asked for room for one more row.
RECOVERY_STEPS = 64


@dataclass(frozen=True, slots=True)
class Manner:
    """How a batch works.

    Attributes:
        device: where the model is.
        group_rows: prompts of like length share a forward; where their keys and values depend on its size, and a
            decode's do not, of so many rows at most as a steady runner pads them to. 0 for each alone, None for no
            limit.
        keeps_decoded: keep also what was decoded as prefixes: it is as good as what a prefill makes of it.
        ahead: the device works by itself, so that the next step is launched before this one's tokens become text.
        replay: those who are put back replay what they had, rather than prefill it.
    """

    device: torch.device
    group_rows: int | None
    keeps_decoded: bool
    ahead: bool
    replay: bool


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step: whose tokens are coming, in the order of `picked`, and how many prompt tokens it computes."""

    rows: list[Sequence]
    picked: Picked
    prompt_tokens: int


@dataclass(slots=True)
class Spent:
    """What the batch has done since it was made: seconds, and tokens of prompts in all and found in the store."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Batch:
    """Sequences that advance together over one runner.

    Attributes:
        scheduler: who runs and who waits.
        spent: for statistics.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, prefixes: PrefixIndex | None, texts: TokenTexts, manner: Manner
    ) -> None:
        """Run on `runner` by the plans of `scheduler`, which looks for beginnings in `prefixes`."""
        self.scheduler = scheduler
        self.spent = Spent()
        self._runner = runner
        self._prefixes = prefixes
        self._texts = texts
        self._manner = manner
        self._flight: _Flight | None = None
        self._clean_steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        scheduler = self.scheduler
        return bool(self._flight or scheduler.running or scheduler.partial or scheduler.waiting)

    def step(self) -> list[Output]:
        """Advance by one token each; let waiting sequences join.

        Raises:
            Exception: the decode or the sampling failed; `reset` before the next step.
        """
        outputs: list[Output] = []
        if self._flight is None:
            self._launch(outputs)
        fresh = self._land(outputs)
        if self._manner.ahead:
            self._launch(outputs)
        self._tell(fresh, outputs)
        return outputs

    def cancel(self, ticket: int) -> list[Output]:
        """Take a sequence out; return its Done, or nothing where there is none."""
        sequence = self.scheduler.find(ticket)
        if sequence is None:
            return []
        self._wipe(sequence)
        self._move(self.scheduler.remove(sequence))
        return [sequence.done(FinishReason.CANCELLED, time.monotonic())]

    def reset(self) -> None:
        """Drop all sequences, and whatever a failed step left in the cache."""
        self._flight = None
        self.scheduler.clear()
        if self._prefixes is not None:
            self._prefixes.clear()
        release_memory(self._manner.device)
        self._runner.clear()

    def kv_use(self) -> float:
        """Return the part of the cache that holds tokens, 0 to 1."""
        return sum(row.stored for row in self.scheduler.rows) / self.scheduler.space.capacity

    # --- launch -----------------------------------------------------------------------------------------------------

    def _launch(self, outputs: list[Output]) -> None:
        """Have the device compute a step; append Failed for what fails."""
        began = time.monotonic()
        self._make_room()
        logits = []
        replayed = self._replay(outputs)
        if self.scheduler.running:
            logits += self._decode(outputs)
        decoded = time.monotonic()
        plan = self.scheduler.plan(replayed)
        logits += self._prefill(plan, outputs)
        prefilled = time.monotonic()
        if logits:
            self._recover()
            self._sample(torch.cat(logits) if len(logits) > 1 else logits[0], plan)
        self.spent.decode_s += decoded - began + time.monotonic() - prefilled
        self.spent.prefill_s += prefilled - decoded

    def _make_room(self) -> None:
        """Put back those for whose next token the cache has no room, and let it take the shape for the others."""
        while (crowded := self.scheduler.crowd()) is not None:
            _log.info("request %d: put back with %d tokens: the cache is full", crowded.ticket, crowded.length)
            self._put_back(crowded)
        self._restride(self.scheduler.stride(), self.scheduler.rows)

    def _restride(self, stride: int, rows: list[Sequence]) -> bool:
        """Give the cache this stride; `rows` are those that have something in it, by slot.

        Returns:
            False where there was no memory for it: then all rows have been put back, since the cache is a mixture.
        """
        if stride == self.scheduler.space.stride:
            return True
        try:
            self._runner.restride(stride, len(rows), max((row.stored for row in rows), default=0))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_memory(self._manner.device)
            _log.warning("out of memory in reshaping the cache for %d rows: all wait", len(rows))
            self._lower(len(rows) // 2)
            for row in self.scheduler.rows[::-1]:
                self.scheduler.put_back(row, replay=self._manner.replay)
            self._runner.clear()
            return False
        return True

    def _put_back(self, sequence: Sequence) -> None:
        self._wipe(sequence)
        self._move(self.scheduler.put_back(sequence, replay=self._manner.replay))

    def _replay(self, outputs: list[Output]) -> int:
        """Do a step's replay; append Failed for what fails. Return the tokens that were replayed."""
        replays = self.scheduler.replays()
        for slot, tokens in reversed(replays):  # from the end, so that moves leave lower slots as they are
            row = self.scheduler.running[slot]
            first = row.stored - len(row.prompt)
            known = row.generated[first : first + tokens]
            try:
                self._runner.replay(slot, row.stored, known, row.given.shift, row.adapter)
            except Exception as error:  # noqa: BLE001 (a model may raise anything; the others go on)
                self._move(self.scheduler.remove(row))
                outputs.append(self._failure(row, error))
                continue
            row.stored += tokens
        return sum(tokens for _, tokens in replays)

    def _decode(self, outputs: list[Output]) -> list[torch.Tensor]:
        """Feed the newest token of each row; return their logits, or nothing when no row was left.

        Out of memory puts rows back by halves; a row that is alone fails.
        """
        tried = False
        while rows := self.scheduler.running:
            try:
                logits = self._runner.decode(
                    [row.next_input for row in rows],
                    [row.stored for row in rows],
                    [row.given.shift for row in rows] if any(row.given.shift for row in rows) else None,
                    **_adapters(rows),
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                release_memory(self._manner.device)  # a fragmented allocator often has it after all
                if tried:
                    self._shrink(error, outputs)
                tried = True
                continue
            for row in rows:
                row.stored += 1
            return [logits]
        return []

    def _shrink(self, error: Exception, outputs: list[Output]) -> None:
        """Put back half of the rows, and let no more run for a while; fail one that is alone."""
        rows = len(self.scheduler.rows)
        if rows == 1:
            row = self.scheduler.running[0]
            self._move(self.scheduler.remove(row))
            outputs.append(self._failure(row, error))
            return
        self._lower(rows // 2)
        _log.warning("out of memory with %d rows: %d go on, the others wait", rows, rows // 2)
        while len(self.scheduler.rows) > rows // 2:
            self._put_back(self.scheduler.least())

    def _lower(self, rows: int) -> None:
        self.scheduler.ceiling = max(1, rows)
        self._clean_steps = 0

    def _recover(self) -> None:
        """Count steps that went well, and after some of them try one row more."""
        self._clean_steps += 1
        if self._clean_steps >= RECOVERY_STEPS and self.scheduler.ceiling < self.scheduler.space.rows:
            self._lower(self.scheduler.ceiling + 1)

    # --- prefill ----------------------------------------------------------------------------------------------------

    def _prefill(self, plan: Plan, outputs: list[Output]) -> list[torch.Tensor]:
        """Do a step's prefill; append Failed for what fails. Return the logits of the rows that joined, in order."""
        if not self._restride(plan.stride, [row for row in self.scheduler.rows if row.ticket not in plan.found]):
            for sequence in plan.whole:
                self._queue_again(sequence)
            return []
        self._begin([one for one in (plan.chunk, *plan.whole) if one is not None and one.ticket in plan.found])
        logits: list[torch.Tensor] = []
        if plan.chunk is not None:
            blocks = plan.found.get(plan.chunk.ticket, [])
            logits += self._prefill_chunk(plan.chunk, plan.chunk_tokens, blocks, outputs)
        for group in self._groups(plan.whole):
            logits += self._prefill_group(group, plan.found, outputs)
        if self._prefixes is not None:
            self._prefixes.release()
        return logits

    def _prefill_chunk(
        self, sequence: Sequence, tokens: int, blocks: list[int], outputs: list[Output]
    ) -> list[torch.Tensor]:
        slot, start = len(self.scheduler.running), sequence.stored
        end = start + tokens
        detailed = sequence.wants_prompt_logprobs
        try:
            self._recall(slot, blocks)
            logits = self._runner.extend(
                slot, [start], [sequence.head[start:end]], all_logits=detailed, **_adapters([sequence])
            )
            if detailed:
                self._note_prompt(sequence, logits, start, end)
                logits = logits[-1:]
        except Exception as error:  # noqa: BLE001 (a model may raise anything; the others go on)
            self._fail_prefill(sequence, error, outputs)
            return []
        sequence.stored = end
        if end < len(sequence.head):
            return []
        self.scheduler.join(sequence)
        return [logits]

    def _prefill_group(
        self, group: list[Sequence], found: dict[int, list[int]], outputs: list[Output]
    ) -> list[torch.Tensor]:
        first = len(self.scheduler.running)
        try:
            for slot, sequence in enumerate(group, first):
                self._recall(slot, found[sequence.ticket])
            logits = self._runner.extend(
                first,
                [sequence.stored for sequence in group],
                [sequence.head[sequence.stored :] for sequence in group],
                inputs=group[0].given.inputs,
                **_adapters(group),
            )
        except Exception as error:  # noqa: BLE001 (as above)
            if len(group) == 1:
                self._fail_prefill(group[0], error, outputs)
                return []
            release_memory(self._manner.device)
            _log.warning("prefill of %d prompts failed (%s): each alone", len(group), first_line(error))
            return [one for sequence in group for one in self._prefill_group([sequence], found, outputs)]
        for sequence in group:
            sequence.stored = len(sequence.head)
            self.scheduler.join(sequence)
        return [logits]

    def _groups(self, sequences: Iterable[Sequence]) -> list[list[Sequence]]:
        """Put prompts together that may share a forward."""
        groups: list[list[Sequence]] = []
        for sequence in sorted(sequences, key=lambda sequence: (sequence.stored > 0, _todo(sequence))):
            group = groups[-1] if groups else []
            if group and len(group) < MAX_GROUP and self._may_join(group, sequence):
                group.append(sequence)
            else:
                groups.append([sequence])
        return groups

    def _may_join(self, group: list[Sequence], longer: Sequence) -> bool:
        """Tell whether a group of prompts may take one more."""
        if longer.given.inputs or group[0].given.inputs:
            return False
        most = self._manner.group_rows
        if most is not None:
            return longer.stored == 0 and (len(group) + 1) * whole_vectors(len(longer.head)) <= most
        if (longer.stored > 0) != (group[0].stored > 0):  # those from the start need no mask
            return False
        return _todo(longer) * 2 <= _todo(group[0]) * 3  # none is padded by more than half of its own length

    def _begin(self, sequences: Iterable[Sequence]) -> None:
        now = time.monotonic()
        for sequence in sequences:
            self.spent.prompt_tokens += len(sequence.head)
            self.spent.cached_tokens += sequence.stored
            if sequence.started_at is None:
                sequence.started_at = now

    def _recall(self, slot: int, blocks: list[int]) -> None:
        if blocks:
            self._runner.recall(slot, blocks)

    def _keep(self, sequence: Sequence, slot: int, keys: list[bytes]) -> None:
        """Keep the full blocks that a row has by now in the prefix store."""
        if self._prefixes is None or not keys:
            return
        fresh = self._prefixes.keep(keys[: sequence.stored // self._prefixes.block_tokens])
        if fresh:
            self._runner.store(slot, [part for part, _ in fresh], [block for _, block in fresh])

    def _note_prompt(self, sequence: Sequence, logits: torch.Tensor, start: int, end: int) -> None:
        """Take the logprobs of the prompt's tokens behind those at `start` to `end`."""
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)  # nothing stands in front of the first
        following = sequence.head[start + 1 : end + 1]
        raw = logprobs_of(logits[: len(following)], following, sequence.sampling.logprobs or 0)
        sequence.prompt_logprobs += [
            self._texts.logprobs(token, one) for token, one in zip(following, raw, strict=True)
        ]

    def _fail_prefill(self, sequence: Sequence, error: Exception, outputs: list[Output]) -> None:
        """Fail a sequence; but one for which there is no memory beside others waits until there is."""
        partial = sequence is self.scheduler.partial
        if is_out_of_memory(error) and self.scheduler.running:
            release_memory(self._manner.device)
            self._lower(len(self.scheduler.running))
            _log.warning("request %d: out of memory in its prefill; it waits", sequence.ticket)
            if partial:
                self._put_back(sequence)
            else:
                self._queue_again(sequence)
            return
        if partial:
            self._move(self.scheduler.remove(sequence))
        sequence.left = True
        outputs.append(self._failure(sequence, error))

    def _queue_again(self, sequence: Sequence) -> None:
        """Let a sequence wait again that has left the queue and has not got a slot."""
        sequence.rewind(replay=self._manner.replay)
        self.scheduler.add(sequence)

    def _failure(self, sequence: Sequence, error: Exception) -> Failed:
        if is_out_of_memory(error):
            release_memory(self._manner.device)
            message = f"the device has no memory left for this request of {sequence.length} tokens"
            _log.warning("request %d: %s", sequence.ticket, message)
            return Failed(sequence.ticket, ErrorCode.OUT_OF_MEMORY.value, message, retryable=True)
        _log.error("request %d: its prefill failed", sequence.ticket, exc_info=error)
        message = f"the model failed on this prompt: {first_line(error)}"
        return Failed(sequence.ticket, ErrorCode.ENGINE_FAILED.value, message)

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _sample(self, logits: torch.Tensor, plan: Plan) -> None:
        """Have a token chosen for every running row that has no known one to come."""
        rows = self.scheduler.running
        slots = [slot for slot, row in enumerate(rows) if row.complete]
        if not slots:
            return
        if len(slots) < len(rows):
            logits = logits[torch.tensor(slots, dtype=torch.long, device=logits.device)]
        chosen = [rows[slot] for slot in slots]
        computed = plan.chunk_tokens + sum(_todo(sequence) for sequence in plan.whole)
        self._flight = _Flight(chosen, choose(logits, [row.draw for row in chosen]), computed)

    def _land(self, outputs: list[Output]) -> list[tuple[Sequence, bool, TokenLogprobs | None]]:
        """Wait for the launched step's tokens and hand them to their rows.

        Rows that end with theirs leave at once. Append Failed for what is no number.

        Returns:
            Whose newest token is to be told, whether it is the last, and its logprobs.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        began = time.monotonic()
        choices = flight.picked.fetch()
        now = time.monotonic()
        share = flight.prompt_tokens / (flight.prompt_tokens + len(flight.rows))
        self.spent.prefill_s += (now - began) * share
        self.spent.decode_s += (now - began) * (1 - share)
        fresh = []
        for row, choice in zip(flight.rows, choices, strict=True):
            if row.left:
                continue
            if choice.problem is not None:
                outputs.append(self._broken(row, choice.token_id, choice.problem))
                continue
            if row.stored == len(row.head) and row in self.scheduler.running:
                # Its prefill was sound: this is its first token.
                self._keep(row, self.scheduler.running.index(row), row.keys)
            over = row.take(choice.token_id, now)
            if over:
                self._finish(row)
            raw = choice.logprobs
            fresh.append((row, over, None if raw is None else self._texts.logprobs(choice.token_id, raw)))
        return fresh

    def _tell(self, fresh: Iterable[tuple[Sequence, bool, TokenLogprobs | None]], outputs: list[Output]) -> None:
        """Turn new tokens into text; end those whose text says so."""
        now = time.monotonic()
        for row, over, logprobs in fresh:
            if row.left and not over:
                continue  # it failed meanwhile
            brought, reason = row.tell(logprobs)
            outputs.append(brought)
            if reason is not None:
                if not over:
                    self._finish(row)
                outputs.append(row.done(reason, now))

    def _finish(self, row: Sequence) -> None:
        """Take out a row that has ended; a conversation that goes on finds what it had."""
        if self._manner.keeps_decoded and self._prefixes is not None and row in self.scheduler.running and row.keys:
            tokens = (*row.prompt, *row.generated)[: row.stored]
            keys = chain(tokens, self._prefixes.block_tokens, row.seed)
            self._keep(row, self.scheduler.running.index(row), keys)
        self._move(self.scheduler.remove(row))

    def _broken(self, row: Sequence, code: int, problem: str) -> Failed:
        """Fail a row whose logits give no token; nobody else may find what it left."""
        if code == NOTHING_LEFT:  # by its own rules: the model is well, and another worker would not do better
            self._move(self.scheduler.remove(row))
            return Failed(row.ticket, ErrorCode.BAD_REQUEST.value, problem)
        _log.error("request %d: %s", row.ticket, problem)
        if row in self.scheduler.running:
            self._runner.clear(self.scheduler.running.index(row))  # no mask would hide NaN from the slot's next row
        if self._prefixes is not None:
            self._prefixes.forget(row.keys)
        self._move(self.scheduler.remove(row))
        return Failed(row.ticket, ErrorCode.ENGINE_FAILED.value, problem)

    def _wipe(self, sequence: Sequence) -> None:
        """Clear the slot of a sequence that leaves before its first token: nobody has looked for NaN there."""
        rows = self.scheduler.rows
        if sequence.first_at is None and sequence.stored and sequence in rows:
            self._runner.clear(rows.index(sequence))

    def _move(self, moves: Iterable[Move]) -> None:
        for move in moves:
            self._runner.move(move.source, move.target, move.tokens)


def _todo(sequence: Sequence) -> int:
    return len(sequence.head) - sequence.stored


def _adapters(rows: list[Sequence]) -> dict[str, Any]:
    """Return what tells the runner the rows' adapters; nothing where all are plain."""
    return {"adapters": [row.adapter for row in rows]} if any(row.adapter for row in rows) else {}
