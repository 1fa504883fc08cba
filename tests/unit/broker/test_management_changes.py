"""The queries that change something: what is done, what outlives a worker's session, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenmq.broker.changes import REFRESH_S
from tokenmq.broker.errands import MAX_OF_CLIENT
from tokenmq.broker.events import WorkerGone
from tokenmq.broker.views import MAX_REMEMBERED
from tokenmq.protocol.messages import (
    Disconnect,
    DisconnectCode,
    Drain,
    Draining,
    Error,
    Heartbeat,
    Load,
    Query,
    Reply,
    WorkerState,
)

from .stage import ClientPeer, Said, Stage, kinds, request_id, worker_session


def orders(client: ClientPeer, method: str, **arguments: object) -> list[Said]:
    """Ask; return all that is said because of it, the answer among it."""
    return client.says(Query(request_id(99), method, arguments))


def result(said: list[Said]) -> dict[str, object]:
    [reply] = [message for _, message in said if isinstance(message, Reply)]
    assert reply.id == request_id(99)
    return dict(reply.result)


# drain and undrain


@pytest.mark.parametrize("grace_s", [None, 0, 2.5])
def test_drain_asks_the_worker_to_leave(stage: Stage, grace_s: float | None) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    stage.worker("w2")
    reply = Reply(request_id(99), {"worker": "w1", "in_flight": 1})
    assert orders(client, "drain", worker="w1", grace_s=grace_s) == [("w1", Drain(grace_s)), ("ann", reply)]
    assert orders(client, "drain", worker="w2") == [
        ("w2", Drain()),
        ("ann", Reply(request_id(99), {"worker": "w2", "in_flight": 0})),
    ]
    assert worker.beats() == []  # it is for the worker to say DRAINING
    assert stage.logged("worker_told_to_drain")[0] == {"worker": "w1", "in_flight": 1}
    assert stage.logged("ordered")[1] == {"what": "drain", "by": "ann", "worker": "w2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"worker": "w9"}, "no worker 'w9' here; workers: w1, w2"),
        ({"worker": "w1/x"}, "no worker 'w1/x' here; workers: w1, w2"),
        ({}, "query 'drain' needs worker"),
        ({"worker": None}, "query 'drain' needs worker"),
        ({"worker": 7}, "query 'drain': worker: expected a string of 1 to 256 characters, got 7"),
        ({"worker": ""}, "query 'drain': worker: expected a string of 1 to 256 characters, got ''"),
        ({"worker": "w1", "grace_s": "2"}, "query 'drain': grace_s: expected a number from 0 to 1e+09, got '2'"),
        ({"worker": "w1", "grace_s": True}, "query 'drain': grace_s: expected a number from 0 to 1e+09, got True"),
        ({"worker": "w1", "grace_s": -1.0}, "query 'drain': grace_s: expected a number from 0 to 1e+09, got -1.0"),
        ({"worker": "w1", "stay": 1}, "query 'drain': stay: expected true or false, got 1"),
        (
            {"worker": "w1", "stay": True, "grace_s": 2},
            "a worker that is to stay takes no grace_s: what it holds is finished in any case",
        ),
        (
            {"worker": "w1", "now": 1, "grace": 2},
            "query 'drain' takes only worker, grace_s, stay, within_s, got grace, now",
        ),
    ],
)
def test_a_drain_that_makes_no_sense_is_refused_and_asks_nobody(
    stage: Stage, arguments: dict[str, object], message: str
) -> None:
    stage.worker("w2")
    stage.worker("w1")
    client = stage.client()
    assert orders(client, "drain", **arguments) == [("ann", Error(request_id(99), 0, "bad_request", message))]


def test_a_worker_that_is_held_gets_nothing_new_and_finishes_what_it_has(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    assert result(orders(client, "drain", worker="w1", stay=True)) == {"worker": "w1", "in_flight": 1}
    assert kinds(client.asks(2)) == []  # it waits
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]
    [row] = client.queries("workers")
    assert (row["held"], row["state"], row["in_flight"]) == (True, "ready", 0)
    said = orders(client, "undrain", worker="w1")
    assert result(said) == {"worker": "w1", "held": True, "told": False}
    assert ("w1", "REQUEST") in kinds(said)  # what has waited
    assert client.queries("workers")[0]["held"] is False


def test_a_hold_is_for_the_name_and_outlives_the_session(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1").vanishes()
    stage.worker("w1", incarnation=2)
    orders(client, "drain", worker="w1", stay=True)
    stage.registers(stage.stranger_worker("w1"), incarnation=3)
    assert client.queries("workers")[0]["held"] is True
    assert kinds(client.asks(1)) == []
    assert ("w1", "REQUEST") in kinds(orders(client, "undrain", worker="w1"))


def test_the_hold_of_a_worker_that_is_gone_can_be_lifted(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    orders(client, "drain", worker="w1", stay=True)
    worker.vanishes()
    assert client.queries("undrain", worker="w1") == {"worker": "w1", "held": True, "told": False}
    assert client.queries("undrain", worker="w1").message == "no worker 'w1' here; workers: none"
    stage.worker("w1")
    assert client.queries("workers")[0]["held"] is False


def test_undrain_asks_a_worker_that_leaves_to_stay(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    orders(client, "drain", worker="w1")
    worker.says(Draining())
    assert kinds(client.asks(1)) == []
    reply = Reply(request_id(99), {"worker": "w1", "held": False, "told": True})
    assert orders(client, "undrain", worker="w1") == [("w1", Drain(undo=True)), ("ann", reply)]
    assert kinds(worker.says(worker.ready)) == [("w1", "REQUEST")]  # READY again: it stays


def test_undrain_reaches_a_worker_whose_draining_is_still_on_its_way(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1")
    orders(client, "drain", worker="w1")
    assert ("w1", Drain(undo=True)) in orders(client, "undrain", worker="w1")


def test_undrain_of_a_worker_that_is_held_and_drains_takes_both_back(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    orders(client, "drain", worker="w1", stay=True)
    worker.beats(load=Load(WorkerState.DRAINING))
    assert result(orders(client, "undrain", worker="w1")) == {"worker": "w1", "held": True, "told": True}


# remove and refresh


def test_a_worker_that_is_removed_is_sent_away_and_its_requests_fail(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    said = orders(client, "remove", worker="w1")
    assert kinds(said)[:2] == [("w1", "DISCONNECT removed"), ("ann", "ERROR worker_lost")]
    assert result(said) == {"worker": "w1", "in_flight": 1}
    [error] = [message for _, message in said if isinstance(message, Error)]
    assert error.retryable
    assert "an operator has removed it" in error.message
    assert client.queries("workers") == []


def test_what_waits_goes_on_at_another_when_a_worker_is_removed(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    stage.worker("w2")
    assert kinds(client.asks(2, avoid=("w2",))) == []  # it waits for the slot of the other one
    assert ("w2", "REQUEST") in kinds(orders(client, "remove", worker="w1"))


def test_nothing_is_remembered_of_a_worker_that_was_removed(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1")
    orders(client, "drain", worker="w1", stay=True)
    orders(client, "set_speed", worker="w1", speed=5.0)
    orders(client, "remove", worker="w1")
    stage.worker("w1")
    [row] = client.queries("workers")
    assert (row["held"], row["speed_set"]) == (False, None)


def test_refresh_looks_for_every_worker_and_tells_who_is_gone(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    stage.worker("w2")
    said = orders(client, "refresh")
    assert [(to, type(message)) for to, message in said] == [("w1", Heartbeat), ("w2", Heartbeat)]
    stage.happens(WorkerGone(worker.peer, "its connection is gone"))  # as the server finds out by sending
    assert stage.core.next_deadline() <= stage.now + REFRESH_S
    assert stage.passes(REFRESH_S) == [("ann", Reply(request_id(99), {"workers": 1, "dropped": ["w1"]}))]


def test_a_worker_that_comes_back_during_a_refresh_was_gone(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    orders(client, "refresh")
    worker.vanishes()
    stage.worker("w1", incarnation=2)
    assert result(stage.passes(REFRESH_S)) == {"workers": 1, "dropped": ["w1"]}


def test_a_client_that_leaves_is_not_answered(stage: Stage) -> None:
    client = stage.client()
    orders(client, "refresh")
    client.vanishes()
    assert stage.passes(REFRESH_S) == []


def test_a_client_has_a_bounded_number_of_queries_that_take_time(stage: Stage) -> None:
    client, other = stage.client("ann"), stage.client("bob")
    for number in range(MAX_OF_CLIENT):
        assert client.says(Query(request_id(number), "refresh")) == []
    [(_, error)] = client.says(Query(request_id(99), "refresh"))
    assert isinstance(error, Error)
    assert (error.code, error.retryable) == ("busy", True)
    assert other.says(Query(request_id(1), "refresh")) == []
    assert client.queries("status")["clients"] == 2  # what is answered at once goes on
    assert len(stage.passes(REFRESH_S)) == MAX_OF_CLIENT + 1
    assert client.says(Query(request_id(99), "refresh")) == []


# policy and speed


def test_set_policy_holds_from_the_next_request_on(stages: Callable[..., Stage]) -> None:
    stage = stages(policy="round-robin")
    client = stage.client()
    stage.worker("slow", slots=8, speed=1.0)
    stage.worker("fast", slots=8, speed=100.0)
    went = [to for number in (1, 2) for to, kind in kinds(client.asks(number)) if kind == "REQUEST"]
    assert sorted(went) == ["fast", "slow"]
    assert client.queries("set_policy", policy="shortest-queue") == {
        "policy": "shortest-queue", "before": "round-robin",
    }  # fmt: skip
    went = [to for number in (3, 4, 5) for to, kind in kinds(client.asks(number)) if kind == "REQUEST"]
    assert went == ["fast"] * 3
    assert client.queries("status")["policy"] == "shortest-queue"


def test_an_unknown_policy_is_refused_with_those_that_are_known(stage: Stage) -> None:
    error = stage.client().queries("set_policy", policy="best")
    assert error.code == "bad_request"
    assert error.message.startswith("unknown policy 'best'; known are least-tokens, lottery, power-of-two, ")
    assert stage.client().queries("status")["policy"] == "shortest-queue"


def test_a_speed_that_was_set_overrides_the_workers_own_until_it_is_unset(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1", speed=1.0)
    stage.worker("w2", speed=2.0)
    assert client.queries("route", model="m")["worker"] == "w2"
    assert client.queries("set_speed", worker="w1", speed=4) == {"worker": "w1", "speed": 4.0, "speed_set": 4.0}
    assert client.queries("route", model="m")["worker"] == "w1"
    stage.registers(stage.stranger_worker("w1"), speed=1.0, incarnation=2)
    assert worker_session(stage, "w1").speed == 4.0  # also when it comes back
    assert client.queries("set_speed", worker="w1", speed=None) == {"worker": "w1", "speed": 1.0, "speed_set": None}
    assert client.queries("route", model="m")["worker"] == "w2"


def test_the_speed_of_a_worker_that_is_gone_can_be_taken_back(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", speed=1.0)
    client.queries("set_speed", worker="w1", speed=4.0)
    worker.vanishes()
    assert client.queries("set_speed", worker="w1", speed=5.0).message == "no worker 'w1' here; workers: none"
    assert client.queries("set_speed", worker="w1") == {"worker": "w1", "speed": None, "speed_set": None}
    assert client.queries("set_speed", worker="w1").message == "no worker 'w1' here; workers: none"
    stage.worker("w1", speed=1.0)
    assert worker_session(stage, "w1").speed == 1.0


def test_status_tells_what_holds_for_workers_that_are_gone(stage: Stage) -> None:
    client = stage.client()
    workers = [stage.worker(f"w{number:03}") for number in range(MAX_REMEMBERED + 2)]
    for worker in workers:
        client.queries("set_speed", worker=worker.name, speed=4.0)
    client.queries("drain", worker="w001", stay=True)
    assert client.queries("status")["remembered"] == []  # `workers` has it
    for worker in workers[1:]:
        worker.vanishes()
    first, second, *others = client.queries("status")["remembered"]
    assert first == {"worker": "w001", "held": True, "speed_set": 4.0}
    assert second == {"worker": "w002", "held": False, "speed_set": 4.0}
    assert [each["worker"] for each in others] == [f"w{number:03}" for number in range(3, MAX_REMEMBERED + 1)]
    client.queries("set_speed", worker="w001")
    assert client.queries("status")["remembered"][0] == {"worker": "w001", "held": True, "speed_set": None}
    client.queries("undrain", worker="w001")
    assert client.queries("status")["remembered"][0]["worker"] == "w002"


@pytest.mark.parametrize("method", ["remove", "undrain", "set_speed"])
def test_a_change_of_an_unknown_worker_is_refused_with_those_that_are_here(stage: Stage, method: str) -> None:
    stage.worker("w1")
    error = stage.client().queries(method, worker="w9")
    assert (error.code, error.message) == ("bad_request", "no worker 'w9' here; workers: w1")


def test_disconnect_removed_tells_why(stage: Stage) -> None:
    stage.worker("w1")
    said = orders(stage.client(), "remove", worker="w1")
    assert ("w1", Disconnect(DisconnectCode.REMOVED, "an operator has removed it")) in said
