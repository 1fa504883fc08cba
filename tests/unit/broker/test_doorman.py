"""The doorman: who is closed and why, in either order of what it hears; and a machine that tries all orders."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenmq.broker.doorman import Close, ConnectionId, Doorman, Why, machine_of
from tokenmq.broker.limits import UNLIMITED, Limits

HERE = "127.0.0.1"
THERE = "10.1.2.3"


def conn(number: int) -> ConnectionId:
    """A connection; descriptors are used again, inodes are not."""
    return number % 7, number


def doorman(**limits: float) -> Doorman:
    return Doorman(replace(UNLIMITED, **limits))  # type: ignore[arg-type]


def come(door: Doorman, number: int, now: float, address: str = HERE, account: str | None = None) -> list[Close]:
    """Accept and introduce a connection."""
    return door.accepted(conn(number), address, now) + door.introduced(conn(number), b"p%d" % number, account, now)


def test_who_introduces_himself_stays() -> None:
    door = doorman(greeting_s=5)
    assert come(door, 1, 0.0) == []
    assert door.next_deadline() is None
    assert door.tick(100.0) == []
    assert (door.open, door.strangers, door.of_peer(b"p1")) == (1, 0, conn(1))
    door.closed(conn(1))
    assert (door.open, door.of_peer(b"p1")) == (0, None)
    door.validate()


def test_who_does_not_is_closed_in_time() -> None:
    door = doorman(greeting_s=5)
    assert door.accepted(conn(1), THERE, 10.0) == []
    assert door.next_deadline() == 15.0
    assert door.tick(14.9) == []
    assert door.tick(15.0) == [Close(conn(1), Why.SILENT, THERE)]
    assert (door.open, door.next_deadline()) == (0, None)
    assert door.closed_by[Why.SILENT] == 1
    door.closed(conn(1))  # as the monitor tells in the end
    door.validate()


def test_who_was_not_listened_to_gets_time() -> None:
    door = doorman(greeting_s=5)
    door.accepted(conn(1), HERE, 0.0)
    door.accepted(conn(2), HERE, 0.0)
    assert door.tick(60.0) == []  # the broker was stopped; a HELLO may wait to be read
    assert door.introduced(conn(1), b"p1", None, 60.5) == []
    assert door.next_deadline() == 61.0
    assert door.tick(60.9) == []
    assert door.tick(90.0) == [Close(conn(2), Why.SILENT, HERE)]  # once only


@pytest.mark.parametrize("limit", [1, 3])
def test_the_newest_is_one_too_many(limit: int) -> None:
    door = doorman(connections=limit)
    for number in range(limit):
        assert come(door, number, 0.0) == []
    assert door.accepted(conn(99), HERE, 0.0) == [Close(conn(99), Why.FULL, HERE)]
    assert door.open == limit
    door.closed(conn(0))
    assert come(door, 100, 0.0) == []
    door.validate()


def test_where_strangers_fill_the_room_the_oldest_of_them_makes_place() -> None:
    door = doorman(connections=4, handshakes=2)
    come(door, 0, 0.0)
    for number in (1, 2, 3):
        assert door.accepted(conn(number), HERE, 0.0) == []
    assert door.accepted(conn(4), HERE, 0.0) == [Close(conn(1), Why.STRANGERS, HERE)]
    door.validate()


def test_the_oldest_of_too_many_strangers_are_closed_when_they_have_had_a_second() -> None:
    door = doorman(handshakes=2)
    for number, now in enumerate((0.0, 0.1, 0.2, 0.3)):
        assert door.accepted(conn(number), HERE, now) == []
    assert door.next_deadline() == 1.0
    assert door.tick(0.9) == []
    assert door.tick(1.0) == [Close(conn(0), Why.STRANGERS, HERE)]
    assert door.next_deadline() == 1.1
    door.introduced(conn(3), b"p3", None, 1.05)
    assert door.next_deadline() is None
    assert door.tick(100.0) == []
    assert door.strangers == 2


def test_thousands_that_come_back_together_all_get_in() -> None:
    door = Doorman(Limits())
    for number in range(10_000):
        assert door.accepted(conn(number), HERE, 0.0) == []
    for number in range(10_000):
        assert door.introduced(conn(number), b"p%d" % number, None, 0.9 * number / 10_000) == []
        assert door.tick(0.9 * number / 10_000) == []
    assert (door.open, door.strangers) == (10_000, 0)


def test_an_address_of_another_machine_has_its_share() -> None:
    door = doorman(connections_per_peer=2)
    assert come(door, 1, 0.0, THERE) == come(door, 2, 0.0, THERE) == []
    assert door.accepted(conn(3), THERE, 0.0) == [Close(conn(3), Why.ADDRESS, THERE)]
    assert come(door, 4, 0.0, "10.1.2.4") == []
    for number, address in enumerate([HERE, "127.0.0.2", "::1", ""] * 2, 10):
        assert come(door, number, 0.0, address) == []
    door.closed(conn(1))
    assert come(door, 20, 0.0, THERE) == []
    door.validate()


def test_a_key_has_its_share() -> None:
    door = doorman(connections_per_peer=2)
    assert come(door, 1, 0.0, account="K") == come(door, 2, 0.0, account="K") == come(door, 3, 0.0, account="L") == []
    assert come(door, 4, 0.0, account="K") == [Close(conn(4), Why.ACCOUNT, "K")]
    assert door.of_account("K") == [conn(1), conn(2)]
    door.closed(conn(1))
    assert come(door, 5, 0.0, account="K") == []
    door.validate()


def test_a_peer_may_be_heard_before_its_connection() -> None:
    door = doorman(greeting_s=5, connections_per_peer=1)
    assert door.introduced(conn(1), b"p1", "K", 0.0) == []
    assert door.introduced(conn(2), b"p2", "K", 0.0) == []
    assert door.of_peer(b"p1") is None
    assert door.accepted(conn(1), HERE, 0.1) == []
    assert (door.strangers, door.of_peer(b"p1")) == (0, conn(1))
    assert door.accepted(conn(2), HERE, 0.1) == [Close(conn(2), Why.ACCOUNT, "K")]
    door.validate()


def test_a_peer_that_is_heard_after_its_end_leaves_nothing() -> None:
    door = doorman(greeting_s=5)
    door.accepted(conn(1), HERE, 0.0)
    door.closed(conn(1))
    assert door.introduced(conn(1), b"p1", "K", 0.0) == []
    assert (door.open, door.of_peer(b"p1"), door.of_account("K")) == (0, None, [])
    deadline = door.next_deadline()
    assert deadline is not None
    assert door.tick(deadline) == []
    assert door.next_deadline() is None
    assert door.accepted(conn(1), HERE, deadline) == []
    assert door.strangers == 1  # what was said long ago is forgotten
    door.validate()


def test_an_end_takes_an_early_introduction_with_it() -> None:
    door = doorman()
    door.introduced(conn(1), b"p1", "K", 0.0)
    door.closed(conn(1))  # between two looks at the monitor: it was never seen to come
    assert door.next_deadline() is None


def test_a_repeated_early_introduction_is_as_good_as_new() -> None:
    door = doorman()
    for number, now in ((1, 0.0), (2, 1.0), (1, 5.0)):
        door.introduced(conn(number), b"p%d" % number, None, now)
        door.validate()
    deadline = door.next_deadline()
    assert deadline is not None
    door.tick(deadline)  # of the second one
    door.accepted(conn(1), HERE, deadline)
    assert door.of_peer(b"p1") == conn(1)


def test_a_clock_that_is_set_back_mixes_nothing_up() -> None:
    door = doorman(greeting_s=5)
    door.accepted(conn(1), HERE, 10.0)
    door.accepted(conn(2), HERE, 8.0)
    door.introduced(conn(3), b"p3", None, 7.0)
    door.validate()
    assert door.tick(9.0) == []
    assert len(door.tick(15.0)) == 2


def test_a_routing_id_is_of_the_connection_that_had_it_last() -> None:
    door = doorman()
    come(door, 1, 0.0)
    door.accepted(conn(2), HERE, 0.0)
    door.introduced(conn(2), b"p1", None, 0.0)
    door.validate()
    door.closed(conn(1))
    assert door.of_peer(b"p1") == conn(2)
    door.validate()


def test_early_introductions_are_bounded() -> None:
    door = doorman()
    for number in range(20_000):
        door.introduced((5, number), b"p", None, 0.0)
    door.validate()
    door.accepted((5, 0), HERE, 0.0)
    door.accepted((5, 19_999), HERE, 0.0)
    assert door.strangers == 1


def test_the_latest_introduction_counts() -> None:
    door = doorman()
    come(door, 1, 0.0, account="K")
    assert door.introduced(conn(1), b"other", "L", 1.0) == []
    assert (door.of_peer(b"p1"), door.of_peer(b"other")) == (None, conn(1))
    assert (door.of_account("K"), door.of_account("L")) == ([], [conn(1)])
    door.validate()


def test_the_same_news_twice_is_no_news() -> None:
    door = doorman(connections=1, connections_per_peer=1, greeting_s=5)
    for _ in range(2):
        assert come(door, 1, 0.0, THERE, "K") == []
    assert (door.open, door.strangers) == (1, 0)
    door.validate()


def test_who_is_sent_away_hears_the_last_words() -> None:
    door = doorman()
    come(door, 1, 0.0)
    door.dismiss(conn(1), 10.0)
    deadline = door.next_deadline()
    door.dismiss(conn(1), 10.1)  # not later for being told twice
    door.dismiss(conn(2), 10.0)  # no such connection
    assert door.next_deadline() == deadline
    assert deadline is not None
    assert 10.0 < deadline < 11.0
    assert door.tick(10.0) == []
    assert door.tick(deadline) == [Close(conn(1), Why.DISMISSED, HERE)]
    assert door.next_deadline() is None
    door.validate()


def test_without_limits_all_stay() -> None:
    door = Doorman(UNLIMITED)
    for number in range(3_000):
        assert door.accepted(conn(number), THERE, 0.0) == []
    assert door.next_deadline() is None
    assert door.tick(1e9) == []


@pytest.mark.parametrize(
    ("address", "machine"),
    [
        ("", ""),
        ("127.0.0.1", ""),
        ("127.9.9.9", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_machines(address: str, machine: str) -> None:
    assert machine_of(address) == machine


class Doors(RuleBasedStateMachine):
    """Connections that come, go, speak and are heard of in any order, against a list of what is really there."""

    @initialize(
        connections=st.integers(0, 6),
        handshakes=st.integers(0, 3),
        each=st.integers(0, 3),
        greeting_s=st.sampled_from([0.0, 0.5, 5.0]),
    )
    def open(self, connections: int, handshakes: int, each: int, greeting_s: float) -> None:
        self.limits = replace(
            UNLIMITED,
            connections=connections,
            handshakes=handshakes,
            connections_per_peer=each,
            greeting_s=greeting_s,
        )
        self.door = Doorman(self.limits)
        self.now = 100.0
        self.made = 0
        #: What both queues still hold, in order: the monitor's, and the peers' messages.
        self.monitor: list[tuple[str, int]] = []
        self.messages: list[int] = []
        #: Those that are there, and those that the doorman was told of, with the time.
        self.alive: set[int] = set()
        self.known: dict[int, float] = {}
        self.introduced: set[int] = set()
        #: Introductions without a connection, and until when they count.
        self.early: dict[int, float] = {}
        self.counted = 0

    def obey(self, closes: list[Close]) -> None:
        for connection, _, _ in closes:
            number = connection[1]
            assert number in self.known
            del self.known[number]
            self.introduced.discard(number)
            self.counted += 1
            if number in self.alive:
                self.leave(number)

    def leave(self, number: int) -> None:
        self.alive.discard(number)
        self.monitor.append(("closed", number))

    @rule(speaks=st.booleans())
    def connect(self, speaks: bool) -> None:
        self.made += 1
        self.alive.add(self.made)
        self.monitor.append(("accepted", self.made))
        if speaks:
            self.messages.append(self.made)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.alive))))

    @precondition(lambda self: self.monitor)
    @rule()
    def hear_the_monitor(self) -> None:
        event, number = self.monitor.pop(0)
        if event == "closed":
            self.door.closed(conn(number))
            self.early.pop(number, None)
            self.known.pop(number, None)
            self.introduced.discard(number)
            return
        self.known[number] = self.now
        if self.early.pop(number, 0.0) > self.now:
            self.introduced.add(number)
        self.obey(self.door.accepted(conn(number), ("", THERE, "10.9.9.9")[number % 3], self.now))

    @precondition(lambda self: self.messages)
    @rule()
    def hear_a_peer(self) -> None:
        number = self.messages.pop(0)
        closes = self.door.introduced(conn(number), b"p%d" % number, (None, "K")[number % 2], self.now)
        if number in self.known:
            self.introduced.add(number)
        else:
            self.early[number] = self.now + 10.0
        self.obey(closes)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def dismiss(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        self.door.dismiss(conn(number), self.now)
        for _ in range(3):
            self.sleep(0.1)
        assert number not in self.known

    @rule(pause=st.sampled_from([0.0, 0.1, 0.4, 3.0, 20.0]))
    def sleep(self, pause: float) -> None:
        """The loop looks whenever something is due."""
        until = self.now + pause
        for _ in range(1_000):
            deadline = self.door.next_deadline()
            if deadline is None or deadline > until:
                break
            self.now = max(self.now, deadline)
            self.obey(self.door.tick(self.now))
        else:
            raise AssertionError("the doorman never rests")
        self.now = until
        self.obey(self.door.tick(self.now))
        if self.limits.greeting_s:
            assert all(age < self.limits.greeting_s for age in self.strangers())
        if self.limits.handshakes:
            # Rounded: a second after one time is not always a second before another.
            assert len([age for age in self.strangers() if age > 1.001]) <= self.limits.handshakes

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "door"):
            return
        self.door.validate()
        assert self.door.open == len(self.known)
        assert sum(self.door.closed_by.values()) == self.counted
        assert self.door.strangers == len(self.strangers())
        most, each = self.limits.connections, self.limits.connections_per_peer
        assert not most or len(self.known) <= most
        keyed = [number for number in self.introduced if number % 2]  # these count by their keys, not by addresses
        assert not each or len([number for number in self.known if number % 3 == 1 and number not in keyed]) <= each
        assert not each or len([number for number in self.introduced if number % 2]) <= each

    def strangers(self) -> list[float]:
        return [self.now - at for number, at in self.known.items() if number not in self.introduced]

    def teardown(self) -> None:
        """When all have gone and all is heard, nothing is left."""
        if not hasattr(self, "door"):
            return
        for number in sorted(self.alive):
            self.leave(number)
        while self.monitor:
            self.hear_the_monitor()
        while self.messages:
            self.hear_a_peer()
        self.sleep(20.0)
        assert (self.door.open, self.door.next_deadline()) == (0, None)
        for leftover in ("_open", "_strangers", "_early", "_leaving", "_by_peer", "_by_account", "_by_machine"):
            assert not getattr(self.door, leftover), leftover


TestDoors = Doors.TestCase
TestDoors.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_an_address_of_another_machine_has_its_rate() -> None:
    doorman = Doorman(Limits(connections_per_s=2))
    closed = [close.why for fd in range(25) for close in doorman.accepted((fd, fd), "10.0.0.7", 0.0)]
    assert closed == [Why.RATE] * 5
    assert doorman.accepted((100, 100), "10.0.0.8", 0.0) == doorman.accepted((101, 101), "127.0.0.1", 0.0) == []
    assert doorman.accepted((102, 102), "10.0.0.7", 0.5) == []
    assert [close.why for close in doorman.accepted((103, 103), "10.0.0.7", 0.5)] == [Why.RATE]
    doorman.validate()
