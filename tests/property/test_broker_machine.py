"""BrokerCore against clients and workers that do anything, in any order; a model on the side counts what is owed.

Peers here are connections. A message that the core sends to a connection that is still open arrives; one that has
been closed makes a `gone` event, as in the server. Each peer counts what it gets, as the heartbeats must tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenmq.broker.breaker import State
from tokenmq.broker.core import BrokerCore
from tokenmq.broker.dispatch import POLICIES
from tokenmq.broker.events import (
    Action,
    BadClient,
    BadWorker,
    ClientGone,
    FromClient,
    FromWorker,
    ToClient,
    ToWorker,
    WorkerGone,
)
from tokenmq.broker.requests import key_of
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    Accepted,
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
    Load,
    Message,
    ModelInfo,
    Parked,
    Query,
    Ready,
    Request,
    Started,
    Timings,
    Usage,
    Welcome,
    WorkerState,
)

MODELS = ("a", "b", "c")
NAMES = ("w1", "w2", "w3", "w4")
#: Errors about requests that no worker had, and about those that one had.
NEVER_RAN = ("bad_request", "model_not_found", "no_worker", "busy", "queue_timeout", "cannot_resume")
RAN = ("engine_failed", "worker_lost")
#: Draws what happens once in a while: else nobody would live long enough for a story.
RARE = st.integers(0, 5).map(lambda drawn: drawn == 5)
Key = tuple[bytes, int]


@dataclass(eq=False)
class Peer:
    """One connection.

    Attributes:
        said: messages sent in the session that the peer believes to have.
        got: messages received in it.
        open: the connection is there.
        session: both sides are in a session, as far as the peer knows.
    """

    id: bytes
    said: int = 0
    got: int = 0
    open: bool = True
    session: bool = False


@dataclass(eq=False)
class ClientPeer(Peer):
    #: Submissions without an answer; of each id only the latest.
    owed: set[Key] = field(default_factory=set)
    #: Those of them that a worker has been given.
    started: set[Key] = field(default_factory=set)
    #: It knows that the broker leaves.
    told: bool = False

    def live(self, id: bytes) -> int:
        """Return the attempt of the request that an answer is owed for, 0 for none."""
        return max((attempt for known, attempt in self.owed if known == id), default=0)


@dataclass(eq=False)
class WorkerPeer(Peer):
    name: str = ""
    incarnation: int = 1
    models: tuple[str, ...] = ("a",)
    resumes: bool = False
    slots: int = 1
    state: WorkerState = WorkerState.READY
    others: int = 0
    draining: bool = False
    held: dict[Key, Request] = field(default_factory=dict)
    #: What of it takes no slot any more.
    parked: set[Key] = field(default_factory=set)

    @property
    def running(self) -> int:
        return len(self.held) - len(self.parked)


class BrokerMachine(RuleBasedStateMachine):
    """Peers come, speak, break and leave; after each step everything must add up."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)), max_waiting=st.sampled_from([0, 1, 5, 100, 100]),
        seed=st.integers(0, 1000),
    )  # fmt: skip
    def begin(self, policy: str, max_waiting: int, seed: int) -> None:
        self.settings = BrokerSettings(heartbeat_s=1.0, expiry_s=5.0, policy=policy, max_waiting=max_waiting)
        self.random = Random(seed)
        self.now = 1000.0
        self.start()
        self.clients: list[ClientPeer] = []
        self.workers: list[WorkerPeer] = []
        self.peers: dict[bytes, Peer] = {}
        self.numbers = 0
        #: Workers that a submission is to be kept from.
        self.avoid: dict[Key, tuple[str, ...]] = {}
        for name in ("w1", "w2"):
            self.client_comes()
            self.worker_comes(name, 1, ("a", "b"), 2, WorkerState.READY, resumes=name == "w1")

    def start(self) -> None:
        self.core = BrokerCore(self.settings, software="test", now=self.now, random=self.random)
        self.drained = False

    # What the server does.

    def perform(self, actions: Iterable[Action]) -> None:
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Log):
                continue
            peer = self.peers[action.peer]
            assert isinstance(peer, ClientPeer) == isinstance(action, ToClient), "a message on the wrong side"
            # Whatever the core says can be said.
            assert decode(encode(action.message)) == action.message
            if peer.open:
                self.arrive(peer, action.message)
            else:
                gone = ClientGone if isinstance(action, ToClient) else WorkerGone
                queue.extend(self.core.handle(gone(action.peer, "gone"), self.now))

    def arrive(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Disconnect):
            self.session_over(peer)
            return
        if isinstance(message, (Welcome, Accepted)):
            peer.session, peer.got = True, 0
        assert peer.session, f"{message.command.name} to a peer without a session"
        if isinstance(message, Heartbeat):
            assert message.sent == peer.got, "a heartbeat does not tell what was sent"
        peer.got += 1
        if isinstance(message, Goodbye):
            assert not isinstance(peer, ClientPeer) or not peer.owed, "the broker leaves without an answer"
            self.session_over(peer)
        elif isinstance(peer, ClientPeer):
            self.arrive_at_client(peer, message)
        elif isinstance(peer, WorkerPeer):
            self.arrive_at_worker(peer, message)

    def arrive_at_client(self, client: ClientPeer, message: Message) -> None:
        if isinstance(message, (Finish, Error)) and message.attempt:
            key = (message.id, message.attempt)
            assert key in client.owed, "an answer that nobody is owed"
            if isinstance(message, Error):
                assert message.code not in (RAN if not message.worker else NEVER_RAN), "the wrong worker is blamed"
            assert bool(message.worker) == (key in client.started), "who was told to have started is not who ended it"
            client.owed.discard(key)
            client.started.discard(key)
        elif isinstance(message, Started):
            key = (message.id, message.attempt)
            assert key in client.owed, "the start of a submission that nobody waits for"
            assert key not in client.started, "a submission starts twice"
            client.started.add(key)
        elif isinstance(message, Draining):
            assert self.drained
            client.told = True
        else:
            assert message.command in (
                Command.WELCOME, Command.HEARTBEAT, Command.REPLY, Command.ERROR, Command.CHUNKS,
            )  # fmt: skip

    def arrive_at_worker(self, worker: WorkerPeer, message: Message) -> None:
        if isinstance(message, Request):
            self.arrive_request(worker, message)
        elif isinstance(message, (Cancel, Credit)):
            key = (message.id, message.attempt)
            assert key in worker.held, f"{message.command.name} for a request that the worker does not hold"
        else:
            assert isinstance(message, (Accepted, Heartbeat, Drain))

    def arrive_request(self, worker: WorkerPeer, request: Request) -> None:
        envelope, key = request.envelope, (request.id, request.envelope.attempt)
        assert worker.state is WorkerState.READY, "a request for a worker that is not ready"
        assert not worker.draining, "a request for a worker that drains"
        assert key not in worker.held, "a request twice"
        assert envelope.model in worker.models
        assert envelope.route is not None
        assert (envelope.avoid, envelope.queue_s) == ((), None)
        assert worker.resumes or not envelope.prior_tokens, "a worker that cannot resume"
        if worker.name in self.avoid[key]:
            others = [
                other.name
                for other in self.core.registry.serving(envelope.model)
                if other.name not in self.avoid[key]
                and other.state is WorkerState.READY
                and other.breaker.state is not State.OPEN
                and (not envelope.prior_tokens or other.resumes(envelope.model))
            ]
            assert not others, "a worker that is to be avoided, though there are others"
        worker.held[key] = request
        assert worker.running + worker.others <= worker.slots, "more requests than slots"

    def session_over(self, peer: Peer) -> None:
        peer.session = False
        if isinstance(peer, ClientPeer):
            peer.owed.clear()
            peer.started.clear()
            peer.told = False
        elif isinstance(peer, WorkerPeer):
            peer.held.clear()
            peer.parked.clear()

    def from_client(self, client: ClientPeer, message: Message) -> None:
        client.said += 1
        self.perform(self.core.handle(FromClient(client.id, message), self.now))

    def from_worker(self, worker: WorkerPeer, message: Message) -> None:
        worker.said += 1
        self.perform(self.core.handle(FromWorker(worker.id, message), self.now))

    def some_client(self, index: int) -> ClientPeer:
        here = [client for client in self.clients if client.open and client.session]
        return here[index % len(here)]

    def some_worker(self, index: int) -> WorkerPeer:
        here = [worker for worker in self.workers if worker.open and worker.session]
        return here[index % len(here)]

    def has_client(self) -> bool:
        return any(client.open and client.session for client in self.clients)

    def has_worker(self) -> bool:
        return any(worker.open and worker.session for worker in self.workers)

    # Clients.

    @rule()
    @precondition(lambda self: sum(client.open for client in self.clients) < 4)
    def client_comes(self) -> None:
        client = ClientPeer(b"c" + len(self.peers).to_bytes(4, "big"))
        self.peers[client.id] = client
        self.clients.append(client)
        self.from_client(client, Hello("client", "test"))
        assert client.session

    @rule(
        index=st.integers(0, 9), model=st.sampled_from([*MODELS, "a", "a", "a", "a", "b", "b", "b", "unknown"]),
        deadline_s=st.sampled_from([None, None, None, 0.0, 0.3, 2.0, 3600.0]),
        queue_s=st.sampled_from([None, None, None, 0.0, 0.2, 1.0]), number=st.integers(1, 4),
        prior_tokens=st.sampled_from([0, 0, 3]), avoid=st.lists(st.sampled_from(NAMES), max_size=3).map(tuple),
    )  # fmt: skip
    @precondition(has_client)
    def submit(
        self, index: int, model: str, deadline_s: float | None, queue_s: float | None, number: int, prior_tokens: int,
        avoid: tuple[str, ...],
    ) -> None:  # fmt: skip
        for _ in range(number):
            if self.has_client():
                self.numbers += 1
                envelope = Envelope(model, 1, 8, deadline_s, None, prior_tokens, avoid, queue_s)
                self.submit_one(self.some_client(index), self.recent(0), envelope)

    @rule(
        index=st.integers(0, 9), back=st.integers(0, 8), attempt=st.integers(1, 4),
        prior_tokens=st.sampled_from([0, 3]), avoid=st.sampled_from([(), ("w1",)]),
    )  # fmt: skip
    @precondition(has_client)
    def submit_again(self, index: int, back: int, attempt: int, prior_tokens: int, avoid: tuple[str, ...]) -> None:
        """Any attempt of a request that may be waiting, running or ended, here or with another client."""
        envelope = Envelope("a", attempt, 8, prior_tokens=prior_tokens, avoid=avoid)
        self.submit_one(self.some_client(index), self.recent(back), envelope)

    def submit_one(self, client: ClientPeer, id: bytes, envelope: Envelope) -> None:
        key, live = (id, envelope.attempt), client.live(id)
        if envelope.attempt > live:  # else a repeat, or late
            client.owed.discard((id, live))
            client.started.discard((id, live))
            client.owed.add(key)
            if key_of(*key) not in self.core.exchange.records:
                former = self.core.exchange.records.get(key_of(id, live))
                failed = (former.worker.name,) if former is not None and former.worker is not None else ()
                self.avoid[key] = (*envelope.avoid, *failed)
        self.from_client(client, Request(id, envelope, b"payload"))

    @rule(index=st.integers(0, 9), back=st.integers(0, 8), attempt=st.sampled_from([1, 1, 2, 3]))
    @precondition(has_client)
    def cancel(self, index: int, back: int, attempt: int) -> None:
        self.from_client(self.some_client(index), Cancel(self.recent(back), attempt))

    @rule(
        index=st.integers(0, 9), back=st.integers(0, 8), attempt=st.sampled_from([1, 1, 2, 3]),
        limit=st.integers(0, 500),
    )  # fmt: skip
    @precondition(has_client)
    def grant(self, index: int, back: int, attempt: int, limit: int) -> None:
        self.from_client(self.some_client(index), Credit(self.recent(back), attempt, limit))

    def recent(self, back: int) -> bytes:
        return max(0, self.numbers - back).to_bytes(16, "big")

    @rule(index=st.integers(0, 9), method=st.sampled_from(["models", "workers", "status", "nonsense"]))
    @precondition(has_client)
    def query(self, index: int, method: str) -> None:
        client = self.some_client(index)
        before = client.got
        self.from_client(client, Query(b"q" * 16, method))
        assert client.got == before + 1

    @rule(index=st.integers(0, 9), name=st.sampled_from(NAMES))
    @precondition(has_client)
    def ask_to_drain(self, index: int, name: str) -> None:
        client = self.some_client(index)
        before = client.got
        self.from_client(client, Query(b"q" * 16, "drain", {"worker": name}))
        assert not client.session or client.got > before

    @rule(index=st.integers(0, 9), lost=RARE)
    @precondition(has_client)
    def client_beats(self, index: int, lost: bool) -> None:
        client = self.some_client(index)
        self.from_client(client, Heartbeat(client.said + lost))
        assert client.session == (not lost)

    @rule(index=st.integers(0, 9), named=RARE.map(lambda rare: not rare))
    @precondition(has_client)
    def client_garbles(self, index: int, named: bool) -> None:
        client = self.some_client(index)
        client.said += 1
        error = ProtocolError("garbled", subject=b"x" * 16 if named else None)
        self.perform(self.core.handle(BadClient(client.id, error), self.now))
        assert client.session == named

    @rule(index=st.integers(0, 9), how=st.sampled_from(["goodbye", "closed", "gone"]), really=RARE)
    @precondition(has_client)
    def client_leaves(self, index: int, how: str, really: bool) -> None:
        if not really:
            return
        client = self.some_client(index)
        self.session_over(client)
        if how == "goodbye":
            self.from_client(client, Goodbye())
            assert client.id not in self.core.clients
        client.open = False
        if how == "gone":
            self.perform(self.core.probe_clients(self.now))

    @rule(index=st.integers(0, 9), really=RARE)
    @precondition(has_client)
    def client_stops_reading(self, index: int, really: bool) -> None:
        if really:
            client = self.some_client(index)
            self.perform(self.core.handle(ClientGone(client.id, "it does not read", stalled=True), self.now))
            assert not client.session

    @rule(index=st.integers(0, 9), really=RARE)
    @precondition(has_worker)
    def worker_stops_reading(self, index: int, really: bool) -> None:
        if really:
            worker = self.some_worker(index)
            self.perform(self.core.handle(WorkerGone(worker.id, "it does not read", stalled=True), self.now))
            assert not worker.session

    # Workers.

    @rule(
        name=st.sampled_from(NAMES), incarnation=st.integers(1, 3),
        models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3).map(tuple), slots=st.integers(1, 3),
        state=st.sampled_from([WorkerState.READY, WorkerState.READY, WorkerState.LOADING]), resumes=st.booleans(),
    )  # fmt: skip
    @precondition(lambda self: sum(worker.open for worker in self.workers) < 6)
    def worker_comes(
        self, name: str, incarnation: int, models: tuple[str, ...], slots: int, state: WorkerState, resumes: bool
    ) -> None:
        known = self.core.registry.by_name.get(name)
        newest = known.incarnation if known else 0
        worker = WorkerPeer(
            b"w" + len(self.peers).to_bytes(4, "big"), name=name, incarnation=incarnation, models=models, slots=slots,
            state=state, resumes=resumes,
        )  # fmt: skip
        self.peers[worker.id] = worker
        self.workers.append(worker)
        if known is not None and incarnation >= newest:
            old = self.peers[known.peer]
            if incarnation == newest:
                self.session_over(old)  # the same process, which has given its old connection up
                old.open = False
        if incarnation >= newest:
            self.begins_anew(worker)
        self.from_worker(worker, self.ready(worker))
        assert worker.session == (incarnation >= newest)

    def begins_anew(self, worker: WorkerPeer) -> None:
        """Who waits for one of its models need not avoid it any more."""
        for key, avoided in self.avoid.items():
            record = self.core.exchange.records.get(key_of(*key))
            if record is not None and record.worker is None and record.model in worker.models:
                self.avoid[key] = tuple(name for name in avoided if name != worker.name)

    def ready(self, worker: WorkerPeer) -> Ready:
        models = tuple(ModelInfo(name, resumes=worker.resumes) for name in worker.models)
        return Ready(
            worker.name, worker.incarnation, "test", models, worker.slots, "test", self.load(worker), 1.5
        )  # fmt: skip

    def load(self, worker: WorkerPeer) -> Load:
        return Load(worker.state, running=worker.running, waiting=worker.others, held=worker.running)

    @rule(
        index=st.integers(0, 9), lost=RARE, others=st.integers(0, 2),
        state=st.sampled_from([WorkerState.READY, WorkerState.READY, *WorkerState]), load=st.booleans(),
    )  # fmt: skip
    @precondition(has_worker)
    def worker_beats(self, index: int, lost: bool, others: int, state: WorkerState, load: bool) -> None:
        worker = self.some_worker(index)
        if load and not lost:
            worker.state, worker.others = state, others
        self.from_worker(worker, Heartbeat(worker.said - lost, self.load(worker) if load else None))
        assert worker.session == (not lost)

    @rule(
        index=st.integers(0, 9), models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3).map(tuple),
        slots=st.integers(1, 3), resumes=st.booleans(),
    )  # fmt: skip
    @precondition(has_worker)
    def worker_changes(self, index: int, models: tuple[str, ...], slots: int, resumes: bool) -> None:
        worker = self.some_worker(index)
        worker.models, worker.slots, worker.resumes = models, slots, resumes
        worker.draining = False  # who says READY stays
        self.from_worker(worker, self.ready(worker))
        assert worker.session

    @rule(index=st.integers(0, 9), which=st.integers(0, 9), well=st.booleans(), number=st.integers(1, 6))
    @precondition(lambda self: any(worker.open and worker.held for worker in self.workers))
    def worker_answers(self, index: int, which: int, well: bool, number: int) -> None:
        for _ in range(number):
            busy = [worker for worker in self.workers if worker.open and worker.held]
            if busy:
                worker = busy[index % len(busy)]
                self.answer(worker, list(worker.held)[which % len(worker.held)], well)

    def answer(self, worker: WorkerPeer, key: Key, well: bool) -> None:
        id, attempt = key
        del worker.held[key]
        worker.parked.discard(key)
        if well:
            self.from_worker(worker, Finish(id, attempt, FinishReason.STOP, Usage(1, 1), Timings(), ""))
        else:
            self.from_worker(worker, Error(id, attempt, "engine_failed", "it broke"))

    @rule(index=st.integers(0, 9), which=st.integers(0, 9))
    @precondition(lambda self: any(worker.open and worker.held for worker in self.workers))
    def worker_parks(self, index: int, which: int) -> None:
        busy = [worker for worker in self.workers if worker.open and worker.held]
        worker = busy[index % len(busy)]
        key = list(worker.held)[which % len(worker.held)]
        worker.parked.add(key)
        self.from_worker(worker, Parked(*key))

    @rule(index=st.integers(0, 9), which=st.integers(0, 20), attempt=st.integers(1, 3))
    @precondition(has_worker)
    def worker_answers_what_it_does_not_hold(self, index: int, which: int, attempt: int) -> None:
        worker = self.some_worker(index)
        id = which.to_bytes(16, "big")
        if (id, attempt) not in worker.held:
            late = self.core.counters.late_answers
            self.from_worker(worker, Finish(id, attempt, FinishReason.STOP, Usage(), Timings(), ""))
            assert self.core.counters.late_answers == late + 1

    @rule(index=st.integers(0, 9), foreign=st.booleans(), which=st.integers(0, 9))
    @precondition(has_worker)
    def worker_streams(self, index: int, foreign: bool, which: int) -> None:
        worker = self.some_worker(index)
        others = [request for other in self.workers for request in other.held.values()]
        requests = others if foreign else list(worker.held.values())
        route = requests[which % len(requests)].envelope.route if requests else b"?" * 16
        assert route is not None
        own = {request.envelope.route for request in worker.held.values()}
        message = Chunks(route, (Chunk(b"i" * 16, 1, 0, 0, (1,), "x"),))
        header = encode(message)[0]
        target = self.core.route_chunks(worker.id, header, self.now)
        if target is None:
            self.from_worker(worker, message)
            return
        worker.said += 1
        assert route in own, "chunks for a client that the worker works nothing for"
        client = self.peers[target.peer]
        if client.open:
            self.arrive(client, message)
        else:
            self.perform(self.core.handle(ClientGone(target.peer, "gone"), self.now))

    @rule(index=st.integers(0, 9), really=RARE)
    @precondition(has_worker)
    def worker_drains(self, index: int, really: bool) -> None:
        if not really:
            return
        worker = self.some_worker(index)
        worker.draining = True
        self.from_worker(worker, Draining())

    @rule(index=st.integers(0, 9), how=st.sampled_from(["goodbye", "closed", "gone", "garbled"]), really=RARE)
    @precondition(has_worker)
    def worker_leaves(self, index: int, how: str, really: bool) -> None:
        if not really:
            return
        worker = self.some_worker(index)
        if how == "garbled":
            self.perform(self.core.handle(BadWorker(worker.id, ProtocolError("garbled")), self.now))
            assert not worker.session
            return
        self.session_over(worker)
        if how == "goodbye":
            self.from_worker(worker, Goodbye())
        worker.open = False
        if how == "gone":
            self.perform(self.core.probe_workers(self.now))

    # Strangers: peers whose session is over and that have not noticed.

    @rule(index=st.integers(0, 9), client=st.booleans())
    def a_stranger_speaks(self, index: int, client: bool) -> None:
        lost: list[Peer] = [peer for peer in self.peers.values() if peer.open and not peer.session]
        lost = [peer for peer in lost if isinstance(peer, ClientPeer) == client]
        if not lost:
            return
        peer = lost[index % len(lost)]
        event = (FromClient if client else FromWorker)(peer.id, Heartbeat(3))
        [action] = [found for found in self.core.handle(event, self.now) if not isinstance(found, Log)]
        assert isinstance(action, (ToClient, ToWorker))
        assert action.peer == peer.id
        assert isinstance(action.message, Disconnect)
        assert action.message.code is DisconnectCode.UNKNOWN_PEER

    # Time.

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.3, 1.0]), silent=RARE)
    def time_passes(self, seconds: float, silent: bool) -> None:
        if not silent:
            self.all_beat()
        until = self.now + seconds
        while (deadline := self.core.next_deadline()) <= until:
            self.now = max(self.now, deadline)
            self.tick()
        self.now = until
        self.tick()

    def tick(self) -> None:
        self.perform(self.core.tick(self.now))
        self.restart_if_stopped()

    def all_beat(self) -> None:
        for peer in list(self.peers.values()):
            if peer.open and peer.session:
                speak = self.from_client if isinstance(peer, ClientPeer) else self.from_worker
                speak(peer, Heartbeat(peer.said))  # type: ignore[arg-type]

    @rule(seconds=st.sampled_from([0.4, 3.0, 3600.0]))
    def time_leaps(self, seconds: float) -> None:
        """The broker's own loop stands still: nobody is given up for that."""
        here = set(self.core.clients) | set(self.core.registry.by_peer)
        silent = {session.peer for session in self.core._sessions() if session.liveness.heard_at < self.now - 2.0}
        self.now += seconds
        self.perform(self.core.tick(self.now))
        left = here - set(self.core.clients) - set(self.core.registry.by_peer)
        assert all(not self.peers[peer].open or peer in silent for peer in left)
        self.restart_if_stopped()

    @rule(grace_s=st.sampled_from([0.0, 0.5, 100.0]))
    @precondition(lambda self: not self.drained and self.numbers > 10)
    def drain(self, grace_s: float) -> None:
        self.drained = True
        self.perform(self.core.drain(self.now, grace_s))
        self.restart_if_stopped()

    def restart_if_stopped(self) -> None:
        """A broker that has stopped is followed by a new one, which knows nobody."""
        if self.core.stopped:
            assert self.core.exchange.tally()["waiting"] == self.core.exchange.tally()["running"] == 0
            for peer in self.peers.values():
                assert not peer.session or not peer.open, "a peer was told nothing"
                self.session_over(peer)
                peer.open = False
            self.start()

    # What must hold.

    @invariant()
    def all_adds_up(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.validate()
        for client in self.clients:
            session = self.core.clients.get(client.id)
            if client.open and client.session:
                assert session is not None, "a session that only the client has"
                assert session.sent == client.got
                assert session.received == client.said
                open_here = {(record.id, record.attempt) for record in session.requests.values()}
                assert open_here == client.owed, "the broker owes other answers than it knows of"
                assert client.told == self.drained, "who must know does not know that the broker leaves"
        for worker in self.workers:
            found = self.core.registry.by_peer.get(worker.id)
            if worker.open and worker.session:
                assert found is not None, "a session that only the worker has"
                assert found.sent == worker.got
                assert found.received == worker.said
                held = {key_of(*key) for key in worker.held}
                assert found.in_flight.keys() == held, "a slot is charged too long or freed too early"

    def teardown(self) -> None:
        """Workers finish or die, and nothing is left."""
        if not hasattr(self, "core"):
            return
        for _ in range(1000):
            busy = [worker for worker in self.workers if worker.open and worker.held]
            if not busy:
                break
            self.answer(busy[0], next(iter(busy[0].held)), well=True)
        for worker in self.workers:
            if worker.open:
                self.session_over(worker)
                worker.open = False
        self.perform(self.core.probe_workers(self.now))
        self.now += 0.1  # a probe may have been made just before
        self.perform(self.core.tick(self.now))
        self.all_adds_up()
        assert self.core.exchange.tally() == {"waiting": 0, "running": 0, "orphaned": 0}
        assert self.core.exchange.records == {}
        assert len(self.core.registry) == 0
        assert not any(client.owed for client in self.clients)


TestBrokerMachine = BrokerMachine.TestCase
TestBrokerMachine.settings = settings(
    max_examples=200, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)
