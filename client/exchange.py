"""All open streams, and the one recovery there is: what fails is submitted again, with the tokens so far.

A request is at one of three places:

    WAITING --a session is open--> SENT --FINISH, final ERROR--> ended
       ^                            |
       |                            | retryable ERROR, lost session, gap, silence
       +------- RESTING <-----------+
         pause over     (no pause after an attempt that brought tokens)

Each failure closes one attempt and begins the next. Attempts are numbered: what comes for a closed one is dropped.
Tokens are numbered: what comes twice is dropped. So the reader sees each token once, in order, whatever happened.

A hedge is an attempt that begins before another one has failed, because that one is late. Of two open attempts the
first to bring something closes the other, and one that fails is closed while the other goes on: what follows is
the way of a single attempt again.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable

from ..protocol.errors import (
    BadRequestError,
    BrokerLostError,
    ClientClosedError,
    ErrorCode,
    TokenmqError,
)
from ..protocol.messages import Chunk, Error, Finish, FinishReason, Started
from ..protocol.orders import Orders
from ..protocol.timers import Timers
from .attempt import OpenAttempt
from .direct import Direct
from .events import Action, Attempted, CancelStream, Deliver, Ended, Ending, Grant, Submit, Tell
from .line import Line
from .recovery import MAX_PAUSE_S, cannot_resume, final_error, pause_s, too_late, unserved
from .sessions import Sessions
from .settings import Settings
from .streams import OpenStream, Place, StreamFaultError, error_from
from .texts import OpenTexts

#: The broker ends a request at its deadline and knows where it was; only one that is frozen or cut off needs us.
DEADLINE_SLACK_S = 0.25


class Exchange:
    """All streams that have not ended.

    Attributes:
        dropped: messages that were received for nothing, by reason: `unknown` (a stream that is over, or foreign),
            `attempt` (a submission that is closed, or not the broker that has it), `repeat`.
    """

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        direct: Direct,
        orders: Orders[Action],
        random: Callable[[], float],
    ) -> None:
        """Have none."""
        self.dropped: Counter[str] = Counter()
        self._settings = settings
        self._sessions = sessions
        self._direct = direct
        self._orders = orders
        self._random = random
        self._streams: dict[bytes, OpenStream] = {}
        self._line = Line()
        #: How many streams each broker has.
        self._sent: Counter[str] = Counter()
        #: When each stream needs a look: the end of a wait or a rest, its deadline, its worker's silence.
        self._timers = Timers()

    # What the application wants

    def submit(self, event: Submit, now: float) -> None:
        """Begin a stream."""
        kind = OpenTexts if event.texts else OpenStream
        stream = self._streams[event.id] = kind(event, now)
        stream.turn = self._line.draw()
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
        if stream is None or stream.place is not Place.SENT:
            return
        unwatched = stream.due_at(self._settings) is None
        for attempt in stream.open:
            if event.limit > attempt.granted:
                credit = stream.grant(attempt, event.limit, now)
                if attempt.link:
                    self._orders.add(Tell(attempt.link, credit))
                else:
                    self._sessions.send(stream.endpoint, credit, now)
        if unwatched:
            self._watch(stream)  # from now on silence counts again

    def close(self) -> None:
        """Fail them all: the client closes."""
        for stream in list(self._streams.values()):
            message = "the client was closed while the stream was open"
            self._end(stream, ClientClosedError(message, request_id=stream.id.hex()))

    # What comes from brokers

    def started(self, message: Started, endpoint: str, now: float) -> bool:
        """Note which worker has a request; tell whether somebody waits for it."""
        found = self._find(message.id, message.attempt, endpoint)
        if found is None:
            return False
        stream, attempt = found
        self._sessions[endpoint].gate.moved(now)
        stream.started(attempt, message.worker, now)
        attempt.direct = message.direct
        self._orders.add(Attempted(stream.id, stream.attempts()))
        self._watch(stream)
        return True

    def chunk(self, chunk: Chunk, endpoint: str, now: float, link: str = "") -> None:
        """Deliver a chunk that fits behind what has come.

        Args:
            chunk: it.
            endpoint: the broker that has the request.
            now: the time.
            link: the worker's endpoint that it came from; "" where it came through the broker.
        """
        found = self._find(chunk.request_id, chunk.attempt, endpoint)
        if found is None:
            return
        stream, attempt = found
        if link:
            attempt.link = link
            attempt.chunks += 1
        # The first token of all has another timeout than the next; and STARTED, which begins the watch, may be late.
        first = not stream.has_news or attempt.heard_at is None
        try:
            new = stream.accept(attempt, chunk, now)
        except StreamFaultError as fault:
            self._give_up(stream, attempt, fault.error, now)
            return
        if new:
            if len(stream.open) > 1:
                self._prefer(stream, attempt, now)
            self._orders.add(Deliver(chunk.request_id, chunk))
        else:
            self.dropped["repeat"] += 1
        if first:
            self._watch(stream)
        if link and attempt.finish is not None and attempt.chunks >= attempt.finish.chunks:
            self._finish(stream, attempt, attempt.finish, now)

    def finish(self, message: Finish, endpoint: str, now: float) -> None:
        """End a stream, if all that the FINISH counts has come; what comes past the broker may be under way."""
        found = self._find(message.id, message.attempt, endpoint)
        if found is None:
            return
        self._sessions[endpoint].gate.freed(now)
        stream, attempt = found
        if message.chunks <= attempt.chunks:
            self._finish(stream, attempt, message, now)
        elif self._direct.is_open(attempt.link or attempt.direct):
            attempt.finish, attempt.heard_at = message, now
            self._watch(stream)
        else:
            missing = f"{message.chunks - attempt.chunks} of {message.chunks} chunks"
            what = f"worker {message.worker} has sent {missing} by a connection that is gone"
            self._fault(stream, attempt, stream.error(ErrorCode.WORKER_LOST, what, retryable=True), now)

    def _finish(self, stream: OpenStream, attempt: OpenAttempt, message: Finish, now: float) -> None:
        try:
            ending = stream.finish(message)
        except StreamFaultError as fault:
            self._fault(stream, attempt, fault.error, now)
        else:
            attempt.worker = message.worker
            if len(stream.open) > 1:
                self._prefer(stream, attempt, now)
            self._end(stream, ending)

    def error(self, message: Error, endpoint: str, now: float) -> None:
        """Take the failure of an attempt."""
        number = message.attempt
        # 0: the broker could not read the request, and so knows no attempt; it is about the latest that it was sent.
        if not number and message.id in self._streams:
            number = self._streams[message.id].open[-1].number
        if found := self._find(message.id, number, endpoint):
            stream, attempt = found
            attempt.worker = message.worker or attempt.worker
            # A worker that says so (brokers add its name) has no word in what the broker takes.
            limited = message.code == ErrorCode.RATE_LIMITED.value and not message.worker
            if limited:
                self._sessions[endpoint].gate.refused(message.retry_after_s, stream.left_at, now)
            else:
                self._sessions[endpoint].gate.freed(now)
            self._fault(stream, attempt, error_from(message), now, limited=limited)

    def _find(self, key: bytes, number: int, endpoint: str) -> tuple[OpenStream, OpenAttempt] | None:
        """Return the stream and open attempt that a broker's message is for, None where it is late or foreign."""
        stream = self._streams.get(key)
        if stream is None:
            self.dropped["unknown"] += 1
            return None
        attempt = stream.find(number)
        if attempt is None or endpoint != stream.endpoint:  # of a broker that has it no more, or not yet
            self.dropped["attempt"] += 1
            return None
        return stream, attempt

    def send_waiting(self, now: float) -> None:
        """Send what has waited for a broker, as far as one takes it now, in the order of submission."""
        while self._line and (self._sessions.best() or self._sessions.hopeless("")):
            stream = self._streams[self._line.pop()]
            stream.place = Place.RESTING
            self._send(stream, now)

    def session_ended(self, endpoint: str, why: str, now: float) -> None:
        """Take the failure of all attempts that had left in it."""
        for stream in list(self._streams.values()):
            if stream.endpoint == endpoint:
                for attempt in list(stream.open):
                    error = BrokerLostError(why, retryable=True, request_id=stream.id.hex())
                    self._fault(stream, attempt, error, now)

    # What happens at the links to workers

    def link_lost(self, link: str, why: str, now: float) -> None:
        """Take the failure of all attempts whose chunks came by a link, or might have been sent by it."""
        for stream in list(self._streams.values()):
            for attempt in [each for each in stream.open if stream.may_come_by(each, link)]:
                self._give_up(stream, attempt, stream.error(ErrorCode.WORKER_LOST, why, retryable=True), now)

    def uses(self, link: str) -> bool:
        """Tell whether chunks come by a link, or may still begin to."""
        return any(stream.may_come_by(attempt, link) for stream in self._streams.values() for attempt in stream.open)

    # What time brings

    def tick(self, now: float) -> None:
        """Do what is due."""
        for key in self._timers.due(now):
            stream = self._streams[key]
            if stream.place is Place.SENT:
                self._look_at_sent(stream, now)
            elif stream.deadline is not None and now >= stream.deadline:
                self._end(stream, too_late(stream))
            elif stream.place is Place.RESTING:
                self._send(stream, now)
            elif (until := self._held_until(now)) > now:
                stream.waits_until = until
                self._set_timer(stream, until, stream.deadline)
            else:
                held = self._sessions.held_since() is not None
                waited_s = self._settings.recovery_timeout_s if held else self._patience_s(stream)
                error = self._sessions.none_came(key.hex(), waited_s)
                self._end(stream, unserved(stream, error))

    def _held_until(self, now: float) -> float:
        """Return how long requests wait for a broker that limits this client, as long as it takes or has some."""
        for endpoint in self._sent:
            self._sessions[endpoint].gate.moved(now)
        since = self._sessions.held_since()
        return -math.inf if since is None else since + self._settings.recovery_timeout_s

    def _look_at_sent(self, stream: OpenStream, now: float) -> None:
        if stream.deadline is not None and now >= stream.deadline + DEADLINE_SLACK_S:
            self._tell_cancel(stream, now)
            self._end(stream, too_late(stream))
            return
        settings, hedge_at = self._settings, stream.hedge_at(self._settings)
        silent = [each for each in stream.open if (at := stream.silent_at(each, settings)) is not None and now >= at]
        for attempt in silent:
            self._give_up(stream, attempt, stream.silence(attempt, settings), now)
        if not silent and hedge_at is not None and now >= hedge_at:
            self._hedge(stream, now)
        elif not silent:
            self._watch(stream)

    def forgive(self, lag_s: float) -> None:
        """Take seconds in which nobody listened off the workers' silence, and off the wait for a session."""
        for stream in self._streams.values():
            for attempt in stream.open:
                if attempt.heard_at is not None:
                    attempt.heard_at += lag_s
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
            self._wait(stream, now)
            return
        if stream.held_at is not None:
            # It stood in a broker's line; that is not being lost.
            stream.lost_at = None if stream.lost_at is None else stream.lost_at + now - stream.held_at
            stream.held_at = None
        try:
            request = stream.leave(session.endpoint, self._settings, now)
        except BadRequestError as error:  # only with tokens: what broke the stream is what its reader should know
            self._end(stream, cannot_resume(stream, error))
            return
        self._sent[session.endpoint] += 1
        self._sessions.submit(session.endpoint, request, now)
        self._watch(stream)

    def _wait(self, stream: OpenStream, now: float) -> None:
        """Let the present attempt wait for a session, if one may come."""
        error = self._sessions.hopeless(stream.id.hex())
        if error is not None:
            self._end(stream, unserved(stream, error))
            return
        stream.place = Place.WAITING
        self._line.join(stream.turn, stream.id)
        begun = now if stream.lost_at is None else stream.lost_at
        stream.waits_until = begun + self._patience_s(stream)
        if self._sessions.held_since() is not None:
            stream.held_at = now if stream.held_at is None else stream.held_at
            stream.waits_until = max(stream.waits_until, now + self._settings.recovery_timeout_s)
        self._set_timer(stream, stream.waits_until, stream.deadline)

    def _hedge(self, stream: OpenStream, now: float) -> None:
        """Ask for a second worker beside the one that is late."""
        late = stream.open[0]
        if not self._sessions[stream.endpoint].gate.open:
            late.hedged = True  # it wants no more of us than it has to take
            self._watch(stream)
            return
        self._sessions.submit(stream.endpoint, stream.hedge(self._settings, now), now)
        self._orders.log("request_hedged", stream.id, attempt=stream.last, late=late.worker)
        self._orders.add(Attempted(stream.id, stream.attempts()))
        self._watch(stream)

    def _prefer(self, stream: OpenStream, winner: OpenAttempt, now: float) -> None:
        """Of two open attempts, close the one beside the one that has brought something."""
        (loser,) = (attempt for attempt in stream.open if attempt is not winner)
        self._cancel(stream, loser, now)
        self._close(stream, loser, None)

    def _patience_s(self, stream: OpenStream) -> float:
        """Return how long the request may be without a broker."""
        return self._settings.connect_timeout_s if stream.lost_at is None else self._settings.recovery_timeout_s

    def _watch(self, stream: OpenStream) -> None:
        """Look at a request that has left when its deadline passes, or when its worker may be late or silent.

        Chunks move that moment and not the timer, which is looked at when it is due: a chunk costs no heap operation.
        """
        deadline = stream.deadline
        late = None if deadline is None else deadline + DEADLINE_SLACK_S
        due_at = stream.due_at(self._settings)
        if late is None and due_at is None:
            self._timers.drop(stream.id)
        else:
            self._set_timer(stream, late, due_at)

    def _set_timer(self, stream: OpenStream, *times: float | None) -> None:
        self._timers.set(stream.id, min(time for time in times if time is not None))

    def _give_up(self, stream: OpenStream, attempt: OpenAttempt, error: TokenmqError, now: float) -> None:
        """Fail an attempt that its worker believes to go on."""
        self._cancel(stream, attempt, now)
        self._fault(stream, attempt, error, now)

    def _fault(
        self, stream: OpenStream, attempt: OpenAttempt, error: TokenmqError, now: float, *, limited: bool = False
    ) -> None:
        """Take the failure of an attempt: the other one goes on, or the next one repairs it, or the stream ends.

        `limited`: it was only one request too many for its broker.
        """
        if len(stream.open) > 1:
            # A hedge that no worker was free for is no failure.
            self._close(stream, attempt, error if attempt.served or not attempt.hedge else None)
            self._watch(stream)
            return
        # Who has reached a limit waits in line with the others that have, and not for himself.
        pause = 0.0 if limited else pause_s(stream.barren_attempts, error.retry_after_s, self._random)
        # A worker may ask for 31 years. Behind the recovery timeout there is one more attempt, and it is the last.
        pause = min(pause, max(self._settings.recovery_timeout_s, MAX_PAUSE_S))
        final = final_error(stream, error, self._settings, now, now + pause)
        if final is not None:
            self._end(stream, final)
            return
        self._left(stream)
        stream.fail(error, now, limited=limited)
        level = logging.DEBUG if limited else logging.WARNING  # of a burst it would be thousands of lines
        self._orders.log(
            "request_resumed", stream.id, level, attempt=stream.last, tokens=len(stream.tokens),
            code=error.code, why=error.message, pause_s=pause,
        )  # fmt: skip
        self._orders.add(Attempted(stream.id, stream.attempts()))
        if pause > 0:
            self._set_timer(stream, now + pause, stream.deadline)
        else:
            self._send(stream, now)

    def _close(self, stream: OpenStream, attempt: OpenAttempt, error: TokenmqError | None) -> None:
        """Close one of two open attempts: the other one goes on."""
        stream.close(attempt, error)
        code, (other,) = error.code if error else "", stream.open
        self._orders.log(
            "attempt_closed", stream.id, attempt=attempt.number, worker=attempt.worker, code=code,
            goes_on=other.number, at=other.worker,
        )  # fmt: skip
        self._orders.add(Attempted(stream.id, stream.attempts()))

    def _tell_cancel(self, stream: OpenStream, now: float) -> None:
        if stream.place is Place.SENT:
            for attempt in stream.open:
                self._cancel(stream, attempt, now)

    def _cancel(self, stream: OpenStream, attempt: OpenAttempt, now: float) -> None:
        """Tell the broker that an attempt is not wanted any more."""
        self._sessions.send(stream.endpoint, stream.cancel(attempt), now)
        if attempt.finish is None:  # else its end has been counted
            self._sessions[stream.endpoint].gate.freed(now)

    def _end(self, stream: OpenStream, outcome: Ending | TokenmqError) -> None:
        del self._streams[stream.id]
        self._timers.drop(stream.id)
        self._left(stream)
        if stream.place is Place.WAITING:
            self._line.leave(stream.id)
        error = None if isinstance(outcome, Ending) else outcome
        self._orders.add(Ended(stream.id, stream.attempts(error), outcome))

    def _left(self, stream: OpenStream) -> None:
        """Count a stream that is at its broker no more; one that is at none counts nowhere."""
        if stream.endpoint:
            self._sent[stream.endpoint] -= 1
            if not self._sent[stream.endpoint]:
                del self._sent[stream.endpoint]

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        timed = 0
        waiting = [stream for stream in self._streams.values() if stream.place is Place.WAITING]
        assert len(waiting) == len(self._line), "something waits in no line, or is gone and still does"
        for key, stream in self._streams.items():
            window, sent = stream.order.window, stream.place is Place.SENT
            assert stream.id == key, "a stream under a foreign id"
            assert window.consumed <= window.received <= window.limit, "a window out of order"
            assert len(stream.tokens) == window.received, "tokens miscounted"
            numbers = [attempt.number for attempt in stream.past] + [attempt.number for attempt in stream.open]
            assert sorted(numbers) == list(range(1, stream.last + 1)), "attempts miscounted"
            late, *rest = stream.open
            assert not rest or (sent and late.hedged and not stream.has_news), "two attempts without need"
            assert [attempt.hedge for attempt in rest] in ([], [True]), "two attempts, and the second is no hedge"
            assert stream.served < self._settings.max_attempts, "attempts without end"
            assert stream.lost_at is None or stream.past, "lost without a fault"
            assert sent == bool(stream.endpoint), "a broker where there is none, or none where there is one"
            if sent:
                assert self._sessions[stream.endpoint].open, "sent without a session"
            if stream.place is Place.WAITING:
                assert self._sessions.best() is None, "something waits although a session is open"
                assert self._sessions.hopeless("") is None, "something waits in vain"
            for attempt in stream.open:
                assert not attempt.link or self._direct.is_open(attempt.link), "chunks by a link that is no more"
                assert attempt.finish is None or attempt.chunks < attempt.finish.chunks, "an end that is held back"
            bounded = not sent or stream.deadline is not None or stream.due_at(self._settings) is not None
            assert key in self._timers or not bounded, "a wait without a bound"
            timed += key in self._timers
        endpoints = Counter(stream.endpoint for stream in self._streams.values() if stream.endpoint)
        assert self._sent == endpoints, "what brokers have is miscounted"
        assert timed == len(self._timers), "a stray timer"
        assert not self._sessions.closed or not self._streams, "the closed client holds requests"
