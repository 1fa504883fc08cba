"""Sessions of clients and workers, and which worker serves which model. Knows nothing of requests that wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..protocol.identity import Identity
from ..protocol.limits import SLOWEST_TOKENS_PER_S
from ..protocol.liveness import Liveness
from ..protocol.messages import Load, Ready, WorkerState
from .accounts import ClientAccount, KeyedWorker
from .breaker import Breaker
from .dispatch import Policy
from .limits import UNLIMITED
from .meters import Refusals, Strays, TokenBucket
from .pool import Place, Pool
from .requests import RequestRecord, key_of
from .speed import Speed

#: How often a worker may tell that it serves many models, a second and at once: to read the READY of a thousand takes
#: some milliseconds, in which all others wait.
READY_PER_S = 2
READY_BURST = 10
#: Requests that wait inside a worker because its cache is full weigh so much more the fuller it is above a half:
#: vLLM's own balancer uses these figures.
_CACHE_WEIGHT = 6.0
_CACHE_USE = 0.5
#: What workers usually do is taken anew for those that were not measured when it has changed by this part.
_USUAL_CHANGE = 0.1
_READY = WorkerState.READY  # a member by its class takes 150 ns in Python 3.11


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    """What is common to clients and workers.

    Attributes:
        peer: the ROUTER's routing id of the connection.
        liveness: heartbeat bookkeeping.
        identity: who its key says it is; None where the broker has no keys.
        sent: messages sent to the peer in this session.
        received: messages received from it in this session.
    """

    peer: bytes
    liveness: Liveness
    identity: Identity | None = None
    sent: int = 0
    received: int = 1


@dataclass(slots=True, eq=False, kw_only=True)
class ClientSession(Session):
    """A client.

    Attributes:
        name: what its key is called, or where there are no keys, what it calls itself.
        route: what workers put into the header of CHUNKS for it.
        account: what it may do, and has under way; that of all sessions with its key.
        refusals: how often it may be refused. A session's own: of many with one key, one may be broken.
        direct: it takes chunks from workers itself, where these offer it.
        requests: its submissions that have no answer yet, by key.
        attempts: the same by the request's id: one, or two where the client hedges.
    """

    name: str
    route: bytes
    account: ClientAccount = field(default_factory=lambda: ClientAccount(UNLIMITED))
    refusals: Refusals = field(default_factory=lambda: Refusals(UNLIMITED))
    direct: bool = False
    requests: dict[bytes, RequestRecord] = field(default_factory=dict)
    attempts: dict[bytes, list[RequestRecord]] = field(default_factory=dict)

    def add(self, record: RequestRecord) -> None:
        """Note a submission."""
        self.requests[record.key] = record
        self.account.open += 1
        alive = self.attempts.get(record.id)
        if alive is None:
            self.attempts[record.id] = [record]
        else:
            alive.append(record)

    def drop(self, record: RequestRecord) -> None:
        """Forget a submission: it is answered, or nobody waits for the answer."""
        del self.requests[record.key]
        self.account.open -= 1
        alive = self.attempts[record.id]
        alive.remove(record)
        if not alive:
            del self.attempts[record.id]

    def find(self, id: bytes, attempt: int) -> RequestRecord | None:
        """Return a submission that has no answer yet."""
        return self.requests.get(key_of(id, attempt))

    @property
    def share(self) -> str:
        """Whose share of the workers its requests count to: those of one name have one together."""
        # Never by the routing id: whoever knows another peer's could take its place (SECURITY.md).
        return self.name or f"#{int.from_bytes(self.route, 'big')}"


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
        account: what it may do; that of all workers with its key.
        strays: how many CHUNKS it may send of requests that it does not hold.
        readies: how often it may say what it serves.
        incarnation: which start of it.
        ready: its last READY: models, slots, speed.
        reported: its last load report; `report` takes a new one.
        others: requests of other brokers at the worker, as last reported.
        drag: what slows its engine down, as last reported, in requests.
        draining: it wants no more requests.
        in_flight: submissions of this broker that it holds, by their key; each charges a slot unless it is parked.
        parked: how many of them are parked.
        outstanding_tokens: what those that are not may cost at most.
        routes: clients that it may send to, by their route.
        last_used: number of the last dispatch to it.
        breaker: suspends it when its engine fails again and again.
        held: an operator lets it get no new requests.
        measured: its speed as its finished requests tell it.
        speed_set: its speed as an operator has set it; None where none has.
        speed: what is reckoned with: set by an operator, told by the worker, measured, or usual, in this order. The
            registry keeps it up to date.
        place: where it stands in the pool.
    """

    name: str
    incarnation: int
    ready: Ready
    reported: Load
    strays: Strays = field(default_factory=lambda: Strays(UNLIMITED))
    readies: TokenBucket = field(default_factory=lambda: TokenBucket(READY_PER_S, READY_BURST))
    account: KeyedWorker = field(default_factory=lambda: KeyedWorker(UNLIMITED))
    draining: bool = False
    in_flight: dict[bytes, RequestRecord] = field(default_factory=dict)
    parked: int = 0
    outstanding_tokens: int = 0
    routes: dict[bytes, RouteHold] = field(default_factory=dict)
    last_used: int = 0
    breaker: Breaker = field(default_factory=Breaker)
    held: bool = False
    others: int = field(init=False)
    drag: float = field(init=False)
    measured: Speed = field(default_factory=Speed)
    speed_set: float | None = None
    speed: float = 1.0
    place: Place = field(default_factory=Place)

    def __post_init__(self) -> None:
        """Take the first report."""
        self.report(self.reported)

    def report(self, load: Load) -> None:
        """Take a load report. What follows from it alone is computed here, and not with each decision."""
        self.reported = load
        self.others = max(0, load.running + load.waiting - load.held)
        crowded = _CACHE_WEIGHT * load.waiting * max(0.0, load.kv_use - _CACHE_USE)
        # A long step is one that others wait for: a second of it is taken for a request.
        self.drag = crowded + load.step_age_s

    @property
    def load(self) -> int:
        """Requests at the worker: our own, exact, and those of others, as old as the last heartbeat."""
        return len(self.in_flight) - self.parked + self.others

    @property
    def slots(self) -> int:
        """Requests that it runs at a time."""
        return self.ready.slots

    @property
    def cost(self) -> float:
        """What one more request would find: the queue with itself, and what slows the engine, over its speed."""
        return (len(self.in_flight) - self.parked + self.others + 1 + self.drag) / self.speed

    @property
    def is_broker(self) -> bool:
        """It is a broker that has registered here with its own workers behind it."""
        return bool(self.ready.brokers)

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
    def takes_requests(self) -> bool:
        """Whether it may get requests when it has a free slot."""
        return self.reported.state is _READY and not (self.draining or self.held)

    @property
    def free(self) -> int:
        """Slots that the broker may fill now, its breaker aside."""
        return max(0, self.ready.slots - self.load) if self.takes_requests else 0

    def charge(self, record: RequestRecord) -> None:
        """Give the worker the request: take a slot and open the way back to the client."""
        self.in_flight[record.key] = record
        self.breaker.given(record.key)
        self.outstanding_tokens += record.cost_tokens
        hold = self.routes.get(record.route)
        if hold is None:
            hold = self.routes[record.route] = RouteHold(record.client)
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
            self.breaker.freed(record.key)
            self.outstanding_tokens -= record.cost_tokens

    def release(self, record: RequestRecord) -> None:
        """Free the slot; close the way back to the client when this was its last request here."""
        del self.in_flight[record.key]
        self.breaker.freed(record.key)
        if record.parked:
            self.parked -= 1
        else:
            self.outstanding_tokens -= record.cost_tokens
        hold = self.routes[record.route]
        hold.count -= 1
        if hold.count == 0:
            del self.routes[record.route]


