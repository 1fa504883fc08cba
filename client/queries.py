"""Questions to a broker that have no answer yet. Each is answered once, within the timeouts, whatever happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..protocol.errors import BrokerLostError, ClientClosedError, DeadlineError, TokenmqError
from ..protocol.messages import Query, Reply
from ..protocol.orders import Orders
from ..protocol.timers import Timers
from .events import Action, Answered, Ask
from .sessions import Sessions
from .settings import Settings


@dataclass(slots=True)
class _Open:
    """A question; `endpoint` is where it went, "" while it waits for a session."""

    question: Ask
    endpoint: str = ""


class Queries:
    """All open questions, by id."""

    def __init__(self, settings: Settings, sessions: Sessions, orders: Orders[Action]) -> None:
        """Have none."""
        self._settings = settings
        self._sessions = sessions
        self._orders = orders
        self._open: dict[bytes, _Open] = {}
        self._timers = Timers()

    def __contains__(self, key: bytes) -> bool:
        """Tell whether the id is that of an open question."""
        return key in self._open

    def ask(self, question: Ask, now: float) -> None:
        """Send a question, or let it wait for a session."""
        key = question.id
        query = self._open[key] = _Open(question)
        if self._sessions.closed:
            self.answer(key, error=ClientClosedError("the client is closed", request_id=key.hex()))
            return
        self._timers.set(key, now + self._settings.connect_timeout_s)
        self._send(query, now)

    def _send(self, query: _Open, now: float) -> None:
        session = self._sessions.any_open()
        if session is None:
            if error := self._sessions.hopeless(query.question.id.hex()):
                self.answer(query.question.id, error=error)
            return
        question, query.endpoint = query.question, session.endpoint
        self._sessions.send(session.endpoint, Query(question.id, question.method, question.arguments), now)
        self._timers.set(question.id, now + self._settings.query_timeout_s)

    def send_waiting(self, now: float) -> None:
        """Send what has waited for a session, if there is one now; fail it where none can be had."""
        for query in list(self._open.values()):
            if not query.endpoint:
                self._send(query, now)

    def session_ended(self, endpoint: str, why: str) -> None:
        """Fail what had been sent in it."""
        for key in [key for key, query in self._open.items() if query.endpoint == endpoint]:
            self.answer(key, error=BrokerLostError(why, retryable=True, request_id=key.hex()))

    def reply(self, message: Reply) -> bool:
        """Take an answer; tell whether anybody waits for it."""
        if message.id not in self._open:
            return False
        self.answer(message.id, result=message.result)
        return True

    def close(self) -> None:
        """Fail them all: the client closes."""
        for key in list(self._open):
            message = "the client was closed before the answer came"
            self.answer(key, error=ClientClosedError(message, request_id=key.hex()))

    def tick(self, now: float) -> None:
        """Fail what has waited for too long."""
        for key in self._timers.due(now):
            query = self._open[key]
            if query.endpoint:
                method, seconds = query.question.method, self._settings.query_timeout_s
                message = f"the broker did not answer the query {method!r} within {seconds:g} s"
                self.answer(key, error=DeadlineError(message, retryable=True, request_id=key.hex()))
            else:
                self.answer(key, error=self._sessions.none_came(key.hex(), self._settings.connect_timeout_s))

    def next_deadline(self) -> float | None:
        """Return when `tick` is next needed, None for never."""
        return self._timers.next()

    def answer(self, key: bytes, *, result: Any = None, error: TokenmqError | None = None) -> None:
        """End a question."""
        del self._open[key]
        self._timers.drop(key)
        self._orders.add(Answered(key, result, error))

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        assert all(key in self._timers for key in self._open), "a question without a bound"
        assert len(self._timers) == len(self._open), "a stray timer"
        for query in self._open.values():
            if query.endpoint:
                assert self._sessions[query.endpoint].open, "asked without a session"
            else:
                assert self._sessions.any_open() is None, "a question waits although a session is open"
                assert self._sessions.hopeless("") is None, "a question waits in vain"
