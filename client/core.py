"""ClientCore: everything that decides, nothing that does.

Events go in (what the application wants, what the socket saw), actions come out (what to send, whom to tell). The
core knows no zmq, no thread and no clock: each call brings the time, in seconds of one monotonic clock. Its rules:

- A request or query waits until a session is open, at most the connect timeout, and leaves then.
- Each one ends exactly once: with Ended or Answered, whatever the broker does.
- When a session ends, what had left in it fails with BrokerLostError; what was still waiting waits for the next.
- The core holds a stream's whole request until it has ended, so that it could be submitted again.
"""

from __future__ import annotations

import logging
import random as random_module
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import (
    BrokerLostError,
    ClientClosedError,
    DeadlineError,
    NoBrokerError,
    TokenmqError,
)
from ..protocol.log import Log
from ..protocol.messages import Chunk, Chunks, Error, Finish, FinishReason, Goodbye, Query, Reply
from ..protocol.timers import Timers
from .events import (
    Action,
    Answered,
    Ask,
    CancelStream,
    Close,
    CloseSocket,
    Connected,
    Deliver,
    Ended,
    Ending,
    Event,
    Grant,
    Lost,
    Malformed,
    Received,
    Submit,
)
from .session import Phase, Session, SessionOver
from .settings import Settings
from .streams import OpenStream, StreamFaultError, error_from

#: The broker ends a request at its deadline and knows where it was; only one that is frozen or cut off needs us.
DEADLINE_SLACK_S = 0.25


@dataclass(slots=True)
class _OpenQuery:
    question: Ask
    sent: bool = False


