"""Faults inside a step: they cost the job that they belong to, and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tokenmq.worker.engine_thread import EngineEvent, EngineThread
from tokenmq.worker.engines.base import EngineStats, Output
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.events import EngineFailed, Submit

from .conftest import Record, batch_of, job, run

Make = Callable[..., TransformersEngine]
GOOD = [[3, 4, 5], [9, 8, 7, 6], [11, 12, 13]]
BAD = [66, 66, 66]


def clean_run(make_engine: Make, prompts: Sequence[Sequence[int]] = GOOD) -> dict[int, list[int]]:
    engine = make_engine(slots=4, prefill_tokens=64)
    for ticket, prompt in enumerate(prompts):
        engine.submit(job(ticket, prompt, ignore_eos=True))
    return run(engine).ids


def break_forward(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Let every prefill with BAD's tokens raise; return a list that grows with each attempt."""
    attempts: list[int] = []
    forward = batch_of(engine)._runner._forward

    def breaking(access: Any, ids: torch.Tensor, *more: Any, **how: Any) -> torch.Tensor:
        if bool((ids == 66).any()):
            attempts.append(len(ids))
            raise error
        return forward(access, ids, *more, **how)

    monkeypatch.setattr(batch_of(engine)._runner, "_forward", breaking)
    return attempts


