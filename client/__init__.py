"""The client library: `Client` for threads, `AsyncClient` for asyncio.

with Client("tcp://127.0.0.1:5555") as client:
    for chunk in client.generate("smollm2", prompt="The sea is", max_tokens=64):
        print(chunk.text, end="")
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..protocol.errors import (
    BadRequestError,
    BrokerLostError,
    BusyError,
    CannotResumeError,
    ClientClosedError,
    DeadlineError,
    DrainingError,
    EngineFailedError,
    ErrorCode,
    FirstTokenTimeoutError,
    ForbiddenError,
    InterTokenTimeoutError,
    ModelNotFoundError,
    NoBrokerError,
    NoWorkerError,
    OutOfMemoryError,
    ProtocolError,
    QueueTimeoutError,
    RateLimitedError,
    ReaderTimeoutError,
    TokenmqError,
    WorkerLostError,
)
from ..transport.endpoints import EndpointError

if TYPE_CHECKING:
    from ..protocol.messages import Chunk, Considered, Decision, Timings, TokenLogprob, TokenLogprobs, Usage
    from .aio import AsyncClient, AsyncStream
    from .embeddings import Embeddings
    from .events import Attempt
    from .sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Attempt",
    "BadRequestError",
    "BrokerLostError",
    "BusyError",
    "CannotResumeError",
    "Chunk",
    "Client",
    "ClientClosedError",
    "Considered",
    "DeadlineError",
    "Decision",
    "DrainingError",
    "Embeddings",
    "EndpointError",
    "EngineFailedError",
    "ErrorCode",
    "FirstTokenTimeoutError",
    "ForbiddenError",
    "InterTokenTimeoutError",
    "ModelNotFoundError",
    "NoBrokerError",
    "NoWorkerError",
    "OutOfMemoryError",
    "ProtocolError",
    "QueueTimeoutError",
    "RateLimitedError",
    "ReaderTimeoutError",
    "Stream",
    "Timings",
    "TokenLogprob",
    "TokenLogprobs",
    "TokenmqError",
    "Usage",
    "WorkerLostError",
]


# Without it Python prints warnings of a program that has set up no logging: errors are exceptions here.
logging.getLogger("tokenmq").addHandler(logging.NullHandler())

# Loaded at first use: asyncio takes longer to import than all the rest, the core must not need zmq, and --help of a
# command only wants the numbers in `defaults`.
_HOMES = {
    "..protocol.messages": (
        "Chunk", "Considered", "Decision", "Timings", "TokenLogprob", "TokenLogprobs", "Usage",
    ),
    ".aio": ("AsyncClient", "AsyncStream"),
    ".embeddings": ("Embeddings",),
    ".events": ("Attempt",),
    ".sync": ("Client", "Stream"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value
