"""A worker's own door: whose chunks leave by it, what comes in, and what becomes of streams whose client is gone."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.errors import ErrorCode, ProtocolError
from tokenmq.protocol.messages import (
    Attach,
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Message,
    Ready,
)
from tokenmq.transport.endpoints import EndpointError
from tokenmq.transport.keys import Curve, KeyPair
from tokenmq.worker import direct
from tokenmq.worker.core import PART_AGAIN_S
from tokenmq.worker.direct import Attachments
from tokenmq.worker.events import Action, Came, Deaf, Hand
from tokenmq.worker.settings import WorkerSettings

DOOR = "tcp://127.0.0.1:6000"
KEY, OTHER_KEY = b"k" * 16, b"o" * 16
PEER, OTHER_PEER = b"peer1", b"peer2"


def story_of(say: Any, **values: Any) -> Any:
    story = say.story(**{"direct": DOOR, "slots": 8, **values})
    story.start()
    for broker in values.get("brokers", (say.broker,)):
        story.join(broker)
    story.loaded()
    return story


@pytest.fixture
def story(say: Any) -> Any:
    return story_of(say)


def comes(story: Any, message: Message | ProtocolError, peer: bytes = PEER) -> list[Action]:
    orders: list[Action] = story.tell(Came(peer, message))
    return orders


def handed(actions: list[Action]) -> list[tuple[bytes, bytes, Chunk]]:
    """Return the chunks that left by the door: connection, key and chunk."""
    hands = [action for action in actions if isinstance(action, Hand)]
    return [
        (hand.peer, hand.message.route, chunk)
        for hand in hands
        if isinstance(hand.message, Chunks)
        for chunk in hand.message.chunks
    ]


def take(story: Any, say: Any, number: int = 1, key: bytes | None = KEY, **values: Any) -> Any:
    return story.take(say.request(number, key=key, **values))


def test_ready_offers_the_door(say: Any, story: Any) -> None:
    assert {ready.direct for ready in say.messages(story.orders, Ready)} == {DOOR}


def test_chunks_of_an_attached_key_leave_by_the_door_and_are_counted_in_finish(say: Any, story: Any) -> None:
    job = take(story, say)
    comes(story, Attach(KEY))
    first = story.engine(say.tokens(job, 1))
    assert [(peer, key, chunk.offset) for peer, key, chunk in handed(first)] == [(PEER, KEY, 0)]
    last = story.engine(say.tokens(job, 2, 3), say.done(job, 3))
    assert [chunk.token_ids for _, _, chunk in handed(last)] == [(2, 3)]
    assert not say.chunks([*first, *last])
    [finish] = say.messages(last, Finish)
    assert finish.chunks == 2


def test_without_an_attach_everything_goes_through_the_broker(say: Any, story: Any) -> None:
    job = take(story, say)
    orders = story.engine(say.tokens(job, 1), say.done(job, 1))
    assert [chunk.token_ids for chunk in say.chunks(orders)] == [(1,)]
    assert not handed(orders)
    assert say.messages(orders, Finish)[0].chunks == 0


def test_an_attach_may_be_ahead_of_the_request(say: Any, story: Any) -> None:
    comes(story, Attach(KEY))
    job = take(story, say)
    assert handed(story.engine(say.tokens(job, 1)))


def test_the_way_is_chosen_with_the_first_chunk_and_kept(say: Any, story: Any) -> None:
    late, early = take(story, say, 1), take(story, say, 2)
    story.engine(say.tokens(late, 1))
    comes(story, Attach(KEY))
    orders = story.engine(say.tokens(late, 2), say.tokens(early, 1))
    assert [chunk.offset for chunk in say.chunks(orders)] == [1]
    assert [chunk.request_id for _, _, chunk in handed(orders)] == [say.id(2)]


def test_a_key_is_no_way_to_other_requests(say: Any, story: Any) -> None:
    comes(story, Attach(KEY))
    mine, foreign, brokered = (take(story, say, n, key) for n, key in ((1, KEY), (2, OTHER_KEY), (3, None)))
    orders = story.engine(*(say.tokens(job, 1) for job in (mine, foreign, brokered)))
    assert [chunk.request_id for _, _, chunk in handed(orders)] == [say.id(1)]
    assert [chunk.request_id for chunk in say.chunks(orders)] == [say.id(2), say.id(3)]


def test_a_step_is_one_message_for_each_connection_and_key(say: Any, story: Any) -> None:
    for key, peer in ((KEY, PEER), (OTHER_KEY, OTHER_PEER)):
        comes(story, Attach(key), peer)
    jobs = [take(story, say, n, (KEY, KEY, OTHER_KEY)[n - 1]) for n in (1, 2, 3)]
    hands = [order for order in story.engine(*(say.tokens(job, 1) for job in jobs)) if isinstance(order, Hand)]
    assert [(hand.peer, len(hand.message.chunks)) for hand in hands] == [(PEER, 2), (OTHER_PEER, 1)]


def test_credit_comes_by_the_door(say: Any, story: Any) -> None:
    comes(story, Attach(KEY))
    job = take(story, say, credit=1)
    story.engine(say.tokens(job, 1, 2, 3))
    credit = Credit(say.id(1), 1, 2)
    assert not comes(story, credit, OTHER_PEER)  # somebody else's word
    assert not comes(story, Credit(say.id(9), 1, 2))
    assert [chunk.token_ids for _, _, chunk in handed(comes(story, credit))] == [(2,)]
    assert [chunk.token_ids for _, _, chunk in handed(story.credit(1, 3))] == [(3,)]  # by the broker as well


def test_credit_by_the_door_is_for_streams_that_leave_by_it(say: Any, story: Any) -> None:
    job = take(story, say, credit=1)
    story.engine(say.tokens(job, 1, 2))
    comes(story, Attach(KEY))
    assert not comes(story, Credit(say.id(1), 1, 2))


@pytest.mark.parametrize(
    "event", [Deaf(PEER, True), Deaf(PEER, False), Came(PEER, Goodbye()), Came(PEER, Heartbeat(0))]
)
def test_what_left_by_a_connection_that_is_gone_is_given_back(say: Any, story: Any, event: Any) -> None:
    comes(story, Attach(KEY))
    direct_job, brokered = take(story, say, 1), take(story, say, 2, None)
    story.engine(say.tokens(direct_job, 1), say.tokens(brokered, 1))
    orders = story.tell(event)
    [answer] = say.messages(orders, Error)
    assert (answer.id, answer.code, answer.retryable) == (say.id(1), ErrorCode.WORKER_LOST.value, True)
    assert say.cancelled(orders) == [direct_job.ticket]
    next_job = take(story, say, 3)
    assert [chunk.request_id for chunk in say.chunks(story.engine(say.tokens(next_job, 1)))] == [say.id(3)]


@pytest.mark.parametrize("message", [Heartbeat(0), Cancel(b"r" * 16, 1), ProtocolError("no message")])
def test_who_says_anything_else_is_sent_away(story: Any, message: Any) -> None:
    [hand] = comes(story, message)
    assert isinstance(hand, Hand)
    assert isinstance(hand.message, Disconnect)
    assert hand.message.code is DisconnectCode.PROTOCOL


def test_a_new_connection_takes_over_from_an_old_one(say: Any, story: Any) -> None:
    comes(story, Attach(KEY))
    old = take(story, say, 1)
    story.engine(say.tokens(old, 1))
    comes(story, Attach(KEY), OTHER_PEER)
    new = take(story, say, 2)
    orders = story.engine(say.tokens(old, 2), say.tokens(new, 1))
    assert [(peer, chunk.request_id) for peer, _, chunk in handed(orders)] == [
        (PEER, say.id(1)),
        (OTHER_PEER, say.id(2)),
    ]
    story.tell(Deaf(PEER, True))
    assert handed(story.engine(say.tokens(new, 2)))


def test_who_did_not_read_is_sent_away_when_he_does(say: Any, story: Any) -> None:
    """The end of a stream may be in what he misses, and its FINISH has left."""
    comes(story, Attach(KEY))
    job = take(story, say)
    story.engine(say.tokens(job, 1), say.done(job, 1))
    story.tell(Deaf(PEER, False))
    assert not [order for order in story.tick(PART_AGAIN_S / 2) if isinstance(order, Hand)]
    for _ in range(2):
        [hand] = [order for order in story.tick(PART_AGAIN_S) if isinstance(order, Hand)]
        assert (hand.peer, type(hand.message)) == (PEER, Disconnect)
        story.tell(Deaf(PEER, False))
    story.tick(PART_AGAIN_S)
    story.tell(Deaf(PEER, True))
    assert not [order for order in story.tick(2 * PART_AGAIN_S) if isinstance(order, Hand)]


def test_keys_end_with_their_brokers_session(say: Any) -> None:
    story = story_of(say, brokers=(say.broker, say.other))
    take(story, say)
    comes(story, Attach(KEY))
    story.hear(Goodbye(), say.broker)
    assert len(story.core._desk.attachments) == 0


def test_a_worker_that_offers_no_door_ignores_keys(say: Any) -> None:
    story = story_of(say, direct="")
    job = take(story, say)
    assert say.chunks(story.engine(say.tokens(job, 1)))


def test_cancelled_streams_end_through_the_broker(say: Any, story: Any) -> None:
    comes(story, Attach(KEY))
    job = take(story, say)
    story.engine(say.tokens(job, 1))
    story.hear(Cancel(say.id(1), 1))
    [finish] = say.messages(story.engine(say.done(job, 1, FinishReason.CANCELLED)), Finish)
    assert (finish.reason, finish.chunks) == (FinishReason.CANCELLED, 1)


# What is remembered.


def test_a_key_outlives_its_requests_while_its_client_is_connected() -> None:
    known = Attachments()
    known.hold(KEY, "b")
    known.attach(KEY, PEER)
    known.release(KEY)
    known.validate()
    assert known.peer(KEY) == PEER
    known.leave(PEER)
    assert (known.peer(KEY), len(known)) == (None, 0)


def test_a_key_that_nobody_has_shown_is_forgotten_with_its_last_request() -> None:
    known = Attachments()
    for _ in range(2):
        known.hold(KEY, "b")
    known.release(KEY)
    assert len(known) == 1
    known.release(KEY)
    assert len(known) == 0


def test_strangers_push_out_only_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MOST_EARLY", 4)
    known = Attachments()
    known.hold(KEY, "b")
    known.attach(KEY, PEER)
    for number in range(20):
        known.attach(number.to_bytes(16, "big"), OTHER_PEER)
        known.validate()
    assert len(known) == 1 + 4
    assert known.peer(KEY) == PEER
    known.hold((19).to_bytes(16, "big"), "b")
    assert known.peer((19).to_bytes(16, "big")) == OTHER_PEER


def test_keys_without_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MOST_IDLE", 3)
    known = Attachments()
    for number in range(10):
        key = number.to_bytes(16, "big")
        known.hold(key, "b")
        known.attach(key, PEER)
        known.release(key)
        known.validate()
    assert len(known) == 3


# What may be offered.


@pytest.mark.parametrize("endpoint", ["tcp://*:6000", "tcp://0.0.0.0:6000", "tcp://[::]:6000"])
def test_all_interfaces_are_no_address_that_clients_can_reach(endpoint: str) -> None:
    with pytest.raises(EndpointError, match="name the one address"):
        WorkerSettings(brokers=("tcp://b:1",), direct=endpoint, insecure=True)


def test_other_machines_reach_it_only_with_keys_or_insecure() -> None:
    with pytest.raises(EndpointError, match="--insecure"):
        WorkerSettings(brokers=("tcp://b:1",), direct="tcp://10.0.0.7:6000")
    WorkerSettings(brokers=("tcp://b:1",), direct="tcp://10.0.0.7:6000", insecure=True)
    curve = Curve(KeyPair("p" * 40, "s" * 40), "b" * 40)
    WorkerSettings(brokers=("tcp://b:1",), direct="tcp://10.0.0.7:6000", curves=(curve,))
    with pytest.raises(ValueError, match="one for each of 2 brokers"):
        WorkerSettings(brokers=("tcp://b:1", "tcp://b:2"), curves=(curve,))
    WorkerSettings(brokers=("tcp://b:1",), direct="ipc:///tmp/w")


@pytest.mark.parametrize("endpoint", ["ipc://*", "ipc://door", "ipc://./door"])
def test_a_path_must_be_the_same_for_clients(endpoint: str) -> None:
    with pytest.raises(EndpointError, match="the whole path"):
        WorkerSettings(brokers=("tcp://b:1",), direct=endpoint)


def test_an_endpoint_must_be_one() -> None:
    with pytest.raises(EndpointError, match="invalid endpoint"):
        WorkerSettings(brokers=("tcp://b:1",), direct="6000")
    with pytest.raises(ValueError, match="256 characters"):
        WorkerSettings(brokers=("tcp://b:1",), direct="ipc:///" + "x" * 300)
