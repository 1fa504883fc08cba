"""WorkerServer on real sockets, against a broker that is a ROUTER in the test's own hands."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import zmq

from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    Draining,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Message,
    Ready,
    Request,
    WorkerState,
)
from tokenmq.protocol.messages import Drain as DrainMessage
from tokenmq.protocol.messages import ModelInfo as Model
from tokenmq.protocol.payload import Generation, Prior, Sampling, pack_generation
from tokenmq.transport.endpoints import EndpointError
from tokenmq.worker import server as server_module
from tokenmq.worker.engines.base import Engine, EngineLoadError, Output, Tokens
from tokenmq.worker.engines.synthetic import SyntheticEngine, text_of, token_at
from tokenmq.worker.server import WorkerServer
from tokenmq.worker.settings import WorkerSettings

WAIT_S = 15.0
ROUTE = b"route-of-client1"
KindT = TypeVar("KindT")


def request_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def expected_text(seed: int, count: int) -> str:
    return "".join(text_of(token_at(seed, position)) for position in range(count))


def state_is(state: WorkerState) -> Callable[[Heartbeat], bool]:
    return lambda beat: beat.load is not None and beat.load.state is state


class Broker:
    """A ROUTER that does what the test says; it answers READY with ACCEPTED and nothing else by itself."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*", heartbeat_s: float = 0.05, expiry_s: float = 5.0) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.intervals = (heartbeat_s, expiry_s)
        self.sent: dict[bytes, int] = {}
        self.heard: dict[bytes, list[Message]] = {}

    def send(self, peer: bytes, message: Message) -> None:
        self.sent[peer] = self.sent.get(peer, 0) + 1
        self.socket.send_multipart([peer, *encode(message)])

    def receive(self, timeout_s: float = WAIT_S) -> tuple[bytes, Message]:
        """Return the next message, checked: READY comes first, heartbeats have counted right."""
        assert self.socket.poll(timeout_s * 1000), "the worker says nothing"
        peer, *frames = self.socket.recv_multipart()
        message = decode(frames)
        heard = self.heard.setdefault(peer, [])
        if isinstance(message, Heartbeat):
            assert message.sent == len(heard)
        if not heard:
            assert isinstance(message, Ready)
            self.send(peer, Accepted("stub", "test", *self.intervals))
        heard.append(message)
        return peer, message

    def until(self, kind: type[KindT], such: Callable[[KindT], bool] = lambda message: True) -> tuple[bytes, KindT]:
        """Receive until such a message comes."""
        limit = time.monotonic() + WAIT_S
        while time.monotonic() < limit:
            peer, message = self.receive()
            if isinstance(message, kind) and such(message):
                return peer, message
        raise AssertionError(f"no such {kind.__name__} came")

    def ready(self) -> bytes:
        """Wait for a worker that takes requests."""
        return self.until(Ready, lambda message: message.load.state is WorkerState.READY)[0]

    def request(
        self,
        peer: bytes,
        number: int = 1,
        *,
        credit: int = 10**6,
        tokens: int = 20,
        seed: int = 3,
        stop: tuple[str, ...] = (),
        attempt: int = 1,
        prior: Prior | None = None,
    ) -> bytes:
        sampling = Sampling(max_tokens=tokens, seed=seed, stop=stop)
        payload = pack_generation(Generation(prompt="a b", sampling=sampling, prior=prior))
        known = 0 if prior is None else len(prior.token_ids)
        envelope = Envelope("toy", attempt, credit, route=ROUTE, prior_tokens=known)
        self.send(peer, Request(request_id(number), envelope, payload))
        return request_id(number)

    def chunks(self, subject: bytes, attempt: int = 1) -> list[Chunk]:
        messages = [message for heard in self.heard.values() for message in heard if isinstance(message, Chunks)]
        found = [chunk for message in messages for chunk in message.chunks if chunk.request_id == subject]
        return [chunk for chunk in found if chunk.attempt == attempt]

    def text(self, subject: bytes, attempt: int = 1) -> str:
        return "".join(chunk.text for chunk in self.chunks(subject, attempt))

    def token_ids(self, subject: bytes, attempt: int = 1) -> list[int]:
        """Return a stream's tokens so far; its chunks must follow one another."""
        chunks = self.chunks(subject, attempt)
        for before, chunk in pairwise(chunks):
            assert chunk.offset == before.offset + len(before.token_ids)
        return [token for chunk in chunks for token in chunk.token_ids]

    def close(self) -> None:
        self.context.destroy(linger=0)


