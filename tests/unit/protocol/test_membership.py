"""Membership: when brokers hear what, which sessions begin anew, and what the member is asked and told."""

from __future__ import annotations

import math

import pytest

from tokenmq.protocol.links import Connected, LinkEvent, Lost, Open, Received, Send, Shut
from tokenmq.protocol.log import Log
from tokenmq.protocol.membership import REPORT_AGAIN_S, Membership
from tokenmq.protocol.messages import (
    Accepted,
    Disconnect,
    DisconnectCode,
    Draining,
    Goodbye,
    Heartbeat,
    Load,
    Message,
    ModelInfo,
    Query,
    Ready,
    Reply,
)
from tokenmq.protocol.orders import Orders

A, B = "tcp://a:1", "tcp://b:1"
QUERY = Query(bytes(16), "models")


class Holder:
    """A member that holds as many requests of each broker as the test says, and takes QUERY as a broker would."""

    def __init__(self, *brokers: str) -> None:
        self.orders: Orders[object] = Orders()
        self.membership = Membership(brokers, self, self.orders)
        self.held = dict.fromkeys(brokers, 0)
        self.nameless = False
        self.taken: list[tuple[str, Message]] = []
        self.sent_away: list[DisconnectCode] = []
        self.logs: list[Log] = []
        self.now = 50.0

    # --- what the membership asks ---

    def ready(self, broker: str, now: float) -> Ready | None:
        load = self.load(broker, now)
        return None if self.nameless else Ready("w", 1, "s", (ModelInfo("m"),), 4, "e", load)

    def load(self, broker: str, now: float) -> Load:
        total = sum(self.held.values())
        return Load(running=min(1, total), waiting=max(0, total - 1), held=self.held[broker])

    def others(self, broker: str) -> int:
        return sum(self.held.values()) - self.held[broker]

    def receive(self, broker: str, message: Message, now: float) -> bool:
        self.taken.append((broker, message))
        return isinstance(message, Query)

    def ended(self, broker: str, now: float) -> int:
        held, self.held[broker] = self.held[broker], 0
        return held

    def barred(self, code: DisconnectCode, now: float) -> None:
        self.sent_away.append(code)

    # --- what the test says ---

    def ordered(self) -> list[object]:
        self.membership.validate()
        actions = self.orders.take()
        self.logs += [action for action in actions if isinstance(action, Log)]
        return [action for action in actions if not isinstance(action, Log)]

    def tell(self, event: LinkEvent) -> list[object]:
        self.membership.handle(event, self.now)
        return self.ordered()

    def tick(self, seconds: float = 0.0) -> list[object]:
        self.now += seconds
        self.membership.tick(self.now)
        return self.ordered()

    def join(self, *brokers: str, heartbeat_s: float = 60.0) -> None:
        self.tick()
        for broker in brokers:
            self.tell(Connected(broker))
            self.tell(Received(broker, Accepted("b", "s", heartbeat_s, 5 * heartbeat_s)))


def loads(actions: list[object]) -> list[tuple[str, int, int, int]]:
    """Return (broker, running, waiting, held) of each report."""
    reports = []
    for action in actions:
        assert isinstance(action, Send), action
        assert isinstance(action.message, Heartbeat), action
        load = action.message.load
        assert load is not None
        reports.append((action.broker, load.running, load.waiting, load.held))
    return reports


# --- reports --------------------------------------------------------------------------------------------------------


def test_a_broker_hears_soon_when_what_others_have_here_has_changed() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.tick(1.0)
    member.held[A] = 3
    assert member.membership.next_deadline() <= member.now
    assert loads(member.tick()) == [(B, 1, 2, 0)]  # A has sent them: it knows
    assert member.tick(30.0) == []  # nothing has changed since


def test_it_hears_at_most_so_often_and_the_last_change_is_not_left_out() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.held[A] = 1
    assert member.tick() == []  # READY was just now
    assert member.membership.next_deadline() == pytest.approx(member.now + REPORT_AGAIN_S)
    member.tick(REPORT_AGAIN_S)
    for count in range(2, 7):
        member.held[A] = count
        assert member.tick(REPORT_AGAIN_S / 10) == []
    assert loads(member.tick(REPORT_AGAIN_S / 2)) == [(B, 1, 5, 0)]


def test_a_change_that_was_taken_back_in_between_is_not_told() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.held[A] = 1
    member.tick(REPORT_AGAIN_S / 2)
    member.held[A] = 0
    assert member.tick(REPORT_AGAIN_S) == []
    assert member.membership.next_deadline() == member.now - 1.5 * REPORT_AGAIN_S + 60.0


def test_a_heartbeat_or_ready_that_was_due_anyway_tells_it_too() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.held[A] = 1
    member.membership.register(member.now)
    member.ordered()
    assert member.tick(REPORT_AGAIN_S) == []
    member.held[A] = 2
    member.membership.report(member.now)
    member.ordered()
    assert member.tick(REPORT_AGAIN_S) == []


def test_a_broker_that_is_alone_here_needs_no_early_report() -> None:
    member = Holder(A)
    member.join(A)
    member.held[A] = 5
    assert member.tick(1.0) == []


def test_before_it_has_accepted_a_broker_hears_nothing_early() -> None:
    member = Holder(A, B)
    member.join(A)
    member.tell(Connected(B))
    member.held[A] = 1
    assert member.tick(2 * REPORT_AGAIN_S) == []
    member.tell(Received(B, Accepted("b", "s", 60.0, 300.0)))
    assert loads(member.tick()) == [(B, 1, 0, 0)]


