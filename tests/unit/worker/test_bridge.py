"""AsyncEngine: a real loop in its thread, answers by hand; every wait is for an event."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import pytest

from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.messages import FinishReason, ModelInfo
from tokenmq.protocol.payload import Generation
from tokenmq.worker.engine_thread import EngineEvent, EngineThread
from tokenmq.worker.engines.base import Done, EngineLoadError, Failed, Job, Output, Tokens
from tokenmq.worker.engines.bridge import AsyncEngine, Call
from tokenmq.worker.events import CancelJob, EngineDied, EngineFailed, EngineLoaded, EngineOutputs, Submit

WAIT_S = 10.0
#: An answer ends with this.
END = "end"


class ByHand(AsyncEngine):
    """Each job's answer is what the test sends it: texts, END, or an error to raise."""

    name = "by-hand"

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.opening = error
        self.inputs: dict[int, asyncio.Queue[str | Exception]] = {}
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.cancelled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.was_shut = threading.Event()

    async def open(self) -> Sequence[ModelInfo]:
        if self.opening is not None:
            raise self.opening
        return [ModelInfo("toy")]

    async def answer(self, call: Call) -> AsyncGenerator[Output, None]:
        ticket = call.job.ticket
        self.inputs[ticket] = asyncio.Queue()
        self.begun.put(ticket)
        call.prompt_tokens = 3
        try:
            while (given := await self.inputs[ticket].get()) != END:
                if isinstance(given, Exception):
                    raise given
                if not given:
                    return
                yield call.tokens([7], given)
        except asyncio.CancelledError:
            self.cancelled.put(ticket)
            raise
        yield call.done(FinishReason.STOP)

    async def shut(self) -> None:
        self.was_shut.set()

    def send(self, ticket: int, *given: str | Exception) -> None:
        """Let the answer go on, from the test's thread; all that is given is there at once."""

        def put() -> None:
            for item in given:
                self.inputs[ticket].put_nowait(item)

        self._loop.call_soon_threadsafe(put)


class Stage:
    """An engine in its thread, and what it delivered."""

    def __init__(self, engine: ByHand) -> None:
        self.engine = engine
        self.events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self.thread = EngineThread(engine, self.events.put)
        self.thread.start()

    def submit(self, ticket: int) -> None:
        self.thread.post(Submit(Job(ticket, "toy", Generation(prompt="x"))))
        assert self.engine.begun.get(timeout=WAIT_S) == ticket

    def outputs(self, until: Callable[[Output], bool]) -> list[Output]:
        found: list[Output] = []
        while not found or not until(found[-1]):
            event = self.events.get(timeout=WAIT_S)
            assert isinstance(event, EngineOutputs)
            found.extend(event.outputs)
        return found


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage(ByHand())
    assert isinstance(made.events.get(timeout=WAIT_S), EngineLoaded)
    yield made
    assert made.thread.stop(WAIT_S)
    assert made.engine.was_shut.is_set()


def ends(output: Output) -> bool:
    return isinstance(output, (Done, Failed))


def test_what_arrives_while_the_engine_thread_sleeps_wakes_it(stage: Stage) -> None:
    stage.submit(1)
    for text in ("a", "b"):
        stage.engine.send(1, text)
        assert stage.outputs(lambda _: True) == [Tokens(1, (7,), text)]
    stage.engine.send(1, "c", END)
    last = stage.outputs(ends)
    assert last[0] == Tokens(1, (7,), "c")
    assert isinstance(last[1], Done)
    assert (last[1].reason, last[1].prompt_tokens, last[1].completion_tokens) == (FinishReason.STOP, 3, 3)


def test_ten_thousand_outputs_all_arrive(stage: Stage) -> None:
    stage.submit(1)
    for _ in range(100):  # in many small lots, so that the thread falls asleep between them
        stage.engine.send(1, *"x" * 100)
    stage.engine.send(1, END)
    outputs = stage.outputs(ends)
    assert len(outputs) == 10_001


def test_cancel_ends_the_coroutine_and_counts_what_came(stage: Stage) -> None:
    stage.submit(1)
    stage.engine.send(1, "a")
    stage.outputs(lambda _: True)
    stage.thread.post(CancelJob(1))
    (done,) = stage.outputs(ends)
    assert isinstance(done, Done)
    assert (done.reason, done.prompt_tokens, done.completion_tokens) == (FinishReason.CANCELLED, 3, 1)
    assert stage.engine.cancelled.get(timeout=WAIT_S) == 1


@pytest.mark.parametrize(
    ("given", "code", "text"),
    [
        (BadRequestError("no such thing"), "bad_request", "no such thing"),
        (RuntimeError("broken pipe"), "engine_failed", "engine 'by-hand': RuntimeError: broken pipe"),
        ("", "engine_failed", "engine 'by-hand' left the request open"),
    ],
)
def test_an_error_ends_its_own_job_only(stage: Stage, given: str | Exception, code: str, text: str) -> None:
    stage.submit(1)
    stage.submit(2)
    stage.engine.send(1, given)
    assert stage.outputs(ends) == [Failed(1, code, text)]
    stage.engine.send(2, "still here", END)
    assert stage.outputs(ends)[0] == Tokens(2, (7,), "still here")


def test_an_engine_that_fails_as_a_whole_loses_its_jobs_and_takes_new_ones(stage: Stage) -> None:
    stage.submit(1)
    stage.engine.fail(RuntimeError("the core is gone"))
    failed = stage.events.get(timeout=WAIT_S)
    assert failed == EngineFailed("RuntimeError: the core is gone", frozenset({1}))
    assert stage.engine.cancelled.get(timeout=WAIT_S) == 1
    stage.submit(2)
    stage.engine.send(2, END)
    assert isinstance(stage.outputs(ends)[0], Done)


def test_what_cannot_be_opened_is_told_and_shut() -> None:
    stage = Stage(ByHand(EngineLoadError("no such server")))
    assert stage.events.get(timeout=WAIT_S) == EngineDied("no such server")
    assert stage.engine.was_shut.wait(WAIT_S)
    assert stage.thread.stop(WAIT_S)


def test_an_engine_that_was_never_loaded_can_be_closed() -> None:
    engine = ByHand()
    engine.close()
    assert not engine.was_shut.is_set()
