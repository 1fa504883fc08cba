"""The breaker by itself, and what it does to a worker."""

from __future__ import annotations

import pytest

from tokenmq.broker.breaker import FAILURES, MAX_PAUSE_S, PAUSE_S, Breaker, State
from tokenmq.protocol.messages import FinishReason, Load, Parked, WorkerState

from .stage import Stage, WorkerPeer, kinds, request_id, worker_session

REQUESTS = [bytes([number]) for number in range(FAILURES + 1)]


class TestBreaker:
    def test_it_opens_after_failures_in_a_row(self) -> None:
        breaker = Breaker()
        assert [breaker.failed(0.0, REQUESTS[n]) for n in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
        assert breaker.state is State.OPEN
        assert breaker.again_at == PAUSE_S

    def test_a_success_between_them_begins_the_count_anew(self) -> None:
        breaker = Breaker()
        for _ in range(10):
            assert not any(breaker.failed(0.0, REQUESTS[n]) for n in range(FAILURES - 1))
            assert not breaker.succeeded()

    def test_a_request_that_is_tried_again_counts_once(self) -> None:
        breaker = Breaker()
        assert not any(breaker.failed(0.0, REQUESTS[0]) for _ in range(10))
        assert breaker.failures == 1
        assert [breaker.failed(0.0, REQUESTS[n]) for n in range(1, FAILURES)][-1]

    def test_each_failed_trial_doubles_the_pause_up_to_a_limit(self) -> None:
        breaker, pauses = Breaker(), []
        for n in range(FAILURES - 1):
            breaker.failed(0.0, REQUESTS[n])
        for _ in range(8):
            assert breaker.failed(100.0, REQUESTS[-1])
            pauses.append(breaker.again_at - 100.0)
            breaker.try_again()
        assert pauses[:3] == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S]
        assert pauses[-1] == MAX_PAUSE_S

    def test_a_trial_that_succeeds_closes_it_and_forgets_the_pauses(self) -> None:
        breaker = Breaker()
        for n in range(FAILURES):
            breaker.failed(0.0, REQUESTS[n])
        breaker.try_again()
        assert breaker.succeeded()
        assert breaker == Breaker(again_at=PAUSE_S)

    def test_what_ran_on_when_it_opened_changes_nothing(self) -> None:
        breaker = Breaker()
        for n in range(FAILURES):
            breaker.failed(0.0, REQUESTS[n])
        assert not breaker.failed(0.5, REQUESTS[-1])
        assert breaker.again_at == PAUSE_S


def suspend(stage: Stage, worker: WorkerPeer, first: int = 1) -> None:
    """Have a worker's engine fail so often that it is suspended; it must be the only one that is free."""
    client = stage.client("suspender")
    for number in range(first, first + FAILURES):
        assert "REQUEST" in " ".join(kind for to, kind in kinds(client.asks(number)) if to == worker.name), number
        worker.fails(number)
    assert worker_session(stage, worker.name).breaker.state is State.OPEN


