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
    InterTokenTimeoutError,
    ModelNotFoundError,
    NoBrokerError,
    NoWorkerError,
    OutOfMemoryError,
    ProtocolError,
    QueueTimeoutError,
    ReaderTimeoutError,
    TokenmqError,
    WorkerLostError,
)
from ..protocol.messages import Chunk, Considered, Decision, Timings, TokenLogprob, TokenLogprobs, Usage
from ..transport.endpoints import EndpointError
from .embeddings import Embeddings
from .events import Attempt

if TYPE_CHECKING:
    from .aio import AsyncClient, AsyncStream
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
    "InterTokenTimeoutError",
    "ModelNotFoundError",
    "NoBrokerError",
    "NoWorkerError",
    "OutOfMemoryError",
    "ProtocolError",
    "QueueTimeoutError",
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

_HOMES = {"Client": "sync", "Stream": "sync", "AsyncClient": "aio", "AsyncStream": "aio"}


def __getattr__(name: str) -> Any:
    # Loaded at first use: asyncio takes longer to import than all the rest, and the core must not need zmq.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
