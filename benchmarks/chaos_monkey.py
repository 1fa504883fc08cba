"""The monkey of the chaos run: it injects faults in a seeded order, and repairs each as an operator would."""

from __future__ import annotations

import heapq
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from random import Random
from typing import Protocol

from chaos_figures import Fault, Tally
from chaos_links import Link, Network

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster, LocalProcess

#: How often each kind comes in one round of the deck.
DECK = {
    "worker killed": 5,
    "worker frozen": 2,
    "worker drained": 2,
    "broker killed": 3,
    "broker frozen": 1,
    "broker paused": 2,
    "broker drained": 1,
    "client killed": 1,
    "link cut": 3,
    "link silent": 2,
}
#: Kinds that nobody can tell from silence: a reader waits for the expiry.
SILENT = ("worker frozen", "broker frozen", "link silent")
#: What running requests get when a process is drained; shorter than many streams last, so that some are handed on.
GRACE_S = 1.5
#: What a process that was told to end gets beyond its grace time.
_END_S = 20.0
#: Between the return of one broker and the next fault of any: clients and workers register again meanwhile.
_SETTLE_S = 2.0
_LOOK_S = 0.05
#: What a process that was started gets to tell that it is there; one that has no way to a broker never does.
_START_S = 10.0
_PROBE_S = 2.0


class Victim(Protocol):
    """A process that can be killed and started again."""

    name: str

    def kill(self) -> None:
        """Kill it with SIGKILL and wait for its end."""

    def restart(self) -> None:
        """Start it again."""


class Repair(Protocol):
    """A step of a repair: it returns the next one, None where all is well."""

    def __call__(self) -> Repair | None:
        """Do it."""


