"""A stage for BrokerCore: peers speak, time passes, and each step returns who is told what."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from tokenmq.broker.core import BrokerCore
from tokenmq.broker.events import (
    Action,
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
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunks,
    Credit,
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

Said = tuple[str, Message]


def request_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Peer:
    """One connection to the broker. What it says is counted, as its heartbeats must tell."""

    def __init__(self, stage: Stage, name: str, peer: bytes) -> None:
        self.stage, self.name, self.peer = stage, name, peer
        self.said = 0

    def says(self, message: Message) -> list[Said]:
        """Send a message; return what the broker says to whom."""
        raise NotImplementedError

    def beats(self, *, sent: int | None = None, load: Load | None = None) -> list[Said]:
        return self.says(Heartbeat(self.said if sent is None else sent, load))


class ClientPeer(Peer):
    def says(self, message: Message) -> list[Said]:
        self.said += 1
        return self.stage.happens(FromClient(self.peer, message))

    def garbles(self, subject: bytes | None = None) -> list[Said]:
        self.said += 1
        return self.stage.happens(BadClient(self.peer, ProtocolError("garbled", subject=subject)))

    def vanishes(self) -> list[Said]:
        return self.stage.happens(ClientGone(self.peer, "its connection is gone"))

    def asks(
        self, number: int, model: str = "m", *, attempt: int = 1, credit: int = 8, deadline_s: float | None = None,
        payload: bytes = b"p", attachments: tuple[bytes, ...] = (), prior_tokens: int = 0,
        avoid: tuple[str, ...] = (), queue_s: float | None = None,
    ) -> list[Said]:  # fmt: skip
        envelope = Envelope(model, attempt, credit, deadline_s, None, prior_tokens, avoid, queue_s)
        return self.says(Request(request_id(number), envelope, payload, attachments))

    def cancels(self, number: int, attempt: int = 1) -> list[Said]:
        return self.says(Cancel(request_id(number), attempt))

    def grants(self, number: int, limit: int, attempt: int = 1) -> list[Said]:
        return self.says(Credit(request_id(number), attempt, limit))

    def queries(self, method: str, **arguments: Any) -> Any:
        """Return the result of a query, or its ERROR."""
        [(_, answer)] = self.says(Query(request_id(99), method, arguments))
        assert isinstance(answer, (Reply, Error))
        return answer.result if isinstance(answer, Reply) else answer


class WorkerPeer(Peer):
    def __init__(self, stage: Stage, name: str, peer: bytes, ready: Ready) -> None:
        super().__init__(stage, name, peer)
        self.ready = ready

    def says(self, message: Message) -> list[Said]:
        self.said += 1
        if isinstance(message, Chunks):  # of whose client `route_chunks` knows nothing
            return self.stage.happens(StrayChunks(self.peer, message.route))
        return self.stage.happens(FromWorker(self.peer, message))

    def garbles(self) -> list[Said]:
        self.said += 1
        return self.stage.happens(BadWorker(self.peer, ProtocolError("garbled")))

    def vanishes(self) -> list[Said]:
        return self.stage.happens(WorkerGone(self.peer, "its connection is gone"))

    def changes(self, **fields: Any) -> list[Said]:
        if "models" in fields:
            fields["models"] = tuple(ModelInfo(name) for name in fields["models"])
        self.ready = replace(self.ready, **fields)
        return self.says(self.ready)

    def finishes(self, number: int, attempt: int = 1, reason: FinishReason = FinishReason.STOP) -> list[Said]:
        return self.says(finish(number, attempt, reason))

    def fails(self, number: int, code: str = "engine_failed", attempt: int = 1) -> list[Said]:
        return self.says(Error(request_id(number), attempt, code, "it broke"))


def finish(
    number: int,
    attempt: int = 1,
    reason: FinishReason = FinishReason.STOP,
    *,
    worker: str = "",
    waited_s: float = 0.0,
) -> Finish:
    return Finish(request_id(number), attempt, reason, Usage(1, 2), Timings(waited_s, 0.5, 0.25, 1.0), worker)


class Stage:
    """A core and its peers; `now` is the time."""

    def __init__(self, **settings: Any) -> None:
        self.settings = BrokerSettings(**{"heartbeat_s": 1.0, "expiry_s": 5.0, "notice_s": 0.0, **settings})
        self.now = 100.0
        self.core = BrokerCore(self.settings, software="test/1", now=self.now, random=Random(7))
        self.logs: list[Log] = []
        self._names: dict[bytes, str] = {}
        self._connections = 0

    def happens(self, event: Any) -> list[Said]:
        return self.tell(self.core.handle(event, self.now))

    def tell(self, actions: list[Action]) -> list[Said]:
        """Sort logs out, give peers their names."""
        said: list[Said] = []
        for action in actions:
            if isinstance(action, Log):
                self.logs.append(action)
            else:
                assert isinstance(action, (ToClient, ToWorker))
                said.append((self._names.get(action.peer, "?"), action.message))
        if not self.settings.notice_s:
            check_started(said)
        return said

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [dict(log.fields) for log in self.logs if log.event == event]

    def passes(self, seconds: float, *, listening: bool = True) -> list[Said]:
        """Let time pass; with `listening` the core is called whenever it wants to be, else only in the end."""
        until = self.now + seconds
        said: list[Said] = []
        while listening and not self.core.stopped and (deadline := self.core.next_deadline()) <= until:
            self.now = max(self.now, deadline)
            said += self.tell(self.core.tick(self.now))
        self.now = until
        return said + self.tell(self.core.tick(self.now))

    def connection(self, name: str) -> bytes:
        self._connections += 1
        peer = b"\0" + self._connections.to_bytes(4, "big")
        self._names[peer] = name
        return peer

    def stranger_client(self, name: str = "stranger") -> ClientPeer:
        return ClientPeer(self, name, self.connection(name))

    def stranger_worker(self, name: str = "stranger") -> WorkerPeer:
        return WorkerPeer(self, name, self.connection(name), ready_of(name))

    def client(self, name: str = "ann", heartbeat_s: float | None = None) -> ClientPeer:
        client = self.stranger_client(name)
        [(to, welcome)] = client.says(Hello(name, "test/1", heartbeat_s))
        assert to == name
        assert isinstance(welcome, Welcome)
        return client

    def worker(self, name: str = "w1", *models: str, **fields: Any) -> WorkerPeer:
        """Register a worker that gets nothing to do at once."""
        worker = self.stranger_worker(name)
        said = self.registers(worker, *models, **fields)
        assert [to for to, _ in said] == [name]
        assert isinstance(said[0][1], Accepted)
        return worker

    def registers(self, worker: WorkerPeer, *models: str, **fields: Any) -> list[Said]:
        worker.ready = ready_of(worker.name, *models, **fields)
        return worker.says(worker.ready)

    def busy_worker(self, name: str = "w1", client: ClientPeer | None = None, number: int = 1) -> WorkerPeer:
        """Register a worker with one slot, and fill it with a request."""
        worker = self.worker(name)
        (client or self.client()).asks(number)
        assert worker_session(self, name).free == 0
        return worker


def worker_session(stage: Stage, name: str) -> Any:
    return stage.core.registry.by_name[name]


def ready_of(name: str, *models: str, **fields: Any) -> Ready:
    values: dict[str, Any] = {
        "incarnation": 1, "software": "test/1", "slots": 1, "speed": 1.0, "engine": "synthetic", "load": Load(),
    }  # fmt: skip
    infos = tuple(ModelInfo(model) for model in models or ("m",))
    return Ready(worker=name, models=fields.pop("infos", infos), **{**values, **fields})


def check_started(said: list[Said]) -> None:
    """Check that whoever waits for a request is told when it goes to a worker, and of nothing that did not go."""
    requests = [(message.id, message.envelope.attempt, to) for to, message in said if isinstance(message, Request)]
    started = [(message.id, message.attempt, message.worker) for _, message in said if isinstance(message, Started)]
    assert started == requests


def kinds(said: list[Said]) -> list[tuple[str, str]]:
    """Reduce what was said to receivers and commands: `("ann", "ERROR busy")`.

    STARTED is left out: it goes with every REQUEST, as the stage checks.
    """
    found = []
    for to, message in said:
        if isinstance(message, Started):
            continue
        code = getattr(message, "code", None) or getattr(message, "reason", None)
        text = message.command.name + (f" {getattr(code, 'value', code)}" if code is not None else "")
        found.append((to, text))
    return found