class ClientCore:
    """The client's state machine: `handle` and `tick` return what is to be done, in order.

    Attributes:
        session: the session with a broker.
        dropped: messages that were received for nothing, by reason: `unknown` (a stream that is over, or foreign),
            `attempt` (an older submission), `repeat`.
    """

    def __init__(self, settings: Settings, *, random: Callable[[], float] = random_module.random) -> None:
        """Make a client without a session; the first `tick` opens one.

        Args:
            settings: endpoints, timeouts, the name.
            random: draws from 0 to 1 for the jitter of the back-off.
        """
        self._settings = settings
        self.session = Session(settings, random)
        self.dropped: Counter[str] = Counter()
        self._streams: dict[bytes, OpenStream] = {}
        self._queries: dict[bytes, _OpenQuery] = {}
        #: What waits for a session, in the order of submission.
        self._waiting: dict[bytes, None] = {}
        #: Every waiting request or query; of those that have left, every query and every request with a deadline.
        self._timers = Timers()
        #: Why the last try to get a session failed: a wrong port, say, answers with why it will have none.
        self._failure = ""
        self._out: list[Action] = []
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            Submit: self._submit,
            CancelStream: self._cancel,
            Grant: self._grant,
            Ask: self._ask,
            Connected: self._connected,
            Lost: self._lost,
            Received: self._received,
            Malformed: self._malformed,
            Close: self._close,
        }

    @property
    def closed(self) -> bool:
        """Whether the client is closed; what is submitted now fails at once."""
        return self.session.phase is Phase.CLOSED

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take an event; return the actions that it calls for."""
        self._handlers[type(event)](event, now)
        return self._taken()

    def tick(self, now: float) -> list[Action]:
        """Return the actions that the time calls for."""
        reason = self.session.silence(now)
        if reason is not None:
            self._end_session(reason, now, farewell=self.session.open)
        heartbeat = self.session.heartbeat(now)
        if heartbeat is not None:
            self._out.append(heartbeat)
        for key in self._timers.due(now):
            self._overdue(key, now)
        if self.session.start_due(now):
            self._out.append(self.session.start(now))
        return self._taken()

    def next_deadline(self) -> float | None:
        """Return when `tick` is next needed, None while only events matter."""
        times = [time for time in (self.session.next_deadline(), self._timers.next()) if time is not None]
        return min(times, default=None)

    def _taken(self) -> list[Action]:
        out, self._out = self._out, []
        return out

    # What the application wants

    def _submit(self, event: Submit, now: float) -> None:
        stream = self._streams[event.id] = OpenStream(event, now)
        if self.closed:
            self._end(stream, ClientClosedError("the client is closed", request_id=event.id.hex()))
        elif self.session.open:
            self._send_stream(stream, now)
        else:
            patience = now + self._settings.connect_timeout_s
            deadline = stream.deadline
            self._wait(event.id, patience if deadline is None else min(patience, deadline))

    def _ask(self, event: Ask, now: float) -> None:
        query = self._queries[event.id] = _OpenQuery(event)
        if self.closed:
            self._answer(event.id, error=ClientClosedError("the client is closed", request_id=event.id.hex()))
        elif self.session.open:
            self._send_query(query, now)
        else:
            self._wait(event.id, now + self._settings.connect_timeout_s)

    def _wait(self, key: bytes, until: float) -> None:
        self._waiting[key] = None
        self._timers.set(key, until)

    def _cancel(self, event: CancelStream, now: float) -> None:
        stream = self._streams.get(event.id)
        if stream is not None:
            self._tell_cancel(stream, now)
            self._end(stream, Ending(FinishReason.CANCELLED))

    def _grant(self, event: Grant, now: float) -> None:
        stream = self._streams.get(event.id)
        # A request that has not left takes the limit along in its envelope.
        if stream is not None and stream.sent:
            self._out.append(self.session.say(stream.credit(event.limit), now))

    def _close(self, event: Close, now: float) -> None:
        if self.closed:
            return
        if self.session.open:
            self._out.append(self.session.say(Goodbye(), now))
        if self.session.has_socket:
            self._out.append(CloseSocket())
        self.session.close()
        for stream in list(self._streams.values()):
            message = "the client was closed while the stream was open"
            self._end(stream, ClientClosedError(message, request_id=stream.order.id.hex()))
        for key in list(self._queries):
            message = "the client was closed before the answer came"
            self._answer(key, error=ClientClosedError(message, request_id=key.hex()))

    # What the socket saw

    def _connected(self, event: Connected, now: float) -> None:
        if self.session.phase is Phase.CONNECTING:
            self._out.append(self.session.greet(now))

    def _lost(self, event: Lost, now: float) -> None:
        if self.session.has_socket:
            self._end_session(event.reason, now, farewell=False)

    def _malformed(self, event: Malformed, now: float) -> None:
        if self.session.phase in (Phase.GREETING, Phase.OPEN):
            self._end_session(f"the broker sent what is no message: {event.error.message}", now, farewell=True)

    def _received(self, event: Received, now: float) -> None:
        # In any other phase it came through a socket that is closed already.
        if self.session.phase not in (Phase.GREETING, Phase.OPEN):
            return
        was_open = self.session.open
        message = event.message
        try:
            if not self.session.hear(message, now):
                if self.session.open and not was_open:
                    self._opened(now)
                return
        except SessionOver as over:
            self._end_session(over.reason, now, farewell=not over.mutual)
            return
        if isinstance(message, Chunks):
            for chunk in message.chunks:
                self._chunk(chunk, now)
        elif isinstance(message, Finish):
            self._finish(message)
        elif isinstance(message, Error):
            self._error(message)
        elif isinstance(message, Reply):
            self._reply(message)

    def _opened(self, now: float) -> None:
        self._log("session_opened", endpoint=self.session.endpoint, broker=self.session.broker)
        waiting = list(self._waiting)
        self._waiting.clear()
        for key in waiting:
            self._timers.drop(key)
            stream = self._streams.get(key)
            if stream is not None:
                self._send_stream(stream, now)
            else:
                self._send_query(self._queries[key], now)

    def _send_stream(self, stream: OpenStream, now: float) -> None:
        stream.sent = True
        if stream.deadline is not None:
            self._timers.set(stream.order.id, stream.deadline + DEADLINE_SLACK_S)
        self._out.append(self.session.say(stream.request(now), now))

    def _send_query(self, query: _OpenQuery, now: float) -> None:
        query.sent = True
        question = query.question
        self._timers.set(question.id, now + self._settings.query_timeout_s)
        self._out.append(self.session.say(Query(question.id, question.method, question.arguments), now))

    def _end_session(self, reason: str, now: float, *, farewell: bool) -> None:
        endpoint, was_open = self.session.endpoint, self.session.open
        if farewell:
            self._out.append(self.session.say(Goodbye(), now))
        self._out.append(CloseSocket())
        self._failure = "" if was_open else reason
        # A try that failed is no news as long as other endpoints or the next try may do.
        level = logging.WARNING if was_open else logging.DEBUG
        self._log("session_lost" if was_open else "connect_failed", level, endpoint=endpoint, reason=reason)
        self.session.pause(now)
        message = f"the session with the broker at {endpoint} ended: {reason}"
        for stream in [stream for stream in self._streams.values() if stream.sent]:
            self._end(stream, BrokerLostError(message, retryable=True, request_id=stream.order.id.hex()))
        for key in [key for key, query in self._queries.items() if query.sent]:
            self._answer(key, error=BrokerLostError(message, retryable=True, request_id=key.hex()))

    # What came for a stream or a query: in an open session, where nothing waits to be sent

    def _current(self, key: bytes, attempt: int) -> OpenStream | None:
        """Return the open stream that a message is for, None (and count it) where it is too late or foreign."""
        stream = self._streams.get(key)
        if stream is None:
            self.dropped["unknown"] += 1
            return None
        if attempt != stream.attempt:
            self.dropped["attempt"] += 1
            return None
        return stream

    def _chunk(self, chunk: Chunk, now: float) -> None:
        stream = self._current(chunk.request_id, chunk.attempt)
        if stream is None:
            return
        try:
            new = stream.accept(chunk)
        except StreamFaultError as fault:
            self._tell_cancel(stream, now)
            self._end(stream, fault.error)
            return
        if new:
            self._out.append(Deliver(chunk.request_id, chunk))
        else:
            self.dropped["repeat"] += 1

    def _finish(self, message: Finish) -> None:
        stream = self._current(message.id, message.attempt)
        if stream is None:
            return
        try:
            self._end(stream, stream.finish(message))
        except StreamFaultError as fault:
            self._end(stream, fault.error)

    def _error(self, message: Error) -> None:
        query = self._queries.get(message.id)
        if query is not None:
            self._answer(message.id, error=error_from(message))
            return
        # Attempt 0: the broker could not read the request, and so knows no attempt.
        attempt = message.attempt
        if not attempt and message.id in self._streams:
            attempt = self._streams[message.id].attempt
        stream = self._current(message.id, attempt)
        if stream is not None:
            self._end(stream, error_from(message))

    def _reply(self, message: Reply) -> None:
        if message.id not in self._queries:
            self.dropped["unknown"] += 1
        else:
            self._answer(message.id, result=message.result)

    # How things end

    def _overdue(self, key: bytes, now: float) -> None:
        self._waiting.pop(key, None)
        stream, query = self._streams.get(key), self._queries.get(key)
        if stream is not None:
            if stream.sent:
                message = f"the deadline of {stream.order.deadline_s:g} s passed, and the broker did not say so"
                self._tell_cancel(stream, now)
                self._end(stream, DeadlineError(message, request_id=key.hex()))
            elif stream.deadline is not None and now >= stream.deadline:
                message = f"no broker was found within the request's deadline of {stream.order.deadline_s:g} s"
                self._end(stream, DeadlineError(message, request_id=key.hex()))
            else:
                self._end(stream, self._no_broker(key))
        elif query is not None:
            if query.sent:
                seconds = self._settings.query_timeout_s
                message = f"the broker did not answer the query {query.question.method!r} within {seconds:g} s"
                self._answer(key, error=DeadlineError(message, retryable=True, request_id=key.hex()))
            else:
                self._answer(key, error=self._no_broker(key))

    def _no_broker(self, key: bytes) -> NoBrokerError:
        tried = ", ".join(self.session.tried or self._settings.endpoints)
        message = f"no broker answered within {self._settings.connect_timeout_s:g} s; tried {tried}"
        if self._failure:
            message += f"; the last try: {self._failure}"
        return NoBrokerError(message, retryable=True, request_id=key.hex())

    def _tell_cancel(self, stream: OpenStream, now: float) -> None:
        if stream.sent:
            self._out.append(self.session.say(stream.cancel(), now))

    def _end(self, stream: OpenStream, outcome: Ending | TokenmqError) -> None:
        key = stream.order.id
        del self._streams[key]
        self._waiting.pop(key, None)
        self._timers.drop(key)
        self._out.append(Ended(key, stream.attempt, outcome))

    def _answer(self, key: bytes, *, result: Any = None, error: TokenmqError | None = None) -> None:
        del self._queries[key]
        self._waiting.pop(key, None)
        self._timers.drop(key)
        self._out.append(Answered(key, result, error))

    def _log(self, event: str, level: int = logging.INFO, **fields: Any) -> None:
        self._out.append(Log(event, fields, level=level))

    def validate(self) -> None:
        """Check every invariant; tests call it after each step.

        Raises:
            AssertionError: one is broken.
        """
        unsent = {key for key, stream in self._streams.items() if not stream.sent}
        unsent |= {key for key, query in self._queries.items() if not query.sent}
        asked = {key for key, query in self._queries.items() if query.sent}
        asked |= {key for key, stream in self._streams.items() if stream.sent and stream.deadline is not None}
        timed = {key for key in unsent | asked if key in self._timers}
        _check(not self._streams.keys() & self._queries.keys(), "an id names a stream and a query")
        _check(unsent == set(self._waiting), "what has not left waits, and nothing else does")
        _check(
            timed == unsent | asked and len(self._timers) == len(timed), "a wait without a bound, or a stray timer"
        )
        _check(not (self.session.open and unsent), "something waits although the session is open")
        _check(self.session.open or len(unsent) == len(self._streams) + len(self._queries), "sent without a session")
        _check(not self.closed or not unsent, "the closed client holds requests")
        _check(not self._out, "actions were left behind")
        for key, stream in self._streams.items():
            window = stream.order.window
            _check(stream.order.id == key and stream.attempt >= 1, "a stream under a foreign id")
            _check(window.consumed <= window.received <= window.limit, "a window out of order")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
