"""One request inside the engine: its tokens, its text and its times. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from ....protocol.messages import FinishReason
from ....protocol.payload import Sampling
from ..base import Done, Tokens
from .textstream import TextStream


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine.

    Attributes:
        ticket: the worker's number for it.
        prompt: token ids, one or more.
        sampling: how to choose tokens, and when to stop.
        end_ids: tokens that end it.
        context: tokens that it may have in all.
        text: its text.
        submitted_at: when it came, in seconds of a monotonic clock; the times below likewise.
        generated: token ids so far.
        stored: tokens whose keys and values are in the cache: all but the newest once it runs.
        started_at: when its prefill began.
        first_at: when it had its first token.
        last_at: when it had its newest one.
    """

    ticket: int
    prompt: tuple[int, ...]
    sampling: Sampling
    end_ids: frozenset[int]
    context: int
    text: TextStream
    submitted_at: float
    generated: list[int] = field(default_factory=list)
    stored: int = 0
    started_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion; the absolute index of the next one."""
        return len(self.prompt) + len(self.generated)

    def accept(self, token: int, now: float) -> tuple[Tokens, FinishReason | None]:
        """Append a token.

        Returns:
            What to send, and why the sequence ends with it, or None when it goes on.
        """
        self.generated.append(token)
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        reason, text = self._judge(token)
        return Tokens(self.ticket, (token,), text), reason

    def _judge(self, token: int) -> tuple[FinishReason | None, str]:
        if token in self.end_ids:
            return FinishReason.STOP, self.text.flush()
        text = self.text.feed(token)
        if self.text.stopped:
            return FinishReason.STOP, text
        if len(self.generated) >= self.sampling.max_tokens or self.length >= self.context:
            text += self.text.flush()
            return FinishReason.STOP if self.text.stopped else FinishReason.LENGTH, text
        return None, text

    def done(self, reason: FinishReason, now: float) -> Done:
        """Return the sequence's last message."""
        started = now if self.started_at is None else self.started_at
        first = started if self.first_at is None else self.first_at
        last = first if self.last_at is None else self.last_at
        return Done(
            self.ticket,
            reason,
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.generated),
            queue_s=started - self.submitted_at,
            prefill_s=first - started,
            decode_s=last - first,
        )
