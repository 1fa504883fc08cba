"""The sessions of a member with its brokers: of a worker, or of a broker that stands below others.

The rules:

- There is one session with each broker (`enlistment.py`). Whatever goes wrong in one ends it: the socket is closed,
  the member lets go of what it held there, and after a back-off a new one is opened. The others do not notice.
- READY begins a session, and is said again when there is news. ACCEPTED tells the intervals of its heartbeats.
- A broker hears early when what others have here has changed: what it knows of its own part would mislead it.

This file does not know what a request is, nor what the member does with one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .enlistment import LIMITED_PAUSE_S, UNREACHED_AGAIN_S, Enlistment, Phase
from .links import Connected, LinkEvent, Lost, Malformed, Open, Received, Refused, Send, Shut
from .messages import Accepted, Disconnect, DisconnectCode, Draining, Goodbye, Heartbeat, Load, Message, Ready
from .orders import Orders
from .refusal import AT_BACKEND, KEY_OPTIONS, explain

#: Least time between two reports to a broker: what others have here is then wrong for hardly longer than a message
#: takes, and the reports cost a broker at most 20 small messages a second and member.
REPORT_AGAIN_S = 0.05
#: After these there is no coming back.
_FOR_GOOD = (DisconnectCode.SUPERSEDED, DisconnectCode.REMOVED)
#: After these there is, when somebody has changed something.
_LASTING = (DisconnectCode.LOOP, DisconnectCode.FORBIDDEN)


class Member(Protocol):
    """What a membership asks of the one that it belongs to."""

    def ready(self, broker: str, now: float) -> Ready | None:
        """Return the READY of the moment; None while there is nothing to register with."""

    def load(self, broker: str, now: float) -> Load:
        """Return the report of the moment for this broker."""

    def others(self, broker: str) -> int:
        """Return how many requests others than this broker have here: `running + waiting - held` of its load."""

    def receive(self, broker: str, message: Message, now: float) -> bool:
        """Take a message that is none of the membership's; tell whether a broker may send it."""

    def ended(self, broker: str, now: float) -> int:
        """Let go of all that came in the session that has just ended; return how many requests that were."""

    def barred(self, code: DisconnectCode, now: float) -> None:
        """Note that all brokers have sent the member away for good, the last one with this code."""


