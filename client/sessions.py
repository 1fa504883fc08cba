"""The sessions with all brokers, and which of them a request goes to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from ..protocol.errors import DrainingError, NoBrokerError, TokenmqError
from ..protocol.messages import Goodbye, Message
from ..protocol.orders import Orders
from .events import Action, CloseSocket
from .session import Phase, Session
from .settings import Settings


class Sessions:
    """One session for each broker, in the order in which the settings prefer them.

    All are held open, so that a request whose broker has died goes to the next one without a handshake before it.
    """

    def __init__(self, settings: Settings, orders: Orders[Action], random: Callable[[], float]) -> None:
        """Have no session yet."""
        self._settings = settings
        self._orders = orders
        self._by_endpoint = {endpoint: Session(endpoint, settings, random) for endpoint in settings.endpoints}
        self.closed = False

    def __iter__(self) -> Iterator[Session]:
        """Go through them in the order of preference."""
        return iter(self._by_endpoint.values())

    def __getitem__(self, endpoint: str) -> Session:
        """Return the session with this broker."""
        return self._by_endpoint[endpoint]

    def best(self) -> Session | None:
        """Return the session that requests go to now; None where no broker takes any."""
        return next((session for session in self if session.open and not session.draining), None)

    def any_open(self) -> Session | None:
        """Return the session that questions go to: a broker that drains still answers them."""
        return self.best() or next((session for session in self if session.open), None)

    def send(self, endpoint: str, message: Message, now: float) -> None:
        """Send in an open session."""
        self._orders.add(self._by_endpoint[endpoint].say(message, now))

    def end(self, session: Session, reason: str, now: float, *, farewell: bool) -> None:
        """End a session, or a try to get one; the next try comes after a pause."""
        was_open = session.open
        if farewell:
            self._orders.add(session.say(Goodbye(), now))
        if session.has_socket:
            self._orders.add(CloseSocket(session.endpoint))
        level = logging.WARNING if was_open else logging.DEBUG
        name = "session_lost" if was_open else "connect_failed"
        self._orders.log(name, level=level, endpoint=session.endpoint, reason=reason)
        session.pause(reason, now)

    def close(self, now: float) -> None:
        """End all sessions for good."""
        self.closed = True
        for session in self:
            if session.open:
                self._orders.add(session.say(Goodbye(), now))
            if session.has_socket:
                self._orders.add(CloseSocket(session.endpoint))
            session.close()

    def none_came(self, request_id: str, waited_s: float) -> TokenmqError:
        """Return the error for what has waited for a session in vain."""
        seconds = f"{waited_s:g} s"
        for session in self:
            if session.open:
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
        return min(times, default=None)

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        for session in self:
            assert (session.phase is Phase.CLOSED) == self.closed, session.endpoint
            assert session.open or not session.draining, session.endpoint
