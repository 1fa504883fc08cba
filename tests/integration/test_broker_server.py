"""BrokerServer on real sockets, against peers that speak the protocol frame by frame, or something else."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from tests.fuzz.zmtp import Raw, message
from tokenmq.broker import core as core_module
from tokenmq.broker import server as server_module
from tokenmq.broker.events import FromClient, FromWorker, ToClient
from tokenmq.broker.limits import Limits
from tokenmq.broker.server import BrokerServer
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.codec import decode, encode, header
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunk,
    Chunks,
    Command,
    Disconnect,
    DisconnectCode,
    Drain,
    Draining,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Message,
    ModelInfo,
    Query,
    Ready,
    Reply,
    Request,
    Started,
    Timings,
    Usage,
    Welcome,
)
from tokenmq.protocol.packing import pack
from tokenmq.transport import sockets
from tokenmq.transport.endpoints import EndpointError
from tokenmq.transport.pump import Outcome

#: Nothing here takes a tenth of it; it only bounds the wait for what does not come.
PATIENCE_S = 20.0
ID = b"i" * 16
MessageT = TypeVar("MessageT", bound=Message)


class Peer:
    """A DEALER that counts what it says."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, **options: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.connect(endpoint)
        self.said = 0

    def say(self, message: Message) -> None:
        self.socket.send_multipart(encode(message))
        self.said += 1

    def hear(self, *, beats: bool = False, started: bool = False) -> Message:
        """Return the next message, without heartbeats and STARTED unless they are asked for."""
        until = time.monotonic() + PATIENCE_S
        while self.socket.poll(max(0, int(1000 * (until - time.monotonic())))):
            message = decode(self.socket.recv_multipart())
            if (beats or not isinstance(message, Heartbeat)) and (started or not isinstance(message, Started)):
                return message
        raise AssertionError("the broker says nothing")

    def expect(self, kind: type[MessageT]) -> MessageT:
        message = self.hear(started=kind is Started)
        assert isinstance(message, kind), message
        return message

    def status(self) -> dict[str, Any]:
        self.say(Query(b"q" * 16, "status"))
        result = self.expect(Reply).result
        assert isinstance(result, dict)
        return result

    def close(self) -> None:
        self.socket.close(linger=0)


