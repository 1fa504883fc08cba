"""The client library over real sockets, against a broker of a few lines that does what each test tells it."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from tokenmq.client import (
    AsyncClient,
    Attempt,
    BadRequestError,
    BrokerLostError,
    Client,
    ClientClosedError,
    DeadlineError,
    EndpointError,
    FirstTokenTimeoutError,
    InterTokenTimeoutError,
    ModelNotFoundError,
    NoBrokerError,
    Stream,
    connection,
)
from tokenmq.client.events import Action, Ask, Event
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import (
    NO_ID,
    Cancel,
    Chunk,
    Chunks,
    Considered,
    Credit,
    Decision,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Query,
    Reply,
    Request,
    Started,
    Timings,
    Usage,
    Welcome,
)
from tokenmq.protocol.payload import unpack_generation

#: A wait that ends only when something is broken.
PATIENCE_S = 10.0
#: As much of an image as a client looks at.
PNG = b"\x89PNG\r\n\x1a\n..."


class StubBroker:
    """A ROUTER in a thread, and its one worker: it keeps to credit, and goes on behind prior tokens.

    Attributes:
        tokens: the length of every stream, None for endless.
        stops_at: position at which every stream falls silent, None for never.
        stops_attempts: up to which attempt they do so.
        seen: messages that came, in order.
        answers: what is done about a kind of message in the place of the usual.
        inject: frames that are sent to whoever has a session.
    """

    def __init__(self, tokens: int | None = 5, endpoint: str = "tcp://127.0.0.1:*") -> None:
        self.tokens = tokens
        self.stops_at: int | None = None
        self.stops_attempts = 1_000_000
        self.seen: queue.Queue[Message] = queue.Queue()
        self.answers: dict[type[object], Callable[[Message], Message | None]] = {}
        self.inject: list[list[bytes]] = []
        self._sent: dict[bytes, int] = {}
        #: By request: who asked, which attempt, tokens sent, credit.
        self._streams: dict[bytes, tuple[bytes, int, int, int]] = {}
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._prepare(self._socket)
        self._socket.bind(endpoint)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        """Set what others have set on it."""

    def close(self) -> None:
        """Die: the ROUTER closes, without a goodbye."""
        self._stop.set()
        self._thread.join()

    def wait_for(self, kind: type[object]) -> Message:
        """Return the next message of this kind; forget those before it."""
        end = time.monotonic() + PATIENCE_S
        while True:
            message = self.seen.get(timeout=max(0.01, end - time.monotonic()))
            if isinstance(message, kind):
                return message

    def kinds_until(self, kind: type[object]) -> set[type[object]]:
        """Return the kinds of the messages up to the next one of this kind."""
        kinds: set[type[object]] = set()
        while kind not in kinds:
            kinds.add(type(self.seen.get(timeout=PATIENCE_S)))
        return kinds

    def sent_tokens(self) -> int:
        """Return how many tokens the open streams have been sent."""
        return sum(done for _, _, done, _ in self._streams.values())

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(5):
                peer, *frames = self._socket.recv_multipart()
                message = decode(frames)
                self._take(peer, message)
                self.seen.put(message)
            for peer in list(self._sent):
                while self.inject:
                    self._sent[peer] += 1
                    self._socket.send_multipart([peer, *self.inject.pop()])
        self._socket.close()
        self._context.term()

    def _say(self, peer: bytes, message: Message) -> None:
        self._sent[peer] = self._sent.get(peer, 0) + 1
        self._socket.send_multipart([peer, *encode(message)])

    def _take(self, peer: bytes, message: Message) -> None:
        answer = self.answers.get(type(message))
        if answer is not None:
            reply = answer(message)
            if reply is not None:
                self._say(peer, reply)
        elif isinstance(message, Hello):
            self._say(peer, Welcome("stub", "stub/1", 0.2, 1.0))
        elif isinstance(message, Heartbeat):
            self._say(peer, Heartbeat(self._sent[peer]))
        elif isinstance(message, Query):
            self._say(peer, Reply(message.id, [message.method]))
        elif isinstance(message, Request):
            envelope = message.envelope
            self._say(peer, Started(message.id, envelope.attempt, "stub-worker"))
            self._streams[message.id] = (peer, envelope.attempt, envelope.prior_tokens, envelope.credit)
            self._advance(message.id)
        elif isinstance(message, Credit) and self._runs(message):
            _, attempt, done, _ = self._streams[message.id]
            self._streams[message.id] = (peer, attempt, done, message.limit)
            self._advance(message.id)
        elif isinstance(message, Cancel) and self._runs(message):
            self._end(message.id, FinishReason.CANCELLED)
        elif isinstance(message, Goodbye):
            del self._sent[peer]

    def _runs(self, message: Credit | Cancel) -> bool:
        return message.id in self._streams and self._streams[message.id][1] == message.attempt

    def _advance(self, request_id: bytes) -> None:
        peer, attempt, done, limit = self._streams[request_id]
        stop = self.stops_at if attempt <= self.stops_attempts else None
        until = min(bound for bound in (limit, self.tokens, stop) if bound is not None)
        while done < until:
            self._say(peer, Chunks(NO_ID, (Chunk(request_id, attempt, 0, done, (done,), f"{done} "),)))
            done += 1
        self._streams[request_id] = (peer, attempt, done, limit)
        if done == self.tokens:
            self._end(request_id, FinishReason.LENGTH)

    def _end(self, request_id: bytes, reason: FinishReason) -> None:
        if request_id in self._streams:
            peer, attempt, done, _ = self._streams.pop(request_id)
            self._say(
                peer, Finish(request_id, attempt, reason, Usage(2, done), Timings(prefill_s=0.5), "stub-worker")
            )


@pytest.fixture
def new_broker() -> Iterator[Callable[..., StubBroker]]:
    brokers: list[StubBroker] = []

    def make(*args: int | None) -> StubBroker:
        brokers.append(StubBroker(*args))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.close()


NewBroker = Callable[..., StubBroker]


def wait_until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def wait_for_sessions(client: Client | AsyncClient) -> None:
    """Wait until all brokers are there: until then a request goes to the one that was quickest."""
    wait_until(lambda: all(session.open for session in client._connection._core.sessions))


def threads() -> int:
    return sum(thread.name.startswith("tokenmq-client") for thread in threading.enumerate())


# One request


def test_a_stream_to_its_end(new_broker: NewBroker) -> None:
    broker = new_broker(5)
    with Client(broker.endpoint) as client:
        stream = client.generate("m", prompt="The sea is")
        assert [chunk.text for chunk in stream] == ["0 ", "1 ", "2 ", "3 ", "4 "]
        assert stream.token_ids == [0, 1, 2, 3, 4]
        assert stream.usage == Usage(2, 5)
        assert stream.timings == Timings(prefill_s=0.5)
        assert (stream.finish_reason, stream.worker) == ("length", "stub-worker")
        assert stream.attempts == (Attempt(1, broker.endpoint, "stub-worker"),)
        assert len(stream.id) == 32
        assert list(stream) == []


def test_text_is_what_was_not_taken_yet(new_broker: NewBroker) -> None:
    with Client(new_broker(4).endpoint) as client:
        assert client.chat("m", messages=[{"role": "user", "content": "Hi"}]).text() == "0 1 2 3 "
        stream = client.generate("m", "x")
        assert next(stream).text == "0 "
        assert stream.text() == "1 2 3 "


def test_management_answers(new_broker: NewBroker) -> None:
    with Client(new_broker().endpoint) as client:
        assert client.models() == ["models"]
        assert client.workers() == ["workers"]
        assert client.status() == ["status"]


def test_a_query_without_an_answer_ends(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.answers[Query] = lambda _: None
    with Client(broker.endpoint, query_timeout_s=0.2) as client, pytest.raises(DeadlineError):
        client.models()


def test_an_error_is_raised_every_time(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.answers[Request] = lambda m: Error(m.id, 1, "model_not_found", "no worker serves 'm'")  # type: ignore[union-attr]
    with Client(broker.endpoint) as client:
        stream = client.generate("m", "x")
        for _ in range(2):
            with pytest.raises(ModelNotFoundError, match="no worker serves 'm'"):
                next(stream)
        assert stream.finish_reason == "error"
        assert stream.usage is None


def test_the_request_leaves_before_anybody_reads(new_broker: NewBroker) -> None:
    broker = new_broker()
    with Client(broker.endpoint) as client:
        stream = client.generate("m", "x", deadline_s=9.0, images=[PNG])
        request = broker.wait_for(Request)
        assert isinstance(request, Request)
        assert request.id.hex() == stream.id
        assert request.attachments == (PNG,)
        assert request.envelope.deadline_s == pytest.approx(9.0, abs=2.0)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"endpoints": ["tcp://127.0.0.1:1", "tcp://127.0.0.1:1"]}, BadRequestError, "each may stand there once"),
        ({"endpoints": []}, BadRequestError, "at least one"),
        ({"endpoints": 5555}, BadRequestError, "endpoints: expected a string or several, got 5555"),
        ({"endpoints": [5555]}, BadRequestError, "endpoints: expected strings, got 5555"),
        ({"endpoints": "127.0.0.1:1"}, EndpointError, "invalid endpoint"),
        ({"resume": 1}, BadRequestError, "resume: expected true or false"),
        ({"max_attempts": 0}, BadRequestError, "max_attempts: expected an integer from 1"),
        ({"queue_timeout_s": 0.0}, BadRequestError, "queue_timeout_s: expected seconds"),
        ({"hedge_after_s": 0}, BadRequestError, "hedge_after_s: expected seconds, more than 0"),
        ({"first_token_timeout_s": "1"}, BadRequestError, "first_token_timeout_s: expected seconds"),
        ({"inter_token_timeout_s": float("inf")}, BadRequestError, "inter_token_timeout_s: expected seconds"),
    ],
)
def test_a_wrong_setting_is_named_at_once(
    kind: Any, arguments: dict[str, object], error: type[Exception], told: str
) -> None:
    before = threads()
    with pytest.raises(error, match=told):
        kind(**arguments)
    assert threads() == before


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": "x", "resume": "yes"}, "resume"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "deadline_s": -1.0}, "deadline_s"),
        ({"prompt": "x", "priority": 10}, "priority"),
        ({"prompt": "x", "session": ""}, "session"),
        ({"prompt": "x", "hedge_after_s": 0.0}, "hedge_after_s"),
        ({"prompt": "x", "explain": "yes"}, "explain"),
        ({"prompt": "x", "images": [7]}, "images"),
        ({"prompt": "x", "images": b"bytes"}, "images"),
        ({"prompt": "x", "token_ids": [1]}, "prompt and token_ids"),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"model": "", "prompt": "x"}, "model"),
        ({"model": "\ud800", "prompt": "x"}, "surrogates"),
    ],
)
def test_a_wrong_argument_is_named_at_once(arguments: dict[str, object], field: str) -> None:
    with Client("tcp://127.0.0.1:1") as client, pytest.raises(BadRequestError, match=field):
        client.generate(**{"model": "m", **arguments})  # type: ignore[arg-type]


# Brokers that are not there, die, or talk nonsense


def test_no_broker_is_said_in_time() -> None:
    started = time.monotonic()
    with Client(["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"], connect_timeout_s=0.4) as client:
        stream = client.generate("m", "x")
        with pytest.raises(NoBrokerError, match=r"tcp://127\.0\.0\.1:1, tcp://127\.0\.0\.1:2"):
            client.models()
        with pytest.raises(NoBrokerError):
            next(stream)
    assert 0.4 <= time.monotonic() - started < 2.0


def test_a_broker_that_starts_late_is_found(new_broker: NewBroker) -> None:
    first = new_broker()
    endpoint = first.endpoint
    first.close()
    with Client(endpoint) as client:
        stream = client.generate("m", "x")
        late = StubBroker(2, endpoint)
        try:
            assert stream.text() == "0 1 "
        finally:
            late.close()


def test_a_broker_that_dies_in_mid_stream(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    with Client(broker.endpoint) as client:
        stream = client.generate("m", "x", resume=False)
        next(stream)
        broker.close()
        with pytest.raises(BrokerLostError, match="connection disconnected") as caught:  # and not "nothing heard"
            stream.text()
        assert caught.value.retryable
        assert caught.value.request_id == stream.id


def test_what_a_broker_said_before_it_died_is_read(new_broker: NewBroker) -> None:
    broker = new_broker(200)
    with Client(broker.endpoint) as client:
        stream = client.generate("m", "x")
        broker.wait_for(Request)
        broker.close()
        assert len(stream.text().split()) == 200
        assert stream.finish_reason == "length"


def numbers(until: int) -> str:
    return "".join(f"{number} " for number in range(until))


def test_a_stream_goes_on_at_the_next_broker(new_broker: NewBroker) -> None:
    first, second = new_broker(None), new_broker(40)
    with Client([first.endpoint, second.endpoint], window_tokens=16) as client:
        wait_for_sessions(client)
        stream = client.generate("m", "x", images=[PNG])
        text = next(stream).text
        sent = first.wait_for(Request)
        first.close()
        assert text + stream.text() == numbers(40)
        assert stream.token_ids == list(range(40))
        assert (stream.finish_reason, stream.usage) == ("length", Usage(2, 40))
        again = second.wait_for(Request)
        assert isinstance(sent, Request)
        assert isinstance(again, Request)
        assert (again.id, again.attachments, again.envelope.attempt) == (sent.id, sent.attachments, 2)
        prior = unpack_generation(again.payload).prior
        assert prior is not None
        had = again.envelope.prior_tokens
        assert (prior.token_ids, prior.text_chars) == (tuple(range(had)), len(numbers(had)))
        lost, last = stream.attempts
        assert (lost.number, lost.broker, lost.worker, lost.first_token) == (1, first.endpoint, "stub-worker", 0)
        assert isinstance(lost.error, BrokerLostError)
        assert last == Attempt(2, second.endpoint, "stub-worker", had)
        assert client.generate("m", "x").text() == numbers(40)


def test_many_streams_go_on_at_the_next_broker(new_broker: NewBroker) -> None:
    first, second = new_broker(None), new_broker(100)
    with Client([first.endpoint, second.endpoint], window_tokens=8) as client:
        wait_for_sessions(client)
        streams = [client.generate("m", "x") for _ in range(30)]
        for stream in streams:
            next(stream)
        first.close()
        for stream in streams:
            stream.text()
            assert stream.token_ids == list(range(100))
            assert len(stream.attempts) == 2


def test_a_stream_goes_on_at_the_same_broker_when_it_is_back(new_broker: NewBroker) -> None:
    first = new_broker(None)
    with Client(first.endpoint) as client:
        stream = client.generate("m", "x")
        text = next(stream).text
        first.close()
        late = StubBroker(300, first.endpoint)
        try:
            assert text + stream.text() == numbers(300)
        finally:
            late.close()


def test_without_repair_the_next_broker_is_for_new_requests(new_broker: NewBroker) -> None:
    first, second = new_broker(None), new_broker(3)
    with Client([first.endpoint, second.endpoint], resume=False) as client:
        wait_for_sessions(client)
        stream = client.generate("m", "x")
        next(stream)
        first.close()
        with pytest.raises(BrokerLostError):
            stream.text()
        assert [attempt.broker for attempt in stream.attempts] == [first.endpoint]
        assert client.generate("m", "x").text() == "0 1 2 "


def test_a_worker_that_falls_silent_after_it_has_started_is_left(new_broker: NewBroker) -> None:
    broker = new_broker(20)
    broker.stops_at, broker.stops_attempts = 0, 1
    with Client(broker.endpoint, first_token_timeout_s=0.2) as client:
        stream = client.generate("m", "x")
        cancel = broker.wait_for(Cancel)
        assert isinstance(cancel, Cancel)
        assert cancel.attempt == 1
        assert stream.text() == numbers(20)
        assert isinstance(stream.attempts[0].error, FirstTokenTimeoutError)
        assert stream.attempts[0].worker == "stub-worker"


def test_a_worker_that_falls_silent_between_tokens_is_left(new_broker: NewBroker) -> None:
    broker = new_broker(20)
    broker.stops_at, broker.stops_attempts = 7, 1
    with Client(broker.endpoint, inter_token_timeout_s=0.2) as client:
        stream = client.generate("m", "x")
        broker.wait_for(Cancel)
        assert stream.text() == numbers(20)
        assert isinstance(stream.attempts[0].error, InterTokenTimeoutError)
        again = broker.wait_for(Request)
        assert isinstance(again, Request)
        assert (again.envelope.attempt, again.envelope.avoid) == (2, ("stub-worker",))


@pytest.mark.parametrize("wide", [True, False], ids=["client", "request"])
def test_a_late_worker_is_hedged_and_the_first_answer_counts(new_broker: NewBroker, wide: bool) -> None:
    broker = new_broker(20)
    broker.stops_at, broker.stops_attempts = 0, 1
    of_client, of_request = ({"hedge_after_s": 0.1}, {}) if wide else ({}, {"hedge_after_s": 0.1})
    with Client(broker.endpoint, **of_client) as client:  # type: ignore[arg-type]
        stream = client.generate("m", "x", **of_request)  # type: ignore[arg-type]
        assert stream.text() == numbers(20)
        first, second = broker.wait_for(Request), broker.wait_for(Request)
        assert isinstance(first, Request)
        assert isinstance(second, Request)
        assert (first.envelope.hedge, second.envelope.hedge) == (False, True)
        assert second.envelope.avoid == ("stub-worker",)
        cancel = broker.wait_for(Cancel)
        assert isinstance(cancel, Cancel)
        assert cancel.attempt == 1
        assert stream.attempts == (
            Attempt(1, broker.endpoint, "stub-worker", cancelled=True),
            Attempt(2, broker.endpoint, "stub-worker", hedge=True),
        )


def test_a_request_may_do_without_the_clients_hedges(new_broker: NewBroker) -> None:
    broker = new_broker(5)
    broker.stops_at, broker.stops_attempts = 0, 1
    with Client(broker.endpoint, hedge_after_s=0.05, first_token_timeout_s=0.5) as client:
        stream = client.generate("m", "x", hedge_after_s=math.inf)
        assert stream.text() == "0 1 2 3 4 "
        assert isinstance(stream.attempts[0].error, FirstTokenTimeoutError)
        assert not any(attempt.hedge for attempt in stream.attempts)


def test_decisions_come_to_the_reader(new_broker: NewBroker) -> None:
    broker = new_broker()
    decision = Decision("stub", "shortest-queue", "w", 2, (Considered("w", 0, 4, 50.0, 0.0),))

    def answer(message: Message) -> Message:
        assert isinstance(message, Request)
        routing = (decision,) if message.envelope.explain else ()
        return Finish(message.id, 1, FinishReason.STOP, Usage(), Timings(routing=routing), "w")

    broker.answers[Request] = answer
    with Client(broker.endpoint) as client:
        told, untold = client.generate("m", "x", explain=True), client.generate("m", "x")
        assert told.text() == untold.text() == ""
        assert told.timings == Timings(routing=(decision,))
        assert untold.timings == Timings()


def test_a_worker_that_never_speaks_is_told_of_after_the_last_attempt(new_broker: NewBroker) -> None:
    broker = new_broker(20)
    broker.stops_at = 0
    with Client(broker.endpoint, first_token_timeout_s=0.1, max_attempts=2) as client:
        stream = client.generate("m", "x")
        with pytest.raises(FirstTokenTimeoutError, match="the last of 2 attempts"):
            stream.text()
        assert [attempt.number for attempt in stream.attempts] == [1, 2]


def test_a_client_that_was_stopped_gives_nobody_up(new_broker: NewBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The I/O thread is kept from running in the midst of a turn, for longer than the session's expiry."""
    broker = new_broker(None)
    with Client(broker.endpoint) as client:
        assert client.models() == ["models"]
        core = client._connection._core
        handle, stopped = core.handle, threading.Event()

        def stop_once(event: Event, now: float) -> list[Action]:
            if isinstance(event, Ask) and not stopped.is_set():
                stopped.set()
                threading.Event().wait(1.5)
            return handle(event, now)

        monkeypatch.setattr(core, "handle", stop_once)
        assert client.status() == ["status"]
        assert stopped.is_set()
        assert client.workers() == ["workers"]
        assert Goodbye not in broker.kinds_until(Heartbeat)


