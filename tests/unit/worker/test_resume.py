"""WorkerCore and completions that have begun elsewhere: who is taken, offsets, credit, attempts side by side."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.messages import Cancel, Chunk, Error, Finish, FinishReason, Parked, Usage
from tokenmq.protocol.payload import Prior
from tokenmq.worker.engines.base import Tokens
from tokenmq.worker.events import CancelJob, Drain, EngineFailed

THREE = (5, 6, 7)


def test_the_engine_gets_the_prior(resuming: Any, say: Any) -> None:
    job = resuming.take(say.request(1, attempt=2, prior=THREE, text_chars=4))
    assert job.generation.prior == Prior(THREE, 4)


def test_expected_tokens_are_those_behind_the_prior(resuming: Any, say: Any) -> None:
    resuming.take(say.request(1, attempt=2, prior=THREE, max_tokens=16, expected_tokens=13))
    [error] = say.messages(
        resuming.hear(say.request(2, attempt=2, prior=THREE, max_tokens=16, expected_tokens=16)), Error
    )
    assert error.code == "bad_request"
    assert "13 tokens are left" in error.message


def test_offsets_and_usage_go_on_behind_the_prior(resuming: Any, say: Any) -> None:
    job = resuming.take(say.request(1, attempt=2, prior=THREE))
    assert say.chunks(resuming.engine(say.tokens(job, 8))) == [Chunk(say.id(1), 2, 0, 3, (8,), "8 ")]
    orders = resuming.engine(say.tokens(job, 9, 10), say.done(job, 6))
    assert say.chunks(orders) == [Chunk(say.id(1), 2, 0, 4, (9, 10), "9 10 ")]
    [end] = say.messages(orders, Finish)
    assert end.usage == Usage(1, 6)
    assert resuming.logs[-1].fields["tokens"] == 6


def test_credit_counts_from_the_begin_of_the_completion(resuming: Any, say: Any) -> None:
    job = resuming.take(say.request(1, attempt=2, prior=THREE, credit=4))
    orders = resuming.engine(say.tokens(job, 8), say.tokens(job, 9), say.done(job, 5))
    assert say.chunks(orders) == [Chunk(say.id(1), 2, 0, 3, (8,), "8 ")]
    assert say.messages(orders, Parked)
    assert resuming.credit(1, 4, attempt=2) == []
    assert say.chunks(resuming.credit(1, 5, attempt=2)) == [Chunk(say.id(1), 2, 0, 4, (9,), "9 ")]


def test_less_credit_than_prior_tokens_waits_and_does_no_harm(resuming: Any, say: Any) -> None:
    job = resuming.take(say.request(1, attempt=2, prior=THREE, credit=1))
    assert resuming.engine(say.tokens(job, 8)) == []
    assert resuming.credit(1, 3, attempt=2) == []
    assert len(say.chunks(resuming.credit(1, 4, attempt=2))) == 1


def test_what_is_left_of_the_text_of_a_complete_prior_needs_no_credit(resuming: Any, say: Any) -> None:
    job = resuming.take(say.request(1, attempt=2, prior=THREE, credit=3))
    orders = resuming.engine(Tokens(job.ticket, (), "rest"), say.done(job, 3, FinishReason.STOP))
    assert say.chunks(orders) == [Chunk(say.id(1), 2, 0, 3, (), "rest")]
    [end] = say.messages(orders, Finish)
    assert (end.reason, end.usage) == (FinishReason.STOP, Usage(1, 3))


def test_a_model_that_does_not_resume_says_so(resuming: Any, say: Any) -> None:
    [send] = resuming.hear(say.request(1, attempt=2, model="plain", prior=THREE))
    error = send.message
    assert isinstance(error, Error)
    assert (error.id, error.attempt, error.code, error.retryable) == (say.id(1), 2, "cannot_resume", False)
    assert "'plain'" in error.message
    resuming.take(say.request(1, attempt=2, model="plain"))  # from the begin it is welcome


@pytest.mark.parametrize(
    ("prior", "told"),
    [(THREE, 0), (THREE, 2), (THREE, 4), ((), 3)],
)
def test_payload_and_envelope_must_agree(resuming: Any, say: Any, prior: tuple[int, ...], told: int) -> None:
    [send] = resuming.hear(say.request(1, attempt=2, prior=prior, prior_tokens=told))
    error = send.message
    assert isinstance(error, Error)
    assert (error.code, error.retryable) == ("bad_request", False)
    assert str(len(prior)) in error.message
    assert str(told) in error.message


def test_a_cancelled_stream_counts_its_prior(resuming: Any, say: Any) -> None:
    """By the engine's word, by ours where the engine has none, and where it forgets."""
    jobs = [resuming.take(say.request(number, attempt=2, prior=THREE)) for number in (1, 2, 3)]
    resuming.engine(*(say.tokens(job, 8) for job in jobs))
    for number in (1, 2, 3):
        resuming.hear(Cancel(say.id(number), 2))
    ends = say.messages(resuming.engine(say.done(jobs[0], 4, FinishReason.CANCELLED)), Finish)
    ends += say.messages(resuming.engine(say.done(jobs[1], 0, FinishReason.CANCELLED)), Finish)
    ends += say.messages(resuming.tell(EngineFailed("boom", frozenset({jobs[2].ticket}))), Finish)
    assert [end.reason for end in ends] == [FinishReason.CANCELLED] * 3
    assert [end.usage.completion_tokens for end in ends] == [4, 4, 4]


def test_what_a_drain_gives_back_counts_its_prior(resuming: Any, say: Any) -> None:
    resuming.take(say.request(1, attempt=2, prior=THREE))
    resuming.hear(Cancel(say.id(1), 2))
    resuming.tell(Drain(0.0))
    [end] = say.messages(resuming.tick(), Finish)
    assert end.usage == Usage(0, 3)


def test_the_next_attempt_may_come_while_the_last_one_is_being_cancelled(resuming: Any, say: Any) -> None:
    first = resuming.take(say.request(1))
    resuming.engine(*(say.tokens(first, token) for token in THREE))
    assert resuming.hear(Cancel(say.id(1), 1)) == [CancelJob(first.ticket)]
    second = resuming.take(say.request(1, attempt=2, prior=THREE))
    assert second.ticket != first.ticket
    # The engine's step was under way: the older attempt brings something more, and then its end.
    orders = resuming.engine(say.tokens(first, 8), say.tokens(second, 8))
    assert say.chunks(orders) == [Chunk(say.id(1), 2, 0, 3, (8,), "8 ")]
    [end] = say.messages(resuming.engine(say.done(first, 4, FinishReason.CANCELLED)), Finish)
    assert (end.attempt, end.reason) == (1, FinishReason.CANCELLED)
    [end] = say.messages(resuming.engine(say.done(second, 4)), Finish)
    assert (end.attempt, end.reason) == (2, FinishReason.LENGTH)


def test_grants_and_cancels_reach_the_attempt_that_they_name(resuming: Any, say: Any) -> None:
    first = resuming.take(say.request(1, credit=0))
    second = resuming.take(say.request(1, attempt=2, prior=THREE, credit=3))
    resuming.engine(say.tokens(first, 5), say.tokens(second, 8))
    assert [chunk.attempt for chunk in say.chunks(resuming.credit(1, 4, attempt=2))] == [2]
    assert resuming.hear(Cancel(say.id(1), 2)) == [CancelJob(second.ticket)]
    assert [chunk.attempt for chunk in say.chunks(resuming.credit(1, 4, attempt=1))] == [1]
