"""Error codes of the wire, and the exceptions that applications see.

A code is what programs decide by; the message is for a person. `retryable` says whether the same request may
succeed when it is submitted again, unchanged.
"""

from __future__ import annotations

from enum import Enum


class ErrorCode(str, Enum):
    """What went wrong, as it stands in the `code` of an ERROR message."""

    BAD_REQUEST = "bad_request"
    MODEL_NOT_FOUND = "model_not_found"
    NO_WORKER = "no_worker"
    BUSY = "busy"
    RATE_LIMITED = "rate_limited"
    DEADLINE = "deadline"
    QUEUE_TIMEOUT = "queue_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # noqa: S105 (no password)
    INTER_TOKEN_TIMEOUT = "inter_token_timeout"  # noqa: S105
    READER_TIMEOUT = "reader_timeout"
    DRAINING = "draining"
    WORKER_LOST = "worker_lost"
    BROKER_LOST = "broker_lost"
    NO_BROKER = "no_broker"
    CANNOT_RESUME = "cannot_resume"
    ROUTING_LOOP = "routing_loop"
    FORBIDDEN = "forbidden"
    ENGINE_FAILED = "engine_failed"
    OUT_OF_MEMORY = "out_of_memory"
    CLIENT_CLOSED = "client_closed"
    PROTOCOL = "protocol"


class TokenmqError(Exception):
    """The base of all errors that tokenmq raises on purpose.

    Attributes:
        code: what went wrong; a string, since a newer broker may send a code that this version does not know.
        message: the explanation for a person.
        retryable: the same request may succeed when submitted again.
        retry_after_s: seconds to wait before that, where the sender knows; else None.
        request_id: the request's id in hexadecimal, as in every log line; "" where there is none.
    """

    default_code: ErrorCode = ErrorCode.PROTOCOL

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retryable: bool = False,
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        """Make an error; `code` defaults to the class's own."""
        super().__init__(message)
        self.message = message
        self.code = self.default_code.value if code is None else code
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.request_id = request_id


class ProtocolError(TokenmqError):
    """Bytes that are not a valid TMQ/1 message.

    `subject` is the id in the header where the bytes at least had one and were meant as a REQUEST or QUERY: then
    the sender can be answered with an ERROR that names it.
    """

    default_code = ErrorCode.PROTOCOL

    def __init__(self, message: str, *, subject: bytes | None = None) -> None:
        """Make an error about bytes; see the class for `subject`."""
        super().__init__(message)
        self.subject = subject


class BadRequestError(TokenmqError):
    """The request itself is wrong: a field is missing, mistyped or out of its range."""

    default_code = ErrorCode.BAD_REQUEST


class ModelNotFoundError(TokenmqError):
    """No worker serves a model of this name; the message lists those that are served."""

    default_code = ErrorCode.MODEL_NOT_FOUND


class NoWorkerError(TokenmqError):
    """The last worker of the model left while the request was waiting for it."""

    default_code = ErrorCode.NO_WORKER


class BusyError(TokenmqError):
    """The model's waiting room is full; try again after `retry_after_s`."""

    default_code = ErrorCode.BUSY


class RateLimitedError(TokenmqError):
    """This client has more under way than the broker allows one client; try again after `retry_after_s`."""

    default_code = ErrorCode.RATE_LIMITED


class DeadlineError(TokenmqError):
    """The request's time ran out."""

    default_code = ErrorCode.DEADLINE


class QueueTimeoutError(TokenmqError):
    """The request waited for a free worker longer than it may."""

    default_code = ErrorCode.QUEUE_TIMEOUT


class FirstTokenTimeoutError(TokenmqError):
    """The worker that took the request brought no token in time."""

    default_code = ErrorCode.FIRST_TOKEN_TIMEOUT


class InterTokenTimeoutError(TokenmqError):
    """The worker brought tokens, and then no more for too long."""

    default_code = ErrorCode.INTER_TOKEN_TIMEOUT


class ReaderTimeoutError(TokenmqError):
    """The worker kept tokens for a reader that did not take them for too long."""

    default_code = ErrorCode.READER_TIMEOUT


class DrainingError(TokenmqError):
    """The broker or worker is shutting down; another one may take the request."""

    default_code = ErrorCode.DRAINING


class WorkerLostError(TokenmqError):
    """The worker died or fell silent while it held the request."""

    default_code = ErrorCode.WORKER_LOST


class BrokerLostError(TokenmqError):
    """The connection to the broker broke while the request was on its way."""

    default_code = ErrorCode.BROKER_LOST


class NoBrokerError(TokenmqError):
    """No broker answered within the connect timeout."""

    default_code = ErrorCode.NO_BROKER


class CannotResumeError(TokenmqError):
    """The stream broke, and no worker of its model can continue what another one has begun."""

    default_code = ErrorCode.CANNOT_RESUME


class RoutingLoopError(TokenmqError):
    """The request came back to a broker that it had passed, or passed more brokers than it may."""

    default_code = ErrorCode.ROUTING_LOOP


class ForbiddenError(TokenmqError):
    """The broker does not let this client do that."""

    default_code = ErrorCode.FORBIDDEN


class EngineFailedError(TokenmqError):
    """The engine raised an error on this request."""

    default_code = ErrorCode.ENGINE_FAILED


class OutOfMemoryError(TokenmqError):
    """The device had no memory left for this request."""

    default_code = ErrorCode.OUT_OF_MEMORY


class ClientClosedError(TokenmqError):
    """The client was closed while the request was open, or before it was made."""

    default_code = ErrorCode.CLIENT_CLOSED


_BY_CODE: dict[str, type[TokenmqError]] = {
    error.default_code.value: error
    for error in (
        BadRequestError,
        ModelNotFoundError,
        NoWorkerError,
        BusyError,
        RateLimitedError,
        DeadlineError,
        QueueTimeoutError,
        FirstTokenTimeoutError,
        InterTokenTimeoutError,
        ReaderTimeoutError,
        DrainingError,
        WorkerLostError,
        BrokerLostError,
        NoBrokerError,
        CannotResumeError,
        RoutingLoopError,
        ForbiddenError,
        EngineFailedError,
        OutOfMemoryError,
        ClientClosedError,
    )
}


def exception_for(
    code: str,
    message: str,
    *,
    retryable: bool = False,
    retry_after_s: float | None = None,
    request_id: str = "",
) -> TokenmqError:
    """Return the exception that stands for an error code.

    `protocol`, and a code that this version does not know, give a plain TokenmqError that carries the code:
    ProtocolError is about bytes that arrived here.
    """
    kind = _BY_CODE.get(code, TokenmqError)
    return kind(message, code=code, retryable=retryable, retry_after_s=retry_after_s, request_id=request_id)
