"""What goes wrong at the server, as error codes of tokenmq.

What the client asked for wrongly is bad_request. All else is the engine's fault and retryable: another worker, with
another server, may do better, and the broker's breaker leaves this one alone meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ....protocol.errors import ErrorCode

#: Characters of a server's own words that are passed on.
MAX_QUOTE_CHARS = 600
_REQUEST_FAULTS = frozenset({400, 413, 415, 422})
_BUSY = frozenset({408, 425, 429})
_KEY_REFUSED = frozenset({401, 403})
_ABSENT = frozenset({502, 503, 504})


class ServerError(Exception):
    """How a request failed at the server; code, message and retryable are those of base.Failed.

    Attributes:
        status: the HTTP status that the server answered with; None where it gave no answer, or said 200 first.
    """

    def __init__(self, code: ErrorCode, message: str, retryable: bool = True, status: int | None = None) -> None:
        """Make one."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retryable = retryable


class GoneError(ServerError):
    """Nobody listens at the server's address."""


class KeyRefusedError(ServerError):
    """The server does not take the worker's API key."""


def lives(error: ServerError) -> bool:
    """Tell whether there is a server that can work, whatever it thinks of what it was asked for.

    Proxies answer 502 to 504 for a server that is not there, and llama.cpp's 503 while its model loads.
    """
    return error.status is not None and error.status not in _ABSENT


def engine_failed(message: str) -> ServerError:
    """Return the error for what is the server's or the network's fault."""
    return ServerError(ErrorCode.ENGINE_FAILED, message)


def of_status(server: str, status: int, body: bytes) -> ServerError:
    """Return what an HTTP status other than 200 means.

    Args:
        server: who answered, for the message.
        status: the status.
        body: the begin of the answer.
    """
    if status in _KEY_REFUSED:
        # The server's own words are left out: some quote the key.
        text = f"{server} refused the worker's API key (HTTP {status}); set it where the worker runs"
        return KeyRefusedError(ErrorCode.ENGINE_FAILED, text, True, status)
    words = quoted(body)
    if status in _REQUEST_FAULTS:
        return ServerError(ErrorCode.BAD_REQUEST, f"{server} refused the request: {words}", False, status)
    if status == 404:
        return ServerError(
            ErrorCode.MODEL_NOT_FOUND, f"{server} has no such model or endpoint: {words}", True, status
        )
    code = ErrorCode.BUSY if status in _BUSY else ErrorCode.ENGINE_FAILED
    what = "is busy" if status in _BUSY else "failed"
    return ServerError(code, f"{server} {what} (HTTP {status}): {words}", True, status)


def of_event(server: str, error: Any) -> ServerError:
    """Return what an `error` in mid-stream means: its code is an HTTP status, if it is a number."""
    words = _words(error)
    code = error.get("code") if isinstance(error, Mapping) else None
    if isinstance(code, int) and code in _REQUEST_FAULTS:
        return ServerError(ErrorCode.BAD_REQUEST, f"{server} refused the request: {words}", retryable=False)
    return engine_failed(f"{server} failed in mid-stream: {words}")


def quoted(body: bytes) -> str:
    """Return a server's words about an error: its message, where the body is JSON in one of the usual forms."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _cut(text)
    if isinstance(found, Mapping):
        found = found.get("error") or found.get("detail") or found
    return _words(found)


def _words(error: Any) -> str:
    if isinstance(error, Mapping) and isinstance(error.get("message"), str):
        error = error["message"]
    return _cut(error if isinstance(error, str) else json.dumps(error))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return (text if len(text) <= MAX_QUOTE_CHARS else text[:MAX_QUOTE_CHARS] + "...") or "(no words)"
