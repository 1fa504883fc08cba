"""A worker's own door on real sockets, with broker and client in the test's own hands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import pytest
import zmq

from tokenmq.protocol.codec import decode, encode, peek
from tokenmq.protocol.messages import (
    Attach,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    Envelope,
    Error,
    Finish,
    Goodbye,
    Message,
    Ready,
    Request,
)
from tokenmq.protocol.payload import Generation, Sampling, pack_generation
from tokenmq.worker.engines.base import Output, Tokens
from tokenmq.worker.engines.synthetic import SyntheticEngine, token_at

from .test_worker_server import ROUTE, WAIT_S, Broker, Worker, request_id

KEY = b"k" * 16
KindT = TypeVar("KindT", Chunks, Disconnect)


class Visitor:
    """A client's connection to the worker's door."""

    def __init__(self, broker: Broker, door: str, *, narrow: bool = False) -> None:
        self.socket = broker.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if narrow:
            self.socket.setsockopt(zmq.RCVHWM, 1)
            self.socket.setsockopt(zmq.RCVBUF, 4096)
        self.socket.connect(door)

    def says(self, message: Message) -> None:
        self.socket.send_multipart(encode(message))

    def hears(self) -> Message:
        assert self.socket.poll(WAIT_S * 1000), "the worker says nothing"
        return decode(self.socket.recv_multipart())

    def until(self, kind: type[KindT]) -> KindT:
        """Read on until such a message comes."""
        limit = time.monotonic() + WAIT_S
        while time.monotonic() < limit:
            assert self.socket.poll(WAIT_S * 1000), "the worker says nothing"
            frames = self.socket.recv_multipart()
            if peek(frames[0])[0] is kind.command:  # long chunks take long to decode, and the worker's PING waits
                message = decode(frames)
                assert isinstance(message, kind)
                return message
        raise AssertionError(f"no {kind.__name__} came")


@pytest.fixture
def broker() -> Iterator[Broker]:
    with contextlib.closing(Broker()) as stub:
        yield stub


class LongWords(SyntheticEngine):
    """Its tokens have texts so long that a connection that is not read is full soon, before ZMTP's PING is late."""

    def step(self) -> list[Output]:
        return [
            replace(output, text="x" * 20_000) if isinstance(output, Tokens) else output for output in super().step()
        ]


@pytest.fixture
def worker(broker: Broker) -> Iterator[Worker]:
    made = Worker(LongWords(name="toy", tokens_per_second=2000), broker.endpoint, direct="tcp://127.0.0.1:*")
    yield made
    made.close()


@pytest.fixture
def visit(broker: Broker, worker: Worker) -> Iterator[Callable[..., tuple[bytes, Visitor]]]:
    visitors: list[Visitor] = []

    def come(*, narrow: bool = False) -> tuple[bytes, Visitor]:
        """Return the worker's name at the broker, and a connection to its door with a key that the worker knows."""
        peer, ready = broker.until(Ready, lambda message: bool(message.models and message.models[0].resumes))
        visitor = Visitor(broker, ready.direct, narrow=narrow)
        visitors.append(visitor)
        visitor.says(Attach(KEY))
        for number in range(10_000, 20_000):  # until the ATTACH has arrived
            ask(broker, peer, number, 1, credit=8)
            if broker.until(Finish)[1].chunks:
                assert isinstance(visitor.hears(), Chunks)
                return peer, visitor
        raise AssertionError("the ATTACH has not arrived")

    yield come
    for visitor in visitors:
        visitor.socket.close()


def ask(broker: Broker, peer: bytes, number: int, tokens: int, *, credit: int) -> None:
    sampling = Sampling(max_tokens=tokens, seed=number)
    payload = pack_generation(Generation(prompt="a b", sampling=sampling))
    broker.send(peer, Request(request_id(number), Envelope("toy", 1, credit, route=ROUTE, key=KEY), payload))


def test_chunks_leave_by_the_door_as_far_as_its_credit_goes(
    broker: Broker, visit: Callable[..., tuple[bytes, Visitor]]
) -> None:
    peer, visitor = visit()
    ask(broker, peer, 1, 10, credit=2)
    ids: list[int] = []
    count = 0
    while len(ids) < 10:
        message = visitor.hears()
        assert isinstance(message, Chunks)
        assert message.route == KEY
        ids += [token for chunk in message.chunks for token in chunk.token_ids]
        count += len(message.chunks)
        assert len(ids) <= 10
        visitor.says(Credit(request_id(1), 1, len(ids) + 2))
    assert ids == [token_at(1, position) for position in range(10)]
    _, finish = broker.until(Finish)
    assert finish.chunks == count
    assert not broker.chunks(request_id(1))


def test_who_does_not_read_is_given_back_and_sent_away_when_he_does(
    broker: Broker, visit: Callable[..., tuple[bytes, Visitor]]
) -> None:
    peer, visitor = visit(narrow=True)
    ask(broker, peer, 1, 60_000, credit=10**6)
    _, answer = broker.until(Error)
    assert (answer.id, answer.code, answer.retryable) == (request_id(1), "worker_lost", True)
    assert visitor.until(Disconnect).code is DisconnectCode.EXPIRED
    ask(broker, peer, 2, 3, credit=8)
    assert broker.until(Finish)[1].chunks == 0
    assert broker.token_ids(request_id(2)) == [token_at(2, position) for position in range(3)]


def test_after_a_goodbye_nothing_is_sent_there(broker: Broker, visit: Callable[..., tuple[bytes, Visitor]]) -> None:
    peer, visitor = visit()
    visitor.says(Goodbye())
    visitor.says(Goodbye())  # nobody answers either
    deadline = time.monotonic() + WAIT_S
    for number in range(2, 1000):
        ask(broker, peer, number, 3, credit=8)
        _, finish = broker.until(Finish)
        if finish.chunks == 0 or time.monotonic() > deadline:
            break
    assert finish.chunks == 0
    assert broker.token_ids(request_id(number)) == [token_at(number, position) for position in range(3)]


def test_a_connection_that_is_gone_costs_its_streams_and_nobody_elses(
    broker: Broker, visit: Callable[..., tuple[bytes, Visitor]]
) -> None:
    peer, visitor = visit()
    ask(broker, peer, 1, 100_000, credit=10**6)
    visitor.until(Chunks)
    visitor.socket.close()
    _, answer = broker.until(Error)
    assert (answer.id, answer.code) == (request_id(1), "worker_lost")
    ask(broker, peer, 2, 3, credit=8)
    assert broker.until(Finish)[1].chunks == 0
