"""WorkerCore and its requests: admission, credit, chunks, cancel, failures, drain."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.credit import SendWindow
from tokenmq.protocol.links import Lost, Send, Shut
from tokenmq.protocol.messages import (
    Cancel,
    Chunk,
    Chunks,
    Draining,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Parked,
    Timings,
    Usage,
    WorkerState,
)
from tokenmq.protocol.messages import Drain as DrainMessage
from tokenmq.worker.engines.base import Failed, Tokens
from tokenmq.worker.events import (
    EXIT_CANNOT_START,
    EXIT_FAILED,
    CancelJob,
    Drain,
    EngineDied,
    EngineFailed,
    Stop,
    Submit,
)
from tokenmq.worker.streams import MAX_BATCH_BYTES, MAX_CHUNK_CHARS, MAX_CHUNK_TOKENS, Lane


def the_error(actions: Any) -> Error:
    [send] = actions
    assert isinstance(send, Send)
    assert isinstance(send.message, Error)
    return send.message


def test_a_request_becomes_a_job(ready: Any, say: Any) -> None:
    [submit] = ready.hear(say.request(1, max_tokens=9))
    assert isinstance(submit, Submit)
    assert submit.job.model == "toy"
    assert submit.job.generation.prompt == "hello"
    assert submit.job.generation.sampling.max_tokens == 9


def test_a_stream_from_the_first_token_to_finish(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    assert say.chunks(ready.engine(say.tokens(job, 7))) == [Chunk(say.id(1), 1, 0, 0, (7,), "7 ")]
    orders = ready.engine(say.tokens(job, 8, 9), say.done(job, 3))
    chunk, end = orders
    assert chunk.message == Chunks(say.route, (Chunk(say.id(1), 1, 0, 1, (8, 9), "8 9 "),))
    assert end.message == Finish(say.id(1), 1, FinishReason.LENGTH, Usage(1, 3), Timings(0.0, 0.1, 0.2, 0.3), "w1")
    assert ready.engine(say.tokens(job, 1), say.done(job, 4)) == []


def test_one_step_is_one_message_for_each_client(ready: Any, say: Any) -> None:
    other = b"route-of-client2"
    jobs = [ready.take(say.request(n, route=other if n == 3 else say.route)) for n in (1, 2, 3)]
    found = say.messages(ready.engine(*(say.tokens(job, job.ticket) for job in jobs)), Chunks)
    assert {message.route: [chunk.request_id for chunk in message.chunks] for message in found} == {
        say.route: [say.id(1), say.id(2)],
        other: [say.id(3)],
    }


@pytest.mark.parametrize(
    ("values", "code", "retryable"),
    [
        ({"model": "other"}, "model_not_found", True),
        ({"payload": b"\xc1"}, "bad_request", False),
        ({"route": None}, "bad_request", False),
        ({"max_tokens": 16, "expected_tokens": 1}, "bad_request", False),
    ],
)
def test_what_cannot_be_taken_is_answered(ready: Any, say: Any, values: Any, code: str, retryable: bool) -> None:
    error = the_error(ready.hear(say.request(5, attempt=3, **values)))
    assert (error.id, error.attempt, error.code, error.retryable) == (say.id(5), 3, code, retryable)
    if code == "model_not_found":
        assert "'other'" in error.message
        assert error.message.endswith("toy")


def test_expected_tokens_must_be_what_the_payload_asks_for_where_they_are_told(ready: Any, say: Any) -> None:
    ready.take(say.request(1, max_tokens=40, expected_tokens=40))
    ready.take(say.request(2, max_tokens=40))
    message = the_error(ready.hear(say.request(3, max_tokens=40, expected_tokens=39))).message
    assert "40 tokens are left" in message
    assert "is 39" in message


def test_a_loading_worker_takes_nothing(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.join()
    error = the_error(fresh.hear(say.request()))
    assert (error.code, error.retryable) == ("no_worker", True)


def test_more_than_it_may_hold_is_busy(ready: Any, say: Any) -> None:
    for number in range(2 * 2 + 8):
        ready.take(say.request(number))
    error = the_error(ready.hear(say.request(99)))
    assert (error.code, error.retryable) == ("busy", True)


def test_a_repeated_request_is_taken_once_and_a_new_attempt_is_another(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    assert ready.hear(say.request(1)) == []
    second = ready.take(say.request(1, attempt=2))
    [chunk] = say.chunks(ready.engine(say.tokens(second, 4)))
    assert chunk.attempt == 2


def test_without_credit_tokens_are_kept_and_leave_as_one_chunk(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=1))
    assert len(say.chunks(ready.engine(say.tokens(job, 1)))) == 1
    assert ready.engine(say.tokens(job, 2)) == []
    assert ready.engine(say.tokens(job, 3)) == []
    [parked] = ready.engine(say.done(job, 3))  # FINISH waits, too; meanwhile the slot is free
    assert parked.message == Parked(say.id(1), 1)
    assert ready.credit(1, 1) == []  # a late grant does no harm
    assert say.chunks(ready.credit(1, 2)) == [Chunk(say.id(1), 1, 0, 1, (2,), "2 ")]
    chunk, end = ready.credit(1, 10)
    assert chunk.message.chunks == (Chunk(say.id(1), 1, 0, 2, (3,), "3 "),)
    assert isinstance(end.message, Finish)


def test_credit_inside_a_piece_lets_its_tokens_go_and_keeps_its_text_for_the_last(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=0))
    assert ready.engine(say.tokens(job, 1), say.tokens(job, 2, 3, 4, text="whole")) == []
    assert say.chunks(ready.credit(1, 2)) == [Chunk(say.id(1), 1, 0, 0, (1, 2), "1 ")]
    assert say.chunks(ready.credit(1, 3)) == [Chunk(say.id(1), 1, 0, 2, (3,), "")]
    assert say.chunks(ready.credit(1, 4)) == [Chunk(say.id(1), 1, 0, 3, (4,), "whole")]


def test_text_without_tokens_needs_no_credit_once_its_tokens_have_left(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=1))
    ready.engine(say.tokens(job, 1, text=""))
    orders = ready.engine(Tokens(job.ticket, (), "held"), say.done(job, 1))
    assert say.chunks(orders) == [Chunk(say.id(1), 1, 0, 1, (), "held")]
    assert say.messages(orders, Finish)


def test_text_without_tokens_waits_for_the_tokens_before_it(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=0))
    orders = ready.engine(say.tokens(job, 1, text=""), Tokens(job.ticket, (), "held"), say.done(job, 1))
    assert [order.message for order in orders] == [Parked(say.id(1), 1)]
    assert say.chunks(ready.credit(1, 1)) == [Chunk(say.id(1), 1, 0, 0, (1,), "held")]


def test_parked_requests_take_no_place_up_to_a_bound(ready: Any, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmq.worker.desk.MOST_PARKED", 2)
    ends = []
    for number in range(1, 4):
        job = ready.take(say.request(number, credit=0))
        ends += say.messages(ready.engine(say.tokens(job, 1), say.done(job, 1)), Parked)
    assert ends == [Parked(say.id(1), 1), Parked(say.id(2), 1)]
    assert ready.core.load("tcp://broker:1", 0.0).held == 0
    assert say.messages(ready.hear(Cancel(say.id(1), 1)), Finish)[0].reason is FinishReason.CANCELLED
    assert [type(order.message) for order in ready.credit(2, 9)] == [Chunks, Finish]
    assert [type(order.message) for order in ready.credit(3, 9)] == [Chunks, Finish]
    ready.core.validate()


def test_a_chunk_has_a_largest_size(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=0))
    count = MAX_CHUNK_TOKENS + 5
    ready.engine(*(Tokens(job.ticket, (number,), "x") for number in range(count)))
    orders = ready.credit(1, count)
    assert [len(chunk.token_ids) for chunk in say.chunks(orders)] == [MAX_CHUNK_TOKENS, 5]
    assert [chunk.offset for chunk in say.chunks(orders)] == [0, MAX_CHUNK_TOKENS]


def test_long_texts_are_divided_among_chunks_and_messages(ready: Any, say: Any) -> None:
    jobs = [ready.take(say.request(number, credit=0)) for number in range(9)]
    for job in jobs:
        ready.engine(*(Tokens(job.ticket, (number,), "x" * MAX_CHUNK_CHARS) for number in range(3)))
    assert [len(chunk.token_ids) for chunk in say.chunks(ready.credit(0, 9))] == [1, 1, 1]
    later = [ready.take(say.request(number)) for number in (10, 11)]
    many = [Tokens(job.ticket, (1,), "y" * MAX_BATCH_BYTES) for job in later]
    found = say.messages(ready.engine(*many), Chunks)
    assert [chunk.request_id for message in found for chunk in message.chunks] == [say.id(10), say.id(11)]
    assert len(found) == 2


def test_completions_have_offsets_of_their_own(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=1))
    found = say.chunks(ready.engine(Tokens(job.ticket, (1,), "a", 0), Tokens(job.ticket, (2, 3), "bc", 1)))
    assert [(chunk.index, chunk.offset, chunk.token_ids) for chunk in found] == [(0, 0, (1,)), (1, 0, (2,))]


def test_text_that_cannot_be_packed_is_replaced(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    [chunk] = say.chunks(ready.engine(say.tokens(job, 1, text="é\ud800")))
    assert chunk.text == "é?"


def test_cancel_ends_the_job_and_finish_follows_once(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=0))
    ready.engine(say.tokens(job, 1, 2))
    assert ready.hear(Cancel(say.id(1), 1)) == [CancelJob(job.ticket)]
    assert ready.hear(Cancel(say.id(1), 1)) == []
    assert ready.engine(say.tokens(job, 3)) == []
    [end] = ready.engine(say.done(job, 3, FinishReason.CANCELLED))
    assert end.message.reason is FinishReason.CANCELLED
    assert end.message.usage == Usage(1, 3)
    assert ready.hear(Cancel(say.id(1), 1)) == []


def test_cancel_of_what_waits_for_credit_finishes_at_once(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=0))
    ready.engine(say.tokens(job, 1), say.done(job, 1))
    [end] = ready.hear(Cancel(say.id(1), 1))
    assert end.message.reason is FinishReason.CANCELLED


def test_cancel_of_the_unknown_is_ignored(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    assert ready.hear(Cancel(say.id(2), 1)) == []
    assert ready.hear(Cancel(say.id(1), 2)) == []
    assert ready.credit(2, 5) == []


def test_a_failed_job_is_an_error_after_what_credit_covered(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1, credit=1))
    failed = Failed(job.ticket, "out_of_memory", "x" * 5000, retryable=True)
    chunk, end = ready.engine(say.tokens(job, 1, 2), failed)
    assert chunk.message.chunks[0].token_ids == (1,)
    assert (end.message.code, end.message.retryable, len(end.message.message)) == ("out_of_memory", True, 4096)


def test_a_failed_step_fails_what_the_engine_had_and_nothing_else(ready: Any, say: Any) -> None:
    lost, kept = ready.take(say.request(1)), ready.take(say.request(2, credit=0))
    ready.engine(say.tokens(kept, 1), say.done(kept, 1))  # only waits for its reader
    later = ready.take(say.request(3))  # was on its way to the engine when the step failed
    error = the_error(ready.tell(EngineFailed("boom", frozenset({lost.ticket, kept.ticket, 999}))))
    assert (error.id, error.code, error.retryable) == (say.id(1), "engine_failed", True)
    assert "boom" in error.message
    assert say.messages(ready.credit(2, 9), Finish)
    assert say.chunks(ready.engine(say.tokens(later, 5)))


def test_an_engine_that_cannot_load_stops_the_worker(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.join()
    goodbye, shut, stop = fresh.tell(EngineDied("no such file"))
    assert isinstance(goodbye.message, Goodbye)
    assert shut == Shut(say.broker)
    assert stop == Stop(EXIT_CANNOT_START, "model_load_failed")
    assert [log.event for log in fresh.logs][-1] == "model_load_failed"


def test_an_engine_that_dies_gives_everything_back(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    waiting = ready.take(say.request(2, credit=0))
    ready.engine(say.tokens(waiting, 1), say.done(waiting, 1))
    orders = ready.tell(EngineDied("gone"))
    assert {error.id for error in say.messages(orders, Error)} == {say.id(1), say.id(2)}
    assert orders[-1] == Stop(EXIT_FAILED, "engine_died")


def test_drain_finishes_what_is_held_and_stops(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    orders = ready.tell(Drain())
    assert isinstance(orders[0].message, Draining)
    assert orders[1].message.load.state is WorkerState.DRAINING
    error = the_error(ready.hear(say.request(2)))
    assert (error.code, error.retryable) == ("draining", True)
    chunk, end, goodbye, shut, stop = ready.engine(say.tokens(job, 1), say.done(job, 1))
    assert isinstance(chunk.message, Chunks)
    assert isinstance(end.message, Finish)
    assert isinstance(goodbye.message, Goodbye)
    assert (shut, stop) == (Shut(say.broker), Stop(0, "drained"))


def test_drain_gives_the_rest_back_after_the_grace(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    dropped = ready.take(say.request(2))
    ready.hear(Cancel(say.id(2), 1))
    ready.tell(Drain(0.5))
    assert ready.core.next_deadline() == ready.now + 0.5
    orders = ready.tick(0.5)
    assert say.cancelled(orders) == [job.ticket, dropped.ticket]
    [error] = say.messages(orders, Error)
    assert (error.id, error.code, error.retryable) == (say.id(1), "draining", True)
    assert [end.reason for end in say.messages(orders, Finish)] == [FinishReason.CANCELLED]
    assert say.messages(orders, Goodbye)
    assert orders[-1] == Stop(0, "drained")


def test_a_second_drain_can_only_shorten_the_grace(ready: Any, say: Any) -> None:
    ready.take(say.request(1))
    ready.tell(Drain(5.0))
    ready.tell(Drain(50.0))
    assert ready.core.next_deadline() <= ready.now + 5.0
    ready.tell(Drain(0.0))
    assert ready.tick()[-1] == Stop(0, "drained")


def test_a_broker_may_ask_the_worker_to_leave_all_brokers(say: Any) -> None:
    story = say.story(brokers=(say.broker, say.other), grace_s=7.0)
    story.start()
    story.join(say.broker)
    story.join(say.other)
    story.loaded()
    job = story.take(say.request(1), say.other)
    orders = story.hear(DrainMessage(), say.broker)
    assert [send.broker for send in orders if isinstance(send.message, Draining)] == [say.broker, say.other]
    [line] = [log for log in story.logs if log.event == "draining"]
    assert line.fields == {"held": 1, "grace_s": 7.0, "broker": say.broker}
    error = the_error(story.hear(say.request(2), say.other))
    assert (error.code, error.retryable) == ("draining", True)
    orders = story.engine(say.tokens(job, 1), say.done(job, 1))
    assert len(say.messages(orders, Finish)) == 1
    assert len(say.messages(orders, Goodbye)) == 2
    assert orders[-1] == Stop(0, "drained")


def test_the_broker_may_say_how_long_and_can_only_shorten_it(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    ready.tell(Drain(0.8))
    ready.hear(DrainMessage(50.0))
    assert ready.core.next_deadline() == ready.now + 0.8
    ready.hear(DrainMessage(0.5))
    assert ready.core.next_deadline() == ready.now + 0.5
    assert ["broker" in log.fields for log in ready.logs if log.event == "draining"] == [False, True]
    orders = ready.tick(0.5)
    assert say.cancelled(orders) == [job.ticket]
    [error] = say.messages(orders, Error)
    assert (error.code, error.retryable) == ("draining", True)
    assert orders[-1] == Stop(0, "drained")


def test_an_idle_or_lonely_worker_drains_at_once(fresh: Any, say: Any) -> None:
    fresh.start()
    assert fresh.tell(Drain()) == [Shut(say.broker), Stop(0, "drained")]


def test_a_broker_that_is_lost_while_draining_is_not_dialled_again(ready: Any, say: Any) -> None:
    job = ready.take(say.request(1))
    ready.tell(Drain())
    assert ready.tell(Lost(say.broker)) == [CancelJob(job.ticket), Shut(say.broker), Stop(0, "drained")]


def test_a_lane_takes_nothing_while_there_is_nothing() -> None:
    assert Lane(SendWindow(5)).take() is None
