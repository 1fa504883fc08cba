"""Vectors of the engine against those of the model alone, and what it answers to what it cannot embed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmq.protocol.messages import FinishReason, ModelInfo
from tokenmq.protocol.payload import Generation
from tokenmq.worker.engines.base import EngineLoadError, EngineStats, Job
from tokenmq.worker.engines.transformers.embeddings import EmbeddingEngine
from tokenmq.worker.engines.transformers.sentence import POOLINGS, Recipe

from .conftest import DECODERS, ENCODERS, POSITIONS, TEXTS, Record, job, make_model, make_tokenizer, run, states_of

Make = Callable[..., EmbeddingEngine]
Tiny = Callable[[str], Any]


def pooled(states: torch.Tensor, mode: str) -> torch.Tensor:
    """The definition of each pooling, for one text without padding."""
    places = torch.arange(1, len(states) + 1, dtype=torch.float32)[:, None]
    return {
        "cls": states[0],
        "lasttoken": states[-1],
        "max": states.max(0).values,
        "mean": states.mean(0),
        "mean_sqrt_len_tokens": states.sum(0) / len(states) ** 0.5,
        "weightedmean": (states * places).sum(0) / places.sum(),
    }[mode]


def plain(model: Any, tokenizer: Any, texts: tuple[str, ...], mode: str) -> numpy.ndarray:
    return numpy.stack([
        pooled(states_of(model, tokenizer(text, padding=False, truncation=False).input_ids), mode).numpy()
        for text in texts
    ])  # fmt: skip


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_vectors_are_those_of_each_text_alone(
    kind: str, mode: str, make_engine: Make, tiny: Tiny, tokenizer: Any
) -> None:
    engine = make_engine(kind, recipe=Recipe(poolings=(mode,)))
    record = run(engine, job(1, *TEXTS), job(2, *reversed(TEXTS[:4])))
    expected = plain(tiny(kind), tokenizer, TEXTS, mode)
    assert numpy.abs(record.matrix(1) - expected).max() < 1e-5
    assert numpy.abs(record.matrix(2) - expected[3::-1]).max() < 1e-5


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_without_a_word_on_pooling_it_is_the_mean_or_the_last_token(
    kind: str, make_engine: Make, tiny: Tiny, tokenizer: Any
) -> None:
    record = run(make_engine(kind), job(1, *TEXTS))
    expected = plain(tiny(kind), tokenizer, TEXTS, "mean" if kind in ENCODERS else "lasttoken")
    assert numpy.abs(record.matrix(1) - expected).max() < 1e-5


def test_what_it_announces_and_counts(make_engine: Make, tokenizer: Any) -> None:
    engine = make_engine(slots=1)
    assert engine.load() == [ModelInfo("tiny", context_tokens=POSITIONS, generates=False, embeds=True)]
    tokens = [len(tokenizer(text, padding=False, truncation=False).input_ids) for text in TEXTS]
    engine.submit(job(1, *TEXTS))
    engine.submit(job(2, "a"))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.prompt_tokens) == (1, 1, sum(tokens))
    assert stats.prefill_s > 0
    assert stats.memory_bytes > stats.memory_used_bytes > 0
    record = run(engine)
    done = record.done(1)
    assert (done.reason, done.prompt_tokens, done.completion_tokens) == (FinishReason.STOP, sum(tokens), 0)
    assert engine.stats().prompt_tokens == sum(tokens) + tokens[1]
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    assert engine.next_step_in() is None
    assert engine.step() == []


def test_a_small_request_does_not_wait_for_the_end_of_a_large_one(make_engine: Make) -> None:
    engine, record = make_engine(step_tokens=32), Record()
    record.take(engine.submit(job(1, *TEXTS * 8)))
    record.take(engine.step())
    record.take(engine.submit(job(2, "a much longer text than all others")))
    for _ in range(2):
        record.take(engine.step())
    assert 2 in record.ends
    assert 1 not in record.ends


def test_cancel_frees_and_says_nothing_more(make_engine: Make) -> None:
    engine, record = make_engine(step_tokens=8, slots=1), Record()
    record.take(engine.submit(job(1, *TEXTS)))
    record.take(engine.submit(job(2, *TEXTS)))
    record.take(engine.step())
    assert 0 < len(record.vectors[1]) < len(TEXTS)
    for ticket in (1, 2):
        record.take(engine.cancel(ticket))
        assert record.done(ticket).reason is FinishReason.CANCELLED
    assert engine.cancel(1) == []
    assert engine.next_step_in() is None
    assert len(run(engine, job(3, "a"), record=record).vectors[3]) == 1


def test_what_cannot_be_embedded_is_told(make_engine: Make) -> None:
    engine, record = make_engine("roberta"), Record()
    record.take(engine.submit(Job(1, "tiny", Generation(prompt="the sea"))))
    record.take(engine.submit(job(2, "fine", "a b " * POSITIONS)))
    record.take(engine.submit(replace(job(3, "a"), attachments=(b"png",))))
    record.take(engine.submit(job(4, "fine", "a b " * 100_000)))
    assert engine.next_step_in() is None
    told = [record.failed(ticket) for ticket in (1, 2, 3, 4)]
    assert {failed.code for failed in told} == {"bad_request"}
    assert "embeds texts and generates none" in told[0].message
    limit = POSITIONS - 2  # this model's positions begin behind its padding's
    assert "text 1 has " in told[1].message
    assert f"model 'tiny' takes at most {limit} a text" in told[1].message
    assert "attachments" in told[2].message
    assert f"text 1 has more than {2 * limit} tokens" in told[3].message


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_a_text_of_exactly_the_limit_is_embedded(kind: str, make_engine: Make, tokenizer: Any) -> None:
    engine = make_engine(kind)
    limit = engine.load()[0].context_tokens
    text = "~" * (limit - 2)
    assert len(tokenizer(text, padding=False, truncation=False).input_ids) == limit
    record = run(engine, job(1, text), job(2, text + "~"))
    assert record.done(1).prompt_tokens == limit
    assert f"{limit + 1} tokens" in record.failed(2).message


def test_a_text_without_tokens_is_told(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(type(engine._ready()[1]), "_tokenise", lambda *_: ((5,), ()))
    record = run(engine, job(1, "a", "\u200b"))
    assert record.failed(1).message == "text 1 has no tokens for model 'tiny'"


def test_settings_out_of_range(make_engine: Make) -> None:
    assert make_engine(max_context=9).load()[0].context_tokens == 9
    with pytest.raises(EngineLoadError, match="max_context=65, but tiny has 64 positions"):
        make_engine(max_context=65)
    for name in ("slots", "step_tokens", "max_context"):
        with pytest.raises(EngineLoadError, match=f"{name} must be 1 or more, not 0"):
            make_engine(**{name: 0})


def test_vectors_that_depend_on_padding_are_refused(tokenizer: Any) -> None:
    class Blind(torch.nn.Module):
        """A model that does not look at the mask."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model("bert")
            self.config, self.dtype, self.device = self.inner.config, self.inner.dtype, self.inner.device
            self.get_input_embeddings = self.inner.get_input_embeddings

        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
            return self.inner(input_ids=input_ids)

    engine = EmbeddingEngine.from_loaded(Blind(), tokenizer, name="blind")
    with pytest.raises(EngineLoadError, match="another vector among others than alone"):
        engine.load()