class TestWorkers:
    def test_a_suspended_worker_gets_nothing_while_there_is_another(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=9)
        suspend(stage, bad)
        stage.worker("good", slots=2)
        client = stage.client()
        assert kinds(client.asks(10)) == [("good", "REQUEST")]
        assert kinds(client.asks(11)) == [("good", "REQUEST")]
        assert client.asks(12) == []  # rather waits for the good one
        assert stage.logged("worker_suspended") == [{"worker": "bad", "failures": FAILURES, "s": PAUSE_S}]
        assert stage.core.counters.workers_suspended == 1

    def test_the_last_worker_of_a_model_is_never_left_out(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=9)
        suspend(stage, bad)
        assert kinds(stage.client().asks(10)) == [("bad", "REQUEST")]

    @pytest.mark.parametrize("state", [WorkerState.STALLED, WorkerState.DRAINING, WorkerState.LOADING])
    def test_one_that_is_not_ready_is_no_other(self, stage: Stage, state: WorkerState) -> None:
        bad = stage.worker("bad", slots=9)
        suspend(stage, bad)
        stage.worker("good", load=Load(state))
        assert kinds(stage.client().asks(10)) == [("bad", "REQUEST")]

    def test_what_waits_for_the_other_goes_to_the_suspended_one_when_that_leaves(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=9)
        suspend(stage, bad)
        good = stage.busy_worker("good", stage.client("bob"), 10)
        assert stage.client().asks(11) == []
        assert ("bad", "REQUEST") in kinds(good.vanishes())

    def test_when_the_last_other_one_is_suspended_the_waiting_go_to_all(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=2)
        suspend(stage, bad)
        good = stage.worker("good", slots=FAILURES + 1)
        client = stage.client()
        for number in range(10, 11 + FAILURES):
            client.asks(number)
        assert client.asks(20) == []
        said = [good.fails(number) for number in range(10, 10 + FAILURES)]
        assert [to for to, message in kinds(said[0]) if message == "REQUEST"] == ["good"]
        client.asks(21)
        client.asks(22)
        assert worker_session(stage, "good").breaker.state is State.OPEN
        assert len(worker_session(stage, "bad").in_flight) + len(worker_session(stage, "good").in_flight) > 1

    def test_after_the_pause_one_request_tries_it(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=9)
        suspend(stage, bad)
        good = stage.worker("good", slots=1)
        client = stage.client()
        assert kinds(client.asks(10)) == [("good", "REQUEST")]
        assert client.asks(11) == client.asks(12) == []
        said = kinds(stage.passes(PAUSE_S))
        assert [(to, kind) for to, kind in said if kind == "REQUEST"] == [("bad", "REQUEST")]
        assert stage.logged("worker_tried_again") == [{"worker": "bad"}]
        assert kinds(bad.finishes(11)) == [("ann", "FINISH stop"), ("bad", "REQUEST")]
        assert stage.logged("worker_trusted") == [{"worker": "bad"}]
        assert worker_session(stage, "bad").breaker.state is State.CLOSED
        assert kinds(good.finishes(10)) == [("ann", "FINISH stop")]

    def test_of_a_last_worker_all_slots_are_used_while_it_is_tried(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=3)
        suspend(stage, bad)
        bad.beats(load=Load(running=1))  # another broker's
        stage.passes(PAUSE_S)
        client = stage.client()
        assert kinds(client.asks(10)) == kinds(client.asks(11)) == [("bad", "REQUEST")]
        assert client.asks(12) == []

    def test_others_and_older_requests_do_not_keep_it_from_being_tried(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=9)
        client = stage.client()
        client.asks(1)
        suspend(stage, bad, first=2)
        bad.beats(load=Load(running=5, held=1))
        stage.busy_worker("good", stage.client("bob"), 10)
        assert client.asks(11) == client.asks(12) == []
        said = kinds(stage.passes(PAUSE_S))
        assert [(to, kind) for to, kind in said if kind == "REQUEST"] == [("bad", "REQUEST")]

    def test_a_trial_that_says_nothing_gives_way_to_another(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=9)
        suspend(stage, bad)
        stage.busy_worker("good", stage.client("bob"), 10)
        client = stage.client()
        client.asks(11)
        stage.passes(PAUSE_S)
        assert client.asks(12) == []
        client.cancels(11)
        assert ("bad", "REQUEST") in kinds(bad.finishes(11, reason=FinishReason.CANCELLED))
        client.asks(13)
        assert ("bad", "REQUEST") in kinds(bad.says(Parked(request_id(12), 1)))

    def test_a_failed_trial_suspends_it_again(self, stage: Stage) -> None:
        bad = stage.worker("bad", slots=9)
        suspend(stage, bad)
        stage.busy_worker("good", stage.client("bob"), 10)
        stage.client().asks(11)
        stage.passes(PAUSE_S)
        bad.fails(11)
        assert worker_session(stage, "bad").breaker.again_at == stage.now + 2 * PAUSE_S

    @pytest.mark.parametrize("code", ["bad_request", "busy", "draining", "cannot_resume", "reader_timeout"])
    def test_what_is_not_the_engines_fault_does_not_count(self, stage: Stage, code: str) -> None:
        worker = stage.worker("w1")
        client = stage.client()
        for number in range(3 * FAILURES):
            client.asks(number)
            worker.fails(number, code)
        assert worker_session(stage, "w1").breaker == Breaker()

    def test_a_request_that_breaks_every_engine_suspends_nobody(self, stage: Stage) -> None:
        workers = {name: stage.worker(name) for name in ("w1", "w2")}
        client = stage.client()
        for attempt in range(1, 4 * FAILURES):
            [(to, _)] = [each for each in kinds(client.asks(1, attempt=attempt)) if each[1] == "REQUEST"]
            workers[to].fails(1, attempt=attempt)
        assert {worker_session(stage, name).breaker.state for name in workers} == {State.CLOSED}

    def test_a_cancelled_request_says_nothing(self, stage: Stage) -> None:
        worker = stage.worker("w1")
        client = stage.client()
        for number in range(FAILURES):
            client.asks(number)
            worker.fails(number) if number else worker.finishes(number, reason=FinishReason.CANCELLED)
        assert worker_session(stage, "w1").breaker.failures == FAILURES - 1

    def test_a_worker_that_registers_anew_is_trusted(self, stage: Stage) -> None:
        bad = stage.worker("bad")
        suspend(stage, bad)
        stage.registers(stage.stranger_worker("bad"), incarnation=2)
        assert worker_session(stage, "bad").breaker == Breaker()
        stage.passes(2 * PAUSE_S)
        assert stage.logged("worker_tried_again") == []
