"""A broker as a worker of others, its parents: sessions with them, and what they send. No sockets, no clock.

    client -- parent == uplink -- this broker -- worker

A request of a parent is taken as if one of our own clients had sent it: for each client that a parent's requests name
by their route there is a session of its own (`guests.py`), so that workers' CHUNKS come grouped by it and go up
unread. What READY and Load say is in `summary.py`, and what a session with a parent is, in `protocol/membership.py`.

Who goes and who stays:

- A session with a parent that ends takes all that came through it along.
- DRAIN of a parent leaves that parent: DRAINING, its requests end, GOODBYE. Nobody else notices.
- Our own drain leaves all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Any

from ..protocol.errors import ErrorCode
from ..protocol.links import LinkEvent
from ..protocol.membership import Membership
from ..protocol.messages import (
    Cancel,
    Credit,
    DisconnectCode,
    Drain,
    Error,
    Finish,
    Load,
    Message,
    Query,
    Ready,
    Reply,
    Request,
    WorkerState,
)
from ..protocol.refusal import UPLINK_KEY_OPTIONS
from .exchange import Exchange
from .guests import Guest, guest_of
from .outbox import Outbox
from .registry import Registry
from .requests import key_of
from .settings import BrokerSettings
from .summary import Summarizer, load_of

#: What is told above is looked at again after this time at the earliest: a look costs as much as there are workers,
#: and what it finds is wrong for hardly longer than a message takes.
LOOK_AGAIN_S = 0.05
MANY_MODELS = 4
LOOK_AT_MANY_S = 0.6
#: What an operator does about a parent that has sent this broker away: it is not dialled again.
_START_ANEW = "start this broker anew to come back"


class Uplink:
    """The sessions with all parents; of a broker without any, nothing."""

    def __init__(
        self,
        id: str,
        incarnation: int,
        software: str,
        settings: BrokerSettings,
        registry: Registry,
        exchange: Exchange,
        outbox: Outbox,
        *,
        new_route: Callable[[], bytes],
        query: Callable[[str, Query, float], None],
        asker_lost: Callable[[str], None],
    ) -> None:
        """Have no session yet; `tick` opens the sockets.

        Args:
            id: this broker's own, among all that may stand below one another.
            incarnation: grows with each start of this broker.
            software: its name and version.
            settings: the parents' endpoints, our name, the grace time.
            registry: our workers.
            exchange: the requests.
            outbox: takes what is to be done.
            new_route: makes what workers here know a client by.
            query: sees to it that a parent's question is answered, by `answer`.
            asker_lost: drops the questions of a parent that have no answer yet.
        """
        self._incarnation = incarnation
        self._software = software
        self._settings = settings
        self._registry = registry
        self._exchange = exchange
        self._outbox = outbox
        self._new_route = new_route
        self._query = query
        self._asker_lost = asker_lost
        self._membership = Membership(
            settings.uplinks, self, outbox, keyed=bool(settings.uplink_key), key_options=UPLINK_KEY_OPTIONS
        )
        #: Guests by their parent's route, by parent.
        self._guests: dict[str, dict[bytes, Guest]] = {parent: {} for parent in settings.uplinks}
        self._summarizer = Summarizer(id, registry)
        #: What others than each parent have here, as of the last look.
        self._others = dict.fromkeys(settings.uplinks, 0)
        #: When to look at what READY and Load say.
        self._look_at = math.inf
        self._looked_at = -math.inf
        #: Parents that have sent us away, and when what is left of theirs is given back.
        self._leaving: dict[str, float] = {}
        self._receivers: dict[type[Any], Callable[[str, Any, float], None]] = {
            Request: self._on_request,
            Credit: self._on_credit,
            Cancel: self._on_cancel,
            Drain: self._on_drain,
            Query: self._on_query,
        }

    # What the core calls.

    def handle(self, event: LinkEvent, now: float) -> None:
        """Take what happened at a parent's socket."""
        self._membership.handle(event, now)

    def touched(self, now: float) -> None:
        """Note that something may have changed of what parents are told."""
        if self._guests and self._look_at == math.inf:
            # Parents bound how often they read of many models.
            summary = self._summarizer.summary
            many = len(summary.models) + len(summary.brokers) > MANY_MODELS
            self._look_at = max(now, self._looked_at + (LOOK_AT_MANY_S if many else LOOK_AGAIN_S))

    def tick(self, now: float) -> None:
        """Do what is due."""
        if now >= self._look_at:
            self._look(now)
        self._membership.tick(now)
        for parent, until in list(self._leaving.items()):
            self._advance_leave(parent, until, now)

    def next_deadline(self) -> float:
        """Return the next time at which `tick` has something to do; infinity for none."""
        return min(self._look_at, self._membership.next_deadline(), *self._leaving.values())

    def forgive(self, lag_s: float) -> None:
        """Take `lag_s` seconds in which nobody listened off the parents' silence."""
        self._membership.forgive(lag_s)

    def withdraw(self, now: float) -> None:
        """Tell all parents that this broker drains."""
        self._membership.withdraw(now)

    def leave(self) -> None:
        """Say goodbye to all parents."""
        self._leaving.clear()
        self._membership.leave()
        self._close_ways(self._guests)
        for parent in self._guests:
            self._asker_lost(parent)

    def answer(self, parent: str, answer: Reply | Error) -> None:
        """Answer a question of a parent."""
        self._membership.send(parent, answer)

    def guests(self) -> list[Guest]:
        """Return the clients of parents that have requests here."""
        return [guest for guests in self._guests.values() for guest in guests.values()]

    def knows(self, guest: Guest) -> bool:
        """Tell whether the parent that a guest came from is still there."""
        return guest.parent in self._guests and self._membership.active(guest.parent)

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        for parent, guests in self._guests.items():
            assert not guests or self._membership.active(parent), "a guest of a parent that is gone"
            for route, guest in guests.items():
                assert (guest.parent, guest.parent_route) == (parent, route)
                assert guest.requests, "a guest without requests"

    # What membership asks.

    def ready(self, broker: str, now: float) -> Ready:
        """Return the READY of the moment."""
        summary = self._summarizer.summary
        return Ready(
            worker=self._settings.name,
            incarnation=self._incarnation,
            software=self._software,
            models=summary.models,
            slots=summary.slots,
            engine="broker",
            load=self.load(broker, now),
            speed=summary.speed,
            brokers=summary.brokers,
        )

    def load(self, broker: str, _now: float) -> Load:
        """Return the report of the moment for a parent."""
        waiting = self._exchange.tally()["waiting"]
        load = load_of(self._registry, state=self._state(broker), waiting=waiting, held=self._held(broker))
        self._others[broker] = load.running + load.waiting - load.held
        return load

    def others(self, broker: str) -> int:
        """Return how many requests others than this parent have here, as of the last look."""
        return self._others[broker]

    def receive(self, broker: str, message: Message, now: float) -> bool:
        """Take what a parent sends; tell whether it may."""
        receive = self._receivers.get(type(message))
        if receive is not None:
            receive(broker, message, now)
        return receive is not None

    def ended(self, broker: str, _now: float) -> int:
        """Cancel all that came through a session that has ended."""
        guests, self._guests[broker] = self._guests[broker], {}
        requests = sum(len(guest.requests) for guest in guests.values())
        for guest in guests.values():
            self._exchange.client_lost(guest)
        self._close_ways([broker])
        self._asker_lost(broker)
        if self._leaving.pop(broker, None) is not None:
            self._outbox.log("uplink_left", parent=broker, doing=_START_ANEW)
        return requests

    def barred(self, code: DisconnectCode, _now: float) -> None:
        """Tell that no parent is left: our own clients are still served."""
        doing = f"serving our own clients only; {_START_ANEW}"
        self._outbox.log("uplinks_closed", level=logging.ERROR, code=code.value, doing=doing)

    def _close_ways(self, parents: Collection[str]) -> None:
        """Let no more CHUNKS pass to parents that have gone: of what nobody waits for any more, there may be some."""
        for worker in self._registry:
            for hold in worker.routes.values():
                if isinstance(hold.client, Guest) and hold.client.parent in parents:
                    hold.client = None

    # Requests.

    def _on_request(self, parent: str, message: Request, now: float) -> None:
        envelope = message.envelope
        refusal = None
        if envelope.route is None:
            refusal = ErrorCode.BAD_REQUEST, "the request has no return route", False
        elif parent in self._leaving:
            refusal = ErrorCode.DRAINING, "the broker leaves this parent", True
        if refusal is not None:
            code, why, retryable = refusal
            self._membership.send(parent, Error(message.id, envelope.attempt, code.value, why, retryable))
            return
        assert envelope.route is not None
        guest = self._guest(parent, envelope.route)
        self._exchange.submit(guest, message, now)

    def _guest(self, parent: str, route: bytes) -> Guest:
        guest = self._guests[parent].get(route)
        if guest is None:
            guest = guest_of(parent, route, self._new_route(), self._tell, self._membership.count)
            self._guests[parent][route] = guest
        return guest

    def _tell(self, guest: Guest, message: Message) -> None:
        """Send up what one of our own clients would get; forget who has nothing more to wait for."""
        self._membership.send(guest.parent, message)
        if isinstance(message, (Finish, Error)) and not guest.requests:
            del self._guests[guest.parent][guest.parent_route]

    def _on_credit(self, parent: str, message: Credit, _now: float) -> None:
        guest = self._asked_by(parent, message)
        if guest is not None:
            self._exchange.credit(guest, message)

    def _on_cancel(self, parent: str, message: Cancel, _now: float) -> None:
        guest = self._asked_by(parent, message)
        if guest is not None:
            self._exchange.cancel(guest, message)

    def _asked_by(self, parent: str, message: Credit | Cancel) -> Guest | None:
        """Return the guest that a request of this parent belongs to; None where it has just ended."""
        record = self._exchange.records.get(key_of(message.id, message.attempt))
        guest = None if record is None else record.client
        return guest if isinstance(guest, Guest) and guest.parent == parent else None

    def _on_query(self, parent: str, message: Query, now: float) -> None:
        self._query(parent, message, now)

    # What parents are told.

    def _look(self, now: float) -> None:
        """See whether what parents were told still holds."""
        self._look_at, self._looked_at = math.inf, now
        left_out = self._summarizer.left_out
        if self._summarizer.differs():
            if self._summarizer.left_out > left_out:
                why = "more models or brokers than READY can tell"
                self._outbox.log("uplink_cut", level=logging.WARNING, left_out=self._summarizer.left_out, why=why)
            self._membership.register(now)
        for parent in self._guests:
            self.load(parent, now)

    def _state(self, parent: str) -> WorkerState:
        if self._exchange.draining or parent in self._leaving:
            return WorkerState.DRAINING
        return WorkerState.READY if self._summarizer.summary.ready else WorkerState.LOADING

    def _held(self, parent: str) -> int:
        guests = self._guests[parent].values()
        return sum(not record.parked for guest in guests for record in guest.requests.values())

    # Leaving one parent.

    def _on_drain(self, parent: str, message: Drain, now: float) -> None:
        if message.undo:
            self._stay(parent, now)
            return
        grace_s = self._settings.grace_s if message.grace_s is None else message.grace_s
        until = now + grace_s
        if until >= self._leaving.get(parent, math.inf):
            return  # told again: that can only shorten the grace time
        begun = parent in self._leaving
        self._leaving[parent] = until
        if not begun and not self._exchange.draining:
            self._outbox.log("uplink_leaving", parent=parent, held=self._held(parent), grace_s=grace_s)
            self._membership.withdraw(now, [parent])

    def _stay(self, parent: str, now: float) -> None:
        leaving = self._leaving.pop(parent, None) is not None
        if leaving and not self._exchange.draining:
            self._outbox.log("uplink_stays", parent=parent)
            self._membership.stay(now, [parent])
        else:
            why = "it leaves by its own will" if leaving else "it was not leaving"
            self._outbox.log("uplink_undo_ignored", parent=parent, why=why)

    def _advance_leave(self, parent: str, until: float, now: float) -> None:
        guests = [guest for guest in self._guests[parent].values() if guest.requests]
        if guests and now < until:
            return
        self._exchange.give_up("the broker has left the one that sent this", guests)
        self._membership.leave([parent])
        self._close_ways([parent])
        self._asker_lost(parent)
        del self._leaving[parent]
        self._outbox.log("uplink_left", parent=parent, unfinished=len(guests), doing=_START_ANEW)
