"""An engine whose tokens come out of coroutines: an event loop in a thread of its own, and a queue between.

A subclass serves each job in a coroutine, `answer`, which runs in the loop's thread as long as the job lives and is
cancelled with it. What it yields waits in a queue for the engine thread, which is woken and takes it with its next
step. So nothing here blocks the engine thread, and commands are carried out while tokens are on their way.
"""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...protocol.errors import ErrorCode, TokenmqError
from ...protocol.messages import Details, FinishReason, ModelInfo
from .base import Done, Engine, EngineStats, Failed, Job, Output, Tokens

_T = TypeVar("_T")
#: Characters of an error that are told.
MAX_ERROR_CHARS = 300


@dataclass(slots=True, eq=False)
class Call:
    """A job under way, and what is known of it so far; the loop's thread writes, both read.

    Attributes:
        job: the job.
        submitted_at: when it came, in seconds of the monotonic clock; the times below likewise.
        prompt_tokens: tokens of its prompt; 0 while they are not known.
        completion_tokens: tokens of its completion so far.
        started_at: when its prefill began, where the engine learns that.
        first_at: when its first token came.
        last_at: when its newest token came.
    """

    job: Job
    submitted_at: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None

    def tokens(self, token_ids: Sequence[int], text: str, details: Details | None = None) -> Tokens:
        """Count tokens that have come, and return them as an output."""
        if token_ids:
            self.last_at = time.monotonic()
            self.first_at = self.last_at if self.first_at is None else self.first_at
            self.completion_tokens += len(token_ids)
        return Tokens(self.job.ticket, tuple(token_ids), text, details=details)

    def done(self, reason: FinishReason) -> Done:
        """Return the job's last output."""
        counts = (self.prompt_tokens, self.completion_tokens)
        if self.first_at is None or self.last_at is None:
            return Done(self.job.ticket, reason, *counts, queue_s=time.monotonic() - self.submitted_at)
        started = self.submitted_at if self.started_at is None else self.started_at
        return Done(
            self.job.ticket,
            reason,
            *counts,
            queue_s=started - self.submitted_at,
            prefill_s=self.first_at - started,
            decode_s=self.last_at - self.first_at,
        )


class AsyncEngine(Engine):
    """The bridge; a subclass has `open`, `answer` and `shut`, which run in the loop's thread."""

    def __init__(self) -> None:
        """Make the loop; its thread begins with `load`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"tokenmq-{self.name}", daemon=True)
        #: What came and was not taken by a step. Both ends of a deque may be used by different threads.
        self._arrived: collections.deque[Output] = collections.deque()
        #: Jobs that have not ended, as far as the engine thread has seen, each with its coroutine.
        self._calls: dict[int, tuple[Call, Future[None]]] = {}
        self._failure: Exception | None = None

    @abstractmethod
    async def open(self) -> Sequence[ModelInfo]:
        """Do what `load` is to do, and return or raise as it does."""

    @abstractmethod
    def answer(self, call: Call) -> AsyncGenerator[Output, None]:
        """Serve one job: an async generator of its outputs, the last one Done or Failed.

        A TokenmqError that it raises is the job's Failed with that code; any other error is `engine_failed`. It is
        cancelled (CancelledError at an await) when its job is.
        """

    async def shut(self) -> None:
        """Free what `open` took; it may not have come to its end. No job is left."""
        return

    def fail(self, error: Exception) -> None:
        """Say, in any thread, that the engine as a whole has failed: the next step raises this."""
        self._failure = error
        self.wake()

    # --- what the engine thread calls -------------------------------------------------------------------------------

    def load(self) -> Sequence[ModelInfo]:
        """Start the loop and open the engine in it."""
        self._thread.start()
        return self._wait(self.open())

    def submit(self, job: Job) -> Sequence[Output]:
        """Start a job's coroutine."""
        call = Call(job)
        self._calls[job.ticket] = call, asyncio.run_coroutine_threadsafe(self._serve(call), self._loop)
        return []

    def cancel(self, ticket: int) -> Sequence[Output]:
        """Cancel a job's coroutine; what it brought and nobody took is dropped."""
        if ticket not in self._calls:
            return []
        call, task = self._calls.pop(ticket)
        task.cancel()
        return [call.done(FinishReason.CANCELLED)]

    def step(self) -> Sequence[Output]:
        """Return what has arrived."""
        if self._failure is not None:
            raise self._failure
        outputs = []
        for _ in range(len(self._arrived)):  # what comes meanwhile has its turn in the next step
            output = self._arrived.popleft()
            if output.ticket in self._calls:
                outputs.append(output)
                if isinstance(output, (Done, Failed)):
                    del self._calls[output.ticket]
        return outputs

    def next_step_in(self) -> float | None:
        """Return 0 when something has arrived; else there is nothing to do before `wake`."""
        return 0.0 if self._arrived or self._failure is not None else None

    def reset(self) -> None:
        """Cancel all jobs."""
        for _, task in self._calls.values():
            task.cancel()
        self._calls.clear()
        self._arrived.clear()
        self._failure = None

    def stats(self) -> EngineStats:
        """Return how many jobs there are."""
        return EngineStats(running=len(self._calls))

    def close(self) -> None:
        """Cancel all jobs, shut the engine and end the loop."""
        if not self._thread.is_alive():
            self._loop.close()
            return
        self.reset()
        try:
            self._wait(self.shut())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # --- the loop's thread ------------------------------------------------------------------------------------------

    def _wait(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the loop and wait for it, in the engine thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _serve(self, call: Call) -> None:
        """Bring a job to exactly one end, whatever its coroutine does."""
        ticket = call.job.ticket
        outputs = self.answer(call)
        try:
            async for output in outputs:
                self._put(output)
                if isinstance(output, (Done, Failed)):
                    return
            self._put(Failed(ticket, ErrorCode.ENGINE_FAILED.value, f"engine {self.name!r} left the request open"))
        except TokenmqError as error:
            self._put(Failed(ticket, error.code, error.message, error.retryable))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this job's: the others go on)
            lines = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {lines[0].strip()[:MAX_ERROR_CHARS]}" if lines else type(error).__name__
            self._put(Failed(ticket, ErrorCode.ENGINE_FAILED.value, f"engine {self.name!r}: {text}"))
        finally:
            await outputs.aclose()

    def _put(self, output: Output) -> None:
        """Hand an output over; the first behind an empty queue wakes, and the step that it causes takes all.

        The length is looked at behind the append: an engine thread that has found the queue empty since then, and may
        sleep, sees to it that it is 1.
        """
        self._arrived.append(output)
        if len(self._arrived) == 1:
            self.wake()
