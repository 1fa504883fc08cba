"""The answers to queries: their keys are what programs rely on."""

from __future__ import annotations

import pytest

from tokenmq.broker import core as core_module
from tokenmq.protocol.messages import Error, Load, ModelInfo, WorkerState

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
        "clients": 1, "workers": 1, "models": ["a"], "slots": 2,
        "requests": {"waiting": 0, "running": 1, "orphaned": 0},
        "counters": {
            "requests": 1, "finished": 0, "failed": 0, "refused": 1, "cancelled": 0, "chunk_messages": 0,
            "chunk_messages_dropped": 0, "late_answers": 0, "malformed": 0, "disconnected": 0, "workers_lost": 0,
            "clients_lost": 0,
        },
    }  # fmt: skip


def test_an_empty_broker_answers_too(stage: Stage) -> None:
    client = stage.client()
    assert client.queries("models") == client.queries("workers") == []
    assert client.queries("status")["requests"] == {"waiting": 0, "running": 0, "orphaned": 0}


def test_an_unknown_query_is_refused_with_those_that_are_known(stage: Stage) -> None:
    message = "unknown query 'shutdown'; known are models, status, workers"
    assert stage.client().queries("shutdown") == Error(request_id(99), 0, "bad_request", message)


def test_arguments_that_a_query_does_not_take_are_refused(stage: Stage) -> None:
    error = stage.client().queries("models", order=1, by="name")
    assert error.message == "query 'models' takes no arguments, got by, order"


def test_an_answer_that_no_message_can_hold_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "MAX_BODY_BYTES", 3000)
    client = stage.client()
    for number in range(20):
        stage.worker(f"w{number}")
    error = client.queries("workers")
    assert error.code == "bad_request"
    assert error.message.startswith("the answer is too large for one message: ")
    assert client.queries("status")["workers"] == 20
