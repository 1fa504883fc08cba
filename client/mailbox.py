"""Where the I/O thread leaves what came for one stream, and its reader takes it: the only state that both touch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from ..protocol.credit import ReceiveWindow
from ..protocol.errors import TokenmqError
from ..protocol.messages import Chunk
from .events import Attempt, Ending


class Bell(Protocol):
    """Wakes the readers of mailboxes. Equal bells are rung once for all their mailboxes, hence hashable."""

    def ring(self, mailboxes: Iterable[Mailbox]) -> bool:
        """Wake the readers; never waits. False says that there are none any more and never will be."""

    def __hash__(self) -> int:
        """Return a hash that goes with equality."""


class Mailbox:
    """Chunks on their way to one reader, then how the stream ended.

    What is in it is bounded by the stream's window: the worker sends no more, and the core takes no more.

    Attributes:
        id: the request's id.
        bell: wakes the reader.
        window: the stream's credit, of which the reader's side is kept here.
        ready: the lock of everything in here; readers in threads also wait on it.
        waiter: what a reader in an event loop waits on; the bell's own.
        attempts: the submissions of the request so far.
    """

    __slots__ = ("_chunks", "_outcome", "attempts", "bell", "id", "ready", "waiter", "window")

    def __init__(self, request_id: bytes, window: ReceiveWindow, bell: Bell) -> None:
        """Make an empty one."""
        self.id = request_id
        self.bell = bell
        self.window = window
        # Its lock is re-entrant: a garbage collection in here may run the finalizer of any object.
        self.ready = threading.Condition()
        self.waiter: Any = None
        self.attempts: tuple[Attempt, ...] = (Attempt(1),)
        self._chunks: deque[Chunk] = deque()
        self._outcome: Ending | TokenmqError | None = None

    @property
    def outcome(self) -> Ending | TokenmqError | None:
        """How the stream ended, None while it goes on; chunks may still wait before it."""
        return self._outcome

    def put(self, chunk: Chunk) -> None:
        """Add a chunk; one that comes after the end is dropped."""
        with self.ready:
            if self._outcome is None:
                self._chunks.append(chunk)

    def end(self, outcome: Ending | TokenmqError, *, discard: bool = False) -> bool:
        """Note how the stream ended; the first outcome stays.

        Args:
            outcome: the end or the error.
            discard: throw away what the reader has not taken.

        Returns:
            Whether this was the first.
        """
        with self.ready:
            if self._outcome is not None:
                return False
            self._outcome = outcome
            if discard:
                self._chunks.clear()
            return True

    def take(self) -> tuple[Chunk | Ending | TokenmqError | None, int | None]:
        """Take what comes next.

        Returns:
            The next chunk, or when all are taken the outcome, or None when nothing is there yet; and the window's
            new limit when it is time to grant one.
        """
        with self.ready:
            if not self._chunks:
                return self._outcome, None
            chunk = self._chunks.popleft()
            limit = self.window.consume(len(chunk.token_ids))
            return chunk, limit if self._outcome is None else None
