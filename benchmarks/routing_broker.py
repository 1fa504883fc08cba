"""The real BrokerCore in a discrete-event simulation: requests in, requests out, and workers that only take time.

Nothing of the broker is imitated. What is: workers (slots, a queue for what a broker sends beyond them, a pace),
connections (which take no time) and the clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any

from routing_load import Cluster, Job
from routing_rules import Outcome

from tokenmq.broker.core import BrokerCore
from tokenmq.broker.events import Action, FromClient, FromWorker, ToClient, ToWorker
from tokenmq.broker.limits import UNLIMITED
from tokenmq.broker.settings import BrokerSettings
from tokenmq.client.recovery import pause_s
from tokenmq.protocol.membership import REPORT_AGAIN_S
from tokenmq.protocol.messages import (
    Envelope,
    Error,
    Finish,
    FinishReason,
    Heartbeat,
    Hello,
    Load,
    Message,
    ModelInfo,
    Ready,
    Request,
    Timings,
    Usage,
)

MODEL = "m"
#: No room is ever full, unless a simulation is about that.
ENDLESS = 10_000_000
#: Workers report, and clients ask, more often than this.
_EXPIRY_S = 80_000.0


class _Worker:
    """A worker of all brokers.

    Attributes:
        name: what it is called.
        speed: tokens a second of one stream.
        running: requests in slots.
        waiting: what brokers have sent beyond its slots.
        held: requests by broker.
        said: messages by broker, for the heartbeats to tell.
        told_others: by broker, how many requests of others the last report told.
        told_at: when that was.
    """

    def __init__(self, number: int, speed: float, slots: int, brokers: int) -> None:
        self.number = number
        self.name = f"worker-{number + 1}"
        self.speed = speed
        self.slots = slots
        self.running = 0
        self.waiting: deque[tuple[Job, int, int, float]] = deque()
        self.held = [0] * brokers
        self.said = [0] * brokers
        self.told_others = [0] * brokers
        self.told_at = [0.0] * brokers

    def others(self, broker: int) -> int:
        return self.running + len(self.waiting) - self.held[broker]

    def load(self, broker: int) -> Load:
        return Load(running=self.running, waiting=len(self.waiting), held=self.held[broker])


class Simulation:
    """Brokers, workers and requests.

    Attributes:
        cores: the brokers.
        outcome: what became of the requests that have ended, in the order of arrival once `run` has returned.
        refused: ERROR `busy`; each was sent again after a pause, as the client library does it.
    """

    def __init__(
        self,
        cluster: Cluster,
        policy: str,
        *,
        seed: str = "",
        brokers: int = 1,
        report_s: float = 1.0,
        early: bool = True,
        stated_speed: bool = False,
        max_waiting: int = ENDLESS,
        clients: Sequence[str] = ("client",),
    ) -> None:
        """Start brokers and register workers.

        Args:
            cluster: the workers.
            policy: how brokers choose.
            seed: of what policies draw, and of the phases of the heartbeats.
            brokers: how many know all workers; each request goes to one of them in turn.
            report_s: seconds between the heartbeats of a worker, each at a phase of its own.
            early: workers report to a broker, as they really do, soon after others' part has changed.
            stated_speed: workers state their speed; else brokers measure it.
            max_waiting: requests that may wait at a broker.
            clients: their names; a job's client is one of them by its number.
        """
        self._now = 0.0
        self._events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._order = count()
        self._random = Random(f"{seed}/peers")
        settings = BrokerSettings(
            policy=policy, heartbeat_s=report_s, expiry_s=_EXPIRY_S, max_waiting=max_waiting, limits=UNLIMITED
        )
        self.cores = [
            BrokerCore(settings, software="sim", now=0.0, random=Random(f"{seed}/{number}"))
            for number in range(brokers)
        ]
        self._ticks = [0.0] * brokers
        self._report_s = report_s
        self._early = early and brokers > 1
        self._jobs: dict[bytes, Job] = {}
        self._left = 0
        self._began: dict[int, tuple[float, float, int]] = {}
        self.outcome = Outcome()
        self.refused = 0
        self._workers = [
            _Worker(number, speed, cluster.slots, brokers) for number, speed in enumerate(cluster.speeds)
        ]
        for number in range(brokers):
            for index, name in enumerate(clients):
                self._handle(number, FromClient(_client_peer(index), Hello(name, "sim")))
            for worker in self._workers:
                ready = Ready(
                    worker=worker.name, incarnation=1, software="sim", models=(ModelInfo(MODEL),), slots=worker.slots,
                    engine="sim", load=Load(), speed=worker.speed if stated_speed else None,
                )  # fmt: skip
                self._say(worker, number, ready)
        for worker in self._workers:
            self._at(self._random.uniform(0, report_s), self._beat, worker)

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Let these arrive, in this order; return what became of them when all have ended."""
        self._left = len(jobs)
        arrivals = iter(jobs)
        job = next(arrivals, None)
        while self._left:
            arrives_at = math.inf if job is None else job.arrived_at
            at, broker = min((tick_at, number) for number, tick_at in enumerate(self._ticks))
            if at <= arrives_at and at <= self._events[0][0]:
                self._now = at
                self._perform(broker, self.cores[broker].tick(at))
                self._ticks[broker] = self.cores[broker].next_deadline()
            elif job is not None and arrives_at <= self._events[0][0]:
                self._now = arrives_at
                self._submit(job, 1)
                job = next(arrivals, None)
            else:
                self._now, _, do, arguments = heappop(self._events)
                do(*arguments)
        for each in jobs:
            began, ended, worker = self._began.pop(each.number)
            self.outcome.add(each, began, ended, worker)
        return self.outcome

    def validate(self) -> None:
        """Check every invariant of the brokers."""
        for core in self.cores:
            core.validate()

    def _at(self, time: float, do: Any, *arguments: Any) -> None:
        heappush(self._events, (time, next(self._order), do, arguments))

    # What clients do.

    def _submit(self, job: Job, attempt: int) -> None:
        id = job.number.to_bytes(16, "big")
        self._jobs[id] = job
        affinity = f"conversation-{job.conversation}"
        envelope = Envelope(
            MODEL, attempt, 1, expected_tokens=job.bound_tokens, affinity=affinity, priority=job.priority
        )
        broker = job.number % len(self.cores)
        self._handle(broker, FromClient(_client_peer(job.client), Request(id, envelope, b"")))

    # What brokers do.

    def _handle(self, broker: int, event: FromClient | FromWorker) -> None:
        core = self.cores[broker]
        self._perform(broker, core.handle(event, self._now))
        self._ticks[broker] = core.next_deadline()

    def _perform(self, broker: int, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, ToWorker) and isinstance(action.message, Request):
                request = action.message
                worker = self._workers[_number(action.peer)]
                worker.held[broker] += 1
                worker.waiting.append((self._jobs[request.id], broker, request.envelope.attempt, self._now))
                self._admit(worker)
                self._differs(worker)
            elif isinstance(action, ToClient) and isinstance(action.message, Error):
                error = action.message
                if error.code != "busy":
                    raise SystemExit(f"error: a simulated request failed: {error.code}: {error.message}")
                self.refused += 1
                pause = pause_s(error.attempt, error.retry_after_s, self._random.random)
                self._at(self._now + pause, self._submit, self._jobs[error.id], error.attempt + 1)

    # What workers do.

    def _admit(self, worker: _Worker) -> None:
        while worker.waiting and worker.running < worker.slots:
            job, broker, attempt, came_at = worker.waiting.popleft()
            worker.running += 1
            ends_at = self._now + job.tokens / worker.speed
            self._began[job.number] = (self._now, ends_at, worker.number)
            timings = Timings(worker_queue_s=self._now - came_at, decode_s=ends_at - self._now)
            self._at(ends_at, self._finish, worker, broker, attempt, job, timings)

    def _finish(self, worker: _Worker, broker: int, attempt: int, job: Job, timings: Timings) -> None:
        worker.running -= 1
        worker.held[broker] -= 1
        self._left -= 1
        self._admit(worker)
        id = job.number.to_bytes(16, "big")
        del self._jobs[id]
        usage = Usage(0, job.tokens + 1)
        self._say(worker, broker, Finish(id, attempt, FinishReason.STOP, usage, timings, worker=""))
        self._differs(worker)

    def _differs(self, worker: _Worker) -> None:
        """See to it that brokers hear soon of a change that others have made."""
        for broker in range(len(self.cores)) if self._early else ():
            if worker.others(broker) != worker.told_others[broker]:
                self._at(max(self._now, worker.told_at[broker] + REPORT_AGAIN_S), self._report_early, worker, broker)

    def _report_early(self, worker: _Worker, broker: int) -> None:
        due = self._now >= worker.told_at[broker] + REPORT_AGAIN_S
        if due and worker.others(broker) != worker.told_others[broker]:
            self._report(worker, broker)

    def _beat(self, worker: _Worker) -> None:
        for broker in range(len(self.cores)):
            self._report(worker, broker)
        self._at(self._now + self._report_s, self._beat, worker)

    def _report(self, worker: _Worker, broker: int) -> None:
        worker.told_others[broker], worker.told_at[broker] = worker.others(broker), self._now
        self._say(worker, broker, Heartbeat(worker.said[broker], worker.load(broker)))

    def _say(self, worker: _Worker, broker: int, message: Message) -> None:
        worker.said[broker] += 1
        self._handle(broker, FromWorker(_worker_peer(worker.number), message))


def _client_peer(number: int) -> bytes:
    return b"c" + number.to_bytes(4, "big")


def _worker_peer(number: int) -> bytes:
    return b"w" + number.to_bytes(4, "big")


def _number(peer: bytes) -> int:
    return int.from_bytes(peer[1:], "big")
