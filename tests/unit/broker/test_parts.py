"""The registry and the probe, each by itself."""

from __future__ import annotations

from tokenmq.broker.dispatch import Policy
from tokenmq.broker.outbox import clip
from tokenmq.broker.probe import Probe
from tokenmq.broker.registry import Registry, WorkerSession
from tokenmq.protocol.limits import MAX_TEXT_CHARS
from tokenmq.protocol.liveness import Liveness

from .stage import ready_of


def worker(name: str, *models: str, peer: bytes = b"") -> WorkerSession:
    ready = ready_of(name, *models)
    return WorkerSession(
        peer=peer or name.encode(), liveness=Liveness(1.0, 5.0, 0.0, 0.0), name=name, incarnation=1, ready=ready,
        reported=ready.load,
    )  # fmt: skip


class TestRegistry:
    def test_workers_are_found_by_model_in_every_state(self) -> None:
        registry = Registry(Policy())
        first, second = worker("w1", "a", "b"), worker("w2", "b", "b")
        registry.add(first, 0.0)
        registry.add(second, 0.0)
        registry.validate()
        assert list(registry) == [first, second]
        assert len(registry) == 2
        assert registry.models() == ["a", "b"]
        assert list(registry.serving("b")) == [first, second]
        assert list(registry.serving("c")) == []
        registry.remove(second)
        registry.validate()
        assert list(registry.serving("b")) == [first]
        registry.update(first, ready_of("w1", "c"), 0.0)
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
