"""Embeddings of many texts: divided into requests, a few of them under way at a time, and put together in order.

Nothing here waits: `Client` and `AsyncClient` read the streams that `EmbedWork` gives them, each in its own way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic

from ..protocol import limits
from ..protocol.errors import BadRequestError, ProtocolError, TokenmqError
from ..protocol.messages import Chunk, Usage
from ..protocol.schema import text
from .embeddings import Embeddings
from .stream import StreamT_co

#: Requests of one call that are under way at a time: enough to keep several workers busy, few enough that others get
#: their turn and that little is computed in vain when one of them fails.
AT_ONCE = 8
#: Characters of one request: a fair piece of work, and far below the largest payload.
REQUEST_CHARS = 1_000_000

_check_text = text(limits.MAX_PROMPT_CHARS, empty=False)
_NUMBER_BYTES = 4


class EmbedWork(Generic[StreamT_co]):
    """One call of `embed`.

    In a `with` block, loop over it, and give every chunk of each stream to `take`; then there is a `result`.
    """

    def __init__(
        self,
        texts: Sequence[str],
        begin: Callable[[Sequence[str], float | None], StreamT_co],
        deadline_s: float | None,
    ) -> None:
        """Begin nothing yet.

        Args:
            texts: all of them.
            begin: begins a request for some, with the seconds that it may take.
            deadline_s: seconds for all together; None for no bound.

        Raises:
            BadRequestError: one of them is no text.
        """
        self._texts = _checked(texts)
        self._begin = begin
        self._deadline_s = deadline_s
        self._began = time.monotonic()
        self._ahead = deque(_spans(self._texts))
        #: (number of its first text, number behind its last one, stream), the one that is read first.
        self._open: deque[tuple[int, int, StreamT_co]] = deque()
        self._vector_bytes = 0
        self._numbers = bytearray()
        self._prompt_tokens = 0

    def __iter__(self) -> Iterator[StreamT_co]:
        """Yield the requests' streams in order, each to be read to its end."""
        while self._ahead or self._open:
            while self._ahead and len(self._open) < AT_ONCE:
                first, end = self._ahead.popleft()
                self._open.append((first, end, self._begin(self._texts[first:end], self._left_s())))
            stream = self._open[0][2]
            yield stream
            self._open.popleft()
            self._prompt_tokens += stream.usage.prompt_tokens if stream.usage else 0

    def _left_s(self) -> float | None:
        if self._deadline_s is None or not self._open:
            return self._deadline_s
        return max(0.0, self._deadline_s - (time.monotonic() - self._began))

    def take(self, chunk: Chunk) -> None:
        """Put a vector of the present stream where it belongs.

        Raises:
            ProtocolError: it has another dimension than those before it.
        """
        vector = chunk.details.vector if chunk.details else b""
        if not self._numbers:
            self._vector_bytes = len(vector)
            self._numbers = bytearray(len(vector) * len(self._texts))
        number = self._open[0][0] + chunk.index
        if len(vector) != self._vector_bytes:
            found, before = len(vector) // _NUMBER_BYTES, self._vector_bytes // _NUMBER_BYTES
            raise ProtocolError(f"the vector of texts[{number}] has {found} numbers, those before it have {before}")
        place = number * self._vector_bytes
        self._numbers[place : place + self._vector_bytes] = vector

    @property
    def result(self) -> Embeddings:
        """All vectors, when all streams have been read."""
        return Embeddings(self._numbers, self._vector_bytes // _NUMBER_BYTES, Usage(self._prompt_tokens, 0))

    def __enter__(self) -> EmbedWork[StreamT_co]:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what is under way; say in an error which of many texts it is about."""
        if isinstance(error, TokenmqError) and self._open and (span := self._open[0][:2]) != (0, len(self._texts)):
            error.message = f"texts[{span[0]}:{span[1]}]: {error.message}"
            error.args = (error.message,)
        for _, _, stream in self._open:
            stream.cancel()


def _checked(texts: Any) -> list[str]:
    if not isinstance(texts, (list, tuple)):
        raise BadRequestError(f"request.texts: expected a list of strings, got {type(texts).__name__}")
    try:
        return [_check_text(each, f"request.texts[{number}]") for number, each in enumerate(texts)]
    except ProtocolError as error:
        raise BadRequestError(error.message) from error


def _spans(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Divide texts among requests: (number of the first, number behind the last) of each."""
    first = chars = 0
    for number, each in enumerate(texts):
        if number > first and (number - first == limits.MAX_TEXTS or chars + len(each) > REQUEST_CHARS):
            yield first, number
            first, chars = number, 0
        chars += len(each)
    if texts:
        yield first, len(texts)
