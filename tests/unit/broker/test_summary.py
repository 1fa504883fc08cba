"""What a broker says of itself at another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenmq.broker.summary import Summarizer, Summary, load_of
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.limits import MAX_BROKERS, MAX_COUNT, MAX_MODELS, MAX_SLOTS
from tokenmq.protocol.messages import (
    Draining,
    Finish,
    FinishReason,
    Heartbeat,
    Load,
    ModelInfo,
    Timings,
    Usage,
    WorkerState,
)

from .stage import Stage, request_id


def summary(stage: Stage) -> Summary:
    summarizer = Summarizer("me", stage.core.registry)
    summarizer.differs()
    return summarizer.summary


def load(stage: Stage) -> Load:
    return load_of(stage.core.registry, state=WorkerState.READY, waiting=3, held=2)


def test_a_broker_without_workers_has_room_for_one_and_takes_nothing(stage: Stage) -> None:
    summarizer = Summarizer("me", stage.core.registry)
    assert not summarizer.differs()
    assert summarizer.summary == Summary((), ("me",), 1, None, ready=False)


def test_models_are_the_union_as_the_weakest_serves_them(stage: Stage) -> None:
    stage.worker("w1", infos=(ModelInfo("b", 4096, True, embeds=True, images=True), ModelInfo("a", 100, True)))
    stage.worker("w2", infos=(ModelInfo("b", 2048, resumes=True, embeds=True), ModelInfo("c", 7)))
    stage.worker("w3", infos=(ModelInfo("c", 0, chat=True),))
    assert summary(stage).models == (
        ModelInfo("a", 100, True),
        ModelInfo("b", 2048, chat=False, resumes=True, embeds=True, images=False),
        ModelInfo("c", 7),
    )


def test_slots_are_the_sum_over_those_that_take_requests(stage: Stage) -> None:
    stage.worker("w1", slots=4)
    stage.worker("w2", slots=3, load=Load(WorkerState.LOADING))
    assert (summary(stage).slots, summary(stage).ready) == (4, True)


def test_a_worker_that_drains_has_room_for_what_it_holds_and_no_more(stage: Stage) -> None:
    draining = stage.worker("w1", slots=4)
    client = stage.client()
    client.asks(1)
    client.asks(2)
    stage.worker("w2", slots=3)
    draining.says(Draining())
    # Two of five are taken: three are free, as at w2.
    assert (summary(stage).slots, load(stage).running) == (5, 2)
    draining.finishes(1)
    assert (summary(stage).slots, load(stage).running) == (4, 1)


def test_it_takes_requests_while_one_worker_does(stage: Stage) -> None:
    worker = stage.worker("w1")
    assert summary(stage).ready
    worker.beats(load=Load(WorkerState.STALLED))
    assert not summary(stage).ready


def test_speed_is_the_sum_once_one_is_known(stage: Stage) -> None:
    first = stage.worker("w1", speed=None)
    stage.worker("w2", speed=None)
    assert summary(stage).speed is None
    stage.client().asks(1)
    first.says(Finish(request_id(1), 1, FinishReason.STOP, Usage(1, 11), Timings(decode_s=0.5), ""))
    # Ten tokens behind the first one in half a second; the other one was never tried, and promises twice as much.
    assert summary(stage).speed == pytest.approx(60.0, rel=0.06)
    first.beats(load=Load(WorkerState.STALLED))
    stage.worker("w3", speed=100.0)
    assert summary(stage).speed == pytest.approx(140.0, rel=0.06)


def test_a_speed_that_is_much_the_same_is_not_told_anew(stage: Stage) -> None:
    worker = stage.worker("w1", speed=100.0)
    summarizer = Summarizer("me", stage.core.registry)
    summarizer.differs()
    worker.changes(speed=109.0)
    assert not summarizer.differs()
    worker.changes(speed=120.0)
    assert summarizer.differs()
    assert summarizer.summary.speed == 120.0
    worker.changes(speed=1e6)
    stage.worker("w2", speed=1e6)
    assert summary(stage).speed == 1e6


def test_brokers_are_those_below_with_this_one_first(stage: Stage) -> None:
    stage.worker("w1", brokers=("b", "d"))
    stage.worker("w2", brokers=("c", "d"))
    stage.worker("w3")
    assert summary(stage).brokers == ("me", "b", "c", "d")


def test_what_does_not_fit_into_a_message_is_left_out_and_counted(stage: Stage) -> None:
    stage.worker("w1", *(f"m{number:04}" for number in range(MAX_MODELS)), slots=MAX_SLOTS)
    stage.worker("w2", "extra", "m0000", slots=MAX_SLOTS)
    stage.worker("w3", brokers=tuple(f"b{number}" for number in range(MAX_BROKERS)))
    summarizer = Summarizer("me", stage.core.registry)
    assert summarizer.differs()
    found = summarizer.summary
    assert (len(found.models), found.slots, len(found.brokers)) == (MAX_MODELS, MAX_SLOTS, MAX_BROKERS)
    assert found.brokers[0] == "me"
    # `m` of the third worker and `extra` or another one are too many, and so is one broker.
    assert summarizer.left_out == 3


def test_loads_add_up(stages: Callable[..., Stage]) -> None:
    stage = stages()
    first = stage.worker("w1", slots=4)
    second = stage.worker("w2", slots=4)
    stage.client().asks(1)
    first.beats(load=Load(running=3, waiting=1, held=1, steps=10, tokens_per_s=100.0, kv_use=0.5))
    second.beats(load=Load(running=1, held=0, steps=5, tokens_per_s=50.0, kv_use=0.25))
    assert load(stage) == Load(running=1 + 3 + 1, waiting=3, held=2, steps=15, tokens_per_s=150.0, kv_use=0.375)


def test_the_sum_of_the_largest_figures_is_still_a_message(stage: Stage) -> None:
    most = Load(running=MAX_COUNT, waiting=MAX_COUNT, steps=MAX_COUNT, tokens_per_s=1e12, kv_use=1.0)
    for name in ("w1", "w2"):
        stage.worker(name, load=most)
    beat = Heartbeat(1, load(stage))
    assert decode(encode(beat)) == beat
