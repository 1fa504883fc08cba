"""Handshakes that fail, and brokers that send the client away: what is told at once, and what is waited for."""

from __future__ import annotations

import pytest

from tokenmq.client.events import Action, Answered, Ended, Malformed, Refused
from tokenmq.client.session import BACKOFF_MAX_S, BREAKING_FOR_S, BREAKS_IN_A_ROW, LIMITED_PAUSE_S
from tokenmq.client.settings import Settings, settings_from
from tokenmq.protocol.errors import (
    BadRequestError,
    ForbiddenError,
    NoBrokerError,
    ProtocolError,
    RateLimitedError,
    TokenmqError,
)
from tokenmq.protocol.messages import Disconnect, DisconnectCode
from tokenmq.protocol.refusal import Refusal
from tokenmq.transport.keys import Curve, KeyPair

from .story import ONE, TWO, Story, failure, patience, request, requests

SECRET = "s" * 40
CURVE = Curve(KeyPair("p" * 40, SECRET), "b" * 40)


def keyed(*endpoints: str, **settings: object) -> Story:
    story = Story(*endpoints, curves=(CURVE,) * max(1, len(endpoints)), **settings)
    story.tick()
    return story


def refuse(story: Story, refusal: Refusal, at: str = ONE) -> list[Action]:
    return story.handle(Refused(at, refusal))


def retry(story: Story, at: str = ONE) -> None:
    """Go on until the next try."""
    while not story.core.sessions[at].has_socket:
        story.sleep()


def answer(actions: list[Action]) -> TokenmqError | None:
    (answered,) = (action for action in actions if isinstance(action, Answered))
    return answered.error


def test_a_refused_key_fails_what_waits_and_what_comes_at_once() -> None:
    story = keyed()
    story.submit(1)
    actions = refuse(story, Refusal.FORBIDDEN)
    error = failure(actions)
    assert isinstance(error, ForbiddenError)
    assert (error.code, error.retryable) == ("forbidden", False)
    assert ONE in error.message
    assert "does not admit this key" in error.message
    assert "expected the key of a client or an admin; or is this not a frontend?" in error.message
    assert isinstance(failure(story.submit(2)), ForbiddenError)  # in the pause
    assert isinstance(answer(story.ask(3)), ForbiddenError)
    retry(story)
    assert isinstance(failure(story.submit(4)), ForbiddenError)  # and while the next try is under way


def test_a_question_that_waits_hears_of_it_too() -> None:
    story = keyed()
    story.ask()
    assert isinstance(answer(refuse(story, Refusal.FORBIDDEN)), ForbiddenError)


def test_a_key_that_is_enrolled_later_is_let_in() -> None:
    story = keyed()
    for _ in range(10):
        began = story.now
        refuse(story, Refusal.FORBIDDEN)
        retry(story)
        assert 0 < story.now - began <= BACKOFF_MAX_S
    story.open()
    assert request(story.submit())


def test_another_broker_takes_what_one_refuses() -> None:
    story = keyed(ONE, TWO)
    story.submit(1)
    refuse(story, Refusal.FORBIDDEN)
    ((endpoint, _),) = requests(story.open(TWO))
    assert endpoint == TWO


def test_one_that_was_never_there_is_not_waited_for() -> None:
    story = keyed(ONE, TWO)
    story.submit(1)
    refuse(story, Refusal.FORBIDDEN)
    error = failure(story.lose(TWO))
    assert isinstance(error, ForbiddenError)
    assert TWO in error.message, "both are told of"


def test_one_that_was_there_may_come_back() -> None:
    story = keyed(ONE, TWO)
    story.open(ONE)
    refuse(story, Refusal.FORBIDDEN, TWO)
    story.submit(1)
    story.lose(ONE)  # the stream's session; its attempt has failed
    assert [each.place.value for each in story.core._exchange._streams.values()] == ["waiting"]
    retry(story, ONE)
    assert request(story.open(ONE)).envelope.attempt == 2


@pytest.mark.parametrize(
    ("curves", "says"),
    [((), "wants keys: give --server-key and --key"), ((CURVE,), "has no CURVE")],
)
def test_two_ways_to_speak_are_told_apart_at_once(curves: tuple[Curve, ...], says: str) -> None:
    story = Story(curves=curves)
    story.tick()
    story.submit(1)
    error = failure(refuse(story, Refusal.MISMATCH))
    assert isinstance(error, NoBrokerError)
    assert says in error.message


@pytest.mark.parametrize(
    ("curves", "says"),
    [((), "wants keys (give --server-key and --key)"), ((CURVE,), "another public key than --server-key")],
)
def test_handshakes_that_break_off_for_a_while_are_told_with_all_that_may_be_the_cause(
    curves: tuple[Curve, ...], says: str
) -> None:
    story = Story(curves=curves, connect_timeout_s=600.0)
    story.tick()
    story.submit(1)
    began, breaks, actions = story.now, 1, refuse(story, Refusal.BROKEN_OFF)
    while not any(isinstance(action, Ended) for action in actions):
        retry(story)
        breaks, actions = breaks + 1, refuse(story, Refusal.BROKEN_OFF)
    assert breaks >= BREAKS_IN_A_ROW
    assert BREAKING_FOR_S <= story.now - began <= 2 * BREAKING_FOR_S + BACKOFF_MAX_S
    error = failure(actions)
    assert isinstance(error, NoBrokerError)
    assert error.retryable
    for part in (says, "too many connections", "is no broker"):
        assert part in error.message


