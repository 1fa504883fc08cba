"""The work of the scale benchmark is what its names say, and its bounds are told from the rounds."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tokenmq.protocol.limits import MAX_SLOTS
from tokenmq.protocol.messages import Heartbeat, Load


@pytest.fixture
def scale(load: Callable[[str], Any]) -> Any:
    return load("scale")


@pytest.fixture
def make(load: Callable[[str], Any]) -> Callable[..., Any]:
    """Make ends that are connected to nothing and note who sends a heartbeat."""

    def made(kind: str, case: Any) -> Any:
        class Here(load("kinds").KINDS[kind]):  # type: ignore[misc]
            def _open(self, *_: object) -> None:
                self._routes = {number: number.to_bytes(16, "big") for number in range(case.clients)}
                self._peers = [number.to_bytes(5, "big") for number in range(case.clients)]
                self.workers = [f"worker-{number}" for number in range(case.workers)]
                self.clients = [f"client-{number}" for number in range(case.clients)]
                self.said: list[Any] = []

            def _say(self, connection: Any) -> None:
                self.said.append(connection)

        relay = load("relays").Relay(kind, 1, 2, 3)
        return Here(relay, case.workers, case.clients, case.streams, case.slots)

    return made


def paced(scale: Any) -> dict[str, Any]:
    return {name: work for name, work in scale.CASES.items() if work.shape.interval_s is not None}


@pytest.mark.parametrize("size", ["shape", "quick"])
def test_every_stream_has_a_token_in_each_interval(load: Any, scale: Any, make: Any, size: str) -> None:
    streams = load("streams")
    for name, work in paced(scale).items():
        case = getattr(work, size)
        assert case.slots <= MAX_SLOTS
        steps = streams.steps(make("zmq-broker", case), case)
        every = Counter(stream for step in steps for stream in step)
        assert set(every.values()) == {1}, name
        assert len(every) == case.clients * case.streams
        assert len({len(step) for step in steps}) == 1
        # A stride of messages of one length is what the ends can count: each client has as many tokens in a step.
        assert len({count for step in steps for count in Counter(client for client, _ in step).values()}) == 1


def test_a_step_is_of_one_worker_and_the_workers_take_turns(load: Any, scale: Any, make: Any) -> None:
    streams = load("streams")
    for work in paced(scale).values():
        case = work.quick
        ends = make("zmq-broker", case)
        owner = {stream: number for number in range(case.workers) for stream in ends.streams_of(number)}
        for number, step in enumerate(streams.steps(ends, case)):
            assert {owner[stream] for stream in step} == {number % case.workers}


def test_the_cases_are_what_their_names_say(load: Any, scale: Any, make: Any) -> None:
    streams = load("streams")
    for name, work in paced(scale).items():
        case = work.shape
        if "workers" not in name:
            assert case.clients * case.streams == int(name.split("-")[1])
        if work.family in ("streams", "workers"):
            assert case.clients * case.streams / case.interval_s == 10_000
            assert case.interval_s / case.groups == pytest.approx(0.001)
        first = streams.steps(make("zmq-broker", case), case)[0]
        together = max(Counter(client for client, _ in first).values())
        assert together == {"held-20000": 2}.get(name, case.streams if work.family == "kept" else 1), name


def test_heartbeats_are_spread_over_the_second(scale: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ends = make("zmq-broker", scale.CASES["held-20000"].quick)
    workers = 0
    for _ in range(100):
        now += 0.01
        before = len(ends.said)
        workers += len(ends.beat())
        assert len(ends.said) - before <= 1
        assert ends.next_beat > now
    assert Counter(ends.said) == Counter([*ends.workers, *ends.clients])
    assert workers == len(ends.workers)
    now += 3
    ends.beat()
    assert set(Counter(ends.said).values()) == {4}


def test_an_idle_worker_says_what_a_real_one_says(load: Any) -> None:
    sent: list[Any] = []

    class Here(load("kinds").KINDS["zmq-broker"]):  # type: ignore[misc]
        def _open(self, *_: object) -> None:
            self._loads = {"idle": Load(), "busy": Load(running=3, held=3)}

        def _tell(self, connection: Any, message: Any) -> None:
            sent.append(message)

    class Named(str):
        sent = 7

    ends = Here(load("relays").Relay("zmq-broker", 1, 2, 3), 0, 0, 0, 1)
    for name in ("idle", "busy", "client"):
        ends._say(Named(name))
    assert sent == [Heartbeat(7, Load()), Heartbeat(7, Load(running=3, held=3)), Heartbeat(7)]


def rows_of(load: Any, *values: tuple[str, int, dict[str, float]]) -> list[Any]:
    return [load("rounds").Row("zmq-broker", case, number, figures) for case, number, figures in values]


def test_a_bound_is_kept_or_not_by_the_median(load: Any, scale: Any) -> None:
    bound = scale.Bound("kept-512", "p99_ms", 100.0, "ms")
    assert scale.verdict([], bound) == ""
    rows = rows_of(
        load, *(("kept-512", number, {"p99_ms": value}) for number, value in enumerate([50.0, 90.0, 700.0]))
    )
    assert scale.verdict(rows, bound).endswith("below 100 ms, measured 90 (50 to 700): met")
    rows = rows_of(
        load, *(("kept-512", number, {"p99_ms": value}) for number, value in enumerate([50.0, 100.0, 700.0]))
    )
    assert scale.verdict(rows, bound).endswith("NOT MET")


def test_who_did_not_keep_up_has_not_met_the_bound(load: Any, scale: Any) -> None:
    bound = scale.Bound("kept-512", "p99_ms", 100.0, "ms")
    rows = rows_of(load, ("kept-512", 1, {"p99_ms": 5.0}), ("kept-512", 2, {scale.BEHIND: 1.0}))
    assert scale.verdict(rows, bound).endswith("did not keep up: NOT MET")


def test_growth_is_told_within_a_round(load: Any, scale: Any) -> None:
    bound = scale.Bound("workers-1000", "cpu_us_above_idle", 1.5, "times", "workers-1")
    rows = rows_of(
        load,
        ("workers-1", 1, {"cpu_us_above_idle": 10.0}),
        ("workers-1000", 1, {"cpu_us_above_idle": 14.0}),
        ("workers-1", 2, {"cpu_us_above_idle": 20.0}),
        ("workers-1000", 2, {"cpu_us_above_idle": 22.0}),
        ("workers-1000", 3, {"cpu_us_above_idle": 900.0}),
    )
    assert scale.values(rows, bound) == [1.4, 1.1]
    assert scale.verdict(rows, bound).endswith("below 1.5 times, measured 1.25 (1.1 to 1.4): met")


def test_bounds_are_of_cases_and_relays_that_there_are(scale: Any) -> None:
    for bound in scale.BOUNDS:
        names = {bound.case, bound.than} - {""}
        assert names <= set(scale.CASES)
        assert all("zmq-broker" in scale.CASES[name].relays for name in names)
    assert set(scale.QUICK) <= set(scale.CASES)
    assert {work.family for work in scale.CASES.values()} == set(scale.COLUMNS)


def test_a_process_that_comes_to_rest_tells_its_memory(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = load("memory")
    sizes = iter([10 << 20, 20 << 20, 20 << 20, 20 << 20])
    used = iter([0.0, 0.3, 0.6, 0.9, 0.9])

    class Running:
        pid = 1

        def cpu_s(self) -> float:
            return next(used)

    monkeypatch.setattr(memory, "resident_bytes", lambda _pid: next(sizes))
    waited: list[float] = []
    # The third look sees the same memory, but it still works; the fourth sees it at rest.
    assert memory.settled_bytes(Running(), waited.append, 0.1) == 20 << 20
    assert len(waited) == 4


def test_of_who_never_comes_to_rest_nothing_is_told(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = load("memory")
    monkeypatch.setattr(memory, "resident_bytes", lambda _pid: time.monotonic_ns() * 1_000_000)
    monkeypatch.setattr(memory, "_PATIENCE_S", 0.05)
    ours = load("relays").Relay("this", 1, 2, os.getpid())
    with pytest.raises(load("rounds").BenchmarkError, match="did not come to rest"):
        memory.settled_bytes(ours, lambda _seconds: None, 1.0)
