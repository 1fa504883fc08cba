"""Texts that take long to tokenise are tokenised beside the forwards, and come to the same vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

from tokenmq.protocol.messages import FinishReason
from tokenmq.worker.engines.transformers import preparation
from tokenmq.worker.engines.transformers.embeddings import EmbeddingEngine

from .conftest import Record, job, run

WAIT_S = 20.0
LONG = "the sea is wide and the sky is blue"


@pytest.fixture
def woken() -> threading.Event:
    """Return what is set where the engine wakes its worker."""
    return threading.Event()


@pytest.fixture
def engine(
    tiny: Callable[[str], Any], tokenizer: Any, woken: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EmbeddingEngine]:
    monkeypatch.setattr(preparation, "SHORT_CHARS", 20)
    made = EmbeddingEngine.from_loaded(tiny("bert"), tokenizer, name="tiny")
    made.wake = woken.set
    made.load()
    yield made
    made.close()


def test_they_come_to_the_same(
    engine: EmbeddingEngine, woken: threading.Event, make_engine: Callable[..., EmbeddingEngine]
) -> None:
    expected = run(make_engine(), job(1, LONG, "sky")).matrix(1)
    assert engine.submit(job(1, LONG, "sky")) == []
    assert engine.stats().waiting == 1
    assert woken.wait(WAIT_S)
    record = run(engine)
    assert numpy.allclose(record.matrix(1), expected, atol=1e-6)
    assert engine.stats().waiting == 0


def test_short_ones_pass_them_by(
    engine: EmbeddingEngine, woken: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    read = engine._preparation._read
    monkeypatch.setattr(engine._preparation, "_read", lambda job: go_on.wait(WAIT_S) and read(job))
    engine.submit(job(1, LONG))
    assert engine.next_step_in() is None
    record = run(engine, job(2, "sky"))
    assert set(record.ends) == {2}
    go_on.set()
    assert woken.wait(WAIT_S)
    assert set(run(engine, record=record).ends) == {1, 2}


def test_one_that_is_too_long_fails(engine: EmbeddingEngine, woken: threading.Event) -> None:
    engine.submit(job(1, LONG * 1_000))
    assert woken.wait(WAIT_S)
    failed = run(engine).failed(1)
    assert failed.code == "bad_request"
    assert "tokens; model 'tiny' takes at most" in failed.message


def test_one_of_far_too_many_characters_is_not_tokenised(make_engine: Callable[..., EmbeddingEngine]) -> None:
    engine = make_engine()
    assert engine._texts is not None
    seen: list[int] = []
    tokenise = engine._texts._tokenise

    def short(texts: Any) -> Any:
        seen.extend(map(len, texts))
        return tuple((1,) for _ in texts)  # as if each were one unknown word

    engine._texts._tokenise = short  # type: ignore[method-assign]
    record = run(engine, job(1, "a" * 100_000))
    assert "has 100000 characters" in record.failed(1).message
    assert max(seen) < 5_000
    assert len(tokenise(["a"])[0]) > 1


def test_a_cancelled_one_is_dropped(engine: EmbeddingEngine, woken: threading.Event) -> None:
    engine.submit(job(1, LONG))
    [done] = engine.cancel(1)
    assert done.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
    engine.submit(job(2, LONG))
    record = Record()
    while 2 not in record.ends:
        assert woken.wait(WAIT_S)
        woken.clear()
        run(engine, record=record)
    assert set(record.ends) == {2}
    engine.submit(job(3, LONG))
    engine.reset()
    assert engine.stats().waiting == 0
