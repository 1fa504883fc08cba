"""Hedges: when a second attempt leaves, what it says, which of the two goes on, and what becomes of the other one."""

from __future__ import annotations

import pytest

from tokenmq.client.events import Action, Attempt, Deliver, Grant
from tokenmq.client.exchange import DEADLINE_SLACK_S
from tokenmq.protocol.errors import (
    BrokerLostError,
    BusyError,
    CannotResumeError,
    DeadlineError,
    FirstTokenTimeoutError,
    WorkerLostError,
)
from tokenmq.protocol.messages import NO_ID, Cancel, Chunk, Chunks, Credit, FinishReason, Request

from .story import (
    ONE,
    TWO,
    Story,
    ending,
    failure,
    grants,
    heartbeats,
    key,
    make_chunk,
    patience,
    prior,
    request,
    requests,
    sent,
    told_attempts,
)

AFTER_S = 2.0


@pytest.fixture
def story() -> Story:
    """Two brokers, both there."""
    return new_story()


def new_story(**settings: float) -> Story:
    story = Story(ONE, TWO, **settings)
    story.open_sessions()
    return story


def cancels(actions: list[Action]) -> list[Cancel]:
    return [message for message in sent(actions) if isinstance(message, Cancel)]


def hedged(story: Story, **more: object) -> Request:
    """Submit a request, and let its worker, `slow`, be so late that a second attempt leaves; return that one."""
    story.submit(1, hedge_after_s=AFTER_S, **more)  # type: ignore[arg-type]
    story.started("slow")
    return request(patience(story, AFTER_S))


def summary(attempts: tuple[Attempt, ...]) -> list[tuple[int, str, bool, bool, str]]:
    """Number, worker, hedge, cancelled, and the error's code of each."""
    return [(a.number, a.worker, a.hedge, a.cancelled, a.error.code if a.error else "") for a in attempts]


# When it leaves, and what it says


def test_a_worker_that_is_late_gets_company_at_the_same_broker(story: Story) -> None:
    first = request(story.submit(1, hedge_after_s=AFTER_S, deadline_s=60.0))
    story.started("slow")
    assert patience(story, AFTER_S - 0.1) == []
    actions = patience(story, 0.1)
    ((endpoint, second),) = requests(actions)
    assert endpoint == ONE
    assert (second.id, second.payload, second.attachments) == (first.id, first.payload, first.attachments)
    assert second.envelope.hedge
    assert not first.envelope.hedge
    assert (second.envelope.attempt, second.envelope.avoid) == (2, ("slow",))
    assert second.envelope.deadline_s == pytest.approx(60.0 - AFTER_S)
    assert cancels(actions) == []
    assert summary(told_attempts(actions)) == [(1, "slow", False, False, ""), (2, "", True, False, "")]


def test_off_is_the_default(story: Story) -> None:
    story.submit(1)
    story.started("slow")
    assert patience(story, 100.0) == []


def test_the_time_in_the_queue_is_not_the_workers(story: Story) -> None:
    story.submit(1, hedge_after_s=AFTER_S)
    assert patience(story, 50.0) == []
    story.started("slow")
    assert patience(story, AFTER_S - 0.1) == []
    assert len(requests(patience(story, 0.2))) == 1


def test_started_of_each_hop_gives_the_name_and_no_more_time(story: Story) -> None:
    story.submit(1, hedge_after_s=AFTER_S)
    story.started("west")
    patience(story, AFTER_S - 0.1)
    story.started("west/gpu-3")
    assert request(patience(story, 0.1)).envelope.avoid == ("west/gpu-3",)


def test_a_first_token_in_time_needs_no_hedge_and_later_silence_gets_none(story: Story) -> None:
    story.submit(1, hedge_after_s=AFTER_S)
    story.started("w1")
    patience(story, AFTER_S - 0.1)
    story.chunk(0)
    assert patience(story, 50.0) == []


def test_what_came_without_a_token_is_an_answer_too(story: Story) -> None:
    story.submit(1, hedge_after_s=AFTER_S)
    story.started("w1")
    story.receive(Chunks(NO_ID, (Chunk(key(1), 1, 0, 0, (), "!"),)))
    assert patience(story, 50.0) == []


