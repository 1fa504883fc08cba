"""Who may say what: every key, at both sockets, with every command of TMQ/1, against a real broker with --curve.

`MATRIX` says what each command leads to, by where its sender stands; `LET_IN` says whose keys lead where. All of it
is said by raw sockets, while an honest worker serves an honest client at the same broker.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import pytest
import zmq
from zmq import curve_keypair

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster
from tokenmq.protocol.messages import (
    Accepted,
    Attach,
    Cancel,
    Chunk,
    Chunks,
    Command,
    Credit,
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
    Message,
    Parked,
    Query,
    Reply,
    Request,
    Started,
    Timings,
    Usage,
    Welcome,
)
from tokenmq.protocol.payload import Generation, Sampling, pack_generation
from tokenmq.transport.keys import Curve, KeyPair

from .conftest import PATIENCE_S, at_rest, eventually
from .keyed import NO_HANDSHAKE, NO_SUCH_KEY, KeyFolder, RawPeer, ready
from .test_recovery import MODEL, PACED, expected

FRONTEND, BACKEND = "frontend", "backend"
STRANGER, CLIENT, ADMIN, WORKER, BROKER = "stranger", "client", "admin", "worker", "broker"

#: What becomes of each command, by where its sender stands: a stranger has shown a key that is let in, and has not
#: introduced itself; the others have a session. `broker` is one that has registered as a worker, with --uplink.
#:
#: - A message in capitals is the answer. ERROR forbidden leaves the session as it is.
#: - taken: it is allowed, nothing is answered, and the session goes on; dropped: it goes on, but nothing comes of it.
#: - In small letters, the code of the DISCONNECT that ends the session and the connection; ends: they end without.
MATRIX = """
                  frontend                                    backend
                  stranger      client           admin     |  stranger      worker    broker
HELLO             WELCOME       protocol         protocol  |  unknown_peer  protocol  protocol
WELCOME           unknown_peer  protocol         protocol  |  unknown_peer  protocol  protocol
READY             unknown_peer  protocol         protocol  |  ACCEPTED      taken     taken
ACCEPTED          unknown_peer  protocol         protocol  |  unknown_peer  protocol  protocol
REQUEST           unknown_peer  FINISH           FINISH    |  unknown_peer  protocol  protocol
CREDIT            unknown_peer  taken            taken     |  unknown_peer  protocol  protocol
CANCEL            unknown_peer  taken            taken     |  unknown_peer  protocol  protocol
CHUNKS            unknown_peer  protocol         protocol  |  unknown_peer  dropped   dropped
FINISH            unknown_peer  protocol         protocol  |  unknown_peer  dropped   dropped
ERROR             unknown_peer  protocol         protocol  |  unknown_peer  dropped   dropped
PARKED            unknown_peer  protocol         protocol  |  unknown_peer  taken     taken
STARTED           unknown_peer  protocol         protocol  |  unknown_peer  protocol  taken
ATTACH            unknown_peer  protocol         protocol  |  unknown_peer  protocol  protocol
QUERY_models      unknown_peer  REPLY            REPLY     |  unknown_peer  protocol  protocol
QUERY_workers     unknown_peer  REPLY            REPLY     |  unknown_peer  protocol  protocol
QUERY_status      unknown_peer  REPLY            REPLY     |  unknown_peer  protocol  protocol
QUERY_route       unknown_peer  REPLY            REPLY     |  unknown_peer  protocol  protocol
QUERY_refresh     unknown_peer  ERROR_forbidden  REPLY     |  unknown_peer  protocol  protocol
QUERY_remove      unknown_peer  ERROR_forbidden  REPLY     |  unknown_peer  protocol  protocol
QUERY_drain       unknown_peer  ERROR_forbidden  REPLY     |  unknown_peer  protocol  protocol
QUERY_undrain     unknown_peer  ERROR_forbidden  REPLY     |  unknown_peer  protocol  protocol
QUERY_set_policy  unknown_peer  ERROR_forbidden  REPLY     |  unknown_peer  protocol  protocol
QUERY_set_speed   unknown_peer  ERROR_forbidden  REPLY     |  unknown_peer  protocol  protocol
REPLY             unknown_peer  protocol         protocol  |  unknown_peer  protocol  taken
HEARTBEAT         unknown_peer  taken            taken     |  unknown_peer  taken     taken
DRAINING          unknown_peer  protocol         protocol  |  unknown_peer  taken     taken
GOODBYE           ends          ends             ends      |  ends          ends      ends
DISCONNECT        unknown_peer  protocol         protocol  |  unknown_peer  protocol  protocol
DRAIN             unknown_peer  protocol         protocol  |  unknown_peer  protocol  protocol
"""

#: Where a key leads, `no_key` being a plain connection (NULL). Handshakes fail because the key is on no list for this
#: socket, or break off before it could be looked at; then nothing that the peer says is heard by anybody.
LET_IN = """
                   frontend            backend
