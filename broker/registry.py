"""Sessions of clients and workers, and which worker serves which model. Knows nothing of dispatch or of messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..protocol.liveness import Liveness
from ..protocol.messages import Load, ModelInfo, Ready, WorkerState
from .requests import RequestRecord


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    """What is common to clients and workers.

    Attributes:
        peer: the ROUTER's routing id of the connection.
        liveness: heartbeat bookkeeping.
        sent: messages sent to the peer in this session.
        received: messages received from it in this session.
    """

    peer: bytes
    liveness: Liveness
    sent: int = 0
    received: int = 1


@dataclass(slots=True, eq=False, kw_only=True)
class ClientSession(Session):
    """A client.

    Attributes:
        name: what it calls itself, for people.
        route: what workers put into the header of CHUNKS for it.
        requests: its requests that have no answer yet, by id: of each only the latest attempt is alive.
    """

    name: str
    route: bytes
    requests: dict[bytes, RequestRecord] = field(default_factory=dict)

    @property
    def share(self) -> str:
        """Whose share of the workers its requests count to: those of one name have one together."""
        return self.name or self.peer.hex()


@dataclass(slots=True, eq=False)
class RouteHold:
    """That a worker holds `count` requests of a client: as long as it does, its CHUNKS for it pass.

    `client` is None once the client has gone.
    """

    client: ClientSession | None
    count: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class WorkerSession(Session):
    """A worker.

    Attributes:
        name: the worker's name.
        incarnation: which start of it.
        ready: its last READY: models, slots, speed.
        reported: its last load report.
        draining: it wants no more requests.
        in_flight: submissions of this broker that it holds, by their key; each charges a slot unless it is parked.
        parked: how many of them are parked.
        routes: clients that it may send to, by their route.
        last_used: number of the last dispatch to it.
    """

    name: str
    incarnation: int
    ready: Ready
    reported: Load
    draining: bool = False
    in_flight: dict[bytes, RequestRecord] = field(default_factory=dict)
    parked: int = 0
    routes: dict[bytes, RouteHold] = field(default_factory=dict)
    last_used: int = 0

    @property
    def others(self) -> int:
        """Requests of other brokers at the worker, as last reported."""
        return max(0, self.reported.running + self.reported.waiting - self.reported.held)

    @property
    def load(self) -> int:
        """Requests at the worker: our own, exact, and those of others, as old as the last heartbeat."""
        return len(self.in_flight) - self.parked + self.others

    @property
    def speed(self) -> float:
        """Relative weight, as the worker states it."""
        return self.ready.speed or 1.0

    @property
    def state(self) -> WorkerState:
        """What the worker can do."""
        return WorkerState.DRAINING if self.draining else self.reported.state

    def resumes(self, model: str) -> bool:
        """Tell whether the worker can continue what another one has begun with the model, as far as it is known.

        A worker that is loading has told no more than names: what waits for it is not to fail before it says more.
        Nor is it to fail because a worker leaves, loaded or not: when that is gone, there is another one or none.
        """
        if self.state in (WorkerState.LOADING, WorkerState.DRAINING):
            return any(info.name == model for info in self.ready.models)
        return any(info.resumes for info in self.ready.models if info.name == model)

    @property
    def free(self) -> int:
        """Slots that the broker may fill now."""
        if self.draining or self.reported.state is not WorkerState.READY:
            return 0
        return max(0, self.ready.slots - self.load)

    def charge(self, record: RequestRecord) -> None:
        """Give the worker the request: take a slot and open the way back to the client."""
        self.in_flight[record.key] = record
        hold = self.routes.setdefault(record.route, RouteHold(record.client))
        hold.count += 1

    def close_route(self, client: ClientSession) -> None:
        """Let no more CHUNKS pass to a client that has gone."""
        hold = self.routes.get(client.route)
        if hold is not None:
            hold.client = None

    def park(self, record: RequestRecord) -> None:
        """Free the slot of a request that stays."""
        if not record.parked:
            record.parked = True
            self.parked += 1

    def release(self, record: RequestRecord) -> None:
        """Free the slot; close the way back to the client when this was its last request here."""
        del self.in_flight[record.key]
        self.parked -= record.parked
        hold = self.routes[record.route]
        hold.count -= 1
        if hold.count == 0:
            del self.routes[record.route]


class Registry:
    """All workers: by connection, by name, by model."""

    def __init__(self) -> None:
        """Make an empty registry."""
        self.by_peer: dict[bytes, WorkerSession] = {}
        self.by_name: dict[str, WorkerSession] = {}
        self._by_model: dict[str, dict[bytes, WorkerSession]] = {}

    def __iter__(self) -> Iterator[WorkerSession]:
        """Iterate over the workers in the order of their registration."""
        return iter(list(self.by_peer.values()))

    def __len__(self) -> int:
        """Return the number of workers."""
        return len(self.by_peer)

    def add(self, worker: WorkerSession) -> None:
        """Register a worker; its name must be free."""
        assert worker.name not in self.by_name
        self.by_peer[worker.peer] = worker
        self.by_name[worker.name] = worker
        self._index(worker, worker.ready.models)

    def update(self, worker: WorkerSession, ready: Ready) -> None:
        """Take over the models, slots and speed of a READY that came within the session."""
        self._unindex(worker)
        worker.ready = ready
        self._index(worker, ready.models)

    def remove(self, worker: WorkerSession) -> None:
        """Forget a worker."""
        self._unindex(worker)
        del self.by_peer[worker.peer]
        del self.by_name[worker.name]

    def models(self) -> list[str]:
        """Return the names of all models that are served, sorted."""
        return sorted(self._by_model)

    def serves(self, model: str) -> bool:
        """Tell whether any worker serves the model, in whatever state it is."""
        return model in self._by_model

    def serving(self, model: str) -> Iterable[WorkerSession]:
        """Return the workers of a model."""
        return self._by_model.get(model, {}).values()

    def resuming(self, model: str) -> list[WorkerSession]:
        """Return the workers of a model that can continue what another one has begun."""
        return [worker for worker in self.serving(model) if worker.resumes(model)]

    def validate(self) -> None:
        """Check that the three views agree.

        Raises:
            AssertionError: they do not.
        """
        assert {worker.name for worker in self.by_peer.values()} == set(self.by_name)
        for model, workers in self._by_model.items():
            assert workers, f"{model} is listed without workers"
            for peer, worker in workers.items():
                assert self.by_peer.get(peer) is worker
                assert any(info.name == model for info in worker.ready.models)
        for peer, worker in self.by_peer.items():
            assert worker.peer == peer
            assert self.by_name[worker.name] is worker
            assert all(peer in self._by_model[info.name] for info in worker.ready.models)

    def _index(self, worker: WorkerSession, models: Iterable[ModelInfo]) -> None:
        for info in models:
            self._by_model.setdefault(info.name, {})[worker.peer] = worker

    def _unindex(self, worker: WorkerSession) -> None:
        for info in worker.ready.models:
            # A worker may list a name twice; the second look finds nothing.
            workers = self._by_model.get(info.name, {})
            workers.pop(worker.peer, None)
            if not workers:
                self._by_model.pop(info.name, None)
