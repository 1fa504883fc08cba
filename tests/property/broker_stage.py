"""What is around a BrokerCore in test_broker_machine.py: its peers, and what must hold when something arrives there.

Peers here are connections. A message that the core sends to a connection that is still open arrives; one that has
been closed makes a `gone` event, as in the server. Each peer counts what it gets, as the heartbeats must tell.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from hypothesis import strategies as st

from tokenmq.broker.breaker import FAILURES, MAX_PAUSE_S, PAUSE_S, State
from tokenmq.broker.core import BrokerCore
from tokenmq.broker.events import (
    Action,
    ClientGone,
    FromClient,
    FromWorker,
    ToClient,
    WorkerGone,
)
from tokenmq.broker.requests import key_of
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunks,
    Credit,
    Disconnect,
    Drain,
    Draining,
    Envelope,
    Error,
    Finish,
    Goodbye,
    Heartbeat,
    Message,
    Query,
    Reply,
    Request,
    Started,
    Welcome,
    WorkerState,
)

MODELS = ("a", "b", "c")
NAMES = ("w1", "w2", "w3", "w4")
#: Errors about requests that no worker had, and about those that one had.
NEVER_RAN = ("bad_request", "model_not_found", "no_worker", "busy", "queue_timeout", "cannot_resume", "routing_loop")
RAN = ("engine_failed", "worker_lost")
#: Draws what happens once in a while: else nobody would live long enough for a story.
RARE = st.integers(0, 5).map(lambda drawn: drawn == 5)
#: What workers behind w2 are called, where it is a broker.
BEHIND = ("w2/w1", "w2/w2")
#: The id of a query that the broker could not read.
UNREAD = b"x" * 16
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
    #: Those of them that a worker has been given, and who that is, as the client was told last.
    started: dict[Key, str] = field(default_factory=dict)
    #: Queries without an answer.
    asked: set[bytes] = field(default_factory=set)
    #: It knows that the broker leaves.
    told: bool = False

    def live(self, id: bytes) -> int:
        """Return the attempt of the request that an answer is owed for, 0 for none."""
        return max((attempt for _, attempt in self.alive(id)), default=0)

    def alive(self, id: bytes) -> list[Key]:
        """Return the attempts of a request that an answer is owed for: more than one where the client hedges."""
        return [key for key in self.owed if key[0] == id]

    def withdraw(self, key: Key) -> None:
        """Wait for this answer no longer."""
        self.owed.discard(key)
        self.started.pop(key, None)


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
    speed: float | None = None
    #: Of a broker: the ids in its READY, what it was asked, and to whom it says that it gave a request.
    brokers: tuple[str, ...] = ()
    queries: list[bytes] = field(default_factory=list)
    given: dict[Key, str] = field(default_factory=dict)
    #: Requests that its engine has failed since it last finished one; from the third on it is suspended and tried in
    #: turn.
    failures: int = 0
    blamed: set[bytes] = field(default_factory=set)
    suspended_until: float = -math.inf
    pause_s: float = PAUSE_S

    @property
    def running(self) -> int:
        return len(self.held) - len(self.parked)

    def fails(self, id: bytes, now: float) -> None:
        """Note that its engine has failed a request; a broker's workers are that broker's business."""
        if self.brokers or (self.failures < FAILURES and id in self.blamed):
            return  # what fails everywhere says nothing of anybody
        self.blamed.add(id)
        self.failures += 1
        if self.failures >= FAILURES and self.suspended_until <= now:
            self.suspended_until = now + self.pause_s
            self.pause_s = min(2 * self.pause_s, MAX_PAUSE_S)

    def succeeds(self) -> None:
        """Note that its engine has finished a request."""
        self.failures, self.suspended_until, self.pause_s = 0, -math.inf, PAUSE_S
        self.blamed.clear()


class BrokerStage:
    """The server around the core, and the peers' side of every connection."""

    def set_up(self, settings: BrokerSettings, seed: int) -> None:
        self.settings = settings
        self.random = Random(seed)
        self.now = 1000.0
        self.start()
        self.clients: list[ClientPeer] = []
        self.workers: list[WorkerPeer] = []
        self.peers: dict[bytes, Peer] = {}
        self.numbers = 0
        #: Workers that a submission is to be kept from.
        self.avoid: dict[Key, tuple[str, ...]] = {}
        #: In which order submissions came, and what they were.
        self.arrived: dict[Key, tuple[int, Envelope]] = {}
        self.arrivals = 0
        self.queries = 0

    def start(self) -> None:
        self.core = BrokerCore(self.settings, software="test", now=self.now, random=self.random)
        self.drained = False
        #: What operators have ordered, by the worker's name.
        self.held: set[str] = set()
        self.speeds: dict[str, float] = {}

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
            told = client.started.get(key, "")
            # Of a broker below, we know it or who it told us to have the request.
            assert message.worker in (told, told.split("/")[0]), f"{told} has it, {message.worker} ends it"
            client.withdraw(key)
        elif isinstance(message, (Reply, Error)) and message.id != UNREAD:
            assert message.id in client.asked, "an answer to no question"
            client.asked.discard(message.id)
        elif isinstance(message, Started):
            key = (message.id, message.attempt)
            assert key in client.owed, "the start of a submission that nobody waits for"
            known = client.started.get(key)
            if known is None:
                assert "/" not in message.worker, "it starts behind a broker before it starts there"
            else:
                assert message.worker.startswith(known.split("/")[0] + "/"), "a submission starts twice"
            client.started[key] = message.worker
        elif isinstance(message, Draining):
            assert self.drained
            client.told = True
        else:
            assert isinstance(message, (Welcome, Heartbeat, Error, Chunks))

    def arrive_at_worker(self, worker: WorkerPeer, message: Message) -> None:
        if isinstance(message, Request):
            self.arrive_request(worker, message)
        elif isinstance(message, (Cancel, Credit)):
            key = (message.id, message.attempt)
            assert key in worker.held, f"{message.command.name} for a request that the worker does not hold"
        elif isinstance(message, Query):
            assert worker.brokers, "a question for somebody who is no broker"
            worker.queries.append(message.id)
        else:
            assert isinstance(message, (Accepted, Heartbeat, Drain))

    def arrive_request(self, worker: WorkerPeer, request: Request) -> None:
        envelope, key = request.envelope, (request.id, request.envelope.attempt)
        assert worker.state is WorkerState.READY, "a request for a worker that is not ready"
        assert not worker.draining, "a request for a worker that drains"
        assert key not in worker.held, "a request twice"
        assert envelope.model in worker.models
        assert envelope.route is not None
        assert worker.name not in self.held, "a request for a worker that is held"
        assert worker.resumes or not envelope.prior_tokens, "a worker that cannot resume"
        self.check_wishes_below(worker, envelope, self.avoid[key])
        self.check_choice(worker, key, envelope)
        self.check_order(key)
        worker.held[key] = request
        assert worker.running + worker.others <= worker.slots, "more requests than slots"

    def check_wishes_below(self, worker: WorkerPeer, envelope: Envelope, avoid: tuple[str, ...]) -> None:
        """What concerns brokers goes to brokers only: whom to avoid there, how long to wait, where it has been."""
        if worker.brokers:
            below = {name.split("/", 1)[1] for name in avoid if name.startswith(worker.name + "/")}
            assert set(envelope.avoid) == below
            assert envelope.path[-1] == self.core.id
        else:
            assert (envelope.avoid, envelope.queue_s) == ((), None)

    def check_choice(self, worker: WorkerPeer, key: Key, envelope: Envelope) -> None:
        """One that is suspended, or that another request tries, gets something only where nobody else can.

        So does one that is avoided, among those that remain.
        """
        avoid = self.avoid[key]
        registered = [self.peers[session.peer] for session in self.core.registry]
        able = [
            other
            for other in registered
            if isinstance(other, WorkerPeer)
            and envelope.model in other.models
            and (other.state, other.draining) == (WorkerState.READY, False)
            and other.name not in self.held
            and (other.resumes or not envelope.prior_tokens)
        ]
        trusted = [other for other in able if not self.suspended(other, key)]
        assert worker in (trusted or able), "a worker that is suspended, though there are others"
        if worker.name in avoid:
            assert not envelope.hedge, "a hedge for who is late"
            assert all(other.name in avoid for other in trusted or able), "one to be avoided, though there are others"

    def check_order(self, key: Key) -> None:
        """What is the same client's, of one priority and for the same workers, leaves in the order of arrival."""
        number, envelope = self.arrived[key]
        for client in self.clients:
            for other in client.owed - client.started.keys() - {key}:
                earlier, waiting = self.arrived[other]
                same = (waiting.model, waiting.priority, bool(waiting.prior_tokens), set(self.avoid[other])) == (
                    envelope.model, envelope.priority, bool(envelope.prior_tokens), set(self.avoid[key]),
                )  # fmt: skip
                assert not same or earlier > number, f"{key}, {envelope} has overtaken {other}, {waiting}"

    def suspended(self, worker: WorkerPeer, key: Key) -> bool:
        breaker = self.core.registry.by_peer[worker.id].breaker
        return breaker.state is State.OPEN or breaker.trial not in (None, key_of(*key))

    def session_over(self, peer: Peer) -> None:
        peer.session = False
        if isinstance(peer, ClientPeer):
            peer.owed.clear()
            peer.started.clear()
            peer.asked.clear()
            peer.told = False
        elif isinstance(peer, WorkerPeer):
            peer.held.clear()
            peer.parked.clear()
            peer.given.clear()
            peer.queries.clear()

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

    def ask(self, client: ClientPeer, method: str, **arguments: object) -> None:
        """Ask or order something: there is one answer, now or later."""
        self.queries += 1
        id = b"q" + self.queries.to_bytes(15, "big")
        client.asked.add(id)
        self.from_client(client, Query(id, method, arguments))

    def ask_now(self, client: ClientPeer, method: str, **arguments: object) -> None:
        """Ask or order something that this broker answers by itself."""
        self.ask(client, method, **arguments)
        assert not client.asked & {b"q" + self.queries.to_bytes(15, "big")}, "no answer"


def has_client(stage: BrokerStage) -> bool:
    """Tell whether a client is in a session."""
    return any(client.open and client.session for client in stage.clients)


def has_worker(stage: BrokerStage) -> bool:
    """Tell whether a worker is in a session."""
    return any(worker.open and worker.session for worker in stage.workers)