client             stranger            refused:_key
admin              stranger            refused:_key
worker             refused:_key        stranger
unknown            refused:_key        refused:_key
revoked_client     refused:_key        refused:_key
revoked_worker     refused:_key        refused:_key
wrong_server_key   refused:_handshake  refused:_handshake
no_key             refused:_handshake  refused:_handshake
"""


def read_matrix() -> dict[tuple[str, str], dict[str, str]]:
    """Return what each command leads to, by side and standing."""
    lines = [line.replace("|", " ").split() for line in MATRIX.strip().splitlines()[1:]]
    standings, rows = lines[0], lines[1:]
    places = [(FRONTEND if number < 3 else BACKEND, standing) for number, standing in enumerate(standings)]
    assert all(len(row) == 1 + len(places) for row in rows), "a cell is missing"
    return {place: {row[0]: row[1 + number] for row in rows} for number, place in enumerate(places)}


def read_ways_in() -> dict[tuple[str, str], str]:
    """Return where each key leads, by key and side."""
    rows = [line.split() for line in LET_IN.strip().splitlines()[1:]]
    ways = {(who, side): cell for who, *cells in rows for side, cell in zip((FRONTEND, BACKEND), cells, strict=True)}
    return {place: cell.replace("_", " ") for place, cell in ways.items()}


CELLS = read_matrix()
WAYS_IN = read_ways_in()
COMMANDS = list(CELLS[FRONTEND, STRANGER])
#: A stranger with each key at each side, and each session that there can be.
ROWS = [(who, side, STRANGER) for who, side in WAYS_IN] + [
    (CLIENT, FRONTEND, CLIENT),
    (ADMIN, FRONTEND, ADMIN),
    (WORKER, BACKEND, WORKER),
    (WORKER, BACKEND, BROKER),
]
CHANGING = [command for command, cell in CELLS[FRONTEND, CLIENT].items() if cell == "ERROR_forbidden"]
#: The id of the question that shows that a client's session stands.
PROBE = b"p" * 16


@dataclass
class Honest:
    """A client that reads streams one after the other while others do what they like, and checks each token."""

    client: Client
    streams: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while not self._ending.is_set():
                stream = self.client.generate(MODEL, "honest", max_tokens=20, seed=self.streams)
                ids = [token for chunk in stream for token in chunk.token_ids]
                if ids != expected(self.streams, 20)[0]:
                    self.faults.append(f"stream {self.streams} has other tokens")
                if len(stream.attempts) != 1:
                    self.faults.append(f"stream {self.streams} took {len(stream.attempts)} attempts")
                self.streams += 1
        except TokenmqError as error:
            self.faults.append(f"stream {self.streams} failed: {error!r}")

    def end(self) -> None:
        """Read no more than the stream that runs."""
        self._ending.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "its stream hangs"


class Stage:
    """The broker, its folder of keys, and those who come to it.

    Attributes:
        keys: the folder.
        cluster: the broker, and an honest worker.
        watcher: an admin who sees what has happened.
        honest: an honest client.
    """

    def __init__(self, cluster: LocalCluster, keys: KeyFolder, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.cluster, self.keys, self._context = cluster, keys, context
        self.watcher = keys.client(cluster.frontend, "watcher", connect_timeout_s=PATIENCE_S)
        eventually(lambda: len(self.watcher.workers()) == 1, "the honest worker is there")
        self._curves: dict[str, Curve | None] = {who: keys.curve(who) for who in (CLIENT, ADMIN, WORKER)}
        self._curves["unknown"] = Curve(_stranger(), keys.server_public)
        self._curves["no_key"] = None
        for role, side, first in ((CLIENT, FRONTEND, Hello("x", "raw/1")), (WORKER, BACKEND, ready("revoked"))):
            who = f"revoked_{role}"
            self._curves[who] = keys.curve(who)
            with closing(self.peer(who, side)) as peer:
                peer.say(first)
                assert isinstance(peer.hear(), (Welcome, Accepted)), "it has been let in once"
                (keys.path / f"{role}s" / f"{who}.key").unlink()
                assert peer.expect(Disconnect).code is DisconnectCode.FORBIDDEN
        self.honest = Honest(keys.client(cluster.frontend, "honest"))

    def peer(self, who: str, side: str) -> RawPeer:
        """Return a raw peer with a key, or what stands for one, at one of the sockets."""
        endpoint = self.cluster.frontend if side == FRONTEND else self.cluster.backend
        if who == "wrong_server_key":  # a key that would be let in
            mine = self.keys.pair(CLIENT if side == FRONTEND else WORKER)
            return RawPeer(self._context, endpoint, Curve(mine, _stranger().public))
        return RawPeer(self._context, endpoint, self._curves[who])

    def counters(self, *names: str) -> list[int]:
        """Return some of the broker's counters."""
        counters = self.watcher.status()["counters"]
        return [counters[name] for name in names]

    def close(self) -> None:
        self.honest.end()
        self.honest.client.close()
        self.watcher.close()


