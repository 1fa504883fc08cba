"""SyntheticEngine with a clock of our own: text, pace, slots, stops, cancel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmq.protocol.messages import Details, FinishReason, ModelInfo, TokenLogprobs
from tokenmq.protocol.payload import Generation, Prior, Sampling
from tokenmq.worker.engines.base import Done, EngineStats, Failed, Job, Output, Tokens
from tokenmq.worker.engines.synthetic import DIMENSION, SyntheticEngine, logprobs_at, text_of, token_at, vector_of

PARTS = [{"type": "text", "text": "a b"}, {"type": "image"}, {"type": "text", "text": "c"}]


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def job(ticket: int = 1, *, prompt: str = "one two three", **sampling: Any) -> Job:
    return Job(ticket, "synthetic", Generation(prompt=prompt, sampling=Sampling(**{"seed": 9, **sampling})))


def resumed(prior: Sequence[int], text_chars: int = 0, ticket: int = 1, **sampling: Any) -> Job:
    whole = job(ticket, **sampling)
    return replace(whole, generation=replace(whole.generation, prior=Prior(tuple(prior), text_chars)))


def run(engine: SyntheticEngine, limit: int = 10_000) -> list[Output]:
    outputs: list[Output] = []
    while engine.next_step_in() == 0 and limit:
        outputs += engine.step()
        limit -= 1
    return outputs


def ids(outputs: Sequence[Output], ticket: int = 1) -> list[int]:
    return [
        token
        for piece in outputs
        if isinstance(piece, Tokens) and piece.ticket == ticket
        for token in piece.token_ids
    ]


def text(outputs: Sequence[Output], ticket: int = 1) -> str:
    return "".join(piece.text for piece in outputs if isinstance(piece, Tokens) and piece.ticket == ticket)


def logprobs(outputs: Sequence[Output]) -> tuple[TokenLogprobs, ...]:
    pieces = [piece for piece in outputs if isinstance(piece, Tokens) and piece.details is not None]
    return tuple(one for piece in pieces if piece.details for one in piece.details.logprobs)


def test_tokens_and_text_are_pure_functions() -> None:
    assert [token_at(3, position) for position in range(5)] == [token_at(3, position) for position in range(5)]
    assert len({tuple(token_at(seed, position) for position in range(8)) for seed in range(1000)}) == 1000
    assert all(0 <= token_at(2**63 - 1, position, 100) < 100 for position in range(1000))
    assert len({token_at(1, position) for position in range(4096)}) > 2000
    assert text_of(5).endswith(" ")
    assert text_of(5).strip().isalpha()


def test_a_stream_is_what_the_functions_say() -> None:
    engine = SyntheticEngine(name="toy", clock=Clock())
    assert engine.load() == [ModelInfo("toy", chat=True, resumes=True, embeds=True, images=True)]
    assert engine.next_step_in() is None
    engine.submit(job(max_tokens=20))
    outputs = run(engine)
    expected = [token_at(9, position) for position in range(20)]
    assert ids(outputs) == expected
    assert text(outputs) == "".join(map(text_of, expected))
    assert outputs[-1] == Done(1, FinishReason.LENGTH, 3, 20)
    assert engine.next_step_in() is None


def test_the_engines_own_length_bounds_a_stream() -> None:
    engine = SyntheticEngine(length=4)
    for ticket, wish in ((1, 10), (2, 3)):
        engine.submit(job(ticket, max_tokens=wish))
    outputs = run(engine)
    assert (len(ids(outputs, 1)), len(ids(outputs, 2))) == (4, 3)


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        (Generation(prompt="a b  c"), 3),
        (Generation(token_ids=(1, 2, 3, 4)), 4),
        (Generation(messages=({"role": "user", "content": "a b"}, {"role": "user", "content": "c"})), 3),
        (Generation(messages=({"role": "user", "content": PARTS}, {"role": "tool", "content": None})), 3),
        (Generation(texts=("a b", "c")), 3),
    ],
)
def test_the_prompt_is_counted(generation: Generation, words: int) -> None:
    engine = SyntheticEngine(length=1)
    engine.submit(Job(1, "synthetic", generation))
    engine.submit(Job(2, "synthetic", generation, (b"image", b"another")))
    one, two = (output for output in run(engine) if isinstance(output, Done))
    assert (one.prompt_tokens, two.prompt_tokens) == (words, words + 2)


def test_each_token_has_its_logprobs_also_behind_a_prior() -> None:
    told = tuple(logprobs_at(9, position, 2) for position in range(4))
    assert [one.token_id for one in told] == [token_at(9, position) for position in range(4)]
    assert all(one.top[0].token_id == one.token_id and len(one.top) == 2 for one in told)
    engine = SyntheticEngine(clock=Clock())
    engine.submit(job(max_tokens=4, logprobs=2))
    assert logprobs(run(engine)) == told
    engine.submit(resumed([told[0].token_id, told[1].token_id], max_tokens=4, logprobs=2))
    assert logprobs(run(engine)) == told[2:]
    engine.submit(job(max_tokens=1, logprobs=0))
    assert logprobs(run(engine)) == (replace(told[0], top=()),)


@pytest.mark.parametrize(
    ("source", "text_before", "tokens"),
    [({"prompt": "one two"}, "one two", 2), ({"token_ids": (5, 6, 7)}, text_of(5) + text_of(6) + text_of(7), 3)],
)
def test_an_echo_comes_in_front_and_is_not_stopped_by(source: Any, text_before: str, tokens: int) -> None:
    engine = SyntheticEngine(clock=Clock())
    sampling = Sampling(max_tokens=2, seed=9, logprobs=1, stop=(text_before,))
    generation = Generation(**source, sampling=sampling, echo=True)
    engine.submit(Job(1, "synthetic", generation))
    first, second, _ = run(engine)
    whole = text_before + text_of(token_at(9, 0)) + text_of(token_at(9, 1))
    assert text([first, second]) == whole
    assert isinstance(first, Tokens)
    assert first.details is not None
    assert first.details.prompt_logprobs[0] is None
    assert len(first.details.prompt_logprobs) == tokens
    assert isinstance(second, Tokens)
    assert second.details is not None
    assert second.details.prompt_logprobs == ()
    prior = Prior((token_at(9, 0),), len(text_before) - 1)
    engine.submit(Job(2, "synthetic", replace(generation, prior=prior)))
    again, _ = run(engine)
    assert text([again], 2) == whole[len(text_before) - 1 :]
    assert isinstance(again, Tokens)
    assert again.details is not None
    assert again.details.prompt_logprobs == ()


def test_texts_are_embedded_one_at_the_pace_of_a_token() -> None:
    clock = Clock()
    engine = SyntheticEngine(tokens_per_second=10.0, length=1, clock=clock)
    texts = ("one two", "größe", "three")
    engine.submit(Job(1, "synthetic", Generation(texts=texts)))
    outputs = run(engine)
    clock.now += 0.2001
    outputs += run(engine)
    assert outputs[:-1] == [
        Tokens(1, (), "", index, Details(vector=vector_of(text))) for index, text in enumerate(texts)
    ]
    assert outputs[-1] == Done(1, FinishReason.STOP, 4, 0, 0.0, 0.0, pytest.approx(0.2001))
    assert len({vector_of(text) for text in texts}) == 3
    assert len(vector_of("x")) == 4 * DIMENSION


def test_the_pace_is_exact_and_catches_up() -> None:
    clock = Clock()
    engine = SyntheticEngine(tokens_per_second=10.0, clock=clock)
    engine.submit(job(max_tokens=30))
    assert len(ids(run(engine))) == 1  # the first is due at once
    assert engine.next_step_in() == pytest.approx(0.1)
    clock.now += 0.099
    assert run(engine) == []
    clock.now += 0.9511  # 1.0501 s after the start: tokens 0 to 10 are due
    assert len(engine.step()) == 1
    assert engine.next_step_in() == 0
    assert len(ids(run(engine))) == 9
    assert engine.next_step_in() == pytest.approx(0.0499)
    clock.now += 100.0
    [*_, done] = run(engine)
    assert isinstance(done, Done)
    assert done.completion_tokens == 30


def test_each_stream_has_a_schedule_of_its_own() -> None:
    clock = Clock()
    engine = SyntheticEngine(tokens_per_second=10.0, clock=clock)
    engine.submit(job(1))
    run(engine)
    clock.now += 0.05
    engine.submit(job(2))
    assert len(ids(run(engine), 2)) == 1
    clock.now += 0.0501
    assert [piece.ticket for piece in run(engine)] == [1]
    clock.now += 0.0501
    assert [piece.ticket for piece in run(engine)] == [2]


@pytest.mark.parametrize("pace", [0.0, 1000.0])
def test_slots_bound_what_runs_and_the_others_wait_in_order(pace: float) -> None:
    clock = Clock()
    engine = SyntheticEngine(slots=2, tokens_per_second=pace, clock=clock)
    for ticket in (1, 2, 3, 4):
        engine.submit(job(ticket, max_tokens=2))
    assert engine.stats() == EngineStats(2, 2, 1.0)
    began: list[int] = []
    ended: list[int] = []
    for _ in range(20):
        clock.now += 0.001
        for output in run(engine, 1):
            began += [output.ticket] if output.ticket not in began else []
            ended += [output.ticket] if isinstance(output, Done) else []
        assert engine.stats().running <= 2
    assert began == [1, 2, 3, 4]
    assert ended == [1, 2, 3, 4]


def test_with_more_slots_those_who_wait_begin_and_with_fewer_nobody_is_stopped() -> None:
    engine = SyntheticEngine(slots=1, clock=Clock())
    for ticket in (1, 2, 3, 4):
        engine.submit(job(ticket, max_tokens=2))
    assert engine.resize(3) == 3
    assert engine.stats() == EngineStats(3, 1, 1.0)
    assert engine.resize(1) == 1
    assert engine.stats() == EngineStats(3, 1, 1.0)
    engine.cancel(1)
    assert engine.stats() == EngineStats(2, 1, 1.0)
    assert {piece.ticket for piece in run(engine) if isinstance(piece, Done)} == {2, 3, 4}


def test_waiting_is_told_in_the_timings() -> None:
    clock = Clock()
    engine = SyntheticEngine(slots=1, tokens_per_second=1.0, clock=clock)
    engine.submit(job(1, max_tokens=3))
    engine.submit(job(2, max_tokens=1))
    run(engine)
    clock.now += 2.0
    outputs = run(engine)
    done = {output.ticket: output for output in outputs if isinstance(output, Done)}
    assert done[1] == Done(1, FinishReason.LENGTH, 3, 3, 0.0, 0.0, 2.0)
    assert done[2].queue_s == 2.0


def test_cancel_frees_the_slot_at_once() -> None:
    engine = SyntheticEngine(slots=1, tokens_per_second=5.0, clock=Clock())
    engine.submit(job(1))
    engine.submit(job(2))
    engine.submit(job(3))
    run(engine)
    assert engine.cancel(3) == [Done(3, FinishReason.CANCELLED, 3, 0)]
    assert engine.cancel(1) == [Done(1, FinishReason.CANCELLED, 3, 1)]
    assert engine.cancel(1) == []
    assert len(ids(run(engine), 2)) == 1
    assert engine.stats().waiting == 0


def test_a_stop_token_ends_the_stream_without_its_text() -> None:
    engine = SyntheticEngine(clock=Clock())
    stop = token_at(9, 3)
    engine.submit(job(stop_token_ids=(stop,)))
    outputs = run(engine)
    assert ids(outputs) == [token_at(9, position) for position in range(4)]
    assert text(outputs) == "".join(text_of(token_at(9, position)) for position in range(3))
    assert outputs[-1] == Done(1, FinishReason.STOP, 3, 4)


def test_a_stop_string_is_cut_and_what_only_looked_like_one_is_kept() -> None:
    whole = "".join(text_of(token_at(9, position)) for position in range(12))
    start = len(text_of(token_at(9, 0))) + 1
    stop = whole[start : start + 9]  # from within the second word into a later one
    engine = SyntheticEngine()
    engine.submit(job(1, max_tokens=12, stop=(stop,)))
    outputs = run(engine)
    assert text(outputs) == whole[: whole.find(stop)]
    assert isinstance(outputs[-1], Done)
    assert outputs[-1].reason is FinishReason.STOP
    engine.submit(job(2, max_tokens=12, stop=(whole[-4:] + "never",)))
    outputs = run(engine)
    assert text(outputs, 2) == whole
    assert isinstance(outputs[-1], Done)
    assert outputs[-1].reason is FinishReason.LENGTH


@st.composite
def samplings(draw: Any) -> dict[str, Any]:
    """A short stream, with stop strings that are in its text, look as if they were, or are not; and stop tokens."""
    seed, count = draw(st.integers(0, 2**63 - 1)), draw(st.integers(1, 9))
    tokens = [token_at(seed, position) for position in range(count)]
    whole = "".join(map(text_of, tokens))
    stops = []
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(whole) - 1))
        stops.append(whole[begin : begin + draw(st.integers(1, 14))] + draw(st.sampled_from(["", "", "?"])))
    stop_tokens = draw(st.lists(st.sampled_from([*tokens, 4095]), max_size=1))
    return {"seed": seed, "max_tokens": count, "stop": tuple(stops), "stop_token_ids": tuple(stop_tokens)}


@given(sampling=samplings(), pace=st.sampled_from([0.0, 50.0]))
@settings(deadline=None)
def test_what_is_resumed_is_what_an_undisturbed_stream_would_have_brought(
    sampling: dict[str, Any], pace: float
) -> None:
    """Cut behind every token, with all text that a reader can have then: up to what these tokens had completed."""
    engine = SyntheticEngine(clock=Clock())
    engine.submit(job(**sampling))
    [*pieces, done] = run(engine)
    whole, whole_text = ids(pieces), text(pieces)
    for cut in range(1, len(whole) + 1):
        for chars in range(len(text(pieces[:cut])) + 1):
            clock = Clock()
            engine = SyntheticEngine(tokens_per_second=pace, clock=clock)
            outputs = list(engine.submit(resumed(whole[:cut], chars, **sampling)))
            while engine.next_step_in() is not None:
                outputs += engine.step()
                clock.now += 1.0
            assert ids(outputs) == whole[cut:]
            assert text(outputs) == whole_text[chars:]
            assert isinstance(outputs[-1], Done)
            assert isinstance(done, Done)
            assert outputs[-1].reason is done.reason
            assert (outputs[-1].prompt_tokens, outputs[-1].completion_tokens) == (3, len(whole))


def test_a_resumed_stream_has_its_first_token_at_once_and_then_its_pace() -> None:
    clock = Clock()
    engine = SyntheticEngine(tokens_per_second=10.0, clock=clock)
    prior = [token_at(9, position) for position in range(50)]
    assert engine.submit(resumed(prior, max_tokens=53)) == []
    assert ids(run(engine)) == [token_at(9, 50)]
    assert engine.next_step_in() == pytest.approx(0.1)
    clock.now += 0.2001
    assert run(engine)[-1] == Done(1, FinishReason.LENGTH, 3, 53, 0.0, 0.0, pytest.approx(0.2001))


def test_a_cancelled_stream_counts_what_it_resumed() -> None:
    engine = SyntheticEngine(slots=1, clock=Clock())
    for ticket in (1, 2):
        engine.submit(resumed([token_at(9, 0), token_at(9, 1)], ticket=ticket))
    engine.step()
    assert engine.cancel(1) == [Done(1, FinishReason.CANCELLED, 3, 3)]
    assert engine.cancel(2) == [Done(2, FinishReason.CANCELLED, 3, 2)]


@pytest.mark.parametrize(
    ("prior", "chars", "sampling", "told"),
    [
        ((5, 6, 7), 0, {"stop_token_ids": (6,)}, "3 tokens, and ends after 2"),
        ((5, 6, 7), 0, {"stop": (text_of(5)[1:],)}, "3 tokens, and ends after 1"),
        ((5, 6, 7), 0, {"max_tokens": 2}, "3 tokens, and ends after 2"),
        ((5, 6, 7), 99, {}, "text_chars is 99"),
        ((5, 4096), 0, {}, "below 4096, got 4096"),
    ],
)
def test_a_prior_that_is_not_the_begin_of_this_completion_is_refused(
    prior: tuple[int, ...], chars: int, sampling: dict[str, Any], told: str
) -> None:
    engine = SyntheticEngine(clock=Clock())
    outputs = engine.submit(resumed(prior, chars, **sampling))
    [failed] = outputs
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("bad_request", False)
    assert told in failed.message
    assert engine.stats() == EngineStats()


def test_it_can_be_made_unable_to_resume() -> None:
    (model,) = SyntheticEngine(resumes=False).load()
    assert not model.resumes


def test_reset_drops_everything() -> None:
    engine = SyntheticEngine(slots=1, tokens_per_second=5.0)
    engine.submit(job(1))
    engine.submit(job(2))
    engine.reset()
    assert engine.stats() == EngineStats()
    assert engine.next_step_in() is None


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"tokens_per_second": -1.0}, {"length": 0}, {"vocabulary": 0}, {"vocabulary": 2**40}]
)
def test_values_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        SyntheticEngine(**options)