class Monkey:
    """Faults and repairs; all in the thread of the caller."""

    def __init__(
        self,
        random: Random,
        cluster: LocalCluster,
        clients: Sequence[Victim],
        network: Network,
        tally: Tally,
        expiry_s: float,
    ) -> None:
        """Make one for a cluster that is ready.

        Args:
            random: draws everything that is chosen here.
            cluster: brokers and workers.
            clients: client processes.
            network: links, whose names are told as targets.
            tally: what is found goes there.
            expiry_s: after which the cluster takes silence for death.
        """
        self.faults: list[Fault] = []
        self._random = random
        self._cluster = cluster
        self._clients = clients
        self._network = network
        self._tally = tally
        self._expiry_s = expiry_s
        self._deck: list[str] = []
        #: Whom a fault has hit and no repair has healed yet.
        self._hurt: set[str] = set()
        #: (when, running number, whom, what to do).
        self._repairs: list[tuple[float, int, str, Repair]] = []
        self._numbers = count()
        self._settled_at = 0.0
        self._probes = [
            Client(endpoint, name="chaos", connect_timeout_s=_PROBE_S, query_timeout_s=_PROBE_S)
            for endpoint in cluster.frontends
        ]
        self._kinds: Mapping[str, Callable[[str], Fault | None]] = {
            "worker killed": self._kill_worker,
            "worker frozen": self._freeze_worker,
            "worker drained": self._drain_worker,
            "broker killed": self._kill_broker,
            "broker frozen": self._freeze_broker,
            "broker paused": self._pause_broker,
            "broker drained": self._drain_broker,
            "client killed": self._kill_client,
            "link cut": self._cut_link,
            "link silent": self._silence_link,
        }

    def strike(self) -> Fault | None:
        """Inject the next fault of the deck that is possible now; None where none is."""
        if not self._deck:
            self._deck = [kind for kind, times in DECK.items() for _ in range(times)]
            self._random.shuffle(self._deck)
        for place, kind in enumerate(self._deck):
            fault = self._kinds[kind](kind)
            if fault is not None:
                del self._deck[place]
                self.faults.append(fault)
                return fault
        return None

    def look(self) -> float:
        """Do the repairs that are due, look for processes that died by themselves; return seconds until the next."""
        while self._repairs and self._repairs[0][0] <= time.monotonic():
            _, _, target, repair = heapq.heappop(self._repairs)
            if (more := repair()) is not None:
                self._later(_LOOK_S, target, more)
                continue
            self._hurt.discard(target)
            if target in {broker.name for broker in self._cluster.brokers}:
                self._settled_at = time.monotonic() + _SETTLE_S
        for process in (*self._cluster.brokers, *self._cluster.workers):
            if process.name not in self._hurt and process.exit_code is not None:
                self._tally.find("crashed", detail=f"{process.name} ended with {process.exit_code}")
                process.restart()
        return _LOOK_S

    def repair(self, limit_s: float) -> None:
        """Wait until everything is repaired; what is not by then is found later, by what it leaves."""
        end = time.monotonic() + limit_s
        while self._hurt and time.monotonic() < end:
            time.sleep(self.look())

    def close(self) -> None:
        """Forget the brokers."""
        for probe in self._probes:
            probe.close()

    def _later(self, delay_s: float, target: str, repair: Repair) -> None:
        self._hurt.add(target)
        heapq.heappush(self._repairs, (time.monotonic() + delay_s, next(self._numbers), target, repair))

    # Whom

    def _worker(self) -> LocalProcess | None:
        """A worker to hurt, while at least half of them are well besides."""
        well = [worker for worker in self._cluster.workers if worker.name not in self._hurt]
        if len(well) <= len(self._cluster.workers) // 2:
            return None
        return self._random.choice(well)

    def _broker(self) -> tuple[int, LocalProcess] | None:
        """A broker to hurt: none while another one is, or has just come back and has no workers yet."""
        brokers = self._cluster.brokers
        if time.monotonic() < self._settled_at or any(broker.name in self._hurt for broker in brokers):
            return None
        number = self._random.randrange(len(brokers))
        others = [probe for place, probe in enumerate(self._probes) if place != number]
        return (number, brokers[number]) if all(map(_has_workers, others)) else None

    def _link(self) -> Link | None:
        well = [link for link in self._network.links if link.name not in self._hurt]
        return self._random.choice(well) if well else None

    # What

    def _kill_worker(self, kind: str) -> Fault | None:
        worker = self._worker()
        return self._kill(kind, worker) if worker else None

    def _kill_broker(self, kind: str) -> Fault | None:
        found = self._broker()
        return self._kill(kind, found[1]) if found else None

    def _kill_client(self, kind: str) -> Fault | None:
        client = self._random.choice(self._clients)
        return None if client.name in self._hurt else self._kill(kind, client)

    def _kill(self, kind: str, victim: Victim) -> Fault:
        at = time.monotonic()
        victim.kill()
        self._later(self._random.uniform(0.05, 1.0), victim.name, lambda: _start(victim))
        return Fault(kind, frozenset([victim.name]), at)

    def _freeze_worker(self, kind: str) -> Fault | None:
        worker = self._worker()
        return self._stop(kind, worker, self._random.uniform(1.2, 2.0) * self._expiry_s) if worker else None

    def _freeze_broker(self, kind: str) -> Fault | None:
        found = self._broker()
        return self._stop(kind, found[1], self._random.uniform(1.2, 2.0) * self._expiry_s) if found else None

    def _pause_broker(self, kind: str) -> Fault | None:
        found = self._broker()
        return self._stop(kind, found[1], self._random.uniform(0.1, 0.4) * self._expiry_s) if found else None

    def _stop(self, kind: str, process: LocalProcess, duration_s: float) -> Fault:
        at = time.monotonic()
        process.send_signal(signal.SIGSTOP)

        def go_on() -> None:
            process.send_signal(signal.SIGCONT)

        self._later(duration_s, process.name, go_on)
        # It may break a stream at any moment until then, and once more when it goes on.
        return Fault(kind, frozenset([process.name]), at, duration_s, silent=kind in SILENT)

    def _drain_worker(self, kind: str) -> Fault | None:
        worker = self._worker()
        if worker is None:
            return None
        at = time.monotonic()
        if self._random.random() < 0.5 and self._asked(worker):
            return self._end(kind, worker, at)
        return self._terminate(kind, worker)

    def _asked(self, worker: LocalProcess) -> bool:
        """Whether a broker has told the worker to drain; where it could not, the operator does."""
        number = self._random.randrange(len(self._probes))
        broker = self._cluster.brokers[number].name
        if {broker, f"{worker.name}>{broker}"} & self._hurt:
            return False
        try:
            self._probes[number].drain(worker.name, grace_s=GRACE_S)
        except TokenmqError:
            return False
        return True

    def _drain_broker(self, kind: str) -> Fault | None:
        found = self._broker()
        return self._terminate(kind, found[1]) if found else None

    def _terminate(self, kind: str, process: LocalProcess) -> Fault:
        at = time.monotonic()
        process.terminate()
        return self._end(kind, process, at)

    def _end(self, kind: str, process: LocalProcess, at: float) -> Fault:
        def again() -> Repair | None:
            if process.exit_code is None:
                if time.monotonic() < at + GRACE_S + _END_S:
                    return again
                self._tally.find("crashed", detail=f"{process.name} did not end after its drain")
                process.kill()
            elif process.exit_code != 0:
                self._tally.find("crashed", detail=f"{process.name} ended its drain with {process.exit_code}")
            return _start(process)

        self._later(_LOOK_S, process.name, again)
        return Fault(kind, frozenset([process.name]), at, GRACE_S)

    def _cut_link(self, kind: str) -> Fault | None:
        link = self._link()
        if link is None:
            return None
        at = time.monotonic()
        self._network.tell(link.cut)
        return Fault(kind, frozenset([link.name]), at)

    def _silence_link(self, kind: str) -> Fault | None:
        link = self._link()
        if link is None:
            return None
        at = time.monotonic()
        duration_s = self._random.uniform(1.2, 2.0) * self._expiry_s
        self._network.tell(link.hold)
        heal = self._random.choice([link.release, link.cut])

        def again() -> None:
            self._network.tell(heal)

        self._later(duration_s, link.name, again)
        return Fault(kind, frozenset([link.name]), at, duration_s, silent=True)


def _start(victim: Victim) -> Repair | None:
    """Start a process again; return what waits until it is there: nobody drains what has not begun yet."""
    if not isinstance(victim, LocalProcess):
        victim.restart()
        return None
    log, signs = victim.log, (b" broker_started ", b" registered ")
    told = log.stat().st_size
    victim.restart()
    end = time.monotonic() + _START_S

    def wait() -> Repair | None:
        with log.open("rb") as lines:
            lines.seek(told)
            new = lines.read()
        return None if any(sign in new for sign in signs) or time.monotonic() > end else wait

    return wait


def _has_workers(probe: Client) -> bool:
    try:
        return any(row["ready"] for row in probe.models())
    except TokenmqError:
        return False
