"""One request inside the engine: its tokens, its text and its times. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from ....protocol.errors import BadRequestError, CannotResumeError
from ....protocol.messages import FinishReason
from ....protocol.payload import Prior, Sampling
from ..base import Done, Output, Tokens
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
        head: token ids to prefill before it runs: the prompt, and after `resume` perhaps more.
        generated: token ids so far, those of a prior included.
        stored: tokens whose keys and values are in the cache.
        owed: text of a prior that has not reached the reader; it goes in front of the first new text.
        started_at: when its prefill began.
        first_at: when it had its first token, one of a prior not counted.
        last_at: when it had its newest one.
    """

    ticket: int
    prompt: tuple[int, ...]
    sampling: Sampling
    end_ids: frozenset[int]
    context: int
    text: TextStream
    submitted_at: float
    head: tuple[int, ...] = ()
    generated: list[int] = field(default_factory=list)
    stored: int = 0
    owed: str = ""
    started_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.head = self.prompt

    @property
    def length(self) -> int:
        """Tokens of prompt and completion; the absolute index of the next one."""
        return len(self.prompt) + len(self.generated)

    @property
    def complete(self) -> bool:
        """Whether the cache holds all tokens, so that the model's last logits are those for the next one."""
        return self.stored == self.length

    @property
    def behind(self) -> int:
        """Known tokens that must be in the cache before the newest one can be decoded; 0 unless it is replayed."""
        return max(0, self.length - 1 - self.stored)

    @property
    def next_input(self) -> int:
        """The token to decode: the newest one, or while a prior is replayed the first that the cache lacks."""
        return self.generated[self.stored - len(self.prompt)]

    def resume(self, prior: Prior, *, replay: bool) -> list[Output]:
        """Take the tokens so far, before anything else is done with the sequence.

        Every state that a token leaves follows from the tokens before it: they go through the same text and the same
        judgement as if they had been generated here.

        Args:
            prior: the tokens so far, all of them in the model's vocabulary.
            replay: decode them as they were decoded the first time, after the prefill of the prompt. Else they are
                prefilled with it.

        Returns:
            Nothing when the sequence goes on; the text that is left, if any, and Done when the prior is complete.

        Raises:
            CannotResumeError: a worker with a larger context began it. Retryable: such a one may be there.
            BadRequestError: the sequence has ended before the prior's last token, or its text is shorter than what
                has arrived.
        """
        tokens = len(prior.token_ids)
        if len(self.prompt) + tokens > self.context:
            sizes = f"the prompt has {len(self.prompt)} tokens and its prior {tokens}"
            raise CannotResumeError(f"{sizes}; the context is {self.context}", retryable=True)
        pieces, reason = [], None
        for token in prior.token_ids:
            if reason is not None:
                raise BadRequestError(
                    f"the prior has {tokens} tokens, but the completion has ended after {len(self.generated)}"
                )
            self.generated.append(token)
            reason, piece = self._judge(token)
            pieces.append(piece)
        text = "".join(pieces)
        if len(text) < prior.text_chars:
            raise BadRequestError(f"the prior's tokens give {len(text)} characters, not {prior.text_chars}")
        self.owed = text[prior.text_chars :]
        if reason is not None:
            left: list[Output] = [Tokens(self.ticket, (), self.owed)] if self.owed else []
            return [*left, self.done(reason, self.submitted_at)]
        if not replay:
            self.head = (*self.prompt, *prior.token_ids)
        return []

    def accept(self, token: int, now: float) -> tuple[Tokens, FinishReason | None]:
        """Append a token.

        Returns:
            What to send, and why the sequence ends with it, or None when it goes on.
        """
        self.generated.append(token)
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        reason, text = self._judge(token)
        text, self.owed = self.owed + text, ""
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
