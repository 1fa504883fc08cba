"""The messages that end a request, within the limits of the wire."""

from __future__ import annotations

from ..protocol.errors import ErrorCode
from ..protocol.limits import MAX_NAME_CHARS, MAX_SECONDS, MAX_TEXT_CHARS
from ..protocol.messages import Error, Finish, FinishReason, Request, Timings, Usage
from .engines.base import Done
from .streams import Stream


def error(about: Request | Stream, code: ErrorCode | str, message: str, *, retryable: bool = False) -> Error:
    """Return the ERROR that ends a request, before or after it was taken.

    Messages come from engines and exceptions: what the wire does not carry (too long, lone surrogates) is cut or
    replaced, since a broker ends the session of a worker that sends it.
    """
    request_id, attempt = (
        (about.request_id, about.attempt) if isinstance(about, Stream) else (about.id, about.envelope.attempt)
    )
    name = code.value if isinstance(code, ErrorCode) else code[:MAX_NAME_CHARS] or ErrorCode.ENGINE_FAILED.value
    text = message[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode()
    return Error(request_id, attempt, name, text, retryable)


def finish(stream: Stream, reason: FinishReason, done: Done | None, worker: str) -> Finish:
    """Return the FINISH of a stream; `done` is the engine's word on it, None where there is none."""
    if done is None:
        usage, timings = Usage(0, stream.tokens), Timings()
    else:
        # Not less than what it has brought: an engine that does not answer a cancel is answered for with zeros.
        usage = Usage(max(0, done.prompt_tokens), max(stream.tokens, done.completion_tokens))
        timings = Timings(
            worker_queue_s=_seconds(done.queue_s),
            prefill_s=_seconds(done.prefill_s),
            decode_s=_seconds(done.decode_s),
        )
    # What went through the broker is ahead of this; what went past it may come later.
    chunks = 0 if stream.peer is None else stream.chunks
    return Finish(stream.request_id, stream.attempt, reason, usage, timings, worker, chunks)


def _seconds(value: float) -> float:
    return min(max(0.0, value), MAX_SECONDS)