class Running:
    """A broker in a thread of its own, and the peers that a test makes for it."""

    def __init__(self, settings: BrokerSettings) -> None:
        self.server = BrokerServer(settings, software="test/1")
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.peers: list[Peer] = []
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="broker")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.failure = error

    def stranger(self, side: str, which: int = 0, **options: int) -> Peer:
        endpoints = self.server.frontend if side == "client" else self.server.backend
        peer = Peer(self.context, endpoints[which], **options)
        self.peers.append(peer)
        return peer

    def client(self, which: int = 0, **options: int) -> Peer:
        client = self.stranger("client", which, **options)
        client.say(Hello("client", "test/1"))
        client.expect(Welcome)
        return client

    def worker(self, name: str = "w1", which: int = 0, *, slots: int = 4) -> Peer:
        worker = self.stranger("worker", which)
        worker.say(Ready(name, 1, "test/1", (ModelInfo("m"),), slots, "test", Load(), 1.0))
        worker.expect(Accepted)
        return worker

    def stop(self, grace_s: float = 0.0) -> None:
        self.server.drain(grace_s)
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "drain does not end run()"
        for peer in self.peers:
            peer.close()
        self.context.term()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start brokers, each on ports and paths of its own; the heartbeats are far too slow to notice anything."""
    running: list[Running] = []

    def start(**fields: Any) -> Running:
        path = tmp_path / f"broker{len(running)}"
        values: dict[str, Any] = {
            "frontend": ("tcp://127.0.0.1:*", f"ipc://{path}.front"),
            "backend": ("tcp://127.0.0.1:*", f"ipc://{path}.back"),
            "heartbeat_s": 1.0,
            "expiry_s": 30.0,
            "notice_s": 0.0,
        }
        running.append(Running(BrokerSettings(**{**values, **fields})))
        return running[-1]

    yield start
    for each in running:
        if each.thread.is_alive():
            each.stop()


@pytest.fixture
def broker(brokers: Callable[..., Running]) -> Running:
    return brokers()


def request(id: bytes = ID, *, payload: bytes = b"prompt", attachments: tuple[bytes, ...] = ()) -> Request:
    return Request(id, Envelope("m", 1, 1 << 20), payload, attachments)


def finish(id: bytes = ID) -> Finish:
    return Finish(id, 1, FinishReason.STOP, Usage(1, 1), Timings(), "")


def chunk(offset: int, text: str = "x") -> tuple[Chunk, ...]:
    return (Chunk(ID, 1, 0, offset, (7,), text),)


def open_stream(client: Peer, worker: Peer, id: bytes = ID) -> bytes:
    """Let the worker hold a request of the client; return the route of its chunks."""
    client.say(request(id))
    route = worker.expect(Request).envelope.route
    assert route is not None
    return route


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "ipc"])
def test_a_request_with_attachments_goes_there_and_its_answer_back(broker: Running, which: int) -> None:
    client, worker = broker.client(which), broker.worker(which=which)
    images = (b"\xff\xd8" * 200_000, b"", bytes(range(256)))
    client.say(request(payload=b"p" * 100_000, attachments=images))
    received = worker.expect(Request)
    assert (received.id, received.payload, received.attachments) == (ID, b"p" * 100_000, images)
    route = received.envelope.route
    assert route is not None
    for offset in range(3):
        worker.say(Chunks(route, chunk(offset)))
    worker.say(finish())
    assert [client.expect(Chunks).chunks for _ in range(3)] == [chunk(offset) for offset in range(3)]
    assert client.expect(Finish).worker == "w1"


def test_both_sides_are_told_how_many_messages_went_before_a_heartbeat(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    route = open_stream(client, worker)
    worker.say(Chunks(route, chunk(0)))
    for peer, before in ((client, 1), (worker, 2)):
        count = before
        while not isinstance(message := peer.hear(beats=True, started=True), Heartbeat):
            count += 1
        assert message.sent == count
    for peer in (client, worker):
        peer.say(Heartbeat(peer.said))
    assert client.status()["clients"] == 1
    assert client.status()["workers"] == 1


def test_peers_without_a_session_are_sent_to_register(broker: Running) -> None:
    stranger = broker.stranger("client")
    stranger.say(request())
    assert stranger.expect(Disconnect).code is DisconnectCode.UNKNOWN_PEER
    stranger = broker.stranger("worker")
    stranger.say(Heartbeat(5, Load()))
    assert stranger.expect(Disconnect).code is DisconnectCode.UNKNOWN_PEER
    stranger = broker.stranger("worker")
    stranger.say(Hello("client", "test/1"))
    assert stranger.expect(Disconnect).code is DisconnectCode.UNKNOWN_PEER


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "ipc"])
def test_a_worker_whose_connection_breaks_fails_its_requests_at_once(broker: Running, which: int) -> None:
    client, worker = broker.client(), broker.worker(which=which)
    open_stream(client, worker)
    began = time.monotonic()
    worker.close()
    error = client.expect(Error)
    assert time.monotonic() - began < 5.0  # the expiry is 30 s
    assert (error.id, error.attempt, error.code, error.retryable) == (ID, 1, "worker_lost", True)


def test_a_client_whose_connection_breaks_has_its_requests_cancelled_at_once(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    open_stream(client, worker)
    began = time.monotonic()
    client.close()
    assert worker.expect(Cancel) == Cancel(ID, 1)
    assert time.monotonic() - began < 5.0


def test_all_may_die_together(broker: Running) -> None:
    """Each loss that is found leads to messages to others that are lost as well."""
    clients = [broker.client() for _ in range(20)]
    workers = [broker.worker(f"w{number}", slots=20) for number in range(20)]
    for number in range(100):
        clients[number % 20].say(request(number.to_bytes(16, "big")))
    watcher = broker.client()
    wait_for(lambda: watcher.status()["requests"]["running"] == 100)
    for peer in (*clients, *workers):
        peer.close()
    wait_for(lambda: (watcher.status()["clients"], watcher.status()["workers"]) == (1, 0))
    assert watcher.status()["requests"] == {"waiting": 0, "running": 0, "orphaned": 0}


class Wire:
    """Stands for `send`: keeps what is sent; some peers are gone."""

    def __init__(self) -> None:
        self.gone: set[bytes] = set()
        self.sent: list[tuple[bytes, Message]] = []

    def send(self, _socket: object, frames: Sequence[bytes]) -> Outcome:
        if frames[0] in self.gone:
            return Outcome.GONE
        self.sent.append((frames[0], decode(frames[1:])))
        return Outcome.SENT


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BrokerServer, Wire]]:
    """Make a broker that is not run, and whose sends end in a list."""
    wire = Wire()
    monkeypatch.setattr(server_module, "send", wire.send)
    endpoints = ("tcp://127.0.0.1:*",)
    server = BrokerServer(BrokerSettings(endpoints, endpoints), software="test/1", clock=lambda: 100.0)
    yield server, wire
    server.close()


def test_what_a_loss_leads_to_does_not_overtake_what_was_decided_before(offline: tuple[BrokerServer, Wire]) -> None:
    server, wire = offline
    server._handle(FromClient(b"c", Hello("client", "test/1")), 100.0)
    server._handle(FromWorker(b"w", Ready("w", 1, "t", (ModelInfo("m"),), 1, "t", Load(), 1.0)), 100.0)
    server._handle(FromClient(b"c", request()), 100.0)
    wire.gone, wire.sent = {b"c"}, []
    # A tick in which both are due for a heartbeat.
    server._perform(server._core.tick(101.0), 101.0)
    assert wire.sent == [(b"w", Heartbeat(2)), (b"w", Cancel(ID, 1))]


def test_a_chain_of_losses_is_no_recursion(offline: tuple[BrokerServer, Wire]) -> None:
    """Each client is lost through a worker that is lost through a client that is lost ..."""
    server, wire = offline
    links = 1000
    for number in range(links):
        name = f"{number}"
        ready = Ready(name, 1, "t", (ModelInfo(name),), 2, "t", Load(), 1.0)
        server._handle(FromWorker(b"w" + name.encode(), ready), 100.0)
    for number in range(links):
        peer = b"c%d" % number
        server._handle(FromClient(peer, Hello("client", "test/1")), 100.0)
        for side in (0, 1):
            envelope = Envelope(f"{(number + side) % links}", 1, 8)
            id = (2 * number + side).to_bytes(16, "big")
            server._handle(FromClient(peer, Request(id, envelope, b"")), 100.0)
    wire.gone = {b"%c%d" % (side, number) for side in b"cw" for number in range(links)}
    server._perform([ToClient(b"c0", Heartbeat(1))], 100.0)
    rounds = 0
    while server._gone:  # workers are given up at the end of each round
        server._give_up_workers(100.0)
        rounds += 1
        assert rounds <= links
    assert not server._core.clients
    assert len(server._core.registry) == 0
    server._core.validate()


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask the broker until it says so; each question waits for its answer."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it does not happen"


def test_noise_on_all_ports_does_not_disturb_a_stream(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    route = open_stream(client, worker)
    noise = random.Random(5)
    beat = encode(Heartbeat(1))[0]
    for step in range(60):
        for side in ("client", "worker"):
            peer = broker.stranger(side, step % 2)
            frames = [noise.randbytes(noise.choice([0, 1, 24, 300])) for _ in range(noise.randint(1, 5))]
            if step % 3 == 0:
                frames[0] = beat[:4] + bytes([noise.randrange(256)]) + beat[5:]
            peer.socket.send_multipart(frames)
            if step % 10 == 0:
                peer.socket.send_multipart([b""] * 400)
        for endpoint in (broker.server.frontend[0], broker.server.backend[0]):
            raw_noise(endpoint, noise.randbytes(noise.choice([1, 10, 64, 5000])), greeting=step % 2 == 0)
        worker.say(Chunks(route, chunk(step)))
        assert client.expect(Chunks).chunks == chunk(step)
    worker.say(finish())
    assert client.expect(Finish).reason is FinishReason.STOP
    wait_for(lambda: client.status()["counters"]["malformed"] >= 120)


def raw_noise(endpoint: str, data: bytes, *, greeting: bool) -> None:
    """Send bytes over TCP, after a valid ZMTP greeting if asked for, and hang up."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    zmtp = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    # The broker may hang up first.
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        connection.sendall((zmtp if greeting else b"") + data)