# --- what the member is asked and told ------------------------------------------------------------------------------


def test_messages_beyond_membership_are_the_members_and_it_says_which_may_come() -> None:
    member = Holder(A)
    member.join(A)
    assert member.tell(Received(A, QUERY)) == []
    assert member.taken == [(A, QUERY)]
    assert member.tell(Received(A, Reply(bytes(16), None))) == [Shut(A)]
    assert member.logs[-1].fields["reason"] == "unexpected REPLY"


def test_nothing_reaches_the_member_before_it_is_accepted() -> None:
    member = Holder(A)
    member.tick()
    member.tell(Connected(A))
    assert member.tell(Received(A, QUERY)) == [Shut(A)]
    assert member.taken == []


@pytest.mark.parametrize("message", [Accepted("b", "s", 1.0, 5.0), Heartbeat(0)])
def test_a_broker_has_nothing_to_say_before_ready(message: Message) -> None:
    member = Holder(A)
    member.nameless = True
    member.tick()
    member.tell(Connected(A))
    assert member.tell(Received(A, message)) == [Shut(A)]


def test_accepted_once_more_changes_the_intervals_and_is_no_new_session() -> None:
    member = Holder(A)
    member.join(A, heartbeat_s=60.0)
    member.tell(Received(A, Accepted("b", "s", 2.0, 10.0)))
    assert member.membership.next_deadline() == member.now + 2.0
    assert [log.event for log in member.logs].count("registered") == 1


def test_a_session_that_ends_is_told_to_the_member_and_how_much_it_held_is_logged() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.held = {A: 2, B: 1}
    assert member.tell(Lost(A)) == [Shut(A)]
    assert member.held == {A: 0, B: 1}
    assert member.logs[-1].fields["cancelled"] == 2


def test_a_message_that_leaves_by_another_way_is_counted() -> None:
    member = Holder(A)
    member.join(A, heartbeat_s=1.0)
    member.membership.count(A)
    [send] = member.tick(1.0)
    assert isinstance(send, Send)
    assert isinstance(send.message, Heartbeat)
    assert send.message.sent == 2


def test_who_has_nothing_to_register_with_does_it_later() -> None:
    member = Holder(A)
    member.nameless = True
    member.tick()
    assert member.tell(Connected(A)) == []
    member.nameless = False
    member.membership.register(member.now)
    [send] = member.ordered()
    assert isinstance(send, Send)
    assert isinstance(send.message, Ready)


# --- leaving --------------------------------------------------------------------------------------------------------


def said(actions: list[object]) -> list[tuple[str, type[Message]]]:
    return [(action.broker, type(action.message)) for action in actions if isinstance(action, Send)]


def test_one_broker_may_be_withdrawn_from_and_come_back_to() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.membership.withdraw(member.now, [A])
    assert said(member.ordered()) == [(A, Draining), (A, Heartbeat)]
    member.membership.register(member.now)
    assert said(member.ordered()) == [(B, Ready)]  # to A it would say that it drains no longer
    member.tell(Lost(A))
    assert member.tick(10.0) == []
    assert "retry_s" not in member.logs[-1].fields
    member.membership.stay(member.now, [A])
    assert said(member.ordered()) == []
    assert member.tick() == [Open(A)]


def test_a_member_that_has_withdrawn_has_nothing_to_wake_up_for() -> None:
    member = Holder(A)
    member.join(A)
    member.membership.withdraw(member.now)
    member.tell(Lost(A))
    assert member.membership.next_deadline() == math.inf


def test_withdrawing_between_two_sessions_says_nothing_and_opens_nothing() -> None:
    member = Holder(A)
    member.join(A)
    member.tell(Lost(A))
    member.membership.withdraw(member.now)
    assert member.ordered() == []
    assert member.tick(10.0) == []


def test_staying_is_said_to_who_is_still_there() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.membership.withdraw(member.now)
    member.ordered()
    member.membership.stay(member.now)
    assert said(member.ordered()) == [(A, Ready), (B, Ready)]


def test_leaving_says_goodbye_and_is_for_good() -> None:
    member = Holder(A, B)
    member.join(A)
    member.membership.leave([A])
    assert member.ordered() == [Send(A, Goodbye()), Shut(A)]
    member.membership.leave()
    assert member.ordered() == [Shut(B)]
    assert member.tick(100.0) == []
    assert member.membership.next_deadline() == math.inf
    assert member.sent_away == []


def test_the_member_hears_when_the_last_broker_has_sent_it_away() -> None:
    member = Holder(A, B)
    member.join(A, B)
    member.tell(Received(A, Disconnect(DisconnectCode.REMOVED, "")))
    assert member.sent_away == []
    member.tell(Received(B, Disconnect(DisconnectCode.SUPERSEDED, "")))
    assert member.sent_away == [DisconnectCode.SUPERSEDED]
    assert member.tick(100.0) == []


def test_a_loop_is_tried_again_ever_more_rarely_even_when_it_was_accepted_first() -> None:
    member = Holder(A)
    pauses = []
    for _ in range(9):
        member.join(A)
        member.tell(Received(A, Disconnect(DisconnectCode.LOOP, "it is above you")))
        pauses.append(member.membership.next_deadline() - member.now)
        member.now = member.membership.next_deadline()
    assert pauses == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0])
    assert member.sent_away == []
