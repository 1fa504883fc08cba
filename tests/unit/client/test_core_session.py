"""How a client finds a broker, stays with it, and leaves it: events in, orders out."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tokenmq.client.events import Answered, Close, CloseSocket, Connected, Ended, Lost, Malformed, Open
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
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Query,
    Reply,
    Request,
    Welcome,
)

from .story import ONE, TWO, Story, key, sent


def test_a_session_opens() -> None:
    story = Story()
    assert story.tick() == [Open(ONE)]
    assert [type(message) for message in sent(story.greet())] == [Hello]
    assert story.welcome() == []
    assert story.core.session.open


def test_requests_wait_for_the_session_and_leave_in_order() -> None:
    story = Story()
    story.tick()
    assert story.submit(1) == []
    assert story.ask(9) == []
    assert story.submit(2) == []
    story.greet()
    messages = sent(story.welcome())
    assert [message.id for message in messages if isinstance(message, (Request, Query))] == [key(1), key(9), key(2)]


def test_a_request_leaves_at_once_in_an_open_session() -> None:
    story = Story()
    story.open_session()
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
    story.open_session()
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
    story.handle(Connected())
    story.receive(Disconnect(DisconnectCode.UNKNOWN_PEER, "expected READY, got HELLO"))  # the port is the workers'
    story.submit(1)
    (end,) = (action for action in story.tick(5.0) if isinstance(action, Ended))
    assert isinstance(end.outcome, NoBrokerError)
    assert "the last try: the broker ended the session: unknown_peer: expected READY" in end.outcome.message


def test_endpoints_are_tried_in_turn_with_a_growing_pause_after_each_round() -> None:
    story = Story(ONE, TWO)
    opened = [(story.now, action.endpoint) for action in story.tick() if isinstance(action, Open)]
    while len(opened) < 8:
        opened += [(story.now, action.endpoint) for action in story.sleep() if isinstance(action, Open)]
    assert [endpoint for _, endpoint in opened] == [ONE, TWO] * 4
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(opened)]
    assert gaps == pytest.approx([1.0, 1.05, 1.0, 1.1, 1.0, 1.2, 1.0])


def test_the_pause_has_an_upper_bound() -> None:
    story = Story()
    for _ in range(20):
        story.tick(1000.0)
        story.handle(Lost("refused"))
    deadline = story.core.next_deadline()
    assert deadline == pytest.approx(story.now + 2.0)


def test_welcome_resets_the_pause() -> None:
    story = Story()
    for _ in range(5):
        story.tick(10.0)
        story.handle(Lost("refused"))
    story.tick(10.0)
    story.greet()
    story.welcome()
    story.handle(Lost("disconnected"))
    assert story.core.next_deadline() == pytest.approx(story.now + 0.05)


def test_a_broker_that_does_not_welcome_is_left() -> None:
    story = Story(ONE, TWO)
    story.tick()
    story.greet()
    story.tick(1.9)
    assert story.tick(0.2) == [CloseSocket(), Open(TWO)]


def test_a_broken_connection_fails_what_was_sent_and_goes_to_the_next_broker() -> None:
    story = Story(ONE, TWO)
    story.open_session()
    story.submit(1)
    story.ask(9)
    closing, stream, query = story.handle(Lost("disconnected"))
    assert closing == CloseSocket()
    assert isinstance(stream, Ended)
    assert isinstance(query, Answered)
    for error in (stream.outcome, query.error):
        assert isinstance(error, BrokerLostError)
        assert error.retryable
        assert ONE in error.message
    assert story.tick() == [Open(TWO)]


def test_what_was_made_without_a_session_goes_out_in_the_next() -> None:
    story = Story(ONE, TWO)
    story.open_session()
    story.handle(Lost("disconnected"))
    story.submit(1)
    story.tick()
    story.greet()
    assert [type(message) for message in sent(story.welcome())] == [Request]


def test_heartbeats_leave_when_nothing_else_did() -> None:
    story = Story()
    story.open_session()
    assert story.tick(0.9) == []
    assert sent(story.tick(0.1)) == [Heartbeat(sent=1)]
    assert sent(story.tick(1.0)) == [Heartbeat(sent=2)]
    story.now += 0.9
    story.submit(1)
    assert story.tick(0.9) == []
    assert sent(story.tick(0.1)) == [Heartbeat(sent=4)]


def test_a_silent_broker_is_given_up_with_a_goodbye() -> None:
    story = Story()
    story.open_session()
    for _ in range(4):
        story.tick(1.0)
    actions = story.tick(1.0)
    assert sent(actions) == [Goodbye()]
    assert actions[-1] == CloseSocket()


def test_any_message_is_a_sign_of_life() -> None:
    story = Story()
    story.open_session()
    story.tick(4.5)
    story.receive(Heartbeat(sent=1))
    assert CloseSocket() not in story.tick(4.5)
    assert CloseSocket() in story.tick(0.5)


@pytest.mark.parametrize("counted", [2, 4])
def test_a_heartbeat_that_counts_other_messages_ends_the_session(counted: int) -> None:
    story = Story()
    story.open_session()
    assert story.receive(Heartbeat(sent=1)) == []
    assert story.receive(Heartbeat(sent=2)) == []
    assert sent(story.receive(Heartbeat(sent=counted))) == [Goodbye()]
    assert not story.core.session.has_socket


@pytest.mark.parametrize("farewell", [Goodbye(), Disconnect(DisconnectCode.EXPIRED, "too slow")])
def test_a_farewell_of_the_broker_is_not_answered(farewell: Message) -> None:
    story = Story()
    story.open_session()
    assert story.receive(farewell) == [CloseSocket()]


@pytest.mark.parametrize("message", [Welcome("b", "s", 1.0, 5.0), Accepted("b", "s", 1.0, 5.0), Hello("c", "s")])
def test_what_a_broker_must_not_say_ends_the_session(message: Message) -> None:
    story = Story()
    story.open_session()
    assert story.receive(message)[-1] == CloseSocket()


def test_an_answer_before_welcome_ends_the_session() -> None:
    story = Story()
    story.tick()
    story.greet()
    assert CloseSocket() in story.receive(Reply(key(9), None))


def test_malformed_bytes_end_the_session() -> None:
    story = Story()
    story.open_session()
    story.submit(1)
    actions = story.handle(Malformed(ProtocolError("header: does not begin with TMQ")))
    assert sent(actions) == [Goodbye()]
    (end,) = [action for action in actions if isinstance(action, Ended)]
    assert isinstance(end.outcome, BrokerLostError)
    assert "does not begin with TMQ" in end.outcome.message


def test_late_news_of_a_closed_socket_means_nothing() -> None:
    story = Story()
    story.open_session()
    story.receive(Goodbye())
    assert story.receive(Heartbeat(sent=7)) == []
    assert story.handle(Malformed(ProtocolError("x"))) == []
    assert story.handle(Lost("disconnected")) == []
    assert story.handle(Connected()) == []


def test_counts_begin_anew_with_each_session() -> None:
    story = Story()
    story.open_session()
    story.submit(1)
    story.receive(Heartbeat(sent=1))
    story.handle(Lost("disconnected"))
    story.sleep()
    story.greet()
    story.welcome()
    assert story.receive(Heartbeat(sent=1)) == []
    assert sent(story.tick(1.0)) == [Heartbeat(sent=1)]


def test_a_query_is_answered() -> None:
    story = Story()
    story.open_session()
    assert sent(story.ask(9)) == [Query(key(9), "models", {})]
    assert story.receive(Reply(key(9), ["m"])) == [Answered(key(9), ["m"], None)]
    assert story.receive(Reply(key(9), ["m"])) == []
    assert story.core.dropped == {"unknown": 1}


def test_a_query_without_an_answer_ends_in_time() -> None:
    story = Story(query_timeout_s=0.5)
    story.open_session()
    story.ask(9)
    (end,) = story.tick(0.5)
    assert isinstance(end, Answered)
    assert isinstance(end.error, DeadlineError)


def test_close_says_goodbye_and_fails_everything() -> None:
    story = Story()
    story.open_session()
    story.submit(1)
    story.ask(9)
    actions = story.handle(Close())
    assert sent(actions) == [Goodbye()]
    assert actions[1] == CloseSocket()
    errors = [a.outcome if isinstance(a, Ended) else a.error for a in actions if isinstance(a, (Ended, Answered))]
    assert len(errors) == 2
    assert all(isinstance(error, ClientClosedError) for error in errors)
    assert story.handle(Close()) == []
    assert story.core.next_deadline() is None


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
