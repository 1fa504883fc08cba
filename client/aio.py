"""The client for asyncio: `AsyncClient`, and `AsyncStream`, an ordinary asynchronous iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

from ..protocol.limits import NORMAL_PRIORITY
from ..protocol.messages import Chunk
from .base import BaseClient
from .connection import CLOSE_TIMEOUT_S, Connection
from .embeddings import Embeddings
from .events import Close
from .mailbox import Bell, Mailbox
from .management import Management
from .stream import BaseStream

_Answer: TypeAlias = Coroutine[Any, Any, dict[str, Any]]
_Rows: TypeAlias = Coroutine[Any, Any, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _LoopBell:
    """Wakes the tasks of one event loop: one call into the loop, however many streams have news."""

    loop: asyncio.AbstractEventLoop

    def ring(self, mailboxes: Iterable[Mailbox]) -> bool:
        try:
            self.loop.call_soon_threadsafe(_wake, list(mailboxes))
        except RuntimeError:
            return False  # the loop is closed
        return True


def _wake(mailboxes: list[Mailbox]) -> None:
    for mailbox in mailboxes:
        waiter = mailbox.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class _Loop(AsyncIterator[Chunk]):
    """One loop over a stream. When it is left early, nothing refers to this object any more, and the stream ends.

    A loop that has got nothing, because another task reads the stream, say, leaves it to that one.
    """

    __slots__ = ("_began", "_stream")

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream
        self._began = False

    async def __anext__(self) -> Chunk:
        chunk = await self._stream.__anext__()
        self._began = True
        return chunk

    def __del__(self) -> None:
        if self._began:
            self._stream._leave()


class AsyncStream(BaseStream):
    """An asynchronous iterator over a request's chunks, for one task of the event loop that it was made in.

    A loop over it that is left early cancels the request, and so does cancelling the task that waits for the next
    chunk. `anext(stream)` takes a single chunk and cancels nothing.
    """

    def __init__(self, connection: Connection, mailbox: Mailbox, model: str, owner: object) -> None:
        """Wrap a mailbox in the running event loop."""
        super().__init__(connection, mailbox, model, owner)
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Return an iterator over the chunks that have not been taken; leaving it early cancels the stream."""
        return _Loop(self)

    async def __anext__(self) -> Chunk:
        """Return the next chunk.

        Raises:
            StopAsyncIteration: the stream is over: see `finish_reason`.
            TokenmqError: it ended with this error; raised every time.
            RuntimeError: it belongs to another event loop, or another task waits for the same stream.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this stream belongs to another event loop: read it where generate() was called")
        while (item := self._next()) is None:
            await self._wait()
        if isinstance(item, Chunk):
            return item
        raise StopAsyncIteration

    async def _wait(self) -> None:
        if self._mailbox.waiter is not None:
            raise RuntimeError("another task is waiting for this stream already")
        self._mailbox.waiter = self._loop.create_future()
        try:
            await self._mailbox.waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._mailbox.waiter = None

    async def text(self) -> str:
        """Wait for the end; return the text of all chunks that had not been taken yet.

        Raises:
            TokenmqError: the stream ended with it.
        """
        return "".join([chunk.text async for chunk in self])

    async def __aenter__(self) -> AsyncStream:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the stream, unless it is over."""
        self.cancel()


class AsyncClient(BaseClient[AsyncStream], Management[_Answer, _Rows]):
    """A client for asyncio. What begins streams (`generate`, `chat`, ...) is not awaited: it returns them at once.

    Several event loops may share one client; each stream belongs to the loop it was made in.
    """

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        deadline_s: float | None = None,
        resume: bool | None = None,
        priority: int = NORMAL_PRIORITY,
        hedge_after_s: float | None = None,
    ) -> Embeddings:
        """Return a vector for each text, in order; arguments and errors as for `Client.embed`."""
        work = self._embedding(
            model, texts, deadline_s=deadline_s, resume=resume, priority=priority, hedge_after_s=hedge_after_s
        )
        with work:
            for stream in work:
                async for chunk in stream:
                    work.take(chunk)
        return work.result

    async def query(self, method: str, **arguments: Any) -> Any:
        """Ask any management question; return plain data. Raises as all methods of Management."""
        return await asyncio.wrap_future(self._ask(method, arguments))

    async def close(self) -> None:
        """Say goodbye and end the thread; open streams fail with ClientClosedError. Returns within seconds."""
        self._finalizer.detach()
        self._connection.post(Close())
        stopped = asyncio.wrap_future(self._connection.stopped)
        await asyncio.wait([stopped], timeout=CLOSE_TIMEOUT_S)
        if stopped.done():
            self._connection.close()  # the thread is at its last instruction: this waits for microseconds

    async def __aenter__(self) -> AsyncClient:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()

    def _bell(self) -> Bell:
        return _LoopBell(asyncio.get_running_loop())

    def _stream(self, mailbox: Mailbox, model: str) -> AsyncStream:
        return AsyncStream(self._connection, mailbox, model, self)
