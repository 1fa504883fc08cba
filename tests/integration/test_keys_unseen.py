"""What others can see and reach: open ports, the wire, `ps`, logs and answers. With real processes."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
import zmq
from zmq import curve_keypair

from tokenmq.client import Client, ForbiddenError
from tokenmq.client.local import LocalCluster, LocalProcess
from tokenmq.protocol.messages import Attach, Chunks, Disconnect, Finish, Hello, Started, Welcome
from tokenmq.transport.keys import Curve, KeyPair
from tokenmq.worker.engines.synthetic import token_at

from .conftest import PATIENCE_S, eventually
from .keyed import KeyFolder, RawPeer, wait_for_workers
from .test_keys_in_use import request
from .test_recovery import MODEL, PACED, Reader, expected, read

MakeCluster = Callable[..., LocalCluster]
ANY = "tcp://127.0.0.1:*"
OPEN = "tcp://0.0.0.0:*"


@pytest.fixture
def keys(tmp_path: Path) -> KeyFolder:
    made = KeyFolder(tmp_path / "keys")
    for name, role in (("ann", "client"), ("eve", "client"), ("root", "admin"), ("gpu-1", "worker")):
        made.new(name, role)
    return made


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


# Open ports.


def broker(*options: str) -> list[str]:
    return [sys.executable, "-m", "tokenmq.cli.broker", *options]


@pytest.mark.parametrize("side", ["frontend", "backend"])
def test_a_port_for_other_machines_needs_keys_or_insecure(keys: KeyFolder, side: str) -> None:
    other = {"frontend": "backend", "backend": "frontend"}[side]
    ends = (f"--{side}", OPEN, f"--{other}", ANY)
    done = subprocess.run(broker(*ends), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr.startswith("error: tcp://0.0.0.0:* can be reached from other machines by anyone")
    assert "--curve" in done.stderr
    assert "--insecure" in done.stderr


@pytest.mark.parametrize("shards", [(), ("--shards", "2")])
def test_a_broker_without_its_keys_does_not_start(tmp_path: Path, shards: tuple[str, ...]) -> None:
    command = broker(*shards, "--curve", str(tmp_path / "none"), "--frontend", ANY, "--backend", ANY)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is no folder of keys: make one with `zmq-broker keys init" in done.stderr


@pytest.mark.parametrize("flag", ["--insecure", "--insecure-admin"])
def test_keys_and_insecure_exclude_each_other(keys: KeyFolder, flag: str) -> None:
    command = broker("--curve", str(keys.path), flag, "--frontend", ANY, "--backend", ANY)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, "give one of them" in done.stderr) == (1, True)


@pytest.mark.parametrize("secure", [True, False])
def test_who_opens_a_port_without_keys_is_warned_at_each_start(keys: KeyFolder, tmp_path: Path, secure: bool) -> None:
    how = ("--curve", str(keys.path)) if secure else ("--insecure",)
    process = LocalProcess("open", broker(*how, "--frontend", OPEN, "--backend", OPEN), tmp_path / "open.log")
    for start in (1, 2):
        if start > 1:
            process.restart()
        eventually(lambda n=start: process.log.read_text().count(" broker_started ") == n, "it has started")
        process.stop()
        assert process.log.read_text().count("warning broker insecure") == (0 if secure else start)


# The wire.


class Wire:
    """A way to an endpoint that keeps all that passes, as somebody in between could."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self.seen = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._ends.append(near)
                try:
                    far = socket.create_connection(self._target)
                except OSError:  # nobody listens there yet
                    near.close()
                    continue
                self._ends.append(far)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                self.seen += data
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for end in (self._listener, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.parametrize("with_keys", [True, False], ids=["with keys", "without"])
def test_who_listens_on_the_wire_reads_no_prompt_and_no_answer(
    make_cluster: MakeCluster, keys: KeyFolder, with_keys: bool
) -> None:
    """Also without keys, so that it is seen to be them that hide it."""
    cluster = make_cluster(*(("--curve", str(keys.path)) if with_keys else ()))
    options = keys.options("gpu-1") if with_keys else ()
    client = {"server_key": keys.server_key, "key": keys.secret("ann")} if with_keys else {}
    with Client(cluster.frontend, connect_timeout_s=PATIENCE_S, **client) as ann:
        ann.status()  # the broker is there: nobody has to try again
    with closing(Wire(cluster.frontend)) as front, closing(Wire(cluster.backend)) as back:
        cluster.start_worker(*PACED, "--broker", back.endpoint, *options)
        with Client(front.endpoint, connect_timeout_s=PATIENCE_S, **client) as ann:
            wait_for_workers(ann, "worker-1")
            text = ann.generate(MODEL, "my secret prompt", max_tokens=30, seed=1).text()
        assert text == expected(1, 30)[1]
        words = [b"my secret prompt", *(f"{word} ".encode() for word in text.split() if len(word) > 4)]
        for wire in (front, back):
            assert len(wire.seen) > 1000
            assert [word in wire.seen for word in words] == [not with_keys] * len(words)


def test_the_door_of_a_worker_with_keys(
    make_cluster: MakeCluster, keys: KeyFolder, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    cluster = make_cluster("--curve", str(keys.path))
    cluster.start_worker(*PACED, "--direct", ANY, *keys.options("gpu-1"))
    with ExitStack() as stack:
        options = {"connect_timeout_s": PATIENCE_S, "direct": "127.0.0.1"}
        ann = stack.enter_context(keys.client(cluster.frontend, "ann", **options))
        root = stack.enter_context(keys.client(cluster.frontend, "root"))
        wait_for_workers(root, "worker-1")

        def came_direct() -> bool:
            stream = ann.generate(MODEL, "x", max_tokens=1)
            stream.text()
            return stream.attempts[-1].direct

        eventually(came_direct, "chunks come past the broker")
        reader = Reader(ann.generate(MODEL, "x", max_tokens=100, seed=3), 3, 100)
        # Eve is a client, too, and learns the door and a key by a request of her own.
        eve = stack.enter_context(closing(RawPeer(context, cluster.frontend, keys.curve("eve"))))
        eve.say(Hello("eve", "raw/1", direct=True))
        eve.expect(Welcome)
        eve.say(request(b"e" * 16, tokens=2))
        started = eve.until(Started)
        assert started.server_key == keys.pair("gpu-1").public
        eve.until(Finish)
        public, secret = curve_keypair()
        anybody = Curve(KeyPair(public.decode(), secret.decode()), started.server_key)
        for curve, attaches, hears in (
            (None, started.key, str),  # no CURVE: not even a handshake
            (Curve(anybody.pair, keys.server_public), started.key, str),  # nor with the broker's key for the worker's
            (anybody, b"g" * 16, Disconnect),  # CURVE is for anybody, and a key that is guessed brings nothing
        ):
            with closing(RawPeer(context, started.direct, curve)) as visitor:
                visitor.say(Attach(attaches))
                visitor.say(Hello("what is answered by DISCONNECT, and after all chunks", "raw/1"))
                heard = visitor.hear()
                assert isinstance(heard, hears), heard
                assert not isinstance(heard, str) or heard == "refused: handshake"
        # Her own key brings what is hers: nothing of ann's stream, which runs all the while.
        with closing(RawPeer(context, started.direct, anybody)) as visitor:
            visitor.say(Attach(started.key))
            direct = 0
            while not direct:  # it counts for what begins after it has arrived
                id = secrets.token_bytes(16)
                eve.say(request(id, tokens=1))
                direct = eve.until(Finish).chunks
            (chunk,) = visitor.expect(Chunks).chunks
            assert (chunk.request_id, chunk.token_ids) == (id, (token_at(1, 0),))
            eve.say(request(b"f" * 16, tokens=20))
            hers: list[int] = []
            while len(hers) < 20:
                for chunk in visitor.expect(Chunks).chunks:
                    assert chunk.request_id == b"f" * 16
                    hers.extend(chunk.token_ids)
        reader.end()
        assert [attempt.direct for attempt in reader.stream.attempts] == [True]


# Several processes; what they show of themselves.


def children(pid: int) -> list[int]:
    """Return a process and all below it."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in below for found in children(int(child)))]


def shown_by(pid: int) -> str:
    """Return what everybody (`ps`), and this user, can see of a process."""
    folder = Path(f"/proc/{pid}")
    return (folder / "cmdline").read_text() + (folder / "environ").read_text(errors="replace")


def test_shards_with_keys_and_no_secret_shown_anywhere(
    keys: KeyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One part is told by options and the other by the environment, as people do.
    monkeypatch.setenv("TOKENMQ_WORKER_KEY", str(keys.secret("gpu-1")))
    log = tmp_path / "broker.log"
    options = (
        "--shards",
        "2",
        "--curve",
        str(keys.path),
        "--frontend",
        ANY,
        "--backend",
        ANY,
        "--log-level",
        "debug",
    )
    processes = [LocalProcess("broker", broker(*options), log)]
    try:
        line = eventually(lambda: re.search(r" addresses .*", log.read_text()), "it tells its addresses").group()
        told = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
        frontends = told["clients"].split()[1::2]
        worker = [
            sys.executable,
            "-m",
            "tokenmq.cli.worker",
            *PACED,
            "--worker-name",
            "gpu-1",
            *told["workers"].split(),
        ]
        worker += ["--server-key", str(keys.server_key), "--log-level", "debug"]
        processes.append(LocalProcess("worker", worker, tmp_path / "worker.log"))
        answers = ""
        for frontend in frontends:
            with keys.client(frontend, "root", connect_timeout_s=PATIENCE_S) as root:
                wait_for_workers(root, "gpu-1")
                answers += json.dumps([root.status(), root.workers(), root.models(), root.route(MODEL)])
        with ExitStack() as stack:
            endless = []
            for number, frontend in enumerate(frontends):
                ann = stack.enter_context(
                    keys.client(frontend, "ann", connect_timeout_s=PATIENCE_S, window_tokens=64)
                )
                endless.append(read(ann, number, tokens=20_000))
                endless[-1].wait_for(3)
            keys.revoke("ann")
            for reader in endless:
                eventually(lambda reader=reader: reader.error, "each shard cuts her off")
                assert isinstance(reader.error, ForbiddenError)
        everybody = [pid for process in processes for pid in children(process.pid)]
        assert len(everybody) == 4, "a supervisor, two brokers, a worker"
        shown = "".join(map(shown_by, everybody))
        assert str(keys.path) in shown
    finally:
        for process in reversed(processes):
            process.stop()
    shown += answers + "".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert "client_connected" in shown
    assert [secret for secret in keys.secrets() if secret in shown] == []