def test_an_attempt_is_hedged_once(story: Story) -> None:
    hedged(story)
    story.error("busy", attempt=2)
    assert patience(story, 50.0) == []


def test_a_hedge_is_not_hedged(story: Story) -> None:
    hedged(story)
    story.started("other", attempt=2)
    assert patience(story, 50.0) == []
    story.error("worker_lost", attempt=1)
    assert patience(story, 50.0) == []


def test_every_attempt_may_be_hedged_and_a_resumed_one_carries_its_tokens(story: Story) -> None:
    story.submit(1, hedge_after_s=AFTER_S)
    story.started("w1")
    story.chunk(0, 2)
    assert not request(story.error("worker_lost", worker="w1")).envelope.hedge
    story.started("slow", attempt=2)
    second = request(patience(story, AFTER_S))
    assert (second.envelope.attempt, second.envelope.avoid) == (3, ("w1", "slow"))
    assert prior(second) is not None
    assert second.envelope.prior_tokens == 2
    assert story.chunk(2, attempt=3)[-1] == Deliver(key(1), make_chunk(2, attempt=3))


def test_a_reader_that_reads_nothing_makes_no_worker_late(story: Story) -> None:
    """The window is used up when the attempt begins: no token may come before the reader's next grant."""
    story.submit(1, window=2, hedge_after_s=AFTER_S)
    story.started("w1")
    story.chunk(0, 2)
    story.error("worker_lost")
    story.started("w2", attempt=2)
    assert patience(story, 50.0) == []
    assert grants(story.consume(1)) == [Credit(key(1), 2, 3)]
    assert len(requests(patience(story, AFTER_S))) == 1


def test_a_client_that_was_stopped_itself_finds_nobody_late(story: Story) -> None:
    story.submit(1, hedge_after_s=AFTER_S)
    story.started("w1")
    story.now += 50.0
    story.core.forgive(50.0)
    assert requests(story.tick()) == []
    assert len(requests(patience(story, AFTER_S))) == 1


def test_a_client_that_was_stopped_itself_finds_neither_of_both_silent() -> None:
    story = new_story(first_token_timeout_s=10.0)
    hedged(story)
    story.started("other", attempt=2)
    story.now += 50.0
    story.core.forgive(50.0)
    assert cancels(story.tick()) == []
    assert cancels(patience(story, 8.0)) == [Cancel(key(1), 1)]
    assert cancels(patience(story, 2.0)) == [Cancel(key(1), 2)]


@pytest.mark.parametrize(("max_attempts", "hedges"), [(1, 0), (2, 1)])
def test_a_hedge_that_would_be_one_attempt_too_many_is_not_made(max_attempts: int, hedges: int) -> None:
    story = new_story(max_attempts=max_attempts)
    story.submit(1, hedge_after_s=AFTER_S)
    story.started("slow")
    assert len(requests(patience(story, AFTER_S))) == hedges


def test_without_repair_a_late_worker_is_hedged_all_the_same(story: Story) -> None:
    hedged(story, resume=False)
    story.started("other", attempt=2)
    assert story.error("worker_lost", attempt=1) != []
    assert isinstance(failure(story.error("worker_lost", attempt=2)), WorkerLostError)


# The first to answer


@pytest.mark.parametrize(("winner", "loser"), [(1, 2), (2, 1)])
def test_the_first_chunk_wins_and_the_other_is_cancelled(story: Story, winner: int, loser: int) -> None:
    hedged(story)
    story.started("other", attempt=2)
    names = {1: "slow", 2: "other"}
    actions = story.chunk(0, 2, attempt=winner)
    assert sent(actions) == [Cancel(key(1), loser)]
    assert actions[-1] == Deliver(key(1), make_chunk(0, 2, attempt=winner))
    assert summary(told_attempts(actions)) == [
        (loser, names[loser], loser == 2, True, ""),
        (winner, names[winner], winner == 2, False, ""),
    ]
    assert story.chunk(2, attempt=winner) == [Deliver(key(1), make_chunk(2, attempt=winner))]
    end = story.finish(3, attempt=winner)
    assert sent(end) == []
    assert ending(end).reason is FinishReason.STOP
    assert [(attempt.number, attempt.cancelled) for attempt in told_attempts(end)] == [(loser, True), (winner, False)]


