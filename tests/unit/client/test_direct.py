"""Chunks past the broker, as the client's core sees them: whom it dials, what it takes, what a lost link costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tokenmq.client import direct
from tokenmq.client.direct import DIAL_S, IDLE_S, REDIAL_S, Direct
from tokenmq.client.events import (
    Action,
    Close,
    Deliver,
    Dial,
    HangUp,
    Heard,
    Parted,
    Reached,
    Send,
    Tell,
)
from tokenmq.client.settings import Settings
from tokenmq.protocol.errors import BadRequestError, ErrorCode
from tokenmq.protocol.messages import (
    Attach,
    Cancel,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Started,
)
from tokenmq.protocol.orders import Orders
from tokenmq.transport.keys import Curve, KeyPair
from tokenmq.transport.networks import Networks

from .story import (
    ONE,
    TWO,
    Story,
    ended,
    ending,
    grants,
    heartbeats,
    key,
    make_chunk,
    make_finish,
    patience,
    prior,
    request,
    sent,
    told_attempts,
)

DOOR = "tcp://10.0.0.7:6000"
KEY, OTHER_KEY = b"k" * 16, b"o" * 16


class DirectStory(Story):
    """A story with a client that takes chunks from workers in 10.0.0.0/8."""

    def __init__(self, *endpoints: str, **settings: Any) -> None:
        super().__init__(*endpoints, **{"direct": ("10.0.0.0/8",), **settings})
        self.open_sessions()

    def offered(
        self,
        number: int = 1,
        *,
        attempt: int = 1,
        door: str = DOOR,
        key_: bytes = KEY,
        at: str = ONE,
        server_key: str = "",
    ) -> list[Action]:
        return self.receive(Started(key(number), attempt, "w1", door, key_, server_key), at)

    def begin(self, number: int = 1, **submit: Any) -> list[Action]:
        """Submit a request, have it offered and the link made."""
        self.submit(number, **submit)
        actions = self.offered(number)
        return [*actions, *self.handle(Reached(DOOR))]

    def comes(
        self, offset: int, tokens: int = 1, *, number: int = 1, attempt: int = 1, key_: bytes = KEY, door: str = DOOR
    ) -> list[Action]:
        """A chunk comes by the link."""
        chunk = make_chunk(offset, tokens, number=number, attempt=attempt)
        return self.handle(Heard(door, Chunks(key_, (chunk,))))

    def finished(self, tokens: int, chunks: int, *, number: int = 1, attempt: int = 1) -> list[Action]:
        return self.receive(replace(make_finish(tokens, number=number, attempt=attempt), chunks=chunks))


def told(actions: list[Action]) -> list[tuple[str, type[Any]]]:
    return [(action.endpoint, type(action.message)) for action in actions if isinstance(action, Tell)]


def delivered(actions: list[Action]) -> list[int]:
    return [action.chunk.offset for action in actions if isinstance(action, Deliver)]


@pytest.fixture
def story() -> DirectStory:
    return DirectStory()


# Who is dialled.


def test_hello_asks_only_where_networks_are_named() -> None:
    for networks in ((), ("10.0.0.0/8",)):
        story = Story(direct=networks)
        story.tick()
        [hello] = sent(story.greet())
        assert isinstance(hello, Hello)
        assert hello.direct == bool(networks)


def test_an_offer_is_dialled_once_and_its_key_shown_once(story: DirectStory) -> None:
    story.submit(1)
    assert Dial(DOOR) in story.offered(1)
    story.submit(2)
    assert Dial(DOOR) not in story.offered(2)
    assert story.handle(Reached(DOOR)) == [Tell(DOOR, Attach(KEY))]
    story.submit(3)
    assert not told(story.offered(3))
    story.submit(4)
    assert told(story.offered(4, key_=OTHER_KEY)) == [(DOOR, Attach)]


@pytest.mark.parametrize(
    "door", ["tcp://11.0.0.1:6000", "ipc:///run/w", "tcp://worker:6000", "nonsense", "tcp://10.0.0.7:*"]
)
def test_nobody_outside_the_named_networks_is_dialled(story: DirectStory, door: str) -> None:
    story.submit()
    actions = story.offered(door=door)
    assert not any(isinstance(action, Dial) for action in actions)
    assert delivered(story.chunk(0)) == [0]


WORKER, OTHER_WORKER = "w" * 40, "v" * 40
CURVE = Curve(KeyPair("p" * 40, "s" * 40), "b" * 40)


@pytest.mark.parametrize(
    ("curves", "server_key", "dials"),
    [((), "", True), ((CURVE,), WORKER, True), ((CURVE,), "", False), ((), WORKER, False)],
)
def test_keys_are_used_at_both_ends_or_at_none(curves: tuple[Curve, ...], server_key: str, dials: bool) -> None:
    story = DirectStory(curves=curves)
    story.submit()
    actions = story.offered(server_key=server_key)
    assert [action for action in actions if isinstance(action, Dial)] == [Dial(DOOR, server_key)] * dials
    assert delivered(story.chunk(0)) == [0]


def test_a_key_is_shown_only_to_the_worker_that_it_was_given_for() -> None:
    story = DirectStory(curves=(CURVE,))
    story.submit(1)
    story.offered(1, server_key=WORKER)
    assert told(story.handle(Reached(DOOR))) == [(DOOR, Attach)]
    for server_key in (OTHER_WORKER, ""):
        story.submit(number := 2 + bool(server_key))
        assert story.offered(number, key_=OTHER_KEY, server_key=server_key)[1:] == []
    story.submit(4)
    assert told(story.offered(4, key_=OTHER_KEY, server_key=WORKER)) == [(DOOR, Attach)]


def test_who_named_no_network_dials_nobody() -> None:
    story = DirectStory(direct=())
    story.submit()
    assert not any(isinstance(action, Dial) for action in story.offered())


def test_what_is_not_reached_costs_nothing_and_is_left_alone_for_a_while(story: DirectStory) -> None:
    story.submit(1, window=64)
    story.offered(1)
    story.chunk(0)
    actions = patience(story, DIAL_S + 0.5)
    assert actions == [HangUp(DOOR)]
    assert delivered(story.chunk(1)) == [1]
    story.submit(2)
    assert Dial(DOOR) not in story.offered(2)
    patience(story, REDIAL_S)
    story.submit(3)
    assert Dial(DOOR) in story.offered(3)
    assert len(ended(story.finish(2)).attempts) == 1


def test_a_dial_that_cannot_be_made_is_the_same(story: DirectStory) -> None:
    story.submit()
    story.offered()
    assert story.handle(Parted(DOOR, "no such host")) == [HangUp(DOOR)]
    assert delivered(story.chunk(0)) == [0]
    assert ending(story.finish(1)).reason is FinishReason.STOP


def test_a_link_that_comes_too_late_is_of_no_use(story: DirectStory) -> None:
    story.submit()
    story.offered()
    patience(story, DIAL_S + 0.5)
    assert story.handle(Reached(DOOR)) == []


def test_links_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MOST_LINKS", 2)
    monkeypatch.setattr(direct, "MOST_KEYS", 2)
    links = Direct(Networks.of(["10.0.0.0/8"]), Orders())
    for number in range(5):
        links.offered(f"tcp://10.0.0.{number}:1", KEY, ONE, 0.0)
        links.offered("tcp://10.0.0.0:1", bytes([number]) * 16, ONE, 0.0)
        links.validate()
    assert links.has("tcp://10.0.0.1:1")
    assert not links.has("tcp://10.0.0.2:1")
    assert links.giver("tcp://10.0.0.0:1", KEY) is None


# What comes by a link.


def test_chunks_by_the_link_are_delivered_and_credit_goes_there(story: DirectStory) -> None:
    story.begin(window=4)
    assert delivered(story.comes(0, 4)) == [0]
    actions = story.consume(4)
    assert actions == [Tell(DOOR, Credit(key(1), 1, 8))]
    story.comes(4, 2)
    end = ended(story.finished(6, 2))
    assert [attempt.direct for attempt in end.attempts] == [True]


def test_credit_goes_to_the_broker_until_the_first_chunk_has_come_by_the_link(story: DirectStory) -> None:
    story.begin(window=4)
    story.chunk(0, 4)
    assert [type(message) for message in grants(story.consume(4))] == [Credit]
    [attempt] = ended(story.finish(4)).attempts
    assert not attempt.direct


def test_chunks_may_be_ahead_of_started(story: DirectStory) -> None:
    story.begin(1)
    story.submit(2)
    assert delivered(story.comes(0, number=2)) == [0]
    story.offered(2)
    assert ended(story.finished(1, 1, number=2)).attempts[0].direct


def test_a_foreign_key_brings_nothing(story: DirectStory) -> None:
    story.begin()
    assert delivered(story.comes(0, key_=OTHER_KEY)) == []
    assert story.core.dropped["unknown"] == 1


def test_a_key_of_one_broker_brings_nothing_for_requests_of_another() -> None:
    story = DirectStory(ONE, TWO)
    story.begin(1)
    story.lose(ONE)
    story.offered(1, attempt=2, key_=OTHER_KEY, at=TWO)
    assert delivered(story.comes(0, attempt=2, key_=KEY)) == []
    assert delivered(story.comes(0, attempt=2, key_=OTHER_KEY)) == [0]


def test_late_chunks_of_a_closed_attempt_are_dropped(story: DirectStory) -> None:
    story.begin()
    story.comes(0)
    story.error()
    assert delivered(story.comes(1)) == []
    assert delivered(story.comes(1, attempt=2)) == [1]


# FINISH and what it counts.


def test_finish_waits_for_the_chunks_that_it_counts(story: DirectStory) -> None:
    story.begin()
    story.comes(0)
    assert story.finished(3, 3) == []
    assert delivered(story.comes(1)) == [1]
    actions = story.comes(2)
    assert delivered(actions) == [2]
    assert ending(actions).reason is FinishReason.STOP


def test_it_may_come_before_any_of_them(story: DirectStory) -> None:
    story.begin()
    assert story.finished(1, 1) == []
    assert ending(story.comes(0)).reason is FinishReason.STOP


def test_a_chunk_of_no_tokens_is_waited_for_too(story: DirectStory) -> None:
    story.begin(window=1)
    story.comes(0)
    story.finished(1, 2)
    assert ending(story.comes(1, 0)).reason is FinishReason.STOP


@pytest.mark.parametrize("timeout_s", [5.0, 60.0, None])
def test_it_waits_for_seconds_whatever_tokens_may_take(timeout_s: float | None) -> None:
    story = DirectStory(inter_token_timeout_s=timeout_s)
    story.begin(window=1)
    story.comes(0)
    story.finished(2, 2)
    assert not [action for action in patience(story, 4.5) if isinstance(action, Send)]
    again = request(patience(story, 1.0))
    assert again.envelope.attempt == 2
    found = prior(again)
    assert found is not None
    assert len(found.token_ids) == 1


def test_where_no_link_can_bring_them_it_is_a_failure_at_once(story: DirectStory) -> None:
    story.submit()
    story.started()
    again = request(story.finished(1, 1))
    assert again.envelope.attempt == 2


def test_an_error_ends_the_attempt_at_once(story: DirectStory) -> None:
    story.begin()
    story.comes(0)
    assert request(story.error(ErrorCode.WORKER_LOST.value)).envelope.attempt == 2


# The end of a link.


@pytest.mark.parametrize(
    "event",
    [
        Parted(DOOR, "connection disconnected"),
        Heard(DOOR, Disconnect(DisconnectCode.PROTOCOL, "no")),
        Heard(DOOR, Heartbeat(0)),
    ],
)
def test_with_the_link_the_attempts_that_came_by_it_fail(story: DirectStory, event: Any) -> None:
    story.begin(1, window=64)
    story.submit(2)
    story.started(number=2)
    story.comes(0, 3)
    story.chunk(0, number=2)
    actions = story.handle(event)
    assert HangUp(DOOR) in actions
    cancel, again = sent(actions)
    assert cancel == Cancel(key(1), 1)
    assert len(again.payload) > 0
    (failed, _) = told_attempts(actions)
    assert failed.error is not None
    assert (failed.error.code, failed.error.retryable, failed.direct) == ("worker_lost", True, True)
    assert delivered(story.chunk(3, attempt=2)) == [3]
    assert delivered(story.chunk(1, number=2)) == [1]


def test_with_it_fail_those_whose_first_chunk_might_have_been_sent_by_it(story: DirectStory) -> None:
    story.begin(1)
    story.begin(2)
    story.chunk(0, number=2)  # this one comes through the broker
    actions = story.handle(Parted(DOOR, "connection disconnected"))
    assert [message.id for message in sent(actions)] == [key(1), key(1)]


def test_a_finish_that_was_held_back_is_void_without_its_link(story: DirectStory) -> None:
    story.begin()
    story.comes(0)
    story.finished(2, 2)
    assert request(story.handle(Parted(DOOR, "connection disconnected"))).envelope.attempt == 2


def test_a_link_that_lasted_may_be_made_again_at_once(story: DirectStory) -> None:
    story.begin(1, window=64)
    story.comes(0)
    patience(story, REDIAL_S)
    story.handle(Parted(DOOR, "connection disconnected"))
    assert Dial(DOOR) in story.offered(1, attempt=2)


def test_a_link_that_nothing_uses_is_closed_with_a_farewell(story: DirectStory) -> None:
    story.begin()
    story.comes(0)
    story.finished(1, 1)
    actions = patience(story, IDLE_S + 1)
    assert actions == [Tell(DOOR, Goodbye()), HangUp(DOOR)]
    story.submit(2)
    assert Dial(DOOR) in story.offered(2)


def test_a_link_with_a_stream_stays(story: DirectStory) -> None:
    story.begin(window=1)
    story.comes(0)  # its reader takes nothing for a long time
    assert patience(story, 3 * IDLE_S) == []
    assert told(story.consume(1)) == [(DOOR, Credit)]


def test_links_close_with_the_client(story: DirectStory) -> None:
    story.begin()
    actions = story.handle(Close())
    assert actions.index(Tell(DOOR, Goodbye())) < actions.index(HangUp(DOOR))


def test_a_brokers_end_takes_its_keys_along(story: DirectStory) -> None:
    story.begin(window=64)
    story.comes(0)
    story.lose()
    again = request(story.reopen())
    assert again.envelope.attempt == 2
    assert delivered(story.comes(1, attempt=2)) == []  # the key is no more
    assert told(story.offered(attempt=2, key_=OTHER_KEY)) == [(DOOR, Attach)]
    assert delivered(story.comes(1, attempt=2, key_=OTHER_KEY)) == [1]


def test_of_a_hedged_pair_the_one_that_brings_something_goes_on(story: DirectStory) -> None:
    story.submit(hedge_after_s=1.0)
    story.offered()
    story.handle(Reached(DOOR))
    patience(story, 1.5)
    actions = story.comes(0)
    assert [type(message) for message in sent(actions)] == [Cancel]
    assert delivered(actions) == [0]
    heartbeats(story)
    assert delivered(story.chunk(0, attempt=2)) == []


# What users give.


@pytest.mark.parametrize("networks", [("10.0.0.0/33",), ("",), ("tcp://10.0.0.1:5",), (7,)])
def test_what_is_no_network_is_told(networks: Any) -> None:
    with pytest.raises(BadRequestError, match="direct: "):
        Settings(direct=networks)
