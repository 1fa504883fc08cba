"""The waiting room, the registry and the probe, each by itself."""

from __future__ import annotations

import pytest

from tokenmq.broker import queue
from tokenmq.broker.outbox import clip
from tokenmq.broker.probe import Probe
from tokenmq.broker.queue import WaitingRoom
from tokenmq.broker.registry import Registry, WorkerSession
from tokenmq.broker.requests import RequestRecord
from tokenmq.protocol.limits import MAX_TEXT_CHARS
from tokenmq.protocol.liveness import Liveness

from .stage import ready_of, request_id


def record(number: int, *, size_bytes: int = 1, prior_tokens: int = 0) -> RequestRecord:
    return RequestRecord(
        request_id(number), "m", 1, None, b"r" * 16, None, size_bytes, 0.0, prior_tokens=prior_tokens
    )  # fmt: skip


def pop(room: WaitingRoom, now: float) -> RequestRecord:
    first = next(iter(room))
    room.serve(first, now)
    return first


def worker(name: str, *models: str, peer: bytes = b"") -> WorkerSession:
    ready = ready_of(name, *models)
    return WorkerSession(
        peer=peer or name.encode(), liveness=Liveness(1.0, 5.0, 0.0, 0.0), name=name, incarnation=1, ready=ready,
        reported=ready.load,
    )  # fmt: skip


class TestWaitingRoom:
    def test_first_in_first_out_with_holes(self) -> None:
        room = WaitingRoom(10)
        records = [record(number) for number in range(4)]
        for each in records:
            room.append(each)
        room.remove(records[1])
        assert list(room) == [records[0], records[2], records[3]]
        assert [pop(room, 1.0) for _ in range(3)] == [records[0], records[2], records[3]]
        assert (len(room), room.bytes) == (0, 0)

    def test_those_that_resume_come_first_and_have_places_of_their_own(self) -> None:
        room = WaitingRoom(2)
        records = [record(number, prior_tokens=number % 2) for number in range(4)]
        for each in records:
            assert room.has_place_for(each)
            room.append(each)
        assert not room.has_place_for(record(4))
        assert not room.has_place_for(record(5, prior_tokens=1))
        assert room.resumed() == [records[1], records[3]]
        assert [pop(room, 1.0) for _ in range(4)] == [records[1], records[3], records[0], records[2]]
        assert (len(room), room.bytes) == (0, 0)

    def test_attempts_of_one_request_are_told_apart(self) -> None:
        room = WaitingRoom(10)
        first, second = record(1), record(1)
        second.attempt = 2
        room.append(first)
        room.append(second)
        room.remove(first)
        assert list(room) == [second]

    def test_bounds_in_number_and_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(queue, "MAX_WAITING_BYTES", 10)
        room = WaitingRoom(2)
        room.append(record(1, size_bytes=6))
        assert room.has_place_for(record(2, size_bytes=4))
        assert not room.has_place_for(record(2, size_bytes=5))
        room.append(record(2, size_bytes=0))
        assert not room.has_place_for(record(3, size_bytes=0))

    def test_the_time_to_come_back_follows_the_pace_of_departures(self) -> None:
        room = WaitingRoom(1000)
        assert room.retry_after_s() == 1.0
        for number in range(100):
            room.append(record(number))
        for number in range(50):
            pop(room, 0.25 * number)
        assert room.retry_after_s() == pytest.approx(0.25, rel=0.05)

    def test_the_time_to_come_back_is_bounded(self) -> None:
        fast, slow = WaitingRoom(1000), WaitingRoom(1000)
        for number in range(60):
            fast.append(record(number))
            slow.append(record(number))
        for number in range(50):
            pop(fast, 0.0)
            pop(slow, 1000.0 * number)
        assert fast.retry_after_s() == 0.05
        assert slow.retry_after_s() == 30.0

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_idle_time_does_not_count(self, cancelled: bool) -> None:
        room = WaitingRoom(10)
        for number in range(2):
            room.append(record(number))
        pop(room, 0.0)
        if cancelled:
            room.remove(next(iter(room)))
        else:
            pop(room, 1.0)
        for number in range(5):  # hours apart, each served at once
            room.append(record(number))
            pop(room, 3600.0 * number)
        assert room.retry_after_s() == 1.0


class TestRegistry:
    def test_workers_are_found_by_model_in_every_state(self) -> None:
        registry = Registry()
        first, second = worker("w1", "a", "b"), worker("w2", "b", "b")
        registry.add(first)
        registry.add(second)
        registry.validate()
        assert list(registry) == [first, second]
        assert len(registry) == 2
        assert registry.models() == ["a", "b"]
        assert list(registry.serving("b")) == [first, second]
        assert list(registry.serving("c")) == []
        registry.remove(second)
        registry.validate()
        assert list(registry.serving("b")) == [first]
        registry.update(first, ready_of("w1", "c"))
        registry.validate()
        assert registry.models() == ["c"]
        assert not registry.serves("a")
        registry.remove(first)
        registry.validate()
        assert registry.models() == []


class TestProbe:
    def test_a_break_is_probed_at_once_and_after_each_delay(self) -> None:
        probe = Probe((1.0, 4.0))
        assert not probe.due(0.0)
        assert probe.broken(0.0)
        assert not probe.due(0.5)
        assert probe.due(1.0)
        assert not probe.due(4.5)
        assert probe.due(5.0)
        assert not probe.due(10.0)
        assert probe.again_at is None

    def test_breaks_in_between_share_later_probes(self) -> None:
        probe = Probe((1.0, 4.0))
        assert probe.broken(0.0)
        assert not probe.broken(4.9)
        assert probe.due(1.0)
        assert probe.due(5.0)  # too soon after the second break: all delays follow once more
        assert (probe.due(6.0), probe.due(9.0), probe.due(10.0)) == (True, False, True)
        assert probe.again_at is None

    def test_a_flood_of_breaks_has_a_bounded_rate(self) -> None:
        probe = Probe((0.05,))
        times = [number / 1000 for number in range(1000)]
        assert sum(probe.broken(now) + probe.due(now) for now in times) <= 21


def test_messages_are_cut_to_what_the_wire_allows() -> None:
    assert clip("short") == "short"
    assert clip("x" * MAX_TEXT_CHARS) == "x" * MAX_TEXT_CHARS
    assert clip("x" * (MAX_TEXT_CHARS + 1)) == "x" * (MAX_TEXT_CHARS - 3) + "..."
