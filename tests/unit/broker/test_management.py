"""The answers to queries: their keys are what programs rely on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenmq.broker import management as management_module
from tokenmq.broker.management import clients_may_change
from tokenmq.broker.ordering import MODEL_ORDERS
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.messages import Error, Load, ModelInfo, WorkerState

from .stage import Stage, request_id

OPEN = {"frontend": ("tcp://127.0.0.1:5555", "tcp://0.0.0.0:5557"), "insecure": True}


def test_models(stage: Stage) -> None:
    client = stage.client()
    can_all = {"chat": True, "images": True, "embeds": True}
    stage.worker("w1", infos=(ModelInfo("b", 2048, **can_all), ModelInfo("a", 0, **can_all)), slots=1)
    stage.worker("w2", infos=(ModelInfo("b", generates=False),), slots=3, load=Load(WorkerState.STALLED))
    client.asks(1, "b")
    client.asks(2, "b")
    assert client.queries("models") == [
        {
            "name": "a", "workers": 1, "ready": 1, "slots": 1, "running": 0, "waiting": 0, "context_tokens": 0,
            "chat": True, "images": True, "generates": True, "embeds": True,
        },
        {
            "name": "b", "workers": 2, "ready": 1, "slots": 4, "running": 1, "waiting": 1, "context_tokens": 2048,
            "chat": False, "images": False, "generates": False, "embeds": False,
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (
            "name",
            ["InternVL2-2B", "InternVL2-76B-AWQ", "InternVL2-8B", "InternVL2-Pro", "Mini-InternVL", "a", "xPro"],
        ),
        (
            "internvl",
            ["InternVL2-Pro", "xPro", "InternVL2-76B-AWQ", "InternVL2-8B", "InternVL2-2B", "Mini-InternVL", "a"],
        ),
    ],
)
def test_models_come_in_the_order_that_is_asked_for(
    stages: Callable[..., Stage], order: str, names: list[str]
) -> None:
    asked, set_before = stages(), stages(model_order=order)
    for stage in (asked, set_before):
        stage.worker("w1", *reversed(names))
    assert [row["name"] for row in asked.client().queries("models", order=order)] == names
    assert [row["name"] for row in set_before.client().queries("models")] == names


def test_names_that_internvls_rule_does_not_tell_apart_go_by_name() -> None:
    names = ["InternVL2-8B-b", "b", "InternVL2-8B-a", "Pro-b", "a", "Pro-a"]
    assert sorted(names, key=MODEL_ORDERS["internvl"]) == [
        "Pro-a", "Pro-b", "InternVL2-8B-a", "InternVL2-8B-b", "a", "b",
    ]  # fmt: skip


def test_an_unknown_order_is_refused_with_those_that_are_known(stage: Stage) -> None:
    error = stage.client().queries("models", order="size")
    assert (error.code, error.message) == (
        "bad_request", "query 'models': order: expected one of name, internvl, got 'size'",
    )  # fmt: skip
    with pytest.raises(ValueError, match="unknown model order 'size'; known are internvl, name"):
        BrokerSettings(model_order="size")


def test_workers(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w2")
    worker = stage.worker("w1", "a", "b", slots=2, speed=1.5, incarnation=7)
    worker.beats(load=Load(WorkerState.READY, 3, 1, 0, 500, 0.25, 80.0, 0.5, 40.0, 0.1, 0.8, 0.3, 5_000, 9_000))
    client.asks(1, "m")
    stage.now += 0.5
    first, second = client.queries("workers")
    assert first == {
        "name": "w1", "state": "ready", "held": False, "breaker": "closed", "broker": False, "engine": "synthetic",
        "models": ["a", "b"], "slots": 2, "in_flight": 0, "parked": 0, "outstanding_tokens": 0, "running": 3,
        "waiting": 1, "speed": 1.5, "speed_set": None, "tokens_per_s": 80.0, "kv_use": 0.5, "steps": 500,
        "steps_per_s": 40.0, "step_age_s": 0.25, "prefill_use": 0.1, "decode_use": 0.8, "prefix_hits": 0.3,
        "memory_used_bytes": 5_000, "memory_bytes": 9_000, "heard_s": 0.5, "incarnation": 7, "software": "test/1",
    }  # fmt: skip
    assert (second["name"], second["in_flight"]) == ("w2", 1)
    assert second["outstanding_tokens"] > 0


def test_status(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1", "a", slots=2)
    client.asks(1, "a")
    client.asks(2, "nope")
    stage.now += 2.0
    status = client.queries("status")
    counters = status.pop("counters")
    assert status == {
        "broker": "broker", "software": "test/1", "uptime_s": 2.0, "draining": False, "policy": "shortest-queue",
        "clients": 1, "workers": 1, "models": ["a"], "slots": 2, "waiting": [], "pending": {"peers": 0, "bytes": 0},
        "connections": {},
        "requests": {"waiting": 0, "running": 1, "orphaned": 0}, "remembered": [],
    }  # fmt: skip
    assert (counters["requests"], counters["refused"]) == (1, 1)
    assert counters.keys() >= {
        "finished", "failed", "cancelled", "superseded", "chunk_messages", "chunk_messages_dropped", "late_answers",
        "malformed", "disconnected", "workers_lost", "clients_lost", "peers_stalled",
    }  # fmt: skip


def test_status_shows_what_waits_for_which_model(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    stage.busy_worker("w1", ann)
    ann.asks(2)
    stage.now += 1.5
    bob.asks(3)
    [room] = ann.queries("status")["waiting"]
    assert room["model"] == "m"
    assert (room["waiting"], room["clients"], room["oldest_s"]) == (2, 2, 1.5)
    assert {"rate_per_s", "bytes", "by_priority", "resumed"} <= room.keys()


def test_an_empty_broker_answers_too(stage: Stage) -> None:
    client = stage.client()
    assert client.queries("models") == client.queries("workers") == []
    assert client.queries("status")["requests"] == {"waiting": 0, "running": 0, "orphaned": 0}


def test_route_tells_whom_the_policy_would_take(stage: Stage) -> None:
    client = stage.client()
    stage.worker("slow", slots=2, speed=1.0)
    stage.worker("fast", slots=2, speed=3.0)
    route = client.queries("route", model="m")
    assert (route["model"], route["worker"], route["policy"]) == ("m", "fast", "shortest-queue")
    assert (route["candidates"], route["waiting"]) == (2, 0)
    assert [row["worker"] for row in route["considered"]] == ["fast", "slow"]
    assert route["considered"][0]["speed"] == 3.0
    # It is a question: nothing has been taken, and it is the same when it is asked again.
    assert client.queries("route", model="m") == route


def test_route_where_nobody_is_free_tells_who_is_likely_and_what_waits(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    client.asks(2)
    route = client.queries("route", model="m")
    assert (route["worker"], route["candidates"], route["waiting"]) == ("w1", 0, 1)


def test_route_without_a_worker_that_takes_requests(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1", load=Load(WorkerState.LOADING))
    assert client.queries("route", model="m")["worker"] is None
    message = "no worker serves 'llama3'; models here: m"
    assert client.queries("route", model="llama3") == Error(request_id(99), 0, "model_not_found", message)


def test_route_goes_by_the_affinity(stages: Callable[..., Stage]) -> None:
    stage = stages(policy="prefix-affinity")
    client = stage.client()
    for number in range(8):
        stage.worker(f"w{number}", slots=4)
    chosen = {key: client.queries("route", model="m", affinity=key)["worker"] for key in map(str, range(20))}
    assert len(set(chosen.values())) > 1
    assert all(client.queries("route", model="m", affinity=key)["worker"] == name for key, name in chosen.items())


def test_an_unknown_query_is_refused_with_those_that_are_known(stage: Stage) -> None:
    known = "drain, models, refresh, remove, route, set_policy, set_speed, status, undrain, workers"
    message = f"unknown query 'shutdown'; known are {known}"
    assert stage.client().queries("shutdown") == Error(request_id(99), 0, "bad_request", message)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("refresh", {"all": 1, "by": "name"}, "query 'refresh' takes no arguments, got all, by"),
        ("models", {"by": "name"}, "query 'models' takes only order, got by"),
        ("workers", {"tree": 1}, "query 'workers': tree: expected true or false, got 1"),
        ("status", {"within_s": 1e6}, "query 'status': within_s: expected a number from 0.05 to 10, got 1000000.0"),
        ("route", {}, "query 'route' needs model"),
        ("route", {"model": ""}, "query 'route': model: expected a string of 1 to 256 characters, got ''"),
        ("set_policy", {}, "query 'set_policy' needs policy"),
        (
            "set_speed", {"worker": "w1", "speed": 0},
            "query 'set_speed': speed: expected a number from 1e-06 to 1e+06, got 0",
        ),
    ],
)  # fmt: skip
def test_arguments_that_a_query_does_not_take_are_refused(
    stage: Stage, method: str, arguments: dict[str, object], message: str
) -> None:
    error = stage.client().queries(method, **arguments)
    assert (error.code, error.message) == ("bad_request", message)


def test_what_peers_have_not_taken_is_shown(stage: Stage) -> None:
    stage.core.pending.peers, stage.core.pending.bytes = 2, 4096
    assert stage.client().queries("status")["pending"] == {"peers": 2, "bytes": 4096}


def test_an_answer_that_no_message_can_hold_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management_module, "MAX_BODY_BYTES", 4000)
    client = stage.client()
    for number in range(20):
        stage.worker(f"w{number}")
    error = client.queries("workers")
    assert error.code == "bad_request"
    assert error.message.startswith("the answer is too large for one message: ")
    assert client.queries("status")["workers"] == 20


@pytest.mark.parametrize(
    ("settings", "may"),
    [
        ({}, True),
        ({"frontend": ("ipc:///tmp/x",)}, True),
        ({"insecure": True}, True),
        (OPEN, False),
        ({**OPEN, "insecure_admin": True}, True),
        ({"backend": ("tcp://0.0.0.0:5556",), "insecure": True}, True),
    ],
)
def test_who_reaches_a_socket_of_this_machine_alone_may_change_things(settings: dict[str, object], may: bool) -> None:
    assert clients_may_change(BrokerSettings(**settings)) is may  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("refresh", {}),
        ("remove", {"worker": "w1"}),
        ("drain", {"worker": "w1"}),
        ("undrain", {"worker": "w1"}),
        ("set_policy", {"policy": "lottery"}),
        ("set_speed", {"worker": "w1", "speed": 2.0}),
    ],
)
def test_changes_are_for_administrators(
    stages: Callable[..., Stage], method: str, arguments: dict[str, object]
) -> None:
    stage = stages(**OPEN)
    stage.worker("w1")
    before = stage.client("ann").queries("workers")
    error = stage.client("bob").queries(method, **arguments)
    assert error.code == "forbidden"
    assert "--insecure-admin" in error.message
    assert stage.client("eve").queries("workers") == before
    assert stage.logged("ordered") == []


def test_everybody_may_look(stages: Callable[..., Stage]) -> None:
    client = stages(**OPEN).client()
    assert client.queries("models") == client.queries("workers") == []
    assert client.queries("status", tree=True)["clients"] == 1
