"""Where a prompt's keys and values depend on its company: which prompts share a forward, and how it is found out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tokenmq.worker.engines.transformers import engine as module
from tokenmq.worker.engines.transformers.cache import SlotCache
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.packed import _supported, pack
from tokenmq.worker.engines.transformers.runner import PROMPT_ROWS, Runner
from tokenmq.worker.engines.transformers.selfcheck import is_steady, layer_shapes
from tokenmq.worker.engines.transformers.space import Space, whole_vectors

from .conftest import CONTEXT, VOCABULARY, batch_of, job, make_model, run


def steady_runner(model: Any, slots: int = 8, context: int = CONTEXT) -> Runner:
    return Runner(model, SlotCache(layer_shapes(model, context), Space(slots * context, slots, context)), steady=True)


def prompt(length: int, number: int = 0) -> list[int]:
    return [(7 * step + 3 * number + step * step) % (VOCABULARY - 1) + 1 for step in range(length)]


def half_engine(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, steady: bool, **settings: Any) -> TransformersEngine:
    """Return an engine of a tiny model in bfloat16 that has found its prompts to be so."""
    monkeypatch.setattr(module, "is_steady", lambda runner: steady)
    model = make_model("llama").bfloat16()
    settings = {"slots": 16, "prefix_tokens": 0, "resume": "replay", **settings}
    engine = TransformersEngine.from_loaded(model, tokenizer, name="tiny", **settings)
    engine.load()
    return engine


def groups_of(engine: TransformersEngine, lengths: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Run prompts of these lengths; return those of each forward over prompts."""
    runner, seen = batch_of(engine)._runner, []
    extend = runner.extend

    def watched(first: int, starts: Any, tokens: Any, **more: Any) -> torch.Tensor:
        seen.append([len(row) for row in tokens])
        return extend(first, starts, tokens, **more)

    monkeypatch.setattr(runner, "extend", watched)
    for number, length in enumerate(lengths):
        assert engine.submit(job(number, prompt(length, number), max_tokens=2)) == []
    run(engine)
    return seen


def test_short_prompts_share_a_forward_up_to_its_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = half_engine(tokenizer, monkeypatch, steady=True, prefill_tokens=1024)
    lengths = [3, 16, 5, 9, 17, 20, 31, 16, 2, 32, 12, 11]
    groups = groups_of(engine, lengths, monkeypatch)
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    assert all(len(group) * whole_vectors(max(group)) <= PROMPT_ROWS for group in groups)
    assert groups == [[2, 3, 5, 9, 11, 12, 16, 16], [17, 20, 31, 32]]


def test_where_company_matters_each_prompt_goes_alone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = half_engine(tokenizer, monkeypatch, steady=False, prefill_tokens=1024)
    assert groups_of(engine, [3, 16, 5], monkeypatch) == [[3], [5], [16]]


def test_what_begins_behind_a_kept_beginning_goes_alone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = half_engine(tokenizer, monkeypatch, steady=True, prefill_tokens=16, prefix_tokens=64)
    begin = prompt(16)
    engine.submit(job(0, [*begin, 5, 6], max_tokens=2))
    run(engine)
    seen = []
    runner = batch_of(engine)._runner
    extend = runner.extend
    monkeypatch.setattr(
        runner,
        "extend",
        lambda first, starts, tokens, **more: (
            seen.append((list(starts), [len(row) for row in tokens])) or extend(first, starts, tokens, **more)
        ),
    )
    engine.submit(job(1, [*begin, 7, 8, 9], max_tokens=2))
    engine.submit(job(2, [*begin, 9, 8, 7], max_tokens=2))
    run(engine)
    assert seen == [([16], [3]), ([16], [3])]


def test_it_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = steady_runner(make_model("llama"))
    extend = runner.extend

    def same(first: int, starts: Any, tokens: Any, **more: Any) -> torch.Tensor:
        """Compute each alone, whatever was asked for."""
        return torch.cat([extend(first + row, [0], [one]) for row, one in enumerate(tokens)])

    monkeypatch.setattr(runner, "extend", same)
    assert is_steady(runner)

    def other(first: int, starts: Any, tokens: Any, **more: Any) -> torch.Tensor:
        logits = same(first, starts, tokens)
        if len(tokens) > 1:
            runner.cache.row(first + 1, 1)[-1].add_(1e-3)
        return logits

    monkeypatch.setattr(runner, "extend", other)
    assert not is_steady(runner)


@pytest.mark.parametrize("length", [1, 15, 16, 17, CONTEXT - 3, CONTEXT])
def test_padding_changes_no_result_and_stays_in_the_slot(length: int) -> None:
    model = make_model("llama")
    runner = steady_runner(model, slots=2)
    runner.extend(1, [0], [prompt(4, 1)])
    neighbour = [one.clone() for one in runner.cache.row(1, 4)]
    logits = runner.extend(0, [0], [prompt(length)])
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([prompt(length)])).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(one, other) for one, other in zip(neighbour, runner.cache.row(1, 4), strict=True))


def test_few_rows_are_no_company() -> None:
    assert not is_steady(steady_runner(make_model("llama"), slots=1))


@pytest.mark.skipif(not _supported(torch.bfloat16), reason="this processor does not multiply bfloat16")
def test_packed_in_bfloat16_prompts_have_the_same_bits_in_any_company_and_stride() -> None:
    model = make_model("llama").bfloat16()
    assert pack(model)
    cache = SlotCache(layer_shapes(model, CONTEXT), Space(500, 8, CONTEXT))
    runner = Runner(model, cache, steady=True)
    if not is_steady(runner):
        pytest.skip("on this machine prompts depend on their company")
    for lengths in ((5, 16, 19, 30), (1, 2, 3), (60, 40), (31, 32, 33)):
        rows = [prompt(length, number) for number, length in enumerate(lengths)]
        for stride in (64, 96):
            alone = []
            runner.restride(stride, 0, 0)
            for row in rows:
                logits = runner.extend(0, [0], [row])
                alone.append([logits[0], *(one.clone() for one in cache.row(0, len(row)))])
            runner.restride(64 + 96 - stride, 0, 0)
            together = runner.extend(0, [0] * len(rows), rows)
            for slot, row in enumerate(rows):
                for one, other in zip(alone[slot], [together[slot], *cache.row(slot, len(row))], strict=True):
                    assert torch.equal(one, other)