class Worker:
    """A WorkerServer in a thread of its own."""

    def __init__(self, engine: Engine, *brokers: str, **values: Any) -> None:
        settings = WorkerSettings(brokers=brokers, **{"models": ("toy",), "name": "w1", "slots": 4, **values})
        self.server = WorkerServer(engine, settings)
        self.exit_codes: list[int] = []
        self.thread = threading.Thread(target=lambda: self.exit_codes.append(self.server.run()))
        self.thread.start()

    def exit_code(self) -> int:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), "the worker does not stop"
        return self.exit_codes[0]

    def close(self) -> None:
        self.server.drain(0.0)
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), "the worker does not stop"


@pytest.fixture
def broker() -> Iterator[Broker]:
    with contextlib.closing(Broker()) as stub:
        yield stub


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def begin(*arguments: Any, **values: Any) -> Worker:
        workers.append(Worker(*arguments, **values))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.close()


class Gate(SyntheticEngine):
    """A synthetic engine whose load or steps wait for the test, or fail on its word."""

    def __init__(self, *, hold_load: bool = False, hold_steps: bool = False, fail_steps: int = 0) -> None:
        super().__init__(name="toy")
        self.go = threading.Event()
        self.entered = threading.Event()
        self.hold_load = hold_load
        self.hold_steps = hold_steps
        self.fail_steps = fail_steps

    def load(self) -> Sequence[Model]:
        if self.hold_load:
            assert self.go.wait(WAIT_S)
        return super().load()

    def step(self) -> Sequence[Output]:
        self.entered.set()
        if self.hold_steps:
            assert self.go.wait(WAIT_S)
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("cuda says no")
        return super().step()


def toy(**values: Any) -> SyntheticEngine:
    return SyntheticEngine(name="toy", **values)


def test_it_registers_while_it_loads_and_again_when_it_is_ready(broker: Broker, start: Any) -> None:
    engine = Gate(hold_load=True)
    start(engine, broker.endpoint)
    peer, ready = broker.until(Ready)
    assert (ready.worker, ready.models, ready.load.state) == ("w1", (Model("toy"),), WorkerState.LOADING)
    broker.until(Heartbeat)  # the load does not keep it from beating
    broker.request(peer)
    _, error = broker.until(Error)
    assert (error.code, error.retryable) == ("no_worker", True)
    engine.go.set()
    assert broker.ready() == peer
    expected = (Model("toy", chat=True, resumes=True, embeds=True, images=True),)
    assert broker.heard[peer][-1].models == expected  # type: ignore[union-attr]


def test_a_stream_arrives_to_the_last_character(broker: Broker, start: Any) -> None:
    start(toy(), broker.endpoint)
    peer = broker.ready()
    subject = broker.request(peer, tokens=300, seed=11)
    _, end = broker.until(Finish)
    assert (end.id, end.reason, end.usage.prompt_tokens, end.usage.completion_tokens) == (
        subject,
        FinishReason.LENGTH,
        2,
        300,
    )
    assert broker.text(subject) == expected_text(11, 300)


def test_credit_holds_a_stream_and_others_go_on(broker: Broker, start: Any) -> None:
    start(toy(), broker.endpoint)
    peer = broker.ready()
    slow = broker.request(peer, 1, credit=5, tokens=50, seed=1)
    fast = broker.request(peer, 2, tokens=50, seed=2)
    assert broker.until(Finish)[1].id == fast
    assert broker.text(slow) == expected_text(1, 5)
    broker.send(peer, Credit(slow, 1, 7))
    _, chunks = broker.until(Chunks)
    assert [(chunk.offset, len(chunk.token_ids)) for chunk in chunks.chunks] == [(5, 2)]
    broker.send(peer, Credit(slow, 1, 50))
    assert broker.until(Finish)[1].id == slow
    assert broker.text(slow) == expected_text(1, 50)


