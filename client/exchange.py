"""All open streams, and the one recovery there is: what fails is submitted again, with the tokens so far.

A request is at one of three places:

    WAITING --a session is open--> SENT --FINISH, final ERROR--> ended
       ^                            |
       |                            | retryable ERROR, lost session, gap, silence
       +------- RESTING <-----------+
         pause over     (no pause after an attempt that brought tokens)

Each failure closes one attempt and begins the next. Attempts are numbered: what comes for an older one is dropped.
Tokens are numbered: what comes twice is dropped. So the reader sees each token once, in order, whatever happened.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from ..protocol.errors import (
    BadRequestError,
    BrokerLostError,
    CannotResumeError,
    ClientClosedError,
    DeadlineError,
    ModelNotFoundError,
    TokenmqError,
)
from ..protocol.messages import Chunk, Error, Finish, FinishReason, Started
from ..protocol.orders import Orders
from ..protocol.timers import Timers
from .events import Action, Attempted, CancelStream, Deliver, Ended, Ending, Grant, Submit
from .sessions import Sessions
from .settings import Settings
from .streams import OpenStream, Place, StreamFaultError, error_from

#: The broker ends a request at its deadline and knows where it was; only one that is frozen or cut off needs us.
DEADLINE_SLACK_S = 0.25
#: Pause after attempts that brought nothing: none, then this, doubled each time, with jitter.
PAUSE_S = 0.05
MAX_PAUSE_S = 2.0


def pause_s(barren: int, retry_after_s: float | None, random: Callable[[], float]) -> float:
    """Return seconds until the next attempt.

    Args:
        barren: how many attempts in a row have brought no token.
        retry_after_s: what the sender of the error asks for; None where it does not.
        random: draws from 0 to 1 for the jitter, so that many clients do not come back at one moment.
    """
    # The first fault after a token is nobody's overload: the reader waits, so at once.
    pause = 0.0 if barren < 2 else min(PAUSE_S * 2.0 ** min(barren - 2, 30), MAX_PAUSE_S)
    return max(pause * (0.5 + random() / 2), (retry_after_s or 0.0) * (1 + random() / 4))


class Exchange:
    """All streams that have not ended.

    Attributes:
        dropped: messages that were received for nothing, by reason: `unknown` (a stream that is over, or foreign),
            `attempt` (an older submission, or not the broker that has it), `repeat`.
    """

    def __init__(
        self, settings: Settings, sessions: Sessions, orders: Orders[Action], random: Callable[[], float]
    ) -> None:
        """Have none."""
        self.dropped: Counter[str] = Counter()
        self._settings = settings
        self._sessions = sessions
        self._orders = orders
        self._random = random
        self._streams: dict[bytes, OpenStream] = {}
        #: When each stream needs a look: the end of a wait or a rest, its deadline, its worker's silence.
        self._timers = Timers()

    # What the application wants

    def submit(self, event: Submit, now: float) -> None:
        """Begin a stream."""
        stream = self._streams[event.id] = OpenStream(event, now)
        if self._sessions.closed:
            self._end(stream, ClientClosedError("the client is closed", request_id=event.id.hex()))
        else:
            self._send(stream, now)

    def cancel(self, event: CancelStream, now: float) -> None:
        """End a stream for its reader."""
        stream = self._streams.get(event.id)
        if stream is not None:
            self._tell_cancel(stream, now)
            self._end(stream, Ending(FinishReason.CANCELLED))

    def grant(self, event: Grant, now: float) -> None:
        """Tell the worker of more credit; a request that has not left takes the limit along in its envelope."""
        stream = self._streams.get(event.id)
        if stream is None or stream.place is not Place.SENT or event.limit <= stream.granted:
            return
        unwatched = stream.silent_at(self._settings) is None
        self._sessions.send(stream.endpoint, stream.grant(event.limit, now), now)
        if unwatched:
            self._watch(stream)  # from now on silence counts again

    def close(self) -> None:
        """Fail them all: the client closes."""
        for stream in list(self._streams.values()):
            message = "the client was closed while the stream was open"
            self._end(stream, ClientClosedError(message, request_id=stream.id.hex()))

    # What comes from brokers

    def started(self, message: Started, endpoint: str, now: float) -> None:
        """Note which worker has a request."""
        stream = self._current(message.id, message.attempt, endpoint)
        if stream is not None:
            stream.started(message.worker, now)
            self._orders.add(Attempted(stream.id, stream.attempts()))
            self._watch(stream)

    def chunk(self, chunk: Chunk, endpoint: str, now: float) -> None:
        """Deliver a chunk that fits behind what has come."""
        stream = self._current(chunk.request_id, chunk.attempt, endpoint)
        if stream is None:
            return
        first = not stream.has_news
        try:
            new = stream.accept(chunk, now)
        except StreamFaultError as fault:
            self._tell_cancel(stream, now)
            self._fault(stream, fault.error, now)
            return
        if new:
            self._orders.add(Deliver(chunk.request_id, chunk))
            if first:
                self._watch(stream)  # the next token has another timeout than the first
        else:
            self.dropped["repeat"] += 1

    def finish(self, message: Finish, endpoint: str, now: float) -> None:
        """End a stream, if all that the FINISH counts has come."""
        stream = self._current(message.id, message.attempt, endpoint)
        if stream is None:
            return
        try:
            ending = stream.finish(message)
        except StreamFaultError as fault:
            self._fault(stream, fault.error, now)
        else:
            stream.worker = message.worker
            self._end(stream, ending)

    def error(self, message: Error, endpoint: str, now: float) -> None:
        """Take the failure of an attempt."""
        attempt = message.attempt
        # 0: the broker could not read the request, and so knows no attempt.
        if not attempt and message.id in self._streams:
            attempt = self._streams[message.id].attempt
        stream = self._current(message.id, attempt, endpoint)
        if stream is not None:
            stream.worker = message.worker or stream.worker
            self._fault(stream, error_from(message), now)

    def _current(self, key: bytes, attempt: int, endpoint: str) -> OpenStream | None:
        """Return the open stream that a broker's message is for, None (and count it) where it is late or foreign."""
        stream = self._streams.get(key)
        if stream is None:
            self.dropped["unknown"] += 1
            return None
        if attempt != stream.attempt or endpoint != stream.endpoint:  # of a broker that has it no more, or not yet
            self.dropped["attempt"] += 1
            return None
        return stream

    def session_opened(self, now: float) -> None:
        """Send what has waited for it, in the order of submission."""
        for stream in list(self._streams.values()):
            if stream.place is Place.WAITING:
                self._send(stream, now)

    def session_ended(self, endpoint: str, why: str, now: float) -> None:
        """Take the failure of all attempts that had left in it."""
        for stream in list(self._streams.values()):
            if stream.endpoint == endpoint:
                self._fault(stream, BrokerLostError(why, retryable=True, request_id=stream.id.hex()), now)

    # What time brings

    def tick(self, now: float) -> None:
        """Do what is due."""
        for key in self._timers.due(now):
            stream = self._streams[key]
            if stream.place is Place.SENT:
                self._look_at_sent(stream, now)
            elif stream.deadline is not None and now >= stream.deadline:
                self._end(stream, self._too_late(stream))
            elif stream.place is Place.RESTING:
                self._send(stream, now)
            else:
                error = self._sessions.none_came(key.hex(), self._patience_s(stream))
                self._end(stream, _reworded(error, _both(error.message, stream)))

    def _look_at_sent(self, stream: OpenStream, now: float) -> None:
        silent_at = stream.silent_at(self._settings)
        if stream.deadline is not None and now >= stream.deadline + DEADLINE_SLACK_S:
            self._tell_cancel(stream, now)
            self._end(stream, self._too_late(stream))
        elif silent_at is not None and now >= silent_at:
            self._tell_cancel(stream, now)
            self._fault(stream, stream.silence(self._settings), now)
        else:
            self._watch(stream)

    @staticmethod
    def _too_late(stream: OpenStream) -> DeadlineError:
        seconds = f"{stream.order.deadline_s:g} s"
        if stream.place is Place.SENT:
            message = f"the deadline of {seconds} passed, and the broker did not say so"
        elif stream.past:
            error = stream.past[-1].error
            message = f"the deadline of {seconds} passed after {len(stream.past)} attempts; the last one: {error}"
        else:
            message = f"no broker was found within the request's deadline of {seconds}"
        return DeadlineError(message, request_id=stream.id.hex())

    def forgive(self, lag_s: float) -> None:
        """Take seconds in which nobody listened off the workers' silence, and off the wait for a session."""
        for stream in self._streams.values():
            if stream.heard_at is not None:
                stream.heard_at += lag_s
            if stream.lost_at is not None:
                stream.lost_at += lag_s
            if stream.place is Place.WAITING:
                stream.waits_until += lag_s
                self._set_timer(stream, stream.waits_until, stream.deadline)

    def next_deadline(self) -> float | None:
        """Return when `tick` is next needed, None for never."""
        return self._timers.next()

    # The way of a stream

    def _send(self, stream: OpenStream, now: float) -> None:
        """Let the present attempt leave, or wait for a session."""
        session = self._sessions.best()
        if session is None:
            stream.place = Place.WAITING
            begun = now if stream.lost_at is None else stream.lost_at
            stream.waits_until = begun + self._patience_s(stream)
            self._set_timer(stream, stream.waits_until, stream.deadline)
            return
        try:
            request = stream.leave(session.endpoint, self._settings, now)
        except BadRequestError as error:  # only with tokens: what broke the stream is what its reader should know
            self._end(stream, CannotResumeError(_both(error.message, stream), request_id=stream.id.hex()))
            return
        self._sessions.send(session.endpoint, request, now)
        self._watch(stream)

    def _patience_s(self, stream: OpenStream) -> float:
        """Return how long the request may be without a broker."""
        return self._settings.connect_timeout_s if stream.lost_at is None else self._settings.recovery_timeout_s

    def _watch(self, stream: OpenStream) -> None:
        """Look at a request that has left when its deadline passes, or when its worker may have fallen silent.

        Chunks move that moment and not the timer, which is looked at when it is due: a chunk costs no heap operation.
        """
        deadline = stream.deadline
        late = None if deadline is None else deadline + DEADLINE_SLACK_S
        silent_at = stream.silent_at(self._settings)
        if late is None and silent_at is None:
            self._timers.drop(stream.id)
        else:
            self._set_timer(stream, late, silent_at)

    def _set_timer(self, stream: OpenStream, *times: float | None) -> None:
        self._timers.set(stream.id, min(time for time in times if time is not None))

    def _fault(self, stream: OpenStream, error: TokenmqError, now: float) -> None:
        """Repair a failure by the next attempt; where that is of no use, end the stream with it."""
        pause = pause_s(stream.barren_attempts, error.retry_after_s, self._random)
        final = self._final(stream, error, now, now + pause)
        if final is not None:
            self._end(stream, final)
            return
        stream.fail(error, now)
        self._orders.log(
            "request_resumed", stream.id, logging.WARNING, attempt=stream.attempt, tokens=len(stream.tokens),
            code=error.code, why=error.message, pause_s=pause,
        )  # fmt: skip
        self._orders.add(Attempted(stream.id, stream.attempts()))
        if pause > 0:
            stream.place = Place.RESTING
            self._set_timer(stream, now + pause, stream.deadline)
        else:
            self._send(stream, now)

    def _final(self, stream: OpenStream, error: TokenmqError, now: float, again_at: float) -> TokenmqError | None:
        """Return the error that a failure ends the stream with; None where an attempt at `again_at` may repair it."""
        if isinstance(error, CannotResumeError) and not error.retryable:
            return CannotResumeError(_both(error.message, stream), request_id=stream.id.hex())
        # A model that a worker has served is not unknown: the broker is new, and its workers are not back yet.
        repairable = error.retryable or (isinstance(error, ModelNotFoundError) and stream.served)
        too_late = stream.deadline is not None and again_at >= stream.deadline
        if not repairable or not stream.order.resume or too_late:
            return error
        served, lost_s = stream.served_attempts, now - stream.lost_since(now)
        if served >= self._settings.max_attempts:
            return _reworded(error, f"{error.message} (that was the last of {served} attempts)")
        if lost_s and lost_s + again_at - now >= self._settings.recovery_timeout_s:
            return _reworded(error, f"{error.message} (nobody has taken the request for {lost_s:.1f} s)")
        return None

    def _tell_cancel(self, stream: OpenStream, now: float) -> None:
        if stream.place is Place.SENT:
            self._sessions.send(stream.endpoint, stream.cancel(), now)

    def _end(self, stream: OpenStream, outcome: Ending | TokenmqError) -> None:
        del self._streams[stream.id]
        self._timers.drop(stream.id)
        error = None if isinstance(outcome, Ending) else outcome
        self._orders.add(Ended(stream.id, stream.attempts(error), outcome))

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        timed = 0
        for key, stream in self._streams.items():
            window, sent = stream.order.window, stream.place is Place.SENT
            assert stream.id == key, "a stream under a foreign id"
            assert window.consumed <= window.received <= window.limit, "a window out of order"
            assert len(stream.tokens) == window.received, "tokens miscounted"
            assert stream.attempt == len(stream.past) + 1, "attempts miscounted"
            assert stream.served < self._settings.max_attempts, "attempts without end"
            assert stream.lost_at is None or stream.past, "lost without a fault"
            assert sent == bool(stream.endpoint), "a broker where there is none, or none where there is one"
            if sent:
                assert self._sessions[stream.endpoint].open, "sent without a session"
            if stream.place is Place.WAITING:
                assert self._sessions.best() is None, "something waits although a session is open"
            bounded = not sent or stream.deadline is not None or stream.silent_at(self._settings) is not None
            assert key in self._timers or not bounded, "a wait without a bound"
            timed += key in self._timers
        assert timed == len(self._timers), "a stray timer"
        assert not self._sessions.closed or not self._streams, "the closed client holds requests"


def _reworded(error: TokenmqError, message: str) -> TokenmqError:
    """Return the error with another message."""
    error.message = message
    error.args = (message,)
    return error


def _both(message: str, stream: OpenStream) -> str:
    """Return why a stream cannot go on, and what broke it."""
    return f"{message}; it broke because: {stream.past[-1].error}" if stream.past else message
