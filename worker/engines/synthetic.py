"""An engine without a model: exact pace, exact length, known text. For tests, benchmarks and trying things out.

Its token at a position is a pure function of the request's seed and the position, `token_at`, and its text is
`text_of` that token, so that a test can check any stream to the last character. Token k of a stream is due at
start + k / rate: a late step is followed by as many more as it takes, and the pace does not drift. A stream that
resumes has its first new token at once, and goes on at this pace.

What else a request may ask for is as easy to check: logprobs are `logprobs_at`, an embedding is `vector_of` its text
(one text at the pace of a token), an echo has a token for each word of the prompt. An image counts as a word. Of
sampling, the seed, max_tokens, the stops and logprobs have an effect; nothing else has.
"""

from __future__ import annotations

import heapq
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ...protocol.errors import ErrorCode
from ...protocol.limits import MAX_TOKEN_ID
from ...protocol.messages import Details, FinishReason, ModelInfo, TokenLogprob, TokenLogprobs
from ...protocol.payload import Generation, Prior
from .base import Done, Engine, EngineStats, Failed, Job, Output, Tokens
from .stops import StopMatcher

#: Requests that run at a time.
SLOTS = 16
#: Token ids are below this.
VOCABULARY = 4096
#: Numbers of an embedding.
DIMENSION = 8
_WORDS = (
    "the a one this that of in on over under from with and then so but sea wind rain sun moon light night day "
    "river hill stone tree leaf bird fish boat road house door lamp song word line ring bell coat bread salt "
    "green blue red grey old new small tall slow quick deep far near calm bright soft runs falls turns waits sings"
)
_TEXTS = tuple(word + " " for word in _WORDS.split())
_MASK = (1 << 64) - 1