def _stranger() -> KeyPair:
    """Return a pair that nobody knows."""
    public, secret = curve_keypair()
    return KeyPair(public.decode(), secret.decode())


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("matrix")
    keys = KeyFolder(folder / "keys")
    for role in (CLIENT, ADMIN, WORKER):
        keys.new(role, role)
    keys.new("watcher", ADMIN)
    keys.new("honest", CLIENT)
    keys.new("gpu", WORKER)
    keys.new("revoked_client", CLIENT)
    keys.new("revoked_worker", WORKER)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with LocalCluster("--curve", str(keys.path), "--expiry", "60", folder=folder) as cluster:
        cluster.start_worker(*PACED, *keys.options("gpu"))
        with closing(Stage(cluster, keys, context)) as made:
            yield made
    context.destroy(linger=0)


def said(command: str, name: str) -> Message:
    """Return a command as `MATRIX` calls it, well formed, from a peer called `name`."""
    id = secrets.token_bytes(16)
    kind, _, method = command.partition("_")
    if kind == "QUERY":
        about = f"victim-of-{method}"
        arguments = {
            "route": {"model": MODEL},
            "remove": {"worker": about},
            "drain": {"worker": about, "stay": True},
            "undrain": {"worker": about},
            "set_policy": {"policy": "lottery"},
            "set_speed": {"worker": about, "speed": 7.0},
        }
        return Query(id, method, arguments.get(method, {}))
    sampling = Sampling(max_tokens=2)
    messages: tuple[Message, ...] = (
        Hello(name, "raw/1"),
        Welcome("broker", "raw/1", 1.0, 5.0),
        ready(name),
        Accepted("broker", "raw/1", 1.0, 5.0),
        Request(id, Envelope(MODEL, 1, 100), pack_generation(Generation(prompt="x", sampling=sampling))),
        Credit(id, 1, 1_000),
        Cancel(id, 1),
        Chunks((1).to_bytes(16, "big"), (Chunk(id, 1, 0, 0, (1,), "x"),)),
        Finish(id, 1, FinishReason.STOP, Usage(), Timings(), name),
        Error(id, 1, "engine_error", "x"),
        Parked(id, 1),
        Started(id, 1, name),
        Attach(id),
        Reply(id, {}),
        Heartbeat(1),
        Draining(),
        Goodbye(),
        Disconnect(DisconnectCode.EXPIRED, "x"),
        Drain(),
    )
    return next(message for message in messages if message.command.name == kind)


class Cell:
    """A peer that has said a command; `outcome` is what became of it, in the words of `MATRIX`."""

    def __init__(self, peer: RawPeer, command: str, standing: str) -> None:
        """Take the standing, and say the command.

        Args:
            peer: it has not said anything yet.
            command: as `MATRIX` calls it.
            standing: what it is to be when it says it.
        """
        self.peer = peer
        self._standing = standing
        self._command = command
        name = f"raw-{standing}-{command}"
        if standing in (CLIENT, ADMIN):
            peer.say(Hello(name, "raw/1"))
            peer.expect(Welcome)
        elif standing in (WORKER, BROKER):
            peer.say(ready(name, brokers=(name,) if standing == BROKER else ()))
            peer.expect(Accepted)
        self._message = said(command, name)
        peer.say(self._message)
        if standing in (CLIENT, ADMIN):
            peer.say(Query(PROBE, "status"))
        elif standing in (WORKER, BROKER):
            peer.say(Heartbeat(999))  # the answer tells how many messages of the session have arrived

    def outcome(self) -> str:
        probed = False
        answer = "" if self._command.startswith(("REQUEST", "QUERY")) and self._standing != STRANGER else "taken"
        while not (probed and answer):
            heard = self.peer.hear()
            if isinstance(heard, str):
                return heard
            if isinstance(heard, Disconnect):
                if (
                    heard.code is DisconnectCode.LOST_MESSAGES
                    and "999 messages were sent, 2 arrived" in heard.message
                ):
                    return answer
                return heard.code.value
            if self._standing == STRANGER:
                return heard.command.name
            if isinstance(heard, Reply) and heard.id == PROBE:
                probed = True
            elif isinstance(heard, (Finish, Reply, Error)):
                assert isinstance(self._message, (Request, Query))
                assert heard.id == self._message.id
                answer = heard.command.name + (f"_{heard.code}" if isinstance(heard, Error) else "")
            else:
                assert isinstance(heard, (Chunks, Started)), heard
        return answer


