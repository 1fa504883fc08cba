"""Whether another attempt repairs a failure, how long after it, and which error the reader gets where none does."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol.errors import CannotResumeError, DeadlineError, ModelNotFoundError, TokenmqError
from .settings import Settings
from .streams import OpenStream, Place

#: Pause after attempts that brought nothing: none, then this, doubled each time, with jitter.
PAUSE_S = 0.05
MAX_PAUSE_S = 2.0


def pause_s(barren: int, retry_after_s: float | None, random: Callable[[], float]) -> float:
    """Return seconds until the next attempt.

    Args:
        barren: how many attempts in a row have brought no token.
        retry_after_s: what the sender of the error asks for; None where it does not.
        random: draws from 0 to 1 for the jitter, so that many clients do not come back at one moment.
    """
    # The first fault after a token is nobody's overload: the reader waits, so at once.
    pause = 0.0 if barren < 2 else min(PAUSE_S * 2.0 ** min(barren - 2, 30), MAX_PAUSE_S)
    return max(pause * (0.5 + random() / 2), (retry_after_s or 0.0) * (1 + random() / 4))


def final_error(
    stream: OpenStream, error: TokenmqError, settings: Settings, now: float, again_at: float
) -> TokenmqError | None:
    """Return the error that a failure ends the stream with; None where an attempt at `again_at` may repair it."""
    if isinstance(error, CannotResumeError) and not error.retryable:
        return cannot_resume(stream, error)
    # A model that a worker has served is not unknown: the broker is new, and its workers are not back yet.
    repairable = error.retryable or (isinstance(error, ModelNotFoundError) and stream.served)
    too_late = stream.deadline is not None and again_at >= stream.deadline
    if not repairable or not stream.order.resume or too_late:
        return error
    served, lost_s = stream.served_attempts, now - stream.lost_since(now)
    if served >= settings.max_attempts:
        return _reworded(error, f"{error.message} (that was the last of {served} attempts)")
    if lost_s and lost_s + again_at - now >= settings.recovery_timeout_s:
        return _reworded(error, f"{error.message} (nobody has taken the request for {lost_s:.1f} s)")
    return None


def cannot_resume(stream: OpenStream, error: TokenmqError) -> CannotResumeError:
    """Return the error for a stream that nobody can go on with."""
    return CannotResumeError(_with_cause(error.message, stream), request_id=stream.id.hex())


def unserved(stream: OpenStream, error: TokenmqError) -> TokenmqError:
    """Return the error for a stream that no broker takes."""
    return _reworded(error, _with_cause(error.message, stream))


def too_late(stream: OpenStream) -> DeadlineError:
    """Return the error for a stream whose deadline has passed, as only this side has seen."""
    seconds = f"{stream.order.deadline_s:g} s"
    if stream.place is Place.SENT:
        message = f"the deadline of {seconds} passed, and the broker did not say so"
    elif stream.cause is not None:
        message = f"the deadline of {seconds} passed after {len(stream.past)} attempts; the last one: {stream.cause}"
    else:
        message = f"no broker was found within the request's deadline of {seconds}"
    return DeadlineError(message, request_id=stream.id.hex())


def _reworded(error: TokenmqError, message: str) -> TokenmqError:
    """Return the error with another message."""
    error.message = message
    error.args = (message,)
    return error


def _with_cause(message: str, stream: OpenStream) -> str:
    """Return why a stream cannot go on, and what broke it, where that is something else."""
    cause = stream.cause
    return message if cause is None or message in cause.message else f"{message}; it broke because: {cause}"
