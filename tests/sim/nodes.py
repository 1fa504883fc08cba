"""Brokers, workers and clients on the fake network: the real cores, with the I/O around them simulated."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from tokenmq.broker import events as broker_events
from tokenmq.broker.core import BrokerCore
from tokenmq.broker.settings import BrokerSettings
from tokenmq.client import events as client_events
from tokenmq.client.core import ClientCore
from tokenmq.client.settings import Settings as ClientSettings
from tokenmq.protocol.codec import header
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.errors import TokenmqError
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import Chunk, Chunks, Command, FinishReason, Message, ModelInfo
from tokenmq.protocol.payload import Generation, Sampling, pack_generation
from tokenmq.worker import events as worker_events
from tokenmq.worker.core import WorkerCore
from tokenmq.worker.engines.base import Done, EngineStats, Job, Output, Tokens
from tokenmq.worker.settings import WorkerSettings

from .net import Clock, Link, Node

MODEL = "toy"
HEARTBEAT_S = 1.0
EXPIRY_S = 5.0


def token_at(seed: int, position: int) -> int:
    """The token of a stream at a position: what every reader must see."""
    return (seed * 7919 + position * 104729 + (seed ^ position)) % 50_000


class SimBroker(Node):
    """A broker process. A restart makes a new core that knows nobody."""

    def __init__(self, clock: Clock, random: Random, name: str) -> None:
        super().__init__(clock)
        self.name = name
        self._random = random
        self._ids = count(1)
        self.peers: dict[bytes, tuple[Link, Any, str]] = {}
        self.start()

    def start(self) -> None:
        settings = BrokerSettings(
            name=self.name, heartbeat_s=HEARTBEAT_S, expiry_s=EXPIRY_S, max_waiting=50,
            policy=self._random.choice(["shortest-queue", "lottery"]),
        )  # fmt: skip
        self.core = BrokerCore(settings, software="sim", now=self.clock.now, random=Random(self._random.random()))
        self.alive = True
        self._tick_at = float("inf")
        self._backlog.clear()
        self.settle()

    def kill(self) -> None:
        """SIGKILL: every connection breaks."""
        self.alive = False
        self._paused_at = None
        for link, peer, _ in list(self.peers.values()):
            self._break(link, peer)
        self.peers.clear()

    def connect(self, peer: Any, side: str, loss: float) -> Link:
        link = Link(self.clock, self._random, next(self._ids).to_bytes(5, "big"), loss)
        self.peers[link.routing_id] = (link, peer, side)
        return link

    def cut(self, link: Link) -> None:
        """Break one connection: both ends notice, the broker through its monitor."""
        entry = self.peers.pop(link.routing_id, None)
        if entry is not None:
            self._break(link, entry[1])
            self._monitor(entry[2])

    def closed_by_peer(self, link: Link) -> None:
        """The peer has closed its socket; what it sent before has arrived."""
        link.broken = True
        entry = self.peers.pop(link.routing_id, None)
        if entry is not None:
            self._monitor(entry[2])

    def from_peer(self, link: Link, side: str, message: Message) -> None:
        kind = broker_events.FromClient if side == "client" else broker_events.FromWorker
        self.do(lambda: self._handle(kind(link.routing_id, message)))

    def tick(self) -> None:
        self._perform(self.core.tick(self.clock.now))

    def _break(self, link: Link, peer: Any) -> None:
        link.broken = True
        self.clock.after(self._random.uniform(0, 0.01), lambda: peer.lost(link))

    def _monitor(self, side: str) -> None:
        probe = self.core.probe_clients if side == "client" else self.core.probe_workers
        self.clock.after(0.001, lambda: self.do(lambda: self._perform(probe(self.clock.now))))

    def _handle(self, event: Any) -> None:
        message = getattr(event, "message", None)
        if isinstance(event, broker_events.FromWorker) and isinstance(message, Chunks):
            target = self.core.route_chunks(event.peer, header(Command.CHUNKS, message.route), self.clock.now)
            if target is not None:
                gone = self._send(target, message, "client")
                if gone is not None:
                    self._perform(self.core.handle(gone, self.clock.now))
                return
        self._perform(self.core.handle(event, self.clock.now))

    def _perform(self, actions: Sequence[Any]) -> None:
        queue = deque(actions)  # as in broker/server.py: what follows from a peer that is gone goes behind the rest
        while queue:
            action = queue.popleft()
            if not isinstance(action, Log):
                side = "client" if isinstance(action, broker_events.ToClient) else "worker"
                gone = self._send(action.peer, action.message, side)
                if gone is not None:
                    queue.extend(self.core.handle(gone, self.clock.now))

    def _send(self, routing_id: bytes, message: Message, side: str) -> broker_events.Event | None:
        entry = self.peers.get(routing_id)
        if entry is None:
            gone = broker_events.ClientGone if side == "client" else broker_events.WorkerGone
            return gone(routing_id, "its connection is gone")
        link, peer, _ = entry
        link.carry("down", message, lambda received: peer.received(link, received))
        return None


class Peer(Node):
    """What workers and clients have in common: sockets to brokers."""

    side = ""

    def __init__(self, clock: Clock, random: Random, brokers: dict[str, SimBroker], loss: float) -> None:
        super().__init__(clock)
        self.random = random
        self.brokers = brokers
        self.loss = loss
        self.links: dict[str, Link] = {}
        #: Grows with each socket that is opened, so that a late connect for an old one does nothing.
        self._sockets: dict[str, int] = {}

    def open(self, endpoint: str) -> None:
        self._sockets[endpoint] = self._sockets.get(endpoint, 0) + 1
        self._try(endpoint, self._sockets[endpoint])

    def _try(self, endpoint: str, socket: int) -> None:
        def attempt() -> None:
            if not self.alive or self._sockets.get(endpoint) != socket:
                return
            if not self.brokers[endpoint].alive:
                self._try(endpoint, socket)
                return
            self.links[endpoint] = self.brokers[endpoint].connect(self, self.side, self.loss)
            self.do(lambda: self.connected(endpoint))

        self.clock.after(self.random.uniform(0.001, 0.1), attempt)

    def shut(self, endpoint: str) -> None:
        self._sockets[endpoint] = self._sockets.get(endpoint, 0) + 1
        link = self.links.pop(endpoint, None)
        if link is not None:
            link.later("up", lambda: self.brokers[endpoint].closed_by_peer(link))

    def send(self, endpoint: str, message: Message) -> None:
        link = self.links.get(endpoint)
        if link is not None:
            broker = self.brokers[endpoint]
            link.carry("up", message, lambda received: broker.from_peer(link, self.side, received))

    def die(self) -> None:
        """SIGKILL: the connections break; the brokers' monitors see it."""
        self.alive = False
        for endpoint, link in list(self.links.items()):
            self.brokers[endpoint].cut(link)
        self.links.clear()

    def received(self, link: Link, message: Message) -> None:
        def take() -> None:
            for endpoint, mine in self.links.items():
                if mine is link:
                    self.took(endpoint, message)
                    return

        self.do(take)

    def lost(self, link: Link) -> None:
        def tell() -> None:
            for endpoint, mine in list(self.links.items()):
                if mine is link:
                    del self.links[endpoint]
                    self.disconnected(endpoint)
                    return

        self.do(tell)

    def connected(self, endpoint: str) -> None:
        raise NotImplementedError

    def disconnected(self, endpoint: str) -> None:
        raise NotImplementedError

    def took(self, endpoint: str, message: Message) -> None:
        raise NotImplementedError


