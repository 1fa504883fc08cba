"""One open stream as the core sees it: what was asked for, what has come, and how its attempts went.

A stream has one open attempt. While that one is hedged it has two, at the same broker: whichever brings something
first goes on alone. Both begin at the same token, so what has come is the stream's and belongs to no attempt.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from ..protocol import limits
from ..protocol.errors import BrokerLostError, DrainingError, ErrorCode, ProtocolError, TokenmqError, exception_for
from ..protocol.messages import Cancel, Chunk, Credit, Details, Envelope, Error, Finish, FinishReason, Request
from ..protocol.payload import Prior, resumed
from .attempt import OpenAttempt
from .events import Attempt, Ending, Submit
from .request import check_size
from .settings import Settings

#: Chunks without tokens are not bounded by credit. An engine sends one, for the text that it held back at the end;
#: more than a few are a fault, which must not fill the memory.
MAX_TAILS = 16
#: Nor is text, which comes with tokens: the longest ones of known tokenizers have some hundred characters, and other
#: servers may tell a whole burst as one. Before the first there may be the prompt's own text.
MAX_CHARS_A_TOKEN = 65_536
#: Seconds for which an end is held back because chunks that came another way are missing: these were sent before it.
HELD_FINISH_S = 5.0
#: A broker refuses in milliseconds: a request that it has had for so long was taken, and waited for a worker.
TAKEN_S = 2.0


class StreamFaultError(Exception):
    """What came for a stream cannot be right; `error` is what its reader gets, unless a new attempt repairs it."""

    def __init__(self, error: TokenmqError) -> None:
        """Carry the error."""
        super().__init__(error.message)
        self.error = error


class Place(Enum):
    """Where a request is."""

    #: Here, in line: no broker takes it at the moment.
    WAITING = "waiting"
    #: Here: it is new, or its last attempt has failed and the next one comes at once or after a pause.
    RESTING = "resting"
    #: At a broker or a worker.
    SENT = "sent"


@dataclass(slots=True, eq=False)
class OpenStream:
    """A stream that has not ended.

    Attributes:
        order: what the application asked for.
        submitted_at: when.
        turn: its place among all that this client has submitted.
        place: where the request is.
        waits_until: how long it waits for a session; means something while WAITING.
        open: its attempts that have not ended, which chunks must name to count: one, or while SENT the one that is
            late and then its hedge.
        last: the greatest number that an attempt has had.
        endpoint: the broker that has it; "" unless SENT.
        first_token: how many tokens there were when the open attempts began.
        tokens: the tokens so far, of all attempts.
        text_chars: characters of their text so far.
        past: the attempts that have ended, in the order in which they did.
        served: how many of them a worker had, and failed.
        left_at: when it left for the broker; means something while SENT.
        held_at: since when it waits because brokers limit this client; None where it does not.
        lost_at: since when nobody has taken it; None while a worker has it, and before the first fault.
        barren: how often, since the last token, it had to begin anew without one.
        avoid: names of workers that failed it at the place where it is now, the latest last.
    """

    order: Submit
    submitted_at: float
    turn: int = 0
    place: Place = Place.RESTING
    waits_until: float = 0.0
    open: list[OpenAttempt] = field(default_factory=lambda: [OpenAttempt(1)])
    last: int = 1
    endpoint: str = ""
    first_token: int = 0
    tokens: array[int] = field(default_factory=lambda: array("i"))
    text_chars: int = 0
    past: list[Attempt] = field(default_factory=list)
    served: int = 0
    left_at: float = 0.0
    held_at: float | None = None
    lost_at: float | None = None
    barren: int = 0
    avoid: list[str] = field(default_factory=list)

    @property
    def id(self) -> bytes:
        """The request's id."""
        return self.order.id

    @property
    def deadline(self) -> float | None:
        """When the request loses its worth, None for never."""
        seconds = self.order.deadline_s
        return None if seconds is None else self.submitted_at + seconds

    @property
    def progress(self) -> int:
        """How much has come: tokens."""
        return len(self.tokens)

    @property
    def has_news(self) -> bool:
        """Whether the open attempt has brought tokens."""
        return len(self.tokens) > self.first_token

    @property
    def barren_attempts(self) -> int:
        """How often it had to begin anew without a token, if it has to now."""
        return 0 if self.has_news else self.barren + 1

    @property
    def served_attempts(self) -> int:
        """Attempts that a worker had, if the open ones fail now."""
        return self.served + sum(attempt.served for attempt in self.open)

    @property
    def cause(self) -> TokenmqError | None:
        """What ended the latest attempt that has failed; None where none has."""
        return next((attempt.error for attempt in reversed(self.past) if attempt.error is not None), None)

    def attempts(self, error: TokenmqError | None = None) -> tuple[Attempt, ...]:
        """Return all attempts, the open ones last and with the error that ends them, if any."""
        return (*self.past, *(self._record(attempt, error) for attempt in self.open))

    def _record(self, attempt: OpenAttempt, error: TokenmqError | None, *, cancelled: bool = False) -> Attempt:
        return Attempt(
            attempt.number,
            self.endpoint,
            attempt.worker,
            self.first_token,
            error,
            attempt.hedge,
            cancelled,
            bool(attempt.link),
        )

    # The way of an attempt

    def leave(self, endpoint: str, settings: Settings, now: float) -> Request:
        """Return the REQUEST of the open attempt, which leaves for this broker.

        Raises:
            BadRequestError: with the tokens so far the request is too large.
        """
        (attempt,) = self.open
        request = self._request(attempt, self.avoid, settings, now)
        self.place, self.endpoint, self.left_at = Place.SENT, endpoint, now
        return request

    def hedge(self, settings: Settings, now: float) -> Request:
        """Return the REQUEST of a second attempt, which leaves for the broker that has the first one."""
        (late,) = self.open
        late.hedged = True
        self.last += 1
        second = OpenAttempt(self.last, hedge=True)
        self.open.append(second)
        return self._request(second, self._avoiding(late.worker), settings, now)

    def _request(self, attempt: OpenAttempt, avoid: list[str], settings: Settings, now: float) -> Request:
        order, deadline, tokens = self.order, self.deadline, tuple(self.tokens)
        payload = order.payload
        if tokens:
            payload = resumed(payload, Prior(tokens, self.text_chars))
            check_size(payload, order.attachments)
        attempt.granted = order.window.limit
        envelope = Envelope(
            model=order.model,
            attempt=attempt.number,
            credit=attempt.granted,
            deadline_s=None if deadline is None else max(0.0, deadline - now),
            prior_tokens=len(tokens),
            avoid=tuple(avoid),
            queue_s=settings.queue_timeout_s,
            expected_tokens=max(0, order.max_tokens - len(tokens)),
            priority=order.priority,
            affinity=order.affinity,
            hedge=attempt.hedge,
            explain=order.explain,
        )
        return Request(order.id, envelope, payload, order.attachments)

    def _avoiding(self, worker: str) -> list[str]:
        """Return the names to avoid with this one; the latest ones, if they are too many."""
        return ([name for name in self.avoid if name != worker] + [worker] * bool(worker))[-limits.MAX_AVOIDED :]

    def lost_since(self, now: float) -> float:
        """Return since when nobody has taken the request, if it fails now."""
        waited_there = self.place is Place.SENT and now - self.left_at >= TAKEN_S
        return now if self.lost_at is None or waited_there else self.lost_at

    def close(self, attempt: OpenAttempt, error: TokenmqError | None) -> None:
        """Close one of the open attempts; None where it has not failed, but another one goes on in its place."""
        self.open.remove(attempt)
        self.past.append(self._record(attempt, error, cancelled=error is None))
        if error is None:
            return
        if self.has_news:
            self.avoid = []  # they failed at another place; since then they may have been restarted, and be free
        # A broker's end is not its worker's fault; that one may even have the tokens in its cache still. Nor has a
        # worker failed that was drained: restarted under its name, it may be the only one with a free slot.
        if not isinstance(error, (BrokerLostError, DrainingError)):
            self.avoid = self._avoiding(attempt.worker)
        self.served += attempt.served

    def fail(self, error: TokenmqError, now: float, *, limited: bool = False) -> None:
        """Close the only open attempt and begin the next one, here.

        One that has only reached a limit of its broker has lost nobody, and is no reason for longer pauses.
        """
        if not limited:
            self.barren = self.barren_attempts
            self.lost_at = self.lost_since(now)
        self.close(self.open[0], error)
        self.last += 1
        self.open = [OpenAttempt(self.last)]
        self.first_token = self.progress
        self.place, self.endpoint = Place.RESTING, ""

    # What time brings

    def due_at(self, settings: Settings) -> float | None:
        """Return when a worker has been silent for too long, or late enough for a hedge; None for never."""
        times = [self.hedge_at(settings), *(self.silent_at(attempt, settings) for attempt in self.open)]
        return min((time for time in times if time is not None), default=None)

    def silent_at(self, attempt: OpenAttempt, settings: Settings) -> float | None:
        """Return when the worker has been silent for too long; None where it is not its turn, or has all time."""
        if attempt.finish is not None and attempt.heard_at is not None:
            return attempt.heard_at + HELD_FINISH_S
        since, seconds = attempt.owes_since(self.order.window.received), self._patience_s(settings)
        return None if since is None or seconds is None else since + seconds

    def may_come_by(self, attempt: OpenAttempt, link: str) -> bool:
        """Tell whether chunks of an open attempt come by a link to a worker, or may still begin to."""
        return attempt.link == link or (attempt.direct == link and not attempt.link and not self.has_news)

    def hedge_at(self, settings: Settings) -> float | None:
        """Return when a second worker is to be asked as well; None where none is, or none any more."""
        late, seconds = self.open[0], self.order.hedge_after_s
        if seconds is None or late.hedge or late.hedged or late.tails or self.has_news:
            return None  # one hedge an attempt, and none for a hedge: so it never more than doubles the load
        if self.served_attempts >= settings.max_attempts:
            return None  # both may fail, and that would be one too many
        since = late.owes_since(self.order.window.received)
        return None if since is None else since + seconds

    def silence(self, attempt: OpenAttempt, settings: Settings) -> TokenmqError:
        """Return the error for a worker that has been silent for too long."""
        if attempt.finish is not None:
            missing = f"{attempt.finish.chunks - attempt.chunks} of {attempt.finish.chunks} chunks"
            what = f"worker {attempt.worker} has ended, and {missing} did not come in {HELD_FINISH_S:g} s"
            return self.error(ErrorCode.WORKER_LOST, what, retryable=True)
        code = ErrorCode.INTER_TOKEN_TIMEOUT if self.has_news else ErrorCode.FIRST_TOKEN_TIMEOUT
        which = "token" if self.has_news else "first token"
        message = f"worker {attempt.worker} brought no {which} for {self._patience_s(settings):g} s"
        return self.error(code, message, retryable=True)

    def _patience_s(self, settings: Settings) -> float | None:
        return settings.inter_token_timeout_s if self.has_news else settings.first_token_timeout_s

    # What its workers are told

    def grant(self, attempt: OpenAttempt, limit: int, now: float) -> Credit:
        """Return the CREDIT that opens the window up to `limit`."""
        attempt.grant(limit, self.order.window.received, now)
        return Credit(self.order.id, attempt.number, limit)

    def cancel(self, attempt: OpenAttempt) -> Cancel:
        """Return the CANCEL of an open attempt."""
        return Cancel(self.order.id, attempt.number)

    # What comes

    def find(self, number: int) -> OpenAttempt | None:
        """Return the open attempt of this number; None where it has ended, or was never made."""
        for attempt in self.open:  # no generator: this is done for every chunk
            if attempt.number == number:
                return attempt
        return None

    def started(self, attempt: OpenAttempt, worker: str, now: float) -> None:
        """Note that a worker has the request."""
        attempt.started(worker, now)
        self.lost_at = None

    def accept(self, attempt: OpenAttempt, chunk: Chunk, now: float) -> bool:
        """Account for a chunk of an open attempt; tell whether it is new.

        Raises:
            StreamFaultError: tokens before it are missing, it overlaps with what has come, or exceeds the credit.
        """
        window, tokens = self.order.window, len(chunk.token_ids)
        expected, end = window.received, chunk.offset + tokens
        if chunk.index != 0:
            raise self._fault(ErrorCode.PROTOCOL, f"a chunk of completion {chunk.index}, one was asked for")
        if chunk.offset < expected and end <= expected:
            return False
        if chunk.offset != expected:
            # Tokens went missing on the way: the same request may well succeed again.
            what = f"tokens {chunk.offset} to {end} came where {expected} was next"
            raise self._fault(ErrorCode.WORKER_LOST, what, retryable=True)
        if chunk.details is not None:
            self._check(chunk, chunk.details)
        if not tokens:
            attempt.tails += 1
            if attempt.tails > MAX_TAILS:
                raise self._fault(ErrorCode.PROTOCOL, f"more than {MAX_TAILS} chunks without tokens")
        try:
            window.receive(tokens)
        except ProtocolError as error:
            raise self._fault(ErrorCode.PROTOCOL, error.message) from error
        chars = self.text_chars + len(chunk.text)
        if chars > limits.MAX_PROMPT_CHARS + MAX_CHARS_A_TOKEN * (end + 1):
            raise self._fault(ErrorCode.PROTOCOL, f"{chars} characters of text for {end} tokens")
        self.tokens.extend(chunk.token_ids)
        self.text_chars += len(chunk.text)
        attempt.heard_at = now
        self.lost_at = None
        return True

    def _check(self, chunk: Chunk, details: Details) -> None:
        """Check that what is told of tokens is told of the chunk's own: so it comes once and whole, as these do."""
        tokens, given = len(chunk.token_ids), len(details.logprobs)
        if given not in (0, tokens):
            raise self._fault(ErrorCode.PROTOCOL, f"logprobs of {given} tokens in a chunk of {tokens}")
        if details.prompt_logprobs and chunk.offset:
            raise self._fault(ErrorCode.PROTOCOL, f"logprobs of the prompt in front of token {chunk.offset}")
        if details.vector:
            raise self._fault(ErrorCode.PROTOCOL, "a vector, and a completion was asked for")

    def finish(self, message: Finish) -> Ending:
        """Return the end that a FINISH tells.

        Raises:
            StreamFaultError: tokens that it counts never came.
        """
        received, told = self.order.window.received, message.usage.completion_tokens
        if received < told and message.reason is not FinishReason.CANCELLED:
            what = f"the stream ended after {told} tokens, {received} came"
            raise self._fault(ErrorCode.WORKER_LOST, what, retryable=True)
        return Ending(message.reason, message.usage, message.timings, message.worker)

    def error(self, code: ErrorCode, message: str, *, retryable: bool = False) -> TokenmqError:
        """Return an error about this stream."""
        return exception_for(code.value, message, retryable=retryable, request_id=self.order.id.hex())

    def _fault(self, code: ErrorCode, message: str, *, retryable: bool = False) -> StreamFaultError:
        return StreamFaultError(self.error(code, message, retryable=retryable))


def error_from(message: Error) -> TokenmqError:
    """Return the exception for an ERROR."""
    return exception_for(
        message.code,
        message.message,
        retryable=message.retryable,
        retry_after_s=message.retry_after_s,
        request_id=message.id.hex(),
    )
