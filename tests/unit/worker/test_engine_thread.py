"""EngineThread: a real thread, fake engines; every wait is for an event."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tokenmq.protocol.messages import FinishReason, ModelInfo
from tokenmq.protocol.payload import Generation, Prior, Sampling
from tokenmq.worker.engine_thread import EngineThread, _told
from tokenmq.worker.engines.base import (
    Done,
    Engine,
    EngineLoadError,
    EngineStats,
    Failed,
    Job,
    Output,
    Tokens,
)
from tokenmq.worker.engines.synthetic import SyntheticEngine, text_of
from tokenmq.worker.events import (
    CancelJob,
    Changed,
    EngineDied,
    EngineFailed,
    EngineLoaded,
    EngineOutputs,
    Resize,
    Submit,
)

WAIT_S = 10.0


class ScriptedEngine(Engine):
    """Runs one job at a time by a script: each step calls the next function."""

    name = "scripted"

    def __init__(self, *steps: Callable[[], Sequence[Output]], load: Callable[[], Any] | None = None) -> None:
        self.steps = list(steps)
        self.jobs: list[int] = []
        self.loading = load
        self.resets = 0
        self.closed = threading.Event()
        self.on_reset: Callable[[], None] | None = None
        self.on_submit: Callable[[Job], Sequence[Output]] | None = None
        self.forget_cancels = False

    def load(self) -> Sequence[ModelInfo]:
        found = self.loading() if self.loading else [ModelInfo("toy")]
        return list(found)

    def submit(self, job: Job) -> Sequence[Output]:
        if self.on_submit is not None:
            return self.on_submit(job)
        self.jobs.append(job.ticket)
        return []

    def cancel(self, ticket: int) -> Sequence[Output]:
        if ticket not in self.jobs or self.forget_cancels:
            return []
        self.jobs.remove(ticket)
        return [Done(ticket, FinishReason.CANCELLED, 1, 2)]

    def step(self) -> Sequence[Output]:
        outputs = self.steps.pop(0)()
        self.jobs = [job for job in self.jobs if Done not in {type(o) for o in outputs if o.ticket == job}]
        return outputs

    def next_step_in(self) -> float | None:
        return 0.0 if self.jobs and self.steps else None

    def reset(self) -> None:
        self.resets += 1
        self.jobs.clear()
        if self.on_reset is not None:
            self.on_reset()

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.jobs))

    def close(self) -> None:
        self.closed.set()


class Rig:
    def __init__(self, engine: Engine) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = EngineThread(engine, self.events.put)
        self.thread.start()

    def next(self) -> Any:
        return self.events.get(timeout=WAIT_S)

    def submit(self, ticket: int) -> None:
        self.thread.post(Submit(Job(ticket, "toy", Generation(prompt="x"))))


@pytest.fixture
def rig() -> Iterator[Callable[[Engine], Rig]]:
    made: list[Rig] = []

    def make(engine: Engine) -> Rig:
        made.append(Rig(engine))
        return made[-1]

    yield make
    for one in made:
        assert one.thread.stop(WAIT_S)


def boom() -> Sequence[Output]:
    raise RuntimeError("boom")


def test_it_loads_runs_a_job_and_counts_its_steps(rig: Any) -> None:
    engine = ScriptedEngine(
        lambda: [Tokens(1, (5,), "a")],
        lambda: [Tokens(1, (6,), "b"), Done(1, FinishReason.LENGTH, 1, 2)],
    )
    one = rig(engine)
    loaded = one.next()
    assert isinstance(loaded, EngineLoaded)
    assert loaded.models == (ModelInfo("toy"),)
    one.submit(1)
    assert one.next() == EngineOutputs([Tokens(1, (5,), "a")], EngineStats(running=1))
    assert one.next().outputs[0] == Tokens(1, (6,), "b")
    progress = one.thread.progress()
    assert progress.steps == 2
    assert progress.step_started is None
    assert 0.0 < progress.rates.tokens_per_s <= 2 / 5.0
    assert 0.0 < progress.rates.steps_per_s <= 2 / 5.0


class Narrow(ScriptedEngine):
    """Has room for a few jobs."""

    most = 4

    def resize(self, slots: int) -> int:
        return min(slots, self.most)


def test_an_engine_that_cannot_run_so_many_says_how_many_it_can(rig: Any) -> None:
    one = rig(Narrow())
    one.next()
    one.thread.post(Resize(3))
    one.thread.post(Resize(9))
    assert one.next() == Changed(slots=4)  # and nothing for the 3


def test_an_engine_that_can_run_none_still_counts_as_one(rig: Any) -> None:
    engine = Narrow()
    engine.most = 0
    one = rig(engine)
    one.next()
    one.thread.post(Resize(2))
    assert one.next() == Changed(slots=1)


def test_an_engine_announces_what_it_serves_now_from_any_thread(rig: Any) -> None:
    engine = ScriptedEngine()
    one = rig(engine)
    one.next()
    engine.announce([ModelInfo("toy"), ModelInfo("new")])
    assert one.next() == Changed((ModelInfo("toy"), ModelInfo("new")))


def test_what_is_announced_where_there_is_no_worker_is_for_nobody() -> None:
    ScriptedEngine().announce([ModelInfo("toy")])


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (EngineLoadError("no such model: 'x'"), "no such model: 'x'"),
        (RuntimeError("disk"), "the model cannot be loaded: RuntimeError: disk"),
    ],
)
def test_a_load_that_fails_is_told_and_ends_the_thread(rig: Any, fault: Exception, told: str) -> None:
    def load() -> Any:
        raise fault

    engine = ScriptedEngine(load=load)
    one = rig(engine)
    assert one.next() == EngineDied(told)
    assert engine.closed.wait(WAIT_S)


def test_an_engine_without_models_is_a_load_that_failed(rig: Any) -> None:
    assert rig(ScriptedEngine(load=list)).next() == EngineDied("engine 'scripted' serves no model")


def test_a_step_that_raises_fails_the_jobs_and_the_engine_takes_new_ones(rig: Any) -> None:
    engine = ScriptedEngine(lambda: [Done(1, FinishReason.STOP, 1, 0)], boom, lambda: [Tokens(3, (1,), "x")])
    one = rig(engine)
    one.next()
    one.submit(1)
    one.next()
    one.submit(2)
    assert one.next() == EngineFailed("RuntimeError: boom", frozenset({2}))
    one.submit(3)
    assert one.next().outputs == [Tokens(3, (1,), "x")]
    assert engine.resets == 1


class Panic(BaseException):
    """What libraries written in Rust raise when they break."""


def test_a_panic_is_caught_like_any_error(rig: Any) -> None:
    def panic() -> Sequence[Output]:
        raise Panic("index out of bounds")

    one = rig(ScriptedEngine(panic, lambda: [Tokens(2, (6,), "b"), Done(2, FinishReason.LENGTH, 1, 1)]))
    assert isinstance(one.next(), EngineLoaded)
    one.submit(1)
    failed = one.next()
    assert isinstance(failed, EngineFailed)
    assert (failed.message, failed.tickets) == ("Panic: index out of bounds", frozenset([1]))
    one.submit(2)
    assert one.next().outputs[0] == Tokens(2, (6,), "b")


def test_an_engine_that_cannot_be_reset_is_dead(rig: Any) -> None:
    engine = ScriptedEngine(boom)
    engine.on_reset = boom  # type: ignore[assignment]
    one = rig(engine)
    one.next()
    one.submit(1)
    assert isinstance(one.next(), EngineFailed)
    assert one.next() == EngineDied("the engine could not be reset: RuntimeError: boom")
    assert engine.closed.wait(WAIT_S)


def test_a_job_that_the_engine_cannot_bear_fails_alone(rig: Any) -> None:
    engine = ScriptedEngine()
    engine.on_submit = lambda job: boom()
    one = rig(engine)
    one.next()
    one.submit(4)
    [failed] = one.next().outputs
    assert isinstance(failed, Failed)
    assert (failed.ticket, failed.code, failed.retryable) == (4, "engine_failed", False)
    assert engine.resets == 0


def test_cancel_reaches_a_job_even_if_the_engine_forgets_to_answer(rig: Any) -> None:
    engine = ScriptedEngine()
    one = rig(engine)
    one.next()
    one.submit(1)
    one.thread.post(CancelJob(1))
    assert one.next().outputs == [Done(1, FinishReason.CANCELLED, 1, 2)]
    engine.forget_cancels = True
    one.submit(2)
    one.thread.post(CancelJob(2))
    assert one.next().outputs == [Done(2, FinishReason.CANCELLED, 0, 0)]
    one.thread.post(CancelJob(2))  # it has ended: nothing comes
    one.submit(3)
    one.thread.post(CancelJob(3))
    assert one.next().outputs == [Done(3, FinishReason.CANCELLED, 0, 0)]


class Slowly(SyntheticEngine):
    """Takes a step when the test says so, and tells when one has begun."""

    def __init__(self) -> None:
        super().__init__(name="toy", slots=1, clock=lambda: 5.0)
        self.entered: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.go = threading.Semaphore(0)

    def step(self) -> Sequence[Output]:
        self.entered.put(None)
        assert self.go.acquire(timeout=WAIT_S)
        return super().step()


def test_cancel_frees_the_place_before_the_next_step_wherever_the_job_is(rig: Any) -> None:
    engine = Slowly()
    one = rig(engine)
    one.next()
    one.submit(1)
    engine.entered.get(timeout=WAIT_S)
    one.submit(2)
    one.submit(3)
    one.thread.post(CancelJob(1))  # it has the only place, in the middle of a step
    one.thread.post(CancelJob(3))  # it waits behind the second one
    engine.go.release()
    assert [type(output) for output in one.next().outputs] == [Tokens]
    assert one.next() == EngineOutputs(
        [Done(1, FinishReason.CANCELLED, 1, 1), Done(3, FinishReason.CANCELLED, 1, 0)], EngineStats(1, 0, 1.0)
    )
    engine.entered.get(timeout=WAIT_S)
    assert one.thread.progress().steps == 1
    one.thread.post(CancelJob(2))
    engine.go.release()
    assert [(type(output), output.ticket) for output in one.next().outputs] == [(Tokens, 2)]
    assert one.next().stats == EngineStats()


def test_a_prior_that_is_complete_ends_the_job_without_a_step(rig: Any) -> None:
    one = rig(SyntheticEngine(name="toy", clock=lambda: 5.0))
    one.next()
    generation = Generation(prompt="x", sampling=Sampling(max_tokens=1), prior=Prior((5,), 1))
    one.thread.post(Submit(Job(1, "toy", generation)))
    assert one.next().outputs == [Tokens(1, (), text_of(5)[1:]), Done(1, FinishReason.LENGTH, 1, 1)]
    assert one.thread.progress().steps == 0
    assert one.thread._live == set()


def test_a_long_step_blocks_neither_progress_nor_stop() -> None:
    entered, leave = threading.Event(), threading.Event()

    def long() -> Sequence[Output]:
        entered.set()
        leave.wait(WAIT_S)
        return []

    engine = ScriptedEngine(long)
    one = Rig(engine)
    one.next()
    one.submit(1)
    assert entered.wait(WAIT_S)
    progress = one.thread.progress()
    assert progress.step_started is not None
    assert progress.steps == 0
    one.thread.post(CancelJob(1))  # does not wait
    assert not one.thread.stop(0.01)
    leave.set()
    assert one.thread.stop(WAIT_S)
    assert engine.closed.is_set()


def test_a_thread_that_never_began_is_stopped_at_once() -> None:
    assert EngineThread(ScriptedEngine(), lambda event: None).stop(WAIT_S)


def test_of_an_engines_error_one_line_is_told() -> None:
    def explode() -> Sequence[Output]:
        raise RuntimeError("no kernel\nin the batch: the launch code is 0000")

    def verbose() -> Sequence[Output]:
        raise RuntimeError("x" * 5_000)

    assert _told(RuntimeError()) == "RuntimeError"
    for step, expected in ((explode, "RuntimeError: no kernel"), (verbose, "RuntimeError: " + "x" * 286 + "...")):
        try:
            step()
        except RuntimeError as error:
            told = _told(error)
        assert told == expected