class SimWorker(Peer):
    """A worker process with an engine that makes up its tokens."""

    side = "worker"
    incarnations = count(1)

    def __init__(
        self, clock: Clock, random: Random, brokers: dict[str, SimBroker], loss: float, name: str, slots: int
    ) -> None:
        super().__init__(clock, random, brokers, loss)
        settings = WorkerSettings(brokers=tuple(brokers), models=(MODEL,), name=name, slots=slots)
        self.core = WorkerCore(settings, "sim", next(self.incarnations))
        self.slots = slots
        self.jobs: dict[int, tuple[Job, int]] = {}
        self.steps = 0
        self.exit_code: int | None = None
        self.do(lambda: self._perform(self.core.start(self.clock.now)))
        self.clock.after(random.uniform(0, 2), lambda: self.do(self._loaded))

    def woken(self, lag_s: float) -> None:
        self.core.forgive(lag_s)

    def tick(self) -> None:
        self._perform(self.core.tick(self.clock.now))

    def connected(self, endpoint: str) -> None:
        self._handle(worker_events.Connected(endpoint))

    def disconnected(self, endpoint: str) -> None:
        self._handle(worker_events.Lost(endpoint))

    def took(self, endpoint: str, message: Message) -> None:
        self._handle(worker_events.Received(endpoint, message))

    def drain(self, grace_s: float) -> None:
        self.do(lambda: self._handle(worker_events.Drain(grace_s)))

    def _loaded(self) -> None:
        self._handle(worker_events.EngineLoaded((ModelInfo(MODEL),)))
        self._next_step()

    def _next_step(self) -> None:
        """Let the engine take a step of a random length; now and then a very long one."""
        lasts = self.random.uniform(10, 45) if self.random.random() < 0.001 else self.random.uniform(0.002, 0.03)
        started = self.clock.now
        self._handle(worker_events.EngineProgress(self.steps, started if self.jobs else None))
        self.clock.after(lasts, lambda: self.do(self._step))

    def _step(self) -> None:
        self.steps += 1
        running = list(self.jobs)[: self.slots]
        if running and self.random.random() < 0.002:
            lost = frozenset(self.jobs)
            self.jobs.clear()
            self._handle(worker_events.EngineFailed("simulated", lost))
        else:
            outputs = [output for ticket in running for output in self._advance(ticket)]
            self._handle(worker_events.EngineOutputs(outputs, self._stats()))
        self._next_step()

    def _advance(self, ticket: int) -> list[Output]:
        job, position = self.jobs[ticket]
        sampling = job.generation.sampling
        made = min(self.random.choice([1, 1, 1, 1, 3]), sampling.max_tokens - position)
        tokens = tuple(token_at(sampling.seed, place) for place in range(position, position + made))
        outputs: list[Output] = [Tokens(ticket, tokens, "".join(f"{token} " for token in tokens))]
        position += made
        self.jobs[ticket] = (job, position)
        if position == sampling.max_tokens:
            del self.jobs[ticket]
            outputs.append(Done(ticket, FinishReason.LENGTH, 1, position))
        return outputs

    def _stats(self) -> EngineStats:
        running = min(len(self.jobs), self.slots)
        return EngineStats(running, len(self.jobs) - running, 0.0)

    def _handle(self, event: worker_events.Event) -> None:
        self._perform(self.core.handle(event, self.clock.now))

    def _perform(self, actions: Sequence[worker_events.Action]) -> None:
        for action in actions:
            if isinstance(action, worker_events.Open):
                self.open(action.broker)
            elif isinstance(action, worker_events.Shut):
                self.shut(action.broker)
            elif isinstance(action, worker_events.Send):
                self.send(action.broker, action.message)
            elif isinstance(action, worker_events.Submit):
                self.jobs[action.job.ticket] = (action.job, 0)
            elif isinstance(action, worker_events.CancelJob):
                self._cancel_soon(action.ticket)
            elif isinstance(action, worker_events.Stop):
                self.exit_code = action.exit_code
                self.alive = False

    def _cancel_soon(self, ticket: int) -> None:
        def cancel() -> None:
            if ticket in self.jobs:
                _, position = self.jobs.pop(ticket)
                done = Done(ticket, FinishReason.CANCELLED, 1, position)
                self._handle(worker_events.EngineOutputs([done], self._stats()))

        self.clock.after(self.random.uniform(0.001, 0.03), lambda: self.do(cancel))


