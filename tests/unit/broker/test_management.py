"""The answers to queries: their keys are what programs rely on."""

from __future__ import annotations

import pytest

from tokenmq.broker import core as core_module
from tokenmq.protocol.messages import Drain, Error, Load, ModelInfo, Query, Reply, WorkerState

from .stage import Stage, request_id


def test_models(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1", infos=(ModelInfo("b", 2048, True), ModelInfo("a", 0, True)), slots=1)
    stage.worker("w2", infos=(ModelInfo("b", 0, False),), slots=3, load=Load(WorkerState.STALLED))
    client.asks(1, "b")
    client.asks(2, "b")
    assert client.queries("models") == [
        {
            "name": "a", "workers": 1, "ready": 1, "slots": 1, "running": 0, "waiting": 0, "context_tokens": 0,
            "chat": True,
        },
        {
            "name": "b", "workers": 2, "ready": 1, "slots": 4, "running": 1, "waiting": 1, "context_tokens": 2048,
            "chat": False,
        },
    ]  # fmt: skip


def test_workers(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w2")
    worker = stage.worker("w1", "a", "b", slots=2, speed=1.5, incarnation=7)
    worker.beats(load=Load(WorkerState.READY, 3, 1, 0, 500, 0.25, 80.0, 0.5))
    client.asks(1, "m")
    stage.now += 0.5
    first, second = client.queries("workers")
    assert first == {
        "name": "w1", "state": "ready", "engine": "synthetic", "models": ["a", "b"], "slots": 2, "in_flight": 0,
        "parked": 0, "running": 3, "waiting": 1, "speed": 1.5, "tokens_per_s": 80.0, "kv_use": 0.5, "steps": 500,
        "step_age_s": 0.25, "heard_s": 0.5, "incarnation": 7, "software": "test/1",
    }  # fmt: skip
    assert (second["name"], second["in_flight"]) == ("w2", 1)


def test_status(stage: Stage) -> None:
    client = stage.client()
    stage.worker("w1", "a", slots=2)
    client.asks(1, "a")
    client.asks(2, "nope")
    stage.now += 2.0
    assert client.queries("status") == {
        "broker": "broker", "software": "test/1", "uptime_s": 2.0, "draining": False, "policy": "shortest-queue",
        "clients": 1, "workers": 1, "models": ["a"], "slots": 2, "pending": {"peers": 0, "bytes": 0},
        "requests": {"waiting": 0, "running": 1, "orphaned": 0},
        "counters": {
            "requests": 1, "finished": 0, "failed": 0, "refused": 1, "cancelled": 0, "superseded": 0,
            "chunk_messages": 0, "chunk_messages_dropped": 0, "late_answers": 0, "malformed": 0, "disconnected": 0,
            "workers_lost": 0, "clients_lost": 0, "peers_stalled": 0,
        },
    }  # fmt: skip


def test_an_empty_broker_answers_too(stage: Stage) -> None:
    client = stage.client()
    assert client.queries("models") == client.queries("workers") == []
    assert client.queries("status")["requests"] == {"waiting": 0, "running": 0, "orphaned": 0}


def test_an_unknown_query_is_refused_with_those_that_are_known(stage: Stage) -> None:
    message = "unknown query 'shutdown'; known are drain, models, status, workers"
    assert stage.client().queries("shutdown") == Error(request_id(99), 0, "bad_request", message)


def test_arguments_that_a_query_does_not_take_are_refused(stage: Stage) -> None:
    error = stage.client().queries("models", order=1, by="name")
    assert error.message == "query 'models' takes no arguments, got by, order"


def test_what_peers_have_not_taken_is_shown(stage: Stage) -> None:
    stage.core.pending.peers, stage.core.pending.bytes = 2, 4096
    assert stage.client().queries("status")["pending"] == {"peers": 2, "bytes": 4096}


def drain_query(**arguments: object) -> Query:
    return Query(request_id(99), "drain", arguments)


@pytest.mark.parametrize("grace_s", [None, 0, 2.5])
def test_drain_asks_the_worker_to_leave(stage: Stage, grace_s: float | None) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    stage.worker("w2")
    reply = Reply(request_id(99), {"worker": "w1", "in_flight": 1})
    assert client.says(drain_query(worker="w1", grace_s=grace_s)) == [("w1", Drain(grace_s)), ("ann", reply)]
    assert client.says(drain_query(worker="w2")) == [
        ("w2", Drain()),
        ("ann", Reply(request_id(99), {"worker": "w2", "in_flight": 0})),
    ]
    assert worker.beats() == []  # it is for the worker to say DRAINING
    assert stage.logged("worker_told_to_drain")[0] == {"worker": "w1", "in_flight": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"worker": "w9"}, "no worker 'w9' here; workers: w1, w2"),
        ({}, "query 'drain' needs worker"),
        ({"worker": None}, "query 'drain' needs worker"),
        ({"worker": 7}, "query 'drain': worker: expected a string of 1 to 256 characters, got 7"),
        ({"worker": ""}, "query 'drain': worker: expected a string of 1 to 256 characters, got ''"),
        ({"worker": "w1", "grace_s": "2"}, "query 'drain': grace_s: expected a number from 0 to 1e+09, got '2'"),
        ({"worker": "w1", "grace_s": True}, "query 'drain': grace_s: expected a number from 0 to 1e+09, got True"),
        ({"worker": "w1", "grace_s": -1.0}, "query 'drain': grace_s: expected a number from 0 to 1e+09, got -1.0"),
        ({"worker": "w1", "now": 1, "grace": 2}, "query 'drain' takes only worker, grace_s, got grace, now"),
    ],
)
def test_a_drain_that_makes_no_sense_is_refused_and_asks_nobody(
    stage: Stage, arguments: dict[str, object], message: str
) -> None:
    stage.worker("w2")
    stage.worker("w1")
    client = stage.client()
    assert client.says(drain_query(**arguments)) == [("ann", Error(request_id(99), 0, "bad_request", message))]


def test_an_answer_that_no_message_can_hold_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "MAX_BODY_BYTES", 3000)
    client = stage.client()
    for number in range(20):
        stage.worker(f"w{number}")
    error = client.queries("workers")
    assert error.code == "bad_request"
    assert error.message.startswith("the answer is too large for one message: ")
    assert client.queries("status")["workers"] == 20
