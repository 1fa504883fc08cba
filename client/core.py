"""ClientCore: everything that decides, nothing that does.

Events go in (what the application wants, what the sockets saw), actions come out (what to send, whom to tell). The
core knows no zmq, no thread and no clock: each call brings the time, in seconds of one monotonic clock. Its rules:

- There is a session with each broker (`sessions.py`). Whatever goes wrong in one ends it, and a new one is opened.
- A request or query waits until a session is open, at most the connect timeout, and leaves then.
- Each one ends exactly once: with Ended or Answered, whatever the brokers do.
- The core holds a stream's request and tokens until it has ended, and repairs what fails (`exchange.py`).
- Chunks may come from workers themselves, where the user wants that (`direct.py`); all else is the broker's.
"""

from __future__ import annotations

import logging
import math
import random as random_module
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..protocol.messages import Chunks, Disconnect, DisconnectCode, Error, Finish, Message, Reply, Started
from ..protocol.orders import Orders
from ..protocol.refusal import AT_FRONTEND, Refusal, explain
from ..transport.networks import Networks
from .direct import Direct
from .events import (
    Action,
    Ask,
    CancelStream,
    Close,
    Connected,
    Event,
    Garbled,
    Grant,
    Heard,
    Lost,
    Malformed,
    Parted,
    Reached,
    Received,
    Refused,
    Submit,
)
from .exchange import Exchange
from .queries import Queries
from .session import Phase, Session, SessionOver
from .sessions import Sessions
from .settings import Settings
from .streams import error_from

#: One line about what a worker has sent that cannot be read is enough for so long.
GARBLED_AGAIN_S = 10.0


