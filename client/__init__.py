"""The client library: `Client` for threads, `AsyncClient` for asyncio.

with Client("tcp://127.0.0.1:5555") as client:
    for chunk in client.generate("smollm2", prompt="The sea is", max_tokens=64):
        print(chunk.text, end="")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..protocol.errors import (
    BadRequestError,
    BrokerLostError,
    BusyError,
    ClientClosedError,
    DeadlineError,
    DrainingError,
    EngineFailedError,
    ErrorCode,
    ModelNotFoundError,
    NoBrokerError,
    NoWorkerError,
    OutOfMemoryError,
    ProtocolError,
    TokenmqError,
    WorkerLostError,
)
from ..protocol.messages import Chunk, Timings, Usage
from ..transport.endpoints import EndpointError
from .sync import Client, Stream

if TYPE_CHECKING:
    from .aio import AsyncClient, AsyncStream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BadRequestError",
    "BrokerLostError",
    "BusyError",
    "Chunk",
    "Client",
    "ClientClosedError",
    "DeadlineError",
    "DrainingError",
    "EndpointError",
    "EngineFailedError",
    "ErrorCode",
    "ModelNotFoundError",
    "NoBrokerError",
    "NoWorkerError",
    "OutOfMemoryError",
    "ProtocolError",
    "Stream",
    "Timings",
    "TokenmqError",
    "Usage",
    "WorkerLostError",
]


def __getattr__(name: str) -> Any:
    # asyncio takes longer to import than all the rest: only those who use it pay for it.
    if name in ("AsyncClient", "AsyncStream"):
        from . import aio

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
