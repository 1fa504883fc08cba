"""WorkerCore when what it is changes: models, slots, speed, and a drain that is taken back."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.links import Connected, Lost, Open, Shut
from tokenmq.protocol.messages import (
    Disconnect,
    DisconnectCode,
    Draining,
    Error,
    Finish,
    Ready,
    WorkerState,
)
from tokenmq.protocol.messages import Drain as DrainMessage
from tokenmq.protocol.messages import ModelInfo as Model
from tokenmq.worker.events import Changed, Drain, Resize, Stop


@pytest.fixture
def both(say: Any) -> Any:
    """A worker that is registered at two brokers, with its model loaded."""
    story = say.story(brokers=(say.broker, say.other))
    story.start()
    story.join(say.broker)
    story.join(say.other)
    story.loaded()
    return story


def lines(story: Any, event: str) -> list[Any]:
    return [log.fields for log in story.logs if log.event == event]


# --- models, slots, speed -------------------------------------------------------------------------------------------


def test_a_change_is_told_to_all_brokers_at_once(both: Any, say: Any) -> None:
    models = (Model("toy", 2048, True), Model("new", 512))
    resize, *sends = both.tell(Changed(models, 5, 30.0))
    assert resize == Resize(5)
    assert [send.broker for send in sends] == [say.broker, say.other]
    for send in sends:
        ready = send.message
        assert isinstance(ready, Ready)
        assert (ready.models, ready.slots, ready.speed) == (models, 5, 30.0)
    assert lines(both, "changed") == [{"models": "toy,new", "slots": 5, "speed": 30.0}]
    assert both.take(say.request(1, model="new")).model == "new"


def test_what_is_not_named_stays_and_what_does_not_change_is_not_told(ready: Any, say: Any) -> None:
    [send] = ready.tell(Changed(speed=2.0))
    assert (send.message.models, send.message.slots) == ((Model("toy", 2048, True),), 2)
    assert ready.tell(Changed(speed=2.0)) == []
    assert ready.tell(Changed(slots=2)) == []
    assert ready.tell(Changed(models=send.message.models)) == []


def test_without_a_speed_the_broker_is_left_to_measure_it(fresh: Any, say: Any) -> None:
    fresh.start()
    [send] = fresh.tell(Connected(say.broker))
    assert send.message.speed is None


def test_requests_of_a_model_that_is_gone_end_as_usual_and_new_ones_are_refused(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    [send] = ready.tell(Changed(models=(Model("new"),)))
    assert send.message.models == (Model("new"),)
    [error] = say.messages(ready.hear(say.request(2)), Error)
    assert (error.code, error.retryable) == ("model_not_found", True)
    orders = ready.engine(say.tokens(job, 1), say.done(job, 1))
    assert [chunk.token_ids for chunk in say.chunks(orders)] == [(1,)]
    assert len(say.messages(orders, Finish)) == 1


def test_a_worker_may_serve_nothing_for_a_while(ready: Any, say: Any) -> None:
    [send] = ready.tell(Changed(models=()))
    assert send.message.models == ()
    [error] = say.messages(ready.hear(say.request(1)), Error)
    assert error.message.endswith("models here: none")
    ready.tell(Lost(say.broker))
    ready.tick(0.05)
    [send] = ready.tell(Connected(say.broker))
    assert send.message.models == ()


def test_more_than_the_new_slots_allow_end_normally_and_bound_what_comes(ready: Any, say: Any) -> None:
    jobs = [ready.take(say.request(number)) for number in range(12)]
    assert ready.tell(Changed(slots=1))[0] == Resize(1)
    for job in jobs[:3]:  # 12 are held, and 10 may be
        [error] = say.messages(ready.hear(say.request(100)), Error)
        assert error.code == "busy"
        assert len(say.messages(ready.engine(say.done(job)), Finish)) == 1
    ready.take(say.request(100))


def test_a_change_while_it_drains_is_told_when_the_drain_is_taken_back(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    ready.hear(DrainMessage())
    assert ready.tell(Changed(slots=7)) == [Resize(7)]
    [send] = ready.hear(DrainMessage(undo=True))
    assert (send.message.slots, send.message.load.state) == (7, WorkerState.READY)


def test_a_change_while_it_loads_is_told_at_once(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.join()
    resize, send = fresh.tell(Changed(slots=3))
    assert resize == Resize(3)
    assert (send.message.slots, send.message.load.state) == (3, WorkerState.LOADING)


# --- a drain that is taken back -------------------------------------------------------------------------------------


def test_a_drain_that_a_broker_asked_for_is_taken_back_by_any_broker(both: Any, say: Any) -> None:
    job = both.take(say.request(1))
    assert len(say.messages(both.hear(DrainMessage(5.0), say.broker), Draining)) == 2
    sends = both.hear(DrainMessage(undo=True), say.other)
    assert [send.broker for send in sends] == [say.broker, say.other]
    for send in sends:
        assert isinstance(send.message, Ready)
        assert send.message.load.state is WorkerState.READY
    assert lines(both, "drain_undone") == [{"broker": say.other, "held": 1}]
    both.take(say.request(2))
    orders = both.tick(10.0)  # longer than the grace time
    assert not say.messages(orders, Error)
    assert not [order for order in orders if isinstance(order, Stop)]
    assert say.cancelled(orders) == [job.ticket, job.ticket + 1]  # of brokers that were silent for so long
    assert len([log for log in both.logs if log.event == "broker_lost"]) == 2
    assert both.tick(0.05) == [Open(say.broker), Open(say.other)]


def test_brokers_that_it_left_alone_because_of_the_drain_are_dialled_again(say: Any) -> None:
    story = say.story(brokers=(say.broker, say.other, "tcp://broker:3"))
    story.start()
    story.join(say.broker)
    story.join(say.other)
    story.loaded()
    story.take(say.request(1))
    assert Shut("tcp://broker:3") in story.hear(DrainMessage())  # not registered there yet
    assert Shut(say.other) in story.tell(Lost(say.other))
    assert not [order for order in story.tick(3.0) if isinstance(order, Open)]
    assert {"broker": say.other, "reason": "connection lost", "cancelled": 0} in lines(story, "broker_lost")
    story.hear(DrainMessage(undo=True))
    assert {order.broker for order in story.tick() if isinstance(order, Open)} == {say.other, "tcp://broker:3"}
    [send] = story.tell(Connected(say.other))
    assert send.message.load.state is WorkerState.READY


def test_a_broker_that_sent_it_away_for_good_is_not_dialled_again(both: Any, say: Any) -> None:
    both.take(say.request(1))
    both.hear(DrainMessage())
    both.hear(Disconnect(DisconnectCode.REMOVED, "gone"), say.other)
    both.hear(DrainMessage(undo=True))
    assert Open(say.other) not in both.tick(3.0)


def test_sent_away_by_all_brokers_while_it_drains_it_has_drained(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    ready.hear(DrainMessage())
    orders = ready.hear(Disconnect(DisconnectCode.REMOVED, "gone"))
    assert [order for order in orders if isinstance(order, Stop)] == [Stop(0, "drained")]


def test_a_drain_of_its_own_is_not_taken_back(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    ready.tell(Drain(5.0))
    assert ready.hear(DrainMessage(undo=True)) == []
    assert ready.core.state is WorkerState.DRAINING
    assert lines(ready, "drain_undo_ignored") == [
        {"broker": say.broker, "reason": "the worker leaves by its own will"}
    ]
    assert ready.tick(5.0)[-1] == Stop(0, "drained")


def test_nor_is_one_of_its_own_behind_one_of_a_broker(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    ready.hear(DrainMessage(1.0))
    ready.tell(Drain(50.0))  # changes no grace time, but whose drain it is
    assert ready.hear(DrainMessage(undo=True)) == []
    assert ready.tick(1.0)[-1] == Stop(0, "drained")


def test_an_undo_where_nothing_drains_is_only_logged(ready: Any, say: Any) -> None:
    assert ready.hear(DrainMessage(undo=True)) == []
    assert lines(ready, "drain_undo_ignored") == [{"broker": say.broker, "reason": "it does not drain"}]
    ready.take(say.request(1))


def test_it_may_drain_again_after_an_undo(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    ready.hear(DrainMessage(5.0))
    ready.hear(DrainMessage(undo=True))
    assert say.messages(ready.hear(DrainMessage(5.0)), Draining)
    assert ready.engine(say.done(job))[-1] == Stop(0, "drained")
