"""One open stream as the core sees it: what was asked for, what has come, and how its attempts went."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from ..protocol import limits
from ..protocol.errors import BrokerLostError, DrainingError, ErrorCode, ProtocolError, TokenmqError, exception_for
from ..protocol.messages import Cancel, Chunk, Credit, Envelope, Error, Finish, FinishReason, Request
from ..protocol.payload import Prior, resumed
from .events import Attempt, Ending, Submit
from .request import check_size
from .settings import Settings

#: Chunks without tokens are not bounded by credit. An engine sends one, for the text that it held back at the end;
#: more than a few are a fault, which must not fill the memory.
MAX_TAILS = 16
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

    #: Here: no broker takes it at the moment.
    WAITING = "waiting"
    #: Here: its last attempt has failed, and the next one comes after a pause.
    RESTING = "resting"
    #: At a broker or a worker.
    SENT = "sent"


@dataclass(slots=True, eq=False)
class OpenStream:
    """A stream that has not ended.

    Attributes:
        order: what the application asked for.
        submitted_at: when.
        place: where the request is.
        waits_until: how long it waits for a session; means something while WAITING.
        attempt: the present submission, which chunks must carry to count.
        endpoint: the broker that has it; "" unless SENT.
        worker: the worker that has it; "" before it is known.
        first_token: how many tokens there were when the attempt began.
        granted: the credit that the worker knows of.
        heard_at: when the worker was last heard of this stream, or last had reason to be silent; None before STARTED.
        tails: chunks without tokens in this attempt.
        tokens: the tokens so far, of all attempts.
        text_chars: characters of their text so far.
        past: the attempts that have failed.
        served: how many of them a worker had.
        left_at: when it left for the broker; means something while SENT.
        lost_at: since when nobody has taken it; None while a worker has it, and before the first fault.
        barren: how many of them, since the last token, brought none.
        avoid: names of workers that failed it at the place where it is now, the latest last.
    """

    order: Submit
    submitted_at: float
    place: Place = Place.WAITING
    waits_until: float = 0.0
    attempt: int = 1
    endpoint: str = ""
    worker: str = ""
    first_token: int = 0
    granted: int = 0
    heard_at: float | None = None
    tails: int = 0
    tokens: array[int] = field(default_factory=lambda: array("i"))
    text_chars: int = 0
    past: list[Attempt] = field(default_factory=list)
    served: int = 0
    left_at: float = 0.0
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
    def barren_attempts(self) -> int:
        """Attempts since the last token, if the present one has failed now."""
        return 0 if self.has_news else self.barren + 1

    def attempts(self, error: TokenmqError | None = None) -> tuple[Attempt, ...]:
        """Return all attempts; the present one with the error that ends it, if any."""
        return (*self.past, Attempt(self.attempt, self.endpoint, self.worker, self.first_token, error))

    # The way of an attempt

    def leave(self, endpoint: str, settings: Settings, now: float) -> Request:
        """Return the REQUEST of the present attempt, which leaves for this broker.

        Raises:
            BadRequestError: with the tokens so far the request is too large.
        """
        order, deadline, tokens = self.order, self.deadline, tuple(self.tokens)
        payload = order.payload
        if tokens:
            payload = resumed(payload, Prior(tokens, self.text_chars))
            check_size(payload, order.attachments)
        self.place, self.endpoint, self.left_at = Place.SENT, endpoint, now
        self.granted = order.window.limit
        envelope = Envelope(
            model=order.model,
            attempt=self.attempt,
            credit=self.granted,
            deadline_s=None if deadline is None else max(0.0, deadline - now),
            prior_tokens=len(tokens),
            avoid=tuple(self.avoid),
            queue_s=settings.queue_timeout_s,
        )
        return Request(order.id, envelope, payload, order.attachments)

    def started(self, worker: str, now: float) -> None:
        """Note that a worker has the request."""
        self.worker = worker
        if self.heard_at is None:  # what is said twice gives no more time
            self.heard_at = now
        self.lost_at = None

    @property
    def served_attempts(self) -> int:
        """Attempts that a worker had, the present one included."""
        return self.served + (self.heard_at is not None or bool(self.worker))

    def lost_since(self, now: float) -> float:
        """Return since when nobody has taken the request, if the present attempt fails now."""
        waited_there = self.place is Place.SENT and now - self.left_at >= TAKEN_S
        return now if self.lost_at is None or waited_there else self.lost_at

    def fail(self, error: TokenmqError, now: float) -> None:
        """Close the present attempt and begin the next one, here."""
        self.past.append(self.attempts(error)[-1])
        if self.has_news:
            self.avoid = []  # they failed at another place; since then they may have been restarted, and be free
        # A broker's end is not its worker's fault; that one may even have the tokens in its cache still. Nor has a
        # worker failed that was drained: restarted under its name, it may be the only one with a free slot.
        if self.worker and not isinstance(error, (BrokerLostError, DrainingError)):
            self.avoid = [name for name in self.avoid if name != self.worker] + [self.worker]
            del self.avoid[: -limits.MAX_AVOIDED]
        self.barren = self.barren_attempts
        self.served = self.served_attempts
        self.lost_at = self.lost_since(now)
        self.attempt += 1
        self.first_token = len(self.tokens)
        self.place, self.endpoint, self.worker = Place.WAITING, "", ""
        self.heard_at = None
        self.tails = 0

    def silent_at(self, settings: Settings) -> float | None:
        """Return when the worker has been silent for too long; None where it is not its turn, or has all time."""
        if self.heard_at is None or self.order.window.received >= self.granted:
            return None
        seconds = self._patience_s(settings)
        return None if seconds is None else self.heard_at + seconds

    def silence(self, settings: Settings) -> TokenmqError:
        """Return the error for a worker that has been silent for too long."""
        code = ErrorCode.INTER_TOKEN_TIMEOUT if self.has_news else ErrorCode.FIRST_TOKEN_TIMEOUT
        which = "token" if self.has_news else "first token"
        message = f"worker {self.worker} brought no {which} for {self._patience_s(settings):g} s"
        return self.error(code, message, retryable=True)

    def _patience_s(self, settings: Settings) -> float | None:
        return settings.inter_token_timeout_s if self.has_news else settings.first_token_timeout_s

    @property
    def has_news(self) -> bool:
        """Whether the present attempt has brought tokens."""
        return len(self.tokens) > self.first_token

    def grant(self, limit: int, now: float) -> Credit:
        """Return the CREDIT that opens the window up to `limit`."""
        if self.heard_at is not None and self.order.window.received >= self.granted:
            self.heard_at = now  # the worker had nothing to say until now
        self.granted = max(self.granted, limit)
        return Credit(self.order.id, self.attempt, limit)

    def cancel(self) -> Cancel:
        """Return the CANCEL of the present attempt."""
        return Cancel(self.order.id, self.attempt)

    # What comes

    def accept(self, chunk: Chunk, now: float) -> bool:
        """Account for a chunk of the present attempt; tell whether it is new.

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
        if not tokens:
            self.tails += 1
            if self.tails > MAX_TAILS:
                raise self._fault(ErrorCode.PROTOCOL, f"more than {MAX_TAILS} chunks without tokens")
        try:
            window.receive(tokens)
        except ProtocolError as error:
            raise self._fault(ErrorCode.PROTOCOL, error.message) from error
        self.tokens.extend(chunk.token_ids)
        self.text_chars += len(chunk.text)
        self.heard_at = now
        self.lost_at = None
        return True

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
