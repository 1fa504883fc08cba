"""A client process on the fake network: the real core, and applications that check every token that they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenmq.client import events
from tokenmq.client.core import ClientCore
from tokenmq.client.settings import Settings
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.errors import ProtocolError, TokenmqError
from tokenmq.protocol.limits import NORMAL_PRIORITY
from tokenmq.protocol.messages import Chunk, Details, FinishReason, Message, Started
from tokenmq.protocol.payload import Generation, Sampling, pack_generation

from .broker import SimBroker
from .engine import MODEL, Answer, logprobs_of, vector_of
from .net import Net
from .peer import Peer


@dataclass(frozen=True, slots=True)
class Wish:
    """What an application asks for, and how it reads.

    Attributes:
        max_tokens: most tokens.
        seed: chooses the answer.
        window: tokens that may be unread.
        read_s: seconds from a chunk's arrival until it is read.
        stops_at: position behind which the reader takes nothing more for `pause_s`; infinity for a steady reader.
        pause_s: how long that is; infinity for a reader that has lost interest without saying so.
        deadline_s: as in generate().
        resume: as in generate().
        hedge_after_s: as in generate().
        priority: as in generate().
        affinity: as in generate(session=...).
        logprobs: as in generate().
        texts: where it is more than 0, so many vectors are wanted, and no tokens.
    """

    max_tokens: int
    seed: int
    window: int
    read_s: float = 0.0
    stops_at: float = math.inf
    pause_s: float = 0.0
    deadline_s: float | None = None
    resume: bool = True
    hedge_after_s: float | None = None
    priority: int = NORMAL_PRIORITY
    affinity: str = ""
    logprobs: int | None = None
    texts: int = 0


class Reading:
    """A stream as its reader sees it.

    Attributes:
        tokens: how many have come.
        chars: how many characters of text.
        outcome: how it ended; None while it goes on.
        attempts: its submissions, known at the end.
        ended_at: when that was.
        held_at: when a worker was last known to have it; before that, when it was submitted.
        lonely_s: for how long no broker had been there for the client then.
    """

    def __init__(self, wish: Wish, now: float) -> None:
        self.wish = wish
        self.submitted_at = self.held_at = now
        self.sampling = Sampling(max_tokens=wish.max_tokens, seed=wish.seed, logprobs=wish.logprobs)
        self.answer = Answer.to(self.sampling)
        self.window = ReceiveWindow(wish.window)
        self.tokens = 0
        self.chars = 0
        self.cancelled = False
        self.closed = False
        self.outcome: events.Ending | TokenmqError | None = None
        self.attempts: tuple[events.Attempt, ...] = ()
        self.ended_at = 0.0
        self.lonely_s = 0.0
        #: When a reader that has stopped goes on; None before it stops.
        self.reads_at: float | None = None

    @property
    def generation(self) -> Generation:
        """What is asked for."""
        return Generation(prompt="x", sampling=self.sampling)

    def take(self, chunk: Chunk) -> None:
        """Check what arrives: the next tokens, and no character that these do not make."""
        answer = self.answer
        assert self.outcome is None, "a chunk after the end"
        assert chunk.index == 0
        assert chunk.offset == self.tokens, f"a gap or a repeat: {chunk.offset} where {self.tokens} was next"
        self.tokens += len(chunk.token_ids)
        assert tuple(chunk.token_ids) == answer.tokens[chunk.offset : self.tokens], "wrong tokens"
        begin, self.chars = self.chars, self.chars + len(chunk.text)
        assert chunk.text == answer.text[begin : self.chars], "wrong text"
        assert self.chars <= answer.ends[self.tokens], "text ahead of its tokens"
        told = () if self.wish.logprobs is None else tuple(map(logprobs_of, chunk.token_ids))
        assert chunk.logprobs == told, "wrong logprobs"

    def end(self, outcome: events.Ending | TokenmqError) -> None:
        """Check the end: there is one, and a good one comes after all tokens and all text."""
        answer = self.answer
        assert self.outcome is None, "a second end"
        self.outcome = outcome
        if isinstance(outcome, events.Ending) and outcome.reason is FinishReason.CANCELLED:
            assert self.cancelled, "cancelled by nobody"
        elif isinstance(outcome, events.Ending):
            assert outcome.reason is answer.reason
            assert self.tokens == len(answer.tokens), f"cut short: {self.tokens} of {len(answer.tokens)} tokens"
            assert self.chars == len(answer.text), f"cut short: {self.chars} of {len(answer.text)} characters"
            assert outcome.usage is not None
            assert outcome.usage.completion_tokens == len(answer.tokens)


class TextsReading(Reading):
    """Vectors as their reader sees them; `tokens` counts them."""

    def __init__(self, wish: Wish, now: float) -> None:
        super().__init__(wish, now)
        self.texts = tuple(f"text {number}" for number in range(wish.texts))
        self._missing = dict(enumerate(self.texts))

    @property
    def generation(self) -> Generation:
        """What is asked for."""
        return Generation(texts=self.texts)

    def take(self, chunk: Chunk) -> None:
        """Check what arrives: the vector of a text that has none."""
        assert self.outcome is None, "a chunk after the end"
        assert chunk.details == Details(vector=vector_of(self._missing.pop(chunk.index))), "a wrong vector"
        self.tokens += 1

    def end(self, outcome: events.Ending | TokenmqError) -> None:
        """Check the end: there is one, and a good one comes after all vectors."""
        assert self.outcome is None, "a second end"
        self.outcome = outcome
        if isinstance(outcome, events.Ending) and outcome.reason is FinishReason.CANCELLED:
            assert self.cancelled, "cancelled by nobody"
        elif isinstance(outcome, events.Ending):
            assert not self._missing, f"{len(self._missing)} vectors are missing"


class SimClient(Peer):
    """A client process and the applications in it.

    Attributes:
        readings: all its streams by request id.
        open_readings: those of them that have not ended.
        resumes: how often an attempt was followed by another one.
        hedges: the attempts that were made beside another one, of streams that have ended.
        was_paused: it has not listened for a while.
        asked: its questions to brokers without an answer, and when they were asked.
        answers: what came for the others: the error's code, "" for a good answer.
    """

    is_client = True

    def __init__(self, net: Net, brokers: dict[str, SimBroker], settings: Settings) -> None:
        super().__init__(net, brokers)
        self.settings = settings
        self.core = ClientCore(settings, random=net.random.random)
        self.readings: dict[bytes, Reading] = {}
        self.open_readings: dict[bytes, Reading] = {}
        self.resumes = 0
        self.hedges: list[events.Attempt] = []
        self.was_paused = False
        self.asked: dict[bytes, float] = {}
        self.answers: list[str] = []
        #: Since when there has been no broker that takes requests; infinity while there is one.
        self._lonely_since = self.clock.now
        self.do(self.tick)

    def pause(self, seconds: float) -> None:
        super().pause(seconds)
        self.was_paused = True

    def woken(self, lag_s: float) -> None:
        self.core.forgive(lag_s)

    def settle(self) -> None:
        super().settle()
        if self.core.sessions.best() is not None:
            self._lonely_since = math.inf
        elif self._lonely_since == math.inf:
            self._lonely_since = self.clock.now

    def tick(self) -> None:
        self._perform(self.core.tick(self.clock.now))

    def connected(self, endpoint: str) -> None:
        self._handle((events.Connected if endpoint in self.brokers else events.Reached)(endpoint))

    def disconnected(self, endpoint: str) -> None:
        self._handle((events.Lost if endpoint in self.brokers else events.Parted)(endpoint, "the connection broke"))

    def took(self, endpoint: str, message: Message | ProtocolError) -> None:
        if endpoint not in self.brokers:
            heard = events.Parted(endpoint, "damaged") if isinstance(message, ProtocolError) else None
            self._handle(heard or events.Heard(endpoint, message))
            return
        if isinstance(message, Started) and message.id in self.open_readings:
            self.open_readings[message.id].held_at = self.clock.now
        kind = events.Malformed if isinstance(message, ProtocolError) else events.Received
        self._handle(kind(endpoint, message))

    def submit(self, wish: Wish) -> None:
        """Ask for a stream, and read it."""
        self.do(self._submit, wish)

    def cancel(self, request_id: bytes) -> None:
        """Lose interest in a stream."""
        self.do(self._cancel, request_id)

    def ask(self, method: str, **arguments: Any) -> None:
        """Ask a broker something."""
        self.do(self._ask, method, arguments)

    def close(self) -> None:
        """Close the client, as the application does."""
        self.do(self._close)

    def _submit(self, wish: Wish) -> None:
        key = self.random.randbytes(16)
        reading = (TextsReading if wish.texts else Reading)(wish, self.clock.now)
        self.readings[key] = self.open_readings[key] = reading
        payload = pack_generation(reading.generation)
        reading.closed = self.core.closed
        order = events.Submit(
            key, MODEL, payload, reading.window, (), wish.deadline_s, wish.resume,
            max_tokens=0 if wish.texts else wish.max_tokens, hedge_after_s=wish.hedge_after_s,
            priority=wish.priority, affinity=wish.affinity, texts=wish.texts,
        )  # fmt: skip
        self._handle(order)

    def _cancel(self, key: bytes) -> None:
        reading = self.open_readings.get(key)
        if reading is not None:
            reading.cancelled = True
            self._handle(events.CancelStream(key))

    def _ask(self, method: str, arguments: dict[str, Any]) -> None:
        key = self.random.randbytes(16)
        self.asked[key] = self.clock.now
        self._handle(events.Ask(key, method, arguments))

    def _close(self) -> None:
        for reading in self.open_readings.values():
            reading.closed = True
        self._handle(events.Close())

    def _handle(self, event: events.Event) -> None:
        self._perform(self.core.handle(event, self.clock.now))

    def _perform(self, actions: Sequence[events.Action]) -> None:
        for action in actions:
            if isinstance(action, events.Deliver):
                self._deliver(action.id, action.chunk)
            elif isinstance(action, (events.Send, events.Tell)):
                self.send(action.endpoint, action.message)
            elif isinstance(action, events.Ended):
                self._ended(self.open_readings.pop(action.id), action)
            elif isinstance(action, events.Answered):
                del self.asked[action.id]  # fails for a second answer
                self.answers.append("" if action.error is None else action.error.code)
            elif isinstance(action, (events.Open, events.Dial)):
                self.open(action.endpoint)
            elif isinstance(action, (events.CloseSocket, events.HangUp)):
                self.shut(action.endpoint)

    def _ended(self, reading: Reading, end: events.Ended) -> None:
        reading.end(end.outcome)
        reading.attempts = end.attempts
        self.resumes += sum(not attempt.hedge for attempt in end.attempts) - 1
        self.hedges += [attempt for attempt in end.attempts if attempt.hedge]
        reading.ended_at = self.clock.now
        reading.lonely_s = self.clock.now - self._lonely_since

    def _deliver(self, key: bytes, chunk: Chunk) -> None:
        reading = self.readings[key]
        reading.take(chunk)
        reading.held_at = self.clock.now
        wish = reading.wish
        if reading.reads_at is None and reading.tokens > wish.stops_at:
            reading.reads_at = self.clock.now + wish.pause_s
        when = max(self.clock.now + wish.read_s, reading.reads_at or 0.0)
        if chunk.token_ids and when < math.inf:
            self.clock.at(when, self._read, key, len(chunk.token_ids))

    def _read(self, key: bytes, tokens: int) -> None:
        limit = self.readings[key].window.consume(tokens)
        if limit is not None:
            self.do(self._handle, events.Grant(key, limit))
            if self.random.random() < 0.05:  # late, lower, or once more: only the highest one counts
                self.do(self._handle, events.Grant(key, self.random.randint(0, limit)))
