"""What a stream may receive, in which order, and how it ends exactly once. For repairs see test_recovery.py."""

from __future__ import annotations

import pytest

from tokenmq.client import streams
from tokenmq.client.events import Answered, Attempt, CancelStream, Deliver, Ended, Ending, Grant
from tokenmq.client.streams import MAX_TAILS
from tokenmq.protocol.errors import BusyError, ErrorCode, WorkerLostError
from tokenmq.protocol.messages import (
    NO_ID,
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Error,
    Finish,
    FinishReason,
    Request,
    Timings,
    Usage,
)

from .story import ONE, Story, failure, key, make_chunk, sent


@pytest.fixture
def story() -> Story:
    story = Story()
    story.open_sessions()
    return story


def test_chunks_are_delivered_then_the_end(story: Story) -> None:
    story.submit(1)
    assert story.chunk(0, 2) == [Deliver(key(1), make_chunk(0, 2))]
    assert story.chunk(2, 3) == [Deliver(key(1), make_chunk(2, 3))]
    end = Ending(FinishReason.STOP, Usage(3, 5), Timings(), "worker-1")
    assert story.finish(5) == [Ended(key(1), (Attempt(1, ONE, "worker-1"),), end)]
    assert story.finish(5) == []


def test_one_message_serves_many_streams(story: Story) -> None:
    story.submit(1)
    story.submit(2)
    first, second = make_chunk(0, number=1), make_chunk(0, 2, number=2)
    assert story.receive(Chunks(NO_ID, (first, second))) == [Deliver(key(1), first), Deliver(key(2), second)]


def test_held_back_text_comes_without_tokens(story: Story) -> None:
    story.submit(1)
    story.chunk(0, 2)
    tail = Chunk(key(1), 1, 0, 2, (), "!")
    assert story.receive(Chunks(NO_ID, (tail,))) == [Deliver(key(1), tail)]


def test_text_without_tokens_cannot_go_on_for_ever(story: Story) -> None:
    story.submit(1)
    tail = Chunks(NO_ID, (Chunk(key(1), 1, 0, 0, (), "!"),))
    for _ in range(MAX_TAILS):
        story.receive(tail)
    actions = story.receive(tail)
    assert sent(actions) == [Cancel(key(1), 1)]
    assert failure(actions).code == ErrorCode.PROTOCOL.value


def test_tokens_have_only_so_much_text(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.limits, "MAX_PROMPT_CHARS", 10)
    story.submit(1)
    most = "x" * (10 + 2 * streams.MAX_CHARS_A_TOKEN)
    assert story.receive(Chunks(NO_ID, (Chunk(key(1), 1, 0, 0, (7,), most),))) != []
    actions = story.receive(Chunks(NO_ID, (Chunk(key(1), 1, 0, 1, (), "x" * (streams.MAX_CHARS_A_TOKEN + 1)),)))
    assert sent(actions) == [Cancel(key(1), 1)]
    assert "characters of text for 1 tokens" in failure(actions).message


def test_a_repeat_is_dropped(story: Story) -> None:
    story.submit(1)
    story.chunk(0, 2)
    assert story.chunk(0, 2) == []
    assert story.chunk(1, 1) == []
    assert story.core.dropped == {"repeat": 2}


@pytest.mark.parametrize(("offset", "tokens"), [(3, 1), (1, 2), (0, 3)])
def test_a_gap_or_an_overlap_fails_the_stream_and_tells_the_worker(story: Story, offset: int, tokens: int) -> None:
    story.submit(1, resume=False)
    story.chunk(0, 2)
    actions = story.chunk(offset, tokens)
    assert sent(actions) == [Cancel(key(1), 1)]
    error = failure(actions)
    assert isinstance(error, WorkerLostError)
    assert error.retryable
    assert error.request_id == key(1).hex()
    assert story.chunk(2) == []


def test_an_end_that_counts_more_tokens_than_came_is_a_gap(story: Story) -> None:
    story.submit(1, resume=False)
    story.chunk(0, 2)
    assert isinstance(failure(story.finish(3)), WorkerLostError)


