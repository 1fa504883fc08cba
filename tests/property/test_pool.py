"""The pool against a look at every worker."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenmq.broker.breaker import FAILURES, State
from tokenmq.broker.dispatch import POLICIES, Policy
from tokenmq.broker.pool import Free, Spare
from tokenmq.broker.registry import ClientSession, Registry, WorkerSession
from tokenmq.broker.requests import RequestRecord
from tokenmq.protocol.liveness import Liveness
from tokenmq.protocol.messages import Load, ModelInfo, Ready, WorkerState

MODELS = ("a", "b", "c")
infos = st.lists(st.builds(ModelInfo, st.sampled_from(MODELS), resumes=st.booleans()), max_size=3).map(tuple)
loads = st.builds(
    Load,
    st.sampled_from([WorkerState.READY] * 4 + list(WorkerState)),
    running=st.integers(0, 2),
    waiting=st.integers(0, 2),
    kv_use=st.sampled_from([0.0, 0.6, 1.0]),
)


class Pools(RuleBasedStateMachine):
    """Workers come, go and change; whom the pool offers is whom one would find by looking at each."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.uses = 0
        self.requests = 0
        self.names = 0
        self.client = ClientSession(peer=b"c", liveness=Liveness(1.0, 5.0, 0.0, 0.0), name="c", route=bytes(16))

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def begins(self, policy: str) -> None:
        self.registry = Registry(POLICIES[policy])

    def workers(self) -> list[WorkerSession]:
        return list(self.registry)

    @rule(models=infos, slots=st.integers(1, 3), load=loads, speed=st.none() | st.floats(0.5, 4.0))
    def registers(self, models: Any, slots: int, load: Load, speed: float | None) -> None:
        self.names += 1
        name = f"w{self.names}"
        ready = Ready(name, 1, "test", models, slots, "test", load, speed)
        self.registry.add(
            WorkerSession(
                peer=name.encode(), liveness=Liveness(1.0, 5.0, 0.0, 0.0), name=name, incarnation=1, ready=ready,
                reported=load,
            ),
            self.now,
        )  # fmt: skip

    @precondition(lambda self: len(self.registry))
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        self.registry.remove(data.draw(st.sampled_from(self.workers())))

    @precondition(lambda self: len(self.registry))
    @rule(data=st.data(), models=infos, slots=st.integers(1, 3))
    def changes(self, data: st.DataObject, models: Any, slots: int) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        self.registry.update(worker, replace(worker.ready, models=models, slots=slots), self.now)

    @precondition(lambda self: len(self.registry))
    @rule(data=st.data(), load=loads, draining=st.booleans(), held=st.booleans(), passed=st.floats(0, 100))
    def reports(self, data: st.DataObject, load: Load, draining: bool, held: bool, passed: float) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        self.now += passed
        worker.report(load)
        worker.draining, worker.held = draining and held, held
        self.registry.changed(worker, self.now)

    @precondition(lambda self: len(self.registry))
    @rule(data=st.data(), times=st.integers(1, FAILURES), tried=st.booleans())
    def fails(self, data: st.DataObject, times: int, tried: bool) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        for number in range(times):
            worker.breaker.failed(self.now, bytes([number]))
        if tried and worker.breaker.state is State.OPEN:
            worker.breaker.try_again()
        self.registry.changed(worker, self.now)

    @precondition(lambda self: len(self.registry))
    @rule(data=st.data(), tokens=st.integers(1, 100), seconds=st.floats(0.1, 10))
    def finishes(self, data: st.DataObject, tokens: int, seconds: float) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        if worker.in_flight:
            worker.release(next(iter(worker.in_flight.values())))
        worker.breaker.succeeded()
        self.registry.measure(worker, tokens, seconds, self.now)
        self.registry.changed(worker, self.now)

    @rule(policy=st.sampled_from(sorted(POLICIES)))
    def ranks_anew(self, policy: str) -> None:
        self.registry.pool.rank_anew(POLICIES[policy])

    @rule(model=st.sampled_from(MODELS), resuming=st.booleans(), strictly=st.booleans(), data=st.data())
    def dispatches(self, model: str, resuming: bool, strictly: bool, data: st.DataObject) -> None:
        avoided = data.draw(st.lists(st.sampled_from(self.workers()), max_size=3)) if len(self.registry) else []
        found = self.registry.pool.candidates(model, resuming=resuming, avoided=avoided, strictly=strictly)
        expected = self.expected(model, resuming, avoided, strictly)
        assert sorted(worker.name for worker in found) == sorted(worker.name for worker in expected)
        assert len(found) == len(expected)
        assert bool(found) == bool(expected)
        assert {found[number].name for number in range(len(found))} == {worker.name for worker in expected}
        if not expected:
            return
        rank = self.registry.pool.policy.rank
        least = found.least()
        arrivals = [worker.name for worker in self.workers()]
        assert least is min(
            expected, key=lambda worker: (rank(worker), worker.last_used, arrivals.index(worker.name))
        )
        self.use(found, model)

    def use(self, found: Free | Spare, model: str) -> None:
        """Give the least one a request, as the exchange does."""
        worker = found.least()
        self.uses += 1
        self.requests += 1
        worker.last_used = self.uses
        record = RequestRecord(
            id=self.requests.to_bytes(16, "big"), model=model, attempt=1, client=self.client, route=bytes(16),
            message=None, size_bytes=1, arrived_at=self.now, expected_tokens=self.requests % 7,
        )  # fmt: skip
        worker.charge(record)
        self.registry.changed(worker, self.now)

    def expected(
        self, model: str, resuming: bool, avoided: list[WorkerSession], strictly: bool
    ) -> list[WorkerSession]:
        able = [
            worker
            for worker in self.workers()
            if any(info.name == model and (info.resumes or not resuming) for info in worker.ready.models)
        ]
        trusted = [worker for worker in able if worker.takes_requests and not worker.breaker.suspends]
        chosen = trusted or [worker for worker in able if worker.takes_requests]
        others = [worker for worker in chosen if worker not in avoided]
        if others or strictly:
            chosen = others
        return [worker for worker in chosen if worker.free > 0]

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "registry"):
            self.registry.validate()


Pools.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPools = Pools.TestCase


def test_a_heap_does_not_grow_with_the_number_of_changes() -> None:
    registry = Registry(Policy())
    random = Random(1)
    for number in range(10):
        name = f"w{number}"
        ready = Ready(name, 1, "test", (ModelInfo("a"),), 9, "test", Load())
        liveness = Liveness(1.0, 5.0, 0.0, 0.0)
        registry.add(
            WorkerSession(
                peer=name.encode(), liveness=liveness, name=name, incarnation=1, ready=ready, reported=Load()
            ),
            0.0,
        )
    for _ in range(10_000):
        worker = random.choice(list(registry))
        worker.report(Load(running=random.randrange(5)))
        registry.changed(worker, 0.0)
    [group] = registry.pool.groups("a")
    assert len(group._heap) < 200
