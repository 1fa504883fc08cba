"""For tests of keys: a broker's folder of keys, and peers that say whatever a test wants, with any key or none."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq
from click.testing import CliRunner
from zmq.utils.monitor import recv_monitor_message

from tokenmq.cli.keys import keys
from tokenmq.client import AsyncClient, Client
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import Heartbeat, Load, Message, ModelInfo, Ready
from tokenmq.transport.keys import Curve, KeyPair, load_pair, public_key

from .conftest import PATIENCE_S, eventually, worker_names

#: Nothing is to connect by itself a second time while a test runs.
_NEVER_MS = 3_600_000
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
#: The ends of a connection, in a test's words. The first two are handshakes that failed: because of the peer's key,
#: or before the broker has seen one. Where one side speaks no CURVE, both see it, and the first one closes the
#: connection; so a peer without keys sees the reason, or only that it breaks off.
NO_SUCH_KEY = "refused: key"
NO_HANDSHAKE = "refused: handshake"
ENDS = "ends"
_REFUSALS = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): NO_SUCH_KEY,
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): NO_HANDSHAKE,
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): NO_HANDSHAKE,
    int(zmq.EVENT_DISCONNECTED): ENDS,
}


class KeyFolder:
    """A broker's folder of keys, and beside it the secrets of those that it lets in.

    Attributes:
        path: the folder, for --curve.
        server_key: the file with the broker's public key.
    """

    def __init__(self, path: Path) -> None:
        """Make it."""
        self.path = path
        self.server_key = path / "server.key"
        self._secrets = path.with_name(path.name + "-secrets")
        self._secrets.mkdir()
        self._keys("init", str(path))

    def new(self, name: str, role: str) -> Path:
        """Let somebody in; return the file with the secret key."""
        secret = self.secret(name)
        secret.unlink(missing_ok=True)
        self._keys("new", name, "--role", role, "--curve", str(self.path), "--out", str(secret))
        return secret

    def enrol(self, name: str, role: str, pair: KeyPair) -> None:
        """Let in somebody who has a key already."""
        self._keys("new", name, "--role", role, "--curve", str(self.path), "--public", pair.public)

    def secret(self, name: str) -> Path:
        """Return the file with somebody's secret key."""
        return self._secrets / f"{name}.key_secret"

    def pair(self, name: str) -> KeyPair:
        """Return somebody's keys."""
        return load_pair(str(self.secret(name)))

    def curve(self, name: str) -> Curve:
        """Return what somebody connects with."""
        return Curve(self.pair(name), self.server_public)

    @property
    def server_public(self) -> str:
        """The broker's public key."""
        return public_key(str(self.server_key))

    def secrets(self) -> list[str]:
        """Return all that nobody else may see: the broker's secret key and everybody's."""
        files = [self.path / "server.key_secret", *self._secrets.iterdir()]
        return [load_pair(str(file)).secret for file in files]

    def options(self, name: str) -> tuple[str, ...]:
        """Return the options of zmq-worker and zmq-client for somebody."""
        return ("--server-key", str(self.server_key), "--key", str(self.secret(name)))

    def client(self, endpoint: str, name: str, **options: Any) -> Client:
        """Return a client with somebody's key."""
        return Client(endpoint, server_key=self.server_key, key=self.secret(name), **options)

    def async_client(self, endpoint: str, name: str) -> AsyncClient:
        """Return the same for asyncio."""
        return AsyncClient(endpoint, server_key=self.server_key, key=self.secret(name))

    def revoke(self, name: str) -> None:
        """Let somebody in no more, as an operator does: by a command in a process of its own."""
        command = [sys.executable, "-m", "tokenmq.cli.broker", "keys", "revoke", name, "--curve", str(self.path)]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)

    def _keys(self, *arguments: str) -> None:
        done = CliRunner().invoke(keys, arguments)
        assert done.exit_code == 0, done.output


class RawPeer:
    """A DEALER without manners: it connects once, says what it is told, and notes what it hears."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, curve: Curve | None = None) -> None:
        """Connect, with these keys or without any."""
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.reconnect_ivl = _NEVER_MS
        if curve is not None:
            self.socket.curve_serverkey = curve.server_key.encode()
            self.socket.curve_publickey = curve.pair.public.encode()
            self.socket.curve_secretkey = curve.pair.secret.encode()
        self._monitor = self.socket.get_monitor_socket(_EVENTS)
        self._monitor.linger = 0
        self._end = ""
        self.socket.connect(endpoint)

    def say(self, message: Message) -> None:
        """Send a message; where the handshake has failed already there is nobody to send it to."""
        with suppress(zmq.Again):
            self.socket.send_multipart(encode(message), zmq.DONTWAIT)

    def hear(self) -> Message | str:
        """Wait for the next message that is no heartbeat; without any more, return how the connection ended."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            # What has come before the end is there when the end is told.
            while self.socket.poll(0):
                message = decode(self.socket.recv_multipart())
                if not isinstance(message, Heartbeat):
                    return message
            if self._end:
                return self._end
            poller = zmq.Poller()
            poller.register(self.socket, zmq.POLLIN)
            poller.register(self._monitor, zmq.POLLIN)
            if self._monitor in dict(poller.poll(1000)):
                self._end = _REFUSALS[int(recv_monitor_message(self._monitor)["event"])]
        raise AssertionError(f"neither a message nor the end within {PATIENCE_S} s")

    def expect(self, kind: type[Any]) -> Any:
        """Wait for the next message, which is to be one of this kind."""
        heard = self.hear()
        assert isinstance(heard, kind), heard
        return heard

    def until(self, kind: type[Any]) -> Any:
        """Wait for a message of this kind; others before it are passed over."""
        while not isinstance(heard := self.hear(), kind):
            assert not isinstance(heard, str), f"{heard}, and no {kind.__name__}"
        return heard

    def close(self) -> None:
        """Close the socket; once more does no harm."""
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()


def ready(name: str, model: str = "decoy", incarnation: int = 1, brokers: tuple[str, ...] = ()) -> Ready:
    """Return how a raw worker registers."""
    return Ready(name, incarnation, "raw/1", (ModelInfo(model),), 1, "raw", Load(), brokers=brokers)


def wait_for_workers(client: Client, *names: str) -> None:
    """Wait until these workers, and no others, take requests."""
    eventually(lambda: worker_names(client) == set(names), f"ready: {', '.join(names) or 'none'}")
