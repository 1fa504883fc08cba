"""SyntheticEngine with a clock of our own: text, pace, slots, stops, cancel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tokenmq.protocol.messages import FinishReason, ModelInfo
from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.base import Done, EngineStats, Job, Output, Tokens
from tokenmq.worker.engines.synthetic import SyntheticEngine, text_of, token_at


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def job(ticket: int = 1, *, prompt: str = "one two three", **sampling: Any) -> Job:
    return Job(ticket, "synthetic", Generation(prompt=prompt, sampling=Sampling(**{"seed": 9, **sampling})))


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


def test_tokens_and_text_are_pure_functions() -> None:
    assert [token_at(3, position) for position in range(5)] == [token_at(3, position) for position in range(5)]
    assert len({tuple(token_at(seed, position) for position in range(8)) for seed in range(1000)}) == 1000
    assert all(0 <= token_at(2**63 - 1, position, 100) < 100 for position in range(1000))
    assert len({token_at(1, position) for position in range(4096)}) > 2000
    assert text_of(5).endswith(" ")
    assert text_of(5).strip().isalpha()


def test_a_stream_is_what_the_functions_say() -> None:
    engine = SyntheticEngine(name="toy", clock=Clock())
    assert engine.load() == [ModelInfo("toy", chat=True, resumes=True)]
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
    ],
)
def test_the_prompt_is_counted(generation: Generation, words: int) -> None:
    engine = SyntheticEngine(length=1)
    engine.submit(Job(1, "synthetic", generation))
    [_, done] = run(engine)
    assert isinstance(done, Done)
    assert done.prompt_tokens == words


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