@pytest.mark.parametrize("curves", [(), (CURVE,)], ids=["no keys", "keys"])
def test_a_broker_that_is_full_for_a_moment_is_waited_for(curves: tuple[Curve, ...]) -> None:
    story = Story(curves=curves)
    story.tick()
    story.submit(1)
    until = story.now + 0.9 * BREAKING_FOR_S
    while story.now < until:
        assert not any(isinstance(action, Ended) for action in refuse(story, Refusal.BROKEN_OFF))
        retry(story)
    assert request(story.open())


def test_a_broker_that_ended_in_the_handshake_is_waited_for() -> None:
    story = keyed(connect_timeout_s=600.0)
    story.submit(1)
    for _ in range(2 * BREAKS_IN_A_ROW):
        refuse(story, Refusal.BROKEN_OFF)
        retry(story)
        story.lose()  # nobody listens now
        retry(story)
    assert request(story.open())


def test_a_broker_that_has_welcomed_us_has_the_right_key() -> None:
    story = keyed()
    story.open()
    story.submit(1)
    story.lose()
    for _ in range(5):
        retry(story)
        refuse(story, Refusal.BROKEN_OFF)
    retry(story)
    assert request(story.open()).envelope.attempt == 2


def test_without_keys_a_handshake_that_breaks_off_says_nothing_of_keys() -> None:
    story = Story(connect_timeout_s=5.0)
    story.tick()
    story.submit(1)
    for _ in range(4):
        refuse(story, Refusal.BROKEN_OFF)
        retry(story)
    error = failure(patience(story, 5.0))
    assert isinstance(error, NoBrokerError)
    assert "no broker answered within 5 s" in error.message


def test_a_key_that_is_revoked_ends_its_streams() -> None:
    story = keyed()
    story.open()
    story.submit(1)
    story.started()
    error = failure(story.receive(Disconnect(DisconnectCode.FORBIDDEN, "the key was revoked")))
    assert isinstance(error, ForbiddenError)
    assert error.message.count("the key was revoked") == 1
    assert ONE in error.message
    retry(story)
    story.open()  # given back
    assert request(story.submit(2))


def test_who_was_cut_off_for_sending_too_much_comes_back_later_and_loses_nothing() -> None:
    story = Story(connect_timeout_s=1.0, recovery_timeout_s=30.0)
    story.open_sessions()
    story.submit(1)
    story.receive(Disconnect(DisconnectCode.RATE_LIMITED, "enough"))
    story.submit(2)
    began = story.now
    retry(story)
    assert story.now - began >= LIMITED_PAUSE_S
    first, second = requests(story.open() + patience(story, 3.0))
    assert [first[1].envelope.attempt, second[1].envelope.attempt] == [2, 1]


def test_a_broker_that_never_takes_anything_again_is_given_up() -> None:
    story = Story(connect_timeout_s=1.0, recovery_timeout_s=10.0)
    story.open_sessions()
    story.submit(1)
    story.error("rate_limited", retry_after_s=60.0)
    error = failure(patience(story, 11.0))
    assert isinstance(error, RateLimitedError)
    assert "limits this client, and has taken nothing for 10 s" in error.message


def test_settings_want_keys_for_each_broker() -> None:
    with pytest.raises(BadRequestError, match="one for each of 2 endpoints"):
        Settings(endpoints=(ONE, TWO), curves=(CURVE,))


def test_a_secret_is_in_no_repr() -> None:
    assert SECRET not in repr(Settings(endpoints=(ONE,), curves=(CURVE,)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"server_key": "x"}, "no key of one's own"),
        ({"key": "x"}, "no server key"),
        ({"server_key": ["a", "b", "c"], "key": "x"}, "3 server keys for 1 endpoint:"),
        ({"server_key": 5, "key": "x"}, "expected strings or paths"),
        ({"server_key": [5], "key": "x"}, "expected a string or path, or several"),
        ({"server_key": "b" * 40, "key": "/nowhere/key"}, "/nowhere/key"),
    ],
)
def test_keys_that_cannot_be_used(given: dict[str, object], says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        settings_from(None, name=None, **given)  # type: ignore[arg-type]


def test_the_environment_gives_what_the_program_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMQ_CLIENT_KEY", "/nowhere/key")
    with pytest.raises(BadRequestError, match="no server key"):
        settings_from(None, name=None)
    monkeypatch.setenv("TOKENMQ_CLIENT_SERVER_KEY", f"{'b' * 40} {'c' * 40}")
    with pytest.raises(BadRequestError, match="2 server keys for 1 endpoint:"):
        settings_from(None, name=None)
    with pytest.raises(BadRequestError, match="/nowhere/key"):
        settings_from([ONE, TWO], name=None)
    assert settings_from(None, name=None, server_key="", key="").curves == ()


def test_bytes_that_are_no_message_at_all_still_end_the_session() -> None:
    story = Story()
    story.open_sessions()
    story.handle(Malformed(ONE, ProtocolError("no")))
    assert not story.core.sessions[ONE].open