class ClientCore:
    """The client's state machine: `handle` and `tick` return what is to be done, in order.

    Attributes:
        sessions: the sessions with the brokers.
    """

    def __init__(self, settings: Settings, *, random: Callable[[], float] = random_module.random) -> None:
        """Make a client without a session; the first `tick` opens them.

        Args:
            settings: endpoints, timeouts, the name.
            random: draws from 0 to 1 for the jitter of pauses.
        """
        self._orders: Orders[Action] = Orders()
        self.sessions = Sessions(settings, self._orders, random)
        self._keyed = bool(settings.curves)
        self._garbled_again_at = -math.inf
        self._direct = Direct(Networks.of(settings.direct), self._orders, keyed=self._keyed)
        self._exchange = Exchange(settings, self.sessions, self._direct, self._orders, random)
        self._queries = Queries(settings, self.sessions, self._orders)
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            Submit: self._exchange.submit,
            CancelStream: self._exchange.cancel,
            Grant: self._exchange.grant,
            Ask: self._queries.ask,
            Connected: self._connected,
            Refused: self._refused,
            Lost: self._lost,
            Received: self._received,
            Malformed: self._malformed,
            Garbled: self._garbled,
            Reached: self._reached,
            Parted: self._parted,
            Heard: self._heard,
            Close: self._close,
        }

    @property
    def closed(self) -> bool:
        """Whether the client is closed; what is submitted now fails at once."""
        return self.sessions.closed

    @property
    def dropped(self) -> Counter[str]:
        """Messages that were received for nothing, by reason; see Exchange."""
        return self._exchange.dropped

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take an event; return the actions that it calls for."""
        self._handlers[type(event)](event, now)
        return self._orders.take()

    def tick(self, now: float) -> list[Action]:
        """Return the actions that the time calls for."""
        # All of them first: a request of one must not go on in another that is over as well.
        silent = [(session, why) for session in self.sessions if (why := session.silence(now)) is not None]
        for session, why in silent:
            self.sessions.end(session, why, now, farewell=session.open)
        for session, why in silent:
            self._session_ended(session, why, now)
        for session in self.sessions:
            heartbeat = session.heartbeat(now)
            if heartbeat is not None:
                self._orders.add(heartbeat)
            if session.start_due(now):
                self._orders.add(session.start(now))
        gathered, reopened = self.sessions.gathered(now), self.sessions.reopened(now)
        if gathered or reopened:
            self._exchange.send_waiting(now)
        for endpoint in self._direct.unreached(now):
            self._direct.part(endpoint, "not connected in time")
        for endpoint in self._direct.idle(now):
            self._direct.looked_at(endpoint, self._exchange.uses(endpoint), now)
        self._exchange.tick(now)
        self._queries.tick(now)
        return self._orders.take()

    def forgive(self, lag_s: float) -> None:
        """Take seconds in which this client did not listen off everybody's silence."""
        for session in self.sessions:
            session.forgive(lag_s)
        self._exchange.forgive(lag_s)

    def next_deadline(self) -> float | None:
        """Return when `tick` is next needed, None while only events matter."""
        parts = (self.sessions, self._direct, self._exchange, self._queries)
        times = [time for part in parts if (time := part.next_deadline()) is not None]
        return min(times, default=None)

    def validate(self) -> None:
        """Check every invariant; tests call it after each step.

        Raises:
            AssertionError: one is broken.
        """
        self.sessions.validate()
        self._direct.validate()
        self._exchange.validate()
        self._queries.validate()

    # Inside

    def _close(self, _event: Close, now: float) -> None:
        if not self.closed:
            self.sessions.close(now)
            self._exchange.close()
            self._queries.close()
            self._direct.close()

    def _connected(self, event: Connected, now: float) -> None:
        session = self.sessions[event.endpoint]
        if session.phase is Phase.CONNECTING:
            self._orders.add(session.greet(now))

    def _refused(self, event: Refused, now: float) -> None:
        session = self.sessions[event.endpoint]
        if session.has_socket:
            reason = explain(event.refusal, session.endpoint, keyed=self._keyed, place=AT_FRONTEND)
            self._end_session(session, reason, now, farewell=False, handshake=event.refusal)

    def _lost(self, event: Lost, now: float) -> None:
        session = self.sessions[event.endpoint]
        if session.has_socket:
            self._end_session(session, event.reason, now, farewell=False)

    def _malformed(self, event: Malformed, now: float) -> None:
        session = self.sessions[event.endpoint]
        if session.phase in (Phase.GREETING, Phase.OPEN):
            reason = f"the broker sent what is no message: {event.error.message}"
            self._end_session(session, reason, now, farewell=True)

    def _garbled(self, event: Garbled, now: float) -> None:
        """Drop what a worker has sent and nobody can read: its streams miss it, and all others notice nothing."""
        session = self.sessions[event.endpoint]
        if not session.open:
            return
        session.heard(now)
        self._exchange.dropped["garbled"] += 1
        if now >= self._garbled_again_at:
            self._garbled_again_at = now + GARBLED_AGAIN_S
            self._orders.log(
                "chunks_garbled", level=logging.WARNING, endpoint=event.endpoint, reason=event.error.message,
                so_far=self._exchange.dropped["garbled"],
            )  # fmt: skip

    def _received(self, event: Received, now: float) -> None:
        session = self.sessions[event.endpoint]
        # In any other phase it came through a socket that is closed already.
        if session.phase not in (Phase.GREETING, Phase.OPEN):
            return
        was_open = session.open
        try:
            about_request = session.hear(event.message, now)
        except SessionOver as over:
            handshake = Refusal.FORBIDDEN if over.code is DisconnectCode.FORBIDDEN else None
            limited = over.code is DisconnectCode.RATE_LIMITED
            self._end_session(
                session, over.reason, now, farewell=not over.mutual, handshake=handshake, limited=limited
            )
            return
        if about_request:
            self._take(event.message, event.endpoint, now)
        elif session.open and not was_open:
            self.sessions.opened(session, now)
            self._exchange.send_waiting(now)
            self._queries.send_waiting(now)

    def _reached(self, event: Reached, now: float) -> None:
        self._direct.connected(event.endpoint, now)

    def _parted(self, event: Parted, now: float) -> None:
        if self._direct.has(event.endpoint):
            self._part(event.endpoint, event.reason, now)

    def _heard(self, event: Heard, now: float) -> None:
        endpoint, message = event.endpoint, event.message
        if not self._direct.is_open(endpoint):
            return  # it came by a link that is closed already
        if isinstance(message, Chunks):
            broker = self._direct.giver(endpoint, message.route)
            if broker is None:
                self._exchange.dropped["unknown"] += len(message.chunks)
                return
            for chunk in message.chunks:
                self._exchange.chunk(chunk, broker, now, endpoint)
        else:
            told = f": {message.message}" if isinstance(message, Disconnect) else ""
            self._part(endpoint, f"the worker sent {message.command.name}{told}", now)

    def _part(self, endpoint: str, reason: str, now: float) -> None:
        if self._direct.part(endpoint, reason):
            why = f"the connection to the worker at {endpoint} was lost: {reason}"
            self._exchange.link_lost(endpoint, why, now)

    def _take(self, message: Message, endpoint: str, now: float) -> None:
        if isinstance(message, Chunks):
            for chunk in message.chunks:
                self._exchange.chunk(chunk, endpoint, now)
        elif isinstance(message, Finish):
            self._exchange.finish(message, endpoint, now)
        elif isinstance(message, Started):
            taken = self._exchange.started(message, endpoint, now)
            if taken and message.direct and message.key is not None:
                self._direct.offered(message.direct, message.key, endpoint, now, message.server_key)
        elif isinstance(message, Error):
            if message.id in self._queries:
                self._queries.answer(message.id, error=error_from(message))
            else:
                self._exchange.error(message, endpoint, now)
        elif isinstance(message, Reply) and not self._queries.reply(message):
            self._exchange.dropped["unknown"] += 1

    def _end_session(
        self,
        session: Session,
        reason: str,
        now: float,
        *,
        farewell: bool,
        handshake: Refusal | None = None,
        limited: bool = False,
    ) -> None:
        self.sessions.end(session, reason, now, farewell=farewell, handshake=handshake, limited=limited)
        self._session_ended(session, reason, now)

    def _session_ended(self, session: Session, reason: str, now: float) -> None:
        message = f"the session with the broker at {session.endpoint} ended: {reason}"
        self._direct.session_ended(session.endpoint)
        self._exchange.session_ended(session.endpoint, message, now)
        # What has waited for this one goes to another of its group, or fails where no other can be had.
        self._exchange.send_waiting(now)
        self._queries.session_ended(session.endpoint, message)
        self._queries.send_waiting(now)
