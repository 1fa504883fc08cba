"""Submissions of one request: which is alive, which is dropped, and who is told what."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenmq.protocol.messages import Cancel, Credit, Error, FinishReason, Request, Started

from .stage import Stage, finish, kinds, request_id


def test_a_repeated_request_is_dropped(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    assert client.asks(1) == []
    assert client.asks(2) == client.asks(2) == []
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]
    assert kinds(worker.finishes(2)) == [("ann", "FINISH stop")]
    assert kinds(client.asks(1)) == [("w1", "REQUEST")]  # an id is free again when its request has ended
    assert stage.core.counters.refused == 2


def test_a_submission_of_another_client_is_refused_and_the_first_goes_on(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    worker = stage.busy_worker("w1", ann)
    assert bob.asks(1) == [("bob", Error(request_id(1), 1, "bad_request", "this request id is in use"))]
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop")]


def test_a_submission_that_nobody_waits_for_any_more_is_in_use_until_its_worker_answers(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.vanishes()
    again = stage.client()
    assert kinds(again.asks(1)) == [("ann", "ERROR bad_request")]
    worker.finishes(1, reason=FinishReason.CANCELLED)
    assert kinds(again.asks(1)) == [("w1", "REQUEST")]


def test_a_later_attempt_takes_the_place_of_one_that_waits(stages: Callable[..., Stage]) -> None:
    stage = stages(max_waiting=1)
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    assert client.asks(2) == client.asks(2, attempt=2) == []  # the only place is free again
    assert stage.core.exchange.tally() == {"waiting": 1, "running": 1, "orphaned": 0}
    said = worker.finishes(1)
    assert [message.envelope.attempt for _, message in said if isinstance(message, Request)] == [2]
    assert worker.finishes(2, attempt=2) == [("ann", finish(2, 2, worker="w1"))]
    counters = stage.core.counters
    assert (counters.superseded, counters.requests, counters.cancelled) == (1, 3, 0)


def test_a_later_attempt_takes_the_place_of_one_that_runs_and_avoids_its_worker(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    stage.worker("w2")
    assert kinds(client.asks(1, attempt=2)) == [("w1", "CANCEL"), ("w2", "REQUEST")]
    assert stage.core.exchange.tally() == {"waiting": 0, "running": 1, "orphaned": 1}
    assert kinds(client.asks(3)) == []  # the slot of the former stays charged
    assert kinds(worker.finishes(1, reason=FinishReason.CANCELLED)) == [("w1", "REQUEST")]
    assert stage.core.counters.superseded == 1


def test_the_worker_of_a_former_attempt_may_have_the_next_one_where_it_is_the_only_one(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", slots=2)
    client.asks(1)
    assert client.cancels(1) == [("w1", Cancel(request_id(1), 1))]
    said = client.asks(1, attempt=2)  # cancelled already: no second CANCEL
    assert kinds(said) == [("w1", "REQUEST")]
    assert said[1] == ("ann", Started(request_id(1), 2, "w1"))
    assert client.grants(1, 64, attempt=2) == [("w1", Credit(request_id(1), 2, 64))]
    assert client.grants(1, 64, attempt=1) == client.cancels(1, attempt=1) == []
    assert worker.finishes(1, attempt=1, reason=FinishReason.CANCELLED) == []
    assert kinds(worker.fails(1, attempt=2)) == [("ann", "ERROR engine_failed")]


def test_the_former_attempt_ends_where_the_next_one_is_refused_too(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    assert kinds(client.asks(1, "unknown", attempt=2)) == [("w1", "CANCEL"), ("ann", "ERROR no_worker")]
    assert worker.finishes(1) == []


def test_an_earlier_attempt_is_dropped_as_late(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1", slots=2)
    client.asks(1, attempt=3)
    assert client.asks(1, attempt=2) == client.asks(1, attempt=1) == []
    client.asks(1, attempt=4)
    assert client.asks(1, attempt=3) == []  # though the third still runs, nobody waits for it
    assert worker.finishes(1, attempt=3) == []
    assert kinds(worker.finishes(1, attempt=4)) == [("ann", "FINISH stop")]


def test_a_client_that_came_back_is_served_while_its_former_session_is_not_known_to_be_dead(stage: Stage) -> None:
    old = stage.client("old")
    worker = stage.busy_worker("w1", old)
    stage.worker("w2")
    new = stage.client("new")
    assert kinds(new.asks(1, attempt=2)) == [("w2", "REQUEST")]
    assert old.vanishes() == [("w1", Cancel(request_id(1), 1))]
    assert worker.finishes(1, reason=FinishReason.CANCELLED) == []
    assert stage.core.exchange.tally() == {"waiting": 0, "running": 1, "orphaned": 0}


def test_answers_of_other_attempts_are_dropped(stage: Stage) -> None:
    client = stage.client()
    worker = stage.worker("w1")
    client.asks(1, attempt=2)
    assert worker.finishes(1, attempt=1) == []
    assert kinds(worker.finishes(1, attempt=2)) == [("ann", "FINISH stop")]
    assert worker.finishes(1, attempt=2) == []
    assert stage.core.counters.late_answers == 2


def test_the_deadline_of_a_former_attempt_ends_with_it(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    client.asks(2, deadline_s=0.5, queue_s=0.3)
    client.asks(2, attempt=2)
    assert [text for _, text in kinds(stage.passes(0.9))] == []


@pytest.mark.parametrize("attempt", [1, 2**63 - 1])
def test_every_attempt_that_the_wire_allows_has_a_key(stage: Stage, attempt: int) -> None:
    worker, client = stage.worker("w1"), stage.client()
    assert kinds(client.asks(1, attempt=attempt)) == [("w1", "REQUEST")]
    assert kinds(worker.finishes(1, attempt=attempt)) == [("ann", "FINISH stop")]
