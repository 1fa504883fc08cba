"""A worker process on the fake network: the real core, with its sockets and an engine thread simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tokenmq.protocol import links
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import FinishReason, Message, ModelInfo
from tokenmq.worker import events
from tokenmq.worker.core import WorkerCore
from tokenmq.worker.engines.base import Done, EngineStats, Failed, Output
from tokenmq.worker.settings import WorkerSettings

from .broker import SimBroker
from .door import Door
from .engine import MODEL, Run, TextsRun, run_of
from .net import Net
from .peer import Peer


class SimWorker(Peer):
    """A worker process.

    Attributes:
        name: its name; one that takes its place has the same.
        resumes: whether its model continues what another one has begun.
        runs: the engine's jobs by ticket, oldest first.
        exit_code: how it ended by itself; None while it runs, and when it was killed.
        exited: called when it has.
        door: its own endpoint for clients; None where it offers none.
    """

    def __init__(
        self,
        net: Net,
        brokers: dict[str, SimBroker],
        settings: WorkerSettings,
        *,
        resumes: bool,
        step_s: float,
        load_s: float,
    ) -> None:
        super().__init__(net, brokers)
        self.settings = settings
        self.name = settings.name
        self.resumes = resumes
        self.runs: dict[int, Run | TextsRun] = {}
        self.exit_code: int | None = None
        self.exited: Callable[[SimWorker], None] = lambda worker: None
        self.door: Door | None = None
        if settings.direct:
            self.door = net.doors[settings.direct] = Door(self, settings.direct)
        self.core = WorkerCore(settings, "sim", next(net.incarnations))
        self._step_s = step_s
        self._steps = 0
        self._stepping = False
        self._started: float | None = None
        self._hangs_until = -math.inf
        self._fails = False
        self._sick_until = -math.inf
        self._stats = EngineStats()
        #: Jobs that the engine is to end as soon as its thread has time.
        self._cancels: set[int] = set()
        self.do(self._start)
        self.clock.after(load_s, self.do, self._loaded)

    def drain(self, grace_s: float) -> None:
        """SIGTERM."""
        self.do(self._handle, events.Drain(grace_s))

    def hang(self, seconds: float) -> None:
        """The engine's present step, or the next one, lasts for so long; heartbeats go on."""
        self._hangs_until = self.clock.now + seconds

    def fail(self) -> None:
        """The engine's next step raises."""
        self._fails = True

    def sicken(self, seconds: float) -> None:
        """For so long, every step of the engine raises."""
        self._sick_until = self.clock.now + seconds

    def fail_job(self) -> None:
        """The engine has no memory for one of its jobs."""
        if self.runs:
            ticket = self.random.choice(list(self.runs))
            self.do(self._fail_job, ticket)

    def take(self, event: events.Came | events.Deaf) -> None:
        """Something happens at its door."""
        self.do(self._handle, event)

    def die(self) -> None:
        super().die()
        if self.door is not None:
            self.door.close(killed=True)

    def settle(self) -> None:
        super().settle()
        for ticket in self.runs:
            assert ticket in self._cancels or self.core._streams.by_ticket(ticket), "a job that nobody waits for"

    def woken(self, lag_s: float) -> None:
        self.core.forgive(lag_s)

    def tick(self) -> None:
        self._perform(self.core.tick(self.clock.now))

    def connected(self, endpoint: str) -> None:
        self._handle(links.Connected(endpoint))

    def disconnected(self, endpoint: str) -> None:
        self._handle(links.Lost(endpoint))

    def took(self, endpoint: str, message: Message | ProtocolError) -> None:
        kind = links.Malformed if isinstance(message, ProtocolError) else links.Received
        self._handle(kind(endpoint, message))

    # The engine thread.

    def _start(self) -> None:
        self._perform(self.core.start(self.clock.now))

    def _loaded(self) -> None:
        self._handle(events.EngineLoaded((ModelInfo(MODEL, resumes=self.resumes),)))

    def _begin_step(self) -> None:
        """Let a step take its time, when there is work and none is under way."""
        self._stepping = bool(self.runs)
        self._started = self.clock.now if self._stepping else None
        if self._stepping:
            self.clock.after(self.random.uniform(0.5, 1.5) * self._step_s, self._step_ends)

    def _step_ends(self) -> None:
        if self.clock.now < self._hangs_until:
            self.clock.at(self._hangs_until, self._step_ends)
        else:
            self.do(self._step)

    def _step(self) -> None:
        self._steps += 1
        if self._fails or self.clock.now < self._sick_until:
            self._fails = False
            lost = frozenset(self.runs)
            self.runs.clear()
            self._stats = EngineStats()
            self._handle(events.EngineFailed("simulated", lost))
        else:
            outputs: list[Output] = []
            for ticket, run in list(self.runs.items())[: self.settings.slots]:
                outputs += run.step()
                if run.done:
                    del self.runs[ticket]
            running = min(len(self.runs), self.settings.slots)
            self._stats = EngineStats(running, len(self.runs) - running, 0.0)
            self._handle(events.EngineOutputs(outputs, self._stats))
        self._begin_step()
        self._tell_progress()

    def _tell_progress(self) -> None:
        self._handle(events.EngineProgress(self._steps, self._started))

    def _fail_job(self, ticket: int) -> None:
        if self.runs.pop(ticket, None) is not None:
            failed = Failed(ticket, "out_of_memory", "simulated", retryable=True)
            self._handle(events.EngineOutputs([failed], self._stats))

    def _cancel(self, ticket: int) -> None:
        if self.clock.now < self._hangs_until:
            self.clock.at(self._hangs_until, self.do, self._cancel, ticket)  # the engine's thread is in its step
            return
        self._cancels.discard(ticket)
        run = self.runs.pop(ticket, None)
        if run is not None:
            done = Done(ticket, FinishReason.CANCELLED, 1, run.position)
            self._handle(events.EngineOutputs([done], self._stats))

    # Actions.

    def _handle(self, event: events.Event) -> None:
        self._perform(self.core.handle(event, self.clock.now))

    def _perform(self, actions: Sequence[events.Action]) -> None:
        for action in actions:
            if isinstance(action, links.Send):
                self.send(action.broker, action.message)
            elif isinstance(action, events.Hand):
                assert self.door is not None, "chunks by a door that there is not"
                self.door.send(action.peer, action.message)
            elif isinstance(action, events.Submit):
                assert self.resumes or action.job.generation.prior is None, "it cannot resume"
                self.runs[action.job.ticket] = run_of(action.job, self.random)
                if not self._stepping:
                    self._begin_step()
                    self.clock.after(0.0, self.do, self._tell_progress)
            elif isinstance(action, events.CancelJob):
                self._cancels.add(action.ticket)
                self.clock.after(self.random.uniform(0.001, self._step_s), self.do, self._cancel, action.ticket)
            elif isinstance(action, links.Open):
                self.open(action.broker)
            elif isinstance(action, links.Shut):
                self.shut(action.broker)
            elif isinstance(action, events.Stop):
                self.exit_code = action.exit_code
                self.alive = False
                if self.door is not None:
                    self.door.close(killed=False)
                self.exited(self)
