"""Target: BrokerCore among hostile clients and workers. An honest client and worker run along, and notice nothing.

What is checked after each step:

- `core.validate()`; no exception; whatever the broker says to anybody can be decoded again;
- CHUNKS of a worker go only to a client whose request that worker holds at this moment, as a model on the side counts
  it, and answers only to clients that have said the id which they name;
- the honest client's tokens come whole and in order, its session and the honest worker's never end.

In the end the hostile ones are gone, and with them all that the broker kept for them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from tokenmq.broker.core import BrokerCore
from tokenmq.broker.dispatch import POLICIES
from tokenmq.broker.events import (
    BadClient,
    BadWorker,
    ClientGone,
    FromClient,
    FromWorker,
    StrayChunks,
    ToClient,
    ToWorker,
    WorkerGone,
)
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.codec import CHUNKS_PREFIX, HEADER_BYTES, decode, encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.identity import Identity, Role
from tokenmq.protocol.limits import MAX_BODY_BYTES
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunk,
    Chunks,
    Command,
    Credit,
    Disconnect,
    Envelope,
    Error,
    Finish,
    FinishReason,
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

from .forge import Forger, Known
from .target import Broken
from .weight import weight

_MODEL, _WORKER = "honest-model", "honest-worker"
_TOKENS = 8
#: What a session's side may say; all else ends the session, and most stories are to go on for a while.
_FROM_CLIENTS = (*[Command.REQUEST] * 8, Command.CREDIT, Command.CREDIT, Command.CANCEL, Command.QUERY)
_FROM_WORKERS = (
    *[Command.CHUNKS] * 4, Command.READY, Command.FINISH, Command.ERROR, Command.PARKED, Command.STARTED,
    Command.REPLY,
)  # fmt: skip
_OF_HELD = (Command.FINISH, Command.FINISH, Command.ERROR, Command.PARKED, Command.STARTED)
_ANY = tuple(Command)
#: What workers serve, and what clients ask for.
_SERVED, _ASKED = ("m", "n"), ("m", "m", "m", "n", _MODEL)
#: Containers that may be left behind: entries of timers that are found later, smoothed figures, a few names.
_LEFT_BEHIND = 400
#: Containers that hang on a broker while the hostile ones are there; a story has some hundred messages.
_MOST_WEIGHT = 60_000


class Honest:
    """One honest connection; it counts as its heartbeats must tell.

    Attributes:
        session: it has one.
    """

    def __init__(self, story: Story, peer: bytes, identity: Identity | None) -> None:
        self.story, self.peer, self.identity = story, peer, identity
        self.said = self.got = 0
        self.session = False
        self._beat_at = 0.0

    def say(self, message: Message) -> None:
        self.said += 1
        self.story.spoken.append((self, encode(message)))

    def beat(self) -> None:
        if self.session and self.story.now >= self._beat_at:
            self._beat_at = self.story.now + 0.5
            self.say(Heartbeat(self.said, self.load()))

    def load(self) -> Load | None:
        return None

    def took(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.story.must(message.sent == self.got, f"a heartbeat counts {message.sent}, {self.got} came")
        self.got += 1
        self.story.must(not isinstance(message, Disconnect), f"an honest peer was sent away: {message}")


class HonestClient(Honest):
    """It reads one stream after the other.

    Attributes:
        finished: how many streams came whole.
        id: of the stream at hand; b"" for none.
        wants: it begins another stream when one has ended.
    """

    def __init__(self, story: Story, peer: bytes, identity: Identity | None) -> None:
        super().__init__(story, peer, identity)
        self.finished = 0
        self.id = b""
        self.wants = True
        self._attempt = 0
        self._tokens: list[int] = []

    def go(self) -> None:
        """Begin a stream, where none is open."""
        if self.session and self.wants and not self.id:
            self.id = self.story.random.randbytes(16)
            self._attempt, self._tokens = 1, []
            self._submit()

    def again(self) -> None:
        """Submit once more what was refused for a while."""
        if self.id and not self._attempt_open:
            self._attempt += 1
            self._submit()

    def _submit(self) -> None:
        self._attempt_open = True
        self.story.known.learn(self.story.known.ids, self.id)
        envelope = Envelope(_MODEL, self._attempt, 64, prior_tokens=len(self._tokens))
        self.say(Request(self.id, envelope, b"payload"))

    def took(self, message: Message) -> None:
        super().took(message)
        must = self.story.must
        if isinstance(message, Welcome):
            self.session = True
        elif isinstance(message, Chunks):
            for chunk in message.chunks:
                must(chunk.request_id == self.id and chunk.attempt == self._attempt, "a chunk of another's stream")
                must(chunk.offset == len(self._tokens), "a token that is missing or came twice")
                self._tokens.extend(chunk.token_ids)
        elif isinstance(message, Finish):
            must(message.id == self.id, "the end of another's stream")
            must(self._tokens == tokens_of(self.id), f"the stream ended with {self._tokens}")
            must(message.worker == _WORKER, f"{message.worker} has ended it")
            self.finished += 1
            self.id = b""
        elif isinstance(message, Error):
            must(message.id == self.id, "the failure of another's stream")
            self._attempt_open = False
            if message.code == "bad_request":
                # Who knows the id of another's request can use it first; ids are drawn from 2^128 for that.
                must("in use" in message.message, f"an honest request was refused: {message}")
                self.id = b""
            else:
                must(message.retryable, f"an honest request failed: {message}")


def tokens_of(id: bytes) -> list[int]:
    """Return what an honest worker makes of a request."""
    return list(id[:_TOKENS])


class HonestWorker(Honest):
    """It brings two tokens of each request at a time."""

    def __init__(self, story: Story, peer: bytes, identity: Identity | None) -> None:
        super().__init__(story, peer, identity)
        self._held: dict[tuple[bytes, int], tuple[bytes, int]] = {}

    def load(self) -> Load:
        return Load(running=len(self._held), held=len(self._held))

    def took(self, message: Message) -> None:
        super().took(message)
        if isinstance(message, Accepted):
            self.session = True
        elif isinstance(message, Request):
            route = message.envelope.route
            self.story.must(route is not None, "a request without a route")
            assert route is not None
            self._held[message.id, message.envelope.attempt] = route, message.envelope.prior_tokens
        elif isinstance(message, Cancel) and (message.id, message.attempt) in self._held:
            self._end(message.id, message.attempt, FinishReason.CANCELLED)
        else:
            self.story.must(not isinstance(message, (Finish, Reply)), "what is no worker's business")

    def work(self) -> None:
        for (id, attempt), (route, done) in list(self._held.items()):
            if (id, attempt) not in self._held:
                continue  # cancelled meanwhile
            whole = tokens_of(id)
            tokens = tuple(whole[done : done + 2])
            if tokens:
                self._held[id, attempt] = route, done + 2
                self.say(Chunks(route, (Chunk(id, attempt, 0, done, tokens, "xy"),)))
            else:
                self._end(id, attempt, FinishReason.LENGTH)

    def _end(self, id: bytes, attempt: int, reason: FinishReason) -> None:
        del self._held[id, attempt]
        self.say(Finish(id, attempt, reason, Usage(3, _TOKENS), Timings(), _WORKER))


@dataclass(eq=False)
class Hostile:
    """One hostile connection.

    Attributes:
        said: ids that it has named, by which it may be answered.
        sent: messages that it has sent.
        ready: its first READY.
        given: of a worker: what it was given and has not ended, by id and attempt: the route.
    """

    peer: bytes
    client: bool
    identity: Identity | None
    said: set[bytes] = field(default_factory=set)
    sent: int = 0
    ready: Ready | None = None
    given: dict[tuple[bytes, int], bytes] = field(default_factory=dict)


class Story:
    """One broker, and all that happens to it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 1000.0
        self.inputs: deque[Sequence[bytes]] = deque(maxlen=400)
        self.messages = 0
        keys = random.random() < 0.5
        outside = ("tcp://0.0.0.0:5555",)
        settings = BrokerSettings(
            frontend=outside, policy=random.choice(sorted(POLICIES)), max_waiting=random.choice((1, 5, 100)),
            curve="keys" if keys else "", insecure=not keys, notice_s=random.choice((0.0, 0.02)),
        )  # fmt: skip
        self.core = BrokerCore(settings, software="fuzz", now=self.now, random=Random(random.getrandbits(30)))
        self.known = Known(
            names=("w1", "w2", _WORKER) if keys else ("w1", "w2"),
            endpoints=("tcp://10.0.0.1:1", "tcp://127.0.0.1:22", "ipc:///etc/passwd", "nonsense", "x" * 256),
        )
        self.forger = Forger(random, self.known)
        self._offered = {""}
        #: What honest peers have said, and nobody has heard: it is heard when what was being done is done.
        self.spoken: deque[tuple[Honest, list[bytes]]] = deque()
        self._keys = keys
        self._peers: dict[bytes, Honest | Hostile] = {}
        self._made = 0
        self.client = HonestClient(self, b"\0hcli", self._identity(Role.CLIENT, "honest"))
        self.worker = HonestWorker(self, b"\0hwrk", self._identity(Role.WORKER, _WORKER))
        self._peers[self.client.peer] = self.client
        self._peers[self.worker.peer] = self.worker
        self.worker.say(
            Ready(_WORKER, 5, "fuzz", (ModelInfo(_MODEL, resumes=True),), 4, "fuzz", Load())
        )  # fmt: skip
        self.client.say(Hello("honest", "fuzz"))

    # What hostile peers do.

    def tell(self, steps: int) -> None:
        """Let so many things happen, then calm."""
        self._finish_one()
        before = weight(self.core)
        for client in (False, False, True):
            self._come(client)
        for _ in range(steps):
            self._step()
            self._hear()
        self.must(weight(self.core) < _MOST_WEIGHT, "what the broker keeps grows without bound")
        for peer in [each for each in self._peers.values() if isinstance(each, Hostile)]:
            self._leave(peer)
        self._finish_one()
        for _ in range(40):
            self._pass(0.25)
        self.client.wants = False
        self._finish_one()
        self.must(not self.core.exchange.records, "requests are left of clients that are gone")
        self.must(len(self.core.registry) == 1 and len(self.core.clients) == 1, "sessions are left")
        after = weight(self.core)
        self.must(after <= before + _LEFT_BEHIND, f"the broker keeps {after} containers, {before} before")

    def _finish_one(self) -> None:
        before = self.client.finished
        for _ in range(400):
            self._pass(0.25)
            if self.client.finished > before or not (self.client.id or self.client.wants):
                return
        raise Broken("the honest client waits for ever", list(self.inputs))

    def _step(self) -> None:
        random = self.random
        kind = random.random()
        hostile = [each for each in self._peers.values() if isinstance(each, Hostile)]
        if kind < 0.12:
            self._pass(random.choice((0.0, 0.01, 0.1, 0.25)))
        elif kind < 0.15 and hostile:
            self._leave(random.choice(hostile))
        elif kind < 0.3 or not hostile:
            self._come(random.random() < 0.4)
        else:
            peer = random.choice(hostile)
            frames = self._frames(peer)
            for _ in range(random.choice((1,) * 30 + (40,))):
                self._say(peer, frames)

    def _come(self, client: bool) -> None:
        """A connection; most of them begin as they should."""
        random = self.random
        self._made += 1
        role = Role.CLIENT if client else Role.WORKER
        if random.random() < 0.1:
            role = random.choice((Role.CLIENT, Role.WORKER))
        peer = Hostile(b"\0" + self._made.to_bytes(4, "big"), client, self._identity(role, f"k{self._made % 3}"))
        self._peers[peer.peer] = peer
        if random.random() < 0.95:
            self.known.models = _ASKED if client else _SERVED
            self._say(peer, self.forger.frames((Command.HELLO,) if client else (Command.READY,), bent=0.1))

    def _frames(self, peer: Hostile) -> list[bytes]:
        random, known = self.random, self.known
        known.models = _ASKED if peer.client else _SERVED
        if random.random() < 0.05:
            return self.forger.frames(_ANY)
        if random.random() < 0.05:
            return encode(Heartbeat(peer.sent))
        if peer.client:
            return self.forger.frames(_FROM_CLIENTS, bent=0.1)
        if peer.given and random.random() < 0.6:
            # What it holds, and whatever it is to say of it, or not.
            (id, attempt), route = random.choice(list(peer.given.items()))
            if random.random() < 0.3:
                chunks = (Chunk(id, attempt, 0, 0, (1,), "x"),)
                return encode(Chunks(random.choice((route, *known.routes)), chunks))
            command = random.choice(_OF_HELD if peer.ready and peer.ready.brokers else _OF_HELD[:-1])
            return encode(replace(self.forger.message(command), id=id, attempt=attempt))  # type: ignore[call-arg]
        below = peer.ready is not None and peer.ready.brokers
        command = random.choice(_FROM_WORKERS if below else _FROM_WORKERS[:-2])
        if command is Command.READY and peer.ready is not None and random.random() < 0.9:
            name, incarnation = peer.ready.worker, peer.ready.incarnation
            return encode(replace(self.forger.message(command), worker=name, incarnation=incarnation))  # type: ignore[call-arg]
        return self.forger.frames((command,), bent=0.1)

    def _say(self, peer: Hostile, frames: Sequence[bytes]) -> None:
        if peer.peer not in self._peers:
            return
        if frames and len(frames[0]) >= HEADER_BYTES:
            peer.said.add(frames[0][8:HEADER_BYTES])
        peer.sent += 1
        self.known.learn(self.known.pasts, list(frames))
        self.speaks(peer, frames)

    def _leave(self, peer: Hostile) -> None:
        del self._peers[peer.peer]
        gone = ClientGone if peer.client else WorkerGone
        self._handle(gone(peer.peer, "gone", self.random.random() < 0.3))

    # What the server does.

    def speaks(self, peer: Honest | Hostile, frames: Sequence[bytes]) -> None:
        """Take a message as `broker/server.py` does."""
        client = isinstance(peer, HonestClient) or (isinstance(peer, Hostile) and peer.client)
        self.inputs.append(frames)
        self.messages += 1
        first = frames[0] if frames else b""
        chunks = first.startswith(CHUNKS_PREFIX) and HEADER_BYTES < len(first) <= HEADER_BYTES + MAX_BODY_BYTES
        if not client and len(frames) == 1 and chunks:
            found = self._guarded(lambda: self.core.route_chunks(peer.peer, first[8:HEADER_BYTES], self.now))
            if found is not None:
                self._forwarded(peer, found.peer, first)
                self._validate()
            else:
                self._handle(StrayChunks(peer.peer))
            return
        try:
            message = decode(list(frames))
        except ProtocolError as error:
            self._handle((BadClient if client else BadWorker)(peer.peer, error))
            return
        if isinstance(peer, Hostile) and isinstance(message, Ready):
            if any(info.name == _MODEL for info in message.models):
                return  # whoever serves the model may answer as it likes
            if not self._keys and message.worker == _WORKER:
                return  # without keys, names are anybody's
            peer.ready = peer.ready or message
            self._offered.add(message.direct)
        if isinstance(peer, Hostile) and isinstance(message, (Finish, Error)):
            peer.given.pop((message.id, message.attempt), None)
        self._handle((FromClient if client else FromWorker)(peer.peer, message, list(frames), peer.identity))

    def _forwarded(self, peer: Honest | Hostile, to: bytes, frame: bytes) -> None:
        """Check where CHUNKS of a worker go, and let them arrive."""
        if isinstance(peer, Hostile):
            self.must(frame[8:HEADER_BYTES] in peer.given.values(), "chunks for a client that it holds nothing of")
            self.must(to != self.client.peer, "the honest client got a hostile worker's chunks")
        if to == self.client.peer:
            self.client.took(decode([frame]))

    def _handle(self, event: Any) -> None:
        self._perform(self._guarded(lambda: self.core.handle(event, self.now)))
        self._validate()

    def _perform(self, actions: Iterable[Any]) -> None:
        left = deque(actions)
        while left:
            action = left.popleft()
            if not isinstance(action, (ToClient, ToWorker)):
                if hasattr(action, "peer") and isinstance(self._peers.get(action.peer), Honest):
                    raise Broken(f"an honest connection is to be cut: {action}", list(self.inputs))
                continue
            frames = list(action.frames or self._guarded(lambda each=action: encode(each.message)))
            try:
                message = decode(frames)
            except ProtocolError as error:
                raise Broken(f"the broker says what is no message: {error.message}", list(self.inputs)) from error
            peer = self._peers.get(action.peer)
            if peer is None:
                gone = ClientGone if isinstance(action, ToClient) else WorkerGone
                left.extend(
                    self._guarded(lambda each=action, kind=gone: self.core.handle(kind(each.peer, ""), self.now))
                )
            elif isinstance(peer, Honest):
                peer.took(message)
            else:
                self._arrived(peer, message)

    def _arrived(self, peer: Hostile, message: Message) -> None:
        known = self.known
        if isinstance(message, Disconnect) and self.random.random() < 0.8:
            self._peers.pop(peer.peer, None)  # it comes again, or it does not
        if isinstance(message, (Finish, Error, Started, Reply)):
            self.must(message.id in peer.said, f"{message.command.name} of an id that this client has never said")
        if isinstance(message, Started):
            self.must(not message.direct or message.key is not None, "an endpoint without a key")
            self.must(message.direct in self._offered, "an endpoint that no worker has offered")
        if isinstance(message, (Request, Query, Credit, Cancel)):
            known.learn(known.ids, message.id)
        if isinstance(message, Query):
            peer.said.add(message.id)
        if isinstance(message, Request):
            route = message.envelope.route
            self.must(route is not None and not peer.client, "a request in the wrong place")
            assert route is not None
            known.learn(known.routes, route)
            if message.envelope.key is not None:
                known.learn(known.keys, message.envelope.key)
            peer.given[message.id, message.envelope.attempt] = route

    def _pass(self, seconds: float) -> None:
        """Let time pass; the honest ones go on."""
        self.now += seconds
        self._perform(self._guarded(lambda: self.core.tick(self.now)))
        self._validate()
        self.client.beat()
        self.worker.beat()
        self.client.go()
        self.client.again()
        self.worker.work()
        self._hear()

    # Checks.

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except Broken:
            raise
        except BaseException as error:
            raise Broken.by(error, list(self.inputs)) from error

    def _hear(self) -> None:
        while self.spoken:
            self.speaks(*self.spoken.popleft())

    def _validate(self) -> None:
        self._guarded(self.core.validate)
        for peer in self._peers.values():
            if not isinstance(peer, Hostile) or peer.client:
                continue
            session = self.core.registry.by_peer.get(peer.peer)
            if session is None:
                peer.given.clear()
            here = Counter(peer.given.values())
            there = {} if session is None else {route: hold.count for route, hold in session.routes.items()}
            self.must(there == here, f"a worker's ways are {there}, it holds {dict(here)}")

    def must(self, holds: bool, what: str) -> None:
        if not holds:
            raise Broken(what, list(self.inputs))

    def _identity(self, role: Role, name: str) -> Identity | None:
        return Identity(role, name, f"{role.value}-{name}".ljust(40, "#")) if self._keys else None


class BrokerTarget:
    """Stories of one broker each."""

    name = "broker"

    def case(self, random: Random) -> int:
        story = Story(random)
        story.tell(random.choice((40, 120)))
        return story.messages

    def close(self) -> None:
        """Have nothing to leave."""