@pytest.mark.parametrize(("winner", "loser"), [(1, 2), (2, 1)])
def test_what_comes_late_of_the_loser_is_dropped(story: Story, winner: int, loser: int) -> None:
    hedged(story)
    story.chunk(0, attempt=winner)
    assert story.chunk(0, attempt=loser) == []
    assert story.chunk(1, attempt=loser) == []
    assert story.started("late", attempt=loser) == []
    assert story.error("worker_lost", attempt=loser) == []
    assert story.finish(0, attempt=loser) == []
    assert story.core.dropped == {"attempt": 5}
    assert story.chunk(1, attempt=winner) == [Deliver(key(1), make_chunk(1, attempt=winner))]


def test_both_in_one_message(story: Story) -> None:
    hedged(story)
    first, second = make_chunk(0, 2, attempt=2), make_chunk(0, 3, attempt=1)
    actions = story.receive(Chunks(NO_ID, (first, second)))
    assert [action for action in actions if isinstance(action, Deliver)] == [Deliver(key(1), first)]
    assert sent(actions) == [Cancel(key(1), 1)]


@pytest.mark.parametrize(("winner", "loser"), [(1, 2), (2, 1)])
def test_an_empty_completion_wins_by_its_finish(story: Story, winner: int, loser: int) -> None:
    hedged(story)
    story.started("other", attempt=2)
    actions = story.finish(0, attempt=winner)
    assert sent(actions) == [Cancel(key(1), loser)]
    assert ending(actions).worker == "worker-1"
    loser_name = {1: "slow", 2: "other"}[loser]
    assert summary(told_attempts(actions)) == [
        (loser, loser_name, loser == 2, True, ""),
        (winner, "worker-1", winner == 2, False, ""),
    ]
    assert story.finish(0, attempt=loser) == []


def test_the_winners_silence_is_watched_as_ever() -> None:
    story = new_story(inter_token_timeout_s=5.0)
    hedged(story)
    story.chunk(0, attempt=2)
    assert patience(story, 4.9) == []
    assert [type(message) for message in sent(patience(story, 0.2))] == [Cancel, Request]


def test_the_next_attempt_after_a_won_hedge_is_greater_than_both(story: Story) -> None:
    hedged(story)
    story.chunk(0, attempt=1)
    again = request(story.error("worker_lost", attempt=1, worker="slow"))
    assert (again.envelope.attempt, again.envelope.hedge, again.envelope.prior_tokens) == (3, False, 1)


# Faults of one


def test_a_refused_hedge_is_no_fault(story: Story) -> None:
    hedged(story)
    actions = story.error("busy", attempt=2, retry_after_s=30.0)
    assert sent(actions) == []
    assert summary(told_attempts(actions)) == [(2, "", True, True, ""), (1, "slow", False, False, "")]
    assert patience(story, 50.0) == []
    assert story.chunk(0) == [Deliver(key(1), make_chunk(0))]
    again = request(story.error("worker_lost", worker="slow"))
    assert (again.envelope.attempt, again.envelope.avoid) == (3, ("slow",))


def test_a_refused_hedge_counts_for_no_limit() -> None:
    story = new_story(max_attempts=2)
    hedged(story)
    story.error("busy", attempt=2)
    assert request(story.error("worker_lost", worker="slow")).envelope.attempt == 3


def test_a_refusal_that_names_no_attempt_is_about_the_hedge(story: Story) -> None:
    hedged(story)
    story.error("bad_request", attempt=0, retryable=False)
    assert story.chunk(0) == [Deliver(key(1), make_chunk(0))]