def test_a_session_that_speaks_nonsense_ends_and_its_requests_with_it(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    open_stream(client, worker)
    worker.socket.send_multipart([b"nonsense"])
    assert worker.expect(Disconnect).code is DisconnectCode.PROTOCOL
    assert client.expect(Error).code == "worker_lost"


def test_a_malformed_request_is_answered_and_the_session_goes_on(broker: Running) -> None:
    client = broker.client()
    client.socket.send_multipart([header(Command.REQUEST, ID) + b"\xc1", b""])
    client.said += 1
    error = client.expect(Error)
    assert (error.id, error.attempt, error.code) == (ID, 0, "bad_request")
    client.say(Heartbeat(client.said))
    assert client.status()["clients"] == 1


def test_chunks_beyond_the_limit_cost_the_worker_its_session_and_not_the_client(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    route = open_stream(client, worker)
    worker.socket.send(header(Command.CHUNKS, route) + bytes(9 * 1024 * 1024))
    assert worker.expect(Disconnect).code is DisconnectCode.PROTOCOL
    assert client.expect(Error).code == "worker_lost"
    assert client.status()["clients"] == 1


def test_a_client_that_does_not_read_is_cut_off_while_others_are_served(
    brokers: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "ROUTER_QUEUE_MESSAGES", 20)
    broker = brokers()
    # Over ipc, where the kernel keeps little.
    slow, other = broker.client(1, rcvhwm=1, rcvbuf=4096), broker.client(1)
    worker = broker.worker(which=1)
    to_slow = open_stream(slow, worker)
    to_other = open_stream(other, worker, b"o" * 16)
    text = "x" * 65_536
    poller = zmq.Poller()
    poller.register(worker.socket, zmq.POLLIN)
    for offset in range(2_000):
        worker.say(Chunks(to_slow, chunk(offset, text)))
        worker.say(Chunks(to_other, chunk(offset)))
        assert other.expect(Chunks).chunks == chunk(offset)
        if poller.poll(0) and (message := worker.hear(beats=True)) == Cancel(ID, 1):
            break
        assert offset < 1_999, message
    else:
        raise AssertionError("nobody was cut off")
    worker.say(finish(b"o" * 16))
    assert other.expect(Finish).id == b"o" * 16
    assert other.status()["clients"] == 1
    counters = other.status()["counters"]
    assert (counters["clients_lost"], counters["peers_stalled"]) == (1, 1)


def test_a_request_that_leaves_the_queue_is_told_before_its_first_chunk(broker: Running) -> None:
    client, worker = broker.client(), broker.worker(slots=1)
    route = open_stream(client, worker)
    client.say(request(b"j" * 16))
    worker.say(Chunks(route, chunk(0)))
    worker.say(finish())
    heard = [client.hear(started=True) for _ in range(4)]
    assert [message.command.name for message in heard] == ["STARTED", "CHUNKS", "FINISH", "STARTED"]
    assert [heard[0], heard[3]] == [Started(ID, 1, "w1"), Started(b"j" * 16, 1, "w1")]


def test_a_drain_that_a_client_asks_for_reaches_the_worker(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    client.say(Query(b"q" * 16, "drain", {"worker": "w1", "grace_s": 1.5}))
    assert client.expect(Reply).result == {"worker": "w1", "in_flight": 0}
    assert worker.expect(Drain) == Drain(1.5)


def test_a_young_broker_does_not_call_a_model_unknown(brokers: Callable[..., Running]) -> None:
    client = brokers(expiry_s=600.0).client()
    client.say(request())
    error = client.expect(Error)
    assert (error.code, error.retryable) == ("no_worker", True)
    assert "this broker started" in error.message


def test_credit_that_is_nonsense_ends_the_session(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    open_stream(client, worker)
    client.socket.send(header(Command.CREDIT, ID) + pack({"attempt": 1, "limit": 1 << 60}))
    assert client.expect(Disconnect).code is DisconnectCode.PROTOCOL
    assert worker.expect(Cancel) == Cancel(ID, 1)


def test_who_takes_nothing_for_too_long_is_cut_off_and_who_only_pauses_is_not(
    brokers: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "ROUTER_QUEUE_MESSAGES", 5)
    broker = brokers(write_timeout_s=1.0, pending_bytes=1 << 30, limits=Limits(queries_per_s=0))
    dead, pausing = broker.client(1, rcvhwm=1, rcvbuf=4096), broker.client(1, rcvhwm=1, rcvbuf=4096)
    watcher, worker = broker.client(), broker.worker(which=1)
    routes = [open_stream(dead, worker), open_stream(pausing, worker, b"p" * 16)]
    text, number = "x" * 65_536, 60
    for offset in range(number):
        for route in routes:
            worker.say(Chunks(route, chunk(offset, text)))
    wait_for(lambda: watcher.status()["pending"]["peers"] == 2)
    assert watcher.status()["pending"]["bytes"] > 65_536
    # Whoever reads again gets everything, in order.
    assert [pausing.expect(Chunks).chunks[0].offset for _ in range(number)] == list(range(number))
    assert worker.expect(Cancel) == Cancel(ID, 1)
    status = watcher.status()
    assert (status["clients"], status["counters"]["peers_stalled"]) == (2, 1)
    assert status["pending"] == {"peers": 0, "bytes": 0}
    # The dead one has lost its connection. Some of what was on its way may still arrive, and nothing after it that
    # looks as if the session went on.
    heard: list[Message] = []

    def hears_the_end() -> bool:
        dead.say(Heartbeat(dead.said))
        heard.extend(decode(dead.socket.recv_multipart()) for _ in range(number) if dead.socket.poll(10))
        return isinstance(heard[-1], Disconnect)

    wait_for(hears_the_end)
    assert all(isinstance(message, (Chunks, Heartbeat, Started)) for message in heard[:-1])


def test_a_port_that_is_in_use_is_told(broker: Running, tmp_path: Path) -> None:
    taken = broker.server.backend[0]
    with pytest.raises(EndpointError, match=f"cannot listen on {taken}: the address is already in use"):
        BrokerServer(BrokerSettings(frontend=("tcp://127.0.0.1:*",), backend=(taken,)), software="test/1")
    missing = f"ipc://{tmp_path}/no/such/folder/socket"
    with pytest.raises(EndpointError, match="cannot listen on ipc://"):
        BrokerServer(BrokerSettings(frontend=(missing,), backend=("tcp://127.0.0.1:*",)), software="test/1")


def test_an_open_port_is_refused_unless_insecure_says_so(brokers: Callable[..., Running]) -> None:
    with pytest.raises(EndpointError, match="allow it with --insecure"):
        brokers(frontend=("tcp://*:*",))
    broker = brokers(frontend=("tcp://0.0.0.0:*",), insecure=True)
    port = broker.server.frontend[0].rpartition(":")[2]
    client = Peer(broker.context, f"tcp://127.0.0.1:{port}")
    broker.peers.append(client)
    client.say(Hello("client", "test/1"))
    client.expect(Welcome)


def test_two_brokers_live_side_by_side(brokers: Callable[..., Running]) -> None:
    first, second = brokers(name="first"), brokers(name="second")
    first.worker("w1")
    assert first.client().status()["broker"] == "first"
    status = second.client().status()
    assert (status["broker"], status["workers"]) == ("second", 0)


def test_drain_lets_a_stream_end_and_says_goodbye(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    route = open_stream(client, worker)
    broker.server.drain(PATIENCE_S)
    client.expect(Draining)
    client.say(request(b"j" * 16))
    assert client.expect(Error).code == "draining"
    worker.say(Chunks(route, chunk(0)))
    worker.say(finish())
    client.expect(Chunks)
    client.expect(Finish)
    client.expect(Goodbye)
    worker.expect(Goodbye)
    broker.stop()


def test_drain_without_grace_answers_what_runs(broker: Running) -> None:
    client, worker = broker.client(), broker.worker()
    open_stream(client, worker)
    broker.server.drain(0.0)
    client.expect(Draining)
    assert client.expect(Error).code == "draining"
    client.expect(Goodbye)
    assert worker.expect(Cancel) == Cancel(ID, 1)
    worker.expect(Goodbye)
    broker.stop()


def test_silent_peers_expire(brokers: Callable[..., Running]) -> None:
    broker = brokers(heartbeat_s=0.05, expiry_s=0.2)
    client, worker = broker.client(), broker.worker()
    assert client.expect(Disconnect).code is DisconnectCode.EXPIRED
    assert worker.expect(Disconnect).code is DisconnectCode.EXPIRED


def test_many_idle_workers_are_heard_together_and_a_request_ends_that(
    brokers: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_module, "_MANY_WORKERS", 1)
    broker = brokers(heartbeat_s=0.2, expiry_s=2.0)
    client, worker = broker.client(), broker.worker()
    wait_for(lambda: broker.server._quiet)
    worker.say(Heartbeat(worker.said))
    route = open_stream(client, worker)
    wait_for(lambda: not broker.server._quiet)  # the worker has its request before the broker's round is over
    worker.say(Chunks(route, chunk(0)))
    assert client.expect(Chunks).chunks == chunk(0)
    worker.say(finish())
    assert client.expect(Finish).reason is FinishReason.STOP
    wait_for(lambda: broker.server._quiet)
    # Who registers is heard before a client who speaks after that.
    other = broker.stranger("worker")
    other.say(Ready("w2", 1, "test/1", (ModelInfo("new"),), 1, "test", Load(), 1.0))
    other.expect(Accepted)
    wait_for(lambda: client.status()["workers"] == 2)
    worker.say(Goodbye())
    wait_for(lambda: client.status()["workers"] == 1)


@pytest.mark.parametrize("greeted", [True, False], ids=["in a session", "a stranger"])
@pytest.mark.parametrize("side", ["client", "worker"])
def test_a_message_of_very_many_frames_costs_the_connection_and_ends_nobody_else(
    brokers: Callable[..., Running], side: str, greeted: bool
) -> None:
    broker = brokers(heartbeat_s=0.1, expiry_s=0.5)
    client, worker = broker.client(), broker.worker()
    route = open_stream(client, worker)
    endpoint = (broker.server.frontend if side == "client" else broker.server.backend)[0]
    raw = Raw(int(endpoint.rpartition(":")[2]))
    try:
        assert raw.handshake()
        if greeted:
            hello: Message = Hello("raw", "test/1")
            if side == "worker":
                hello = Ready("raw", 1, "test/1", (ModelInfo("other"),), 1, "test", Load(), 1.0)
            assert raw.send(message(encode(hello)))
            assert raw.message() is not None
        assert raw.send(message([b""] * 300_000))
        for number in range(100):
            worker.say(Chunks(route, chunk(number)))
            assert client.expect(Chunks).chunks == chunk(number)
            for peer in (client, worker):
                peer.say(Heartbeat(peer.said))
        while raw.message() is not None:  # until the connection is closed
            pass
        client.say(Heartbeat(client.said))
        assert client.status()["counters"]["malformed"] >= 1
        assert (client.status()["clients"], client.status()["workers"]) == (1, 1)
    finally:
        raw.close()


def test_a_peer_that_gives_itself_an_identity_is_sent_away(broker: Running) -> None:
    named = broker.stranger("client", routing_id=b"somebody")  # type: ignore[arg-type]
    named.say(Hello("client", "test/1"))
    sent_away = named.expect(Disconnect)
    assert sent_away.code is DisconnectCode.PROTOCOL
    assert "must not give itself an identity" in sent_away.message
    assert broker.client().status()["clients"] == 1


def test_a_client_says_nothing_long_but_payloads(broker: Running) -> None:
    client = broker.client()
    client.say(Query(b"q" * 16, "status", {"x" * 70_000: 1}))
    assert "expected at most 65536" in client.expect(Disconnect).message