def test_cancel_ends_a_stream(broker: Broker, start: Any) -> None:
    start(toy(tokens_per_second=20.0), broker.endpoint)
    peer = broker.ready()
    subject = broker.request(peer, tokens=100_000)
    broker.until(Chunks)
    broker.send(peer, Cancel(subject, 1))
    broker.send(peer, Cancel(subject, 1))
    assert broker.until(Finish)[1].reason is FinishReason.CANCELLED
    _, beat = broker.until(Heartbeat)
    assert beat.load is not None
    assert (beat.load.held, beat.load.running) == (0, 0)


def test_a_step_that_blocks_does_not_stop_the_heartbeats(broker: Broker, start: Any) -> None:
    engine = Gate(hold_steps=True)
    start(engine, broker.endpoint, stall_after_s=0.3)
    peer = broker.ready()
    broker.request(peer)
    assert engine.entered.wait(WAIT_S)
    _, stalled = broker.until(
        Heartbeat, lambda beat: beat.load is not None and beat.load.state is WorkerState.STALLED
    )
    assert stalled.load is not None
    assert stalled.load.step_age_s >= 0.3
    assert stalled.load.held == 1
    beats = [message for message in broker.heard[peer] if isinstance(message, Heartbeat)]
    assert len(beats) >= 3
    engine.go.set()
    broker.until(Heartbeat, state_is(WorkerState.READY))
    if not any(isinstance(message, Finish) for message in broker.heard[peer]):
        broker.until(Finish)


def test_a_step_that_raises_fails_the_requests_and_the_worker_goes_on(broker: Broker, start: Any) -> None:
    start(Gate(fail_steps=1), broker.endpoint)
    peer = broker.ready()
    broker.request(peer, 1)
    _, error = broker.until(Error)
    assert (error.id, error.code, error.retryable) == (request_id(1), "engine_failed", True)
    assert "cuda says no" in error.message
    subject = broker.request(peer, 2)
    assert broker.until(Finish)[1].id == subject


def test_a_model_that_cannot_be_loaded_ends_the_worker(
    broker: Broker, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SyntheticEngine):
        def load(self) -> Sequence[Model]:
            raise EngineLoadError("no model at /nowhere")

    with caplog.at_level(logging.INFO, "tokenmq.worker"):
        assert start(Broken(), broker.endpoint).exit_code() == 2
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len([line for line in lines if line.startswith("model_load_failed")]) == 1
    assert "no model at /nowhere" in lines[0]


def test_a_broker_that_comes_back_gets_the_worker_again(start: Any) -> None:
    with contextlib.closing(Broker()) as first:
        start(toy(tokens_per_second=50.0), first.endpoint)
        peer = first.ready()
        first.request(peer, tokens=100_000)
        first.until(Chunks)
        endpoint = first.endpoint
    with contextlib.closing(Broker(endpoint)) as second:
        peer = second.ready()
        _, beat = second.until(Heartbeat)
        assert beat.load is not None
        assert beat.load.held == 0
        subject = second.request(peer, tokens=5)
        assert second.until(Finish)[1].id == subject


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [b""],
        encode(Goodbye()),
        encode(Disconnect(DisconnectCode.UNKNOWN_PEER, "who are you?")),
        encode(Heartbeat(77)),
        encode(Draining()),
        [b"x"] * 300,
    ],
)
def test_whatever_a_broker_says_the_worker_comes_back(broker: Broker, start: Any, frames: list[bytes]) -> None:
    start(toy(), broker.endpoint)
    peer = broker.ready()
    broker.until(Heartbeat)
    broker.socket.send_multipart([peer, *frames])
    again = broker.until(Ready)[0]
    assert again != peer
    subject = broker.request(again)
    assert broker.until(Finish)[1].id == subject


def test_a_silent_broker_is_left_and_dialled_again(start: Any) -> None:
    with contextlib.closing(Broker(expiry_s=0.3)) as broker:
        start(toy(), broker.endpoint)
        peer = broker.ready()
        while (found := broker.receive())[0] == peer:
            pass
        assert isinstance(found[1], Ready)


