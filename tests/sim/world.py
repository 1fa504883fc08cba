"""A cluster under a seeded schedule of work and faults, and what must hold in it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tokenmq.client.events import Ending
from tokenmq.protocol.errors import TokenmqError

from .net import Clock
from .nodes import SimBroker, SimClient, SimWorker

#: Simulated seconds in which requests are made and faults happen.
BUSY_S = 60.0
#: Simulated seconds in which everything must have ended once faults have stopped: the longest engine step, the
#: expiry, and the slowest reader of the longest stream.
CALM_S = 120.0


class World:
    """One simulated cluster."""

    def __init__(self, seed: int, *, faults: bool) -> None:
        self.random = Random(seed)
        self.faults = faults
        self.clock = Clock()
        loss = self.random.choice([0.0, 0.0, 0.001]) if faults else 0.0
        self._loss = loss
        names = [f"tcp://broker-{number}:1" for number in range(self.random.choice([1, 1, 2]) if faults else 1)]
        self.brokers = {name: SimBroker(self.clock, self.random, name) for name in names}
        self.workers: list[SimWorker] = []
        self.clients: list[SimClient] = []
        for _ in range(self.random.randint(1, 3)):
            self._add_worker()
        for _ in range(self.random.randint(1, 3)):
            self.clients.append(SimClient(self.clock, self.random, self.brokers, loss))
        self._end = self.clock.now + BUSY_S

    def run(self) -> None:
        """Work and faults, then calm; then nothing may be left."""
        self._repeat(0.4, self._submit)
        self._repeat(2.0, self._cancel)
        if self.faults:
            self._repeat(3.0, self._fault)
        self.clock.run_until(self._end)
        self._heal()
        self.clock.run_until(self._end + CALM_S)
        self.check_rest()

    def check_rest(self) -> None:
        """Check that everything has ended, and that nothing is held anywhere."""
        for client in self.clients:
            for reading in client.readings.values():
                if client.alive:
                    assert reading.outcome is not None, (
                        f"no end {self.clock.now - reading.submitted_at:.1f} s after it"
                    )
        for broker in self.brokers.values():
            assert broker.core.exchange.tally() == {"waiting": 0, "running": 0, "orphaned": 0}
            assert all(not worker.in_flight and not worker.routes for worker in broker.core.registry)
            alive = {worker.core._settings.name for worker in self.workers if worker.alive}
            assert {worker.name for worker in broker.core.registry} == alive, "a live worker is not registered"
        for worker in self.workers:
            if worker.alive:
                assert not worker.jobs, "a job is left in an engine"
                assert len(worker.core._streams) == 0, "a worker still holds a request"

    def outcomes(self) -> list[Ending | TokenmqError]:
        """How the streams ended."""
        readings = [reading for client in self.clients for reading in client.readings.values()]
        return [reading.outcome for reading in readings if reading.outcome is not None]

    # Work

    def _repeat(self, mean_s: float, action: Callable[[], None]) -> None:
        def again() -> None:
            if self.clock.now < self._end:
                action()
                self._repeat(mean_s, action)

        self.clock.after(self.random.expovariate(1 / mean_s), again)

    def _submit(self) -> None:
        client = self.random.choice(self.clients)
        deadline_s = self.random.choice([None, None, None, 0.2, 5.0])
        for _ in range(self.random.choice([1, 1, 8])):
            client.do(lambda: client.submit(deadline_s=deadline_s) and None)

    def _cancel(self) -> None:
        client = self.random.choice(self.clients)
        open_ids = [key for key, reading in client.readings.items() if reading.outcome is None]
        if open_ids:
            chosen = self.random.choice(open_ids)
            client.do(lambda: client.cancel(chosen) if client.readings[chosen].outcome is None else None)

    def _add_worker(self, name: str | None = None) -> None:
        name = name or f"worker-{len(self.workers)}"
        slots = self.random.randint(1, 6)
        self.workers.append(SimWorker(self.clock, self.random, self.brokers, self._loss, name, slots))

    # Faults

    def _fault(self) -> None:
        self.random.choice(
            [
                self._kill_worker,
                self._drain_worker,
                self._kill_client,
                self._kill_broker,
                self._pause_someone,
                self._cut_link,
                self._silence_link,
            ]
        )()

    def _kill_worker(self) -> None:
        worker = self.random.choice(self.workers)
        if worker.alive:
            worker.die()
            name = worker.core._settings.name
            self.clock.after(self.random.uniform(0.1, 5), lambda: self._add_worker(name))

    def _drain_worker(self) -> None:
        worker = self.random.choice(self.workers)
        if worker.alive:
            worker.drain(self.random.choice([0.0, 1.0, 10.0]))
            name = worker.core._settings.name + "'"
            self.clock.after(self.random.uniform(0.1, 5), lambda: self._add_worker(name))

    def _kill_client(self) -> None:
        client = self.random.choice(self.clients)
        if client.alive:
            client.die()
            self.clients.append(SimClient(self.clock, self.random, self.brokers, self._loss))

    def _kill_broker(self) -> None:
        broker = self.random.choice(list(self.brokers.values()))
        if broker.alive:
            broker.kill()
            self.clock.after(self.random.uniform(0.1, 8), broker.start)

    def _pause_someone(self) -> None:
        nodes = [*self.brokers.values(), *self.workers, *self.clients]
        self.random.choice(nodes).pause(self.random.choice([0.1, 2.0, 12.0]))

    def _cut_link(self) -> None:
        broker = self.random.choice(list(self.brokers.values()))
        if broker.peers:
            broker.cut(self.random.choice(list(broker.peers.values()))[0])

    def _silence_link(self) -> None:
        broker = self.random.choice(list(self.brokers.values()))
        if broker.peers:
            self.random.choice(list(broker.peers.values()))[0].silent = True

    def _heal(self) -> None:
        for node in [*self.brokers.values(), *self.workers, *self.clients]:
            node.resume()
        self._loss = 0.0
        for broker in self.brokers.values():
            for link, peer, _ in broker.peers.values():
                link.loss = 0.0
                peer.loss = 0.0
        for peer in [*self.workers, *self.clients]:
            peer.loss = 0.0
