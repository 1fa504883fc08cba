"""The worker's only I/O loop: sockets <-> WorkerCore <-> engine thread. Heartbeats never wait for the model."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType

import zmq

from ..protocol.links import Open, Send, Shut
from ..protocol.log import Log, write
from ..protocol.messages import ModelInfo
from ..transport.door import MOST_CONNECTIONS, Door
from ..transport.endpoints import check_destination, is_local
from ..transport.links import Links
from ..transport.pump import Outcome, Pump
from ..transport.rounds import Rounds
from .core import WorkerCore
from .engine_thread import EngineThread
from .engines.base import Engine
from .events import (
    Action,
    Came,
    CancelJob,
    Changed,
    Deaf,
    Drain,
    EngineOutputs,
    Event,
    Hand,
    Resize,
    Stop,
    Submit,
)
from .settings import WorkerSettings

LOGGER = logging.getLogger("tokenmq.worker")
#: At the end: time for the engine to end its step.
_ENGINE_STOP_S = 2.0
#: Open files that clients leave to everything else: brokers, the engine, the model's files.
_FILES_FOR_OTHERS = 256
#: Clients that are let in however few files there may be.
_LEAST_CONNECTIONS = 16


class WorkerServer:
    """One worker: an engine, and a session with each broker.

    Attributes:
        engine_abandoned: closed, but the engine's thread is still in a step; it may be anywhere in native code.
    """

    def __init__(
        self, engine: Engine, settings: WorkerSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make a worker; `run` does everything else, or `close` if it is not to run.

        Args:
            engine: the engine, not loaded yet; the worker loads and closes it.
            settings: how the worker presents itself and behaves.
            clock: seconds, monotonic.

        Raises:
            EndpointError: a broker's endpoint is not valid, or the worker's own cannot be bound.
        """
        for broker in settings.brokers:
            check_destination(broker)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pump = Pump()
        self._door = self._open_door(settings) if settings.direct else None
        if self._door is not None:
            settings = replace(settings, direct=self._door.endpoint)
        self._clock = clock
        self._settings = settings
        self._core = WorkerCore(settings, engine.name, time.time_ns())
        #: Events from other threads and signal handlers; appending is atomic.
        self._inbox: deque[Event] = deque()
        self._engine = EngineThread(engine, self._post, clock)
        # Of no keys or of one set for each broker.
        self._links = Links(self._context, self._pump, dict(zip(settings.brokers, settings.curves, strict=False)))
        self._rounds = Rounds(self._pump, clock)
        self._stop: Stop | None = None
        self._closed = False
        self.engine_abandoned = False

    def __enter__(self) -> WorkerServer:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def run(self) -> int:
        """Serve until a drain, an engine that cannot go on, or the last broker has sent the worker away for good.

        Returns:
            The exit code: 0 after a drain, else 1; the log has told why.

        Raises:
            EndpointError: libzmq refuses an endpoint.
        """
        try:
            self._engine.start()
            if self._door is not None:
                write(LOGGER, Log("direct_offered", {"endpoint": self._door.endpoint}))
                if self._settings.pair is None and not is_local(self._door.endpoint):
                    write(LOGGER, Log("insecure", {"why": "--insecure was given"}, level=logging.WARNING))
            self._rounds = Rounds(self._pump, self._clock)  # the time since it was made counts for nothing
            self._perform(self._core.start(self._rounds.now))
            while self._stop is None:
                self._round()
        finally:
            self.close()
        level = logging.INFO if self._stop.exit_code == 0 else logging.ERROR
        reason, exit_code = self._stop.reason, self._stop.exit_code
        write(LOGGER, Log("worker_stopped", {"reason": reason, "exit_code": exit_code}, level=level))
        return exit_code

    def drain(self, grace_s: float | None = None) -> None:
        """Finish what is held, for at most `grace_s` seconds (None: as in the settings), then let `run` return.

        May be called from any thread, from a signal handler, and before `run`.
        """
        self._post(Drain(grace_s))

    def change(
        self, *, models: Sequence[ModelInfo] | None = None, slots: int | None = None, speed: float | None = None
    ) -> None:
        """Serve something else from now on, and tell all brokers at once; what is held ends as it would have.

        May be called from any thread.

        Args:
            models: all that the engine serves now; None leaves it as it is, as with the others.
            slots: requests to run at a time. Where the engine cannot run so many, as many as it can.
            speed: tokens a second of one stream; see WorkerSettings.

        Raises:
            ValueError: a value cannot be used; the message says which and why.
        """
        names = self._settings.models if models is None else tuple(model.name for model in models)
        if len(set(names)) != len(names):
            raise ValueError(f"models: expected each name once, got {', '.join(names)}")
        # Made only to be checked, here, where the caller can be told.
        replace(self._settings, models=names, slots=self._settings.slots if slots is None else slots, speed=speed)
        self._post(Changed(None if models is None else tuple(models), slots, speed))

    def close(self) -> None:
        """Close sockets and engine; a step that does not end is left to itself. `run` calls it."""
        if self._closed:
            return
        self._closed = True
        if self._door is not None:
            self._door.close()
        self._links.close()
        self._context.term()
        if not self._engine.stop(_ENGINE_STOP_S):
            self.engine_abandoned = True
            write(LOGGER, Log("engine_abandoned", {"waited_s": _ENGINE_STOP_S}, level=logging.WARNING))
        self._pump.close()

    def _open_door(self, settings: WorkerSettings) -> Door:
        """Listen for clients; where that fails, nothing is left open."""
        try:
            most = most_connections(_open_files())
            return Door(self._context, settings.direct, self._pump, settings.pair, most=most)
        except BaseException:
            self._context.destroy(linger=0)
            self._pump.close()
            raise

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        """Wait and act once."""
        ready = self._rounds.wait(self._rounds.now if self._inbox else self._core.next_deadline())
        if self._rounds.late_s:
            self._core.forgive(self._rounds.late_s)
        self._take_inbox()
        for event in self._links.events(ready):
            self._tell(event)
        if self._door is not None:
            self._door.look(self._rounds.now)
        if self._door is not None and self._door.among(ready):
            for peer, message in self._door.receive():
                self._tell(Came(peer, message))
        self._tell(self._engine.progress())
        self._perform(self._core.tick(self._rounds.now))

    def _take_inbox(self) -> None:
        """Hand on what has come; outputs of several steps are joined, so that a loop that is behind sends less."""
        left = len(self._inbox)  # what comes meanwhile has its turn after the sockets
        while left:
            event = self._inbox.popleft()
            left -= 1
            if isinstance(event, EngineOutputs) and left and isinstance(self._inbox[0], EngineOutputs):
                outputs = list(event.outputs)
                while left and isinstance(following := self._inbox[0], EngineOutputs):
                    event = following
                    outputs.extend(event.outputs)
                    self._inbox.popleft()
                    left -= 1
                event = EngineOutputs(outputs, event.stats)
            self._tell(event)

    def _tell(self, event: Event) -> None:
        self._perform(self._core.handle(event, self._rounds.now))

    def _post(self, event: Event) -> None:
        self._inbox.append(event)
        self._pump.waker.wake()

    # --- actions ----------------------------------------------------------------------------------------------------

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, (Open, Send, Shut)):
                lost = self._links.perform(action)
                if lost is not None:
                    self._post(lost)
            elif isinstance(action, Hand):
                outcome = self._door.send(action.peer, action.message) if self._door else Outcome.GONE
                if outcome is not Outcome.SENT:
                    self._post(Deaf(action.peer, outcome is Outcome.GONE))
            elif isinstance(action, (Submit, CancelJob, Resize)):
                self._engine.post(action)
            elif isinstance(action, Log):
                write(LOGGER, action)
            else:
                self._stop = action


def most_connections(files: int) -> int:
    """Return how many connections of clients there may be at a time where so many files may be open.

    Where none is left, libzmq takes no connection and tries to without a pause, and the engine can open nothing.
    """
    return max(_LEAST_CONNECTIONS, min(MOST_CONNECTIONS, files - _FILES_FOR_OTHERS))


def _open_files() -> int:
    """Return how many files this process may have open now."""
    if sys.platform == "win32":
        return sys.maxsize  # no such limit
    import resource  # not there on Windows

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit < 0 else limit