@pytest.mark.parametrize(("failed", "left"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("code", ["worker_lost", "engine_failed", "draining"])
def test_one_that_fails_leaves_the_other_alone(story: Story, failed: int, left: int, code: str) -> None:
    hedged(story)
    story.started("other", attempt=2)
    actions = story.error(code, attempt=failed, retryable=code != "engine_failed")
    assert sent(actions) == []
    names = {1: "slow", 2: "other"}
    assert summary(told_attempts(actions)) == [
        (failed, names[failed], failed == 2, False, code),
        (left, names[left], left == 2, False, ""),
    ]
    assert story.chunk(0, attempt=left) == [Deliver(key(1), make_chunk(0, attempt=left))]


def test_a_hedge_that_a_worker_refuses_has_failed_there(story: Story) -> None:
    hedged(story)
    story.started("other", attempt=2)
    story.error("busy", attempt=2, worker="other")
    again = request(story.error("worker_lost", attempt=1, worker="slow"))
    assert again.envelope.avoid == ("other", "slow")


def test_a_gap_in_one_is_told_to_its_worker_and_leaves_the_other_alone(story: Story) -> None:
    hedged(story)
    story.started("other", attempt=2)
    actions = story.chunk(3, attempt=2)
    assert sent(actions) == [Cancel(key(1), 2)]
    assert summary(told_attempts(actions)) == [
        (2, "other", True, False, "worker_lost"),
        (1, "slow", False, False, ""),
    ]
    assert story.chunk(0) == [Deliver(key(1), make_chunk(0))]


def test_an_end_that_counts_what_never_came_is_a_fault_of_one(story: Story) -> None:
    hedged(story)
    assert sent(story.finish(5, attempt=2)) == []  # it is over there
    assert story.chunk(0) == [Deliver(key(1), make_chunk(0))]


def test_each_has_its_own_time_for_a_first_token() -> None:
    story = new_story(first_token_timeout_s=10.0)
    hedged(story)
    story.started("other", attempt=2)  # two seconds after the first one
    actions = patience(story, 8.0)
    assert sent(actions) == [Cancel(key(1), 1)]
    assert summary(told_attempts(actions))[0] == (1, "slow", False, False, "first_token_timeout")
    actions = patience(story, 2.0)
    assert cancels(actions) == [Cancel(key(1), 2)]
    assert request(actions).envelope.avoid == ("slow", "other")
    assert isinstance(told_attempts(actions)[1].error, FirstTokenTimeoutError)


def test_both_may_fall_silent_at_one_moment() -> None:
    story = new_story(first_token_timeout_s=10.0)
    hedged(story)
    story.started("other", attempt=2)
    story.now += 12.0
    heartbeats(story)
    actions = story.tick()
    assert cancels(actions) == [Cancel(key(1), 1), Cancel(key(1), 2)]
    assert request(actions).envelope.attempt == 3


# Faults of both


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_when_both_have_failed_the_next_attempt_avoids_both(story: Story, order: tuple[int, int]) -> None:
    hedged(story)
    story.started("other", attempt=2)
    names = {1: "slow", 2: "other"}
    first, second = order
    assert requests(story.error("worker_lost", attempt=first, worker=names[first])) == []
    again = request(story.error("worker_lost", attempt=second, worker=names[second]))
    assert (again.envelope.attempt, again.envelope.hedge) == (3, False)
    assert again.envelope.avoid == (names[first], names[second])
    story.started("third", attempt=3)
    assert story.chunk(0, attempt=3)[-1] == Deliver(key(1), make_chunk(0, attempt=3))


def test_a_hedge_refused_after_the_first_has_failed_is_tried_again_as_any_request(story: Story) -> None:
    hedged(story)
    story.error("worker_lost", attempt=1, worker="slow")
    again = request(story.error("busy", attempt=2))
    assert (again.envelope.attempt, again.envelope.hedge, again.envelope.avoid) == (3, False, ("slow",))


def test_both_count_for_the_attempts_that_workers_had() -> None:
    story = new_story(max_attempts=2)
    hedged(story)
    story.started("other", attempt=2)
    story.error("worker_lost", attempt=1)
    actions = story.error("worker_lost", attempt=2)
    assert "that was the last of 2 attempts" in failure(actions).message
    assert [attempt.error is None for attempt in told_attempts(actions)] == [False, False]


def test_the_slower_one_that_was_cancelled_counts_not() -> None:
    story = new_story(max_attempts=2)
    hedged(story)
    story.started("other", attempt=2)
    story.chunk(0, attempt=2)
    assert request(story.error("worker_lost", attempt=2)).envelope.attempt == 3


def test_what_broke_a_stream_is_told_past_a_refused_hedge(story: Story) -> None:
    story.submit(1, hedge_after_s=AFTER_S)
    story.started("w1")
    story.chunk(0)
    story.error("worker_lost")
    story.started("slow", attempt=2)
    patience(story, AFTER_S)
    story.error("busy", attempt=3)
    error = failure(story.error("cannot_resume", attempt=2, retryable=False))
    assert isinstance(error, CannotResumeError)
    assert error.message == "it was cannot_resume; it broke because: it was worker_lost"


def test_a_lost_session_ends_both_and_the_next_attempt_is_one(story: Story) -> None:
    hedged(story)
    story.started("other", attempt=2)
    actions = story.lose(ONE)
    ((endpoint, again),) = requests(actions)
    assert endpoint == TWO
    assert (again.envelope.attempt, again.envelope.hedge, again.envelope.avoid) == (3, False, ())
    first, second, third = told_attempts(actions)
    assert isinstance(first.error, BrokerLostError)
    assert isinstance(second.error, BrokerLostError)
    assert (third.number, third.error) == (3, None)
    assert story.chunk(0, attempt=1) == []
    assert story.chunk(0, attempt=2, at=TWO) == []
    assert story.chunk(0, attempt=3, at=TWO) == [Deliver(key(1), make_chunk(0, attempt=3))]


def test_a_deadline_that_the_broker_tells_comes_for_each(story: Story) -> None:
    hedged(story, deadline_s=10.0)
    patience(story, 8.0)
    assert sent(story.error("deadline", attempt=1, retryable=False)) == []
    assert isinstance(failure(story.error("deadline", attempt=2, retryable=False)), DeadlineError)


def test_a_deadline_that_the_broker_does_not_tell_cancels_both(story: Story) -> None:
    hedged(story, deadline_s=10.0)
    assert patience(story, 8.0) == []
    actions = patience(story, 2 * DEADLINE_SLACK_S)
    assert sent(actions) == [Cancel(key(1), 1), Cancel(key(1), 2)]
    assert isinstance(failure(actions), DeadlineError)


# Readers


def test_a_reader_that_cancels_cancels_both(story: Story) -> None:
    hedged(story)
    actions = story.cancel()
    assert sent(actions) == [Cancel(key(1), 1), Cancel(key(1), 2)]
    assert ending(actions).reason is FinishReason.CANCELLED
    assert story.finish(0, attempt=2) == []


def resumed_and_hedged(story: Story) -> Request:
    """A stream whose window is half read when its second attempt is late; return the hedge."""
    story.submit(1, window=4, hedge_after_s=AFTER_S)
    story.started("w1")
    story.chunk(0, 3)
    story.error("worker_lost")
    story.started("slow", attempt=2)
    return request(patience(story, AFTER_S))


def test_credit_goes_to_both(story: Story) -> None:
    assert resumed_and_hedged(story).envelope.credit == 4
    assert grants(story.consume(2)) == [Credit(key(1), 2, 6), Credit(key(1), 3, 6)]
    story.chunk(3, attempt=3)
    assert grants(story.consume(2)) == [Credit(key(1), 3, 8)]


def test_a_hedge_that_took_the_newest_credit_along_leaves_the_grant_to_the_other(story: Story) -> None:
    story.submit(1, window=4, hedge_after_s=AFTER_S)
    story.started("w1")
    story.chunk(0, 3)
    story.error("worker_lost")
    story.started("slow", attempt=2)
    limit = story.windows[key(1)].consume(2)  # the reader's grant is still on its way to the I/O thread
    assert limit == 6
    assert request(patience(story, AFTER_S)).envelope.credit == 6
    assert grants(story.handle(Grant(key(1), 6))) == [Credit(key(1), 2, 6)]


def test_a_busy_cluster_is_asked_once_an_attempt_and_streams_go_on(story: Story) -> None:
    """Refusals of hedges neither slow a stream down nor end it."""
    story.submit(1, hedge_after_s=AFTER_S)
    attempt = 1
    for _ in range(3):
        story.started("w", attempt=attempt)
        second = request(patience(story, AFTER_S))
        assert second.envelope.hedge
        assert told_attempts(story.error("busy", attempt=attempt + 1))[-1].number == attempt
        position = story.windows[key(1)].received
        story.chunk(position, attempt=attempt)
        again = request(story.error("worker_lost", attempt=attempt))
        attempt += 2
        assert again.envelope.attempt == attempt
    error = failure(story.error("busy", attempt=attempt, retryable=False))
    assert isinstance(error, BusyError)
