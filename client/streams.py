"""One open stream as the core sees it: what was asked for, what has come, and whether a chunk fits behind it."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.errors import ErrorCode, ProtocolError, TokenmqError, exception_for
from ..protocol.messages import Cancel, Chunk, Credit, Envelope, Error, Finish, FinishReason, Request
from .events import Ending, Submit

#: Chunks without tokens are not bounded by credit. An engine sends one, for the text that it held back at the end;
#: more than a few are a fault, which must not fill the memory.
MAX_TAILS = 16


class StreamFaultError(Exception):
    """What came for a stream cannot be right; `error` is what its reader gets."""

    def __init__(self, error: TokenmqError) -> None:
        """Carry the error."""
        super().__init__(error.message)
        self.error = error


@dataclass(slots=True)
class OpenStream:
    """A stream that has not ended.

    Attributes:
        order: what the application asked for.
        submitted_at: when.
        attempt: the submission that chunks must carry to count.
        sent: whether this attempt has left in the present session.
        tails: chunks without tokens so far.
    """

    order: Submit
    submitted_at: float
    attempt: int = 1
    sent: bool = False
    tails: int = 0

    @property
    def deadline(self) -> float | None:
        """When the request loses its worth, None for never."""
        seconds = self.order.deadline_s
        return None if seconds is None else self.submitted_at + seconds

    def request(self, now: float) -> Request:
        """Return the REQUEST of the present attempt."""
        order, deadline = self.order, self.deadline
        envelope = Envelope(
            model=order.model,
            attempt=self.attempt,
            credit=order.window.limit,
            deadline_s=None if deadline is None else max(0.0, deadline - now),
        )
        return Request(order.id, envelope, order.payload, order.attachments)

    def credit(self, limit: int) -> Credit:
        """Return the CREDIT that opens the window up to `limit`."""
        return Credit(self.order.id, self.attempt, limit)

    def cancel(self) -> Cancel:
        """Return the CANCEL of the present attempt."""
        return Cancel(self.order.id, self.attempt)

    def accept(self, chunk: Chunk) -> bool:
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
