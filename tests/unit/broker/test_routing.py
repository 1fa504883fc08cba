"""What the exchange does with policies, hedges and those who ask why; fair shares as clients see them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from tokenmq.broker import chooser, core, dispatch
from tokenmq.broker.dispatch import Policy
from tokenmq.broker.events import FromWorker
from tokenmq.protocol.messages import (
    Considered,
    Decision,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Load,
    Request,
    Started,
    Timings,
    Usage,
)

from .stage import ClientPeer, Said, Stage, kinds, request_id, worker_session


def ask(client: ClientPeer, number: int, model: str = "m", *, attempt: int = 1, **fields: Any) -> list[Said]:
    return client.says(Request(request_id(number), Envelope(model, attempt, 8, **fields), b"p"))


def requests(said: list[Said]) -> list[tuple[str, int]]:
    """Reduce what was said to who got which request."""
    return [(to, int.from_bytes(message.id, "big")) for to, message in said if isinstance(message, Request)]


class TestHedges:
    def test_a_hedge_goes_to_another_worker_and_leaves_the_first_alone(self, stage: Stage) -> None:
        stage.worker("w1", slots=9)
        stage.worker("w2", slots=9)
        client = stage.client()
        assert kinds(ask(client, 1)) == [("w1", "REQUEST")]
        assert kinds(ask(client, 1, attempt=2, hedge=True, avoid=("w1",))) == [("w2", "REQUEST")]
        assert stage.core.counters.hedges == 1
        assert stage.core.counters.superseded == 0

    def test_it_is_kept_from_the_first_worker_though_it_does_not_name_it(self, stage: Stage) -> None:
        stage.worker("w1", slots=9)
        client = stage.client()
        ask(client, 1)
        [(to, refusal)] = ask(client, 1, attempt=2, hedge=True)
        assert (to, isinstance(refusal, Error) and (refusal.code, refusal.attempt)) == ("ann", ("busy", 2))

    def test_it_never_waits(self, stage: Stage) -> None:
        stage.busy_worker("w2", stage.client("bob"), 9)
        stage.worker("w1")
        client = stage.client()
        ask(client, 1)
        assert kinds(ask(client, 1, attempt=2, hedge=True, avoid=("w1",))) == [("ann", "ERROR busy")]
        assert stage.core.exchange.tally() == {"waiting": 0, "running": 2, "orphaned": 0}

    def test_it_rather_goes_another_way_than_the_first(self, stage: Stage) -> None:
        """A broker below may have no other worker than the one that is late."""
        for name, speed in (("site", 9.0), ("near", 1.0)):
            stage.worker(name, slots=9, speed=speed, brokers=("b",) if name == "site" else ())
        client = stage.client()
        assert requests(ask(client, 1)) == [("site", 1)]
        stage.core.handle(FromWorker(worker_session(stage, "site").peer, Started(request_id(1), 1, "gpu")), stage.now)
        assert requests(ask(client, 1, attempt=2, hedge=True)) == [("near", 1)]

    def test_each_gets_its_own_credit_cancel_and_answer(self, stage: Stage) -> None:
        first, second = stage.worker("w1"), stage.worker("w2")
        client = stage.client()
        ask(client, 1)
        ask(client, 1, attempt=2, hedge=True)
        assert kinds(client.grants(1, 64, attempt=1)) == [("w1", "CREDIT")]
        assert kinds(client.grants(1, 64, attempt=2)) == [("w2", "CREDIT")]
        assert kinds(client.cancels(1, attempt=1)) == [("w1", "CANCEL")]
        assert kinds(first.finishes(1, reason=FinishReason.CANCELLED)) == [("ann", "FINISH cancelled")]
        assert kinds(second.finishes(1, attempt=2)) == [("ann", "FINISH stop")]
        assert stage.core.exchange.records == {}

    def test_a_further_attempt_takes_the_place_of_both(self, stage: Stage) -> None:
        for name in ("w1", "w2", "w3"):
            stage.worker(name)
        client = stage.client()
        ask(client, 1)
        ask(client, 1, attempt=2, hedge=True)
        said = kinds(ask(client, 1, attempt=3))
        assert sorted(said) == [("w1", "CANCEL"), ("w2", "CANCEL"), ("w3", "REQUEST")]
        assert stage.core.counters.superseded == 2

    def test_a_late_first_attempt_is_dropped(self, stage: Stage) -> None:
        stage.worker("w1", slots=9)
        stage.worker("w2", slots=9)
        client = stage.client()
        ask(client, 1)
        ask(client, 1, attempt=3, hedge=True)
        assert ask(client, 1, attempt=2) == []

    def test_a_client_that_leaves_takes_both_along(self, stage: Stage) -> None:
        stage.worker("w1")
        stage.worker("w2")
        client = stage.client()
        ask(client, 1)
        ask(client, 1, attempt=2, hedge=True)
        assert kinds(client.vanishes()) == [("w1", "CANCEL"), ("w2", "CANCEL")]


class TestDecisions:
    def test_finish_and_the_log_tell_why(self, stage: Stage) -> None:
        stage.worker("slow", slots=4, speed=1.0)
        fast = stage.worker("fast", slots=2, speed=3.0)
        client = stage.client()
        ask(client, 1)
        ask(client, 2, explain=True)
        stage.now += 0.5
        [(_, finish)] = fast.says(
            Finish(request_id(2), 1, FinishReason.STOP, Usage(1, 2), Timings(0.0, 0.1, 0.2, 0.3), "")
        )
        assert isinstance(finish, Finish)
        assert finish.timings.routing == (
            Decision(
                "broker", "shortest-queue", "fast", 2,
                (Considered("fast", 1, 2, 3.0, 2 / 3), Considered("slow", 0, 4, 1.0, 1.0)),
            ),
        )  # fmt: skip
        [line] = stage.logged("request_routed")
        assert (line["worker"], line["policy"], line["candidates"]) == ("fast", "shortest-queue", 2)
        assert line["considered"] == "fast:1/2:0.6667,slow:0/4:1"

    def test_nobody_else_pays_for_it(self, stage: Stage) -> None:
        worker = stage.worker("w1")
        ask(stage.client(), 1)
        [(_, finish)] = worker.finishes(1)
        assert isinstance(finish, Finish)
        assert finish.timings.routing == ()
        assert stage.logged("request_routed") == []

    def test_the_best_sixteen_and_the_chosen_one_are_listed(self, stages: Any) -> None:
        stage = stages(policy="round-robin")
        for number in range(20):
            stage.worker(f"w{number:02}", speed=1.0 + number)
        chosen = []
        for number in range(20):
            client = stage.client(f"c{number}")
            ask(client, number, explain=True)
            record = next(iter(client.stage.core.clients[client.peer].requests.values()))
            decision = record.decision
            assert decision is not None
            assert decision.candidates == 20 - number
            assert len(decision.considered) == min(16, 20 - number)
            assert decision.worker in [each.worker for each in decision.considered]
            chosen.append(decision.worker)
        assert len(set(chosen)) == 20


class TestWaysBelow:
    def test_who_failed_behind_a_broker_is_tried_elsewhere_first(self, stage: Stage) -> None:
        stage.worker("site", slots=9, speed=9.0, brokers=("b",))
        stage.worker("near", speed=1.0)
        client = stage.client()
        assert requests(ask(client, 1, avoid=("site/gpu",))) == [("near", 1)]
        assert requests(ask(client, 2, avoid=("site/gpu",))) == [("site", 2)]  # nobody waits for `near`

    def test_a_slash_in_a_workers_name_makes_no_broker_of_another(self, stage: Stage) -> None:
        stage.worker("site", slots=9, speed=9.0)
        stage.worker("near", speed=1.0)
        assert requests(ask(stage.client(), 1, avoid=("site/gpu",))) == [("site", 1)]


class TestPolicies:
    def test_the_policy_can_be_changed_while_requests_run(self, stage: Stage) -> None:
        stage.worker("w1", slots=9, speed=9.0)
        stage.worker("w2", slots=9, speed=1.0)
        client = stage.client()
        assert requests(ask(client, 1) + ask(client, 2)) == [("w1", 1), ("w1", 2)]
        stage.core.exchange.chooser.set_policy("round-robin")
        assert requests(ask(client, 3) + ask(client, 4)) == [("w2", 3), ("w1", 4)]
        with pytest.raises(ValueError, match="unknown policy 'fifo'; known are"):
            stage.core.exchange.chooser.set_policy("fifo")
        assert stage.core.exchange.chooser.policy_name == "round-robin"

    @pytest.mark.parametrize("fault", ["raises", "none", "other"])
    def test_a_policy_that_is_wrong_costs_no_request(
        self, stages: Any, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        def choose(job: Any, workers: Any, random: Any) -> Any:
            if fault == "raises":
                raise KeyError("tier")
            return None if fault == "none" else other

        monkeypatch.setitem(dispatch.POLICIES, "wrong", Policy(choose))
        stage = stages(policy="wrong")
        stage.worker("w1", "m", slots=9)
        stage.worker("w2", "other", slots=9)
        other = worker_session(stage, "w2")
        assert requests(ask(stage.client(), 1)) == [("w1", 1)]
        [line] = stage.logged("policy_failed")
        assert line["why"] == ("KeyError: 'tier'" if fault == "raises" else "it chose none of the candidates")

    @pytest.mark.parametrize("fault", ["raises", "nan", "none"])
    @pytest.mark.parametrize("later", [False, True])
    def test_a_rank_that_is_wrong_stops_nobody(
        self, stages: Any, monkeypatch: pytest.MonkeyPatch, fault: str, later: bool
    ) -> None:
        def rank(worker: Any) -> Any:
            return {"raises": lambda: 1 / worker.load, "nan": lambda: math.nan, "none": lambda: None}[fault]()

        monkeypatch.setattr(chooser if later else core, "find_policy", lambda name: Policy(rank=rank))
        stage = stages()
        stage.worker("dear", slots=9, speed=1.0)
        stage.worker("cheap", slots=9, speed=9.0)
        if later:
            stage.core.exchange.chooser.set_policy("installed")
        assert requests(ask(stage.client(), 1)) == [("cheap", 1)]
        assert len(stage.logged("policy_failed")) == 1
        stage.core.validate()

    def test_whom_it_would_take(self, stage: Stage) -> None:
        assert stage.core.exchange.chooser.route("m", "") is None
        worker = stage.worker("w1")
        decision = stage.core.exchange.chooser.route("m", "")
        assert decision is not None
        assert (decision.worker, decision.candidates) == ("w1", 1)
        ask(stage.client(), 1)
        decision = stage.core.exchange.chooser.route("m", "")
        assert decision is not None
        assert (decision.worker, decision.candidates) == ("w1", 0)  # it is the first to be free again
        worker.beats(load=Load(), sent=None)
        stage.core.exchange.hold(worker_session(stage, "w1"), True, stage.now)
        assert stage.core.exchange.chooser.route("m", "") is None

    def test_of_workers_that_are_equal_and_were_never_used_the_first_is_taken_whoever_reports_last(
        self, stage: Stage
    ) -> None:
        first, second = stage.worker("w9"), stage.worker("w1", "m", "another")  # a group each, and one with company
        third = stage.worker("w5")
        client = stage.client()
        for worker in (second, first, third, first):
            worker.beats(load=Load())
            assert client.queries("route", model="m")["worker"] == "w9"
        first.changes(models=("m", "another"))  # into the other group, after that one's
        assert client.queries("route", model="m")["worker"] == "w9"
        for worker in (first, second, third):
            worker.beats(load=Load(running=1))
        decision = client.queries("route", model="m")
        assert (decision["worker"], decision["candidates"]) == ("w9", 0)

    def test_a_cache_that_is_full_and_a_step_that_hangs_make_a_worker_dear(self, stage: Stage) -> None:
        crowded, hung, idle = (stage.worker(name, slots=9) for name in ("crowded", "hung", "idle"))
        client = stage.client("bob")
        for number in range(3):
            ask(client, number)
        crowded.beats(load=Load(running=1, waiting=3, held=4, kv_use=1.0))
        hung.beats(load=Load(running=1, held=1, step_age_s=5.0))
        idle.beats(load=Load(running=1, held=1))
        assert [requests(ask(client, number))[0][0] for number in range(3, 7)] == ["idle"] * 4

    def test_affinity_reaches_the_policy(self, stages: Any) -> None:
        stage = stages(policy="prefix-affinity")
        for number in range(8):
            stage.worker(f"w{number}", slots=9)
        client = stage.client()
        taken = {requests(ask(client, number, affinity="abc"))[0][0] for number in range(2)}
        assert len(taken) == 1


class TestHolds:
    def test_a_held_worker_finishes_and_gets_nothing_new(self, stage: Stage) -> None:
        worker = stage.worker("w1", slots=2)
        client = stage.client()
        ask(client, 1)
        session = worker_session(stage, "w1")
        stage.tell(stage.core.handle(_nothing(client), stage.now))
        stage.core.exchange.hold(session, True, stage.now)
        assert ask(client, 2) == []
        assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]
        stage.core.exchange.hold(session, False, stage.now)
        assert requests(stage.tell(stage.core.tick(stage.now))) == [("w1", 2)]


def _nothing(client: ClientPeer) -> Any:
    from tokenmq.broker.events import FromClient
    from tokenmq.protocol.messages import Heartbeat

    client.said += 1
    return FromClient(client.peer, Heartbeat(client.said - 1))


class TestShares:
    def test_a_flood_delays_another_client_by_one_request_at_most(self, stage: Stage) -> None:
        worker = stage.worker("w1")
        flooder, other = stage.client("flooder"), stage.client("other")
        for number in range(500):
            ask(flooder, number, expected_tokens=100)
        ask(other, 1000, expected_tokens=100)
        assert requests(worker.finishes(0)) == [("w1", 1000)]

    def test_in_a_full_room_a_flooder_makes_place_for_others(self, stages: Any) -> None:
        stage = stages(max_waiting=10)
        worker = stage.worker("w1")
        flooder, other = stage.client("flooder"), stage.client("other")
        for number in range(11):
            ask(flooder, number)
        assert kinds(ask(flooder, 11)) == [("flooder", "ERROR busy")]
        [(to, busy)] = ask(other, 1000)
        assert (to, isinstance(busy, Error) and (busy.code, busy.retryable)) == ("flooder", ("busy", True))
        assert isinstance(busy, Error)
        assert busy.id == request_id(10)  # the latest of the flooder's
        assert busy.retry_after_s is not None
        assert requests(worker.finishes(0)) == [("w1", 1000)]

    def test_weights_come_from_the_settings(self, stages: Any) -> None:
        stage = stages(client_weights={"gold": 3.0})
        worker = stage.worker("w1")
        gold, plain = stage.client("gold"), stage.client("plain")
        ask(plain, 999)
        for number in range(100):
            ask(gold, number, expected_tokens=50)
            ask(plain, 100 + number, expected_tokens=50)
        served, running = [], 999
        for _ in range(80):
            [(_, running)] = requests(worker.finishes(running))
            served.append(running)
        assert sum(number < 100 for number in served) == pytest.approx(60, abs=2)

    def test_priorities_come_first(self, stage: Stage) -> None:
        worker = stage.worker("w1")
        client = stage.client()
        for number, priority in enumerate([5, 1, 9, 5, 0]):
            ask(client, number, priority=priority)
        order, running = [], 0
        for _ in range(4):
            [(_, running)] = requests(worker.finishes(running))
            order.append(running)
        assert order == [2, 3, 1, 4]

    def test_several_connections_of_one_name_have_one_share(self, stage: Stage) -> None:
        worker = stage.worker("w1")
        first, second, other = stage.client("team"), stage.client("team"), stage.client("other")
        ask(other, 99)
        for number in range(10):
            ask(first, number)
            ask(second, 10 + number)
            ask(other, 100 + number)
        served, running = [], 99
        for _ in range(18):
            [(_, running)] = requests(worker.finishes(running))
            served.append(running)
        assert sum(number >= 100 for number in served) == pytest.approx(9, abs=1)


def test_outstanding_tokens_follow_what_is_in_flight(stage: Stage) -> None:
    worker = stage.worker("w1", slots=9)
    client = stage.client()
    ask(client, 1, expected_tokens=100)
    ask(client, 2, expected_tokens=50)
    session = worker_session(stage, "w1")
    assert session.outstanding_tokens == 150
    worker.finishes(1)
    assert session.outstanding_tokens == 50
    worker.ready = replace(worker.ready, slots=3)
    worker.says(worker.ready)
    assert session.outstanding_tokens == 50
