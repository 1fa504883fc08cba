"""Messages without an end, seen by what the kernel counts."""

from __future__ import annotations

from tokenmq.broker.inflow import CLOSE_LOOK_S, LOOK_S, MOST_BYTES, MOST_STRANGER_BYTES, Inflow, resident_bytes

MIB = 1024 * 1024
ONE, TWO = (5, 1), (6, 2)


class Place:
    """A process that grows, and its connections."""

    def __init__(self) -> None:
        self.memory = 100 * MIB
        self.brought: dict[tuple[int, int], int | None] = {ONE: 0, TWO: 0}
        self.read: dict[tuple[int, int], int | None] = {ONE: 1, TWO: 1}
        self.now = 0.0
        self.looked = 0
        self.inflow = Inflow(self._bytes_in, self.now, lambda: self.memory)

    def _bytes_in(self, connection: tuple[int, int]) -> int | None:
        self.looked += 1
        return self.brought[connection]

    def look(self) -> list[tuple[int, int]]:
        self.now += LOOK_S
        return self.inflow.look(self.now, lambda: list(self.read.items()))


def test_while_the_process_does_not_grow_nobody_looks() -> None:
    place = Place()
    place.brought[ONE] = 10 * MOST_BYTES
    for _ in range(10):
        assert place.look() == []
    assert place.looked == 0


def test_what_brings_more_than_a_message_while_none_is_read_is_cut() -> None:
    place = Place()
    place.memory += 100 * MIB
    assert place.look() == []
    place.brought[ONE] = MOST_BYTES
    assert place.look() == []
    place.brought[ONE] = MOST_BYTES + 1
    assert place.look() == [ONE]


def test_what_is_read_meanwhile_may_be_as_much_as_it_likes() -> None:
    place = Place()
    place.memory += 100 * MIB
    for number in range(1, 9):
        assert place.look() == []
        place.brought[ONE] = number * MOST_BYTES
        place.read[ONE] = number + 1


def test_a_stranger_may_bring_little_from_its_beginning_on() -> None:
    place = Place()
    place.memory += 100 * MIB
    place.read[TWO] = None
    place.brought[TWO] = MOST_STRANGER_BYTES
    assert place.look() == []
    place.brought[TWO] = MOST_STRANGER_BYTES + 1
    assert place.look() == [TWO]


def test_one_that_is_gone_or_is_not_counted_is_left_alone() -> None:
    place = Place()
    place.memory += 100 * MIB
    place.brought[ONE] = None
    assert place.look() == place.look() == []


def test_memory_that_stays_is_growth_no_more() -> None:
    place = Place()
    place.memory += 100 * MIB
    place.look()
    place.memory -= 90 * MIB
    before = place.looked
    assert place.look() == []
    assert place.looked == before


def test_many_small_frames_are_seen_by_the_memory_that_they_take() -> None:
    place = Place()
    place.memory += 100 * MIB
    place.brought |= {ONE: MIB, TWO: 8 * MIB}
    assert place.look() == [] == place.look()
    place.brought[ONE] = 2 * MIB
    place.brought[TWO] = 10 * MIB
    place.memory += 30 * MIB
    assert place.look() == [], "that much may be honest"
    place.brought[TWO] = 13 * MIB
    place.memory += 100 * MIB
    assert place.look() == [TWO]


def test_memory_that_is_kept_is_looked_at_no_more_after_a_while() -> None:
    place = Place()
    place.memory += 500 * MIB
    looks = 0
    while place.look() == [] and place.inflow.look_at == place.now + CLOSE_LOOK_S:
        looks += 1
    assert 50 < looks < 200


def test_it_looks_in_its_time_only() -> None:
    place = Place()
    place.memory += 100 * MIB
    place.look()
    assert place.inflow.look_at == place.now + CLOSE_LOOK_S
    before = place.looked
    assert place.inflow.look(place.now + CLOSE_LOOK_S / 2, lambda: list(place.read.items())) == []
    assert place.looked == before


def test_the_system_tells_the_memory() -> None:
    before = resident_bytes()
    ballast = bytearray(64 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert resident_bytes() > before + 32 * MIB
    del ballast
