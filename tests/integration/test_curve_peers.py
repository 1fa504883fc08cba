"""Clients and workers with keys, over real sockets, at servers with CURVE that the test itself plays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner
from zmq.auth import create_certificates
from zmq.auth.thread import ThreadAuthenticator

from tokenmq.cli.broker import main as broker_command
from tokenmq.client import AsyncClient, Client, ForbiddenError, NoBrokerError, Stream
from tokenmq.client.local import LocalCluster
from tokenmq.protocol.codec import encode
from tokenmq.protocol.messages import (
    NO_ID,
    Attach,
    Chunk,
    Chunks,
    Disconnect,
    DisconnectCode,
    Error,
    Finish,
    FinishReason,
    Message,
    Ready,
    Request,
    Started,
    Timings,
    Usage,
)
from tokenmq.transport.door import Door
from tokenmq.transport.keys import Curve, KeyPair, load_pair
from tokenmq.transport.pump import Pump
from tokenmq.worker.engines.synthetic import SyntheticEngine

from .conftest import eventually
from .test_client_stub import StubBroker
from .test_worker_server import WAIT_S, Worker
from .test_worker_server import Broker as WorkersBroker

#: A wait for a broker that ends only when something is broken: what is refused does not wait for it.
FAR_S = 600.0


class Guard:
    """A ZAP handler in a thread, and the keys that it lets in."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.admitted: set[bytes] = set()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="door", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self.admitted

    def admit(self, pair: KeyPair) -> None:
        self.admitted.add(pair.public.encode())

    def stop(self) -> None:
        self._authenticator.stop()


def protect(socket: zmq.Socket[bytes], pair: KeyPair) -> None:
    socket.curve_server = True
    socket.curve_secretkey = pair.secret.encode()
    socket.zap_domain = b"door"


class KeyedBroker(StubBroker):
    """The client's stub, behind CURVE."""

    def __init__(self, pair: KeyPair, tokens: int | None = 5) -> None:
        self._pair = pair
        super().__init__(tokens)

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        self.guard = Guard(self._context)
        protect(socket, self._pair)

    def close(self) -> None:
        self.guard.stop()
        super().close()


