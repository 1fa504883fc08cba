"""Faults and their repair: which lead to another attempt, what it carries, where it goes, and when it is the last."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise

import pytest

from tokenmq.client.events import Action, Attempt, Attempted, Close, CloseSocket, Deliver, Ended, Grant, Send
from tokenmq.client.exchange import DEADLINE_SLACK_S
from tokenmq.client.recovery import MAX_PAUSE_S, PAUSE_S, pause_s
from tokenmq.protocol import limits
from tokenmq.protocol.errors import (
    BadRequestError,
    BrokerLostError,
    BusyError,
    CannotResumeError,
    ClientClosedError,
    DeadlineError,
    DrainingError,
    FirstTokenTimeoutError,
    InterTokenTimeoutError,
    ModelNotFoundError,
    NoBrokerError,
    NoWorkerError,
    WorkerLostError,
)
from tokenmq.protocol.messages import (
    NO_ID,
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Draining,
    Error,
    FinishReason,
    Goodbye,
    Heartbeat,
    Message,
    Request,
    Started,
)
from tokenmq.protocol.payload import Generation, Prior, pack_generation, unpack_generation

from .story import (
    ONE,
    PAYLOAD,
    TWO,
    Story,
    ended,
    ending,
    failure,
    grants,
    heartbeats,
    history,
    key,
    make_chunk,
    patience,
    prior,
    request,
    requests,
    sent,
)


@pytest.fixture
def story() -> Story:
    """Two brokers, both there."""
    story = Story(ONE, TWO)
    story.open_sessions()
    return story


# What the next attempt carries


def test_the_next_attempt_carries_what_has_come(story: Story) -> None:
    first = request(story.submit(1, window=8))
    assert prior(first) is None
    story.started("w1")
    story.chunk(0, 3)
    story.chunk(3, 2)
    actions = story.error("worker_lost", worker="w1")
    again = request(actions)
    assert again.id == first.id
    assert again.attachments == first.attachments
    assert again.envelope.attempt == 2
    assert again.envelope.avoid == ("w1",)
    assert prior(again) == Prior((0, 1, 2, 3, 4), 5)
    before, after = unpack_generation(first.payload), unpack_generation(again.payload)
    assert (after.prompt, after.sampling) == (before.prompt, before.sampling)


def test_without_a_token_the_request_is_as_it_was(story: Story) -> None:
    story.submit(1)
    again = request(story.error("worker_lost"))
    assert again.payload == PAYLOAD
    assert (again.envelope.attempt, again.envelope.prior_tokens) == (2, 0)


def test_text_counts_in_characters_with_what_came_without_tokens(story: Story) -> None:
    story.submit(1)
    story.receive(Chunks(NO_ID, (Chunk(key(1), 1, 0, 0, (7, 8), "größe 🌊"), Chunk(key(1), 1, 0, 2, (), "!"))))
    assert prior(request(story.error())) == Prior((7, 8), 8)


def test_tokens_go_on_where_they_stopped(story: Story) -> None:
    story.submit(1)
    story.chunk(0, 2)
    story.error()
    story.started("w2", attempt=2)
    assert story.chunk(2, 2, attempt=2) == [Deliver(key(1), make_chunk(2, 2, attempt=2))]
    end = ended(story.finish(4, attempt=2))
    assert [(a.number, a.worker, a.first_token, a.error is None) for a in end.attempts] == [
        (1, "", 0, False),
        (2, "worker-1", 2, True),
    ]


def test_a_worker_that_begins_again_at_the_start_is_not_heard(story: Story) -> None:
    story.submit(1)
    story.chunk(0, 2)
    story.error()
    assert story.chunk(0, 2, attempt=2) == []
    assert story.core.dropped == {"repeat": 1}


def test_every_attempt_carries_all_tokens_of_all_attempts(story: Story) -> None:
    story.submit(1)
    for attempt in range(1, 6):
        story.chunk(attempt - 1, attempt=attempt)
        again = request(story.error(attempt=attempt))
        assert again.envelope.attempt == attempt + 1
        assert prior(again) == Prior(tuple(range(attempt)), attempt)


def test_the_next_attempt_takes_the_present_credit(story: Story) -> None:
    story.submit(1, window=4)
    story.chunk(0, 4)
    story.windows[key(1)].consume(3)  # the reader's grant of 7 is still on its way to the I/O thread
    again = request(story.error())
    assert again.envelope.credit == 7
    assert story.handle(Grant(key(1), 7)) == []
    story.chunk(4, attempt=2)
    assert grants(story.consume(2)) == [Credit(key(1), 2, 9)]


def test_the_deadline_that_leaves_again_is_what_is_left_of_it(story: Story) -> None:
    story.submit(1, deadline_s=10.0)
    story.now += 4.0
    assert request(story.error()).envelope.deadline_s == pytest.approx(6.0)


def test_every_attempt_may_wait_in_the_queue_for_the_queue_timeout() -> None:
    story = Story(queue_timeout_s=3.0)
    story.open_sessions()
    assert request(story.submit(1)).envelope.queue_s == 3.0
    story.now += 2.0
    assert request(story.error()).envelope.queue_s == 3.0


# Kinds of faults


def gap(story: Story) -> list[Action]:
    return story.chunk(5)


def overlap(story: Story) -> list[Action]:
    return story.chunk(1, 3)


@pytest.mark.parametrize("fault", [gap, overlap])
def test_a_gap_or_an_overlap_is_told_to_the_worker_and_repaired(
    story: Story, fault: Callable[[Story], list[Action]]
) -> None:
    story.submit(1)
    story.started("w1")
    story.chunk(0, 2)
    cancel, resumed, send = fault(story)
    assert cancel == Send(ONE, Cancel(key(1), 1))
    assert isinstance(resumed, Attempted)
    assert isinstance(resumed.attempts[0].error, WorkerLostError)
    assert isinstance(send, Send)
    assert isinstance(send.message, Request)
    assert prior(send.message) == Prior((0, 1), 2)
    assert send.message.envelope.avoid == ("w1",)


def test_an_end_that_counts_more_is_repaired(story: Story) -> None:
    story.submit(1)
    story.chunk(0, 2)
    actions = story.finish(3)
    assert Cancel(key(1), 1) not in sent(actions)  # it is over there
    assert prior(request(actions)) == Prior((0, 1), 2)
    assert story.finish(2, attempt=2)


def test_a_lost_session_is_repaired_at_the_next_broker_and_blames_no_worker(story: Story) -> None:
    story.submit(1)
    story.started("w1")
    story.chunk(0, 2)
    actions = story.lose(ONE)
    ((endpoint, again),) = requests(actions)
    assert endpoint == TWO
    assert prior(again) == Prior((0, 1), 2)
    assert again.envelope.avoid == ()
    first, second = history(actions)
    assert (first.number, first.broker, first.worker, first.first_token) == (1, ONE, "w1", 0)
    assert isinstance(first.error, BrokerLostError)
    assert second == Attempt(2, first_token=2)
    assert story.chunk(2, attempt=2, at=TWO) == [Deliver(key(1), make_chunk(2, attempt=2))]


@pytest.mark.parametrize("how", ["goodbye", "expired", "counts"])
def test_however_a_session_ends_its_streams_go_on(story: Story, how: str) -> None:
    story.submit(1)
    story.chunk(0)
    if how == "goodbye":
        actions = story.receive(Goodbye(), ONE)
    elif how == "counts":
        actions = story.receive(Heartbeat(sent=77), ONE)
    else:
        story.now += 4.5
        story.receive(Heartbeat(sent=1), TWO)
        actions = story.tick(0.6)
    assert [endpoint for endpoint, _ in requests(actions)] == [TWO]


def test_when_all_sessions_end_at_one_moment_no_attempt_is_wasted_on_a_dead_one(story: Story) -> None:
    story.submit(1)
    story.chunk(0)
    actions = story.tick(5.0)
    assert requests(actions) == []
    assert {action.endpoint for action in actions if isinstance(action, CloseSocket)} == {ONE, TWO}
    assert request(story.reopen(TWO)).envelope.attempt == 2


def test_a_final_error_ends_the_stream(story: Story) -> None:
    story.submit(1)
    story.chunk(0)
    actions = story.error("model_not_found", retryable=False)
    assert sent(actions) == []
    error = failure(actions)
    assert isinstance(error, ModelNotFoundError)
    assert history(actions) == (Attempt(1, ONE, "", 0, error),)


def test_a_log_line_tells_of_each_repair(story: Story) -> None:
    story.submit(1)
    story.error("busy")
    (line,) = [log for log in story.logs if log.event == "request_resumed"]
    assert line.level == logging.WARNING
    assert line.request_id == key(1)
    assert line.fields["code"] == "busy"
    assert line.fields["attempt"] == 2


# Silence


def test_silence_in_the_queue_is_not_the_workers(story: Story) -> None:
    story.submit(1)
    assert patience(story, 400.0) == []


@pytest.mark.parametrize("limit_s", [0.5, 30.0])
def test_a_worker_without_a_first_token_is_left(limit_s: float) -> None:
    story = Story(first_token_timeout_s=limit_s, inter_token_timeout_s=None)
    story.open_sessions()
    story.submit(1)
    patience(story, 100.0)
    story.started("w1")
    assert patience(story, limit_s - 0.1) == []
    actions = patience(story, 0.2)
    assert [type(message) for message in sent(actions)] == [Cancel, Request]
    assert request(actions).envelope.avoid == ("w1",)
    error = history(actions)[0].error
    assert isinstance(error, FirstTokenTimeoutError)
    assert error.message == f"worker w1 brought no first token for {limit_s:g} s"


def test_a_worker_that_stops_between_tokens_is_left() -> None:
    story = Story(first_token_timeout_s=None, inter_token_timeout_s=10.0)
    story.open_sessions()
    story.submit(1)
    story.started("w1")
    assert patience(story, 100.0) == []
    for offset in range(3):
        story.chunk(offset)
        assert patience(story, 9.9) == []
    actions = patience(story, 0.2)
    assert prior(request(actions)) == Prior((0, 1, 2), 3)
    error = history(actions)[0].error
    assert isinstance(error, InterTokenTimeoutError)
    assert error.message == "worker w1 brought no token for 10 s"


def test_the_first_token_of_the_next_attempt_has_the_time_of_a_first_token() -> None:
    story = Story(first_token_timeout_s=20.0, inter_token_timeout_s=5.0)
    story.open_sessions()
    story.submit(1)
    story.chunk(0)
    story.error()
    story.started("w2", attempt=2)
    assert patience(story, 19.5) == []
    assert [type(message) for message in sent(patience(story, 1.0))] == [Cancel, Request]


def test_a_chunk_without_started_is_a_sign_of_the_worker_too() -> None:
    story = Story(inter_token_timeout_s=5.0)
    story.open_sessions()
    story.submit(1)
    story.chunk(0)
    assert patience(story, 4.5) == []
    assert request(patience(story, 1.0)).envelope.attempt == 2


def test_started_that_is_said_again_gives_no_more_time() -> None:
    story = Story(first_token_timeout_s=5.0)
    story.open_sessions()
    story.submit(1)
    actions: list[Action] = []
    for _ in range(6):
        story.started("w1")
        actions += patience(story, 1.0)
    assert request(actions).envelope.attempt == 2


def test_repeats_are_no_tokens() -> None:
    story = Story(inter_token_timeout_s=5.0)
    story.open_sessions()
    story.submit(1)
    story.chunk(0)
    actions: list[Action] = []
    for _ in range(6):
        actions += patience(story, 1.0)
        story.chunk(0)
    assert request(actions).envelope.attempt == 2


def test_a_used_up_window_gives_the_worker_nothing_to_say_until_the_grant() -> None:
    story = Story(inter_token_timeout_s=5.0)
    story.open_sessions()
    story.submit(1, window=4)
    story.started("w1")
    story.chunk(0, 4)
    assert patience(story, 100.0) == []
    assert grants(story.consume(2)) == [Credit(key(1), 1, 6)]
    assert patience(story, 4.9) == []
    actions = patience(story, 0.2)
    assert isinstance(history(actions)[0].error, InterTokenTimeoutError)
    assert request(actions).envelope.credit == 6


def test_a_grant_while_the_window_is_open_gives_the_worker_no_more_time() -> None:
    story = Story(inter_token_timeout_s=5.0)
    story.open_sessions()
    story.submit(1, window=4)
    story.chunk(0, 3)
    patience(story, 4.0)
    assert grants(story.consume(2)) == [Credit(key(1), 1, 6)]
    assert request(patience(story, 1.1)).envelope.attempt == 2


def test_grants_leave_no_trace_in_the_timers() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1, window=1)
    story.started("w1")
    for offset in range(2000):
        story.chunk(offset, 1)
        assert grants(story.consume(1))
    assert len(story.core._exchange._timers._heap) < 100


def test_no_timeouts_no_giving_up() -> None:
    story = Story(first_token_timeout_s=None, inter_token_timeout_s=None)
    story.open_sessions()
    story.submit(1)
    story.started("w1")
    assert patience(story, 1000.0) == []
    story.chunk(0)
    assert patience(story, 1000.0) == []


def test_a_client_that_was_stopped_itself_gives_nobody_up(story: Story) -> None:
    story.submit(1)
    story.started("w1")
    story.chunk(0)
    story.now += 300.0
    story.core.forgive(300.0)
    assert CloseSocket(ONE) not in (actions := story.tick())
    assert requests(actions) == []
    assert patience(story, 59.0) == []
    assert len(requests(patience(story, 2.0))) == 1


# Pauses


def random(value: float) -> Callable[[], float]:
    return lambda: value


def test_the_first_repair_is_at_once() -> None:
    assert pause_s(0, None, random(1.0)) == 0.0
    assert pause_s(1, None, random(1.0)) == 0.0


def test_pauses_grow_up_to_a_bound() -> None:
    pauses = [pause_s(barren, None, random(1.0)) for barren in range(2, 12)]
    assert pauses[:4] == pytest.approx([PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S])
    assert pauses[-1] == MAX_PAUSE_S
    assert pause_s(10**6, None, random(1.0)) == MAX_PAUSE_S


@pytest.mark.parametrize("drawn", [0.0, 0.3, 1.0])
def test_jitter_takes_up_to_half_and_adds_to_what_was_asked_for(drawn: float) -> None:
    assert pause_s(2, None, random(drawn)) == pytest.approx(PAUSE_S * (0.5 + drawn / 2))
    assert pause_s(0, 4.0, random(drawn)) == pytest.approx(4.0 + drawn)
    assert pause_s(20, 0.1, random(drawn)) == pytest.approx(MAX_PAUSE_S * (0.5 + drawn / 2))


def test_attempts_without_a_token_are_repaired_ever_more_slowly(story: Story) -> None:
    story.submit(1)
    left = [story.now]
    for attempt in range(1, 6):
        actions = story.error("no_worker", attempt=attempt)
        while not requests(actions):
            heartbeats(story)
            actions = story.sleep()
        left.append(story.now)
    gaps = [later - earlier for earlier, later in pairwise(left)]
    assert gaps == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.4])


def test_a_token_ends_the_pauses(story: Story) -> None:
    story.submit(1)
    for attempt in range(1, 4):
        story.error("no_worker", attempt=attempt)
        story.tick(1.0)
    story.chunk(0, attempt=4)
    assert request(story.error("worker_lost", attempt=4)).envelope.attempt == 5


def test_the_sender_of_the_error_may_ask_for_a_pause(story: Story) -> None:
    story.submit(1)
    (resumed,) = story.error("busy", retry_after_s=2.0)
    assert isinstance(resumed, Attempted)
    assert patience(story, 2.4) == []
    assert request(patience(story, 0.2)).envelope.attempt == 2


def test_nothing_counts_while_a_request_rests(story: Story) -> None:
    story.submit(1)
    story.error("busy", retry_after_s=2.0)
    for attempt in (1, 2):
        assert story.chunk(0, attempt=attempt) == []
        assert story.error(attempt=attempt) == []
        assert story.finish(0, attempt=attempt) == []
        assert story.started(attempt=attempt) == []
    assert story.error(attempt=0) == []
    assert story.core.dropped == {"attempt": 9}


# Where attempts go


def test_fail_over_to_the_second_broker_and_back(story: Story) -> None:
    story.submit(1)
    story.chunk(0)
    assert requests(story.lose(ONE))[0][0] == TWO
    assert requests(story.submit(2))[0][0] == TWO
    story.reopen(ONE)
    assert requests(story.submit(3))[0][0] == ONE  # new ones go to the preferred broker as soon as it is back
    story.chunk(1, attempt=2, at=TWO)  # those that run stay where they are
    ((endpoint, again),) = requests(story.error(attempt=2, at=TWO))
    assert endpoint == ONE
    assert (again.envelope.attempt, prior(again)) == (3, Prior((0, 1), 2))


def test_without_any_broker_a_stream_waits_for_one(story: Story) -> None:
    story.submit(1)
    story.chunk(0)
    story.receive(Goodbye(), TWO)
    assert requests(story.lose(ONE)) == []
    assert prior(request(story.reopen(TWO))) == Prior((0,), 1)


def test_a_stream_waits_for_a_broker_for_the_recovery_timeout_at_most() -> None:
    story = Story(connect_timeout_s=1.0, recovery_timeout_s=3.0)
    story.open_sessions()
    story.submit(1)
    story.chunk(0)
    story.lose()
    story.now += 2.9
    assert not [a for a in story.tick() if isinstance(a, Ended)]
    error = failure(story.tick(0.2))
    assert isinstance(error, NoBrokerError)
    assert error.retryable
    assert error.message.startswith("no broker answered within 3 s; tried ")
    assert "; it broke because: the session with the broker at " in error.message


def test_a_broker_that_drains_gets_no_new_requests_and_keeps_those_that_it_has(story: Story) -> None:
    story.submit(1)
    assert story.receive(Draining(), ONE) == []
    assert requests(story.submit(2))[0][0] == TWO
    assert story.chunk(0) == [Deliver(key(1), make_chunk(0))]
    assert ending(story.finish(1)).reason is FinishReason.STOP


def test_what_a_draining_broker_refuses_goes_elsewhere(story: Story) -> None:
    story.submit(1)
    story.receive(Draining(), ONE)
    assert requests(story.error("draining"))[0][0] == TWO


def test_when_all_brokers_drain_requests_wait_for_the_connect_timeout(story: Story) -> None:
    story.receive(Draining(), ONE)
    story.receive(Draining(), TWO)
    assert story.submit(1) == []
    patience(story, 4.9)
    error = failure(patience(story, 0.2))
    assert isinstance(error, DrainingError)
    assert error.retryable
    assert ONE in error.message


def test_a_broker_that_has_drained_and_come_back_takes_requests_again(story: Story) -> None:
    story.receive(Draining(), ONE)
    story.receive(Draining(), TWO)
    story.submit(1)
    story.receive(Goodbye(), ONE)
    assert requests(story.reopen(ONE))[0][0] == ONE


# Limits


def test_attempts_are_bounded() -> None:
    story = Story(max_attempts=3)
    story.open_sessions()
    story.submit(1)
    story.chunk(0)
    story.error(attempt=1)
    story.error(attempt=2, worker="w1")
    until_sent(story, story.error("busy", attempt=3))  # no worker had it: it does not count
    story.started(attempt=4)
    actions = story.error("draining", attempt=4)
    error = failure(actions)
    assert isinstance(error, DrainingError)
    assert error.retryable
    assert str(error) == error.message == "it was draining (that was the last of 3 attempts)"
    assert [attempt.number for attempt in history(actions)] == [1, 2, 3, 4]


def refused(story: Story, seconds: float, attempt: int = 1) -> tuple[int, list[Action]]:
    """Refuse attempt after attempt for so long, or to the end; return the attempt that is under way, or that end."""
    end = story.now + seconds
    while story.now < end:
        actions = story.error("no_worker", attempt=attempt)
        if [action for action in actions if isinstance(action, Ended)]:
            return attempt, actions
        until_sent(story, actions)
        attempt += 1
    return attempt, []


def until_sent(story: Story, actions: list[Action]) -> None:
    """Let time pass until the next attempt has left, if it has not left with these actions."""
    while not requests(actions):
        heartbeats(story)
        actions = story.sleep()


def test_a_request_that_nobody_takes_is_given_up_after_the_recovery_timeout() -> None:
    story = Story(recovery_timeout_s=30.0)
    story.open_sessions()
    story.submit(1)
    story.chunk(0)
    story.error(attempt=1)
    begun = story.now
    _, actions = refused(story, 60.0, attempt=2)
    error = failure(actions)
    assert isinstance(error, NoWorkerError)
    assert "nobody has taken the request for" in error.message
    assert 30.0 - MAX_PAUSE_S <= story.now - begun <= 30.0


def test_a_worker_that_takes_it_ends_the_outage() -> None:
    story = Story(recovery_timeout_s=30.0)
    story.open_sessions()
    story.submit(1)
    attempt, _ = refused(story, 20.0)
    story.started(attempt=attempt)
    until_sent(story, story.error(attempt=attempt))
    _, end = refused(story, 20.0, attempt=attempt + 1)
    assert not end


def test_waiting_in_a_brokers_queue_is_no_outage() -> None:
    story = Story(recovery_timeout_s=10.0)
    story.open_sessions()
    story.submit(1)
    attempt, _ = refused(story, 3.0)
    patience(story, 12.0)
    assert not [a for a in story.error("no_worker", attempt=attempt) if isinstance(a, Ended)]


def test_a_model_that_was_served_is_not_unknown() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1)
    story.started()
    story.chunk(0)
    story.error(attempt=1)
    assert not [a for a in story.error("model_not_found", attempt=2, retryable=False) if isinstance(a, Ended)]
    story.submit(2)
    assert isinstance(failure(story.error("model_not_found", number=2, retryable=False)), ModelNotFoundError)


def test_one_attempt_is_one_attempt() -> None:
    story = Story(max_attempts=1)
    story.open_sessions()
    story.submit(1)
    story.started()
    assert isinstance(failure(story.error()), WorkerLostError)


def test_the_last_silence_is_told_by_its_own_code() -> None:
    story = Story(max_attempts=1, first_token_timeout_s=2.0)
    story.open_sessions()
    story.submit(1)
    story.started()
    actions = patience(story, 2.1)
    assert sent(actions) == [Cancel(key(1), 1)]
    assert isinstance(failure(actions), FirstTokenTimeoutError)


def test_the_deadline_ends_a_request_that_waits(story: Story) -> None:
    story.submit(1, deadline_s=3.0)
    story.chunk(0)
    story.receive(Goodbye(), TWO)
    story.lose(ONE)
    error = failure(story.tick(3.0))
    assert isinstance(error, DeadlineError)
    assert "passed after 1 attempts; the last one: the session with the broker" in error.message


def test_the_deadline_ends_a_request_that_rests(story: Story) -> None:
    """The pause fits in before the deadline, but the client comes late to its end."""
    story.submit(1, deadline_s=3.0)
    story.error("busy", retry_after_s=2.0)
    actions = story.tick(3.5)
    assert requests(actions) == []
    error = failure(actions)
    assert isinstance(error, DeadlineError)
    assert "it was busy" in error.message


def test_the_deadline_ends_a_request_that_has_been_sent_and_the_broker_says_nothing(story: Story) -> None:
    story.submit(1, deadline_s=3.0)
    story.error()
    assert patience(story, 3.0 + DEADLINE_SLACK_S / 2) == []
    actions = patience(story, DEADLINE_SLACK_S)
    assert sent(actions) == [Cancel(key(1), 2)]
    error = failure(actions)
    assert isinstance(error, DeadlineError)
    assert "the broker did not say so" in error.message


def test_a_pause_that_would_outlast_the_deadline_is_not_begun(story: Story) -> None:
    story.submit(1, deadline_s=3.0)
    error = failure(story.error("busy", retry_after_s=3.0))
    assert isinstance(error, BusyError)


def test_a_fault_after_the_deadline_is_not_repaired(story: Story) -> None:
    story.submit(1, deadline_s=3.0)
    story.chunk(0)
    story.now += 3.0
    assert isinstance(failure(story.error()), WorkerLostError)


def test_nothing_is_repaired_where_the_request_says_so(story: Story) -> None:
    story.submit(1, resume=False)
    story.chunk(0)
    error = failure(story.lose(ONE))
    assert isinstance(error, BrokerLostError)
    assert error.retryable


def test_without_repair_a_silent_worker_is_still_told_of(story: Story) -> None:
    story.submit(1, resume=False)
    story.started("w1")
    actions = patience(story, 121.0)
    assert sent(actions) == [Cancel(key(1), 1)]
    assert isinstance(failure(actions), FirstTokenTimeoutError)


def test_where_one_worker_cannot_resume_another_may(story: Story) -> None:
    story.submit(1)
    story.chunk(0)
    story.error("worker_lost")
    ((_, request),) = requests(story.error("cannot_resume", attempt=2, retryable=True, worker="small"))
    assert (request.envelope.attempt, request.envelope.avoid) == (3, ("small",))


def test_where_no_worker_resumes_the_error_says_what_broke_the_stream(story: Story) -> None:
    story.submit(1)
    story.chunk(0)
    story.error("worker_lost")
    actions = story.error("cannot_resume", attempt=2, retryable=False)
    error = failure(actions)
    assert isinstance(error, CannotResumeError)
    assert error.message == "it was cannot_resume; it broke because: it was worker_lost"
    assert len(history(actions)) == 2


LARGE = pack_generation(Generation(prompt="\N{WATER WAVE}" * (limits.MAX_PROMPT_CHARS - 1000)))
FRAMES = (b"x" * limits.MAX_FRAME_BYTES, b"y" * (limits.MAX_FRAME_BYTES - 20_000))


@pytest.mark.parametrize(
    ("payload", "attachments", "tokens"), [(LARGE, (), 200_000), (PAYLOAD, FRAMES, 1000)], ids=["payload", "message"]
)
def test_tokens_that_make_the_request_too_large_end_the_stream(
    story: Story, payload: bytes, attachments: tuple[bytes, ...], tokens: int
) -> None:
    assert requests(story.submit(1, window=tokens, payload=payload, attachments=attachments))
    story.receive(Chunks(NO_ID, (Chunk(key(1), 1, 0, 0, (100_000,) * tokens, "x"),)))
    actions = story.error()
    assert requests(actions) == []
    error = failure([action for action in actions if not isinstance(action, Attempted)])
    assert isinstance(error, CannotResumeError)
    assert "are allowed; it broke because: it was worker_lost" in error.message


# Workers to avoid


def test_the_latest_failed_workers_are_avoided_each_once() -> None:
    story = Story(max_attempts=100)
    story.open_sessions()
    story.submit(1, window=100)
    names = [f"w{number}" for number in (1, 2, 1, *range(3, 25))]
    for attempt, name in enumerate(names, 1):
        story.started(name, attempt=attempt)
        again = request(story.error(attempt=attempt, worker=name) + patience(story, MAX_PAUSE_S))
        if attempt == 3:
            assert again.envelope.avoid == ("w2", "w1")
    assert again.envelope.avoid == tuple(f"w{number}" for number in range(9, 25))
    assert len(again.envelope.avoid) == limits.MAX_AVOIDED


def test_workers_that_failed_before_the_last_token_are_avoided_no_more(story: Story) -> None:
    story.submit(1)
    story.started("w1")
    story.chunk(0, 2)
    assert request(story.error(worker="w1")).envelope.avoid == ("w1",)
    story.started("w2", attempt=2)
    story.chunk(2, attempt=2)
    assert request(story.error(attempt=2, worker="w2")).envelope.avoid == ("w2",)


def test_the_worker_that_an_error_names_is_avoided(story: Story) -> None:
    story.submit(1)
    assert request(story.error(worker="w7")).envelope.avoid == ("w7",)


@pytest.mark.parametrize("drained", ["broker", "worker"])
def test_a_worker_is_not_avoided_for_a_drain(story: Story, drained: str) -> None:
    story.submit(1)
    story.started("w1")
    story.chunk(0, 2)
    if drained == "broker":
        story.receive(Draining())
    assert request(story.error("draining", worker="w1")).envelope.avoid == ()


# History


def test_resumed_tells_of_every_attempt_so_far(story: Story) -> None:
    story.submit(1)
    story.started("w1")
    story.chunk(0, 2)
    (first, second) = history(story.error("worker_lost"))
    assert (first.number, first.broker, first.worker, first.first_token) == (1, ONE, "w1", 0)
    assert isinstance(first.error, WorkerLostError)
    assert second == Attempt(2, "", "", 2)
    assert history(story.lose(ONE))[1].broker == ONE


def test_a_stream_without_faults_has_one_attempt(story: Story) -> None:
    story.submit(1)
    story.started("w1")
    assert history(story.finish(0)) == (Attempt(1, ONE, "worker-1"),)


# The end, in each place


def waits(story: Story) -> None:
    story.receive(Goodbye(), TWO)
    story.lose(ONE)


def rests(story: Story) -> None:
    story.error("busy", retry_after_s=2.0)


def runs(story: Story) -> None:
    story.error("worker_lost")


@pytest.mark.parametrize(("place", "said"), [(waits, []), (rests, []), (runs, [Cancel(key(1), 2)])])
def test_cancel(story: Story, place: Callable[[Story], None], said: list[Message]) -> None:
    story.submit(1)
    place(story)
    actions = story.cancel()
    assert sent(actions) == said
    assert ending(actions).reason is FinishReason.CANCELLED
    assert history(actions)[-1].number == 2
    assert story.cancel() == []
    assert story.finish(0, attempt=2) == []
    later = patience(story, 20.0)
    assert requests(later) == []
    assert not [action for action in later if isinstance(action, Ended)]


@pytest.mark.parametrize("place", [waits, rests, runs])
def test_close(story: Story, place: Callable[[Story], None]) -> None:
    story.submit(1)
    place(story)
    actions = story.handle(Close())
    assert isinstance(failure(actions), ClientClosedError)
    assert requests(actions) == []
    assert story.core.next_deadline() is None


def test_what_comes_of_an_older_attempt_is_dropped(story: Story) -> None:
    story.submit(1)
    story.started("w1")
    story.chunk(0, 2)
    story.error()
    late: list[Message] = [
        Chunks(NO_ID, (make_chunk(2),)),
        Error(key(1), 1, "engine_failed", "late"),
        Started(key(1), 1, "w1"),
    ]
    for message in late:
        assert story.receive(message) == []
    assert story.finish(2) == []
    assert story.core.dropped == {"attempt": 4}
    assert story.chunk(2, attempt=2) != []


def test_only_the_broker_that_has_a_stream_speaks_for_it(story: Story) -> None:
    story.submit(1)
    assert story.chunk(0, at=TWO) == []
    assert story.started(at=TWO) == []
    assert story.error(at=TWO) == []
    assert story.finish(0, at=TWO) == []
    assert story.core.dropped == {"attempt": 4}
    assert story.chunk(0, at=ONE) != []


def test_an_old_brokers_word_on_an_unread_request_is_not_about_the_attempt_elsewhere(story: Story) -> None:
    """Attempt 0 stands for "the present one" only where the broker that says it has the request."""
    story.submit(1)
    story.receive(Draining(), ONE)
    assert requests(story.error("draining"))[0][0] == TWO
    assert story.error("bad_request", attempt=0, retryable=False, at=ONE) == []
    assert isinstance(failure(story.error("bad_request", attempt=0, retryable=False, at=TWO)), BadRequestError)


def test_nobody_is_asked_to_wait_for_years() -> None:
    """What a worker says comes to the client as it is: it must not be able to keep a request for ever."""
    story = Story(recovery_timeout_s=10.0)
    story.open_sessions()
    story.submit()
    story.error("busy", retry_after_s=1e9, worker="w1")
    again = request(patience(story, 10.0))
    assert again.envelope.attempt == 2
    assert "nobody has taken the request for 10.0 s" in failure(story.error("busy", attempt=2)).message
