"""Brokers below brokers, wired together in memory: what one sends arrives at the other at once, through the codec."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any, TypeVar

from tokenmq.broker.core import BrokerCore
from tokenmq.broker.events import ClientGone, FromClient, FromWorker, StrayChunks, ToClient, ToWorker, WorkerGone
from tokenmq.broker.guests import Guest
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.codec import HEADER_BYTES, decode, encode
from tokenmq.protocol.links import Connected, Lost, Open, Received, Send, Shut
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Draining,
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
    Timings,
    Usage,
)

from .stage import request_id

MessageT = TypeVar("MessageT", bound=Message)


@dataclass
class Peer:
    """A client or worker by hand: what it is told, without heartbeats."""

    tree: Tree
    name: str
    broker: str
    id: bytes
    heard: list[Message] = field(default_factory=list)
    said: int = 0

    def says(self, message: Message) -> None:
        """Send a message."""
        raise NotImplementedError

    def takes(self, kind: type[MessageT]) -> list[MessageT]:
        """Return what it was told of this kind since the last look."""
        found = [message for message in self.heard if isinstance(message, kind)]
        self.heard = [message for message in self.heard if not isinstance(message, kind)]
        return found

    def take(self, kind: type[MessageT]) -> MessageT:
        """Return the one message of this kind."""
        [message] = self.takes(kind)
        return message

    def _says(self, event: Callable[[bytes, Message], Any], message: Message) -> None:
        self.said += 1
        self.tree.happens(self.broker, event(self.id, decode(encode(message))))


class ClientPeer(Peer):
    def says(self, message: Message) -> None:
        self._says(FromClient, message)

    def asks(self, number: int = 1, attempt: int = 1, **fields: Any) -> None:
        """Submit a request; the fields are the envelope's."""
        values = {"model": "m", "credit": 8, **fields}
        self.says(Request(request_id(number), Envelope(attempt=attempt, **values), b"p"))

    def grants(self, limit: int, number: int = 1, attempt: int = 1) -> None:
        self.says(Credit(request_id(number), attempt, limit))

    def cancels(self, number: int = 1, attempt: int = 1) -> None:
        self.says(Cancel(request_id(number), attempt))

    def queries(self, method: str, **arguments: Any) -> Any:
        """Return the result of a query, or its ERROR."""
        self.says(Query(request_id(99), method, arguments))
        self.tree.passes(0.2)
        [answer] = [message for message in self.heard if isinstance(message, (Reply, Error))]
        self.heard.remove(answer)
        return answer.result if isinstance(answer, Reply) else answer

    def goes(self) -> None:
        self.tree.forget(self)
        self.tree.happens(self.broker, ClientGone(self.id, "its connection is gone"))


class WorkerPeer(Peer):
    def says(self, message: Message) -> None:
        self._says(FromWorker, message)

    def brings(self, *tokens: int, to: bytes, number: int = 1, attempt: int = 1, offset: int = 0) -> None:
        """Send tokens of a request to the client of a route."""
        self.said += 1
        chunks = (Chunk(request_id(number), attempt, 0, offset, tokens, "t" * len(tokens)),)
        self.tree.chunks(self.broker, self.id, Chunks(to, chunks))

    def finishes(self, number: int = 1, attempt: int = 1, reason: FinishReason = FinishReason.STOP) -> None:
        timings = Timings(worker_queue_s=0.5, prefill_s=0.25, decode_s=1.0)
        self.says(Finish(request_id(number), attempt, reason, Usage(1, 2), timings, "ignored"))

    def fails(
        self, code: str = "engine_failed", number: int = 1, attempt: int = 1, *, retryable: bool = True
    ) -> None:
        self.says(Error(request_id(number), attempt, code, "it broke", retryable))

    def beats(self, **load: Any) -> None:
        self.says(Heartbeat(self.said, Load(**load)))

    def drains(self) -> None:
        self.says(Draining())

    def goes(self) -> None:
        self.tree.forget(self)
        self.tree.happens(self.broker, WorkerGone(self.id, "its connection is gone"))


