"""The broker's only loop: two ROUTERs in front of BrokerCore, and a DEALER for each broker above this one.

Each round: wait, receive a bounded batch from each socket, let the core act on it, look at the monitors, let the core
do what is due. Nothing in it waits for a peer: what one does not take is kept in a backlog and tried again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import zmq

from ..protocol.codec import CHUNKS_PREFIX, HEADER_BYTES, decode, encode
from ..protocol.errors import ProtocolError
from ..protocol.limits import MAX_BODY_BYTES
from ..protocol.links import Open, Send, Shut
from ..protocol.log import Log, write
from ..protocol.messages import Disconnect
from ..transport.links import Links
from ..transport.monitor import ConnectionEvent, Monitor
from ..transport.pump import Outcome, Pump, receive, send
from ..transport.sockets import router
from .backlog import Backlog, Loss
from .core import BrokerCore
from .events import Action, BadClient, BadWorker, ClientGone, Event, FromClient, FromWorker, ToClient, WorkerGone
from .guests import Guest
from .settings import BrokerSettings

logger = logging.getLogger("tokenmq.broker")

#: Messages taken from one socket before the other gets its turn: about five milliseconds of work.
_BATCH = 500
#: Some messages take far longer to read; then heartbeats and the other socket come first after this time, and the
#: rest of the batch waits for the next round. (Receiving in small parts instead cost a fifth of the rate.)
_BATCH_S = 0.02

#: A broker that is behind has unread messages of a worker that is gone; it reads on for so long before it fails what
#: that one held. Tokens that are lost here are made again elsewhere, so no longer.
_READ_ON_S = 0.5

#: A longer CHUNKS message is refused.
_MAX_CHUNKS_BYTES = HEADER_BYTES + MAX_BODY_BYTES


class BrokerServer:
    """A broker on its sockets.

    Attributes:
        frontend: the endpoints for clients, as bound.
        backend: the endpoints for workers, as bound.
    """

    def __init__(
        self, settings: BrokerSettings, *, software: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Bind the sockets.

        Raises:
            EndpointError: an endpoint cannot be bound; nothing is left open.
        """
        self._clock = clock
        self._settings = settings
        self._core = BrokerCore(settings, software=software, now=clock(), incarnation=time.time_ns())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._drain_wish: float | None = None
        try:
            self._clients, self.frontend = router(self._context, settings.frontend)
            self._workers, self.backend = router(self._context, settings.backend)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._client_backlog = self._backlog(self._clients)
        self._worker_backlog = self._backlog(self._workers)
        self._client_monitor = Monitor(self._clients)
        self._worker_monitor = Monitor(self._workers)
        #: Received messages of a batch that took too long, by socket.
        self._left: dict[zmq.Socket[bytes], list[list[bytes]]] = {}
        #: Workers that cannot be sent to any more, and of which the core does not know yet.
        self._gone: dict[bytes, Loss] = {}
        self._give_up_at = 0.0
        self._pump = Pump()
        for socket in (self._clients, self._workers, self._client_monitor.socket, self._worker_monitor.socket):
            self._pump.watch(socket)
        self._parents = Links(self._context, self._pump)

    def run(self) -> None:
        """Serve until `drain` has been called and everything has ended; then close."""
        started = {"frontend": ",".join(self.frontend), "backend": ",".join(self.backend)}
        if self._settings.uplinks:
            started["uplink"] = ",".join(self._settings.uplinks)
        write(logger, Log("broker_started", {"name": self._settings.name, **started}))
        if self._settings.insecure:
            write(logger, Log("insecure", {"why": "--insecure was given"}, level=logging.WARNING))
        try:
            while not self._core.stopped:
                self._round()
        finally:
            self.close()

    def drain(self, grace_s: float | None = None) -> None:
        """Stop as `BrokerCore.drain` does; may be called from any thread and from a signal handler."""
        self._drain_wish = self._settings.grace_s if grace_s is None else grace_s
        self._pump.waker.wake()

    def close(self) -> None:
        """Close all sockets; what was sent may still leave for as long as they linger."""
        self._client_monitor.close()
        self._worker_monitor.close()
        self._clients.close()
        self._workers.close()
        self._parents.close()
        self._context.term()
        self._pump.close()

    def _backlog(self, socket: zmq.Socket[bytes]) -> Backlog:
        settings = self._settings
        return Backlog(
            lambda frames: send(socket, frames), settings.pending_bytes, settings.write_timeout_s, self._core.pending
        )

    def _round(self) -> None:
        ready = self._pump.wait(0.0 if self._left or self._gone else self._next_deadline() - self._clock())
        now = self._clock()
        # Workers first: what they send frees slots for what clients ask.
        if self._workers in ready or self._workers in self._left:
            self._from_workers(now)
        for event in self._parents.events(ready):
            self._handle(event, now)
        if self._clients in ready or self._clients in self._left:
            self._from_clients(now)
        if self._worker_monitor.socket in ready and _broken(self._worker_monitor):
            self._perform(self._core.probe_workers(now), now)
        if self._client_monitor.socket in ready and _broken(self._client_monitor):
            self._perform(self._core.probe_clients(now), now)
        if self._drain_wish is not None:
            grace_s, self._drain_wish = self._drain_wish, None
            self._perform(self._core.drain(now, grace_s), now)
        now = self._clock()
        self._perform(self._core.tick(now), now)
        self._retry(now)
        if self._gone:
            self._give_up_workers(now)

    def _next_deadline(self) -> float:
        backlogs = (self._client_backlog.next_deadline(), self._worker_backlog.next_deadline())
        return min([self._core.next_deadline(), *(time for time in backlogs if time is not None)])

    def _retry(self, now: float) -> None:
        for loss in self._worker_backlog.retry(now):
            self._worker_lost(loss, now)
        for loss in self._client_backlog.retry(now):
            self._handle(_client_gone(loss), now)

    def _worker_lost(self, loss: Loss, now: float) -> None:
        if not self._gone:
            self._give_up_at = now + _READ_ON_S
        self._gone.setdefault(loss.peer, loss)

    def _give_up_workers(self, now: float) -> None:
        """Tell the core of workers that are gone, when all that they sent is read: tokens and ends may be in it."""
        unread = self._workers in self._left or self._workers.poll(0, zmq.POLLIN)
        if unread and now < self._give_up_at:
            return
        gone, self._gone = self._gone, {}
        for loss in gone.values():
            self._handle(WorkerGone(loss.peer, loss.why, loss.stalled), now)

    def _from_workers(self, now: float) -> None:
        kept = self._client_backlog.peers
        for frames in self._batch(self._workers):
            message = frames[1] if len(frames) == 2 else b""
            if message.startswith(CHUNKS_PREFIX) and HEADER_BYTES < len(message) <= _MAX_CHUNKS_BYTES:
                client = self._core.route_chunks(frames[0], message[8:HEADER_BYTES], now)
                if type(client) is Guest:
                    lost = self._parents.send(client.parent, (client.header + message[HEADER_BYTES:],))
                    if lost is not None:
                        self._handle(lost, now)
                    continue
                if client is not None:
                    frames[0] = client.peer
                    if kept or send(self._clients, frames) is not Outcome.SENT:
                        loss = self._client_backlog.send(frames, now)
                        if loss is not None:
                            self._handle(_client_gone(loss), now)
                    continue
            try:
                event: Event = FromWorker(frames[0], decode(frames[1:]))
            except ProtocolError as error:
                event = BadWorker(frames[0], error)
            self._handle(event, now)

    def _from_clients(self, now: float) -> None:
        for frames in self._batch(self._clients):
            try:
                event: Event = FromClient(frames[0], decode(frames[1:]))
            except ProtocolError as error:
                event = BadClient(frames[0], error)
            self._handle(event, now)

    def _batch(self, socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
        messages = self._left.pop(socket, None) or receive(socket, _BATCH)
        until = self._clock() + _BATCH_S
        for number, frames in enumerate(messages, start=1):
            yield frames
            if self._clock() >= until and number < len(messages):
                self._left[socket] = messages[number:]
                return

    def _handle(self, event: Event, now: float) -> None:
        self._perform(self._core.handle(event, now), now)

    def _perform(self, actions: Sequence[Action], now: float) -> None:
        # What follows from a peer that is gone goes behind what was decided before: a heartbeat states how many
        # messages went before it, so each peer must get its messages in the order in which the core made them.
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Log):
                write(logger, action)
                continue
            if isinstance(action, (Open, Send, Shut)):
                lost = self._parents.perform(action)
                if lost is not None:
                    queue.extend(self._core.handle(lost, now))
                continue
            is_client = isinstance(action, ToClient)
            backlog = self._client_backlog if is_client else self._worker_backlog
            frames = [action.peer, *encode(action.message)]
            if isinstance(action.message, Disconnect):
                # There is no session any more. Where it finds no room, the peer hears it when it speaks again.
                backlog.send_last(frames)
                continue
            loss = backlog.send(frames, now)
            if loss is not None and is_client:
                queue.extend(self._core.handle(_client_gone(loss), now))
            elif loss is not None:
                self._worker_lost(loss, now)


def _client_gone(loss: Loss) -> ClientGone:
    return ClientGone(loss.peer, loss.why, loss.stalled)


def _broken(monitor: Monitor) -> bool:
    return ConnectionEvent.DISCONNECTED in monitor.events()
