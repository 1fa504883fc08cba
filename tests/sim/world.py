"""A cluster under a seeded schedule of work and faults, and what must hold in it."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

from tokenmq.broker.settings import BrokerSettings
from tokenmq.client.settings import Settings as ClientSettings
from tokenmq.worker.settings import WorkerSettings

from .broker import SimBroker
from .client import Reading, SimClient, Wish
from .engine import MODEL
from .faults import Faults
from .kinds import kind_of
from .net import Net, Node
from .verdict import check_ends
from .worker import SimWorker

#: Once faults have stopped, whether everything is at rest is looked at this often.
_LOOK_S = 0.25
#: Simulated seconds in which everything must be at rest then: what is broken is noticed by expiry or timeout, the
#: slowest reader pauses for a minute, and then reads the rest.
CALM_S = 150.0


class World:
    """One simulated cluster.

    Attributes:
        kind: what the schedule is like.
        net: clock, randomness and links.
        brokers: by endpoint.
        workers: all that ever were, dead ones too.
        clients: likewise.
        faults: what goes wrong.
    """

    def __init__(self, seed: int) -> None:
        self.kind = kind = kind_of(seed)
        self.random = random = Random(f"{seed} {kind.name}")
        delays_s = random.choice([(0.001,), (0.0005, 0.005), (0.0005, 0.002, 0.05, 0.15)])
        self.net = Net(random, random.choice(kind.loss), delays_s)
        self.clock = self.net.clock
        # A broker that is younger than its expiry says that workers may be back soon: where no stream may fail, that
        # must be longer than they need.
        heartbeat_s, expiry_s = random.choice([(0.5, 6.0), (1.0, 5.0)] if kind.sure else [(0.3, 0.9), (1.0, 5.0)])
        self._broker_settings = BrokerSettings(
            heartbeat_s=heartbeat_s,
            expiry_s=expiry_s,
            max_waiting=random.choice([2, 50]),
            policy=random.choice(["shortest-queue", "lottery"]),
        )
        self._step_s = random.choice([0.02, 0.06, 0.2])
        self.brokers: dict[str, SimBroker] = {}
        for number in range(random.choice(kind.brokers)):
            name = f"tcp://broker-{number}:1"
            self.brokers[name] = SimBroker(self.net, name, self._broker_settings)
        self.workers: list[SimWorker] = []
        self.clients: list[SimClient] = []
        self._worker_count = random.randint(2 if kind.rolling else 1, 3)
        for number in range(self._worker_count):
            self.add_worker(f"worker-{number}", slots=random.randint(1, 5))
        for _ in range(random.randint(1, 2)):
            self.add_client()
        self.begin = self.clock.now
        self.end = self.begin + random.uniform(*kind.busy_s)
        self.faults = Faults(self)

    def run(self) -> None:
        """Work and faults, then calm until all is at rest; then nothing may be left."""
        self._plan()
        self.clock.run_until(self.end)
        while self.faults.rolling and self.clock.now < self.end + CALM_S:
            self.clock.run_until(self.clock.now + _LOOK_S)
        self.faults.heal()
        until = self.end + CALM_S
        while not self.at_rest() and self.clock.now < until:
            self.clock.run_until(self.clock.now + _LOOK_S)
        self.check_rest()
        check_ends(self)

    def nodes(self) -> list[Node]:
        """Return all nodes that live."""
        return [node for node in (*self.brokers.values(), *self.workers, *self.clients) if node.alive]

    def add_worker(self, name: str, *, slots: int) -> None:
        """Start a worker process."""
        settings = WorkerSettings(
            brokers=tuple(self.brokers), models=(MODEL,), name=name, slots=slots,
            stall_after_s=self.random.choice([2.0, 30.0]),
        )  # fmt: skip
        resumes = self.kind.sure or self.random.random() < 0.85
        load_s = self.random.uniform(0, 1)
        worker = SimWorker(self.net, self.brokers, settings, resumes=resumes, step_s=self._step_s, load_s=load_s)
        self.workers.append(worker)

    def add_client(self) -> None:
        """Start a client process."""
        endpoints = tuple(self.random.sample(list(self.brokers), len(self.brokers)))
        if self.kind.sure:
            settings = ClientSettings(
                endpoints, name="sim", connect_timeout_s=60.0, max_attempts=10_000,
                first_token_timeout_s=3.0, inter_token_timeout_s=1.5,
            )  # fmt: skip
        else:
            settings = ClientSettings(
                endpoints,
                name="sim",
                connect_timeout_s=self.random.choice([0.5, 5.0]),
                max_attempts=self.random.choice([1, 3, 16]),
                queue_timeout_s=self.random.choice([None, 2.0]),
                first_token_timeout_s=self.random.choice([None, 3.0]),
                inter_token_timeout_s=self.random.choice([None, 1.5]),
            )
        self.clients.append(SimClient(self.net, self.brokers, settings))

    # Work.

    def _plan(self) -> None:
        seconds = self.end - self.begin
        for _ in range(max(1, round(seconds * self.kind.requests))):
            when = self.random.uniform(self.begin, self.end)
            self.clock.at(when, self._submit)
            if self.random.random() < 0.1:
                self.clock.at(self.random.uniform(when, self.end), self._cancel)
        for _ in range(round(seconds * self.kind.faults)):
            self.clock.at(self.random.uniform(self.begin, self.end), self.faults.strike)
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
        slow = self.kind.slow_readers and random.random() < 0.1
        return Wish(
            max_tokens=random.randint(1, 30),
            seed=random.getrandbits(30),
            window=random.choice([1, 2, 8, 64]),
            read_s=random.choice([0.0, 0.01, 0.3]),
            stops_at=random.randint(0, 20) if slow else math.inf,
            pause_s=random.choice([3.0, 60.0]),
            deadline_s=random.choice([None, None, None, None, 0.2, 5.0]),
            resume=self.kind.sure or random.random() < 0.85,
        )

    def _cancel(self) -> None:
        client = self._living_client()
        if client.open_readings:
            client.cancel(self.random.choice(list(client.open_readings)))

    # Rest.

    def all_found(self) -> bool:
        """Tell whether every broker runs and has every worker that lives, and no worker is missing."""
        workers = {worker.name for worker in self.workers if worker.alive}
        return len(workers) == self._worker_count and all(
            broker.alive and {worker.name for worker in broker.core.registry} == workers
            for broker in self.brokers.values()
        )

    def at_rest(self) -> bool:
        """Tell whether nothing is under way any more, and everybody has found everybody."""
        if any(client.open_readings for client in self.clients if client.alive) or not self.all_found():
            return False
        if any(broker.core.exchange.records for broker in self.brokers.values()):
            return False
        return not any(worker.runs or len(worker.core._streams) for worker in self.workers if worker.alive)

    def check_rest(self) -> None:
        """Check that everything has ended, and that nothing is held anywhere."""
        for client in self.clients:
            if client.alive:
                for reading in client.open_readings.values():
                    raise AssertionError(
                        f"no end {self.clock.now - reading.submitted_at:.1f} s after it was asked for"
                    )
        alive = {worker.name for worker in self.workers if worker.alive}
        for broker in self.brokers.values():
            assert broker.alive, "a broker is not back"
            assert broker.core.exchange.tally() == {"waiting": 0, "running": 0, "orphaned": 0}
            assert all(not worker.in_flight and not worker.routes for worker in broker.core.registry)
            assert {worker.name for worker in broker.core.registry} == alive, "a live worker is not registered"
        for worker in self.workers:
            if worker.alive:
                assert not worker.runs, "a job is left in an engine"
                assert len(worker.core._streams) == 0, "a worker still holds a request"

    def readings(self) -> list[Reading]:
        """Return all streams, also those of clients that were killed."""
        return [reading for client in self.clients for reading in client.readings.values()]

    def tally(self) -> Counter[str]:
        """Return what happened: streams by how they ended, faults by name, resumes."""
        sums = Counter(self.faults.struck)
        for client in self.clients:
            sums["resumes"] += client.resumes
            for reading in client.readings.values():
                outcome = reading.outcome
                sums["streams"] += 1
                sums["unread" if outcome is None else getattr(outcome, "code", None) or outcome.reason.value] += 1
        return sums
