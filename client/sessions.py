"""The sessions with all brokers, and which of them a request goes to.

Requests go to the first broker, in the client's order, that takes any. Where that one belongs to a group, they go to
the one of the group that takes requests and comes first in an order that this client has drawn. So

- many clients spread evenly over a group, also those of a broker that has died over the others;
- all streams of one client are at one broker, whose worker sends the tokens of all in one message;
- a broker that comes back gets its clients' next requests; what runs elsewhere ends there.

A broker whose limits this client has reached takes no request for a while (`gate.py`): another one may.

Questions go to the first in the client's order: they are about a broker, and not work to be spread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from ..protocol.errors import DrainingError, ForbiddenError, NoBrokerError, RateLimitedError, TokenmqError
from ..protocol.messages import Goodbye, Message, Request
from ..protocol.orders import Orders
from ..protocol.refusal import Refusal
from .events import Action, CloseSocket
from .session import Phase, Session
from .settings import Settings

#: All brokers are asked for a session at once. So long behind a group's first answer, requests wait for the one that
#: was drawn, if it has not answered yet: else most clients would begin at the one that answers first.
GATHER_S = 0.1


class Sessions:
    """One session for each broker, in the order in which the settings prefer them.

    All are held open, so that a request whose broker has died goes to the next one without a handshake before it.
    """

    def __init__(self, settings: Settings, orders: Orders[Action], random: Callable[[], float]) -> None:
        """Have no session yet."""
        self._settings = settings
        self._orders = orders
        self._by_endpoint = {endpoint: Session(endpoint, settings, random) for endpoint in settings.endpoints}
        self._drawn = sorted(self, key=lambda _session: random())
        #: Until when requests wait for a broker that has not been tried; None before a group's first answer.
        self._gather_until: float | None = None
        self._gathered = False
        self.closed = False

    def __iter__(self) -> Iterator[Session]:
        """Go through them in the order of preference."""
        return iter(self._by_endpoint.values())

    def __getitem__(self, endpoint: str) -> Session:
        """Return the session with this broker."""
        return self._by_endpoint[endpoint]

    def best(self) -> Session | None:
        """Return the session that requests go to now; None where no broker takes any, or the drawn one may yet."""
        first = self._first()
        if first is None or not first.group:
            return first
        for session in self._drawn:
            if session.takes_requests and session.group == first.group:
                return session
            if not (session.tried or self._gathered):
                return None
        raise AssertionError(first)  # it is one of them

    def any_open(self) -> Session | None:
        """Return the session that questions go to: a broker that drains still answers them."""
        answering = (session for session in self if session.answers)
        return next(answering, None) or next((session for session in self if session.open), None)

    def _first(self) -> Session | None:
        return next((session for session in self if session.takes_requests), None)

    def opened(self, session: Session, now: float) -> None:
        """Note a session that is open now."""
        self._orders.log("session_opened", endpoint=session.endpoint, broker=session.broker)
        if session.group and self._gather_until is None:
            self._gather_until = now + GATHER_S

    def gathered(self, now: float) -> bool:
        """Tell, once, that requests wait no longer for a broker that has not been tried."""
        if self._gathered or self._gather_until is None or now < self._gather_until:
            return False
        self._gathered = True
        return True

    def send(self, endpoint: str, message: Message, now: float) -> None:
        """Send in an open session."""
        self._orders.add(self._by_endpoint[endpoint].say(message, now))

    def submit(self, endpoint: str, request: Request, now: float) -> None:
        """Send a request, which counts towards the broker's limits."""
        self.send(endpoint, request, now)
        self._by_endpoint[endpoint].gate.passed(now)

    def reopened(self, now: float) -> bool:
        """Tell whether a broker takes the next request now, after a pause that its limits have asked for."""
        opened = [session.gate.tick(now) for session in self]  # of each one
        return any(opened)

    def held_since(self) -> float | None:
        """Return since when no broker is known to take requests, where limits alone keep them here; else None."""
        return max((session.gate.moved_at for session in self if session.held), default=None)

    def end(
        self,
        session: Session,
        reason: str,
        now: float,
        *,
        farewell: bool,
        handshake: Refusal | None = None,
        limited: bool = False,
    ) -> None:
        """End a session, or a try to get one; the next try comes after a pause.

        Args:
            session: it.
            reason: for a person.
            now: the time.
            farewell: the broker is to be told.
            handshake: see `Session.pause`.
            limited: see `Session.pause`.
        """
        was_open = session.open
        if farewell:
            self._orders.add(session.say(Goodbye(), now))
        if session.has_socket:
            self._orders.add(CloseSocket(session.endpoint))
        level = logging.WARNING if was_open else logging.DEBUG
        name = "session_lost" if was_open else "connect_failed"
        self._orders.log(name, level=level, endpoint=session.endpoint, reason=reason)
        if limited:
            session.gate.refused(None, now, now)  # and slowly then
        session.pause(reason, now, handshake=handshake, limited=limited)

    def close(self, now: float) -> None:
        """End all sessions for good."""
        self.closed = True
        for session in self:
            if session.open:
                self._orders.add(session.say(Goodbye(), now))
            if session.has_socket:
                self._orders.add(CloseSocket(session.endpoint))
            session.close()

    def hopeless(self, request_id: str) -> TokenmqError | None:
        """Return the error where it is useless to wait: brokers refuse our keys, and the others were never there.

        A broker that was there once may come back, so that is worth the wait.
        """
        refused = [session for session in self if session.refusal is not None]
        if not refused or not all(session.refusal is not None or session.absent for session in self):
            return None
        message = "; ".join(map(_why, self))
        if any(session.refusal is Refusal.FORBIDDEN for session in refused):
            return ForbiddenError(message, request_id=request_id)
        unsure = any(session.refusal is Refusal.BROKEN_OFF for session in refused)
        return NoBrokerError(message, retryable=unsure, request_id=request_id)

    def none_came(self, request_id: str, waited_s: float) -> TokenmqError:
        """Return the error for what has waited for a session in vain."""
        seconds = f"{waited_s:g} s"
        for session in self:
            if session.held:
                message = f"the broker at {session.endpoint} limits this client, and has taken nothing for {seconds}"
                return RateLimitedError(message, retryable=True, request_id=request_id)
        for session in self:
            if session.draining:
                message = (
                    f"the broker at {session.endpoint} is shutting down, and no other took over within {seconds}"
                )
                return DrainingError(message, retryable=True, request_id=request_id)
        message = f"no broker answered within {seconds}; tried {', '.join(self._by_endpoint)}"
        failures = [session.failure for session in self if session.failure]
        if failures:
            # The first broker is the one that people mean.
            message += f"; the last try: {failures[0]}"
        return NoBrokerError(message, retryable=True, request_id=request_id)

    def next_deadline(self) -> float | None:
        """Return when the first of them needs a `tick`, None for never."""
        times = [time for session in self if (time := session.next_deadline()) is not None]
        if not self.closed:
            times += [time for session in self if (time := session.gate.next_deadline()) is not None]
        if self._gather_until is not None and not self._gathered and not self.closed:
            times.append(self._gather_until)
        return min(times, default=None)

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        for session in self:
            assert (session.phase is Phase.CLOSED) == self.closed, session.endpoint
            assert session.open or not session.draining, session.endpoint


def _why(session: Session) -> str:
    """Return why there is no session, and with whom."""
    if session.endpoint in session.failure:
        return session.failure
    if session.refusal is not None:  # it has said so in a session
        return f"the session with the broker at {session.endpoint} ended: {session.failure}"
    return f"{session.endpoint}: {session.failure}"
