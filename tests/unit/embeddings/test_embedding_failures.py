"""Faults inside a forward: they cost the text that they belong to, and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch

from tokenmq.worker.engines.transformers.embeddings import EmbeddingEngine

from .conftest import TEXTS, Record, job, run

Make = Callable[..., EmbeddingEngine]
POISON = "xyz"


def clean(make_engine: Make) -> numpy.ndarray:
    return run(make_engine(), job(1, *TEXTS)).matrix(1)


def break_forwards(
    engine: EmbeddingEngine, monkeypatch: pytest.MonkeyPatch, fails: Callable[[Sequence[Any]], Exception | None]
) -> list[int]:
    """Let forwards raise what `fails` says of their texts; return a list that grows with the size of each."""
    encoder, sizes = engine._ready()[0], []
    vectors = encoder.vectors

    def breaking(texts: Sequence[Any]) -> torch.Tensor:
        sizes.append(len(texts))
        error = fails(texts)
        if error is not None:
            raise error
        return vectors(texts)

    monkeypatch.setattr(encoder, "vectors", breaking)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_step_and_those_that_follow(
    error: Exception, make_engine: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(step_tokens=1000)
    sizes = break_forwards(engine, monkeypatch, lambda texts: error if len(texts) > 2 else None)
    short = ("a", "b", "c", "d", "e", "f", "g", "h")
    record = run(engine, job(1, *short))
    assert len(record.matrix(1)) == 8
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert "no memory for a step of" in caplog.text
    sizes.clear()
    run(engine, job(2, *short))
    assert sizes == [2, 2, 2, 2], "the next steps are small from the start"


def test_a_text_that_no_memory_suffices_for_fails_alone(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(step_tokens=1000)
    too_long = max(len(engine._ready()[1].read([text])[0]) for text in TEXTS)
    break_forwards(
        engine,
        monkeypatch,
        lambda texts: torch.OutOfMemoryError("no") if max(map(len, texts)) == too_long else None,
    )
    others = [text for text in TEXTS if len(engine._ready()[1].read([text])[0]) < too_long]
    record = run(engine, job(1, *TEXTS), job(2, *others))
    failed = record.failed(1)
    assert (failed.code, failed.retryable) == ("out_of_memory", True)
    assert f"of {too_long} tokens" in failed.message
    assert len(record.matrix(2)) == len(others)


def test_a_text_that_breaks_the_model_costs_its_own_request_only(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(step_tokens=1000)
    poison = engine._ready()[1].read([POISON])[0]
    break_forwards(engine, monkeypatch, lambda texts: ValueError("odd\nmore") if poison in texts else None)
    record = run(engine, job(1, *TEXTS), job(2, "b", POISON, "c", "d"), job(3, "a"))
    failed = record.failed(2)
    assert (failed.code, failed.retryable) == ("engine_failed", False)
    assert failed.message == f"text 1 of {len(poison)} tokens: odd"
    assert numpy.abs(record.matrix(1) - clean(make_engine)).max() < 1e-5
    assert record.done(3)


def test_what_is_no_number_fails_alone(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(step_tokens=1000)
    encoder, poison = engine._ready()[0], engine._ready()[1].read([POISON])[0]
    vectors = encoder.vectors

    def poisoned(texts: Sequence[Any]) -> torch.Tensor:
        found = vectors(texts).clone()
        found[[number for number, text in enumerate(texts) if text == poison]] = float("nan")
        return found

    monkeypatch.setattr(encoder, "vectors", poisoned)
    record = run(engine, job(1, *TEXTS), job(2, POISON))
    assert record.failed(2).message.endswith("the model gave no numbers (NaN)")
    assert numpy.abs(record.matrix(1) - clean(make_engine)).max() < 1e-5


def test_a_job_that_failed_has_no_further_output(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(step_tokens=1000)
    break_forwards(engine, monkeypatch, lambda _: ValueError("always"))
    record = Record()  # which checks that nothing follows an end
    run(engine, job(1, *TEXTS), job(2, "a"), record=record)
    assert {record.failed(ticket).code for ticket in (1, 2)} == {"engine_failed"}
    assert record.vectors == {}
