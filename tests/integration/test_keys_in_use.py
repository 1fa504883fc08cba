"""Keys with real processes: what they keep apart, what a revoked one ends, and that a new one needs no restart."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import zmq

from tokenmq.client import AsyncClient, BrokerLostError, Client, ForbiddenError
from tokenmq.client.local import LocalCluster
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    Envelope,
    Error,
    Finish,
    FinishReason,
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
from tokenmq.protocol.payload import Generation, Sampling, pack_generation
from tokenmq.transport.keys import KeyPair, create_pair, load_pair
from tokenmq.worker.engines.synthetic import token_at

from .conftest import PATIENCE_S, at_rest, eventually
from .keyed import KeyFolder, RawPeer, ready, wait_for_workers
from .test_recovery import MODEL, PACED, Reader, read

MakeCluster = Callable[..., LocalCluster]
Context = zmq.Context  # of bytes
#: A stream that lasts for minutes at the workers' pace: what ends it in a test is no patience.
ENDLESS = 20_000


class Keyed:
    """A broker with keys: ann and bob are clients, root is an admin, gpu-1 and gpu-2 are workers."""

    def __init__(self, make_cluster: MakeCluster, folder: Path, *options: str) -> None:
        self.keys = KeyFolder(folder / "keys")
        for name, role in {
            "ann": "client",
            "bob": "client",
            "root": "admin",
            "gpu-1": "worker",
            "gpu-2": "worker",
        }.items():
            self.keys.new(name, role)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.cluster = make_cluster("--curve", str(self.keys.path), "--log-level", "debug", *options)
        self._open = ExitStack()
        self.root = self.client("root")
        self.root.status()  # the broker is there

    def client(self, name: str) -> Client:
        return self._open.enter_context(
            self.keys.client(self.cluster.frontend, name, connect_timeout_s=PATIENCE_S, window_tokens=64)
        )

    def worker(self, *names: str) -> None:
        """Start workers that are called as their keys are, and wait for them."""
        for name in names:
            self.cluster.start_worker(*PACED, "--worker-name", name, *self.keys.options(name))
        wait_for_workers(self.root, *names)

    def peer(self, name: str, *, backend: bool = False) -> RawPeer:
        endpoint = self.cluster.backend if backend else self.cluster.frontend
        peer = RawPeer(self.context, endpoint, self.keys.curve(name))
        self._open.callback(peer.close)
        return peer

    def greeted(self, name: str, *, calls_itself: str = "raw") -> RawPeer:
        """Return a raw client with a session."""
        peer = self.peer(name)
        peer.say(Hello(calls_itself, "raw/1"))
        peer.expect(Welcome)
        return peer

    def registered(self, key: str, name: str, **details: object) -> RawPeer:
        """Return a raw worker with a session."""
        peer = self.peer(key, backend=True)
        peer.say(ready(name, **details))  # type: ignore[arg-type]
        peer.expect(Accepted)
        return peer

    @property
    def log(self) -> str:
        return self.cluster.broker.log.read_text()

    def close(self) -> None:
        self._open.close()
        self.context.destroy(linger=0)


@pytest.fixture
def keyed(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[Keyed]:
    with closing(Keyed(make_cluster, tmp_path)) as made:
        yield made


def request(id: bytes, *, credit: int = 10_000, attempt: int = 1, seed: int = 1, tokens: int = 50) -> Request:
    sampling = Sampling(max_tokens=tokens, seed=seed)
    return Request(id, Envelope(MODEL, attempt, credit), pack_generation(Generation(prompt="x", sampling=sampling)))


def answered(peer: RawPeer) -> list[Message]:
    """Ask something, and return all that comes before the answer: what was said before is done by then."""
    id = b"?" * 16
    peer.say(Query(id, "status"))
    came: list[Message] = []
    while True:
        heard = peer.hear()
        assert not isinstance(heard, (str, Disconnect)), heard
        if isinstance(heard, Reply) and heard.id == id:
            return came
        came.append(heard)


def read_to(peer: RawPeer, id: bytes, tokens: int, came: list[int]) -> None:
    """Read a stream until it has so many tokens; nothing of another stream may come."""
    while len(came) < tokens:
        heard = peer.hear()
        if isinstance(heard, Started):
            continue
        assert isinstance(heard, Chunks), heard
        for chunk in heard.chunks:
            assert (chunk.request_id, chunk.offset) == (id, len(came))
            came.extend(chunk.token_ids)


# A stream is its client's alone.


def test_nobody_reads_pays_or_cancels_the_stream_of_another_key(keyed: Keyed) -> None:
    keyed.worker("gpu-1")
    ann, bob = keyed.greeted("ann"), keyed.greeted("bob")
    id = b"a" * 16
    came: list[int] = []
    ann.say(request(id, credit=5, tokens=20))
    read_to(ann, id, 5, came)
    bob.say(Credit(id, 1, 1_000))
    bob.say(Cancel(id, 1))
    bob.say(Credit(id, 2, 1_000))
    bob.say(request(id))  # the same id and attempt: refused, since it is in use
    assert bob.expect(Error).code == "bad_request"
    assert answered(bob) == []
    ann.say(Credit(id, 1, 8))
    read_to(ann, id, 8, came)
    assert answered(ann) == [], "bob's credit counts for nothing"
    # The same id and another attempt is a request of bob's own, and he hears of no other.
    bob.say(request(id, attempt=2, seed=9, tokens=30))
    theirs: list[int] = []
    read_to(bob, id, 30, theirs)
    assert theirs == [token_at(9, position) for position in range(30)]
    assert bob.expect(Finish).attempt == 2
    ann.say(Credit(id, 1, 20))
    read_to(ann, id, 20, came)
    assert came == [token_at(1, position) for position in range(20)]
    finish = ann.expect(Finish)
    assert (finish.reason, finish.attempt) == (FinishReason.LENGTH, 1)
    assert answered(bob) == []


def test_a_worker_reaches_no_client_whose_request_it_does_not_hold(keyed: Keyed) -> None:
    keyed.worker("gpu-1")
    before = keyed.root.status()["counters"]
    ann = keyed.greeted("ann")
    id = b"a" * 16
    came: list[int] = []
    ann.say(request(id, tokens=60))
    read_to(ann, id, 5, came)
    mole = keyed.registered("gpu-2", "mole", model="other")
    routes = [number.to_bytes(16, "big") for number in range(20)]  # brokers count them: nobody has to guess
    for route in routes:
        mole.say(Chunks(route, (Chunk(id, 1, 0, 5, (666,), "evil"),)))
    mole.say(Finish(id, 1, FinishReason.STOP, Usage(), Timings(), "gpu-1"))
    mole.say(Error(id, 1, "engine_error", "evil"))
    eventually(lambda: keyed.root.status()["counters"]["late_answers"] == before["late_answers"] + 2, "it is read")
    dropped = keyed.root.status()["counters"]["chunk_messages_dropped"] - before["chunk_messages_dropped"]
    assert dropped == len(routes)
    read_to(ann, id, 60, came)
    assert came == [token_at(1, position) for position in range(60)]
    assert ann.expect(Finish).reason is FinishReason.LENGTH
    # One that does hold a request of bob's can say what it likes to bob, and still nothing to ann.
    bob = keyed.greeted("bob")
    bob.say(Request(b"b" * 16, Envelope("other", 1, 100), pack_generation(Generation(prompt="x"))))
    given = mole.until(Request)
    for route in (given.envelope.route, *routes):
        mole.say(Chunks(route, (Chunk(id, 1, 0, 60, (666,), "evil"),)))
    mole.say(Finish(given.id, 1, FinishReason.STOP, Usage(), Timings(), "gpu-1"))
    finish = bob.until(Finish)
    assert finish.worker == "mole", "the broker says who it was"
    assert answered(ann) == []


# Revoked, enrolled, moved, renewed.


def test_a_revoked_client_is_cut_off_in_mid_stream(keyed: Keyed) -> None:
    keyed.worker("gpu-1")
    ann, bob = keyed.client("ann"), keyed.client("bob")
    endless, whole = read(ann, 1, tokens=ENDLESS), read(bob, 2, tokens=100)
    for reader in (endless, whole):
        reader.wait_for(5)
    keyed.keys.revoke("ann")
    with pytest.raises(AssertionError, match="revoked"):
        endless.wait_for(ENDLESS)
    assert isinstance(endless.error, ForbiddenError)
    assert len(endless.ids) < ENDLESS
    with pytest.raises(ForbiddenError):
        ann.models()
    assert keyed.root.status()["counters"]["cancelled"] == 1
    whole.end()
    assert whole.causes() == []
    eventually(lambda: at_rest(keyed.root), "the worker has stopped, too")


def test_a_revoked_worker_is_cut_off_and_its_streams_go_on_elsewhere(keyed: Keyed) -> None:
    keyed.worker("gpu-1", "gpu-2")
    ann = keyed.client("ann")
    readers = [read(ann, seed, tokens=150) for seed in range(4)]
    for reader in readers:
        reader.wait_for(5)
    keyed.keys.revoke("gpu-1")
    for reader in readers:
        reader.end()
        assert reader.causes() in ([], ["worker_lost"])
        assert reader.stream.attempts[-1].worker == "gpu-2"
    assert any(reader.causes() for reader in readers)
    wait_for_workers(keyed.root, "gpu-2")
    log = keyed.cluster.workers[0].log
    eventually(lambda: "does not admit this key" in log.read_text(), "the worker is told why it gets in no more")
    assert keyed.cluster.workers[0].exit_code is None, "it waits to be let in again"


def test_who_is_enrolled_while_he_tries_needs_no_restart(keyed: Keyed, tmp_path: Path) -> None:
    pairs: dict[str, KeyPair] = {}
    for name in ("gpu-3", "eve"):
        create_pair(str(tmp_path / f"{name}.key"), str(keyed.keys.secret(name)))
        pairs[name] = load_pair(str(keyed.keys.secret(name)))
    worker = keyed.cluster.start_worker(*PACED, "--worker-name", "gpu-3", *keyed.keys.options("gpu-3"))
    eventually(lambda: "does not admit this key" in worker.log.read_text(), "the worker is refused")
    eve = keyed.client("eve")
    with pytest.raises(ForbiddenError, match="does not admit this key"):
        eve.models()
    keyed.keys.enrol("gpu-3", "worker", pairs["gpu-3"])
    wait_for_workers(keyed.root, "gpu-3")
    keyed.keys.enrol("eve", "client", pairs["eve"])

    def served() -> bool:
        try:
            return eve.generate(MODEL, "x", max_tokens=1).text() != ""
        except ForbiddenError:
            return False

    eventually(served, "the client is let in")


def test_a_key_that_is_moved_to_the_admins_is_an_admins(keyed: Keyed) -> None:
    bob = keyed.client("bob")
    with pytest.raises(ForbiddenError, match="administrators"):
        bob.set_policy("lottery")
    shutil.move(keyed.keys.path / "clients/bob.key", keyed.keys.path / "admins/bob.key")

    def may() -> bool:
        try:
            return bob.set_policy("lottery")["policy"] == "lottery"
        except (ForbiddenError, BrokerLostError):  # the session ends, and another one begins
            return False

    eventually(may, "bob is an admin")
    shutil.move(keyed.keys.path / "admins/bob.key", keyed.keys.path / "clients/bob.key")
    eventually(lambda: not may(), "and is none any more")


def test_a_new_key_under_the_old_name(keyed: Keyed) -> None:
    old = keyed.keys.curve("gpu-1")
    stale = RawPeer(keyed.context, keyed.cluster.backend, old)
    with closing(stale):
        stale.say(ready("gpu-1"))
        stale.expect(Accepted)
        keyed.keys.revoke("gpu-1")
        keyed.keys.new("gpu-1", "worker")
        assert stale.expect(Disconnect).code is DisconnectCode.FORBIDDEN
        keyed.worker("gpu-1")
        with closing(RawPeer(keyed.context, keyed.cluster.backend, old)) as again:
            assert again.hear() == "refused: key"
    assert keyed.client("ann").generate(MODEL, "x", max_tokens=3, seed=1).text()


# Names.


def test_a_client_is_called_what_its_key_is_called(make_cluster: MakeCluster, tmp_path: Path) -> None:
    with closing(Keyed(make_cluster, tmp_path, "--max-open-requests", "3")) as keyed:
        worker = keyed.registered("gpu-1", "w", model=MODEL)  # with one slot, which is taken for good
        first, second = (keyed.greeted("ann", calls_itself=name) for name in ("bob", "root"))
        bob = keyed.greeted("bob", calls_itself="bob")
        first.say(request(b"1" * 16))
        worker.until(Request)
        for peer, number in ((first, b"2"), (second, b"3"), (bob, b"4")):
            peer.say(request(number * 16))
            answered(peer)
        (waiting,) = keyed.root.status()["waiting"]
        assert (waiting["waiting"], waiting["clients"]) == (3, 2), "ann's connections are one client"
        # They have one allowance, too: three requests are open, though each connection has fewer.
        second.say(request(b"5" * 16))
        refused = second.expect(Error)
        assert refused.code == "rate_limited"
        assert "ann" in refused.message
        bob.say(request(b"6" * 16))
        assert [type(message) for message in answered(bob)] == [], "it waits"
        eventually(lambda: "calls_itself=root" in keyed.log, "it is logged")
        connected = re.findall(r"client_connected.* client=(\S+).* calls_itself=(\S+)", keyed.log)
        assert {("ann", "bob"), ("ann", "root"), ("bob", "bob")} <= set(connected)


def test_a_workers_name_is_its_keys_as_long_as_it_is_there(keyed: Keyed) -> None:
    first = keyed.registered("gpu-1", "w")
    thief = keyed.peer("gpu-2", backend=True)
    thief.say(ready("w", incarnation=99))
    refusal = thief.expect(Disconnect)
    assert (refusal.code, "another key" in refusal.message) == (DisconnectCode.FORBIDDEN, True)
    later = keyed.registered("gpu-1", "w", incarnation=2)
    assert first.expect(Disconnect).code is DisconnectCode.SUPERSEDED
    early = keyed.peer("gpu-1", backend=True)
    early.say(ready("w", incarnation=1))
    assert early.expect(Disconnect).code is DisconnectCode.SUPERSEDED
    (row,) = keyed.root.workers()
    assert (row["name"], row["incarnation"]) == ("w", 2)
    later.close()
    wait_for_workers(keyed.root)
    keyed.registered("gpu-2", "w")  # nobody has it any more


# Ways to give keys.


def test_keys_from_the_environment(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, name in (("CLIENT", "ann"), ("WORKER", "gpu-1")):
        monkeypatch.setenv(f"TOKENMQ_{part}_SERVER_KEY", str(keyed.keys.server_key))
        monkeypatch.setenv(f"TOKENMQ_{part}_KEY", str(keyed.keys.secret(name)))
    keyed.cluster.start_worker(*PACED, "--worker-name", "gpu-1")
    keyed.cluster.wait_ready(MODEL)  # by a client that has its keys from there, too

    async def ask() -> str:
        async with AsyncClient(keyed.cluster.frontend) as client:
            return await client.generate(MODEL, "x", max_tokens=3, seed=1).text()

    with Client(keyed.cluster.frontend) as client:
        assert client.generate(MODEL, "x", max_tokens=3, seed=1).text() == asyncio.run(ask()) != ""

    async def ask_with_arguments() -> str:
        async with keyed.keys.async_client(keyed.cluster.frontend, "bob") as client:
            return await client.generate(MODEL, "x", max_tokens=3, seed=1).text()

    assert asyncio.run(ask_with_arguments()) != ""


def test_two_brokers_with_keys_of_their_own(make_cluster: MakeCluster, tmp_path: Path) -> None:
    both = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        keys = KeyFolder(tmp_path / name / "keys")
        both.append((keys, make_cluster("--curve", str(keys.path))))
    (one, first), (two, second) = both
    for name, role in (("gpu", "worker"), ("ann", "client")):
        one.new(name, role)
        two.enrol(name, role, one.pair(name))
    brokers = ("--broker", first.backend, "--broker", second.backend)
    server_keys = ("--server-key", str(one.server_key), "--server-key", two.server_public)
    first.start_worker(*PACED, "--worker-name", "gpu", *brokers, *server_keys, "--key", str(one.secret("gpu")))
    options = {"key": one.secret("ann"), "connect_timeout_s": PATIENCE_S}
    for keys, cluster in both:
        with Client(cluster.frontend, server_key=keys.server_key, **options) as client:
            wait_for_workers(client, "gpu")
    endpoints = [first.frontend, second.frontend]
    with Client(endpoints, server_key=[one.server_key, two.server_public], **options) as client:
        reader = read(client, 3)
        reader.wait_for(5)
        first.broker.kill()
        reader.end()
        assert reader.stream.attempts[-1].broker == second.frontend


def test_a_tree_of_brokers_with_keys_of_their_own(make_cluster: MakeCluster, tmp_path: Path) -> None:
    with ExitStack() as stack:
        folders = [tmp_path / name for name in ("above", "below")]
        for folder in folders:
            folder.mkdir()
        above = stack.enter_context(closing(Keyed(make_cluster, folders[0])))
        above.keys.new("mid", "worker")
        uplink = ("--uplink", above.cluster.backend, "--uplink-key", str(above.keys.secret("mid")))
        server_key = ("--uplink-server-key", str(above.keys.server_key))
        below = stack.enter_context(closing(Keyed(make_cluster, folders[1], "--name", "mid", *uplink, *server_key)))
        below.worker("gpu-1")
        wait_for_workers(above.root, "mid")
        reader, theirs = read(above.client("ann"), 4, tokens=60), read(below.client("ann"), 5, tokens=200)
        reader.end()
        assert reader.stream.attempts[-1].worker == "mid/gpu-1"
        # An admin above may order what is below; its keys mean nothing there.
        assert above.root.set_speed("mid/gpu-1", 5.0)["worker"] == "mid/gpu-1"
        with closing(RawPeer(above.context, below.cluster.frontend, above.keys.curve("root"))) as foreign:
            assert foreign.hear().startswith("refused")  # type: ignore[union-attr]
        above.keys.revoke("mid")
        wait_for_workers(above.root)
        theirs.end()
        assert theirs.causes() == []


# Past the broker.


def test_chunks_come_past_a_broker_with_keys(keyed: Keyed) -> None:
    door = ("--direct", "tcp://127.0.0.1:*", "--worker-name", "gpu-1")
    keyed.cluster.start_worker(*PACED, *door, *keyed.keys.options("gpu-1"))
    wait_for_workers(keyed.root, "gpu-1")
    with keyed.keys.client(keyed.cluster.frontend, "ann", direct="127.0.0.1") as ann:

        def came_direct() -> bool:
            stream = ann.generate(MODEL, "x", max_tokens=1)
            stream.text()
            return stream.attempts[-1].direct

        eventually(came_direct, "chunks come past the broker")
        before = keyed.root.status()["counters"]["chunk_messages"]
        reader = Reader(ann.generate(MODEL, "x", max_tokens=60, seed=3), 3, 60)
        reader.end()
        assert keyed.root.status()["counters"]["chunk_messages"] == before