def test_superseded_by_all_brokers_it_stops(broker: Broker, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Broker()) as other, caplog.at_level(logging.INFO, "tokenmq.worker"):
        worker = start(toy(), broker.endpoint, other.endpoint)
        superseded = Disconnect(DisconnectCode.SUPERSEDED, "a newer one has come")
        broker.send(broker.ready(), superseded)
        peer = other.ready()
        subject = other.request(peer)
        assert other.until(Finish)[1].id == subject
        other.send(peer, superseded)
        assert worker.exit_code() == 1
    assert "a newer worker named 'w1'" in caplog.records[-1].getMessage()


def test_two_brokers_may_send_the_same_request_id(broker: Broker, start: Any) -> None:
    with contextlib.closing(Broker()) as other:
        start(toy(), broker.endpoint, other.endpoint)
        for number, stub in enumerate((broker, other)):
            stub.request(stub.ready(), 1, seed=number)
        for number, stub in enumerate((broker, other)):
            stub.until(Finish)
            assert stub.text(request_id(1)) == expected_text(number, 20)


def test_removed_from_its_only_broker_it_stops(broker: Broker, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tokenmq.worker"):
        worker = start(toy(), broker.endpoint)
        broker.send(broker.ready(), Disconnect(DisconnectCode.REMOVED, "by ann"))
        assert worker.exit_code() == 0
    assert "an operator has removed worker 'w1'" in caplog.records[-1].getMessage()


def test_a_broker_hears_at_once_what_another_one_sends_here(start: Any) -> None:
    """The interval is so long that no heartbeat that is due can be the one that is waited for."""
    slow = {"heartbeat_s": 60.0, "expiry_s": 300.0}
    with contextlib.closing(Broker(**slow)) as one, contextlib.closing(Broker(**slow)) as other:
        engine = Gate(hold_steps=True)
        start(engine, one.endpoint, other.endpoint)
        peer = one.ready()
        other.ready()
        one.request(peer)
        other.until(Heartbeat, lambda beat: beat.load is not None and beat.load.running + beat.load.waiting == 1)
        engine.go.set()
        one.until(Finish)
        other.until(Heartbeat, lambda beat: beat.load is not None and beat.load.running + beat.load.waiting == 0)


def test_what_is_changed_from_another_thread_is_told_and_holds(broker: Broker, start: Any) -> None:
    engine = Gate(hold_steps=True)
    worker = start(engine, broker.endpoint, slots=1)
    peer = broker.ready()
    worker.server.change(models=[Model("toy"), Model("new")], slots=3, speed=40.0)
    _, ready = broker.until(Ready, lambda message: message.slots == 3)
    assert (ready.models, ready.speed) == ((Model("toy"), Model("new")), 40.0)
    for number in range(4):
        broker.request(peer, number)
    broker.until(Heartbeat, lambda beat: beat.load is not None and beat.load.running + beat.load.waiting == 4)
    engine.go.set()
    for _ in range(4):
        broker.until(Finish)
    engine.announce([Model("new")])
    broker.until(Ready, lambda message: message.models == (Model("new"),))
    broker.request(peer, 9)
    assert broker.until(Error)[1].code == "model_not_found"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"slots": 0}, "slots: expected 1 to"),
        ({"speed": -1.0}, "speed: expected"),
        ({"models": [Model("")]}, "models: expected"),
        ({"models": [Model("a"), Model("a")]}, "each name once, got a, a"),
    ],
)
def test_a_change_that_cannot_be_is_refused_where_it_is_asked_for(
    broker: Broker, start: Any, values: Any, told: str
) -> None:
    worker = start(toy(), broker.endpoint)
    broker.ready()
    with pytest.raises(ValueError, match=told):
        worker.server.change(**values)