def test_the_table_has_every_command() -> None:
    assert {command.partition("_")[0] for command in COMMANDS} == {command.name for command in Command}
    rows = [line.split()[0] for line in MATRIX.strip().splitlines()[2:]]
    assert len(rows) == len(set(rows)), "a command stands there twice"


def test_the_table_has_every_query(stage: Stage) -> None:
    with closing(stage.peer(CLIENT, FRONTEND)) as peer:
        peer.say(Hello("x", "raw/1"))
        peer.expect(Welcome)
        peer.say(Query(PROBE, "no such query"))
        _, known = peer.expect(Error).message.split("known are ")
    assert [f"QUERY_{method}" for method in known.split(", ")] == sorted(
        command for command in COMMANDS if command.startswith("QUERY")
    )


@pytest.mark.parametrize(("who", "side", "standing"), ROWS, ids=["-".join(row) for row in ROWS])
def test_who_may_say_what(stage: Stage, who: str, side: str, standing: str) -> None:
    """One row for each key, socket and standing; each cell is a connection of its own."""
    way_in = WAYS_IN[who, side]
    wanted = dict(CELLS[side, standing])
    if way_in != STRANGER:
        assert standing == STRANGER
        assert way_in in (NO_SUCH_KEY, NO_HANDSHAKE)
        wanted = dict.fromkeys(wanted, way_in)
    if standing != STRANGER:
        wanted = {command: "taken" if cell == "dropped" else cell for command, cell in wanted.items()}
    # Not those sent away: on a machine that is busy elsewhere, a session of another row may expire meanwhile.
    heard_of = ("malformed", "late_answers", "chunk_messages_dropped")
    before = stage.counters(*heard_of)
    with ExitStack() as stack:
        victims = {}
        if side == FRONTEND:
            for command in CHANGING:
                name = command.replace("QUERY_", "victim-of-")
                victims[name] = stack.enter_context(closing(stage.peer(WORKER, BACKEND)))
                victims[name].say(ready(name))
                victims[name].expect(Accepted)
        peers = {command: stack.enter_context(closing(stage.peer(who, side))) for command in COMMANDS}
        cells = {command: Cell(peer, command, standing) for command, peer in peers.items()}
        assert {command: cell.outcome() for command, cell in cells.items()} == wanted
        after = stage.counters(*heard_of)
        if way_in != STRANGER:
            assert after == before, "whoever was refused was heard"
        if standing in (WORKER, BROKER):
            places = [heard_of.index(name) for name in ("late_answers", "chunk_messages_dropped")]
            assert [after[place] - before[place] for place in places] == [2, 1], "FINISH and ERROR; CHUNKS"
        _look_at(stage, victims, changed=standing == ADMIN)


def _look_at(stage: Stage, victims: dict[str, RawPeer], *, changed: bool) -> None:
    """See whether those that were to be drained, removed and so on were."""
    rows = {row["name"]: row for row in stage.watcher.workers()}
    for name in victims:
        if changed and name == "victim-of-remove":
            assert name not in rows
            assert victims[name].expect(Disconnect).code is DisconnectCode.REMOVED
            continue
        row = rows[name]
        orders = (row["held"], row["speed_set"])
        assert orders == (changed and name == "victim-of-drain", 7.0 if changed and "speed" in name else None), name
    assert stage.watcher.status()["policy"] == ("lottery" if changed else "shortest-queue")
    if changed:
        stage.watcher.set_policy("shortest-queue")


def test_nobody_else_was_hurt(stage: Stage) -> None:
    """The honest client was served all the while, by the honest worker, without a second attempt."""
    stage.honest.end()
    assert stage.honest.faults == []
    assert stage.honest.streams > 0
    eventually(lambda: at_rest(stage.watcher), "nothing is left")
    assert [row["name"] for row in stage.watcher.workers()] == ["worker-1"]
    assert stage.counters("cut_off", "workers_suspended") == [0, 0]