def test_a_worker_that_cancels_may_leave_tokens_unsent(story: Story) -> None:
    story.submit(1)
    finish = Finish(key(1), 1, FinishReason.CANCELLED, Usage(3, 9), Timings(), "w")
    (end,) = story.receive(finish)
    assert isinstance(end, Ended)
    assert isinstance(end.outcome, Ending)


def test_a_second_completion_was_not_asked_for(story: Story) -> None:
    story.submit(1)
    actions = story.receive(Chunks(NO_ID, (make_chunk(0, index=1),)))
    assert failure(actions).code == ErrorCode.PROTOCOL.value


def test_foreign_streams_and_other_attempts_are_dropped(story: Story) -> None:
    story.submit(1)
    assert story.chunk(0, number=5) == []
    assert story.chunk(0, attempt=2) == []
    assert story.finish(0, attempt=2) == []
    assert story.core.dropped == {"unknown": 1, "attempt": 2}


def test_more_than_the_credit_fails_the_stream(story: Story) -> None:
    story.submit(1, window=4)
    story.chunk(0, 4)
    actions = story.chunk(4)
    assert sent(actions) == [Cancel(key(1), 1)]
    assert "credit overrun" in failure(actions).message


def test_credit_follows_the_reader(story: Story) -> None:
    (request,) = sent(story.submit(1, window=4))
    assert isinstance(request, Request)
    assert request.envelope.credit == 4
    story.chunk(0, 4)
    window = story.windows[key(1)]
    assert window.consume(1) is None
    limit = window.consume(1)
    assert limit == 6
    assert sent(story.handle(Grant(key(1), limit))) == [Credit(key(1), 1, 6)]
    assert story.chunk(4, 2) == [Deliver(key(1), make_chunk(4, 2))]


def test_credit_for_a_stream_that_is_over_is_not_sent(story: Story) -> None:
    story.submit(1)
    story.finish(0)
    assert story.handle(Grant(key(1), 100)) == []


def test_cancel_ends_the_stream_at_once(story: Story) -> None:
    story.submit(1)
    cancel, end = story.handle(CancelStream(key(1)))
    assert sent([cancel]) == [Cancel(key(1), 1)]
    assert end == Ended(key(1), (Attempt(1, ONE),), Ending(FinishReason.CANCELLED))
    assert story.chunk(0) == []
    assert story.finish(1) == []
    assert story.handle(CancelStream(key(1))) == []


def test_a_request_that_has_not_left_is_cancelled_without_a_word() -> None:
    story = Story()
    story.tick()
    story.submit(1)
    assert story.handle(CancelStream(key(1))) == [Ended(key(1), (Attempt(1),), Ending(FinishReason.CANCELLED))]
    story.greet()
    assert sent(story.welcome()) == []


@pytest.mark.parametrize("attempt", [0, 1])
def test_an_error_becomes_the_exception_of_its_code(story: Story, attempt: int) -> None:
    story.submit(1, resume=False)
    actions = story.receive(Error(key(1), attempt, "busy", "the waiting room is full", True, 2.5))
    error = failure(actions)
    assert isinstance(error, BusyError)
    assert (error.retryable, error.retry_after_s, error.request_id) == (True, 2.5, key(1).hex())


def test_an_unknown_code_is_kept(story: Story) -> None:
    story.submit(1)
    assert failure(story.receive(Error(key(1), 1, "on_fire", "hot"))).code == "on_fire"


def test_an_error_of_another_attempt_or_stream_is_dropped(story: Story) -> None:
    story.submit(1)
    assert story.receive(Error(key(1), 2, "busy", "")) == []
    assert story.receive(Error(key(5), 0, "busy", "")) == []


def test_an_error_answers_a_query(story: Story) -> None:
    story.ask(9)
    (answer,) = story.receive(Error(key(9), 0, "bad_request", "no such question"))
    assert isinstance(answer, Answered)
    assert answer.error is not None
