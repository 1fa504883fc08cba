"""Deadlines by id."""

from __future__ import annotations

from tokenmq.protocol.timers import Timers


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_timers_come_due_in_order_and_can_be_moved_and_dropped() -> None:
    timers = Timers()
    for number in range(200):
        timers.set(key(number), 1000.0 - number)
    for number in range(3, 200):
        timers.drop(key(number))
    timers.set(key(0), 1.0)
    assert timers.next() == 1.0
    assert timers.due(0.5) == []
    assert timers.due(999.0) == [key(0), key(2), key(1)]
    assert timers.next() is None
    assert len(timers) == 0


def test_they_come_out_in_the_order_of_time() -> None:
    timers = Timers()
    for number, at in enumerate((9.0, 3.0, 3.0)):
        timers.set(key(number), at)
    assert timers.next() == 3.0
    assert timers.due(2.9) == []
    assert timers.due(3.0) == [key(1), key(2)]
    assert timers.next() == 9.0
    assert timers.due(100.0) == [key(0)]
    assert timers.next() is None


def test_dropped_ones_do_not_fill_the_memory() -> None:
    timers = Timers()
    for number in range(1000):
        timers.set(key(number), float(number))
    for number in range(1000):
        if not 500 <= number < 510:
            timers.drop(key(number))
    assert len(timers._heap) < 100
    assert timers.due(1000.0) == [key(number) for number in range(500, 510)]


def test_an_id_that_is_used_again_has_its_newest_deadline() -> None:
    timers = Timers()
    for _ in range(100):
        timers.set(key(1), 5.0)
        timers.drop(key(1))
    timers.set(key(1), 7.0)
    assert timers.due(6.0) == []
    assert timers.due(9.0) == [key(1)]
    assert len(timers) == 0
