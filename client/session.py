"""The session with one broker: its phase, and what was counted. It knows nothing of requests.

One socket carries one session and never a second one: counts, order and what the broker knows of us begin anew
with the connection. The phases:

    PAUSED      --deadline--------> CONNECTING   a new socket is opened
    CONNECTING  --connected-------> GREETING     HELLO leaves
    GREETING    --WELCOME---------> OPEN         requests may leave
    any of the three --fault, silence, farewell--> PAUSED
    any         --close-----------> CLOSED
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from ..protocol.liveness import Liveness
from ..protocol.messages import (
    Chunks,
    Disconnect,
    DisconnectCode,
    Draining,
    Error,
    Finish,
    Goodbye,
    Heartbeat,
    Message,
    Reply,
    Started,
    Welcome,
)
from ..protocol.refusal import Refusal
from .events import Open, Send
from .gate import Gate
from .settings import Settings

#: Pause before the next try; doubled each time, also after a session that was shorter than the longest pause. A
#: broker that is restarted is found again soon, one that is dead, or that welcomes and hangs up, is not bothered.
BACKOFF_S = 0.05
BACKOFF_MAX_S = 2.0
#: Time for TCP and the ZMTP handshake. A connection to a live host takes milliseconds; meanwhile libzmq itself
#: tries again and again, so that a broker that comes up just now is not missed.
ATTEMPT_S = 1.0
#: Time for WELCOME after HELLO: a busy broker answers within its loop's lag.
GREETING_S = 2.0
#: Handshakes that have to break off in a row, and for how long, before waiting is taken to be in vain: a broker that
#: is full for a moment, or restarted, and a forwarder whose broker is not there yet, hang up, too.
BREAKS_IN_A_ROW = 5
BREAKING_FOR_S = 1.5
#: Pause after a broker has cut us off for sending too much: longer than any back-off, so that it notices.
LIMITED_PAUSE_S = 3.0

_FROM_BROKER = (Chunks, Finish, Error, Started, Reply)


class Phase(Enum):
    """Where a session stands; see the module."""

    PAUSED = "paused"
    CONNECTING = "connecting"
    GREETING = "greeting"
    OPEN = "open"
    CLOSED = "closed"


class SessionOver(Exception):  # noqa: N818 - a farewell is no error
    """What was heard ends the session.

    Attributes:
        reason: for a person.
        mutual: the broker knows that already, so it is told no GOODBYE.
        code: what the broker's DISCONNECT says; None where there is none.
    """

    def __init__(self, reason: str, *, mutual: bool = False, code: DisconnectCode | None = None) -> None:
        """Note why, and whether the broker knows."""
        super().__init__(reason)
        self.reason = reason
        self.mutual = mutual
        self.code = code


class Session:
    """The present session with a broker, or the way to the next one.

    Attributes:
        phase: where it stands.
        endpoint: the broker's.
        broker: the name the broker gave in WELCOME.
        group: the group of brokers that it belongs to, as it said there; "" for one that stands alone.
        tried: it has been open, or a try has failed.
        draining: the broker shuts down, and wants no new requests.
        failure: why the last try to get a session failed; "" while there is one.
        refusal: how the broker refuses this client, whose keys it may not have as they are; None where it does not,
            or has not broken off handshakes for long.
        limited: the broker has ended the session because this client sent too much; until the next one.
        gate: how fast requests may leave for this broker.
        sent: messages sent in this session.
        received: messages received in this session.
    """

    def __init__(self, endpoint: str, settings: Settings, random: Callable[[], float]) -> None:
        """Have no session yet; the first `start` is due at once."""
        self._settings = settings
        self._random = random
        # Both bounds let a request that waits for the connect timeout see a whole try, whenever in the cycle of
        # tries and pauses it was made.
        half_s = settings.connect_timeout_s / 2
        self._attempt_s = min(ATTEMPT_S, half_s)
        self._backoff_max_s = min(BACKOFF_MAX_S, half_s)
        self._backoff_s = BACKOFF_S
        self._deadline: float = 0.0
        self._opened_at: float = 0.0
        self._welcomed = False
        self._broken_off = 0
        self._breaking_since: float = 0.0
        self._liveness: Liveness | None = None
        self.phase = Phase.PAUSED
        self.endpoint = endpoint
        self.broker = ""
        self.group = ""
        self.tried = False
        self.draining = False
        self.failure = ""
        self.refusal: Refusal | None = None
        self.limited = False
        self.gate = Gate()
        self.sent = 0
        self.received = 0

    @property
    def open(self) -> bool:
        """Whether requests may leave."""
        return self.phase is Phase.OPEN

    @property
    def takes_requests(self) -> bool:
        """Whether the broker wants new requests, and now."""
        return self.phase is Phase.OPEN and not self.draining and self.gate.open

    @property
    def answers(self) -> bool:
        """Whether the broker is the one to ask: it is there and stays."""
        return self.phase is Phase.OPEN and not self.draining

    @property
    def held(self) -> bool:
        """Whether nothing but the broker's limits keeps requests here."""
        return self.limited or (self.answers and not self.gate.open)

    @property
    def absent(self) -> bool:
        """Whether no broker was ever found there, and not at the last try either."""
        return not self._welcomed and bool(self.failure)

    @property
    def has_socket(self) -> bool:
        """Whether there is a socket to close."""
        return self.phase in (Phase.CONNECTING, Phase.GREETING, Phase.OPEN)

    def start(self, now: float) -> Open:
        """Begin to connect."""
        self.phase = Phase.CONNECTING
        self._deadline = now + self._attempt_s
        self.sent = self.received = 0
        return Open(self.endpoint)

    def greet(self, now: float) -> Send:
        """Say HELLO: the socket is connected."""
        self.phase = Phase.GREETING
        self._deadline = now + min(GREETING_S, self._settings.connect_timeout_s)
        return self.say(self._settings.hello(), now)

    def say(self, message: Message, now: float) -> Send:
        """Count a message that is sent."""
        self.sent += 1
        if self._liveness is not None:
            self._liveness.spoke(now)
        return Send(self.endpoint, message)

    def hear(self, message: Message, now: float) -> bool:
        """Count a message that came in; tell whether it is about a request or query and so not dealt with here.

        Raises:
            SessionOver: the session cannot go on.
        """
        before = self.received
        self.heard(now)
        if self._liveness is not None and isinstance(message, _FROM_BROKER):
            return True
        if isinstance(message, Heartbeat):
            if message.sent != before:
                raise SessionOver(f"the broker has sent {message.sent} messages, {before} arrived")
        elif isinstance(message, Welcome) and self.phase is Phase.GREETING:
            self._welcome(message, now)
        elif isinstance(message, Draining) and self.phase is Phase.OPEN:
            self.draining = True
        elif isinstance(message, Disconnect):
            reason = f"the broker ended the session: {message.code.value}: {message.message}"
            raise SessionOver(reason, mutual=True, code=message.code)
        elif isinstance(message, Goodbye):
            raise SessionOver("the broker said goodbye", mutual=True)
        else:
            raise SessionOver(f"unexpected {message.command.name} while {self.phase.value}")
        return False

    def heard(self, now: float) -> None:
        """Count a message that came in, whatever it says."""
        self.received += 1
        if self._liveness is not None:
            self._liveness.heard(now)

    def _welcome(self, message: Welcome, now: float) -> None:
        self.phase = Phase.OPEN
        self.broker = message.broker
        self.group = message.group
        self.tried = True
        self.draining = False
        self.failure = ""
        self.refusal = None
        self.limited = False
        self._welcomed = True
        self._broken_off = 0
        self._opened_at = now
        self._liveness = Liveness(message.heartbeat_s, message.expiry_s, heard_at=now, spoke_at=now)

    def silence(self, now: float) -> str | None:
        """Return why the session must end for what did not come, None where it need not."""
        if self._liveness is not None:
            if self._liveness.expired(now):
                return f"nothing heard from the broker for {self._liveness.expiry_s:g} s"
        elif self.has_socket and now >= self._deadline:
            return f"no answer while {self.phase.value}"
        return None

    def start_due(self, now: float) -> bool:
        """Tell whether it is time for `start`."""
        return self.phase is Phase.PAUSED and now >= self._deadline

    def heartbeat(self, now: float) -> Send | None:
        """Return the heartbeat that is due, None where none is."""
        if self._liveness is None or not self._liveness.due(now):
            return None
        return self.say(Heartbeat(sent=self.sent), now)

    def forgive(self, lag_s: float) -> None:
        """Take seconds in which this side did not listen off the broker's silence."""
        if self._liveness is not None:
            self._liveness.forgive(lag_s)

    def pause(self, reason: str, now: float, *, handshake: Refusal | None = None, limited: bool = False) -> None:
        """Be without a session; `start` is due after a back-off.

        Args:
            reason: for a person.
            now: the time.
            handshake: how it failed, or what a DISCONNECT says that means the same; None where neither did.
            limited: the broker has enough of us for now.
        """
        self.refusal = self._judged(handshake, now)
        self.limited = limited
        if self.open and now - self._opened_at >= BACKOFF_MAX_S:
            self._backoff_s = BACKOFF_S
        self.phase = Phase.PAUSED
        self.tried = True
        self.failure = reason
        self.draining = False
        self._liveness = None
        if limited:
            self._deadline = now + LIMITED_PAUSE_S * (1 + self._random() / 2)
            return
        self._deadline = now + self._backoff_s * (0.5 + self._random() / 2)
        self._backoff_s = min(2 * self._backoff_s, self._backoff_max_s)

    def _judged(self, handshake: Refusal | None, now: float) -> Refusal | None:
        """Count a try that has failed; return what that says of us, None for nothing.

        A handshake that breaks off may be that of a broker that ends just then, or has too many connections. If they
        all do, for a while, at a broker that has never welcomed us, a wrong public key, or none, is more likely: of
        that, libzmq often tells no more.
        """
        if handshake is not Refusal.BROKEN_OFF:
            self._broken_off = 0
            return handshake
        self._broken_off += 1
        if self._broken_off == 1:
            self._breaking_since = now
        lasting = self._broken_off >= BREAKS_IN_A_ROW and now - self._breaking_since >= BREAKING_FOR_S
        return handshake if lasting and not self._welcomed else None

    def close(self) -> None:
        """Be done for good."""
        self.phase = Phase.CLOSED
        self.draining = False
        self._liveness = None

    def next_deadline(self) -> float | None:
        """Return when `start_due`, `silence` or `heartbeat` next changes, None for never."""
        if self.phase is Phase.CLOSED:
            return None
        return self._deadline if self._liveness is None else self._liveness.next_deadline()
