"""WorkerCore: what a worker does, without I/O: events in, actions out.

It knows neither zmq, nor a clock, nor a thread. The rules:

- A worker has a session with each of its brokers (`session.py`). Whatever goes wrong in one ends it: the socket is
  closed, all that it held is cancelled in the engine, and after a back-off a new one is opened. The others do not
  notice.
- Each request held is answered with exactly one FINISH or ERROR, unless its session has ended (`desk.py`).
- The state is told at once when it changes:

      loading -> ready <-> stalled      a step lasts longer than `stall_after_s`, and ends
      any -> draining -> stopped        nothing new is taken; what is held ends, or is given back after the grace time
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from ..protocol.errors import ErrorCode
from ..protocol.messages import (
    Accepted,
    Cancel,
    Credit,
    Disconnect,
    DisconnectCode,
    Draining,
    Goodbye,
    Heartbeat,
    Load,
    Message,
    ModelInfo,
    Ready,
    Request,
    WorkerState,
)
from ..protocol.messages import Drain as DrainMessage
from ..protocol.version import SOFTWARE
from .desk import Desk
from .engines.base import EngineStats
from .events import (
    Action,
    Connected,
    Drain,
    EngineDied,
    EngineFailed,
    EngineLoaded,
    EngineOutputs,
    EngineProgress,
    Event,
    Lost,
    Malformed,
    Open,
    Received,
    Refused,
    Shut,
    Stop,
)
from .orders import Orders
from .session import UNREACHED_AGAIN_S, Phase, Session
from .settings import WorkerSettings


class WorkerCore:
    """The worker's state machine; one call of `handle` or `tick` at a time."""

    def __init__(self, settings: WorkerSettings, engine: str, incarnation: int) -> None:
        """Make a worker that has not begun; `start` begins.

        Args:
            settings: how it presents itself and behaves.
            engine: the engine's name, for people.
            incarnation: grows with each start of this worker: nanoseconds since the epoch.
        """
        self._settings = settings
        self._engine = engine
        self._incarnation = incarnation
        self._sessions = {broker: Session(broker) for broker in settings.brokers}
        self._orders = Orders(self._sessions)
        self._desk = Desk(settings, self._orders)
        self._streams = self._desk.streams
        self._models = tuple(ModelInfo(name) for name in settings.models)
        self._stats = EngineStats()
        self._progress = EngineProgress()
        self._loaded = False
        self._stalled = False
        #: When a drain gives back what is left; None while there is no drain.
        self._drain_until: float | None = None
        self._stopped = False
        self._announced = WorkerState.LOADING
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            Connected: self._on_connected,
            Lost: self._on_lost,
            Refused: self._on_refused,
            Received: self._on_received,
            Malformed: self._on_malformed,
            EngineLoaded: self._on_loaded,
            EngineOutputs: self._on_outputs,
            EngineProgress: self._on_progress,
            EngineFailed: self._on_failed,
            EngineDied: self._on_died,
            Drain: self._on_drain,
        }
        self._receivers: dict[type[Any], Callable[[Session, Any, float], None]] = {
            Accepted: self._on_accepted,
            Request: self._on_request,
            Credit: self._on_credit,
            Cancel: self._on_cancel,
            Heartbeat: self._on_heartbeat,
            DrainMessage: self._on_drain_message,
            Disconnect: self._on_disconnect,
            Goodbye: self._on_goodbye,
        }

    # --- what the server calls --------------------------------------------------------------------------------------

    @property
    def state(self) -> WorkerState:
        """What the worker tells of itself."""
        if self._drain_until is not None:
            return WorkerState.DRAINING
        if not self._loaded:
            return WorkerState.LOADING
        return WorkerState.STALLED if self._stalled else WorkerState.READY

    def start(self, now: float) -> list[Action]:
        """Begin: open a socket to each broker. Call it once."""
        names = ",".join(self._settings.models)
        self._orders.log("model_loading", worker=self._settings.name, engine=self._engine, models=names)
        return self.tick(now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; return what is to be done, in order."""
        if not self._stopped:
            self._handlers[type(event)](event, now)
        return self._done(now)

    def tick(self, now: float) -> list[Action]:
        """Do what is due; return what is to be done, in order. Call it at `next_deadline`, or any time before."""
        if not self._stopped:
            self._judge_step(now)
            self._announce(now)  # first: it may save the heartbeats that are due
            for session in self._sessions.values():
                self._tend(session, now)
            self._desk.tick(now)
            if self._drain_until is not None and now >= self._drain_until:
                self._desk.give_back(ErrorCode.DRAINING, "the worker stopped before the request ended", now)
        return self._done(now)

    def next_deadline(self) -> float:
        """Return the next time at which `tick` has something to do; infinity for none."""
        if self._stopped:
            return math.inf
        deadlines = [session.next_deadline() for session in self._sessions.values()]
        deadlines.append(self._desk.next_deadline())
        if self._progress.step_started is not None and not self._stalled:
            deadlines.append(self._progress.step_started + self._settings.stall_after_s)
        if self._drain_until is not None:
            deadlines.append(self._drain_until)
        return min(deadlines)

    def forgive(self, lag_s: float) -> None:
        """Take `lag_s` seconds in which the worker did not listen off the brokers' silence."""
        for session in self._sessions.values():
            session.liveness.forgive(lag_s)

    def validate(self) -> None:
        """Check every invariant that holds between two events.

        Raises:
            AssertionError: one does not; its argument is what is at fault.
        """
        self._streams.validate()
        for broker, session in self._sessions.items():
            assert session.phase is Phase.ACTIVE or not self._streams.held(broker), session
            assert not (self._stopped and session.has_socket), session
        assert len(self._streams) - self._streams.parked <= self._settings.most_held, len(self._streams)
        if not self._stopped:
            assert self._announced is self.state, (self._announced, self.state)
            assert self._streams or self._drain_until is None, "nothing is held, and the drain has not ended"

    # --- sessions ---------------------------------------------------------------------------------------------------

    def _tend(self, session: Session, now: float) -> None:
        if session.phase is Phase.RESTING and now >= session.retry_at:
            session.open(now)
            self._orders.add(Open(session.broker))
        elif session.phase is Phase.OPENING and now >= session.unreached_at:
            session.unreached_at = now + UNREACHED_AGAIN_S
            self._orders.log("broker_unreached", level=logging.WARNING, broker=session.broker, doing="still trying")
        elif session.registered and session.liveness.expired(now):
            self._end(session, f"silent for {session.liveness.expiry_s:g} s", now)
        elif session.registered and session.liveness.due(now):
            self._report(session, now)

    def _on_connected(self, event: Connected, now: float) -> None:
        session = self._sessions[event.broker]
        if session.phase is Phase.OPENING:
            session.phase = Phase.CONNECTED
            self._register(session, now)

    def _register(self, session: Session, now: float) -> None:
        """Say READY, for the first time or with news; without a model's name there is nothing to say yet."""
        if not self._models:
            return
        if not session.registered:
            session.join(now)
        settings = self._settings
        load = self._load(session.broker, now)
        ready = Ready(
            worker=settings.name,
            incarnation=self._incarnation,
            software=SOFTWARE,
            models=self._models,
            slots=settings.slots,
            speed=settings.speed,
            engine=self._engine,
            load=load,
            heartbeat_s=settings.heartbeat_s,
        )
        self._orders.send(session.broker, ready)
        session.liveness.spoke(now)

    def _report(self, session: Session, now: float) -> None:
        self._orders.send(session.broker, Heartbeat(session.sent, self._load(session.broker, now)))
        # Chunks do not count as having spoken: the broker's figures stay fresh while streams flow.
        session.liveness.spoke(now)

    def _load(self, broker: str, now: float) -> Load:
        started = self._progress.step_started
        in_engine = self._streams.in_engine()
        running = min(max(0, self._stats.running), in_engine)
        return Load(
            state=self.state,
            running=running,
            waiting=in_engine - running,
            held=self._streams.in_engine(broker),
            steps=self._progress.steps,
            step_age_s=0.0 if started is None else max(0.0, now - started),
            tokens_per_s=self._progress.tokens_per_s,
            kv_use=max(0.0, min(1.0, self._stats.kv_use)),
        )

    def _on_lost(self, event: Lost, now: float) -> None:
        session = self._sessions[event.broker]
        if session.has_socket:
            self._end(session, event.reason, now)

    def _on_refused(self, event: Refused, now: float) -> None:
        session = self._sessions[event.broker]
        if session.has_socket and not session.refused:
            session.refused = True  # the socket tries again every second: one line is enough
            self._orders.log("connection_refused", level=logging.WARNING, broker=event.broker)

    def _on_malformed(self, event: Malformed, now: float) -> None:
        session = self._sessions[event.broker]
        if session.has_socket:
            self._end(session, f"malformed message: {event.error.message}", now)

    def _end(self, session: Session, reason: str, now: float, *, for_good: bool = False) -> None:
        """End a session and cancel what it held; the broker knows what became of it."""
        cancelled = self._desk.leave(session.broker)
        self._orders.add(Shut(session.broker))
        for_good = for_good or self._drain_until is not None
        fields: dict[str, Any] = {"broker": session.broker, "reason": reason, "cancelled": cancelled}
        if for_good:
            session.bar()
        else:
            fields["retry_s"] = session.rest(now)
        self._orders.log("broker_lost", level=logging.WARNING, **fields)

    # --- messages ---------------------------------------------------------------------------------------------------

    def _on_received(self, event: Received, now: float) -> None:
        session = self._sessions[event.broker]
        if not session.has_socket:
            return  # it was on its way when the session ended
        session.liveness.heard(now)
        receive = self._receivers.get(type(event.message))
        if receive is None or not self._expected(session, event.message):
            self._end(session, f"unexpected {event.message.command.name}", now)
            return
        receive(session, event.message, now)
        session.received += 1

    def _expected(self, session: Session, message: Message) -> bool:
        if isinstance(message, (Disconnect, Goodbye)):
            return True
        return session.registered if isinstance(message, (Accepted, Heartbeat)) else session.phase is Phase.ACTIVE

    def _on_accepted(self, session: Session, message: Accepted, now: float) -> None:
        if session.accept(message.heartbeat_s, message.expiry_s):
            self._orders.log(
                "registered",
                broker=session.broker,
                name=message.broker,
                software=message.software,
                heartbeat_s=message.heartbeat_s,
                expiry_s=message.expiry_s,
            )

    def _on_heartbeat(self, session: Session, message: Heartbeat, now: float) -> None:
        if message.sent != session.received:
            self._end(session, f"messages lost: {message.sent} sent, {session.received} received", now)

    def _on_drain_message(self, session: Session, message: DrainMessage, now: float) -> None:
        self._drain(message.grace_s, now, broker=session.broker)

    def _on_goodbye(self, session: Session, message: Goodbye, now: float) -> None:
        self._end(session, "the broker said goodbye", now)

    def _on_disconnect(self, session: Session, message: Disconnect, now: float) -> None:
        superseded = message.code is DisconnectCode.SUPERSEDED
        self._end(session, f"{message.code.value}: {message.message}", now, for_good=superseded)
        all_barred = all(other.phase is Phase.BARRED for other in self._sessions.values())
        if superseded and all_barred and self._drain_until is None:
            self._stop(1, f"superseded: a newer worker named {self._settings.name!r} has registered at every broker")

    # --- requests ---------------------------------------------------------------------------------------------------

    def _on_request(self, session: Session, message: Request, now: float) -> None:
        closed = None
        if self._drain_until is not None:
            closed = ErrorCode.DRAINING, "the worker is draining"
        elif not self._loaded:
            closed = ErrorCode.NO_WORKER, "the worker is still loading its model"
        self._desk.request(session.broker, message, self._models, closed, now)

    def _on_credit(self, session: Session, message: Credit, now: float) -> None:
        self._desk.credit(session.broker, message, now)

    def _on_cancel(self, session: Session, message: Cancel, now: float) -> None:
        self._desk.cancel(session.broker, message, now)

    # --- the engine -------------------------------------------------------------------------------------------------

    def _on_loaded(self, event: EngineLoaded, now: float) -> None:
        self._loaded = True
        self._models = event.models
        names = ",".join(model.name for model in event.models)
        self._orders.log("model_loaded", models=names, seconds=event.seconds)

    def _on_outputs(self, event: EngineOutputs, now: float) -> None:
        self._stats = event.stats
        self._desk.outputs(event.outputs, now)

    def _on_progress(self, event: EngineProgress, now: float) -> None:
        self._progress = event
        self._judge_step(now)

    def _judge_step(self, now: float) -> None:
        started = self._progress.step_started
        self._stalled = started is not None and now >= started + self._settings.stall_after_s

    def _on_failed(self, event: EngineFailed, now: float) -> None:
        self._stats = EngineStats()
        requests = self._desk.fail(event.tickets, f"the engine failed: {event.message}", now)
        self._orders.log("engine_failed", level=logging.ERROR, error=event.message, requests=requests)

    def _on_died(self, event: EngineDied, now: float) -> None:
        name = "engine_died" if self._loaded else "model_load_failed"
        self._orders.log(name, level=logging.ERROR, error=event.message)
        self._desk.give_back(ErrorCode.ENGINE_FAILED, f"the engine failed: {event.message}", now)
        self._stop(1, name)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _on_drain(self, event: Drain, now: float) -> None:
        self._drain(event.grace_s, now)

    def _drain(self, grace_s: float | None, now: float, **asked_by: Any) -> None:
        """Begin to leave; a second time can only shorten the grace time."""
        if grace_s is None:
            grace_s = self._settings.grace_s
        until = now + grace_s
        if self._drain_until is not None and until >= self._drain_until:
            return
        self._drain_until = until
        self._orders.log("draining", held=len(self._streams), grace_s=grace_s, **asked_by)
        for session in self._sessions.values():
            if session.has_socket and not session.registered:
                self._orders.add(Shut(session.broker))
            if not session.registered:
                session.bar()

    def _stop(self, exit_code: int, reason: str) -> None:
        for session in self._sessions.values():
            if session.registered:
                self._orders.send(session.broker, Goodbye())
            if session.has_socket:
                self._orders.add(Shut(session.broker))
            session.bar()
        self._stopped = True
        self._orders.add(Stop(exit_code, reason))

    def _done(self, now: float) -> list[Action]:
        """Tell a changed state, end a drain that has nothing left, and hand out the actions."""
        if not self._stopped:
            self._announce(now)
            if self._drain_until is not None and not self._streams:
                self._stop(0, "drained")
        return self._orders.take()

    def _announce(self, now: float) -> None:
        state = self.state
        if state is self._announced:
            return
        before, self._announced = self._announced, state
        level = logging.WARNING if state is WorkerState.STALLED else logging.INFO
        self._orders.log("state", level=level, before=before.value, now=state.value)
        for session in self._sessions.values():
            if before is WorkerState.LOADING and state is not WorkerState.DRAINING:
                if session.registered or session.phase is Phase.CONNECTED:
                    self._register(session, now)
            elif session.registered:
                if state is WorkerState.DRAINING:
                    self._orders.send(session.broker, Draining())
                self._report(session, now)