class Registry:
    """All workers: by connection, by name, by model.

    Attributes:
        pool: those that may get requests, ready for dispatch.
    """

    def __init__(self, policy: Policy) -> None:
        """Make an empty registry."""
        self.by_peer: dict[bytes, WorkerSession] = {}
        self.by_name: dict[str, WorkerSession] = {}
        self.pool = Pool(policy)
        #: What operators have ordered, by the worker's name: it holds for whoever registers under it.
        self.held: set[str] = set()
        self.speeds: dict[str, float] = {}
        #: Of the workers that were measured: how many there are, the sum of their speeds, and the average as it was
        #: taken last.
        self._measured = 0
        self._measured_sum = 0.0
        self._usual: float | None = None

    def __iter__(self) -> Iterator[WorkerSession]:
        """Iterate over the workers in the order of their registration."""
        return iter(list(self.by_peer.values()))

    def __len__(self) -> int:
        """Return the number of workers."""
        return len(self.by_peer)

    def add(self, worker: WorkerSession, now: float) -> None:
        """Register a worker; its name must be free."""
        assert worker.name not in self.by_name
        self.by_peer[worker.peer] = worker
        self.by_name[worker.name] = worker
        worker.held = worker.name in self.held
        worker.speed_set = self.speeds.get(worker.name)
        self._count_measured(worker, 1)
        self._reckon(worker, now)
        self.pool.join(worker)

    def update(self, worker: WorkerSession, ready: Ready, now: float) -> None:
        """Take over the models, slots and speed of a READY that came within the session."""
        self.pool.leave(worker)
        worker.ready = ready
        self._reckon(worker, now)
        self.pool.join(worker)

    def remove(self, worker: WorkerSession) -> None:
        """Forget a worker."""
        self.pool.leave(worker)
        del self.by_peer[worker.peer]
        del self.by_name[worker.name]
        self._count_measured(worker, -1)

    def changed(self, worker: WorkerSession, now: float) -> None:
        """Take note of a change of a worker's load, state, speed or breaker."""
        self._reckon(worker, now)
        self.pool.changed(worker)

    def measure(self, worker: WorkerSession, tokens: int, seconds: float, now: float) -> None:
        """Take what a finished request tells of its worker's speed."""
        before = worker.measured.measured
        worker.measured.measure(tokens, seconds, now)
        after = worker.measured.measured
        if after is None:
            return
        self._measured += before is None
        self._measured_sum += after - (before or 0.0)
        self._take_usual(now)

    def models(self) -> list[str]:
        """Return the names of all models that are served, sorted."""
        return sorted(self.pool.models())

    def serves(self, model: str) -> bool:
        """Tell whether any worker serves the model, in whatever state it is."""
        return bool(self.pool.groups(model))

    def serving(self, model: str) -> list[WorkerSession]:
        """Return the workers of a model."""
        return [worker for group in self.pool.groups(model) for worker in group.workers.values()]

    def may_resume(self, model: str) -> bool:
        """Tell whether any worker can continue what another one has begun with the model, as far as it is known."""
        if self.pool.groups(model, resuming=True):
            return True
        return any(worker.resumes(model) for worker in self.serving(model))

    def validate(self) -> None:
        """Check that the views agree.

        Raises:
            AssertionError: they do not.
        """
        assert {worker.name for worker in self.by_peer.values()} == set(self.by_name)
        for peer, worker in self.by_peer.items():
            assert worker.peer == peer
            assert self.by_name[worker.name] is worker
            group = worker.place.group
            assert group is not None
            assert group.workers.get(peer) is worker
            assert group.serves == {(info.name, info.resumes) for info in worker.ready.models}
        grouped = [worker for model in self.models() for worker in self.serving(model)]
        assert {worker.peer for worker in grouped} <= self.by_peer.keys()
        self.pool.validate()

    def _reckon(self, worker: WorkerSession, now: float) -> None:
        told = worker.speed_set or worker.ready.speed
        worker.speed = told or worker.measured.at(now, self._usual, tried=worker.last_used > 0)

    def _count_measured(self, worker: WorkerSession, sign: int) -> None:
        speed = worker.measured.measured
        if speed is not None:
            self._measured += sign
            self._measured_sum += sign * speed

    def _take_usual(self, now: float) -> None:
        """Take the usual speed anew where it differs, and rank those that are reckoned by it."""
        # Sums and differences of floats may come to less than any of them.
        before, usual = self._usual, max(SLOWEST_TOKENS_PER_S, self._measured_sum / self._measured)
        if before is not None and abs(usual - before) <= _USUAL_CHANGE * before:
            return
        self._usual = usual
        for worker in self.by_peer.values():
            self.changed(worker, now)
