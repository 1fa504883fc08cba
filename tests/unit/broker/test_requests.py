"""What becomes of a request: from its arrival to its one answer and the release of its slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tokenmq.broker import queue as queue_module
from tokenmq.broker import refusals as refusals_module
from tokenmq.broker.requests import key_of
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.limits import MAX_TEXT_CHARS
from tokenmq.protocol.messages import (
    Cancel,
    Credit,
    Draining,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Hello,
    Load,
    ModelInfo,
    Parked,
    Request,
    Started,
    Timings,
    Usage,
    WorkerState,
)

from .stage import Stage, finish, kinds, ready_of, request_id, worker_session

ENDED = {"waiting": 0, "running": 0, "orphaned": 0}


def test_a_request_goes_to_a_free_worker_with_its_return_route(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    stage.now += 1.0
    said = client.asks(1, deadline_s=9.0, payload=b"prompt", attachments=(b"image",))
    [route] = worker_session(stage, "w1").routes
    envelope = Envelope("m", 1, 8, 9.0, route)
    assert said == [
        ("w1", Request(request_id(1), envelope, b"prompt", (b"image",))),
        ("ann", Started(request_id(1), 1, "w1")),
    ]
    stage.now += 1.0
    assert worker.finishes(1) == [("ann", finish(1, worker="w1"))]
    assert stage.core.exchange.tally() == ENDED
    assert worker_session(stage, "w1").routes == {}


def test_a_route_that_a_client_writes_into_its_request_is_ignored(stage: Stage) -> None:
    stage.worker("w1")
    client = stage.client()
    (_, request), _ = client.says(Request(request_id(1), Envelope("m", 1, 8, route=b"f" * 16), b""))
    assert isinstance(request, Request)
    assert request.envelope.route != b"f" * 16


def test_requests_wait_in_the_order_of_their_arrival_and_clients_take_turns(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    worker = stage.busy_worker("w1", ann, number=1)
    assert ann.asks(2) == bob.asks(3) == ann.asks(4) == []
    order = []
    for number in (1, 3, 2, 4):
        said = worker.finishes(number)
        order += [message.id for _, message in said if isinstance(message, Request)]
    assert order == [request_id(3), request_id(2), request_id(4)]  # bob first: ann has had one already


def test_the_time_in_the_waiting_room_is_told_and_taken_off_the_deadline(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2, deadline_s=4.0)
    stage.now += 1.5
    said = worker.finishes(1)
    request = said[1][1]
    assert isinstance(request, Request)
    assert request.envelope.deadline_s == 2.5
    assert worker.finishes(2) == [("ann", finish(2, worker="w1", waited_s=1.5))]


def test_a_worker_with_several_models_serves_the_longest_wait_first(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", "a", "b")
    client.asks(1, "a")
    for number, model in ((2, "b"), (3, "a"), (4, "b")):
        stage.now += 0.1
        client.asks(number, model)
    order = []
    for number in (1, 2, 3, 4):
        order += [message.id for _, message in worker.finishes(number) if isinstance(message, Request)]
    assert order == [request_id(2), request_id(3), request_id(4)]


def test_an_unknown_model_is_refused_with_those_that_are_known(stage: Stage) -> None:
    stage.passes(5.0)
    stage.worker("w1", "b", "a")
    [(_, error)] = stage.client().asks(1, "c")
    assert error == Error(request_id(1), 1, "model_not_found", "no worker serves 'c'; models here: a, b")


def test_a_model_that_was_served_before_is_not_unknown(stage: Stage) -> None:
    worker = stage.worker("w1", "a")
    client = stage.client()
    worker.says(Goodbye())
    [(_, error)] = client.asks(1, "a")
    assert isinstance(error, Error)
    assert (error.code, error.retryable) == ("no_worker", True)
    assert error.message == "no worker serves 'a' at the moment; models here: none"


def test_an_error_is_never_longer_than_the_wire_allows(stage: Stage) -> None:
    stage.passes(5.0)
    stage.worker("w0", "gone").says(Goodbye())
    stage.worker("w1", *(f"{number:0256}" for number in range(40)))
    client = stage.client()
    for number, model in ((1, "gone"), (2, "never")):
        [(_, error)] = client.asks(number, model)
        assert isinstance(error, Error)
        assert len(error.message) == MAX_TEXT_CHARS
        assert decode(encode(error)) == error


def test_ever_new_model_names_are_not_remembered_for_ever(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals_module, "_MAX_SEEN_MODELS", 10)
    stage.passes(5.0)
    worker = stage.worker("w1", "m0")
    for number in range(1, 30):
        worker.changes(models=(f"m{number}",))
    client = stage.client()
    codes = [kinds(client.asks(number, f"m{number}"))[0][1] for number in (5, 25)]
    assert codes == ["ERROR model_not_found", "ERROR no_worker"]


def test_a_full_waiting_room_answers_busy_with_a_time_to_come_back(stages: Callable[..., Stage]) -> None:
    stage = stages(max_waiting=1)
    client = stage.client()
    stage.busy_worker("w1", client)
    assert client.asks(2) == []
    [(_, error)] = client.asks(3)
    assert error == Error(request_id(3), 1, "busy", "1 requests wait for 'm' already", True, 1.0)


def test_without_a_waiting_room_a_free_worker_still_serves(stages: Callable[..., Stage]) -> None:
    stage = stages(max_waiting=0)
    client = stage.client()
    stage.worker("w1")
    assert kinds(client.asks(1)) == [("w1", "REQUEST")]
    assert kinds(client.asks(2)) == [("ann", "ERROR busy")]


def test_a_waiting_room_is_bounded_in_bytes_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "MAX_WAITING_BYTES", 100)
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    assert client.asks(2, payload=b"x" * 50, attachments=(b"y" * 30,)) == []
    assert kinds(client.asks(3, payload=b"x" * 21)) == [("ann", "ERROR busy")]
    client.cancels(2)
    assert client.asks(4, payload=b"x" * 100) == []
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]


def test_slots_are_all_given_out_and_never_more(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", slots=3)
    said = [kinds(client.asks(number)) for number in range(5)]
    assert said == [[("w1", "REQUEST")]] * 3 + [[], []]
    assert kinds(worker.changes(slots=4)) == [("w1", "REQUEST")]
    assert worker.changes(slots=1) == []
    for number in (0, 1, 2):  # four are held, one slot is left of them
        assert kinds(worker.finishes(number)) == [("ann", "FINISH stop")]
    assert kinds(worker.finishes(3)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]


def test_slots_that_other_brokers_use_are_not_free(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", slots=4)
    worker.beats(load=Load(running=2, waiting=1, held=0))
    assert kinds(client.asks(1)) == [("w1", "REQUEST")]
    assert client.asks(2) == []
    # The report counts our own request; it is taken off, since this broker knows it exactly.
    assert worker.beats(load=Load(running=4, waiting=0, held=1)) == []
    assert kinds(worker.beats(load=Load(running=1, waiting=0, held=1))) == [("w1", "REQUEST")]


def test_a_parked_request_frees_its_slot_once_and_is_still_answered(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    client.asks(3)
    assert kinds(worker.says(Parked(request_id(1), 1))) == [("w1", "REQUEST")]
    assert worker.says(Parked(request_id(1), 1)) == []
    assert client.queries("workers")[0]["parked"] == 1
    assert kinds(client.grants(1, 99)) == [("w1", "CREDIT")]
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]  # its slot is in use by the second
    assert kinds(worker.finishes(2)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]


def test_parking_what_a_worker_does_not_hold_changes_nothing(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    other = stage.stranger_worker("w2")
    stage.registers(other, "n")
    assert other.says(Parked(request_id(1), 1)) == []
    assert worker.says(Parked(request_id(1), 2)) == worker.says(Parked(request_id(2), 1)) == []
    assert worker_session(stage, "w1").free == 0


def test_a_parked_request_fails_with_its_worker(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    worker.says(Parked(request_id(1), 1))
    assert kinds(worker.vanishes()) == [("ann", "ERROR worker_lost")]


def test_a_report_that_holds_more_than_it_runs_does_not_make_slots(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", slots=1)
    client.asks(1)
    client.asks(2)
    assert worker.beats(load=Load(running=0, waiting=0, held=1000)) == []


@pytest.mark.parametrize("state", [WorkerState.LOADING, WorkerState.STALLED, WorkerState.DRAINING])
def test_only_ready_workers_get_requests(stage: Stage, state: WorkerState) -> None:
    client = stage.client()
    worker = stage.worker("w1", load=Load(state))
    assert client.asks(1) == []
    assert kinds(worker.beats(load=Load())) == [("w1", "REQUEST")]


def test_a_draining_worker_finishes_and_gets_nothing_more(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    assert worker.says(Draining()) == []
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]
    assert worker.beats(load=Load()) == []  # whatever it reports afterwards
    assert kinds(worker.says(Goodbye())) == [("ann", "ERROR no_worker")]


def test_a_lost_worker_fails_what_it_held_and_what_nobody_else_can_serve(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    worker = stage.worker("w1", "a", "b")
    stage.worker("w2", "b", slots=2).beats(load=Load(WorkerState.STALLED))
    ann.asks(1, "a")
    bob.asks(2, "a")
    bob.asks(3, "b")
    said = worker.vanishes()
    message = "worker w1 was lost: its connection is gone"
    assert said == [
        ("ann", Error(request_id(1), 1, "worker_lost", message, retryable=True, worker="w1")),
        ("bob", Error(request_id(2), 1, "no_worker", "the last worker for 'a' has left", retryable=True)),
    ]
    assert stage.core.exchange.tally() == {"waiting": 1, "running": 0, "orphaned": 0}
    assert stage.core.counters.workers_lost == 1


def test_a_model_that_its_last_worker_drops_fails_what_waits_and_spares_what_runs(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", "a", "b")
    client.asks(1, "a")
    client.asks(2, "a")
    client.asks(3, "b")
    assert kinds(worker.changes(models=("b",))) == [("ann", "ERROR no_worker")]
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]
    assert kinds(worker.changes(models=("c",))) == []
    assert kinds(worker.finishes(3)) == [("ann", "FINISH stop")]
    assert kinds(client.asks(4, "c")) == [("w1", "REQUEST")]


def test_a_worker_that_takes_on_a_model_serves_who_waits_for_it(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1", "a")
    worker = stage.worker("w2", "b", infos=(ModelInfo("b"), ModelInfo("b")))
    client.asks(1, "a")
    client.asks(2, "a")
    assert kinds(worker.changes(models=("a", "b"))) == [("w2", "REQUEST")]


def test_a_running_request_is_cancelled_at_its_worker_which_answers(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    assert client.cancels(1) == [("w1", Cancel(request_id(1), 1))]
    assert client.cancels(1) == []
    assert kinds(worker.finishes(1, reason=FinishReason.CANCELLED)) == [("ann", "FINISH cancelled")]
    assert client.cancels(1) == []
    assert stage.core.counters.cancelled == 1


def test_a_waiting_request_is_cancelled_by_the_broker(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    stage.now += 0.5
    assert client.cancels(2) == [
        ("ann", Finish(request_id(2), 1, FinishReason.CANCELLED, Usage(), Timings(broker_queue_s=0.5), ""))
    ]
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]


def test_cancel_and_credit_of_others_or_of_other_attempts_are_ignored(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    stage.busy_worker("w1", ann)
    assert bob.cancels(1) == bob.grants(1, 100) == []
    assert ann.cancels(1, attempt=2) == ann.grants(1, 100, attempt=2) == []
    assert ann.cancels(9) == ann.grants(9, 100) == []


def test_credit_is_passed_on_or_kept_with_a_request_that_waits(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    assert client.grants(1, 64) == [("w1", Credit(request_id(1), 1, 64))]
    client.asks(2, credit=8)
    assert client.grants(2, 32) == client.grants(2, 16) == []
    request = worker.finishes(1)[1][1]
    assert isinstance(request, Request)
    assert request.envelope.credit == 32


def test_a_client_that_vanishes_leaves_slots_charged_until_the_worker_answers(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    worker = stage.busy_worker("w1", ann)
    ann.asks(2)
    bob.asks(3)
    assert ann.vanishes() == [("w1", Cancel(request_id(1), 1))]
    assert ann.vanishes() == []
    assert stage.core.exchange.tally() == {"waiting": 1, "running": 0, "orphaned": 1}
    route = next(iter(worker_session(stage, "w1").routes))
    assert stage.core.route_chunks(worker.peer, route, stage.now) is None
    assert kinds(worker.finishes(1, reason=FinishReason.CANCELLED)) == [("w1", "REQUEST")]
    assert stage.core.counters.clients_lost == 1


def test_the_deadline_of_a_waiting_request_is_answered_by_the_broker(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2, deadline_s=0.25)
    assert stage.passes(0.24) == []
    message = "the deadline passed after 0.250 s, in the waiting room"
    assert stage.passes(0.02) == [("ann", Error(request_id(2), 1, "deadline", message))]
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]


def test_the_deadline_of_a_running_request_frees_no_slot(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    client.asks(1, deadline_s=0.25)
    client.asks(2)
    assert kinds(stage.passes(0.3)) == [("ann", "ERROR deadline"), ("w1", "CANCEL")]
    assert kinds(worker.finishes(1)) == [("w1", "REQUEST")]  # nobody is told a second time


def test_a_deadline_that_has_passed_on_arrival_is_refused(stage: Stage) -> None:
    stage.worker("w1")
    assert kinds(stage.client().asks(1, deadline_s=0.0)) == [("ann", "ERROR deadline")]


def test_no_chunks_reach_a_client_that_left_only_expired_requests_behind(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    client.asks(1, deadline_s=0.1)
    [route] = worker_session(stage, "w1").routes
    stage.passes(0.2)
    assert stage.core.route_chunks(worker.peer, route, stage.now) is stage.core.clients[client.peer]
    client.says(Goodbye())
    client.says(Hello("ann", "test/1"))  # the same connection, another session
    stage.core.validate()
    assert stage.core.route_chunks(worker.peer, route, stage.now) is None
    assert stage.core.clients[client.peer].sent == 1


def test_what_has_ended_does_not_stay_until_its_deadline(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    for number in range(2, 500):
        client.asks(number, deadline_s=3600.0, payload=b"x")
        record = stage.core.exchange.records[key_of(request_id(number), 1)]
        client.cancels(number)
        assert record.message is None
    stage.passes(0.0)
    deadlines = stage.core.exchange._deadlines
    assert deadlines.next() is None
    client.asks(500, deadline_s=3600.0)
    assert deadlines.next() == stage.now + 3600.0


def test_answers_for_requests_that_a_worker_does_not_hold_are_dropped(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    other = stage.worker("w2")
    assert other.finishes(1) == other.fails(1) == other.finishes(77) == []
    assert stage.core.counters.late_answers == 3
    assert stage.core.exchange.tally()["running"] == 1


def test_answers_of_an_older_attempt_are_dropped(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    client.asks(1, attempt=2)
    assert worker.finishes(1, attempt=1) == []
    assert kinds(worker.finishes(1, attempt=2)) == [("ann", "FINISH stop")]
    assert worker.finishes(1, attempt=2) == []


def test_a_workers_error_is_passed_on_with_the_workers_own_name(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    error = Error(request_id(1), 1, "out_of_memory", "no memory", retryable=True, retry_after_s=2.0)
    assert worker.says(replace(error, worker="somebody else"))[0] == ("ann", replace(error, worker="w1"))
    assert worker_session(stage, "w1").in_flight.keys() == {key_of(request_id(2), 1)}


def test_equal_workers_take_turns_and_the_shorter_queue_comes_first(stage: Stage) -> None:
    client = stage.client()
    workers = {name: stage.worker(name, slots=2) for name in ("w1", "w2", "w3")}
    order = [kinds(client.asks(number))[0][0] for number in range(1, 5)]
    assert order == ["w1", "w2", "w3", "w1"]
    workers["w3"].finishes(3)
    assert kinds(client.asks(5)) == [("w3", "REQUEST")]


def test_counters_tell_what_has_happened(stages: Callable[..., Stage]) -> None:
    stage = stages(max_waiting=1)
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    client.asks(3)  # busy
    client.asks(1)  # a repeat
    client.cancels(2)
    worker.fails(1)
    counters = stage.core.counters
    assert (counters.requests, counters.refused, counters.cancelled) == (2, 2, 1)
    assert (counters.finished, counters.failed) == (1, 1)


def test_a_request_leaves_no_room_behind_for_a_model_that_has_gone(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", "m0")
    for number in range(50):
        worker.changes(models=(f"m{number}",))
        client.asks(number, f"m{number}")
        worker.finishes(number)
    worker.says(Goodbye())
    assert stage.core.exchange._rooms == {}


def test_a_worker_with_a_thousand_models_can_be_replaced(stage: Stage) -> None:
    infos = tuple(ModelInfo(f"m{number}") for number in range(1000))
    stage.worker("w1", infos=infos)
    newer = stage.stranger_worker("w1")
    newer.says(replace(ready_of("w1", incarnation=2), models=infos[:1]))
    assert stage.core.registry.models() == ["m0"]


def test_a_cancelled_request_has_its_line_in_the_log(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    stage.busy_worker("w1", ann, number=1)
    bob.asks(2)
    ann.cancels(1)
    bob.vanishes()
    assert [(fields["model"], fields["worker"]) for fields in stage.logged("request_cancelled")] == [
        ("m", "w1"),
        ("m", ""),
    ]
