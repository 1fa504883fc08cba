"""What a request that failed elsewhere asks of the broker: to be resumed, to be kept from a worker, not to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokenmq.protocol.liveness import EXPIRY_S
from tokenmq.protocol.messages import (
    Draining,
    Envelope,
    Error,
    Goodbye,
    Load,
    ModelInfo,
    Request,
    Started,
    WorkerState,
)

from .stage import Stage, WorkerPeer, kinds, request_id

RESUMES = (ModelInfo("m", resumes=True),)
CANNOT = "the stream broke after 5 tokens, and no worker of 'm' can go on with what another one has begun"


def busy(stage: Stage, name: str, number: int, **fields: Any) -> WorkerPeer:
    """Register a worker with one slot that a request of somebody else fills."""
    worker = stage.worker(name, **fields)
    client = stage.client(f"{name}'s")
    others = tuple(other.name for other in stage.core.registry if other.name != name)
    assert kinds(client.asks(number, avoid=others)) == [(name, "REQUEST")]
    return worker


class TestResuming:
    def test_it_goes_to_a_worker_that_resumes_with_its_prior_tokens(self, stage: Stage) -> None:
        client = stage.client()
        stage.worker("w1", slots=9)
        stage.worker("w2", slots=9, infos=RESUMES)
        for number in range(5):
            said = client.asks(number, attempt=2, prior_tokens=5)
            assert [to for to, message in said if isinstance(message, Request)] == ["w2"]
        request = said[0][1]
        assert isinstance(request, Request)
        assert (request.envelope.prior_tokens, request.envelope.attempt) == (5, 2)

    def test_it_waits_for_such_a_worker_while_others_are_served(self, stage: Stage) -> None:
        client = stage.client()
        plain, resuming = stage.worker("w1"), busy(stage, "w2", 1, infos=RESUMES)
        assert client.asks(2, prior_tokens=5) == []
        assert kinds(client.asks(3)) == [("w1", "REQUEST")]
        assert client.asks(4) == []
        assert kinds(plain.finishes(3)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]
        assert kinds(resuming.finishes(1)) == [("w2's", "FINISH stop"), ("w2", "REQUEST")]
        assert kinds(resuming.finishes(2)) == [("ann", "FINISH stop")]

    def test_it_leaves_the_waiting_room_before_others(self, stage: Stage) -> None:
        client = stage.client()
        worker = busy(stage, "w1", 1, infos=(ModelInfo("m", resumes=True), ModelInfo("n", resumes=True)))
        client.asks(2, "n")
        stage.now += 1.0
        client.asks(3)
        client.asks(4, prior_tokens=5)
        order = []
        for number in (1, 4, 2, 3):
            order += [message.id for _, message in worker.finishes(number) if isinstance(message, Request)]
        assert order == [request_id(4), request_id(2), request_id(3)]

    def test_it_has_a_place_where_the_room_is_full_and_that_is_bounded_too(
        self, stages: Callable[..., Stage]
    ) -> None:
        stage = stages(max_waiting=1)
        client = stage.client()
        busy(stage, "w1", 1, infos=RESUMES)
        assert client.asks(2) == []
        assert kinds(client.asks(3)) == [("ann", "ERROR busy")]
        assert client.asks(4, prior_tokens=5) == []
        assert kinds(client.asks(5, prior_tokens=5)) == [("ann", "ERROR busy")]

    def test_where_nobody_resumes_it_is_refused(self, stage: Stage) -> None:
        stage.passes(EXPIRY_S)  # a broker that is no longer young
        client = stage.client()
        stage.worker("w1")
        stage.worker("w2", infos=(ModelInfo("n", resumes=True),))
        assert client.asks(1, prior_tokens=5) == [("ann", Error(request_id(1), 1, "cannot_resume", CANNOT))]
        assert kinds(client.asks(2, "o", prior_tokens=5)) == [("ann", "ERROR model_not_found")]

    def test_a_young_broker_waits_for_workers_that_resume(self, stage: Stage) -> None:
        client = stage.client()
        stage.worker("w1")
        (error,) = [message for _, message in client.asks(1, prior_tokens=5)]
        assert isinstance(error, Error)
        assert (error.code, error.retryable) == ("no_worker", True)

    @pytest.mark.parametrize("how", ["leaves", "changes"])
    def test_it_fails_when_the_last_worker_that_resumes_goes(self, stage: Stage, how: str) -> None:
        stage.passes(EXPIRY_S)  # a broker that is no longer young
        client = stage.client()
        stage.worker("w1")
        worker = busy(stage, "w2", 1, infos=RESUMES)
        client.asks(2, prior_tokens=5)
        said = worker.says(Goodbye()) if how == "leaves" else worker.changes(models=("m",))
        assert ("ann", Error(request_id(2), 1, "cannot_resume", CANNOT)) in said

    def test_a_worker_that_resumes_and_is_still_loading_is_waited_for(self, stage: Stage) -> None:
        client = stage.client()
        stage.worker("w1")
        worker = stage.worker("w2", infos=RESUMES, load=Load(WorkerState.LOADING))
        assert client.asks(1, prior_tokens=5) == []
        assert kinds(worker.beats(load=Load())) == [("w2", "REQUEST")]

    def test_a_worker_that_loads_has_not_told_yet_whether_it_resumes(self, stage: Stage) -> None:
        stage.passes(EXPIRY_S)  # a broker that is no longer young
        client = stage.client()
        worker = stage.worker("w1", load=Load(WorkerState.LOADING))  # names only, as a worker says at first
        assert client.asks(1, prior_tokens=5) == []
        assert client.asks(2, prior_tokens=5) == []
        worker.ready = stage_ready(worker, RESUMES)
        assert kinds(worker.changes(load=Load()))[0] == ("w1", "REQUEST")
        other = Stage()
        other.passes(EXPIRY_S)
        client, worker = other.client(), other.worker("w1", load=Load(WorkerState.LOADING))
        assert client.asks(1, prior_tokens=5) == []
        assert ("ann", Error(request_id(1), 1, "cannot_resume", CANNOT)) in worker.changes(load=Load())

    def test_nothing_fails_because_a_worker_leaves_that_had_not_loaded_yet(self, stage: Stage) -> None:
        stage.passes(EXPIRY_S)  # a broker that is no longer young
        client = stage.client()
        worker = stage.worker("w1", load=Load(WorkerState.LOADING))
        assert client.asks(1, prior_tokens=5) == []
        assert worker.says(Draining()) == []
        assert worker.beats(load=Load(WorkerState.DRAINING)) == []
        (error,) = [message for _, message in worker.says(Goodbye())]
        assert isinstance(error, Error)
        assert (error.code, error.retryable) == ("no_worker", True)  # its successor may be there soon

    def test_a_worker_that_learns_to_resume_serves_who_waits(self, stage: Stage) -> None:
        client = stage.client()
        busy(stage, "w1", 1, infos=RESUMES)
        worker = stage.worker("w2")
        assert client.asks(2, prior_tokens=5) == []
        worker.ready = stage_ready(worker, RESUMES)
        assert kinds(worker.says(worker.ready)) == [("w2", "REQUEST")]


def stage_ready(worker: WorkerPeer, infos: tuple[ModelInfo, ...]) -> Any:
    return type(worker.ready)(
        worker.name, 1, "test/1", infos, worker.ready.slots, "synthetic", worker.ready.load, 1.0
    )  # fmt: skip


class TestAvoiding:
    def test_another_worker_is_taken_and_the_wish_goes_no_further(self, stage: Stage) -> None:
        client = stage.client()
        stage.worker("w1")
        stage.worker("w2")
        (_, request), started = client.asks(1, avoid=("w1",), queue_s=9.0)
        assert started == ("ann", Started(request_id(1), 1, "w2"))
        assert isinstance(request, Request)
        assert request.envelope == Envelope("m", 1, 8, route=request.envelope.route)

    def test_it_waits_for_the_other_workers_slot_while_others_are_served(self, stage: Stage) -> None:
        client = stage.client()
        other = busy(stage, "w2", 1)
        worker = stage.worker("w1")
        assert client.asks(2, avoid=("w1",)) == []
        assert kinds(client.asks(3)) == [("w1", "REQUEST")]
        assert kinds(worker.finishes(3)) == [("ann", "FINISH stop")]
        assert kinds(other.finishes(1)) == [("w2's", "FINISH stop"), ("w2", "REQUEST")]

    def test_where_all_are_avoided_any_will_do(self, stage: Stage) -> None:
        client = stage.client()
        stage.worker("w1")
        stage.worker("w2", "other")
        assert kinds(client.asks(1, avoid=("w1", "w3"))) == [("w1", "REQUEST")]

    def test_the_other_must_be_able_to_resume(self, stage: Stage) -> None:
        client = stage.client()
        stage.worker("w1", infos=RESUMES)
        stage.worker("w2")
        assert kinds(client.asks(1, prior_tokens=5, avoid=("w1",))) == [("w1", "REQUEST")]

    @pytest.mark.parametrize("state", [WorkerState.LOADING, WorkerState.STALLED, WorkerState.DRAINING])
    def test_a_worker_that_is_not_ready_is_no_other(self, stage: Stage, state: WorkerState) -> None:
        client = stage.client()
        stage.worker("w1")
        stage.worker("w2", load=Load(state))
        assert kinds(client.asks(1, avoid=("w1",))) == [("w1", "REQUEST")]

    @pytest.mark.parametrize("how", ["leaves", "vanishes", "drains", "stalls", "changes", "registers anew"])
    def test_the_avoided_one_is_taken_when_the_other_is_lost(self, stage: Stage, how: str) -> None:
        client = stage.client()
        other = busy(stage, "w2", 1)
        stage.worker("w1")
        assert client.asks(2, avoid=("w1",)) == []
        if how == "leaves":
            said = other.says(Goodbye())
        elif how == "vanishes":
            said = other.vanishes()
        elif how == "drains":
            said = other.says(Draining())
        elif how == "stalls":
            said = other.beats(load=Load(WorkerState.STALLED))
        elif how == "changes":
            said = other.changes(models=("other",))
        else:
            said = stage.registers(stage.stranger_worker("w2"), "other")
        assert ("w1", "REQUEST") in kinds(said)

    def test_a_worker_that_registers_meanwhile_has_begun_anew(self, stage: Stage) -> None:
        client = stage.client()
        busy(stage, "w2", 1)
        drained = stage.worker("w1")
        client.asks(2, attempt=2, avoid=("w1",))
        assert ("w1", "REQUEST") not in kinds(drained.says(Goodbye()))
        back = stage.worker("w1", load=Load(WorkerState.LOADING))
        assert kinds(back.beats(load=Load(WorkerState.READY))) == [("w1", "REQUEST")]

    def test_a_worker_that_expires_lets_the_avoided_one_have_it(self, stage: Stage) -> None:
        client = stage.client(heartbeat_s=60.0)
        busy(stage, "w2", 1)
        stage.passes(1.0)
        stage.worker("w1")  # heard later than the other
        client.asks(2, avoid=("w1",))
        assert ("w1", "REQUEST") in kinds(stage.passes(4.3))


class TestTheQueue:
    def test_who_waits_for_too_long_is_told(self, stage: Stage) -> None:
        client = stage.client()
        worker = stage.busy_worker("w1", client)
        client.asks(2, queue_s=0.25)
        assert stage.passes(0.24) == []
        message = "no worker was free for it in the 0.250 s that it waited for 'm'"
        assert stage.passes(0.02) == [("ann", Error(request_id(2), 1, "queue_timeout", message))]
        assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]

    def test_who_has_left_the_queue_may_take_longer(self, stage: Stage) -> None:
        client = stage.client()
        worker = stage.worker("w1")
        client.asks(1, queue_s=0.25)
        client.asks(2, queue_s=0.25)
        stage.passes(0.2)
        assert kinds(worker.finishes(1)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]
        assert kinds(stage.passes(0.5)) == []
        assert kinds(worker.finishes(2)) == [("ann", "FINISH stop")]

    @pytest.mark.parametrize(("queue_s", "deadline_s"), [(0.2, 0.4), (0.4, 0.2), (0.2, 0.2)])
    def test_of_two_limits_the_earlier_one_ends_it(self, stage: Stage, queue_s: float, deadline_s: float) -> None:
        client = stage.client()
        stage.busy_worker("w1", client)
        client.asks(2, queue_s=queue_s, deadline_s=deadline_s)
        code = "queue_timeout" if queue_s < deadline_s else "deadline"
        assert kinds(stage.passes(0.3)) == [("ann", f"ERROR {code}")]

    def test_the_deadline_counts_on_when_it_runs(self, stage: Stage) -> None:
        client = stage.client()
        worker = stage.busy_worker("w1", client)
        client.asks(2, queue_s=0.2, deadline_s=0.4)
        worker.finishes(1)
        assert kinds(stage.passes(0.3)) == []
        [(_, error), _] = stage.passes(0.2)
        assert isinstance(error, Error)
        assert (error.code, error.worker) == ("deadline", "w1")

    def test_who_will_not_wait_at_all_is_served_by_a_free_worker_only(self, stage: Stage) -> None:
        client = stage.client()
        stage.worker("w1")
        assert kinds(client.asks(1, queue_s=0.0)) == [("w1", "REQUEST")]
        client.asks(2, queue_s=0.0)
        assert kinds(stage.passes(0.0)) == [("ann", "ERROR queue_timeout")]


class TestAYoungBroker:
    def test_an_unknown_model_may_be_on_its_way(self, stage: Stage) -> None:
        client = stage.client()
        stage.now += 0.4
        message = "no worker serves 'm' yet; this broker started 0.4 s ago; models here: none"
        assert client.asks(1) == [("ann", Error(request_id(1), 1, "no_worker", message, retryable=True))]

    def test_after_the_expiry_time_it_is_unknown(self, stages: Callable[..., Stage]) -> None:
        stage = stages(expiry_s=2.0)
        client = stage.client()
        stage.now += 1.9
        assert kinds(client.asks(1)) == [("ann", "ERROR no_worker")]
        stage.now += 0.1
        assert kinds(client.asks(2)) == [("ann", "ERROR model_not_found")]


def test_errors_name_the_worker_that_had_the_request(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", slots=4)
    client.asks(1, deadline_s=0.1)
    for number in (2, 3, 4):
        client.asks(number)
    client.asks(5, deadline_s=0.1)
    said = stage.passes(0.2)
    said += worker.fails(2)
    said += stage.tell(stage.core.drain(stage.now, 60.0)) + client.asks(6)
    said += worker.vanishes()
    errors = {message.id[-1]: (message.code, message.worker) for _, message in said if isinstance(message, Error)}
    assert errors == {
        1: ("deadline", "w1"), 2: ("engine_failed", "w1"), 3: ("worker_lost", "w1"), 4: ("worker_lost", "w1"),
        5: ("deadline", ""), 6: ("draining", ""),
    }  # fmt: skip


def test_a_client_that_is_gone_when_its_request_starts_leaves_nothing_behind(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    worker = stage.busy_worker("w1", bob)
    ann.asks(2)
    worker.finishes(1)
    assert kinds(ann.vanishes()) == [("w1", "CANCEL")]
    assert worker.finishes(2) == []


def test_many_that_cannot_be_served_keep_nobody_else_waiting(stages: Callable[..., Stage]) -> None:
    stage = stages(max_waiting=1000)
    client = stage.client()
    busy(stage, "w2", 1, infos=RESUMES)
    worker = stage.worker("w1")
    for number in range(2, 500):
        assert client.asks(number, avoid=("w1",)) == []
        assert client.asks(1000 + number, prior_tokens=5) == []
    assert kinds(client.asks(5000)) == [("w1", "REQUEST")]
    client.asks(5001)
    assert kinds(worker.finishes(5000)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]


def test_the_log_tells_the_attempts_of_a_request_apart(stage: Stage) -> None:
    client = stage.client()
    first, second = stage.worker("w1", infos=RESUMES), stage.worker("w2", infos=RESUMES)
    client.asks(1)
    first.vanishes()
    client.asks(1, attempt=2, prior_tokens=5)
    second.finishes(1, attempt=2)
    (failed,), (finished,) = stage.logged("request_failed"), stage.logged("request_finished")
    assert (failed["worker"], failed["attempt"]) == ("w1", 1)
    assert (finished["worker"], finished["attempt"], finished["prior_tokens"]) == ("w2", 2, 5)