def test_a_drain_that_is_taken_back_leaves_it_at_work(broker: Broker, start: Any) -> None:
    engine = Gate(hold_steps=True)
    start(engine, broker.endpoint)
    peer = broker.ready()
    broker.request(peer, 1)
    broker.send(peer, DrainMessage(WAIT_S))
    broker.until(Draining)
    broker.send(peer, DrainMessage(undo=True))
    assert broker.ready() == peer
    engine.go.set()
    broker.request(peer, 2)
    assert [broker.until(Finish)[1].id for _ in range(2)] == [request_id(1), request_id(2)]


def test_drain_finishes_what_is_held_says_goodbye_and_exits_with_0(broker: Broker, start: Any) -> None:
    worker = start(toy(tokens_per_second=100.0), broker.endpoint)
    peer = broker.ready()
    subject = broker.request(peer, tokens=30)
    broker.until(Chunks)
    worker.server.drain(WAIT_S)
    broker.until(Draining)
    broker.until(Finish)
    assert broker.text(subject) == expected_text(3, 30)
    broker.until(Goodbye)
    assert worker.exit_code() == 0


def test_drain_gives_back_what_does_not_end_in_time(broker: Broker, start: Any) -> None:
    worker = start(toy(tokens_per_second=10.0), broker.endpoint)
    peer = broker.ready()
    broker.request(peer, tokens=100_000)
    broker.until(Chunks)
    worker.server.drain(0.05)
    _, error = broker.until(Error)
    assert (error.code, error.retryable) == ("draining", True)
    broker.until(Goodbye)
    assert worker.exit_code() == 0


@pytest.mark.parametrize("completes", [True, False])
def test_another_worker_goes_on_where_one_stopped(broker: Broker, start: Any, completes: bool) -> None:
    """Cut inside a stop string, or in what only looks like one: text is held back then, and no character is lost."""
    words = [text_of(token_at(3, position)) for position in range(12)]
    stop = (words[5][-2:] + words[6] + (words[7][:2] if completes else "never"),)
    start(toy(), broker.endpoint, name="first")
    first = broker.ready()
    whole = broker.request(first, 1, tokens=12, stop=stop)
    undisturbed = broker.until(Finish)[1]
    assert (undisturbed.reason is FinishReason.STOP) is completes

    cut = broker.request(first, 2, tokens=12, stop=stop, credit=7)
    broker.until(Chunks, lambda message: message.chunks[-1].offset + len(message.chunks[-1].token_ids) == 7)
    had, text = broker.token_ids(cut), broker.text(cut)
    assert len(text) < len(expected_text(3, 7)), "it holds text back at the cut"

    start(toy(), broker.endpoint, name="second")
    second = broker.ready()
    broker.request(second, 2, tokens=12, stop=stop, attempt=2, prior=Prior(tuple(had), len(text)))
    end = broker.until(Finish)[1]
    assert (end.id, end.attempt, end.reason, end.usage) == (cut, 2, undisturbed.reason, undisturbed.usage)
    assert broker.chunks(cut, 2)[0].offset == 7
    assert had + broker.token_ids(cut, 2) == broker.token_ids(whole)
    assert text + broker.text(cut, 2) == broker.text(whole)


def test_a_prior_that_is_complete_brings_the_rest_of_the_text_and_the_end(broker: Broker, start: Any) -> None:
    start(toy(), broker.endpoint)
    prior = Prior(tuple(token_at(3, position) for position in range(4)), 5)
    subject = broker.request(broker.ready(), tokens=4, attempt=2, prior=prior, credit=4)
    end = broker.until(Finish)[1]
    assert (end.attempt, end.reason, end.usage.completion_tokens) == (2, FinishReason.LENGTH, 4)
    assert [(chunk.offset, chunk.token_ids) for chunk in broker.chunks(subject, 2)] == [(4, ())]
    assert broker.text(subject, 2) == expected_text(3, 4)[5:]


def test_an_engine_that_does_not_resume_refuses(broker: Broker, start: Any) -> None:
    start(toy(resumes=False), broker.endpoint)
    peer = broker.ready()
    subject = broker.request(peer, attempt=2, prior=Prior((token_at(3, 0),)))
    _, error = broker.until(Error)
    assert (error.id, error.attempt, error.code, error.retryable) == (subject, 2, "cannot_resume", False)
    broker.request(peer, attempt=3)
    assert broker.until(Finish)[1].attempt == 3


