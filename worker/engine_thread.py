"""The thread that owns the engine: commands go in, events come out, and nobody ever waits for a step.

The I/O thread calls `post` and `progress` and is never blocked by them. The events are handed to a callback, in this
thread, in order; the callback only puts them somewhere and wakes the I/O thread.

Whatever the engine does, each job that was posted comes to exactly one end: Done or Failed among the outputs, a
place in EngineFailed, or EngineDied for all that is left.
A panic in a library written in Rust, such as a tokenizer, is a BaseException and no Exception: it is caught, too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from ..protocol.errors import ErrorCode
from ..protocol.messages import FinishReason, ModelInfo
from .engines.base import Done, Engine, EngineLoadError, EngineStats, Failed, Job, Output, Tokens
from .events import (
    CancelJob,
    Changed,
    EngineAction,
    EngineDied,
    EngineFailed,
    EngineLoaded,
    EngineOutputs,
    EngineProgress,
    Submit,
)
from .rates import Work, rates

#: Characters of an engine's error that are told.
MAX_ERROR_CHARS = 300

EngineEvent = EngineLoaded | EngineOutputs | EngineFailed | EngineDied | Changed


class EngineThread:
    """Runs one engine; `start`, then `post`, and `stop` at the end."""

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[EngineEvent], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the thread; it begins with `start`.

        Args:
            engine: the engine; from `start` on only the thread touches it.
            deliver: called in the thread with each event; for models that the engine announces, in any thread.
            clock: the clock of EngineProgress, in seconds.
        """
        self._engine = engine
        self._deliver = deliver
        self._clock = clock
        #: None only wakes the thread.
        self._inbox: queue.SimpleQueue[EngineAction | None] = queue.SimpleQueue()
        self._stopping = False
        #: Tickets that the engine has and that have not ended.
        self._live: set[int] = set()
        self._steps = 0
        self._step_started: float | None = None
        self._work = Work(clock())
        self._told = EngineStats()
        # A daemon: a step that never ends must not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name="tokenmq-engine", daemon=True)

        engine.announce = self._announced
        engine.wake = self._wake

    # --- called by the I/O thread -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def post(self, command: EngineAction) -> None:
        """Hand a command to the engine; never waits."""
        self._inbox.put(command)

    def progress(self) -> EngineProgress:
        """Return how the engine is getting on; never waits."""
        return EngineProgress(self._steps, self._step_started, rates(self._work, self._clock()))

    def stop(self, wait_s: float) -> bool:
        """End the thread after its present step and close the engine; tell whether that was done within `wait_s`."""
        self._stopping = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(wait_s)
        return not self._thread.is_alive()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._load():
                while not self._stopping:
                    self._round()
        finally:
            self._engine.close()

    def _load(self) -> bool:
        began = self._clock()
        try:
            models = tuple(self._engine.load())
            if not models:
                raise EngineLoadError(f"engine {self._engine.name!r} serves no model")
        except EngineLoadError as error:
            self._deliver(EngineDied(str(error)))
            return False
        except BaseException as error:  # noqa: BLE001 (the engine's code is not ours: whatever it raises is told)
            self._deliver(EngineDied(f"the model cannot be loaded: {_told(error)}"))
            return False
        self._deliver(EngineLoaded(models, self._clock() - began))
        return True

    def _round(self) -> None:
        """Take the commands that are there, or wait for one, then make one step if it is due."""
        try:
            wait_s = self._engine.next_step_in()
            outputs = self._commands(wait_s)
            if self._stopping:
                return
            if outputs:
                self._bring(outputs)
            wait_s = self._engine.next_step_in()
            if wait_s is not None and wait_s <= 0:
                self._bring(self._step(), steps=1)
        except BaseException as error:  # noqa: BLE001 (as above: it fails the jobs, never the worker)
            self._recover(error)

    def _commands(self, wait_s: float | None) -> list[Output]:
        """Carry out all commands that have come; wait for the first one up to `wait_s`, or for ever."""
        outputs: list[Output] = []
        wait = wait_s is None or wait_s > 0
        while wait or not self._inbox.empty():
            try:
                command = self._inbox.get(timeout=wait_s if wait else 0)
            except queue.Empty:
                break
            wait = False
            if command is None:
                break
            outputs.extend(self._carry_out(command))
        return outputs

    def _carry_out(self, command: EngineAction) -> Sequence[Output]:
        if isinstance(command, Submit):
            return self._submit(command.job)
        if isinstance(command, CancelJob):
            return self._cancel(command.ticket)
        slots = max(1, self._engine.resize(command.slots))
        if slots < command.slots:
            self._deliver(Changed(slots=slots))
        return []

    def _submit(self, job: Job) -> Sequence[Output]:
        self._live.add(job.ticket)
        try:
            return self._engine.submit(job)
        except BaseException as error:  # noqa: BLE001 (one job that the engine cannot bear must not end the others)
            self._engine.cancel(job.ticket)
            return [Failed(job.ticket, ErrorCode.ENGINE_FAILED.value, f"the engine refused: {_told(error)}")]

    def _cancel(self, ticket: int) -> Sequence[Output]:
        outputs = self._engine.cancel(ticket)
        if ticket in self._live and not any(isinstance(output, (Done, Failed)) for output in outputs):
            return [*outputs, Done(ticket, FinishReason.CANCELLED, 0, 0)]
        return outputs

    def _wake(self) -> None:
        self._inbox.put(None)

    def _announced(self, models: Sequence[ModelInfo]) -> None:
        self._deliver(Changed(tuple(models)))

    def _step(self) -> Sequence[Output]:
        self._step_started = self._clock()
        try:
            return self._engine.step()
        finally:
            self._step_started = None
            self._steps += 1

    def _bring(self, outputs: Sequence[Output], steps: int = 0) -> None:
        """Hand out what came, after so many steps, and keep the books."""
        stats = self._engine.stats()  # first: should it raise, all jobs are still in the books, and fail
        tokens = 0
        for output in outputs:
            if isinstance(output, Tokens):
                tokens += len(output.token_ids)
            else:
                self._live.discard(output.ticket)
        self._count(steps, tokens, stats)
        self._deliver(EngineOutputs(outputs, stats))

    def _count(self, steps: int, tokens: int, stats: EngineStats) -> None:
        """Add what was done since the last time to the rates."""
        before, self._told = self._told, stats
        done = Work(
            self._clock(),
            steps,
            tokens,
            stats.prefill_s - before.prefill_s,
            stats.decode_s - before.decode_s,
            stats.prompt_tokens - before.prompt_tokens,
            stats.cached_tokens - before.cached_tokens,
        )
        self._work = self._work.plus(done)

    def _recover(self, error: BaseException) -> None:
        """Fail what the engine had and let it begin anew; without an engine that can do so there is no worker."""
        lost = frozenset(self._live)
        self._live.clear()
        self._deliver(EngineFailed(_told(error), lost))
        try:
            self._engine.reset()
        except BaseException as second:  # noqa: BLE001 (as above)
            self._stopping = True
            self._deliver(EngineDied(f"the engine could not be reset: {_told(second)}"))


def _told(error: BaseException) -> str:
    """Return what is told of an error of the engine's, to its clients and in the log: one line, not long.

    What follows the first line is what a library had in its hands, and that may be somebody's prompt.
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]}..."