def _mixed_seed(seed: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK


def _mixed(seed: int, position: int) -> int:
    """The finalizer of splitmix64, shortened to one round: cheap, and good enough to tell streams apart."""
    value = seed + position * 0xC2B2AE3D27D4EB4F & _MASK
    return (value ^ value >> 31) * 0xBF58476D1CE4E5B9 & _MASK


def token_at(seed: int, position: int, vocabulary: int = VOCABULARY) -> int:
    """Return the token at this position of the completion, from 0, of every request with this seed."""
    return (_mixed(_mixed_seed(seed), position) >> 32) % vocabulary


def text_of(token: int) -> str:
    """Return the text of a token: an English word and a space."""
    return _TEXTS[token % len(_TEXTS)]


def logprobs_at(seed: int, position: int, top: int, vocabulary: int = VOCABULARY) -> TokenLogprobs:
    """Return what is told of that token with `logprobs`: it is the likeliest, and those of the next ids follow."""
    return _logprobs(token_at(seed, position, vocabulary), position, top, vocabulary)


def _logprobs(token: int, position: int, top: int, vocabulary: int) -> TokenLogprobs:
    first = -0.5 - position % 7 / 8  # an exact number in binary, so that it compares equal wherever it has been
    others = [(token + place) % vocabulary for place in range(min(top, vocabulary))]
    ranked = tuple(TokenLogprob(other, text_of(other), first - place) for place, other in enumerate(others))
    return TokenLogprobs(token, text_of(token), first, ranked)


def vector_of(text: str) -> bytes:
    """Return the embedding of a text: a hash of it, as numbers from -1 to 1, float32, little endian."""
    digest = blake2b(text.encode(), digest_size=2 * DIMENSION).digest()
    return struct.pack(f"<{DIMENSION}f", *(number / 2**15 for number in struct.unpack(f"<{DIMENSION}h", digest)))


@dataclass(slots=True, eq=False)
class _Row:
    """One job.

    Attributes:
        begin: position of the first token that is generated here; what is before it came as prior.
        position: of the next token.
        lag: text of the prior that the reader lacks, or an echo; it leaves in front of the next text.
        logprobs: how many are told of each token; None for none.
        prompt_logprobs: what is told of the prompt, with the first token.
        texts: what is to be embedded; then positions are those of texts, and there are no tokens.
    """

    ticket: int
    seed: int
    length: int
    prompt_tokens: int
    submitted: float
    stop_token_ids: frozenset[int]
    stop: StopMatcher | None
    started: float = 0.0
    begin: int = 0
    position: int = 0
    lag: str = ""
    first_at: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    texts: tuple[str, ...] = ()

    def take(self, token: int) -> tuple[str, FinishReason | None]:
        """Take the next token; return the text that it completes and, where it is the last one, why."""
        self.position += 1
        text = _TEXTS[token % len(_TEXTS)]
        reason = FinishReason.LENGTH if self.position >= self.length else None
        if token in self.stop_token_ids:
            text, reason = "", FinishReason.STOP
        if self.stop is not None:
            text = self.stop.feed(text)
            if self.stop.stopped:
                reason = FinishReason.STOP
            elif reason is not None:
                text += self.stop.flush()
        return text, reason


class SyntheticEngine(Engine):
    """Generates words at a pace; see the module."""

    name = "synthetic"

    def __init__(
        self,
        name: str = "synthetic",
        slots: int = SLOTS,
        tokens_per_second: float = 0.0,
        length: int | None = None,
        vocabulary: int = VOCABULARY,
        resumes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an engine.

        Args:
            name: the model's name.
            slots: requests that run at a time; others wait, first come first served.
            tokens_per_second: pace of each stream; 0 for as fast as it goes, one token a stream and step.
            length: most tokens of any completion, whatever its max_tokens; None for no such bound.
            vocabulary: token ids are below it.
            resumes: it says that it can continue what another worker has begun.
            clock: seconds, for tests.

        Raises:
            ValueError: a value is out of its range.
        """
        if slots < 1 or tokens_per_second < 0 or (length is not None and length < 1):
            raise ValueError("slots and length must be 1 or more, tokens_per_second 0 or more")
        if not 1 <= vocabulary <= MAX_TOKEN_ID + 1:
            raise ValueError(f"vocabulary must be from 1 to {MAX_TOKEN_ID + 1}, got {vocabulary}")
        self._model = name
        self._slots = slots
        self._period_s = 1.0 / tokens_per_second if tokens_per_second else 0.0
        self._length = length
        self._vocabulary = vocabulary
        self._resumes = resumes
        self._clock = clock
        self._waiting: dict[int, _Row] = {}
        self._running: dict[int, _Row] = {}
        #: With a pace: (when its next token is due, ticket) of each running row; rows that have gone are skipped.
        self._due: list[tuple[float, int]] = []

    def load(self) -> Sequence[ModelInfo]:
        """Return the one model; there is nothing to load."""
        return [ModelInfo(self._model, chat=True, resumes=self._resumes, embeds=True, images=True)]

    def submit(self, job: Job) -> Sequence[Output]:
        """Take a job; it fails only with a prior that is none."""
        generation, sampling = job.generation, job.generation.sampling
        row = _Row(
            ticket=job.ticket,
            seed=_mixed_seed(sampling.seed),
            length=sampling.max_tokens if self._length is None else min(sampling.max_tokens, self._length),
            prompt_tokens=_prompt_tokens(generation) + len(job.attachments),
            submitted=self._clock(),
            stop_token_ids=frozenset(sampling.stop_token_ids),
            stop=StopMatcher(sampling.stop) if sampling.stop else None,
            logprobs=sampling.logprobs,
        )
        if generation.texts is not None:
            row.texts, row.length = generation.texts, len(generation.texts)
        elif generation.echo:
            self._echo(row, generation)
        ended = [] if generation.prior is None else self._resume(row, generation.prior)
        if not ended:
            self._waiting[job.ticket] = row
            self._admit()
        return ended

    def cancel(self, ticket: int) -> Sequence[Output]:
        """End a job at once."""
        row = self._running.pop(ticket, None) or self._waiting.pop(ticket, None)
        if row is None:
            return []
        self._admit()
        return [self._done(row, FinishReason.CANCELLED, self._clock())]

    def step(self) -> Sequence[Output]:
        """Bring one token of each stream whose token is due."""
        outputs: list[Output] = []
        if not self._period_s:
            now = self._clock()
            for row in list(self._running.values()):
                self._advance(row, now, outputs)
        else:
            self._step_due(outputs)
        if self._waiting:
            self._admit()
        return outputs

    def next_step_in(self) -> float | None:
        """Return seconds until a token is due."""
        if not self._running:
            return None  # then nothing waits either: whoever waits is admitted as soon as there is a slot
        if not self._period_s:
            return 0.0
        while self._due[0][1] not in self._running:
            heapq.heappop(self._due)
        return max(0.0, self._due[0][0] - self._clock())

    def resize(self, slots: int) -> int:
        """Run as many as asked for."""
        self._slots = slots
        self._admit()
        return slots

    def reset(self) -> None:
        """Drop all jobs."""
        self._waiting.clear()
        self._running.clear()
        self._due.clear()

    def stats(self) -> EngineStats:
        """Return the present figures."""
        running = len(self._running)
        return EngineStats(running, len(self._waiting), min(1.0, running / self._slots))

    def _echo(self, row: _Row, generation: Generation) -> None:
        row.lag = _prompt_text(generation)
        if row.logprobs is not None:
            ids = generation.token_ids or range(row.prompt_tokens)
            told = [_logprobs(token, place, row.logprobs, self._vocabulary) for place, token in enumerate(ids)]
            row.prompt_logprobs = (None, *told[1:])

    def _resume(self, row: _Row, prior: Prior) -> list[Output]:
        """Bring a row to where the prior ends; return its end where that is there already."""
        if max(prior.token_ids) >= self._vocabulary:
            return _refused(row, f"token ids must be below {self._vocabulary}, got {max(prior.token_ids)}")
        texts: list[str] = []
        reason = None
        for token in prior.token_ids:
            if reason is not None:
                return _refused(row, f"it has {len(prior.token_ids)} tokens, and ends after {row.position}")
            text, reason = row.take(token)
            texts.append(text)
        text = row.lag + "".join(texts)
        if prior.text_chars > len(text):
            return _refused(row, f"text_chars is {prior.text_chars}, its tokens have {len(text)} characters")
        row.begin = row.position
        row.lag = text[prior.text_chars :]
        if reason is None:
            return []
        done = self._done(row, reason, self._clock())
        return [Tokens(row.ticket, (), row.lag), done] if row.lag else [done]

    def _admit(self) -> None:
        """Start waiting jobs while there are slots; their first token is due at once."""
        while self._waiting and len(self._running) < self._slots:
            row = self._waiting.pop(next(iter(self._waiting)))
            row.started = self._clock()
            self._running[row.ticket] = row
            if self._period_s:
                heapq.heappush(self._due, (row.started, row.ticket))

    def _step_due(self, outputs: list[Output]) -> None:
        now = self._clock()
        later: list[tuple[float, int]] = []  # put back at the end, so that a stream that is late has one token a step
        while self._due and self._due[0][0] <= now:
            _, ticket = heapq.heappop(self._due)
            row = self._running.get(ticket)
            if row is not None and self._advance(row, now, outputs):
                later.append((row.started + (row.position - row.begin) * self._period_s, ticket))
        for entry in later:
            heapq.heappush(self._due, entry)

    def _advance(self, row: _Row, now: float, outputs: list[Output]) -> bool:
        """Bring a row's next token; tell whether it goes on."""
        if row.position == row.begin:
            row.first_at = now
        if row.texts:
            vector = Details(vector=vector_of(row.texts[row.position]))
            outputs.append(Tokens(row.ticket, (), "", row.position, vector))
            row.position += 1
            reason = FinishReason.STOP if row.position == row.length else None
        else:
            token = (_mixed(row.seed, row.position) >> 32) % self._vocabulary
            details = None if row.logprobs is None else self._details(row, token, row.logprobs)
            text, reason = row.take(token)
            if row.lag:
                text, row.lag = row.lag + text, ""
            outputs.append(Tokens(row.ticket, (token,), text, 0, details))
        if reason is None:
            return True
        del self._running[row.ticket]
        outputs.append(self._done(row, reason, now))
        return False

    def _details(self, row: _Row, token: int, top: int) -> Details:
        """Return what is told of a row's next token, and with the first one of the prompt."""
        prompt = () if row.position else row.prompt_logprobs
        return Details((_logprobs(token, row.position, top, self._vocabulary),), prompt)

    @staticmethod
    def _done(row: _Row, reason: FinishReason, now: float) -> Done:
        tokens = 0 if row.texts else row.position
        if row.position == row.begin:
            waited = (row.started or now) - row.submitted
            return Done(row.ticket, reason, row.prompt_tokens, tokens, waited)
        queue_s, prefill_s = row.started - row.submitted, row.first_at - row.started
        return Done(row.ticket, reason, row.prompt_tokens, tokens, queue_s, prefill_s, now - row.first_at)


def _refused(row: _Row, text: str) -> list[Output]:
    return [Failed(row.ticket, ErrorCode.BAD_REQUEST.value, f"request.prior: {text}")]


def _prompt_tokens(generation: Generation) -> int:
    """Return the prompt's length: its words, or its tokens where it came as such."""
    return len(_prompt_text(generation).split()) if generation.token_ids is None else len(generation.token_ids)


def _prompt_text(generation: Generation) -> str:
    """Return the prompt as text; of a chat what its messages say, a line each."""
    if generation.token_ids is not None:
        return "".join(map(text_of, generation.token_ids))
    if generation.messages is not None:
        return "\n".join(_said(message.get("content")) for message in generation.messages)
    return generation.prompt or "\n".join(generation.texts or ())


def _said(content: Any) -> str:
    """Return the text of a message's content, whatever its form."""
    if isinstance(content, (list, tuple)):
        return " ".join(part["text"] for part in content if part["type"] == "text")
    return content or ""
