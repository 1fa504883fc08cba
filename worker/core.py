"""WorkerCore: what a worker does, without I/O: events in, actions out.

It knows neither zmq, nor a clock, nor a thread. The rules:

- A worker has a session with each of its brokers (`protocol/membership.py`). When one ends, all that it held is
  cancelled in the engine; the others do not notice.
- Each request held is answered with exactly one FINISH or ERROR, unless its session has ended (`desk.py`).
- The state is told at once when it changes:

      loading -> ready <-> stalled      a step lasts longer than `stall_after_s`, and ends
      any -> stopped                    a step lasts longer than `restart_after_s`: exit code 1, for a supervisor
      any -> draining -> stopped        nothing new is taken; what is held ends, or is given back after the grace time

  A drain that a broker asked for can be taken back by a broker; one of the worker's own cannot.
- Clients may take their chunks themselves, at a door of the worker's own (`direct.py`, SPEC.md 14). There are no
  sessions there: what has a beginning and an end comes from the brokers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..protocol.errors import ErrorCode, ProtocolError
from ..protocol.limits import MAX_TEXT_CHARS
from ..protocol.links import Connected, Lost, Malformed, Received, Refused
from ..protocol.membership import Membership
from ..protocol.messages import (
    Attach,
    Cancel,
    Credit,
    Disconnect,
    DisconnectCode,
    Goodbye,
    Load,
    Message,
    ModelInfo,
    Ready,
    Request,
    WorkerState,
)
from ..protocol.messages import Drain as DrainMessage
from ..protocol.orders import Orders
from ..protocol.version import SOFTWARE
from .desk import Desk
from .engines.base import EngineStats
from .events import (
    EXIT_CANNOT_START,
    EXIT_FAILED,
    Action,
    Came,
    Changed,
    Deaf,
    Drain,
    EngineDied,
    EngineFailed,
    EngineLoaded,
    EngineOutputs,
    EngineProgress,
    Event,
    Hand,
    Resize,
    Stop,
)
from .settings import WorkerSettings

#: How soon a client that did not take its chunks by its own connection is told to leave it, again and again.
PART_AGAIN_S = 0.5


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
        self._orders: Orders[Action] = Orders()
        self._membership = Membership(settings.brokers, self, self._orders, keyed=bool(settings.curves))
        self._desk = Desk(settings, self._orders, self._membership.send)
        self._streams = self._desk.streams
        self._models = tuple(ModelInfo(name) for name in settings.models)
        self._stats = EngineStats()
        self._progress = EngineProgress()
        self._loaded = False
        self._stalled = False
        #: When a drain gives back what is left; None while there is no drain.
        self._drain_until: float | None = None
        #: The drain is the worker's own.
        self._leaving = False
        #: Requests that are held at most: those that the settings allow, or that they allowed when they came.
        self._most_held = settings.most_held
        self._stopped = False
        #: When connections at the worker's own door that did not read are to be sent away.
        self._part_at: dict[bytes, float] = {}
        self._announced = WorkerState.LOADING
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            **dict.fromkeys((Connected, Lost, Refused, Received, Malformed), self._membership.handle),
            EngineLoaded: self._on_loaded,
            EngineOutputs: self._on_outputs,
            EngineProgress: self._on_progress,
            EngineFailed: self._on_failed,
            EngineDied: self._on_died,
            Changed: self._on_changed,
            Drain: self._on_drain,
            Came: self._on_came,
            Deaf: self._on_deaf,
        }
        self._receivers: dict[type[Any], Callable[[str, Any, float], None]] = {
            Request: self._on_request,
            Credit: self._desk.credit,
            Cancel: self._desk.cancel,
            DrainMessage: self._on_drain_message,
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
            self._membership.tick(now)
            self._desk.tick(now)
            self._part(now)
            if self._drain_until is None:
                self._give_up_step(now)  # a drain has an end of its own
            elif now >= self._drain_until:
                self._desk.give_back(ErrorCode.DRAINING, "the worker stopped before the request ended", now)
        return self._done(now)

    def next_deadline(self) -> float:
        """Return the next time at which `tick` has something to do; infinity for none."""
        if self._stopped:
            return math.inf
        deadlines = [self._membership.next_deadline(), self._desk.next_deadline(), *self._part_at.values()]
        if self._progress.step_started is not None:
            if not self._stalled:
                deadlines.append(self._progress.step_started + self._settings.stall_after_s)
            if self._settings.restart_after_s and self._drain_until is None:
                deadlines.append(self._progress.step_started + self._settings.restart_after_s)
        if self._drain_until is not None:
            deadlines.append(self._drain_until)
        return min(deadlines)

    def forgive(self, lag_s: float) -> None:
        """Take `lag_s` seconds in which the worker did not listen off the brokers' silence."""
        self._membership.forgive(lag_s)

    def validate(self) -> None:
        """Check every invariant that holds between two events.

        Raises:
            AssertionError: one does not; its argument is what is at fault.
        """
        self._streams.validate()
        self._desk.attachments.validate()
        self._membership.validate()
        for broker, session in self._membership.sessions.items():
            assert self._membership.active(broker) or not self._streams.held(broker), session
            assert not (self._stopped and session.has_socket), session
        assert len(self._streams) - self._streams.parked <= self._most_held, len(self._streams)
        assert self._drain_until is not None or not self._leaving, "a drain of the worker's own was taken back"
        if not self._stopped:
            assert self._announced is self.state, (self._announced, self.state)
            assert self._streams or self._drain_until is None, "nothing is held, and the drain has not ended"

    # --- what the membership asks -----------------------------------------------------------------------------------

    def ready(self, broker: str, now: float) -> Ready | None:
        """Return the READY of the moment; while it loads, there is nothing to say without a model's name."""
        if not (self._models or self._loaded):
            return None
        settings = self._settings
        return Ready(
            worker=settings.name,
            incarnation=self._incarnation,
            software=SOFTWARE,
            models=self._models,
            slots=settings.slots,
            speed=settings.speed,
            engine=self._engine,
            load=self.load(broker, now),
            heartbeat_s=settings.heartbeat_s,
            direct=settings.direct,
        )

    def load(self, broker: str, now: float) -> Load:
        """Return the report of the moment for this broker."""
        started = self._progress.step_started
        in_engine = self._streams.in_engine()
        stats, rates = self._stats, self._progress.rates
        running = min(max(0, stats.running), in_engine)
        return Load(
            state=self.state,
            running=running,
            waiting=in_engine - running,
            held=self._streams.in_engine(broker),
            steps=self._progress.steps,
            step_age_s=0.0 if started is None else max(0.0, now - started),
            tokens_per_s=rates.tokens_per_s,
            kv_use=max(0.0, min(1.0, stats.kv_use)),
            steps_per_s=rates.steps_per_s,
            prefill_use=rates.prefill_use,
            decode_use=rates.decode_use,
            prefix_hits=rates.prefix_hits,
            memory_used_bytes=stats.memory_used_bytes,
            memory_bytes=stats.memory_bytes,
        )

    def others(self, broker: str) -> int:
        """Return how many requests of other brokers the engine has."""
        return self._streams.in_engine() - self._streams.in_engine(broker)

    def receive(self, broker: str, message: Message, now: float) -> bool:
        """Take a broker's message; tell whether a worker is sent such."""
        receive = self._receivers.get(type(message))
        if receive is not None:
            receive(broker, message, now)
        return receive is not None

    def ended(self, broker: str, now: float) -> int:
        """Cancel what came in a session that has ended."""
        return self._desk.leave(broker)

    def barred(self, code: DisconnectCode, now: float) -> None:
        """Stop: no broker is left to work for."""
        if self._drain_until is not None:
            return  # nothing is held any more: it ends as a drain
        name = self._settings.name
        if code is DisconnectCode.REMOVED:
            # No failure: a supervisor that restarts what has failed would bring it back against the operator's will.
            self._stop(0, f"removed: an operator has removed worker {name!r}, and no other broker is left")
        else:
            self._stop(EXIT_FAILED, f"superseded: a newer worker named {name!r} has registered at every broker")

    def _on_request(self, broker: str, message: Request, now: float) -> None:
        closed = None
        if self._drain_until is not None:
            closed = ErrorCode.DRAINING, "the worker is draining"
        elif not self._loaded:
            closed = ErrorCode.NO_WORKER, "the worker is still loading its model"
        self._desk.request(broker, message, self._models, closed, now)

    def _on_drain_message(self, broker: str, message: DrainMessage, now: float) -> None:
        if not message.undo:
            self._drain(message.grace_s, now, broker=broker)
        elif self._drain_until is None or self._leaving:
            reason = "the worker leaves by its own will" if self._leaving else "it does not drain"
            self._orders.log("drain_undo_ignored", level=logging.WARNING, broker=broker, reason=reason)
        else:
            self._drain_until = None
            self._orders.log("drain_undone", broker=broker, held=len(self._streams))

    # --- clients, at the worker's own door --------------------------------------------------------------------------

    def _on_came(self, event: Came, now: float) -> None:
        peer, message = event.peer, event.message
        if isinstance(message, Attach):
            self._desk.attachments.attach(message.id, peer)
        elif isinstance(message, Credit):
            self._desk.credit_from(peer, message, now)
        elif isinstance(message, Goodbye):
            self._let_go(peer, "the client has closed the connection that its chunks went to", now)
        else:
            if isinstance(message, ProtocolError):
                why = message.message[:MAX_TEXT_CHARS]
            else:
                why = f"{message.command.name} is not for workers"
            self._orders.add(Hand(peer, Disconnect(DisconnectCode.PROTOCOL, why)))
            self._let_go(peer, "the client broke the protocol where it takes its chunks", now)

    def _on_deaf(self, event: Deaf, now: float) -> None:
        self._let_go(event.peer, "the client takes no more chunks by its own connection", now)
        if not event.gone:
            # What it misses may be the end of a stream whose FINISH has left: it must hear that there is nothing more
            # to wait for, as soon as it reads on.
            self._part_at[event.peer] = now + PART_AGAIN_S

    def _part(self, now: float) -> None:
        """Send those away that did not read; who still does not is tried again."""
        for peer in [peer for peer, when in self._part_at.items() if now >= when]:
            del self._part_at[peer]
            self._let_go(peer, "the client has not read its own connection", now)
            self._orders.add(Hand(peer, Disconnect(DisconnectCode.EXPIRED, "the connection was not read")))

    def _let_go(self, peer: bytes, why: str, now: float) -> None:
        requests = self._desk.let_go(peer, why, now)
        if requests:
            self._orders.log("direct_lost", level=logging.WARNING, why=why, requests=requests)

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

    def _give_up_step(self, now: float) -> None:
        """End, where a step lasts as if it would never end: whoever started the worker starts it again.

        Its streams go on elsewhere, and a thread that is stuck in native code can only be left with its process.
        """
        started, after_s = self._progress.step_started, self._settings.restart_after_s
        if started is None or not after_s or now < started + after_s:
            return
        self._orders.log("engine_stuck", level=logging.ERROR, step_age_s=now - started, restart_after_s=after_s)
        message = f"the engine is stuck: its step has lasted {now - started:.0f} s"
        self._desk.give_back(ErrorCode.ENGINE_FAILED, message, now)
        self._stop(EXIT_FAILED, "engine_stuck")

    def _on_failed(self, event: EngineFailed, now: float) -> None:
        self._stats = EngineStats()
        requests = self._desk.fail(event.tickets, f"the engine failed: {event.message}", now)
        self._orders.log("engine_failed", level=logging.ERROR, error=event.message, requests=requests)

    def _on_died(self, event: EngineDied, now: float) -> None:
        name = "engine_died" if self._loaded else "model_load_failed"
        self._orders.log(name, level=logging.ERROR, error=event.message)
        self._desk.give_back(ErrorCode.ENGINE_FAILED, f"the engine failed: {event.message}", now)
        self._stop(EXIT_FAILED if self._loaded else EXIT_CANNOT_START, name)

    # --- changes ----------------------------------------------------------------------------------------------------

    def _on_changed(self, event: Changed, now: float) -> None:
        """Serve something else from now on; what is held ends as it would have."""
        asked: dict[str, Any] = {"slots": event.slots, "speed": event.speed}
        settings = replace(self._settings, **{name: value for name, value in asked.items() if value is not None})
        models = self._models if event.models is None else event.models
        if (settings, models) == (self._settings, self._models):
            return
        if settings.slots != self._settings.slots:
            self._orders.add(Resize(settings.slots))
        self._settings, self._models = settings, models
        self._desk.change(settings)
        self._most_held = max(settings.most_held, len(self._streams) - self._streams.parked)
        names = ",".join(model.name for model in models)
        self._orders.log("changed", models=names, slots=settings.slots, speed=settings.speed)
        self._membership.register(now)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _on_drain(self, event: Drain, now: float) -> None:
        self._leaving = True
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

    def _stop(self, exit_code: int, reason: str) -> None:
        self._membership.leave()
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
        if state is WorkerState.DRAINING:
            self._membership.withdraw(now)
        elif before is WorkerState.DRAINING:
            self._membership.stay(now)
        elif before is WorkerState.LOADING:
            self._membership.register(now)
        else:
            self._membership.report(now)