def test_no_descriptors_left_for_a_socket_is_a_failed_try(
    new_broker: NewBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, tries = connection.Link, [2]

    def fail_twice(*arguments: Any, **options: Any) -> Any:
        if tries[0]:
            tries[0] -= 1
            raise zmq.ZMQError(errno.EMFILE)
        return link(*arguments, **options)

    monkeypatch.setattr(connection, "Link", fail_twice)
    with Client(new_broker(2).endpoint) as client:
        assert client.generate("m", "x").text() == "0 1 "
    assert tries == [0]


def test_a_dead_broker_beside_a_living_one_is_no_news(
    new_broker: NewBroker, caplog: pytest.LogCaptureFixture
) -> None:
    dead, living = new_broker(), new_broker(3)
    dead.close()
    with caplog.at_level(logging.INFO, "tokenmq"), Client([dead.endpoint, living.endpoint]) as client:
        assert client.generate("m", "x").text() == "0 1 2 "
        tries = client._connection._core.sessions[dead.endpoint]
        wait_until(lambda: bool(tries.failure))  # at least one has failed
        assert client.generate("m", "x").text() == "0 1 2 "
    assert [record.tokenmq["event"] for record in caplog.records] == ["session_opened"]


def test_a_broker_that_falls_silent_is_given_up(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    broker.answers[Heartbeat] = broker.answers[Credit] = lambda _: None
    with Client(broker.endpoint) as client:
        stream = client.generate("m", "x", resume=False)
        with pytest.raises(BrokerLostError, match="nothing heard"):
            stream.text()


@pytest.mark.parametrize(
    "frames", [[b"nonsense"], [b""], [b""] * 300, encode(Hello("c", "s")), encode(Heartbeat(12345))]
)
def test_nonsense_ends_the_session_and_the_next_is_sound(new_broker: NewBroker, frames: list[bytes]) -> None:
    broker = new_broker(None)
    with Client(broker.endpoint) as client:
        stream, brittle = client.generate("m", "x"), client.generate("m", "x", resume=False)
        next(stream)
        next(brittle)
        broker.inject.append(list(frames))
        with pytest.raises(BrokerLostError):
            brittle.text()
        broker.wait_for(Goodbye)
        broker.tokens = 600
        stream.text()
        assert stream.token_ids == list(range(600))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x93\x01\x02",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\x91\x96\x01\x02\x03\x04\x05\x06",
        b".",
    ],
)
def test_chunks_that_cannot_be_read_are_the_problem_of_nobody_else(
    new_broker: NewBroker, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    """A broker forwards what a worker sends unread: what one of them makes up must not hurt another one's streams."""
    broker = new_broker(None)
    with caplog.at_level(logging.INFO, "tokenmq"), Client(broker.endpoint, window_tokens=8) as client:
        stream = client.generate("m", "x", resume=False)
        next(stream)
        frames = encode(Chunks(b"r" * 16, ()))
        for _ in range(50):
            broker.inject.append([frames[0][:24] + body])
        core = client._connection._core
        wait_until(lambda: core.dropped["garbled"] == 50)
        broker.kinds_until(Heartbeat)  # ours is answered with the number of messages that were sent so far
        for position in range(1, 200):
            assert next(stream).token_ids == (position,)
        assert core.sessions[broker.endpoint].open
        assert len(stream.attempts) == 1
    assert sum("chunks_garbled" in record.getMessage() for record in caplog.records) == 1


def test_a_stream_whose_own_chunks_cannot_be_read_goes_on_elsewhere(new_broker: NewBroker) -> None:
    broker = new_broker(4)
    with Client(broker.endpoint, window_tokens=8) as client:
        wait_for_sessions(client)
        hold = threading.Event()
        say, broken = broker._say, [True]

        def break_one(peer: bytes, message: Message) -> None:
            if isinstance(message, Chunks) and message.chunks[0].offset == 2 and broken.pop():
                broken.append(False)
                broker._sent[peer] += 1
                broker._socket.send_multipart([peer, encode(message)[0][:-3]])
                hold.set()
            else:
                say(peer, message)

        broker._say = break_one  # type: ignore[method-assign]
        stream = client.generate("m", "x")
        assert stream.text() == "0 1 2 3 "
        assert hold.is_set()
        assert [(each.number, each.first_token, each.error and each.error.code) for each in stream.attempts] == [
            (1, 0, "worker_lost"),
            (2, 2, None),
        ]


# Credit, cancel, close


def test_credit_is_granted_as_the_reader_reads(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    with Client(broker.endpoint, window_tokens=8) as client:
        stream = client.generate("m", "x")
        for _ in range(3):
            next(stream)
        # Everything that a reader who takes less than half a window causes is there before this answer.
        assert client.models() == ["models"]
        assert Credit not in broker.kinds_until(Query)
        next(stream)
        credit = broker.wait_for(Credit)
        assert isinstance(credit, Credit)
        assert credit.limit == 12


def test_a_reader_that_stops_gets_no_more_than_the_window(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    with Client(broker.endpoint, window_tokens=8) as client:
        stream = client.generate("m", "x")
        broker.wait_for(Heartbeat)
        broker.wait_for(Heartbeat)
        assert len(stream._mailbox._chunks) == 8
        assert broker.sent_tokens() == 8


def test_leaving_the_loop_cancels(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    with Client(broker.endpoint) as client:
        stream = client.generate("m", "x")
        next(stream)  # takes one, and leaves the stream as it is
        assert stream.finish_reason is None
        for _chunk in stream:
            break
        broker.wait_for(Cancel)
        assert stream.model == "m"  # although it can still be referred to
        rest = list(stream)  # what had come, and then the end
        assert len(rest) < 300
        assert stream.finish_reason == "cancelled"


def test_the_end_of_the_block_cancels(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    with Client(broker.endpoint) as client:
        with client.generate("m", "x") as stream:
            next(stream)
        broker.wait_for(Cancel)
        assert stream.finish_reason == "cancelled"
        assert list(stream) == []


def test_cancel_wakes_a_reader_in_another_thread(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.answers[Request] = lambda _: None
    with Client(broker.endpoint) as client:
        stream = client.generate("m", "x")
        reader = threading.Thread(target=stream.text)
        reader.start()
        broker.wait_for(Request)
        assert (stream.usage, stream.finish_reason, stream.timings, stream.worker) == (None,) * 4
        stream.cancel()
        reader.join(PATIENCE_S)
        assert not reader.is_alive()


def test_close_ends_open_streams_and_threads(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.answers[Request] = lambda _: None
    client = Client(broker.endpoint)
    caught: queue.Queue[BaseException] = queue.Queue()

    def read(stream: Stream) -> None:
        try:
            stream.text()
        except ClientClosedError as error:
            caught.put(error)

    readers = [threading.Thread(target=read, args=(client.generate("m", "x"),)) for _ in range(4)]
    for reader in readers:
        reader.start()
    broker.wait_for(Request)
    client.close()
    for reader in readers:
        reader.join(PATIENCE_S)
    assert caught.qsize() == 4
    assert threads() == 0
    broker.wait_for(Goodbye)
    client.close()
    with pytest.raises(ClientClosedError):
        client.generate("m", "x")
    with pytest.raises(ClientClosedError):
        client.models()


def test_a_forgotten_client_gives_its_thread_back(new_broker: NewBroker) -> None:
    broker = new_broker()
    client = Client(broker.endpoint)
    assert client.models() == ["models"]
    gone = weakref.ref(client)
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("tokenmq-client")]
    del client
    gc.collect()
    assert gone() is None
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    broker.wait_for(Goodbye)


def test_a_stream_keeps_its_client(new_broker: NewBroker) -> None:
    assert Client(new_broker(3).endpoint).generate("m", "x").text() == "0 1 2 "


def test_the_interpreter_exits_with_a_stream_open(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    program = (
        "import sys; from tokenmq.client import Client\n"
        "client = Client(sys.argv[1]); stream = client.generate('m', 'x'); print(next(stream).text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, broker.endpoint],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 \n", "")


def test_a_bug_in_the_thread_fails_streams_and_does_not_hang(
    new_broker: NewBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker = new_broker(None)
    with Client(broker.endpoint, window_tokens=4) as client:
        stream = client.generate("m", "x")
        next(stream)

        def fail(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(client._connection._core, "tick", fail)
        with caplog.at_level(logging.ERROR, "tokenmq.client"), pytest.raises(ClientClosedError, match="a bug"):
            stream.text()
        with pytest.raises(ClientClosedError, match="a bug"):
            client.models()
        assert "I/O thread failed" in caplog.text


def test_no_descriptors_left_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(zmq, "Context", fail)
    with pytest.raises(zmq.ZMQError, match="Too many open files"):
        Client("tcp://127.0.0.1:9")


def test_many_threads_share_a_client(new_broker: NewBroker) -> None:
    texts: queue.Queue[str] = queue.Queue()
    with Client(new_broker(50).endpoint, window_tokens=8) as client:

        def work() -> None:
            for _ in range(5):
                texts.put(client.generate("m", "x").text())

        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE_S)
    assert texts.qsize() == 40
    assert {texts.get() for _ in range(40)} == {"".join(f"{number} " for number in range(50))}


# asyncio


def test_async_streams_and_queries(new_broker: NewBroker) -> None:
    async def main() -> None:
        async with AsyncClient([new_broker(5).endpoint]) as client:
            streams = [client.generate("m", "x") for _ in range(20)]
            texts = await asyncio.gather(*(stream.text() for stream in streams))
            assert set(texts) == {"0 1 2 3 4 "}
            assert [chunk.offset async for chunk in client.generate("m", "x")] == [0, 1, 2, 3, 4]
            assert streams[0].usage == Usage(2, 5)
            assert await client.models() == ["models"]
        assert threads() == 0

    asyncio.run(main())


def test_an_async_stream_goes_on_at_the_next_broker(new_broker: NewBroker) -> None:
    first, second = new_broker(None), new_broker(40)

    async def main() -> None:
        async with AsyncClient([first.endpoint, second.endpoint], window_tokens=16) as client:
            await asyncio.to_thread(wait_for_sessions, client)
            stream = client.generate("m", "x")
            text = (await anext(stream)).text
            await asyncio.to_thread(first.close)
            assert text + await stream.text() == numbers(40)
            assert stream.token_ids == list(range(40))
            assert [attempt.broker for attempt in stream.attempts] == [first.endpoint, second.endpoint]
            again = await asyncio.to_thread(second.wait_for, Request)
            assert isinstance(again, Request)
            assert again.envelope.prior_tokens == stream.attempts[1].first_token > 0

    asyncio.run(main())


def test_async_no_broker() -> None:
    async def main() -> None:
        async with AsyncClient("tcp://127.0.0.1:1", connect_timeout_s=0.2) as client:
            stream = client.generate("m", "x")
            with pytest.raises(NoBrokerError):
                await client.status()
            with pytest.raises(NoBrokerError):
                await stream.text()

    asyncio.run(main())


def test_leaving_an_async_loop_cancels(new_broker: NewBroker) -> None:
    broker = new_broker(None)

    async def main() -> None:
        async with AsyncClient(broker.endpoint) as client:
            stream = client.generate("m", "x")
            async for _chunk in stream:
                break
            await asyncio.to_thread(broker.wait_for, Cancel)
            assert stream.model == "m"  # although it can still be referred to

    asyncio.run(main())


def test_cancelling_the_task_cancels_the_stream(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.answers[Request] = lambda _: None

    async def main() -> None:
        async with AsyncClient(broker.endpoint) as client:
            stream = client.generate("m", "x")
            task = asyncio.create_task(stream.text())
            await asyncio.to_thread(broker.wait_for, Request)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(broker.wait_for, Cancel)
            assert stream.finish_reason == "cancelled"

    asyncio.run(main())


def test_async_close_raises_in_readers(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.answers[Request] = lambda _: None

    async def main() -> None:
        client = AsyncClient(broker.endpoint)
        task = asyncio.create_task(client.generate("m", "x").text())
        await asyncio.to_thread(broker.wait_for, Request)
        await client.close()
        with pytest.raises(ClientClosedError):
            await task
        with pytest.raises(ClientClosedError):
            await client.models()

    asyncio.run(main())


def test_a_stream_belongs_to_its_loop_and_to_one_task(new_broker: NewBroker) -> None:
    broker = new_broker()
    broker.answers[Request] = lambda _: None

    async def main() -> None:
        async with AsyncClient(broker.endpoint) as client:
            stream = client.generate("m", "x")
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, stream.text())
            first = asyncio.create_task(stream.text())
            await asyncio.to_thread(broker.wait_for, Request)
            with pytest.raises(RuntimeError, match="another task"):
                await stream.text()
            assert stream.finish_reason is None, "the one who reads is not disturbed"
            stream.cancel()
            assert await first == ""

    asyncio.run(main())


def test_several_event_loops_share_a_client(new_broker: NewBroker) -> None:
    client = AsyncClient(new_broker(50).endpoint, window_tokens=8)
    texts: queue.Queue[str] = queue.Queue()

    async def main() -> None:
        for text in await asyncio.gather(*(client.generate("m", "x").text() for _ in range(10))):
            texts.put(text)

    loops = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(3)]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join(PATIENCE_S)
    asyncio.run(client.close())
    assert texts.qsize() == 30
    assert len({texts.get() for _ in range(30)}) == 1


def test_a_closed_loop_cancels_its_streams(new_broker: NewBroker) -> None:
    broker = new_broker(None)
    closed = threading.Event()

    def first_chunk(request: Message) -> Message:
        assert isinstance(request, Request)
        closed.wait(PATIENCE_S)  # else the whole window may come while the loop still takes it
        return Chunks(NO_ID, (Chunk(request.id, 1, 0, 0, (0,), "0 "),))

    broker.answers[Request] = first_chunk
    client = AsyncClient(broker.endpoint, window_tokens=4)
    kept = []

    async def main() -> None:
        kept.append(client.generate("m", "x"))

    asyncio.run(main())
    closed.set()
    broker.wait_for(Cancel)
    asyncio.run(client.close())
