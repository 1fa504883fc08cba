"""Requests that take long to read: they are read beside the running rows, and come to the same as all others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tokenmq.protocol.messages import FinishReason
from tokenmq.protocol.payload import Generation, Prior, Sampling
from tokenmq.worker.engines.base import Job
from tokenmq.worker.engines.transformers import preparation
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.preparation import SHORT_CHARS, takes_long

from .conftest import CONTEXT, Record, job, run

WAIT_S = 20.0
MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("generation", "files", "expected"),
    [
        (Generation(prompt="a" * SHORT_CHARS), (), False),
        (Generation(prompt="a" * (SHORT_CHARS + 1)), (), True),
        (Generation(token_ids=(1,) * 100_000), (), False),
        (Generation(messages=(MESSAGE,) * 100), (), False),
        (Generation(messages=(MESSAGE,) * 2_000), (), True),
        (Generation(messages=({"role": "user", "content": "a" * 20_000},)), (), True),
        (Generation(messages=(MESSAGE,), tools=({"enum": [0] * 2_000},)), (), True),
        (Generation(messages=(MESSAGE,), template={"a": {"b": "c" * 20_000}}), (), True),
        (Generation(prompt="a"), (b"image",), True),
        (Generation(prompt="a", sampling=Sampling(regex="a")), (), True),
        (Generation(prompt="a", sampling=Sampling(json_schema="true")), (), True),
        (Generation(prompt="a", sampling=Sampling(choice=("a",))), (), True),
        (Generation(prompt="a", sampling=Sampling(bad_words=("a" * 100,) * 20)), (), False),
        (Generation(prompt="a", sampling=Sampling(bad_words=("a" * 100,) * 60)), (), True),
    ],
)
def test_what_takes_long(generation: Generation, files: tuple[bytes, ...], expected: bool) -> None:
    assert takes_long(Job(1, "tiny", generation, files)) is expected


class Reader:
    """An engine with a worker's `wake`, whose long requests are read when the test says so."""

    def __init__(self, tiny: Callable[[str], Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preparation, "SHORT_CHARS", 20)
        self.woken = threading.Event()
        self.go_on = threading.Event()
        self.began = threading.Event()
        self.engine = TransformersEngine.from_loaded(tiny("llama"), tokenizer, name="tiny", slots=3)
        self.engine.wake = self.woken.set
        self.engine.load()
        read = self.engine._sequence
        self.here = threading.get_ident()

        def waiting(job: Job) -> Any:
            if threading.get_ident() != self.here:
                self.began.set()
                assert self.go_on.wait(WAIT_S)
            return read(job)

        assert self.engine._serving is not None
        monkeypatch.setattr(self.engine._serving.preparation, "_read", waiting)

    def let_read(self) -> None:
        self.go_on.set()
        assert self.woken.wait(WAIT_S)
        self.woken.clear()


LONG = "the sea is wide and the sky is blue"


@pytest.fixture
def reader(tiny: Callable[[str], Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    made = Reader(tiny, tokenizer, monkeypatch)
    yield made
    made.go_on.set()
    made.engine.close()


def test_others_go_on_while_one_is_read(reader: Reader) -> None:
    engine = reader.engine
    assert engine.submit(job(1, LONG)) == []
    assert reader.began.wait(WAIT_S)
    assert engine.next_step_in() is None, "there is nothing to step"
    assert engine.stats().waiting == 1
    engine.submit(job(2, "the sea"))
    record = run(engine)
    assert record.done(2).completion_tokens == 8
    assert 1 not in record.ends
    reader.let_read()
    assert engine.next_step_in() == 0.0
    run(engine, record)
    assert record.done(1).completion_tokens == 8
    assert engine.stats().waiting == 0


def test_it_comes_to_the_same_as_if_it_were_short(
    reader: Reader, make_engine: Callable[..., TransformersEngine]
) -> None:
    plain = make_engine()
    plain.submit(job(1, LONG, temperature=1.0, seed=5))
    expected = run(plain)
    reader.engine.submit(job(1, LONG, temperature=1.0, seed=5))
    reader.let_read()
    record = run(reader.engine)
    assert (record.ids, record.text) == (expected.ids, expected.text)
    # And a resumed one: its prior is looked at when it was read.
    prior = Prior(tuple(expected.ids[1][:3]), 0)
    generation = Generation(prompt=LONG, sampling=Sampling(max_tokens=8, seed=5), prior=prior)
    reader.engine.submit(Job(2, "tiny", generation))
    reader.let_read()
    run(reader.engine, record)
    assert record.ids[2] == expected.ids[1][3:]
    unknown = Prior((10_000,), 0)
    reader.engine.submit(Job(3, "tiny", Generation(prompt=LONG, sampling=Sampling(max_tokens=8), prior=unknown)))
    reader.let_read()
    assert "token id 10000 is unknown" in run(reader.engine, record).failed(3).message


def test_one_that_cannot_run_fails_alone(reader: Reader) -> None:
    reader.engine.submit(job(1, LONG * CONTEXT))
    reader.engine.submit(job(2, LONG))
    reader.let_read()
    record = Record()
    while len(record.ends) < 2:
        run(reader.engine, record)
        if len(record.ends) < 2:
            assert reader.woken.wait(WAIT_S)
            reader.woken.clear()
    assert record.failed(1).code == "bad_request"
    assert record.done(2).reason is FinishReason.LENGTH


def test_a_panic_fails_its_request_and_not_the_thread(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicError(BaseException):
        """As those of libraries in Rust: no Exception."""

    assert reader.engine._serving is not None
    held = reader.engine._serving.preparation
    read = held._read
    monkeypatch.setattr(held, "_read", lambda job: (_ for _ in ()).throw(PanicError("at the disco\nsecond line")))
    reader.engine.submit(job(1, LONG))
    reader.let_read()
    failed = run(reader.engine).failed(1)
    assert (failed.code, failed.message) == ("engine_failed", "the engine refused: PanicError: at the disco")
    monkeypatch.setattr(held, "_read", read)
    reader.engine.submit(job(2, LONG))
    reader.let_read()
    assert run(reader.engine).done(2).completion_tokens == 8


@pytest.mark.parametrize("when", ["while it is read", "before", "after"])
def test_a_cancelled_one_is_dropped(reader: Reader, when: str) -> None:
    engine = reader.engine
    engine.submit(job(1, LONG))
    assert reader.began.wait(WAIT_S)
    ticket = 1
    if when == "before":
        ticket = 2
        engine.submit(job(2, LONG))
    if when == "after":
        reader.let_read()
    [done] = engine.cancel(ticket)
    assert (done.ticket, done.reason) == (ticket, FinishReason.CANCELLED)  # type: ignore[union-attr]
    assert engine.cancel(ticket) == []
    if when != "after":
        reader.let_read()
    record = run(engine)
    assert ticket not in record.ends
    assert engine.stats().waiting == 0
    assert (1 in record.ends) is (when == "before")


def test_after_a_reset_nothing_of_before_comes(reader: Reader) -> None:
    engine = reader.engine
    engine.submit(job(1, LONG))
    assert reader.began.wait(WAIT_S)
    engine.reset()
    engine.submit(job(2, LONG))
    reader.go_on.set()
    record = Record()
    while 2 not in record.ends:
        assert reader.woken.wait(WAIT_S)
        reader.woken.clear()
        run(engine, record)
    assert set(record.ends) == {2}


def test_without_a_worker_all_is_read_at_once(make_engine: Callable[..., TransformersEngine]) -> None:
    engine = make_engine()
    [failed] = engine.submit(Job(1, "tiny", Generation(prompt="a" * 100_000)))
    assert failed.code == "bad_request"  # type: ignore[union-attr]
    assert "more than 192 tokens" in failed.message  # type: ignore[union-attr]
