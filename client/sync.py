"""The client for threads: `Client`, and `Stream`, an ordinary iterator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from ..protocol.limits import NORMAL_PRIORITY
from ..protocol.messages import Chunk
from .base import BaseClient
from .embeddings import Embeddings
from .mailbox import Bell, Mailbox
from .management import Management
from .stream import BaseStream

_Answer: TypeAlias = dict[str, Any]
_Rows: TypeAlias = list[dict[str, Any]]


class _ThreadBell:
    """Wakes threads: each waits on its mailbox."""

    def ring(self, mailboxes: Iterable[Mailbox]) -> bool:
        for mailbox in mailboxes:
            with mailbox.ready:
                mailbox.ready.notify_all()
        return True


_BELL = _ThreadBell()


class _Loop(Iterator[Chunk]):
    """One loop over a stream. When it is left early, nothing refers to this object any more, and the stream ends."""

    __slots__ = ("_began", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._began = False

    def __next__(self) -> Chunk:
        chunk = self._stream.__next__()
        self._began = True
        return chunk

    def __del__(self) -> None:
        if self._began:
            self._stream._leave()


class Stream(BaseStream):
    """A request's chunks, to be read from any thread. A loop over it that is left early cancels the request.

    `next(stream)` takes a single chunk and cancels nothing.

    `with client.generate(...) as stream:` cancels at the end of the block; so does the last reference's end.
    """

    def __iter__(self) -> Iterator[Chunk]:
        """Return an iterator over the chunks that have not been taken; leaving it early cancels the stream."""
        return _Loop(self)

    def __next__(self) -> Chunk:
        """Return the next chunk; wait for it.

        Raises:
            StopIteration: the stream is over: see `finish_reason`.
            TokenmqError: it ended with this error; raised every time.
        """
        with self._mailbox.ready:
            while (item := self._next()) is None:
                self._mailbox.ready.wait()
        if isinstance(item, Chunk):
            return item
        raise StopIteration

    def text(self) -> str:
        """Wait for the end; return the text of all chunks that had not been taken yet.

        Raises:
            TokenmqError: the stream ended with it.
        """
        return "".join([chunk.text for chunk in self])

    def __enter__(self) -> Stream:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the stream, unless it is over."""
        self.cancel()


class Client(BaseClient[Stream], Management[_Answer, _Rows]):
    """A client for programs with threads, or with none.

    Use it as a context manager, or call `close`. All methods may be called from any thread.
    """

    def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        deadline_s: float | None = None,
        resume: bool | None = None,
        priority: int = NORMAL_PRIORITY,
        hedge_after_s: float | None = None,
    ) -> Embeddings:
        """Return a vector for each text, in order; wait for them.

        Long lists are divided into several requests, a few of them under way at a time, so that several workers
        share them; each is repaired by itself.

        Args:
            model: the model's name, one of `models()` that embeds.
            texts: a list of strings, none of them empty.
            deadline_s: seconds from now after which the vectors are worth nothing; None for never.
            resume: as for `generate`.
            priority: as for `generate`.
            hedge_after_s: as for `generate`, until the first vector of a request.

        Raises:
            BadRequestError: an argument is not valid; the message names it.
            TokenmqError: a request failed with it.
        """
        work = self._embedding(
            model, texts, deadline_s=deadline_s, resume=resume, priority=priority, hedge_after_s=hedge_after_s
        )
        with work:
            for stream in work:
                for chunk in stream:
                    work.take(chunk)
        return work.result

    def query(self, method: str, **arguments: Any) -> Any:
        """Ask any management question; return plain data. Raises as all methods of Management."""
        return self._ask(method, arguments).result()

    def close(self) -> None:
        """Say goodbye and end the thread; open streams fail with ClientClosedError. Returns within seconds."""
        self._finalizer.detach()
        self._connection.close()

    def __enter__(self) -> Client:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _bell(self) -> Bell:
        return _BELL

    def _stream(self, mailbox: Mailbox, model: str) -> Stream:
        return Stream(self._connection, mailbox, model, self)