def test_half_precision_gives_float32(tokenizer: Any, tiny: Tiny) -> None:
    engine = EmbeddingEngine.from_loaded(make_model("bert").to(torch.bfloat16), tokenizer, name="tiny")
    engine.load()
    found = run(engine, job(1, *TEXTS)).matrix(1)
    expected = plain(tiny("bert"), tokenizer, TEXTS, "mean")
    assert found.dtype == numpy.float32
    cosines = (found * expected).sum(1) / numpy.linalg.norm(found, axis=1) / numpy.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.99


def test_close_and_reset(make_engine: Make) -> None:
    engine = make_engine(slots=1)
    engine.submit(job(1, *TEXTS))
    engine.submit(job(2, *TEXTS))
    engine.step()
    engine.reset()
    assert engine.next_step_in() is None
    assert engine.cancel(1) == []
    assert len(run(engine, job(3, *TEXTS)).matrix(3)) == len(TEXTS)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="call load first"):
        engine.submit(job(4, "a"))
    assert isinstance(engine.stats(), EngineStats)


_MODEL, _TOKENIZER = make_model("bert"), make_tokenizer()
_EXPECTED = plain(_MODEL, _TOKENIZER, TEXTS, "mean")
_EVENTS = st.one_of(
    st.tuples(st.just("submit"), st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=9), st.integers(0, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 12)),
    st.tuples(st.just("step")),
    st.tuples(st.just("resize"), st.integers(1, 4)),
)


@settings(max_examples=60, deadline=None)
@given(events=st.lists(_EVENTS, max_size=25), budget=st.integers(1, 80))
def test_any_schedule_gives_every_job_its_own_vectors_and_one_end(events: list[Any], budget: int) -> None:
    engine = EmbeddingEngine.from_loaded(_MODEL, _TOKENIZER, name="tiny", slots=2, step_tokens=budget)
    engine.load()
    record, asked, cancelled = Record(), {}, set()
    for event, *values in events:
        if event == "submit":
            ticket = len(asked)
            asked[ticket] = values[0]
            record.take(engine.submit(job(ticket, *(TEXTS[each] for each in values[0]), priority=values[1])))
        elif event == "cancel":
            ended = engine.cancel(values[0])
            assert bool(ended) == (values[0] in asked and values[0] not in record.ends)
            cancelled.update(output.ticket for output in ended)
            record.take(ended)
        elif event == "resize":
            assert engine.resize(values[0]) == values[0]
        else:
            record.take(engine.step())
        engine.validate()
    run(engine, record=record)
    assert record.ends.keys() == asked.keys()
    for ticket, texts in asked.items():
        assert (record.done(ticket).reason is FinishReason.CANCELLED) == (ticket in cancelled)
        found = record.vectors.get(ticket, {})
        assert ticket in cancelled or len(found) == len(texts)
        for number, vector in found.items():
            assert numpy.abs(vector - _EXPECTED[texts[number]]).max() < 1e-5