def test_a_prefill_that_raises_fails_alone(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(slots=4, prefill_tokens=64)
    attempts = break_forward(engine, monkeypatch, ValueError("odd shape\nmore"))
    for ticket, prompt in enumerate([*GOOD, BAD]):
        engine.submit(job(ticket, prompt, ignore_eos=True))
    record = run(engine)
    assert attempts == [4, 1], "first in its group, then alone"
    failed = record.failed(3)
    assert (failed.code, failed.retryable) == ("engine_failed", False)
    assert failed.message.endswith("odd shape")
    assert record.ids == clean_run(make_engine)
    assert "its prefill failed" in caplog.text


def test_a_chunk_that_raises_frees_its_slot(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(slots=2, prefill_tokens=8)
    break_forward(engine, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    engine.submit(job(0, [1 + i for i in range(20)] + BAD))
    engine.submit(job(1, GOOD[1], ignore_eos=True))
    engine.submit(job(2, GOOD[2], ignore_eos=True))
    record = run(engine)
    failed = record.failed(0)
    assert (failed.code, failed.retryable) == ("out_of_memory", True)
    assert "23 tokens" in failed.message
    clean = clean_run(make_engine)
    assert (record.ids[1], record.ids[2]) == (clean[1], clean[2])


def test_the_cpu_allocator_is_out_of_memory_too(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    error = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
    break_forward(engine, monkeypatch, error)
    engine.submit(job(0, BAD))
    assert run(engine).failed(0).code == "out_of_memory"


def test_a_decode_out_of_memory_is_tried_once_more(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(slots=4, prefill_tokens=64)
    decode, calls = batch_of(engine)._runner.decode, []

    def short_of_memory(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments)

    monkeypatch.setattr(batch_of(engine)._runner, "decode", short_of_memory)
    for ticket, prompt in enumerate(GOOD):
        engine.submit(job(ticket, prompt, ignore_eos=True))
    assert run(engine).ids == clean_run(make_engine)
    assert len(calls) == 8


def test_after_a_step_that_raised_reset_brings_the_engine_back(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(slots=4, prefill_tokens=8)
    runner = batch_of(engine)._runner
    decode = runner.decode

    def broken(*_: Any) -> torch.Tensor:
        for layer in runner.cache._slot_layers:  # what a half-done forward may leave
            layer.keys.fill_(float("nan"))
            layer.values.fill_(float("nan"))
        raise RuntimeError("device lost")

    engine.submit(job(7, GOOD[0]))
    engine.submit(job(8, [5] * 30))
    engine.submit(job(9, [6] * 30))
    engine.step()
    monkeypatch.setattr(runner, "decode", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    engine.reset()
    engine.validate()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_use) == (0, 0, 0)
    assert engine.next_step_in() is None
    assert engine.cancel(7) == []
    monkeypatch.setattr(runner, "decode", decode)
    for ticket, prompt in enumerate(GOOD):
        engine.submit(job(ticket, prompt, ignore_eos=True))
    assert run(engine).ids == clean_run(make_engine)


def test_a_row_of_nan_fails_alone_and_leaves_a_clean_slot(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(slots=3, prefill_tokens=64)
    runner = batch_of(engine)._runner
    decode, calls = runner.decode, []

    def poisoned(token_ids: Sequence[int], lengths: Sequence[int], shifts: Sequence[int] | None) -> torch.Tensor:
        calls.append(len(token_ids))
        logits = decode(token_ids, lengths, shifts)
        if len(calls) == 2:
            logits = logits.clone()
            logits[0] = float("nan")
            for layer in runner.cache._slot_layers:
                layer.keys[0] = float("nan")
                layer.values[0] = float("nan")
        return logits

    monkeypatch.setattr(runner, "decode", poisoned)
    record = Record()
    for ticket, prompt in enumerate(GOOD):
        engine.submit(job(ticket, prompt, ignore_eos=True))
    engine.submit(job(3, [20, 21], ignore_eos=True))
    run(engine, record)
    (victim,) = [ticket for ticket in range(3) if hasattr(record.ends[ticket], "code")]
    assert record.failed(victim).code == "engine_failed"
    assert "NaN" in record.failed(victim).message
    clean = clean_run(make_engine, [*GOOD, [20, 21]])
    assert len(record.ids[victim]) == 2
    for ticket in {0, 1, 2, 3} - {victim}:
        assert record.ids[ticket] == clean[ticket], "another row was touched"


def test_figures_that_raise_leave_no_job_without_an_end(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, stepped = make_engine(), []
    step, stats = engine.step, engine.stats

    def noted() -> Sequence[Output]:
        stepped.append(1)
        return step()

    def broken() -> EngineStats:
        if stepped:
            stepped.clear()
            raise RuntimeError("no figures")
        return stats()

    monkeypatch.setattr(engine, "step", noted)
    monkeypatch.setattr(engine, "stats", broken)
    events: list[EngineEvent] = []
    thread = EngineThread(engine, events.append)
    thread.post(Submit(job(3, GOOD[0], max_tokens=1)))
    thread._round()
    assert events == [EngineFailed("RuntimeError: no figures", frozenset({3}))]


# ------------------------------------------------------------------------------------------------- out of memory


def prompts_of(count: int) -> list[list[int]]:
    return [[1 + (7 * number + 3 * step) % 60 for step in range(4 + number)] for number in range(count)]


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_decode_without_memory_puts_rows_back_and_all_come_to_their_ends(
    room: int, make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(6)
    want = {}
    for ticket, prompt in enumerate(prompts):
        engine = make_engine()
        engine.submit(job(ticket, prompt, max_tokens=12, ignore_eos=True))
        want |= run(engine).ids
    engine = make_engine(slots=6, prefill_tokens=64)
    batch = batch_of(engine)
    decode = batch._runner.decode
    refused: list[int] = []

    def small(token_ids: Sequence[int], lengths: Sequence[int], *more: Any, **how: Any) -> torch.Tensor:
        if len(lengths) > room:
            refused.append(len(lengths))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(token_ids, lengths, *more, **how)

    monkeypatch.setattr(batch._runner, "decode", small)
    for ticket, prompt in enumerate(prompts):
        engine.submit(job(ticket, prompt, max_tokens=12, ignore_eos=True))
    record = run(engine)
    assert record.ids == want
    assert refused[:2] == [6, 6], "once more after a release, then with fewer"
    assert batch.scheduler.ceiling <= room + 1
    monkeypatch.undo()
    monkeypatch.setattr("tokenmq.worker.engines.transformers.batch.RECOVERY_STEPS", 2)
    for ticket in range(6):
        engine.submit(job(10 + ticket, [5, 9], max_tokens=40, ignore_eos=True))
    run(engine)
    assert batch.scheduler.ceiling == 6, "with time all slots are used again"


def test_a_cache_that_cannot_be_reshaped_loses_nobody(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[*prompt, *([9] * 20)] for prompt in prompts_of(3)]
    settings: dict[str, Any] = {"slots": 3, "prefill_tokens": 64, "cache_tokens": 110}
    engine = make_engine(**settings)
    for ticket, prompt in enumerate(prompts):
        engine.submit(job(ticket, prompt, max_tokens=45, ignore_eos=True))
    want = run(engine).ids
    engine = make_engine(**settings)
    layer = batch_of(engine)._runner.cache._slot_layers[1]
    arrange, calls = layer.arrange, [0]

    def full(space: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        arrange(space)

    monkeypatch.setattr(layer, "arrange", full)
    for ticket, prompt in enumerate(prompts):
        engine.submit(job(ticket, prompt, max_tokens=45, ignore_eos=True))
    assert run(engine).ids == want
    assert calls[0] > 1
