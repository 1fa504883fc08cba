"""The broker's only loop: two ROUTERs in front of BrokerCore, and a DEALER for each broker above this one.

Each round: wait, receive a bounded batch from each socket, let the core act on it, look at the monitors, let the core
do what is due. Nothing in it waits for a peer: what one does not take is kept in a backlog and tried again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import zmq

from ..protocol.codec import CHUNKS_PREFIX, HEADER_BYTES, encode
from ..protocol.limits import MAX_BODY_BYTES, MAX_CLIENT_BYTES
from ..protocol.log import Log, write
from ..protocol.messages import Disconnect, Message
from ..transport.connections import ConnectionId
from ..transport.curves import curves
from ..transport.endpoints import is_local
from ..transport.links import Links
from ..transport.pump import (
    DONTWAIT,
    SENT,
    SNDMORE_DONTWAIT,
    Pump,
    another,
    raw_recv,
    raw_send,
    send,
)
from ..transport.sockets import router
from .access import BACKEND, FRONTEND, Access
from .backlog import Backlog, Loss
from .core import BrokerCore
from .entry import Entry
from .events import (
    Action,
    BadClient,
    BadWorker,
    ClientGone,
    Event,
    FromClient,
    FromWorker,
    StrayChunks,
    ToClient,
    ToWorker,
    WorkerGone,
)
from .guests import Guest
from .inflow import Inflow
from .registry import ClientSession, Session
from .settings import BrokerSettings
from .side import Side

logger = logging.getLogger("tokenmq.broker")

#: Messages taken from one socket before the other gets its turn, and the time that they may take: what one peer
#: floods keeps all others waiting for as long.
_BATCH = 500
_SLICE_S = 0.0005
#: Where it is chunks, a shorter time would cost a tenth of their rate.
_CHUNKS_SLICE_S = 0.002
#: Chunks are so quick that the clock is looked at once in sixteen.
_LOOK_MASK = 15

#: Messages of one client that libzmq reads ahead. They may be megabytes each, and it counts no bytes.
_UNREAD_REQUESTS = 64

#: While nothing runs, many workers are heard after this time, or a tenth of the heartbeat interval where that is
#: less.
_QUIET_S = 0.1

#: A broker that is behind has unread messages of a worker that is gone; it reads on for so long before it fails what
#: that one held. Tokens that are lost here are made again elsewhere, so no longer.
_READ_ON_S = 0.5

#: Who has no session has no use for longer messages: a HELLO has a name, a READY those of 1,024 models at most.
_MOST_HELLO_BYTES = 4096
_MOST_READY_BYTES = 1024 * 1024

#: A longer CHUNKS message is refused.
_MAX_CHUNKS = HEADER_BYTES + MAX_BODY_BYTES


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
            KeyFileError: keys are asked for, and cannot be used.
        """
        self._clock = clock
        self._settings = settings
        now = clock()
        self._core = BrokerCore(settings, software=software, now=now, incarnation=time.time_ns())
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._drain_wish: float | None = None
        self._pump = Pump()
        try:
            keys = curves(settings.uplink_server_keys, settings.uplink_key, settings.uplinks)
            uplinks = dict(zip(settings.uplinks, keys, strict=bool(keys)))
            self._access = Access(self._context, self._pump, settings.curve, now) if settings.curve else None
            self._frontend = Side(
                *self._router(FRONTEND, settings.frontend, now), self._access, self._core.clients,
                FromClient, BadClient, MAX_CLIENT_BYTES, _MOST_HELLO_BYTES,
            )  # fmt: skip
            self._backend = Side(
                *self._router(BACKEND, settings.backend, now), self._access, self._core.registry.by_peer,
                FromWorker, BadWorker, _MAX_CHUNKS, _MOST_READY_BYTES, self._core.workers.too_much,
            )  # fmt: skip
        except BaseException:
            self._context.destroy(linger=0)
            self._pump.close()
            raise
        self._clients, self.frontend = self._frontend.socket, self._frontend.endpoints
        self._workers, self.backend = self._backend.socket, self._backend.endpoints
        clients, workers = self._frontend.entry, self._backend.entry
        self._inflow = Inflow(clients.bytes_in, now)
        self._core.connections = lambda: {FRONTEND: clients.figures(), BACKEND: workers.figures()}
        self._client_backlog = self._backlog(self._clients)
        self._worker_backlog = self._backlog(self._workers)
        #: Workers that cannot be sent to any more, and of which the core does not know yet.
        self._gone: dict[bytes, Loss] = {}
        self._give_up_at = 0.0
        #: Who could be sent to since this was cleared.
        self._reached: set[bytes] = set()
        #: The core, or a backlog, has had something to do since `_deadline` was asked for.
        self._touched = True
        self._deadline = 0.0
        self._quiet = False
        self._quiet_s = min(_QUIET_S, settings.heartbeat_s / 10)
        for socket in (self._clients, self._workers, clients.socket, workers.socket):
            self._pump.watch(socket)
        self._parents = Links(self._context, self._pump, uplinks)

    def run(self) -> None:
        """Serve until `drain` has been called and everything has ended; then close."""
        started: dict[str, Any] = {"frontend": ",".join(self.frontend), "backend": ",".join(self.backend)}
        if self._access is not None:
            started |= {"curve": self._settings.curve, "keys": len(self._access.allowed.by_key)}
        if self._settings.uplinks:
            started["uplink"] = ",".join(self._settings.uplinks)
        write(logger, Log("broker_started", {"name": self._settings.name, **started}))
        if self._settings.insecure:
            open_to_all = ",".join(each for each in (*self.frontend, *self.backend) if not is_local(each))
            means = "whoever reaches these may register workers and read prompts"
            told = {"why": "--insecure was given", "open": open_to_all or "none", "means": means}
            write(logger, Log("insecure", told, level=logging.WARNING))
        try:
            self._core.log_level(logger.getEffectiveLevel())
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
        self._frontend.entry.close()
        self._backend.entry.close()
        self._clients.close()
        self._workers.close()
        self._parents.close()
        if self._access is not None:
            self._access.close()
        self._context.term()
        self._pump.close()

    def _router(self, side: str, endpoints: Sequence[str], now: float) -> tuple[zmq.Socket[bytes], list[str], Entry]:
        """Return a ROUTER, where it listens, and who watches its connections."""
        made: list[Entry] = []

        def prepare(socket: zmq.Socket[bytes]) -> None:
            if side == FRONTEND:
                socket.setsockopt(zmq.RCVHWM, _UNREAD_REQUESTS)
            made.append(Entry(socket, side, self._settings.limits, now))

        pair = None if self._access is None else self._access.server
        socket, bound = router(
            self._context, endpoints, curve=pair, domain=side,
            prepare=prepare,
        )  # fmt: skip
        return socket, bound, made[0]

    def _backlog(self, socket: zmq.Socket[bytes]) -> Backlog:
        settings = self._settings
        return Backlog(
            lambda frames: send(socket, frames), settings.pending_bytes, settings.write_timeout_s, self._core.pending
        )

    def _round(self) -> None:
        ready = self._pump.wait(0.0 if self._gone else self._deadline - self._clock())
        now = self._clock()
        # Workers first: what they send frees slots for what clients ask.
        if self._workers in ready or self._quiet or self._gone:
            self._from_workers(now)
        if self._clients in ready:
            self._from_clients(now)
        seen = (self._workers in ready) + (self._clients in ready)
        if self._touched or self._drain_wish is not None or len(ready) > seen:
            self._look_around(ready, now)
        elif now < self._deadline and not self._gone:
            return  # nothing but chunks: a lone token pays for nothing else
        now = self._clock()
        self._perform(self._core.tick(now), now)
        self._retry(now)
        if self._gone:
            self._give_up_workers(now)
        self._frontend.entry.tick(now)
        self._backend.entry.tick(now)
        for connection in self._inflow.look(now, self._connections):
            self._frontend.entry.cut_endless(connection, now)
        if self._access is not None and (allowed := self._access.look(now)) is not None:
            self._perform(self._core.allow(allowed, now), now)
        self._touched = False
        self._deadline = self._next_deadline()
        self._listen(now)

    def _listen(self, now: float) -> None:
        """Hear workers at once, or where they have nothing to say but that they live, all together after a while.

        A thousand idle workers would wake the loop a thousand times a second: a tenth of a core for nothing.
        """
        quiet = self._core.quiet
        if quiet is not self._quiet:
            self._quiet = quiet
            if quiet:
                self._pump.forget(self._workers)
            else:
                self._pump.watch(self._workers)
        if quiet:
            pause_s = 0.0 if another(self._workers) else self._quiet_s
            self._deadline = min(self._deadline, now + pause_s)

    def _look_around(self, ready: Mapping[Any, int], now: float) -> None:
        """See to what is rarer than messages of clients and workers."""
        for event in self._parents.events(ready):
            self._handle(event, now)
        if self._access is not None and self._access.socket in ready:
            self._access.answer(now)
        clients, workers = self._frontend.entry, self._backend.entry
        if (workers.socket in ready or workers.broke) and workers.look(now):
            self._perform(self._core.probe_workers(now), now)
        if (clients.socket in ready or clients.broke) and clients.look(now):
            self._perform(self._core.probe_clients(now), now)
        if self._drain_wish is not None:
            grace_s, self._drain_wish = self._drain_wish, None
            self._perform(self._core.drain(now, grace_s), now)

    def _next_deadline(self) -> float:
        others = [self._client_backlog.next_deadline(), self._worker_backlog.next_deadline()]
        others += [self._frontend.entry.next_deadline(), self._backend.entry.next_deadline(), self._inflow.look_at]
        if self._access is not None:
            others.append(self._access.look_at)
        return min([self._core.next_deadline(), *(time for time in others if time is not None)])

    def _connections(self) -> Iterator[tuple[ConnectionId, int | None]]:
        """Go through the connections of both sides: what one brings and what the process grows by belong together."""
        clients, workers = self._core.clients, self._core.registry.by_peer
        yield from self._frontend.entry.connections(lambda peer: _received(clients.get(peer)))
        yield from self._backend.entry.connections(lambda peer: _received(workers.get(peer)))

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
        unread = another(self._workers)
        if unread and now < self._give_up_at:
            return
        gone, self._gone = self._gone, {}
        for loss in gone.values():
            self._handle(WorkerGone(loss.peer, loss.why, loss.stalled), now)

    def _from_workers(self, now: float) -> None:
        """Take what workers have sent, up to a bound. Chunks, nearly all of it, pass here with one look-up each.

        Four calls into libzmq are four fifths of what a chunk costs; hence what is looked up once here, and no
        function of our own but the one that knows where the chunk goes.
        """
        workers, clients, route_chunks = self._workers, self._clients, self._core.route_chunks
        kept, sessions = self._client_backlog.peers, self._core.registry.by_peer
        until = self._clock() + _CHUNKS_SLICE_S
        if self._is_deaf(self._backend, now):
            return
        try:
            for number in range(_BATCH):
                if number == 1 and not another(workers):
                    return
                if not number & _LOOK_MASK and self._clock() >= until:
                    return
                peer = raw_recv(workers, DONTWAIT)
                frame = raw_recv(workers, DONTWAIT, False)
                message = frame.bytes
                if (
                    not frame.more
                    and message.startswith(CHUNKS_PREFIX)
                    and HEADER_BYTES < len(message) <= _MAX_CHUNKS
                ):
                    client = route_chunks(peer, message[8:HEADER_BYTES], now)
                    if client is not None:
                        if type(client) is Guest or (kept and client.peer in kept):
                            self._forward(client, message, now)
                            continue
                        try:
                            raw_send(clients, client.peer, SNDMORE_DONTWAIT)
                            raw_send(clients, message, DONTWAIT)
                        except zmq.ZMQError:  # full, or gone: the backlog tries again and finds out which
                            self._forward(client, message, now)
                        continue
                    if peer in sessions:
                        self._handle(StrayChunks(peer, message[8:HEADER_BYTES]), now)
                        continue
                self._hear(self._backend, peer, frame, now)
                if self._clock() >= until or self._backend.deaf:
                    return
        except zmq.Again:
            return

    def _forward(self, client: ClientSession, message: bytes, now: float) -> None:
        """Pass a CHUNKS message on to a client that is not as most are."""
        self._touched = True
        if isinstance(client, Guest):
            lost = self._parents.send(client.parent, (client.header + message[HEADER_BYTES:],))
            if lost is not None:
                self._handle(lost, now)
            return
        loss = self._client_backlog.send([client.peer, message], now)
        if loss is not None:
            self._handle(_client_gone(loss), now)

    def _from_clients(self, now: float) -> None:
        """Take what clients have sent, up to a bound."""
        side, clients, workers = self._frontend, self._clients, self._workers
        soon = self._clock() + _SLICE_S / 5
        until = soon + _SLICE_S
        if self._is_deaf(side, now):
            return
        try:
            for number in range(_BATCH):
                if number == 1 and not another(clients):
                    return
                peer = raw_recv(clients, DONTWAIT)
                self._hear(side, peer, raw_recv(clients, DONTWAIT, False), now)
                now_at = self._clock()
                # Tokens that have come meanwhile are not to wait behind one client's thousand requests.
                if side.deaf or now_at >= until or (now_at >= soon and another(workers)):
                    return
        except zmq.Again:
            return

    def _hear(self, side: Side, peer: bytes, frame: zmq.Frame, now: float) -> None:
        event = side.take(peer, frame, now)
        if event is not None:
            self._reached.clear()
            self._handle(event, now)
            side.heard(peer, peer in self._reached, now)

    def _is_deaf(self, side: Side, now: float) -> bool:
        """Tell whether a message that nobody reads keeps a side from being heard; its peers are not to expire."""
        excuse_s = side.go_on(now)
        if excuse_s:
            sessions = self._core.clients.values() if side is self._frontend else self._core.registry
            self._core.excuse(sessions, excuse_s, now)
        return side.deaf

    def _handle(self, event: Event, now: float) -> None:
        self._touched = True
        self._perform(self._core.handle(event, now), now)

    def _perform(self, actions: Sequence[Action], now: float) -> None:
        # What follows from a peer that is gone goes behind what was decided before: a heartbeat states how many
        # messages went before it, so each peer must get its messages in the order in which the core made them.
        following: list[Action] = []
        for action in actions:
            if isinstance(action, ToClient):
                frames = action.frames or encode(action.message)
                if type(action.message) is Disconnect:
                    self._frontend.entry.end(action.peer, now)
                if not self._client_backlog.peers and send(self._clients, [action.peer, *frames]) is SENT:
                    self._reached.add(action.peer)
                    continue
                loss = self._send_kept(self._client_backlog, action.peer, frames, action.message, now)
                if loss is not None:
                    following += self._core.handle(_client_gone(loss), now)
            elif isinstance(action, ToWorker):
                frames = action.frames or encode(action.message)
                if type(action.message) is Disconnect:
                    self._backend.entry.end(action.peer, now)
                if not self._worker_backlog.peers and send(self._workers, [action.peer, *frames]) is SENT:
                    self._reached.add(action.peer)
                    continue
                loss = self._send_kept(self._worker_backlog, action.peer, frames, action.message, now)
                if loss is not None:
                    self._worker_lost(loss, now)
            elif isinstance(action, Log):
                write(logger, action)
            else:
                lost = self._parents.perform(action)
                if lost is not None:
                    following += self._core.handle(lost, now)
        if following:
            self._perform(following, now)

    def _send_kept(
        self, backlog: Backlog, peer: bytes, frames: Sequence[bytes], message: Message, now: float
    ) -> Loss | None:
        """Send to a peer that may have stopped reading, or be gone; tell of its loss."""
        self._touched = True
        whole = [peer, *frames]
        if isinstance(message, Disconnect):
            # There is no session any more. Where it finds no room, the peer hears it when it speaks again.
            if backlog.send_last(whole):
                self._reached.add(peer)
            return None
        loss = backlog.send(whole, now)
        if loss is None:
            self._reached.add(peer)
        return loss


def _received(session: Session | None) -> int | None:
    return None if session is None else session.received


def _client_gone(loss: Loss) -> ClientGone:
    return ClientGone(loss.peer, loss.why, loss.stalled)
