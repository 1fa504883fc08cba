"""BrokerCore against clients and workers that do anything, in any order; a model on the side counts what is owed.

The peers and what must hold at them are in broker_stage.py; here is what they do.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenmq.broker.breaker import FAILURES, Breaker, State
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
from tokenmq.broker.requests import key_of
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
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
    Hello,
    Load,
    ModelInfo,
    Parked,
    Ready,
    Reply,
    Request,
    Started,
    Timings,
    Usage,
    WorkerState,
)

from .broker_stage import (
    BEHIND,
    MODELS,
    NAMES,
    RARE,
    UNREAD,
    BrokerStage,
    ClientPeer,
    Key,
    Peer,
    WorkerPeer,
    has_client,
    has_worker,
)


class BrokerMachine(BrokerStage, RuleBasedStateMachine):
    """Peers come, speak, break and leave; after each step everything must add up."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)), max_waiting=st.sampled_from([0, 1, 5, 100, 100]),
        seed=st.integers(0, 1000), below=st.booleans(),
    )  # fmt: skip
    def begin(self, policy: str, max_waiting: int, seed: int, below: bool) -> None:
        self.set_up(
            BrokerSettings(heartbeat_s=1.0, expiry_s=5.0, policy=policy, max_waiting=max_waiting, notice_s=0.0), seed
        )
        for name in ("w1", "w2"):
            self.client_comes()
            second = name == "w2"
            self.worker_comes(name, 1, ("a", "b"), 2, WorkerState.READY, resumes=not second, below=second and below)

    # Clients.

    @rule()
    @precondition(lambda self: sum(client.open for client in self.clients) < 4)
    def client_comes(self) -> None:
        client = ClientPeer(b"c" + len(self.peers).to_bytes(4, "big"))
        self.peers[client.id] = client
        self.clients.append(client)
        self.from_client(client, Hello("client", "test"))  # all of one name share
        assert client.session

    @rule(
        index=st.integers(0, 9), model=st.sampled_from([*MODELS, "a", "a", "a", "a", "b", "b", "b", "unknown"]),
        deadline_s=st.sampled_from([None, None, None, 0.0, 0.3, 2.0, 3600.0]),
        queue_s=st.sampled_from([None, None, None, 0.0, 0.2, 1.0]), number=st.integers(1, 4),
        prior_tokens=st.sampled_from([0, 0, 3]),
        avoid=st.lists(st.sampled_from([*NAMES, *BEHIND, *BEHIND]), max_size=3, unique=True).map(tuple),
        priority=st.sampled_from([5, 5, 5, 0, 9]), hedge=RARE,
        path=st.integers(0, 20).map(lambda drawn: ("x",) * 8 * (drawn == 13)),
    )  # fmt: skip
    @precondition(has_client)
    def submit(
        self, index: int, model: str, deadline_s: float | None, queue_s: float | None, number: int, prior_tokens: int,
        avoid: tuple[str, ...], priority: int, hedge: bool, path: tuple[str, ...],
    ) -> None:  # fmt: skip
        for _ in range(number):
            if has_client(self):
                self.numbers += 1
                envelope = Envelope(
                    model, 1, 8, deadline_s, None, prior_tokens, avoid, queue_s, priority=priority, affinity=model,
                    hedge=hedge, explain=number == 1, path=path,
                )  # fmt: skip
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

    @rule(index=st.integers(0, 9), which=st.integers(0, 9))
    @precondition(lambda self: any(client.open and client.started for client in self.clients))
    def hedge(self, index: int, which: int) -> None:
        """Once more what a worker has, beside it."""
        clients = [client for client in self.clients if client.open and client.started]
        client = clients[index % len(clients)]
        id, attempt = list(client.started)[which % len(client.started)]
        _, envelope = self.arrived[id, attempt]
        self.submit_one(client, id, replace(envelope, attempt=client.live(id) + 1, hedge=True))

    def submit_one(self, client: ClientPeer, id: bytes, envelope: Envelope) -> None:
        key = (id, envelope.attempt)
        if envelope.attempt > client.live(id):  # else a repeat, or late
            former = client.alive(id)
            # Who has one of its attempts is to be avoided; only with a hedge do these go on.
            late = [client.started[other] for other in former if other in client.started]
            for other in former if not envelope.hedge else ():
                client.withdraw(other)
            client.owed.add(key)
            if key_of(*key) not in self.core.exchange.records:
                self.avoid[key] = (*envelope.avoid, *late)
                self.arrivals += 1
                self.arrived[key] = (self.arrivals, envelope)
        self.from_client(client, Request(id, envelope, b"payload"))
        if envelope.hedge:
            assert key not in client.owed or key in client.started, "a hedge waits"

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

    @rule(
        index=st.integers(0, 9), question=st.sampled_from([
            ("models", {}), ("status", {}), ("nonsense", {}), ("workers", {"tree": True}), ("status", {"tree": True}),
            ("route", {"model": "a"}), ("refresh", {}), ("set_speed", {"worker": BEHIND[0], "speed": 2.0}),
        ]),
    )  # fmt: skip
    @precondition(has_client)
    def query(self, index: int, question: tuple[str, dict[str, object]]) -> None:
        method, arguments = question
        if method in ("models", "nonsense"):
            self.ask_now(self.some_client(index), method)
        else:
            self.ask(self.some_client(index), method, **arguments)

    @rule(
        index=st.integers(0, 9), order=st.sampled_from(["hold", "hold", "undrain", "undrain", "drain", "remove"]),
        name=st.sampled_from(NAMES), really=RARE,
    )  # fmt: skip
    @precondition(has_client)
    def order(self, index: int, order: str, name: str, really: bool) -> None:
        """Who is held gets nothing, also when it comes back under its name, until it is undrained or removed."""
        client, here = self.some_client(index), name in self.core.registry.by_name
        if order == "hold":
            if here:
                self.held.add(name)
            self.ask_now(client, "drain", worker=name, stay=True)
        elif order == "undrain":
            self.held.discard(name)
            self.ask_now(client, "undrain", worker=name)
        elif order == "drain":
            self.ask_now(client, "drain", worker=name)
        elif really:
            if here:
                self.held.discard(name)
                self.speeds.pop(name, None)
            self.ask_now(client, "remove", worker=name)
            assert name not in self.core.registry.by_name

    @rule(
        index=st.integers(0, 9), policy=st.sampled_from([None, None, None, *sorted(POLICIES), "nonsense"]),
        name=st.sampled_from(NAMES), speed=st.sampled_from([None, 1e-6, 3.0, 1e6]),
    )  # fmt: skip
    @precondition(has_client)
    def tune(self, index: int, policy: str | None, name: str, speed: float | None) -> None:
        if policy is not None:
            self.ask_now(self.some_client(index), "set_policy", policy=policy)
            return
        if name in self.core.registry.by_name:
            self.speeds.pop(name, None)
            if speed is not None:
                self.speeds[name] = speed
        self.ask_now(self.some_client(index), "set_speed", worker=name, speed=speed)

    # Sessions of clients.

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
        error = ProtocolError("garbled", subject=UNREAD if named else None)
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
        below=RARE, speed=st.sampled_from([None, 1.5]),
    )  # fmt: skip
    @precondition(lambda self: sum(worker.open for worker in self.workers) < 6)
    def worker_comes(
        self, name: str, incarnation: int, models: tuple[str, ...], slots: int, state: WorkerState, resumes: bool,
        below: bool = False, speed: float | None = None,
    ) -> None:  # fmt: skip
        known = self.core.registry.by_name.get(name)
        newest = known.incarnation if known else 0
        worker = WorkerPeer(
            b"w" + len(self.peers).to_bytes(4, "big"), name=name, incarnation=incarnation, models=models, slots=slots,
            state=state, resumes=resumes, speed=speed, brokers=(f"broker {name}", "broker x") if below else (),
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
            worker.name, worker.incarnation, "test", models, worker.slots, "test", self.load(worker), worker.speed,
            brokers=worker.brokers,
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

    @rule(really=RARE)
    def a_loop_registers(self, really: bool) -> None:
        """A broker that this one stands below cannot stand below it."""
        if not really:
            return
        peer = WorkerPeer(b"w" + len(self.peers).to_bytes(4, "big"), name="w1", brokers=("x", self.core.id))
        self.peers[peer.id] = peer
        self.workers.append(peer)
        self.from_worker(peer, self.ready(peer))
        assert not peer.session
        peer.open = False

    @rule(
        index=st.integers(0, 9), which=st.integers(0, 9), well=st.booleans(), number=st.integers(1, 6),
    )  # fmt: skip
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
        given = worker.given.pop(key, "")
        if well:
            worker.succeeds()
            usage, timings = Usage(1, 5), Timings(decode_s=1.0 / worker.slots)
            self.from_worker(worker, Finish(id, attempt, FinishReason.STOP, usage, timings, given))
        else:
            worker.fails(id, self.now)
            self.from_worker(worker, Error(id, attempt, "engine_failed", "it broke", worker=given))

    @rule(name=st.sampled_from(NAMES), number=st.integers(3, 5))
    @precondition(has_worker)
    def engine_breaks(self, name: str, number: int) -> None:
        """A worker fails all that it gets."""
        for _ in range(number):
            if has_client(self):
                self.numbers += 1
                self.submit_one(self.some_client(0), self.recent(0), Envelope("a", 1, 8))
            for worker in self.workers:
                if worker.open and worker.name == name and worker.held:
                    self.answer(worker, next(iter(worker.held)), well=False)

    @rule(index=st.integers(0, 9), which=st.integers(0, 9), name=st.sampled_from(["w1", "w2"]))
    @precondition(lambda self: any(worker.open and worker.brokers and worker.held for worker in self.workers))
    def broker_below_starts(self, index: int, which: int, name: str) -> None:
        busy = [worker for worker in self.workers if worker.open and worker.brokers and worker.held]
        worker = busy[index % len(busy)]
        key = list(worker.held)[which % len(worker.held)]
        worker.given[key] = name
        self.from_worker(worker, Started(*key, name))

    @rule(index=st.integers(0, 9), answer=st.sampled_from([None, 7, {}, {"worker": "w1"}, {"tree": 1}, [], [{}]]))
    @precondition(lambda self: any(worker.open and worker.queries for worker in self.workers))
    def broker_below_replies(self, index: int, answer: object) -> None:
        asked = [worker for worker in self.workers if worker.open and worker.queries]
        worker = asked[index % len(asked)]
        id = worker.queries.pop()
        said = Reply(id, answer) if answer != 7 else Error(id, 0, "busy", "not now", True)
        self.from_worker(worker, said)
        if answer != 7:
            self.from_worker(worker, said)  # nobody waits for it any more

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
        target = self.core.route_chunks(worker.id, route, self.now)
        worker.said += 1
        if target is None:
            self.perform(self.core.handle(StrayChunks(worker.id), self.now))
            return
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
                self.check_breaker(worker, found.breaker)
                assert found.speed == self.speeds.get(worker.name, found.speed), "not the speed that was ordered"
                assert found.held == (worker.name in self.held)

    def check_breaker(self, worker: WorkerPeer, breaker: Breaker) -> None:
        """Who has failed three times is suspended, then tried; whoever has finished something since is neither."""
        trusted, suspended = worker.failures < FAILURES, worker.suspended_until > self.now
        expected = State.CLOSED if trusted else State.OPEN if suspended else State.HALF_OPEN
        assert breaker.state is expected, (breaker, worker.failures, worker.suspended_until, self.now)

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
        assert not any(client.asked for client in self.clients), "a question without an answer"


TestBrokerMachine = BrokerMachine.TestCase
TestBrokerMachine.settings = settings(
    max_examples=200, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)
