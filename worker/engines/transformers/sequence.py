"""One request inside the engine: its tokens, its text and its times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....protocol.errors import BadRequestError, CannotResumeError
from ....protocol.limits import NORMAL_PRIORITY
from ....protocol.messages import Details, FinishReason, TokenLogprobs
from ....protocol.payload import Prior, Sampling
from ..base import Done, Output, Tokens
from .rules import Rules
from .sampling import Draw
from .textstream import TextStream


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request gives the model.

    Attributes:
        token_ids: one or more.
        text: the prompt's text, for an echo.
        inputs: what the model's forward is handed besides token ids, such as pixels; such a prompt is prefilled alone
            and whole.
        seed: tells it apart, for the prefix cache, from prompts of the same tokens with other inputs.
        shift: what the positions of all tokens behind it differ by from their places, where an image takes fewer
            positions than tokens (M-RoPE).
    """

    token_ids: tuple[int, ...]
    text: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: bytes = b""
    shift: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine.

    Attributes:
        ticket: the worker's number for it.
        given: the prompt.
        sampling: how to choose tokens, and when to stop.
        end_ids: tokens that end it.
        context: tokens that it may have in all.
        text: its text.
        submitted_at: when it came, in seconds of a monotonic clock; the times below likewise.
        priority: the greater, the sooner it runs and the later it is put back.
        rules: what restricts its tokens besides `sampling`; None for nothing.
        adapter: the name of the adapter that computes it; "" for the plain model.
        echo: the prompt's text and logprobs come with the first token.
        head: token ids to prefill before it runs: the prompt, and after `resume` or `rewind` perhaps more.
        generated: token ids so far, those of a prior included.
        stored: tokens whose keys and values are in the cache.
        keys: those of the full blocks of `head` in the prefix cache.
        owed: text that has not reached the reader, of an echo or a prior; it goes in front of the first new text.
        prompt_logprobs: one for each token of the prompt, as far as it was computed for an echo.
        started_at: when its prefill began.
        first_at: when it had its first token, one of a prior not counted.
        last_at: when it had its newest one.
        left: it is no longer the scheduler's; what a step brings for it is dropped.
    """

    ticket: int
    given: Prompt
    sampling: Sampling
    end_ids: frozenset[int]
    context: int
    text: TextStream
    submitted_at: float
    priority: int = NORMAL_PRIORITY
    rules: Rules | None = None
    adapter: str = ""
    echo: bool = False
    head: tuple[int, ...] = ()
    generated: list[int] = field(default_factory=list)
    stored: int = 0
    keys: list[bytes] = field(default_factory=list)
    owed: str = ""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    started_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    left: bool = False

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.head = self.prompt
        if self.echo:
            self.owed = self.given.text

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.given.token_ids

    @property
    def length(self) -> int:
        """Tokens of prompt and completion; the absolute index of the next one."""
        return len(self.prompt) + len(self.generated)

    @property
    def complete(self) -> bool:
        """Whether the cache has all its tokens: its logits are those for the next one."""
        return self.stored == self.length

    @property
    def behind(self) -> int:
        """Known tokens that must be in the cache before the newest one can be decoded; 0 unless it is replayed."""
        return max(0, self.length - 1 - self.stored)

    @property
    def next_input(self) -> int:
        """The token to decode: the newest one, or while a prior is replayed the first that the cache lacks."""
        return self.generated[self.stored - len(self.prompt)]

    @property
    def seed(self) -> bytes:
        """What tells its keys in the prefix cache apart from those of the same tokens elsewhere."""
        return self.adapter.encode() + b"\0" + self.given.seed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits behind every token of the prompt are asked for, and not known yet."""
        return self.echo and self.sampling.logprobs is not None and not self.generated

    @property
    def draw(self) -> Draw:
        """How its next token is to be chosen."""
        return Draw(self.sampling, self.length, self.prompt, self.generated, self.end_ids, self.rules)

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
            BadRequestError: the sequence has ended before the prior's last token, the prior is not what its rules
                allow, or its text is shorter than what has arrived.
        """
        tokens = len(prior.token_ids)
        if len(self.prompt) + tokens > self.context:
            sizes = f"the prompt has {len(self.prompt)} tokens and its prior {tokens}"
            raise CannotResumeError(f"{sizes}; the context is {self.context}", retryable=True)
        pieces, reason = [self.owed], None
        for token in prior.token_ids:
            if reason is not None:
                raise BadRequestError(
                    f"the prior has {tokens} tokens, but the completion has ended after {len(self.generated)}"
                )
            self._append(token)
            reason, piece = self._judge()
            pieces.append(piece)
        text = "".join(pieces)
        if len(text) < prior.text_chars:
            raise BadRequestError(f"the prior's tokens give {len(text)} characters, not {prior.text_chars}")
        self.owed = text[prior.text_chars :]
        if reason is not None:
            left: list[Output] = [Tokens(self.ticket, (), self.owed)] if self.owed else []
            return [*left, self.done(reason, self.submitted_at)]
        self.rewind(replay=replay)
        return []

    def rewind(self, *, replay: bool) -> None:
        """Begin anew with what there is: the cache has nothing of it any more.

        What the model is handed besides token ids belongs to the prompt alone, so that tokens behind it are always
        replayed there.
        """
        self.stored = 0
        self.keys = []
        if not self.generated:  # else they are complete, and on their way with the first token
            self.prompt_logprobs = []
        self.head = self.prompt if replay or self.given.inputs else (*self.prompt, *self.generated)

    def take(self, token: int, now: float) -> bool:
        """Append a token; tell whether it is the last one as far as tokens tell, before it becomes text."""
        self._append(token)
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        return self._ends() or self._full()

    def tell(self, logprobs: TokenLogprobs | None = None) -> tuple[Tokens, FinishReason | None]:
        """Turn the newest token into text.

        Args:
            logprobs: the token's, where they are asked for.

        Returns:
            What to send, and why the sequence ends with it, or None when it goes on.
        """
        reason, text = self._judge()
        text, self.owed = self.owed + text, ""
        details = None
        if logprobs is not None:
            details = Details((logprobs,), tuple(self.prompt_logprobs))
            self.prompt_logprobs = []
        return Tokens(self.ticket, (self.generated[-1],), text, details=details), reason

    def _append(self, token: int) -> None:
        self.generated.append(token)
        if self.rules is not None:
            self.rules.accept(token)

    def _may_end(self) -> bool:
        return len(self.generated) >= self.sampling.min_tokens

    def _ends(self) -> bool:
        """Tell whether the newest token ends the sequence by what it is."""
        return self.generated[-1] in self.end_ids and self._may_end()

    def _full(self) -> bool:
        """Tell whether nothing may follow the newest token."""
        finished = self.rules is not None and self.rules.finished
        return len(self.generated) >= self.sampling.max_tokens or self.length >= self.context or finished

    def _judge(self) -> tuple[FinishReason | None, str]:
        if self._ends():
            return FinishReason.STOP, self.text.flush()
        text = self.text.feed(self.generated[-1], may_stop=self._may_end())
        if self.text.stopped:
            return FinishReason.STOP, text
        if self._full():
            text += self.text.flush()
            finished = self.rules is not None and self.rules.finished
            return FinishReason.STOP if self.text.stopped or finished else FinishReason.LENGTH, text
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
