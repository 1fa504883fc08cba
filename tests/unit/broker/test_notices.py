"""STARTED comes a little after the dispatch, and not at all for what has ended by then."""

from __future__ import annotations

import pytest

from tokenmq.protocol.messages import Error, Finish, Message, Request, Started

from .stage import ClientPeer, Said, Stage, WorkerPeer, request_id

NOTICE_S = 0.02


@pytest.fixture
def stage() -> Stage:
    return Stage(notice_s=NOTICE_S)


def started(said: list[Said]) -> list[tuple[str, Message]]:
    return [(to, message) for to, message in said if isinstance(message, Started)]


def at_work(stage: Stage, slots: int = 2) -> tuple[ClientPeer, WorkerPeer]:
    return stage.client(), stage.worker("w1", slots=slots)


def test_a_request_that_goes_on_is_told_once(stage: Stage) -> None:
    client, _ = at_work(stage)
    assert [type(message) for _, message in client.asks(1)] == [Request]
    assert started(stage.passes(NOTICE_S / 2)) == []
    assert started(stage.passes(NOTICE_S)) == [("ann", Started(request_id(1), 1, "w1"))]
    assert started(stage.passes(10 * NOTICE_S)) == []


def test_a_request_that_ends_soon_costs_no_notice(stage: Stage) -> None:
    client, worker = at_work(stage)
    client.asks(1)
    assert [type(message) for _, message in worker.finishes(1)] == [Finish]
    assert started(stage.passes(10 * NOTICE_S)) == []
    assert stage.core.exchange.next_deadline() is None, "a notice of what has ended is waited for"


def test_one_that_nobody_waits_for_any_more_is_not_told(stage: Stage) -> None:
    client, _ = at_work(stage)
    client.asks(1)
    client.vanishes()
    assert started(stage.passes(10 * NOTICE_S)) == []


def test_the_next_attempt_is_told_of_its_own_worker_only(stage: Stage) -> None:
    client, worker = at_work(stage)
    client.asks(1)
    said = worker.vanishes()
    assert [message.worker for _, message in said if isinstance(message, Error)] == ["w1"]
    stage.worker("w2")
    client.asks(1, attempt=2)
    assert started(stage.passes(10 * NOTICE_S)) == [("ann", Started(request_id(1), 2, "w2"))]


def test_notices_come_in_the_order_of_dispatch(stage: Stage) -> None:
    client, _ = at_work(stage)
    client.asks(1)
    stage.passes(NOTICE_S / 2)
    client.asks(2)
    assert [message.id for _, message in started(stage.passes(NOTICE_S)) if isinstance(message, Started)] == [
        request_id(1),
        request_id(2),
    ]