class Membership:
    """The sessions with all brokers.

    Attributes:
        sessions: the session with each broker, or the pause between two, by endpoint.
    """

    def __init__(
        self,
        brokers: Iterable[str],
        member: Member,
        orders: Orders[Any],
        *,
        keyed: bool = False,
        key_options: tuple[str, str] = KEY_OPTIONS,
    ) -> None:
        """Have no session yet; the first `tick` opens sockets.

        Args:
            brokers: their endpoints.
            member: whom the sessions are for.
            orders: takes what is to be done (LinkAction), in order.
            keyed: they are connected to with CURVE.
            key_options: what the options are called that give the keys for that.
        """
        self._keyed = keyed
        self._key_options = key_options
        self.sessions = {broker: Enlistment(broker) for broker in brokers}
        self._member = member
        self._orders = orders
        self._handlers: dict[type[Any], Callable[[Enlistment, Any, float], None]] = {
            Connected: self._on_connected,
            Lost: self._on_lost,
            Refused: self._on_refused,
            Received: self._on_received,
            Malformed: self._on_malformed,
        }
        self._receivers: dict[type[Any], Callable[[Enlistment, Any, float], None]] = {
            Accepted: self._on_accepted,
            Heartbeat: self._on_heartbeat,
            Disconnect: self._on_disconnect,
            Goodbye: self._on_goodbye,
        }

    # --- what the member calls --------------------------------------------------------------------------------------

    def handle(self, event: LinkEvent, now: float) -> None:
        """Take what happened at a socket."""
        self._handlers[type(event)](self.sessions[event.broker], event, now)

    def tick(self, now: float) -> None:
        """Do what is due: open sockets, send heartbeats, give up who is silent."""
        for session in self.sessions.values():
            self._tend(session, now)

    def next_deadline(self) -> float:
        """Return the next time at which `tick` has something to do; infinity for none."""
        times = (min(session.next_deadline(), self._early(session)) for session in self.sessions.values())
        return min(times, default=math.inf)

    def forgive(self, lag_s: float) -> None:
        """Take `lag_s` seconds in which the member did not listen off the brokers' silence."""
        for session in self.sessions.values():
            session.liveness.forgive(lag_s)

    def active(self, broker: str) -> bool:
        """Tell whether this broker has accepted the member."""
        return self.sessions[broker].phase is Phase.ACTIVE

    def send(self, broker: str, message: Message) -> None:
        """Order a message in this broker's session."""
        self.count(broker)
        self._orders.add(Send(broker, message))

    def count(self, broker: str) -> None:
        """Note that a message leaves in this broker's session that `send` does not see."""
        self.sessions[broker].sent += 1

    def register(self, now: float) -> None:
        """Say READY to all that are there, since there is news.

        Not where the member has withdrawn, since READY would take that back: `stay` brings the news then.
        """
        for session in self.sessions.values():
            if session.wanted and (session.registered or session.phase is Phase.CONNECTED):
                self._register(session, now)

    def report(self, now: float) -> None:
        """Send the load to all brokers at once, since it matters."""
        for session in self.sessions.values():
            if session.registered:
                self._report(session, now)

    def withdraw(self, now: float, brokers: Iterable[str] | None = None) -> None:
        """Say DRAINING to these brokers (None: to all), and open no new session with them until `stay`."""
        for session in self._chosen(brokers):
            session.wanted = False
            if session.registered:
                self.send(session.broker, Draining())
                self._report(session, now)
            elif session.has_socket:
                self._orders.add(Shut(session.broker))
                session.rest(now)

    def stay(self, now: float, brokers: Iterable[str] | None = None) -> None:
        """Take `withdraw` back: say READY to those that are still there, and come back to the others."""
        for session in self._chosen(brokers):
            session.wanted = True
            if session.registered:
                self._register(session, now)

    def leave(self, brokers: Iterable[str] | None = None) -> None:
        """Say GOODBYE to these brokers (None: to all), and never come back; the member holds nothing of theirs."""
        for session in self._chosen(brokers):
            if session.registered:
                self.send(session.broker, Goodbye())
            if session.has_socket:
                self._orders.add(Shut(session.broker))
            session.bar()

    def validate(self) -> None:
        """Check every invariant that holds between two events.

        Raises:
            AssertionError: one does not; its argument is the session at fault.
        """
        for broker, session in self.sessions.items():
            assert session.broker == broker, session
            assert session.sent if session.registered else session.phase is not Phase.ACTIVE, session
            assert session.wanted or session.phase not in (Phase.OPENING, Phase.CONNECTED), session

    # --- time -------------------------------------------------------------------------------------------------------

    def _chosen(self, brokers: Iterable[str] | None) -> list[Enlistment]:
        return [self.sessions[broker] for broker in (self.sessions if brokers is None else brokers)]

    def _tend(self, session: Enlistment, now: float) -> None:
        if session.phase is Phase.RESTING and session.wanted and now >= session.retry_at:
            session.open(now)
            self._orders.add(Open(session.broker))
        elif session.phase is Phase.OPENING and now >= session.unreached_at:
            session.unreached_at = now + UNREACHED_AGAIN_S
            self._orders.log("broker_unreached", level=logging.WARNING, broker=session.broker, doing="still trying")
        elif session.registered and session.liveness.expired(now):
            self._end(session, f"silent for {session.liveness.expiry_s:g} s", now)
        elif session.registered and (session.liveness.due(now) or now >= self._early(session)):
            self._report(session, now)

    def _early(self, session: Enlistment) -> float:
        """Return when this broker is to have a report before its heartbeat is due; infinity for not at all."""
        if session.phase is not Phase.ACTIVE or self._member.others(session.broker) == session.told_others:
            return math.inf
        return session.liveness.spoke_at + REPORT_AGAIN_S

    # --- what leaves ------------------------------------------------------------------------------------------------

    def _register(self, session: Enlistment, now: float) -> None:
        """Say READY, for the first time or with news, if there is something to say."""
        ready = self._member.ready(session.broker, now)
        if ready is None:
            return
        if not session.registered:
            session.join(now)
        self.send(session.broker, ready)
        self._reported(session, ready.load, now)

    def _report(self, session: Enlistment, now: float) -> None:
        load = self._member.load(session.broker, now)
        self.send(session.broker, Heartbeat(session.sent, load))
        self._reported(session, load, now)

    @staticmethod
    def _reported(session: Enlistment, load: Load, now: float) -> None:
        session.told_others = load.running + load.waiting - load.held
        # Chunks do not count as having spoken: the broker's figures stay fresh while streams flow.
        session.liveness.spoke(now)

    def _end(
        self,
        session: Enlistment,
        reason: str,
        now: float,
        *,
        for_good: bool = False,
        lasting: bool = False,
        least_s: float = 0.0,
    ) -> None:
        """End a session and let go of what it held; the broker knows what became of it."""
        fields: dict[str, Any] = {"broker": session.broker, "reason": reason}
        fields["cancelled"] = self._member.ended(session.broker, now)
        self._orders.add(Shut(session.broker))
        if for_good:
            session.bar()
        else:
            retry_s = session.rest(now, lasting=lasting, least_s=least_s)
            if session.wanted:
                fields["retry_s"] = retry_s
        self._orders.log("broker_lost", level=logging.WARNING, **fields)

    # --- what happens at the sockets --------------------------------------------------------------------------------

    def _on_connected(self, session: Enlistment, event: Connected, now: float) -> None:
        if session.phase is Phase.OPENING:
            session.phase = Phase.CONNECTED
            self._register(session, now)

    def _on_lost(self, session: Enlistment, event: Lost, now: float) -> None:
        if session.has_socket:
            self._end(session, event.reason, now)

    def _on_refused(self, session: Enlistment, event: Refused, now: float) -> None:
        """Try again after a pause: the key may be enrolled later, and the broker that ended come back."""
        if not session.has_socket:
            return
        reason = explain(
            event.refusal, session.broker, keyed=self._keyed, place=AT_BACKEND, options=self._key_options
        )
        if session.phase is not Phase.OPENING:  # no handshake comes behind another one; but if it did
            self._end(session, reason, now)
            return
        self._orders.add(Shut(session.broker))
        retry_s = session.rest(now)
        if session.refusal is not event.refusal or now >= session.refusal_again_at:
            session.refusal, session.refusal_again_at = event.refusal, now + UNREACHED_AGAIN_S
            self._orders.log(
                "connection_refused", level=logging.WARNING, broker=event.broker, reason=reason, retry_s=retry_s
            )

    def _on_malformed(self, session: Enlistment, event: Malformed, now: float) -> None:
        if session.has_socket:
            self._end(session, f"malformed message: {event.error.message}", now)

    def _on_received(self, session: Enlistment, event: Received, now: float) -> None:
        if not session.has_socket:
            return  # it was on its way when the session ended
        session.liveness.heard(now)
        if not self._take(session, event.message, now):
            self._end(session, f"unexpected {event.message.command.name}", now)
            return
        session.received += 1

    def _take(self, session: Enlistment, message: Message, now: float) -> bool:
        """Take a message; tell whether it may come now."""
        receive = self._receivers.get(type(message))
        if receive is None:
            return session.phase is Phase.ACTIVE and self._member.receive(session.broker, message, now)
        if not session.registered and not isinstance(message, (Disconnect, Goodbye)):
            return False
        receive(session, message, now)
        return True

    # --- messages ---------------------------------------------------------------------------------------------------

    def _on_accepted(self, session: Enlistment, message: Accepted, now: float) -> None:
        if session.accept(message.heartbeat_s, message.expiry_s):
            self._orders.log(
                "registered",
                broker=session.broker,
                name=message.broker,
                software=message.software,
                heartbeat_s=message.heartbeat_s,
                expiry_s=message.expiry_s,
            )

    def _on_heartbeat(self, session: Enlistment, message: Heartbeat, now: float) -> None:
        if message.sent != session.received:
            self._end(session, f"messages lost: {message.sent} sent, {session.received} received", now)

    def _on_goodbye(self, session: Enlistment, message: Goodbye, now: float) -> None:
        self._end(session, "the broker said goodbye", now)

    def _on_disconnect(self, session: Enlistment, message: Disconnect, now: float) -> None:
        code = message.code
        least_s = LIMITED_PAUSE_S if code is DisconnectCode.RATE_LIMITED else 0.0
        self._end(
            session,
            f"{code.value}: {message.message}",
            now,
            for_good=code in _FOR_GOOD,
            lasting=code in _LASTING,
            least_s=least_s,
        )
        if all(other.phase is Phase.BARRED for other in self.sessions.values()):
            self._member.barred(code, now)
