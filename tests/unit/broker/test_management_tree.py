"""Brokers below this one: whom it asks, what it makes of the answers, and what when there are none."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.broker.tree import LEAST_S, ORDER_S, TREE_S
from tokenmq.protocol.limits import MAX_COUNT, MAX_HOPS
from tokenmq.protocol.messages import Drain, Error, Heartbeat, Query, Reply

from .stage import ClientPeer, Said, Stage, WorkerPeer, kinds, request_id

LEAF = {"name": "gpu", "depth": 0, "state": "ready", "broker": False}


def child(stage: Stage, name: str = "west", **fields: Any) -> WorkerPeer:
    """Register a broker."""
    return stage.worker(name, **{"brokers": (f"id-of-{name}",), **fields})


def asks(client: ClientPeer, method: str, **arguments: object) -> list[Query]:
    """Ask; return the queries that go to brokers below, in order. Nobody has been answered."""
    queries = [message for to, message in client.says(Query(request_id(99), method, arguments)) if to != client.name]
    assert all(isinstance(message, Query) for message in queries)
    return queries  # type: ignore[return-value]


def answer(said: list[Said]) -> Any:
    """Return the one answer that the client has got: a result, or an ERROR."""
    [(_, message)] = said
    assert isinstance(message, (Reply, Error))
    assert message.id == request_id(99)
    return message.result if isinstance(message, Reply) else message


def answers(said: list[Said]) -> list[Said]:
    """Leave out the heartbeats."""
    return [(to, message) for to, message in said if not isinstance(message, Heartbeat)]


def branch(**fields: Any) -> dict[str, Any]:
    """Return what a broker says of itself in a tree."""
    values = {"path": "", "broker": "x", "id": "x", "answered": True, "clients": 0, "workers": 0, "slots": 0}
    return {**values, "waiting": 0, "running": 0, "orphaned": 0, **fields}


# workers --tree


def test_workers_of_brokers_follow_them_with_their_path(stage: Stage) -> None:
    west = child(stage)
    stage.worker("zed")
    client = stage.client()
    [query] = asks(client, "workers", tree=True)
    assert (query.method, query.arguments["tree"]) == ("workers", True)
    north = {"name": "north", "depth": 0, "broker": True, "answered": True}
    rows = answer(west.says(Reply(query.id, [north, {**LEAF, "name": "north/gpu", "depth": 1}, LEAF])))
    assert [(row["name"], row["depth"]) for row in rows] == [
        ("west", 0), ("west/north", 1), ("west/north/gpu", 2), ("west/gpu", 1), ("zed", 0),
    ]  # fmt: skip
    assert (rows[0]["broker"], rows[0]["answered"]) == (True, True)
    assert "answered" not in rows[-1]


def test_without_tree_nobody_is_asked(stage: Stage) -> None:
    child(stage)
    client = stage.client()
    assert [row["name"] for row in client.queries("workers")] == ["west"]
    assert client.queries("status")["workers"] == 1


def test_without_brokers_a_tree_is_answered_at_once(stage: Stage) -> None:
    stage.worker("w1")
    [row] = stage.client().queries("workers", tree=True)
    assert (row["name"], row["depth"]) == ("w1", 0)


def test_brokers_are_asked_at_once_and_a_silent_one_is_waited_for_so_long(stage: Stage) -> None:
    west, east = child(stage, "west"), child(stage, "east")
    client = stage.client()
    to_east, to_west = asks(client, "workers", tree=True)
    assert to_east.id != to_west.id
    assert west.says(Reply(to_west.id, [LEAF])) == []
    assert answers(stage.passes(TREE_S - 0.1)) == []
    said = answers(stage.passes(0.1))
    rows = answer(said)
    assert [(row["name"], row.get("answered")) for row in rows] == [
        ("east", False), ("west", True), ("west/gpu", None),
    ]  # fmt: skip
    assert kinds(east.says(Reply(to_east.id, [LEAF]))) == []  # too late, and no offence


def test_a_broker_that_is_lost_is_waited_for_no_longer(stage: Stage) -> None:
    west = child(stage)
    client = stage.client()
    asks(client, "workers", tree=True)
    [row] = answer(west.vanishes())
    assert (row["name"], row["answered"]) == ("west", False)


@pytest.mark.parametrize(
    "nonsense",
    [
        None, 7, [7], [{"name": "x"}], [{"name": 1, "depth": 0}], [{"depth": 0}], [{"name": "x", "depth": True}],
        [{"name": "x", "depth": 2**64 - 1}],
    ],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_counts_for_none(stage: Stage, nonsense: Any) -> None:
    west = child(stage)
    [query] = asks(stage.client(), "workers", tree=True)
    [row] = answer(west.says(Reply(query.id, nonsense)))
    assert row["answered"] is False


def test_each_hop_passes_on_less_time_and_in_the_end_nobody_is_asked(stage: Stage) -> None:
    west = child(stage)
    client = stage.client()
    within_s, hops = TREE_S, 0
    while queries := asks(client, "workers", tree=True, within_s=within_s):
        [query] = queries
        assert LEAST_S <= query.arguments["within_s"] < within_s
        within_s = query.arguments["within_s"]
        hops += 1
        answer(west.says(Reply(query.id, [])))
    assert hops == MAX_HOPS
    [row] = client.queries("workers", tree=True, within_s=within_s)
    assert row["answered"] is False


# status --tree


def test_sums_count_workers_and_requests_where_they_are(stage: Stage) -> None:
    west = child(stage, slots=2)
    stage.worker("w1", slots=4)
    client = stage.client()
    client.asks(1)
    client.asks(2)
    client.asks(3)  # one of them to west: it waits or runs there, and counts there
    held = {row["name"]: row["in_flight"] for row in client.queries("workers")}
    [query] = asks(client, "status", tree=True)
    there = [
        branch(broker="west", id="id-of-west", clients=1, workers=1, slots=2, waiting=5, running=held["west"]),
        branch(path="north", broker="north", id="n", workers=2, slots=8, running=3, orphaned=1),
    ]
    status = answer(west.says(Reply(query.id, {"tree": {"brokers": there}})))
    assert status["slots"] == 6  # as registered here
    tree = status["tree"]
    assert (tree["clients"], tree["workers"], tree["slots"]) == (2, 4, 14)
    assert tree["requests"] == {"waiting": 5, "running": held["w1"] + held["west"] + 3, "orphaned": 1}
    assert [(row["path"], row["answered"]) for row in tree["brokers"]] == [
        ("", True), ("west", True), ("west/north", True),
    ]  # fmt: skip


def test_sums_that_no_message_can_hold_are_cut(stage: Stage) -> None:
    west = child(stage)
    [query] = asks(stage.client(), "status", tree=True)
    there = [branch(id=name, slots=MAX_COUNT) for name in "ab"]
    assert answer(west.says(Reply(query.id, {"tree": {"brokers": there}})))["tree"]["slots"] == MAX_COUNT


def test_a_broker_that_two_ways_lead_to_counts_once(stage: Stage) -> None:
    west, east = child(stage, "west"), child(stage, "east")
    client = stage.client()
    to_east, to_west = asks(client, "status", tree=True)
    shared = branch(path="leaf", broker="leaf", id="leaf", workers=1, slots=10)
    west.says(Reply(to_west.id, {"tree": {"brokers": [branch(id="id-of-west"), shared]}}))
    unheard = {**shared, "answered": False, "workers": 0, "slots": 0}
    said = east.says(Reply(to_east.id, {"tree": {"brokers": [branch(id="id-of-east"), unheard]}}))
    tree = answer(said)["tree"]
    assert tree["slots"] == 10
    assert {(row["path"], row["answered"]) for row in tree["brokers"]} == {
        ("", True), ("west", True), ("east", True), ("west/leaf", True),
    }  # fmt: skip


@pytest.mark.parametrize(
    "nonsense", [None, [], {"tree": 1}, {"tree": {"brokers": []}}, {"tree": {"brokers": [{}]}}, {}]
)
def test_a_status_that_makes_no_sense_counts_for_none(stage: Stage, nonsense: Any) -> None:
    west = child(stage)
    [query] = asks(stage.client(), "status", tree=True)
    tree = answer(west.says(Reply(query.id, nonsense)))["tree"]
    assert [(row["path"], row["answered"]) for row in tree["brokers"]] == [("", True), ("west", False)]


# Orders


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("remove", {}),
        ("drain", {"grace_s": 2.0}),
        ("drain", {"stay": True}),
        ("undrain", {}),
        ("set_speed", {"speed": 2.0}),
        ("set_speed", {}),
    ],
)
def test_an_order_for_a_worker_behind_a_broker_goes_there(
    stage: Stage, method: str, arguments: dict[str, object]
) -> None:
    west = child(stage)
    client = stage.client()
    [query] = asks(client, method, worker="west/north/gpu", **arguments)
    passed_on = dict(query.arguments)
    assert 0 < passed_on.pop("within_s") < ORDER_S
    assert (query.method, passed_on) == (method, {**arguments, "worker": "north/gpu"})
    result = {"worker": "north/gpu", "in_flight": 3}
    assert answer(west.says(Reply(query.id, result))) == {"worker": "west/north/gpu", "in_flight": 3}


def test_an_error_of_the_broker_below_comes_back_with_its_name(stage: Stage) -> None:
    west = child(stage)
    [query] = asks(stage.client(), "drain", worker="west/gpu")
    error = answer(west.says(Error(query.id, 0, "bad_request", "no worker 'gpu' here; workers: none")))
    assert (error.code, error.message) == ("bad_request", "west: no worker 'gpu' here; workers: none")
    assert stage.core.counters.late_answers == 0


def test_an_order_without_an_answer_is_an_error_in_time(stage: Stage) -> None:
    child(stage)
    client = stage.client()
    asks(client, "drain", worker="west/gpu")
    error = answer(answers(stage.passes(ORDER_S)))
    assert (error.code, error.retryable) == ("worker_lost", True)
    assert error.message == "broker west did not answer within 2 s; it may do what it was told yet"


def test_an_order_for_a_broker_that_is_lost_fails_at_once(stage: Stage) -> None:
    west = child(stage)
    asks(stage.client(), "drain", worker="west/gpu")
    error = answer(west.vanishes())
    assert error.code == "worker_lost"
    assert error.message == "west: west was lost before it answered: its connection is gone"


def test_an_order_for_the_broker_itself_is_for_it_as_a_worker(stage: Stage) -> None:
    child(stage)
    said = stage.client().says(Query(request_id(99), "drain", {"worker": "west"}))
    assert said[0] == ("west", Drain())


def test_names_with_slashes_of_their_own_are_found(stage: Stage) -> None:
    child(stage, "west")
    child(stage, "west/1")
    stage.worker("west/plain")
    client = stage.client()
    said = client.says(Query(request_id(99), "drain", {"worker": "west/plain"}))
    assert said[0] == ("west/plain", Drain())
    [(to, query)] = client.says(Query(request_id(98), "drain", {"worker": "west/1/gpu"}))
    assert isinstance(query, Query)
    assert (to, query.arguments["worker"]) == ("west/1", "gpu")
    [(_, error)] = client.says(Query(request_id(97), "drain", {"worker": "west/"}))
    assert isinstance(error, Error)
    assert error.code == "bad_request"


def test_a_route_leads_to_the_worker_behind_the_broker(stage: Stage) -> None:
    west = child(stage)
    client = stage.client()
    [query] = asks(client, "route", model="m", affinity="a1")
    assert (query.arguments["model"], query.arguments["affinity"]) == ("m", "a1")
    route = answer(west.says(Reply(query.id, {"worker": "gpu"})))
    assert (route["worker"], route["candidates"]) == ("west/gpu", 1)


@pytest.mark.parametrize("reply", [{"worker": None}, {"worker": 7}, 7, {}])
def test_a_route_ends_at_the_broker_where_that_knows_no_further(stage: Stage, reply: Any) -> None:
    west = child(stage)
    [query] = asks(stage.client(), "route", model="m")
    assert answer(west.says(Reply(query.id, reply)))["worker"] == "west"


# Who may answer


def test_an_answer_of_another_broker_is_none(stage: Stage) -> None:
    west, east = child(stage, "west"), child(stage, "east")
    [query] = asks(stage.client(), "drain", worker="west/gpu")
    assert east.says(Reply(query.id, {"worker": "gpu"})) == []
    assert answer(west.says(Reply(query.id, {"worker": "gpu"}))) == {"worker": "west/gpu"}


def test_a_worker_that_is_no_broker_answers_no_queries(stage: Stage) -> None:
    worker = stage.worker("w1")
    assert kinds(worker.says(Reply(request_id(5), {}))) == [("w1", "DISCONNECT protocol")]


def test_a_client_that_leaves_takes_its_questions_along(stage: Stage) -> None:
    west = child(stage)
    client = stage.client()
    [query] = asks(client, "workers", tree=True)
    client.vanishes()
    assert west.says(Reply(query.id, [LEAF])) == []