class Tree:
    """Brokers by name, and their peers; `now` is the time of all of them.

    Attributes:
        cores: the brokers that live.
        logs: what each has logged.
        carried: messages that went from each broker to each of its parents, and back.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.cores: dict[str, BrokerCore] = {}
        self.logs: dict[str, list[Log]] = {}
        self.carried: dict[tuple[str, str], list[Message]] = {}
        self._ids = count(1)
        self._starts = count(1)
        self._events: deque[tuple[str, Any]] = deque()
        self._peers: dict[tuple[str, bytes], Peer] = {}
        #: The routing id of each child at each parent, by (child, parent), and back.
        self._links: dict[tuple[str, str], bytes] = {}
        self._children: dict[tuple[str, bytes], str] = {}
        #: Sockets that were opened to a broker that does not live, as (child, parent).
        self._waiting: list[tuple[str, str]] = []
        self._beat_at = self.now + 1.0

    # Who is there.

    def broker(self, name: str, *parents: str, **settings: Any) -> BrokerCore:
        """Start a broker below others, and let it register."""
        values = {"name": name, "uplinks": tuple(endpoint(parent) for parent in parents), "notice_s": 0.0, **settings}
        incarnation = next(self._starts)
        core = BrokerCore(
            BrokerSettings(**values), software="test/1", now=self.now, random=Random(7),
            id=f"{name}-{incarnation}", incarnation=incarnation,
        )  # fmt: skip
        self.cores[name] = core
        self.logs.setdefault(name, [])
        self._perform(name, core.tick(self.now))
        waiting, self._waiting = self._waiting, []
        for child, parent in waiting:
            self._open(child, parent)
        self.run()
        return core

    def client(self, broker: str, name: str = "ann", *, direct: bool = False) -> ClientPeer:
        client = ClientPeer(self, name, broker, self._new_id())
        self._peers[broker, client.id] = client
        client.says(Hello(name, "test/1", direct=direct))
        client.heard.clear()
        return client

    def worker(
        self,
        broker: str,
        name: str,
        *models: str,
        slots: int = 1,
        resumes: bool = True,
        speed: float | None = None,
        direct: str = "",
    ) -> WorkerPeer:
        """Register a worker, and let the brokers above hear of it."""
        worker = WorkerPeer(self, name, broker, self._new_id())
        self._peers[broker, worker.id] = worker
        infos = tuple(ModelInfo(model, resumes=resumes) for model in models or ("m",))
        ready = Ready(name, next(self._starts), "test/1", infos, slots, "synthetic", Load(), speed, direct=direct)
        worker.says(ready)
        worker.take(Accepted)
        self.passes(0.2)
        return worker

    def forget(self, peer: Peer) -> None:
        """Note that a peer says nothing more."""
        del self._peers[peer.broker, peer.id]

    def kill(self, name: str) -> None:
        """SIGKILL a broker: all its connections break."""
        del self.cores[name]
        self._waiting = [pair for pair in self._waiting if pair[0] != name]
        for child, parent in list(self._links):
            if name in (child, parent):
                id = self._links.pop((child, parent))
                del self._children[parent, id]
                if parent in self.cores:
                    self._events.append((parent, WorkerGone(id, "its connection is gone")))
                if child in self.cores:
                    self._events.append((child, Lost(endpoint(parent))))
        self._peers = {key: peer for key, peer in self._peers.items() if key[0] != name}
        self.run()

    def logged(self, name: str, event: str) -> list[dict[str, Any]]:
        return [dict(log.fields) for log in self.logs[name] if log.event == event]

    # What happens.

    def happens(self, broker: str, event: Any) -> None:
        self._events.append((broker, event))
        self.run()

    def run(self) -> None:
        """Let all that is under way arrive."""
        while self._events:
            name, event = self._events.popleft()
            core = self.cores.get(name)
            if core is None:
                continue
            if isinstance(event, tuple):
                self._route(name, core, *event)
            else:
                self._perform(name, core.handle(event, self.now))
            core.validate()

    def passes(self, seconds: float) -> None:
        """Let time pass; each core is called when it wants to be. Workers say that they live."""
        until = self.now + seconds
        while (deadline := min([self._beat_at, *(core.next_deadline() for core in self.cores.values())])) <= until:
            self.now = max(self.now, deadline)
            if self.now >= self._beat_at:
                self._beat_at = self.now + 1.0
                for peer in list(self._peers.values()):
                    peer.says(Heartbeat(peer.said))
            for name, core in list(self.cores.items()):
                if core.next_deadline() <= self.now:
                    self._perform(name, core.tick(self.now))
                    core.validate()
                if core.stopped:
                    self.kill(name)
            self.run()
        self.now = until

    def chunks(self, broker: str, worker: bytes, message: Chunks) -> None:
        """Send CHUNKS as broker/server.py sees them: a header to look at and a body to leave alone."""
        self._events.append((broker, (worker, encode(message))))
        self.run()

    def _route(self, name: str, core: BrokerCore, worker: bytes, frames: list[bytes]) -> None:
        (frame,) = frames
        client = core.route_chunks(worker, frame[8:HEADER_BYTES], self.now)
        if client is None:
            self._perform(name, core.handle(StrayChunks(worker), self.now))
        elif isinstance(client, Guest):
            parent = client.parent.removeprefix("tcp://").removesuffix(":1")
            id = self._links[name, parent]
            frame = client.header + frame[HEADER_BYTES:]
            self.carried[name, parent].append(decode([frame]))
            self._events.append((parent, (id, [frame])))
        else:
            self._peers[name, client.peer].heard.append(decode(frames))

    def _perform(self, name: str, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Log):
                self.logs[name].append(action)
            elif isinstance(action, Open):
                self._open(name, action.broker.removeprefix("tcp://").removesuffix(":1"))
            elif isinstance(action, Shut):
                parent = action.broker.removeprefix("tcp://").removesuffix(":1")
                self._waiting = [pair for pair in self._waiting if pair != (name, parent)]
                id = self._links.pop((name, parent), None)
                if id is not None:
                    del self._children[parent, id]
                    self._events.append((parent, WorkerGone(id, "its connection is gone")))
            elif isinstance(action, Send):
                self._send_up(name, action)
            elif isinstance(action, (ToClient, ToWorker)):
                self._send_down(name, action)

    def _open(self, name: str, parent: str) -> None:
        if parent in self.cores:
            id = self._new_id()
            self._links[name, parent] = id
            self._children[parent, id] = name
            self.carried.setdefault((name, parent), [])
            self.carried.setdefault((parent, name), [])
            self._events.append((name, Connected(endpoint(parent))))
        else:
            self._waiting.append((name, parent))

    def _send_up(self, name: str, action: Send) -> None:
        parent = action.broker.removeprefix("tcp://").removesuffix(":1")
        id = self._links.get((name, parent))
        if id is not None:
            message = decode(encode(action.message))
            self.carried[name, parent].append(message)
            self._events.append((parent, FromWorker(id, message)))

    def _send_down(self, name: str, action: ToClient | ToWorker) -> None:
        message = decode(encode(action.message))
        child = self._children.get((name, action.peer))
        if child is not None:
            self.carried[name, child].append(message)
            self._events.append((child, Received(endpoint(name), message)))
        elif (name, action.peer) in self._peers and not isinstance(message, Heartbeat):
            self._peers[name, action.peer].heard.append(message)

    def _new_id(self) -> bytes:
        return next(self._ids).to_bytes(5, "big")


def endpoint(name: str) -> str:
    """Return the backend of a broker."""
    return f"tcp://{name}:1"


def route_of(request: Request) -> bytes:
    """Return the return route of a request as a worker gets it."""
    assert request.envelope.route is not None
    return request.envelope.route
