"""What kinds of models the engine serves, each against its own `model.generate`; and which it refuses, and how."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmq.protocol.messages import FinishReason
from tokenmq.worker.engines.base import EngineLoadError, Job
from tokenmq.worker.engines.transformers import scheduler
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.sequence import Sequence

from .architectures import REFUSED, SERVED, make_tiny
from .conftest import CONTEXT, Record, batch_of, job, reference, resumed, run

#: Of prompts: beginnings are shared by every second one, so that some are found in the prefix store.
LENGTHS = [1, 6, 13, 17, 30, 41, 55, 70]
MOST = 20
#: For all rows together: three short ones, or one long one.
CACHE_TOKENS = 144
PREFIX_TOKENS = 64
#: Each way that the engine's forwards can go wrong is in one of these: kinds of masks, positions, experts.
SCHEDULED = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "gpt-neox", "mixtral", "qwen3-moe"]


def prompt_of(number: int) -> list[int]:
    """Return a prompt of ordinary tokens; the number says which."""
    return [1 + (13 * (number % 2) + 7 * step + step * step) % 300 for step in range(LENGTHS[number])]


class Known:
    """A tiny model, and its greedy continuations, each made once."""

    def __init__(self, kind: str) -> None:
        """Make the model."""
        self.model = make_tiny(kind)
        self._continuations: dict[int, list[int]] = {}

    def __call__(self, number: int) -> list[int]:
        """Return what follows a prompt."""
        if number not in self._continuations:
            self._continuations[number] = reference(self.model, prompt_of(number), MOST, [0])
        return self._continuations[number]


def engine_of(model: Any, tokenizer: Any, *, ahead: bool = False, **wishes: Any) -> TransformersEngine:
    """Return a loaded engine; one that works ahead does on a CPU what it does on a device that works by itself."""
    wishes = {"slots": 4, "prefill_tokens": 16, **wishes}
    engine = TransformersEngine.from_loaded(model, tokenizer, name="tiny", **wishes)
    engine.load()
    batch = batch_of(engine)
    batch._manner = replace(batch._manner, ahead=ahead)
    return engine


@pytest.mark.parametrize("kind", SERVED)
def test_ragged_prompts_equal_generate(kind: str, tokenizer: Any) -> None:
    known = Known(kind)
    engine = engine_of(known.model, tokenizer, cache_tokens=CACHE_TOKENS, prefix_tokens=PREFIX_TOKENS)
    for number in range(len(LENGTHS)):
        assert engine.submit(job(number, prompt_of(number), max_tokens=MOST)) == []
    record = run(engine)
    distinct = 0
    for number in range(len(LENGTHS)):
        assert record.ids[number] == known(number), f"prompt of {LENGTHS[number]} tokens"
        distinct += len(set(known(number)))
    assert distinct > 4 * len(LENGTHS), "the model must not just repeat itself"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused(kind: str, tokenizer: Any) -> None:
    with pytest.raises(EngineLoadError) as refused:
        engine_of(make_tiny(kind), tokenizer)
    assert REFUSED[kind][2] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_attention_in_chunks_is_served_up_to_a_chunk(tokenizer: Any) -> None:
    model = make_tiny("llama4-chunks")
    engine = engine_of(model, tokenizer, max_context=12)
    engine.submit(job(0, prompt_of(1), max_tokens=6, ignore_eos=True))
    assert run(engine).ids[0] == reference(model, prompt_of(1), 6)


def test_rotations_that_depend_on_company_bound_the_context(tokenizer: Any) -> None:
    engine = TransformersEngine.from_loaded(make_tiny("phi3-longrope"), tokenizer, name="tiny")
    assert engine.load()[0].context_tokens == CONTEXT
    longer = TransformersEngine.from_loaded(
        make_tiny("phi3-longrope"), tokenizer, name="tiny", max_context=CONTEXT + 1
    )
    with pytest.raises(EngineLoadError, match=f"max_context={CONTEXT + 1}, but tiny has {CONTEXT} positions"):
        longer.load()


# ------------------------------------------------------------------------------------------- schedules

_action = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(LENGTHS) - 1), st.integers(1, MOST)),
    st.tuples(st.just("resume"), st.integers(0, len(LENGTHS) - 1), st.integers(2, MOST)),
    st.tuples(st.just("cancel"), st.integers(0, 6), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 5), st.just(0)),
)


@pytest.mark.parametrize("kind", SCHEDULED)
def test_any_schedule_equals_generate(kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(kind)
    seen = {"stop": 0, "length": 0, "cancelled": 0, "put back": 0, "found": 0}
    rewind = Sequence.rewind

    def counting(self: Sequence, *, replay: bool) -> None:
        seen["put back"] += self.stored > 0
        rewind(self, replay=replay)

    monkeypatch.setattr(Sequence, "rewind", counting)
    monkeypatch.setattr(scheduler, "HEADROOM_TOKENS", 2)  # so little that rows which have begun are put back

    # derandomized: of millions of random tokens, one may have two best logits within rounding.
    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        actions=st.lists(_action, min_size=10, max_size=30),
        slots=st.integers(2, 4),
        budget=st.sampled_from([3, 16, 64]),
        ahead=st.booleans(),
        way=st.sampled_from(["prefill", "replay"]),
    )
    def schedule(actions: list[tuple[str, int, int]], slots: int, budget: int, ahead: bool, way: str) -> None:
        sizes = {"cache_tokens": CACHE_TOKENS, "prefix_tokens": PREFIX_TOKENS, "prefill_tokens": budget}
        engine = engine_of(known.model, tokenizer, ahead=ahead, slots=slots, resume=way, **sizes)
        record = Record()
        wanted: list[list[int]] = []
        # The first one outgrows what there is room for beside the second one.
        for what, number, most in [("submit", 6, MOST), ("submit", 3, MOST), *actions]:
            if what in ("submit", "resume"):
                whole = known(number)[:most]
                there = len(whole) // 2 if what == "resume" else 0
                new = replace(job(len(wanted), prompt_of(number), max_tokens=most), priority=number % 3)
                record.take(engine.submit(resumed(new.ticket, new, whole[:there]) if there else new))
                wanted.append(whole[there:])
            elif what == "cancel":
                record.take(engine.cancel(len(wanted) - 1 - number))
            else:
                for _ in range(number):
                    record.take(engine.step())
                    engine.validate()
        run(engine, record)
        assert engine.stats().kv_use == 0
        seen["found"] += engine.stats().cached_tokens
        for ticket, want in enumerate(wanted):
            done, got = record.done(ticket), record.ids.get(ticket, [])
            seen[done.reason.value] += 1
            assert got == (want[: len(got)] if done.reason is FinishReason.CANCELLED else want)

    schedule()
    assert min(seen["length"], seen["cancelled"], seen["put back"], seen["found"]) > 5, seen


# ------------------------------------------------------------------------------------------- a step ahead

Story = tuple[dict[int, list[int]], dict[int, str], dict[int, tuple[str, int]]]


def told(engine: TransformersEngine, jobs: list[Job], cancel_at: dict[int, int]) -> Story:
    """Run jobs that come one a step; cancel some, each after so many steps. Return what a reader is told."""
    record, steps = Record(), 0
    while jobs[steps:] or engine.next_step_in() is not None:
        for one in jobs[steps : steps + 1]:
            record.take(engine.submit(one))
        record.take(engine.step())
        engine.validate()
        steps += 1
        for ticket in [ticket for ticket, step in cancel_at.items() if step == steps]:
            record.take(engine.cancel(ticket))
    ends = {ticket: record.done(ticket) for ticket in record.ends}
    return record.ids, record.text, {ticket: (end.reason, end.completion_tokens) for ticket, end in ends.items()}


def test_a_step_ahead_tells_the_same(tokenizer: Any) -> None:
    known = Known("llama")
    # What stands in the middle of a text stops it: seen only when the next step has been launched.
    texts = [tokenizer.decode(known(number), skip_special_tokens=True) for number in range(len(LENGTHS))]
    jobs = []
    for number, text in enumerate(texts):
        stop = (text[len(text) // 2 : len(text) // 2 + 2],)
        greedy = job(3 * number, prompt_of(number), max_tokens=MOST)
        jobs.append(greedy)
        jobs.append(job(3 * number + 1, prompt_of(number), max_tokens=MOST, stop=stop))
        jobs.append(
            job(
                3 * number + 2,
                prompt_of(number),
                max_tokens=MOST,
                temperature=1.0,
                seed=number,
                logprobs=2,
                min_p=0.01,
            )
        )
    plain = told(engine_of(known.model, tokenizer), jobs, {})
    ahead = told(engine_of(known.model, tokenizer, ahead=True), jobs, {})
    assert ahead == plain
    reasons = [reason for reason, _ in plain[2].values()]
    assert reasons.count(FinishReason.STOP) >= len(LENGTHS) - 1
    for number in range(len(LENGTHS)):
        assert plain[0][3 * number] == known(number)
        assert plain[1][3 * number].startswith(plain[1][3 * number + 1])


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_request_cancelled_in_flight_brings_nothing_more(after: int, tokenizer: Any) -> None:
    known = Known("llama")
    engine = engine_of(known.model, tokenizer, ahead=True, slots=3, prefill_tokens=64)
    jobs = [job(number, prompt_of(number), max_tokens=MOST) for number in range(6)]
    ids, _, ends = told(engine, jobs, {0: after, 2: after + 2})  # `Record` asserts that nothing follows an end
    assert engine.stats().kv_use == 0
    for number in range(6):
        if number in (0, 2):
            assert ends[number] == (FinishReason.CANCELLED, len(ids.get(number, [])))
            assert ids.get(number, []) == known(number)[: len(ids.get(number, []))]
        else:
            assert ids[number] == known(number)


def test_the_last_request_is_cancelled_in_flight(tokenizer: Any) -> None:
    known = Known("llama")
    engine = engine_of(known.model, tokenizer, ahead=True)
    engine.submit(job(0, prompt_of(3), max_tokens=MOST))
    engine.step()
    assert len(engine.cancel(0)) == 1
    assert run(engine).ids == {}, "what was in flight is dropped"
    assert engine.next_step_in() is None
    engine.submit(job(1, prompt_of(3), max_tokens=MOST))
    assert run(engine).ids[1] == known(3), "and its row is free"