def test_a_reader_that_grants_nothing_is_given_up_and_its_place_is_free(broker: Broker, start: Any) -> None:
    start(toy(tokens_per_second=200.0), broker.endpoint, slots=1, reader_timeout_s=0.2)
    peer = broker.ready()
    gone = broker.request(peer, 1, credit=3, tokens=100_000)
    _, error = broker.until(Error)
    assert (error.id, error.code, error.retryable) == (gone, "reader_timeout", False)
    assert len(broker.token_ids(gone)) == 3
    subject = broker.request(peer, 2, tokens=5)
    assert broker.until(Finish)[1].id == subject


def test_a_broker_asks_the_worker_to_leave(broker: Broker, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Broker()) as other, caplog.at_level(logging.INFO, "tokenmq.worker"):
        worker = start(toy(tokens_per_second=100.0), broker.endpoint, other.endpoint)
        peer, asking = broker.ready(), other.ready()
        subject = broker.request(peer, tokens=30)
        broker.until(Chunks)
        other.send(asking, DrainMessage(WAIT_S))
        other.until(Draining)
        broker.until(Draining)
        broker.until(Finish)
        assert broker.text(subject) == expected_text(3, 30)
        broker.until(Goodbye)
        other.until(Goodbye)
        assert worker.exit_code() == 0
        [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("draining")]
        assert other.endpoint in line


def test_what_does_not_end_in_the_time_that_the_broker_gives_is_given_back(broker: Broker, start: Any) -> None:
    worker = start(toy(tokens_per_second=10.0), broker.endpoint)
    peer = broker.ready()
    broker.request(peer, tokens=100_000)
    broker.until(Chunks)
    broker.send(peer, DrainMessage(0.05))
    _, error = broker.until(Error)
    assert (error.code, error.retryable) == ("draining", True)
    broker.until(Goodbye)
    assert worker.exit_code() == 0


def test_a_step_that_never_ends_does_not_keep_the_worker_from_stopping(
    broker: Broker, start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "_ENGINE_STOP_S", 0.05)
    engine = Gate(hold_steps=True)
    worker = start(engine, broker.endpoint)
    broker.request(broker.ready())
    assert engine.entered.wait(WAIT_S)
    worker.server.drain(0.0)
    assert worker.exit_code() == 0
    assert "engine_abandoned" in [record.getMessage().partition(" ")[0] for record in caplog.records]
    engine.go.set()
    worker.server._engine._thread.join(WAIT_S)


def test_a_wrong_endpoint_is_refused_before_anything_starts() -> None:
    with pytest.raises(EndpointError, match="nonsense"):
        WorkerServer(toy(), WorkerSettings(brokers=("nonsense",)))


def test_a_worker_that_never_ran_can_be_closed() -> None:
    with WorkerServer(toy(), WorkerSettings(brokers=("tcp://127.0.0.1:9",))):
        pass


def test_a_broker_that_stops_reading_loses_its_session(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmq.transport.link.OUTBOX_BYTES", 1000)
    monkeypatch.setattr("tokenmq.transport.sockets.PEER_QUEUE_MESSAGES", 1)
    long = Flood()
    with contextlib.closing(Broker()) as broker:
        broker.socket.setsockopt(zmq.RCVHWM, 1)
        broker.socket.setsockopt(zmq.RCVBUF, 4096)
        broker.socket.bind("tcp://127.0.0.1:*")  # options hold for binds that come after them
        start(long, broker.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        peer = broker.ready()
        broker.request(peer, tokens=1_000_000)
        assert long.cancelled.wait(WAIT_S)  # the worker gave the session up
        assert broker.until(Ready)[0] != peer


class Flood(SyntheticEngine):
    """Fills any buffer: long texts, as fast as it goes."""

    def __init__(self) -> None:
        super().__init__(name="toy")
        self.cancelled = threading.Event()

    def step(self) -> Sequence[Output]:
        return [Tokens(output.ticket, (1,), "x" * 100_000) for output in super().step()]

    def cancel(self, ticket: int) -> Sequence[Output]:
        self.cancelled.set()
        return super().cancel(ticket)