@dataclass
class Reading:
    """A stream as its application sees it."""

    seed: int
    max_tokens: int
    window: ReceiveWindow
    submitted_at: float
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    cancelled: bool = False
    outcome: client_events.Ending | TokenmqError | None = None
    ended_at: float = 0.0


class SimClient(Peer):
    """A client process and the applications in it."""

    side = "client"

    def __init__(self, clock: Clock, random: Random, brokers: dict[str, SimBroker], loss: float) -> None:
        super().__init__(clock, random, brokers, loss)
        self.core = ClientCore(ClientSettings(endpoints=tuple(brokers), name="sim"), random=random.random)
        self.readings: dict[bytes, Reading] = {}
        self.endpoint = ""
        self.do(self.tick)

    def tick(self) -> None:
        self._perform(self.core.tick(self.clock.now))

    def connected(self, endpoint: str) -> None:
        self._handle(client_events.Connected())

    def disconnected(self, endpoint: str) -> None:
        self._handle(client_events.Lost("the connection broke"))

    def took(self, endpoint: str, message: Message) -> None:
        self._handle(client_events.Received(message))

    def submit(self, *, deadline_s: float | None, model: str = MODEL) -> bytes:
        """Ask for a stream and read it, at a pace of its own."""
        request_id = self.random.randbytes(16)
        sampling = Sampling(max_tokens=self.random.randint(1, 60), seed=self.random.getrandbits(30))
        window = ReceiveWindow(self.random.choice([1, 2, 8, 64]))
        self.readings[request_id] = Reading(sampling.seed, sampling.max_tokens, window, self.clock.now)
        payload = pack_generation(Generation(prompt="x", sampling=sampling))
        self._handle(client_events.Submit(request_id, model, payload, window, (), deadline_s))
        return request_id

    def cancel(self, request_id: bytes) -> None:
        self.readings[request_id].cancelled = True
        self._handle(client_events.CancelStream(request_id))

    def _handle(self, event: client_events.Event) -> None:
        self._perform(self.core.handle(event, self.clock.now))

    def _perform(self, actions: Sequence[client_events.Action]) -> None:
        for action in actions:
            if isinstance(action, client_events.Open):
                self.endpoint = action.endpoint
                self.open(action.endpoint)
            elif isinstance(action, client_events.CloseSocket):
                self.shut(self.endpoint)
            elif isinstance(action, client_events.Send):
                self.send(self.endpoint, action.message)
            elif isinstance(action, client_events.Deliver):
                self._deliver(self.readings[action.id], action.id, action.chunk)
            elif isinstance(action, client_events.Ended):
                self._ended(self.readings[action.id], action.outcome)

    def _deliver(self, reading: Reading, request_id: bytes, chunk: Chunk) -> None:
        assert reading.outcome is None, "a chunk after the end"
        assert chunk.offset == len(reading.tokens), "a gap or a repeat reached the reader"
        reading.tokens.extend(chunk.token_ids)
        reading.text += chunk.text
        expected = [token_at(reading.seed, place) for place in range(len(reading.tokens))]
        assert reading.tokens == expected, "a wrong token reached the reader"
        taken = len(chunk.token_ids)

        def consume() -> None:
            limit = reading.window.consume(taken)
            if limit is not None:
                self._handle(client_events.Grant(request_id, limit))

        self.clock.after(self.random.choice([0.0, 0.01, 0.5]), lambda: self.do(consume))

    def _ended(self, reading: Reading, outcome: client_events.Ending | TokenmqError) -> None:
        assert reading.outcome is None, "a stream ended twice"
        reading.outcome, reading.ended_at = outcome, self.clock.now
        if isinstance(outcome, client_events.Ending) and outcome.reason is FinishReason.LENGTH:
            assert len(reading.tokens) == reading.max_tokens, "the stream is cut short"
            assert reading.text == "".join(f"{token} " for token in reading.tokens)
        elif isinstance(outcome, client_events.Ending):
            assert outcome.reason is FinishReason.CANCELLED
            assert reading.cancelled, "cancelled by nobody"
