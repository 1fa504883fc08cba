"""What a simulated engine generates: a function of the request alone, so that every reader can check every token."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tokenmq.protocol.messages import Details, FinishReason, TokenLogprobs
from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.base import Done, Job, Output, Tokens

MODEL = "toy"
#: The step brings up to so many tokens for a stream, as speculative decoding does.
_BURSTS = (1, 1, 1, 2, 3)
#: Texts of tokens, of one character and more, inside and outside of ASCII.
_TEXTS = ("a", " the", "é", "\N{GRINNING FACE}", " \N{EURO SIGN}9", "")


def logprobs_of(token: int) -> TokenLogprobs:
    """Return what is told of a token to those who want it."""
    return TokenLogprobs(token, "", -float(token % 64))


def vector_of(text: str) -> bytes:
    """Return the embedding of a text: something like it."""
    return text.encode().ljust(8)


@dataclass(frozen=True, slots=True)
class Answer:
    """The one right answer to a request.

    Attributes:
        tokens: all of them, in order.
        text: theirs.
        ends: for each number of tokens, from 0, how many characters of the text they make.
        reason: why it ends there.
    """

    tokens: tuple[int, ...]
    text: str
    ends: tuple[int, ...]
    reason: FinishReason

    @classmethod
    def to(cls, sampling: Sampling) -> Answer:
        """Return the answer; like a model's, it may stop before `max_tokens`."""
        seed = sampling.seed
        stops = seed % 3 == 0
        number = 1 + seed // 3 % sampling.max_tokens if stops else sampling.max_tokens
        tokens = tuple((seed * 7919 + place * 104729 + (seed ^ place)) % 50_000 for place in range(number))
        ends, text = [0], ""
        for token in tokens:
            text += _TEXTS[token % len(_TEXTS)]
            ends.append(len(text))
        return cls(tokens, text, tuple(ends), FinishReason.STOP if stops else FinishReason.LENGTH)


class Run:
    """A job in the batch of a simulated engine.

    Attributes:
        done: nothing follows.
    """

    def __init__(self, job: Job, random: Random) -> None:
        """Begin, or go on behind `prior`."""
        generation: Generation = job.generation
        prior = generation.prior
        self._ticket = job.ticket
        self._random = random
        self._answer = Answer.to(generation.sampling)
        self._wants_logprobs = generation.sampling.logprobs is not None
        self._position = 0 if prior is None else len(prior.token_ids)
        self._chars = 0 if prior is None else prior.text_chars
        if prior is not None:
            assert tuple(prior.token_ids) == self._answer.tokens[: self._position], "prior tokens that never were"
            assert self._chars <= self._answer.ends[self._position], "prior text that never was"
        self.done = False

    @property
    def position(self) -> int:
        return self._position

    def step(self) -> list[Output]:
        """Take a step: some tokens, and most of the text that they complete; at the end, all that is left of it."""
        answer = self._answer
        begin = self._position
        end = min(begin + self._random.choice(_BURSTS), len(answer.tokens))
        self._position = end
        self.done = end == len(answer.tokens)
        upto = answer.ends[end]
        if (not self.done or self._random.random() < 0.3) and upto > self._chars and self._random.random() < 0.4:
            upto = self._random.randint(self._chars, upto)  # a character or a stop string may not be complete yet
        outputs: list[Output] = []
        if end > begin or upto > self._chars:
            tokens = answer.tokens[begin:end]
            details = Details(tuple(map(logprobs_of, tokens))) if self._wants_logprobs else None
            outputs.append(Tokens(self._ticket, tokens, answer.text[self._chars : upto], details=details))
        if self.done and upto < len(answer.text):
            outputs.append(Tokens(self._ticket, (), answer.text[upto:]))
        if self.done:
            outputs.append(Done(self._ticket, answer.reason, 1, end))
        self._chars = upto
        return outputs


class TextsRun:
    """A job that embeds texts, in any order, some in a step.

    Attributes:
        done: nothing follows.
        position: tokens of its completion; it has none.
    """

    position = 0

    def __init__(self, job: Job, random: Random) -> None:
        """Begin."""
        assert job.generation.prior is None, "vectors have no tokens to go on behind"
        self._ticket = job.ticket
        self._random = random
        self._left = dict(enumerate(job.generation.texts or ()))
        self.done = False

    def step(self) -> list[Output]:
        """Take a step: some vectors; at the end, the end."""
        some = self._random.sample(sorted(self._left), min(self._random.choice(_BURSTS), len(self._left)))
        outputs: list[Output] = [
            Tokens(self._ticket, (), "", index, Details(vector=vector_of(self._left.pop(index)))) for index in some
        ]
        self.done = not self._left
        return [*outputs, Done(self._ticket, FinishReason.STOP, 1, 0)] if self.done else outputs


def run_of(job: Job, random: Random) -> Run | TextsRun:
    """Return what a job is in the batch."""
    return Run(job, random) if job.generation.texts is None else TextsRun(job, random)
