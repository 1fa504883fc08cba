"""Requests that take long to read are read in a thread of their own, while the running rows go on.

Megabytes of text take seconds to tokenise, some large images as long to decode, a grammar's trial a quarter of a
second: in the engine's thread all streams would stand still meanwhile. The libraries that do it let other threads
run. One thread reads one request after the other, so that any number of such requests takes one core and no more;
short ones pass them by in the engine's own thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from ....protocol.errors import ErrorCode, TokenmqError
from ....protocol.payload import Generation
from ..base import Failed, Job
from .devices import first_line

#: What a request is when it was read.
ReadT = TypeVar("ReadT")

#: Characters that are tokenised in the engine's thread: 5 to 30 ms, about a step.
SHORT_CHARS = 16_384
#: What each value of a chat counts as, in characters: a template looks at all of them.
_VALUE_CHARS = 16
#: How long the end waits for a request that is being read.
_CLOSE_S = 1.0


def takes_long(job: Job) -> bool:
    """Tell whether a request may take longer to read than a step of the model."""
    generation, sampling = job.generation, job.generation.sampling
    if job.attachments or sampling.json_schema is not None or sampling.regex is not None or sampling.choice:
        return True
    # A bad word is tokenised three times.
    return _chars(generation, SHORT_CHARS - 3 * sum(map(len, sampling.bad_words))) < 0


def _chars(generation: Generation, left: int) -> int:
    """Return what is left of so many characters behind those of the prompt; less than 0 where it has more."""
    chat = (generation.messages, generation.tools, generation.template)
    pending: list[Any] = [part for part in (generation.prompt, generation.texts, *chat) if part]
    while pending and left >= 0:
        item = pending.pop()
        left -= len(item) if isinstance(item, str) else _VALUE_CHARS
        if isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
    return left


def refusal(job: Job, error: BaseException) -> Failed:
    """Return the end of a request that could not be read."""
    if isinstance(error, TokenmqError):
        return Failed(job.ticket, error.code, error.message, error.retryable)
    told = f"{type(error).__name__}: {first_line(error)}"
    return Failed(job.ticket, ErrorCode.ENGINE_FAILED.value, f"the engine refused: {told}")


class Preparation(Generic[ReadT]):
    """The thread, and what it has to read; all methods are the engine thread's."""

    def __init__(self, read: Callable[[Job], ReadT], wake: Callable[[], None]) -> None:
        """Start nothing yet.

        Args:
            read: makes of a request what the engine can run, or raises; called in the thread.
            wake: called there when there is something to `take`.
        """
        self._read = read
        self._wake = wake
        #: By ticket, those that are being read or have been, and when they came; only the engine thread writes it.
        self._held: dict[int, float] = {}
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        #: Both ends of a deque may be used by different threads.
        self._read_ones: deque[tuple[Job, ReadT | BaseException]] = deque()
        self._thread = threading.Thread(target=self._run, name="tokenmq-reader", daemon=True)

    def __len__(self) -> int:
        """Return how many requests it has."""
        return len(self._held)

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return bool(self._read_ones)

    def put(self, job: Job) -> None:
        """Have a request read."""
        self._held[job.ticket] = time.monotonic()
        if self._thread.ident is None:
            self._thread.start()
        self._inbox.put(job)

    def drop(self, ticket: int) -> bool:
        """Forget a request; tell whether it was here."""
        return self._held.pop(ticket, None) is not None

    def take(self) -> list[tuple[Job, ReadT | BaseException, float]]:
        """Return what has been read since the last time, in order, or why it cannot run; and when each came."""
        found = [self._read_ones.popleft() for _ in range(len(self._read_ones))]
        return [(job, read, self._held.pop(job.ticket)) for job, read in found if job.ticket in self._held]

    def clear(self) -> None:
        """Forget all requests."""
        self._held.clear()

    def close(self) -> None:
        """Forget all requests and end the thread; one that it is at is left to itself."""
        self.clear()
        if self._thread.ident is not None:
            self._inbox.put(None)
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (job := self._inbox.get()) is not None:
            if job.ticket not in self._held:
                continue  # nobody waits for it any more
            try:
                read: ReadT | BaseException = self._read(job)
            except BaseException as error:  # noqa: BLE001 (a panic of the tokenizer's is no Exception: told to its client)
                read = error
            self._read_ones.append((job, read))
            self._wake()