class Keys:
    """Key files, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, name: str) -> str:
        path = self._folder / f"{name}.key_secret"
        if not path.exists():
            create_certificates(self._folder, name)
            path.chmod(0o600)
        return str(path)

    def pair(self, name: str) -> KeyPair:
        return load_pair(self.file(name))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def broker(keys: Keys) -> Iterator[KeyedBroker]:
    with contextlib.closing(KeyedBroker(keys.pair("server"))) as stub:
        yield stub


def test_a_client_with_a_known_key_is_served(broker: KeyedBroker, keys: Keys) -> None:
    broker.guard.admit(keys.pair("ann"))
    with Client(broker.endpoint, server_key=keys.pair("server").public, key=keys.file("ann")) as client:
        assert client.generate("m", "x").text() == "0 1 2 3 4 "
        assert client.models() == ["models"]


def test_keys_from_the_environment_and_from_files(
    broker: KeyedBroker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.guard.admit(keys.pair("ann"))
    monkeypatch.setenv("TOKENMQ_CLIENT_SERVER_KEY", keys.file("server").removesuffix("_secret"))
    monkeypatch.setenv("TOKENMQ_CLIENT_KEY", keys.file("ann"))
    with Client(broker.endpoint) as client:
        assert client.models() == ["models"]


def test_an_async_client_with_a_key(broker: KeyedBroker, keys: Keys) -> None:
    broker.guard.admit(keys.pair("ann"))

    async def ask() -> object:
        server_key = keys.pair("server").public
        async with AsyncClient(broker.endpoint, server_key=server_key, key=Path(keys.file("ann"))) as client:
            return await client.models()

    assert asyncio.run(ask()) == ["models"]


def test_each_broker_has_its_own_server_key(keys: Keys) -> None:
    with (
        contextlib.closing(KeyedBroker(keys.pair("one"))) as one,
        contextlib.closing(KeyedBroker(keys.pair("two"))) as two,
    ):
        for each in (one, two):
            each.guard.admit(keys.pair("ann"))
        server_keys = [keys.pair("one").public, keys.pair("two").public]
        with Client([one.endpoint, two.endpoint], server_key=server_keys, key=keys.file("ann")) as client:
            sessions = client._connection._core.sessions
            eventually(lambda: all(session.open for session in sessions), "both are there")


def test_an_unknown_key_is_refused_at_once_and_let_in_when_it_is_enrolled(broker: KeyedBroker, keys: Keys) -> None:
    server_key = keys.pair("server").public
    with Client(
        broker.endpoint,
        server_key=server_key,
        key=keys.file("eve"),
        connect_timeout_s=FAR_S,
        recovery_timeout_s=FAR_S,
    ) as client:
        for _ in range(3):
            with pytest.raises(ForbiddenError, match="does not admit this key") as caught:
                client.generate("m", "x").text()
            assert not caught.value.retryable
            with pytest.raises(ForbiddenError):
                client.models()
        broker.guard.admit(keys.pair("eve"))
        eventually(lambda: next(iter(client._connection._core.sessions)).open, "it comes back by itself")
        assert client.generate("m", "x").text() == "0 1 2 3 4 "


def test_a_client_without_keys_is_told_to_use_them(broker: KeyedBroker) -> None:
    # Who sees first that the other side speaks something else is a matter of luck.
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(broker.endpoint, connect_timeout_s=FAR_S)) for _ in range(8)]
        for client in clients:
            with pytest.raises(NoBrokerError) as failed:
                client.models()
            assert "wants keys" in failed.value.message
            assert "give --server-key and --key" in failed.value.message


def test_keys_at_a_broker_without_curve(keys: Keys) -> None:
    server_key, key = keys.pair("server").public, keys.file("ann")
    with (
        contextlib.closing(StubBroker()) as plain,
        Client(plain.endpoint, server_key=server_key, key=key, connect_timeout_s=FAR_S) as client,
        pytest.raises(NoBrokerError, match="has no CURVE"),
    ):
        client.generate("m", "x").text()


def test_a_wrong_server_key(broker: KeyedBroker, keys: Keys) -> None:
    broker.guard.admit(keys.pair("ann"))
    wrong, key = keys.pair("other").public, keys.file("ann")
    with (
        Client(broker.endpoint, server_key=wrong, key=key, connect_timeout_s=FAR_S) as client,
        pytest.raises(NoBrokerError, match="another public key than --server-key"),
    ):
        client.models()


def test_no_secret_is_shown(broker: KeyedBroker, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    pair, server_key = keys.pair("eve"), keys.pair("server").public
    with (
        caplog.at_level(logging.DEBUG),
        Client(broker.endpoint, server_key=server_key, key=keys.file("eve")) as client,
    ):
        with pytest.raises(ForbiddenError) as caught:
            client.models()
        shown = repr(client) + repr(client._settings) + str(caught.value) + caplog.text
    assert pair.secret not in shown


def test_a_key_that_is_revoked_ends_its_streams(keys: Keys) -> None:
    with contextlib.closing(KeyedBroker(keys.pair("server"), None)) as broker:
        broker.guard.admit(keys.pair("ann"))
        server_key = keys.pair("server").public
        with Client(broker.endpoint, server_key=server_key, key=keys.file("ann"), window_tokens=8) as client:
            stream = client.generate("m", "x")
            next(stream)
            broker.guard.admitted.clear()
            broker.inject.append(encode(Disconnect(DisconnectCode.FORBIDDEN, "the key was revoked")))
            with pytest.raises(ForbiddenError, match="the key was revoked"):
                stream.text()
            with pytest.raises(ForbiddenError):
                client.models()


# Limits


def test_a_burst_is_spread_over_the_time_that_the_limit_gives_it() -> None:
    """A broker that takes 500 requests a second, and 1,000 requests at once."""
    rate, burst, count = 500.0, 20.0, 1_000
    level, at, refused = burst, time.monotonic(), 0

    def limited(message: Message) -> Message | None:
        nonlocal level, at, refused
        assert isinstance(message, Request)
        now = time.monotonic()
        level, at = min(burst, level + (now - at) * rate), now
        if level >= 1.0:
            level -= 1.0
            attempt = message.envelope.attempt
            return Finish(message.id, attempt, FinishReason.STOP, Usage(1, 0), Timings(), "w")
        refused += 1
        return Error(message.id, message.envelope.attempt, "rate_limited", "slower", True, (1.0 - level) / rate)

    with contextlib.closing(StubBroker()) as broker:
        broker.answers[Request] = limited
        with Client(broker.endpoint, connect_timeout_s=20.0, recovery_timeout_s=1.5) as client:
            streams = [client.generate("m", "x") for _ in range(count)]
            assert [stream.text() for stream in streams] == [""] * count
    # All that leave before the client knows of the limit may be refused once; then hardly any, but that each that
    # ends lets another one try early.
    assert refused < 2 * count


# Workers


@pytest.fixture
def backend(keys: Keys) -> Iterator[WorkersBroker]:
    stub = WorkersBroker()
    stub.socket.close()
    stub.guard = Guard(stub.context)  # type: ignore[attr-defined]
    stub.socket = stub.context.socket(zmq.ROUTER)
    stub.socket.linger = 0
    protect(stub.socket, keys.pair("server"))
    stub.socket.bind("tcp://127.0.0.1:*")
    stub.endpoint = stub.socket.getsockopt_string(zmq.LAST_ENDPOINT)
    yield stub
    stub.guard.stop()  # type: ignore[attr-defined]
    stub.close()


def test_a_worker_with_keys_registers_as_soon_as_it_may(
    backend: WorkersBroker, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    curve = Curve(keys.pair("gpu-1"), keys.pair("server").public)
    with caplog.at_level(logging.INFO, "tokenmq"):
        worker = Worker(SyntheticEngine(name="toy"), backend.endpoint, curves=(curve,), direct="tcp://127.0.0.1:*")
        try:
            refused = "connection_refused"
            eventually(lambda: any(refused in record.getMessage() for record in caplog.records), "it is told")
            backend.guard.admit(keys.pair("gpu-1"))  # type: ignore[attr-defined]
            _, ready = backend.until(Ready)
            assert ready.worker == "w1"
            told = [record.getMessage() for record in caplog.records if refused in record.getMessage()]
            assert len(told) == 1, "once, however often it has tried"
            assert "does not admit this key" in caplog.text
            assert keys.pair("gpu-1").secret not in caplog.text
        finally:
            worker.close()


# A worker's own door


class DoorBroker(KeyedBroker):
    """Says that the chunks of each request can be had at a door, which is its own, too.

    Attributes:
        told: the server key that it tells of the door.
    """

    def __init__(self, pair: KeyPair, door_pair: KeyPair | None, told: str) -> None:
        self._door_pair = door_pair
        self.told = told
        self._by_door: list[tuple[bytes, Request]] = []
        super().__init__(pair)

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        super()._prepare(socket)
        self._pump = Pump()
        self._outside: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # as a worker's: without a ZAP handler
        self.door = Door(self._outside, "tcp://127.0.0.1:*", self._pump, self._door_pair)
        self._attached: bytes | None = None

    def _take(self, peer: bytes, message: Message) -> None:
        if not isinstance(message, Request):
            super()._take(peer, message)
            return
        attempt = message.envelope.attempt
        self._say(peer, Started(message.id, attempt, "w", self.door.endpoint, b"k" * 16, self.told))
        end = time.monotonic() + (WAIT_S if self._expects_visitors else 0.3)
        while self._attached is None and time.monotonic() < end:
            self._pump.wait(0.01)
            for visitor, said in self.door.receive():
                assert said == Attach(b"k" * 16)
                self._attached = visitor
        chunk = Chunk(message.id, attempt, 0, 0, (7,), "seven")
        if self._attached is None:
            self._say(peer, Chunks(NO_ID, (chunk,)))
        else:
            self.door.send(self._attached, Chunks(b"k" * 16, (chunk,)))
        direct = int(self._attached is not None)
        self._say(peer, Finish(message.id, attempt, FinishReason.STOP, Usage(1, 1), Timings(), "w", direct))

    @property
    def _expects_visitors(self) -> bool:
        return self._door_pair is not None and bool(self.told)

    def close(self) -> None:
        super().close()
        self.door.close()
        self._outside.term()
        self._pump.close()


@pytest.mark.parametrize(
    ("door_has_keys", "told", "direct"),
    [(True, True, True), (False, False, False), (True, False, False)],
    ids=["both have keys", "a door without keys", "a door whose key nobody tells"],
)
def test_who_has_keys_dials_no_door_without(keys: Keys, door_has_keys: bool, told: bool, direct: bool) -> None:
    worker = keys.pair("gpu-1")
    stub = DoorBroker(keys.pair("server"), worker if door_has_keys else None, worker.public if told else "")
    with contextlib.closing(stub) as broker:
        broker.guard.admit(keys.pair("ann"))
        server_key = keys.pair("server").public
        with Client(broker.endpoint, server_key=server_key, key=keys.file("ann"), direct="127.0.0.1") as client:
            stream = client.generate("m", "x")
            assert stream.text() == "seven"
            assert stream.attempts[0].direct is direct


# All of it, with real processes


def test_client_broker_and_worker_with_keys_and_the_workers_own_door(
    make_cluster: Callable[..., LocalCluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "keys"
    assert CliRunner().invoke(broker_command, ["keys", "init", str(folder)]).exit_code == 0
    for name, role in (("ann", "client"), ("worker-1", "worker")):
        secret = str(tmp_path / f"{name}.key_secret")
        made = ["keys", "new", name, "--role", role, "--curve", str(folder), "--out", secret]
        assert CliRunner().invoke(broker_command, made).exit_code == 0
        monkeypatch.setenv(f"TOKENMQ_{role.upper()}_KEY", secret)
        monkeypatch.setenv(f"TOKENMQ_{role.upper()}_SERVER_KEY", str(folder / "server.key"))
    cluster = make_cluster("--curve", str(folder))
    cluster.start_worker("--engine", "synthetic", "--model", "m", "--direct", "tcp://127.0.0.1:*")
    cluster.wait_ready("m")
    with Client(cluster.frontend, direct="127.0.0.1") as client:

        def came_by_the_door() -> bool:
            stream: Stream = client.generate("m", "x", max_tokens=4, seed=1)
            assert len(list(stream)) > 0
            return stream.attempts[0].direct

        eventually(came_by_the_door, "the link to the worker stands")
    with (
        Client(cluster.frontend, server_key="", key="", connect_timeout_s=FAR_S) as stranger,
        pytest.raises(NoBrokerError, match="wants keys"),
    ):
        stranger.models()
