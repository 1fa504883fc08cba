"""A cluster under a seeded schedule of work and faults, and what must hold in it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

from tokenmq.broker.breaker import State
from tokenmq.broker.dispatch import POLICIES
from tokenmq.broker.settings import BrokerSettings
from tokenmq.client.settings import Settings as ClientSettings
from tokenmq.worker.settings import WorkerSettings

from .broker import SimBroker
from .client import Reading, SimClient, Wish
from .door import Door
from .engine import MODEL
from .faults import Faults
from .kinds import kind_of
from .layout import Layout, knows_its_children, members, paths
from .net import Net, Node
from .rogue import Rogue
from .verdict import check_ends
from .worker import SimWorker

#: Once faults have stopped, whether everything is at rest is looked at this often.
_LOOK_S = 0.25
#: Simulated seconds in which everything must be at rest then: what is broken is noticed by expiry or timeout, and
#: what had to wait for it is read to its end. It takes 5 s as a rule, and half of this where work has piled up.
_CALM_S = 75.0
#: The part of the worlds in which chunks go past the broker, and of the workers and clients there that do so.
_DIRECT, _TAKES_PART = 0.5, 0.9
#: Faults of connections past the broker, in relation to others.
_DOOR_FAULTS = 1.5
#: So much more where readers pause.
_PAUSES_S = 65.0


class World:
    """One simulated cluster.

    Attributes:
        kind: what the schedule is like.
        net: clock, randomness and links.
        layout: which brokers there are, and which of them are below others.
        brokers: by endpoint.
        workers: all that ever were, dead ones too.
        clients: likewise.
        operators: a client of each broker that gives orders, by the broker's endpoint; nothing happens to them.
        faults: what goes wrong.
        reader_timeout_s: how long workers wait for readers.
        rogue: a program that talks nonsense; None where there is none.
        direct: workers and clients that may send and take chunks past the broker do; who may, is drawn.
        direct_random: randomness for all that concerns this.
    """

    def __init__(self, seed: int) -> None:
        self.kind = kind = kind_of(seed)
        self.random = random = Random(f"{seed} {kind.name}")
        delays_s = random.choice([(0.001,), (0.0005, 0.005), (0.0005, 0.002, 0.05, 0.15)])
        self.net = Net(random, random.choice(kind.loss), delays_s)
        self.clock = self.net.clock
        # By numbers of their own, so that the rest of a schedule is the same with them and without.
        self.direct_random = Random(f"{seed} direct")
        self.direct = self.direct_random.random() < _DIRECT
        # A broker that is younger than its expiry says that workers may be back soon: where no stream may fail, that
        # must be longer than they need.
        heartbeat_s, expiry_s = random.choice([(0.5, 6.0), (1.0, 5.0)] if kind.sure else [(0.3, 0.9), (1.0, 5.0)])
        self._step_s = random.choice([0.02, 0.05, 0.1])
        #: Shorter than a reader's longest pause, and far longer than any fault that heals soon.
        self.reader_timeout_s = random.choice([20.0, 600.0])
        self.brokers: dict[str, SimBroker] = {}
        self.layout = Layout.of(kind, random)
        max_waiting = random.choice([2, 50])
        for endpoint, name in self.layout.names.items():
            settings = BrokerSettings(
                name=name, heartbeat_s=heartbeat_s, expiry_s=expiry_s, max_waiting=max_waiting,
                policy=random.choice(sorted(POLICIES)), uplinks=self.layout.uplinks[endpoint],
                client_weights={"sim": random.choice([1.0, 3.0])}, group=random.choice(["", "group"]),
            )  # fmt: skip
            self.brokers[endpoint] = SimBroker(self.net, self.brokers, endpoint, settings)
        self.workers: list[SimWorker] = []
        self.clients: list[SimClient] = []
        homes = self.layout.homes_of_workers(random, 2 if kind.rolling else 1)
        self._worker_count = len(homes)
        for number, home in enumerate(homes):
            self.add_worker(f"worker-{number}", home, slots=random.randint(1, 5))
        for _ in range(random.randint(1, 2)):
            self.add_client()
        self.operators = {
            endpoint: SimClient(self.net, self.brokers, ClientSettings((endpoint,), name="operator"))
            for endpoint in self.brokers
        }
        self.begin = self.clock.now
        self.end = self.begin + random.uniform(*kind.busy_s)
        self.faults = Faults(self)
        self.rogue = (
            Rogue(self.net, self.brokers, self._open_ids, self.end) if random.random() < kind.rogues else None
        )

    def run(self) -> None:
        """Work and faults, then calm until all is at rest; then nothing may be left."""
        self._plan()
        self.clock.run_until(self.end)
        while self.faults.rolling and self.clock.now < self.end + _CALM_S:
            self.clock.run_until(self.clock.now + _LOOK_S)
        self.faults.heal()
        until = self.clock.now + _CALM_S + (_PAUSES_S if self.kind.slow_readers else 0.0)
        while not self.at_rest() and self.clock.now < until:
            self.faults.repair()
            self.clock.run_until(self.clock.now + _LOOK_S)
        self.check_rest()
        check_ends(self)

    def nodes(self) -> list[Node]:
        """Return all nodes that live."""
        return [node for node in (*self.brokers.values(), *self.workers, *self.clients) if node.alive]

    def add_worker(self, name: str, home: tuple[str, ...], *, slots: int) -> None:
        """Start a worker process that registers at these brokers."""
        settings = WorkerSettings(
            brokers=home, models=(MODEL,), name=name, slots=slots, speed=self.random.choice([None, None, 1.0, 20.0]),
            stall_after_s=self.random.choice([2.0, 30.0]), reader_timeout_s=self.reader_timeout_s,
            direct=f"tcp://10.0.0.1:{len(self.workers) + 1}" if self._takes_part() else "", insecure=True,
        )  # fmt: skip
        resumes = self.kind.sure or self.random.random() < 0.85
        load_s = self.random.uniform(0, 1)
        worker = SimWorker(self.net, self.brokers, settings, resumes=resumes, step_s=self._step_s, load_s=load_s)
        worker.exited = self._exited
        self.workers.append(worker)

    def replace(self, worker: SimWorker) -> None:
        """Start a process that takes a worker's place."""
        self.add_worker(worker.name, worker.settings.brokers, slots=worker.settings.slots)

    def _exited(self, worker: SimWorker) -> None:
        # As a supervisor does. One that was superseded has its successor already.
        if worker.exit_code == 0:
            self.clock.after(self.random.uniform(0.05, 0.5), self.replace, worker)

    def add_client(self) -> None:
        """Start a client process."""
        endpoints, name = self.layout.home_of_client(self.random), self.random.choice(["sim", "other"])
        if self.kind.sure:
            settings = ClientSettings(
                endpoints, name=name, connect_timeout_s=60.0, recovery_timeout_s=600.0, max_attempts=10_000,
                first_token_timeout_s=3.0, inter_token_timeout_s=1.5,
            )  # fmt: skip
        else:
            settings = ClientSettings(
                endpoints,
                name=name,
                connect_timeout_s=self.random.choice([0.5, 5.0]),
                recovery_timeout_s=self.random.choice([2.0, 30.0]),
                max_attempts=self.random.choice([1, 3, 16]),
                queue_timeout_s=self.random.choice([None, 2.0]),
                first_token_timeout_s=self.random.choice([None, 3.0]),
                inter_token_timeout_s=self.random.choice([None, 1.5]),
            )
        if self._takes_part():
            settings = replace(settings, direct=("10.0.0.0/8",))
        self.clients.append(SimClient(self.net, self.brokers, settings))

    def _takes_part(self) -> bool:
        return self.direct and self.direct_random.random() < _TAKES_PART

    def host(self, endpoint: str) -> SimBroker | Door:
        """Return who listens at an endpoint."""
        return self.brokers.get(endpoint) or self.net.doors[endpoint]

    # Work.

    def _plan(self) -> None:
        seconds = self.end - self.begin
        for _ in range(max(1, round(seconds * self.kind.requests))):
            when = self.random.uniform(self.begin, self.end)
            self.clock.at(when, self._submit)
            if self.random.random() < 0.1:
                self.clock.at(self.random.uniform(when, self.end), self._cancel)
            if self.random.random() < 0.1:
                self.clock.at(self.random.uniform(self.begin, self.end), self._ask)
        for _ in range(round(seconds * self.kind.faults)):
            self.clock.at(self.random.uniform(self.begin, self.end), self.faults.strike)
        for _ in range(round(seconds * self.kind.faults * _DOOR_FAULTS) if self.direct else 0):
            self.clock.at(self.direct_random.uniform(self.begin, self.end), self.faults.strike_door)
        if self.kind.rolling:
            self.clock.after(self.random.uniform(0.5, 1.5), self.faults.roll)

    def _living_client(self) -> SimClient:
        return self.random.choice([client for client in self.clients if client.alive and not client.core.closed])

    def _submit(self) -> None:
        client = self._living_client()
        for _ in range(self.random.choice([1, 1, 1, 4])):
            client.submit(self._wish())

    def _wish(self) -> Wish:
        random = self.random
        slow = self.kind.slow_readers and random.random() < 0.25
        return Wish(
            max_tokens=random.randint(1, 30),
            seed=random.getrandbits(30),
            window=random.choice([1, 2, 8, 64]),
            read_s=random.choice([0.0, 0.01, 0.3]),
            stops_at=random.randint(0, 20) if slow else math.inf,
            pause_s=random.choice([3.0, 60.0, math.inf] if self.reader_timeout_s < 60.0 else [3.0, 60.0]),
            deadline_s=random.choice([None, None, None, None, 0.2, 5.0]),
            resume=self.kind.sure or random.random() < 0.85,
            hedge_after_s=random.choice([None, None, 0.05, 0.5]),
            priority=random.choice([0, 5, 5, 9]),
            affinity=random.choice(["", "", "a", "b"]),
            logprobs=random.choice([None, None, 0]),
            texts=random.choice([0, 0, 0, 0, 0, 6]),
        )

    def _cancel(self) -> None:
        client = self._living_client()
        if client.open_readings:
            client.cancel(self.random.choice(list(client.open_readings)))

    def _ask(self) -> None:
        """Ask or order something that does no harm, whatever happens meanwhile."""
        random, client = self.random, self._living_client()
        worker = random.choice(list(paths(self, client.settings.endpoints[0])))
        questions: list[tuple[str, dict[str, Any]]] = [
            ("models", {}),
            ("workers", {"tree": random.random() < 0.5}),
            ("status", {"tree": random.random() < 0.5}),
            ("route", {"model": MODEL, "affinity": random.choice(["", "a"])}),
            ("refresh", {}),
            ("set_policy", {"policy": random.choice(sorted(POLICIES))}),
            ("set_speed", {"worker": worker, "speed": random.choice([None, 0.01, 1.0, 100.0])}),
        ]
        method, arguments = random.choice(questions)
        client.ask(method, **arguments)

    def _open_ids(self) -> list[bytes]:
        return [key for client in self.clients for key in client.open_readings]

    # Rest.

    def all_found(self) -> bool:
        """Tell whether every broker runs and has every worker that lives, and no worker is missing."""
        names = [worker.name for worker in self.workers if worker.alive]
        if len(names) != self._worker_count or len(set(names)) != self._worker_count:
            return False  # one is down, or its successor has not met it yet
        return all(
            broker.alive
            and {worker.name: worker.incarnation for worker in broker.core.registry} == members(self, broker)
            for broker in self.brokers.values()
        )

    def at_rest(self) -> bool:
        """Tell whether nothing is under way any more, and everybody has found everybody."""
        if any(client.open_readings or client.asked for client in self.clients if client.alive):
            return False
        if any(operator.asked for operator in self.operators.values()):
            return False
        if not self.all_found():
            return False
        for broker in self.brokers.values():
            exchange = broker.core.exchange
            # The only timers left are those of workers that are suspended: they must run out.
            if exchange.records or exchange.next_deadline() is not None or broker.core.registry.held:
                return False
            if not knows_its_children(broker) or not all(worker.free for worker in broker.core.registry):
                return False
        return not any(worker.runs or len(worker.core._streams) for worker in self.workers if worker.alive)

    def check_rest(self) -> None:
        """Check that everything has ended, and that nothing is held anywhere."""
        for client in self.clients:
            if client.alive:
                late = [self.clock.now - reading.submitted_at for reading in client.open_readings.values()]
                assert not late, f"no end {late[0]:.1f} s after it was asked for"
                assert not client.asked, "a question without an answer"
                assert client.core._exchange.next_deadline() is None, "a timer is left"
        for broker in self.brokers.values():
            assert broker.alive, "a broker is not back"
            assert broker.core.exchange.tally() == {"waiting": 0, "running": 0, "orphaned": 0}
            assert broker.core.exchange.next_deadline() is None, "a timer is left"
            assert broker.core.management.next_deadline() is None, "a question is left"
            assert all(not worker.in_flight and not worker.routes for worker in broker.core.registry)
            assert not broker.core.uplink.guests(), "a guest is left"
            assert knows_its_children(broker), "a broker does not know what is below it"
            for worker in broker.core.registry:
                assert worker.breaker.state is not State.OPEN, f"{worker.name} is suspended for ever"
                assert worker.free > 0, f"{worker.name} would get nothing: {worker}"
        for worker in self.workers:
            if worker.alive:
                assert not worker.runs, "a job is left in an engine"
                assert len(worker.core._streams) == 0, "a worker still holds a request"
        assert self.all_found(), "not every worker is registered with every broker"

    def readings(self) -> list[Reading]:
        """Return all streams, also those of clients that were killed."""
        return [reading for client in self.clients for reading in client.readings.values()]

    def tally(self) -> Counter[str]:
        """Return what happened: streams by how they ended, faults by name, resumes."""
        sums = Counter(self.faults.struck)
        for broker in self.brokers.values():
            sums["suspensions"] += broker.core.counters.workers_suspended  # since its last start
        for client in self.clients:
            sums["resumes"] += client.resumes
            for hedge in client.hedges:
                sums["hedges " + ("cancelled" if hedge.cancelled else "failed" if hedge.error else "won")] += 1
            for reading in client.readings.values():
                outcome = reading.outcome
                sums["attempts direct"] += sum(attempt.direct for attempt in reading.attempts)
                sums["attempts below"] += sum("/" in attempt.worker for attempt in reading.attempts)
                sums["streams"] += 1
                sums["unread" if outcome is None else getattr(outcome, "code", None) or outcome.reason.value] += 1
        return sums
