"""How a client finds its brokers, stays with them, and leaves them: events in, orders out."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest

from tokenmq.client.events import Answered, Close, CloseSocket, Connected, Ended, Lost, Malformed, Open, Send
from tokenmq.protocol.errors import (
    BrokerLostError,
    ClientClosedError,
    DeadlineError,
    NoBrokerError,
    ProtocolError,
)
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Disconnect,
    DisconnectCode,
    Draining,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Query,
    Reply,
    Request,
    Welcome,
)

from .story import ONE, TWO, Story, failure, key, requests, sent


def test_a_session_opens() -> None:
    story = Story()
    assert story.tick() == [Open(ONE)]
    assert [type(message) for message in sent(story.greet())] == [Hello]
    assert story.welcome() == []
    assert story.core.sessions[ONE].open


def test_requests_wait_for_the_session_and_leave_in_order() -> None:
    story = Story()
    story.tick()
    assert story.submit(1) == []
    assert story.ask(9) == []
    assert story.submit(2) == []
    story.greet()
    messages = sent(story.welcome())
    assert [message.id for message in messages if isinstance(message, Request)] == [key(1), key(2)]
    assert [message.id for message in messages if isinstance(message, Query)] == [key(9)]


def test_a_request_leaves_at_once_in_an_open_session() -> None:
    story = Story()
    story.open_sessions()
    (request,) = sent(story.submit(1, window=8, deadline_s=30.0))
    assert isinstance(request, Request)
    envelope = request.envelope
    assert (envelope.model, envelope.attempt, envelope.credit, envelope.deadline_s) == ("m", 1, 8, 30.0)


def test_the_deadline_that_leaves_is_what_is_left_of_it() -> None:
    story = Story()
    story.tick()
    story.submit(1, deadline_s=3.0)
    story.greet()
    story.now += 0.75
    (request,) = sent(story.welcome())
    assert isinstance(request, Request)
    assert request.envelope.deadline_s == pytest.approx(2.25)


def test_a_deadline_ends_the_request_even_where_the_broker_says_nothing() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1, deadline_s=0.5)
    assert story.tick(0.6) == []  # the broker's word is worth waiting for a moment
    cancel, end = story.tick(0.2)
    assert sent([cancel]) == [Cancel(key(1), 1)]
    assert isinstance(end, Ended)
    assert isinstance(end.outcome, DeadlineError)


def test_without_a_broker_requests_fail_and_name_the_endpoints() -> None:
    story = Story(ONE, TWO, connect_timeout_s=5.0)
    story.tick()
    story.submit(1)
    story.ask(9)
    made = story.now
    ends: list[Ended | Answered] = []
    while len(ends) < 2:
        ends += [action for action in story.sleep() if isinstance(action, (Ended, Answered))]
    assert story.now == pytest.approx(made + 5.0)
    for end in ends:
        error = end.outcome if isinstance(end, Ended) else end.error
        assert isinstance(error, NoBrokerError)
        assert error.retryable
        assert ONE in error.message
        assert TWO in error.message


def test_a_request_whose_deadline_is_shorter_than_the_connect_timeout_fails_by_its_deadline() -> None:
    story = Story()
    story.tick()
    story.submit(1, deadline_s=0.5)
    (end,) = story.tick(0.5)
    assert isinstance(end, Ended)
    assert isinstance(end.outcome, DeadlineError)


def test_no_broker_tells_why_the_last_try_failed() -> None:
    story = Story()
    story.tick()
    story.handle(Connected(ONE))
    story.receive(Disconnect(DisconnectCode.UNKNOWN_PEER, "expected READY, got HELLO"))  # the port is the workers'
    story.submit(1)
    (end,) = (action for action in story.tick(5.0) if isinstance(action, Ended))
    assert isinstance(end.outcome, NoBrokerError)
    assert "the last try: the broker ended the session: unknown_peer: expected READY" in end.outcome.message


def test_each_broker_is_tried_again_and_again_with_growing_pauses() -> None:
    story = Story(ONE, TWO)
    opened = [(story.now, action.endpoint) for action in story.tick() if isinstance(action, Open)]
    while len(opened) < 10:
        opened += [(story.now, action.endpoint) for action in story.sleep() if isinstance(action, Open)]
    for endpoint in (ONE, TWO):
        times = [time for time, tried in opened if tried == endpoint]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert gaps == pytest.approx([1.05, 1.1, 1.2, 1.4])


def test_a_dead_broker_keeps_nobody_from_the_living_one_and_is_not_worth_a_warning() -> None:
    story = Story(ONE, TWO)
    story.tick()
    story.open(TWO)
    assert [endpoint for endpoint, _ in requests(story.submit(1))] == [TWO]
    began = story.now
    opened = 0
    while story.now < began + 60.0:
        opened += sum(isinstance(action, Open) for action in story.sleep())
        if story.core.sessions[TWO].open:
            story.receive(Heartbeat(sent=story.core.sessions[TWO].received), TWO)
    assert opened <= 60 / 3.0 + 5  # a try takes a second, the pauses grow to two
    assert not [log for log in story.logs if log.level > logging.INFO]


def test_the_pause_has_an_upper_bound() -> None:
    story = Story()
    for _ in range(20):
        story.tick(1000.0)
        story.handle(Lost(ONE, "refused"))
    deadline = story.core.next_deadline()
    assert deadline == pytest.approx(story.now + 2.0)


@pytest.mark.parametrize(("lasted_s", "pause_s"), [(2.0, 0.05), (1.0, 1.6)])
def test_a_session_that_lasted_resets_the_pause(lasted_s: float, pause_s: float) -> None:
    story = Story()
    for _ in range(5):
        story.tick(10.0)
        story.handle(Lost(ONE, "refused"))
    story.tick(10.0)
    story.greet()
    story.welcome()
    story.tick(lasted_s)
    story.handle(Lost(ONE, "disconnected"))
    assert story.core.next_deadline() == pytest.approx(story.now + pause_s)


def test_a_broker_that_does_not_welcome_is_tried_anew() -> None:
    story = Story(ONE, TWO)
    story.tick()
    story.greet()
    story.tick(0.5)
    story.open(TWO)
    story.tick(1.4)
    assert CloseSocket(ONE) in story.tick(0.2)
    assert story.core.sessions[TWO].open
    assert Open(ONE) in story.tick(0.1)


def test_a_broken_connection_fails_queries_and_new_ones_go_to_the_next_broker() -> None:
    story = Story(ONE, TWO)
    story.open_sessions()
    story.ask(9)
    closing, query = story.lose(ONE)
    assert closing == CloseSocket(ONE)
    assert isinstance(query, Answered)
    assert isinstance(query.error, BrokerLostError)
    assert query.error.retryable
    assert ONE in query.error.message
    assert story.ask(8) == [Send(TWO, Query(key(8), "models", {}))]
    assert story.receive(Reply(key(8), []), TWO) == [Answered(key(8), [])]


def test_what_was_made_without_a_session_goes_out_in_the_first_that_opens() -> None:
    story = Story(ONE, TWO)
    story.tick()
    story.submit(1)
    assert [endpoint for endpoint, _ in requests(story.open(TWO))] == [TWO]
    assert requests(story.open(ONE)) == []


def test_heartbeats_leave_when_nothing_else_did() -> None:
    story = Story()
    story.open_sessions()
    assert story.tick(0.9) == []
    assert sent(story.tick(0.1)) == [Heartbeat(sent=1)]
    assert sent(story.tick(1.0)) == [Heartbeat(sent=2)]
    story.now += 0.9
    story.submit(1)
    assert story.tick(0.9) == []
    assert sent(story.tick(0.1)) == [Heartbeat(sent=4)]


def test_a_silent_broker_is_given_up_with_a_goodbye() -> None:
    story = Story()
    story.open_sessions()
    for _ in range(4):
        story.tick(1.0)
    actions = story.tick(1.0)
    assert sent(actions) == [Goodbye()]
    assert actions[-1] == CloseSocket(ONE)


def test_any_message_is_a_sign_of_life() -> None:
    story = Story()
    story.open_sessions()
    story.tick(4.5)
    story.receive(Heartbeat(sent=1))
    assert CloseSocket(ONE) not in story.tick(4.5)
    assert CloseSocket(ONE) in story.tick(0.5)


@pytest.mark.parametrize("counted", [2, 4])
def test_a_heartbeat_that_counts_other_messages_ends_the_session(counted: int) -> None:
    story = Story()
    story.open_sessions()
    assert story.receive(Heartbeat(sent=1)) == []
    assert story.receive(Heartbeat(sent=2)) == []
    assert sent(story.receive(Heartbeat(sent=counted))) == [Goodbye()]
    assert not story.core.sessions[ONE].has_socket


@pytest.mark.parametrize("farewell", [Goodbye(), Disconnect(DisconnectCode.EXPIRED, "too slow")])
def test_a_farewell_of_the_broker_is_not_answered(farewell: Message) -> None:
    story = Story()
    story.open_sessions()
    assert story.receive(farewell) == [CloseSocket(ONE)]


@pytest.mark.parametrize("message", [Welcome("b", "s", 1.0, 5.0), Accepted("b", "s", 1.0, 5.0), Hello("c", "s")])
def test_what_a_broker_must_not_say_ends_the_session(message: Message) -> None:
    story = Story()
    story.open_sessions()
    assert story.receive(message)[-1] == CloseSocket(ONE)


def test_an_answer_before_welcome_ends_the_session() -> None:
    story = Story()
    story.tick()
    story.greet()
    assert CloseSocket(ONE) in story.receive(Reply(key(9), None))


def test_malformed_bytes_end_the_session() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1, resume=False)
    actions = story.handle(Malformed(ONE, ProtocolError("header: does not begin with TMQ")))
    assert sent(actions) == [Goodbye()]
    error = failure(actions)
    assert isinstance(error, BrokerLostError)
    assert "does not begin with TMQ" in error.message


def test_only_the_session_that_fails_ends() -> None:
    story = Story(ONE, TWO)
    story.open_sessions()
    story.handle(Malformed(TWO, ProtocolError("x")))
    story.tick()
    assert story.core.sessions[ONE].open
    assert not story.core.sessions[TWO].open


def test_late_news_of_a_closed_socket_means_nothing() -> None:
    story = Story()
    story.open_sessions()
    story.receive(Goodbye())
    assert story.receive(Heartbeat(sent=7)) == []
    assert story.handle(Malformed(ONE, ProtocolError("x"))) == []
    assert story.handle(Lost(ONE, "disconnected")) == []
    assert story.handle(Connected(ONE)) == []


def test_counts_begin_anew_with_each_session() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1)
    story.receive(Heartbeat(sent=1))
    story.lose()
    story.sleep()
    story.greet()
    assert [message.envelope.attempt for _, message in requests(story.welcome())] == [2]
    assert story.receive(Heartbeat(sent=1)) == []
    assert sent(story.tick(1.0)) == [Heartbeat(sent=2)]


def test_each_session_counts_for_itself() -> None:
    story = Story(ONE, TWO)
    story.open_sessions()
    story.submit(1)
    story.chunk(0)
    assert story.receive(Heartbeat(sent=2), ONE) == []
    assert story.receive(Heartbeat(sent=1), TWO) == []
    assert story.tick(1.0) == [Send(ONE, Heartbeat(sent=2)), Send(TWO, Heartbeat(sent=1))]


def test_a_query_is_answered() -> None:
    story = Story()
    story.open_sessions()
    assert sent(story.ask(9)) == [Query(key(9), "models", {})]
    assert story.receive(Reply(key(9), ["m"])) == [Answered(key(9), ["m"], None)]
    assert story.receive(Reply(key(9), ["m"])) == []
    assert story.core.dropped == {"unknown": 1}


def test_a_query_without_an_answer_ends_in_time() -> None:
    story = Story(query_timeout_s=0.5)
    story.open_sessions()
    story.ask(9)
    (end,) = story.tick(0.5)
    assert isinstance(end, Answered)
    assert isinstance(end.error, DeadlineError)


def test_a_broker_that_drains_still_answers_queries() -> None:
    story = Story()
    story.open_sessions()
    story.receive(Draining())
    assert sent(story.ask(9)) == [Query(key(9), "models", {})]


def test_queries_go_to_a_broker_that_does_not_drain_where_there_is_one() -> None:
    story = Story(ONE, TWO)
    story.open_sessions()
    story.receive(Draining(), ONE)
    assert story.ask(9) == [Send(TWO, Query(key(9), "models", {}))]


def test_close_says_goodbye_to_all_and_fails_everything() -> None:
    story = Story(ONE, TWO)
    story.open_sessions()
    story.submit(1)
    story.ask(9)
    actions = story.handle(Close())
    assert actions[:4] == [Send(ONE, Goodbye()), CloseSocket(ONE), Send(TWO, Goodbye()), CloseSocket(TWO)]
    errors = [a.outcome if isinstance(a, Ended) else a.error for a in actions if isinstance(a, (Ended, Answered))]
    assert len(errors) == 2
    assert all(isinstance(error, ClientClosedError) for error in errors)
    assert story.handle(Close()) == []
    assert story.core.next_deadline() is None


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_close_in_the_midst_of_connecting(steps: int) -> None:
    story = Story(ONE, TWO)
    begin = [story.tick, story.greet]
    for step in begin[:steps]:
        step()
    story.submit(1)
    actions = story.handle(Close())
    sockets = [action.endpoint for action in actions if isinstance(action, CloseSocket)]
    assert sockets == ([ONE, TWO] if steps else [])
    assert sent(actions) == []  # there is no session to say goodbye in
    assert isinstance(failure(actions), ClientClosedError)
    assert story.tick(100.0) == []


def test_a_closed_client_refuses_requests() -> None:
    story = Story()
    story.handle(Close())
    (stream,) = story.submit(1)
    (query,) = story.ask(9)
    assert isinstance(stream, Ended)
    assert isinstance(stream.outcome, ClientClosedError)
    assert isinstance(query, Answered)
    assert isinstance(query.error, ClientClosedError)
    assert story.tick(10.0) == []
