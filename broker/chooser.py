"""Who may take a request, whom the policy takes, and whom the broker trusts. Knows nothing of what waits."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from ..protocol.messages import Decision, Error, Finish, FinishReason
from ..protocol.timers import Timers
from .breaker import ENGINE_FAULTS, State
from .decision import explain
from .dispatch import POLICIES, Candidate, Job, Policy, find_policy, least_rank
from .hops import parents_of
from .metrics import Counters
from .outbox import Outbox
from .pool import Free, Spare
from .registry import Registry, WorkerSession
from .requests import RequestRecord
from .settings import BrokerSettings

_CANCELLED = FinishReason.CANCELLED


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that nobody has made: somebody asks where it would go."""

    model: str
    affinity: str
    prompt_tokens: int = 0
    expected_tokens: int = 0


class Chooser:
    """The policy at work, and the breakers of the workers.

    Attributes:
        policy_name: the policy's name.
    """

    def __init__(
        self, registry: Registry, outbox: Outbox, counters: Counters, settings: BrokerSettings, random: Random
    ) -> None:
        """Choose by the policy of the settings."""
        self.policy_name = settings.policy
        self._registry = registry
        self._outbox = outbox
        self._counters = counters
        self._broker = settings.name
        self._random = random
        self._dispatches = 0
        #: When a worker that was suspended is tried again, by its connection.
        self._pauses = Timers()
        registry.pool.rank_anew(self._guarded(registry.pool.policy))

    def candidates(self, record: RequestRecord, *, strictly: bool = False) -> Free | Spare:
        """Return the workers that may take a request now; `strictly` none that it avoids."""
        pool, by_name = self._registry.pool, self._registry.by_name
        if not record.avoid:
            return pool.candidates(record.model, resuming=record.resumed, avoided=())
        avoided = [worker for name in record.avoid if (worker := by_name.get(name)) is not None]
        # A broker may have others than the worker that failed, or that is late: it is not worth waiting for somebody
        # else, but whoever is free elsewhere is the better choice. It may have had that one only.
        ways = [broker for name in record.avoid for broker in self._ways_to(name)]
        if ways:
            others = pool.candidates(record.model, resuming=record.resumed, avoided=[*avoided, *ways], strictly=True)
            if others:
                return others
        return pool.candidates(record.model, resuming=record.resumed, avoided=avoided, strictly=strictly)

    def choose(self, record: RequestRecord, free: Free | Spare) -> WorkerSession:
        """Return the worker that gets the request, and tell why if it asks for that."""
        worker = self._choose(record, free)
        if record.explain:
            self._explain(record, worker, free)
        self._dispatches += 1
        first, worker.last_used = worker.last_used == 0, self._dispatches
        if first:
            self._registry.changed(worker, self._outbox.now)  # it is no longer taken for a promise
        return worker

    def route(self, model: str, affinity: str) -> Decision | None:
        """Return whom the policy would take for a request now; None where no worker of the model takes any.

        Where nobody has a free slot it is the worker of the least rank, with no candidates: it is first to have one
        if all requests take the same time.
        """
        pool = self._registry.pool
        free = pool.candidates(model, resuming=False, avoided=())
        if free:
            return explain(self._broker, self.policy_name, self._choose(_Asked(model, affinity), free), free)
        able = [worker for worker in self._registry.serving(model) if worker.takes_requests]
        if not able:
            return None
        likely = min(able, key=lambda worker: (pool.policy.rank(worker), worker.last_used, worker.place.number))
        return explain(self._broker, self.policy_name, likely, [])

    def set_policy(self, name: str) -> None:
        """Choose workers by another policy from now on.

        Raises:
            ValueError: there is none of that name; the message lists those that there are.
        """
        policy, before = self._guarded(find_policy(name)), self.policy_name
        self.policy_name = name
        self._outbox.log("policy_changed", policy=name, before=before)
        self._registry.pool.rank_anew(policy)

    # Whom to trust.

    def judge(self, worker: WorkerSession, record: RequestRecord, answer: Finish | Error, now: float) -> None:
        """Learn from the end of a request how its worker does."""
        if isinstance(answer, Error):
            # A broker below suspends its own workers.
            engine_failed = answer.code in ENGINE_FAULTS and not worker.is_broker
            if engine_failed and worker.breaker.failed(now, record.id):
                self._counters.workers_suspended += 1
                self._pauses.set(worker.peer, worker.breaker.again_at)
                self._outbox.log(
                    "worker_suspended", record.id, level=logging.WARNING, worker=worker.name,
                    failures=worker.breaker.failures, s=worker.breaker.again_at - now,
                )  # fmt: skip
        elif answer.reason is not _CANCELLED:
            if worker.breaker.succeeded():
                self._pauses.drop(worker.peer)
                self._outbox.log("worker_trusted", record.id, worker=worker.name)
            tokens = answer.usage.completion_tokens - record.prior_tokens
            if tokens > 1:  # a single one has no pace
                self._registry.measure(worker, tokens - 1, answer.timings.decode_s, now)

    def forget(self, worker: WorkerSession) -> None:
        """Wait for nothing of a worker that has left."""
        self._pauses.drop(worker.peer)

    def tried_again(self, now: float) -> list[WorkerSession]:
        """Return the suspended workers that are to get a request now."""
        workers = [self._registry.by_peer[peer] for peer in self._pauses.due(now)]
        for worker in workers:
            worker.breaker.try_again()
            self._outbox.log("worker_tried_again", worker=worker.name)
        return workers

    def next_deadline(self) -> float | None:
        """Return when the next suspended worker is to be tried; None for never."""
        return self._pauses.next()

    def validate(self) -> None:
        """Check that whoever is suspended is tried again.

        Raises:
            AssertionError: somebody is not.
        """
        for worker in self._registry:
            assert (worker.peer in self._pauses) == (worker.breaker.state is State.OPEN), "suspended for ever"

    # Inside.

    def _choose(self, job: Job, free: Free | Spare) -> WorkerSession:
        """Have the policy choose; one that was installed may be wrong, and no request is to suffer from it."""
        policy = self._registry.pool.policy
        if policy.choose is least_rank:
            return free.least()  # what the default policy comes to
        try:
            chosen = policy.choose(job, free, self._random)
        except Exception as error:  # noqa: BLE001 (somebody else's code: whatever it raises is a line in the log)
            why = f"{type(error).__name__}: {error}"
        else:
            if isinstance(chosen, WorkerSession) and chosen in free:
                return chosen
            why = "it chose none of the candidates"
        self._policy_failed(why, "taking the least rank")
        return free.least()

    def _guarded(self, policy: Policy) -> Policy:
        """Return a policy whose rank is a number, whatever an installed one does: the cost where it gives none."""
        if policy in POLICIES.values():
            return policy  # ours are called twice a request, and know what they do
        told = False

        def rank(worker: Candidate) -> float:
            nonlocal told
            try:
                found = float(policy.rank(worker))
            except Exception as error:  # noqa: BLE001 (as in `_choose`)
                why = f"its rank: {type(error).__name__}: {error}"
            else:
                if not math.isnan(found):
                    return found
                why = "its rank is not a number"
            if not told:  # once: each report of each worker asks for its rank
                told = True
                self._policy_failed(why, "ranking by cost where it fails")
            return worker.cost

        return replace(policy, rank=rank)

    def _policy_failed(self, why: str, doing: str) -> None:
        self._outbox.log("policy_failed", level=logging.ERROR, policy=self.policy_name, why=why, doing=doing)

    def _ways_to(self, name: str) -> Iterator[WorkerSession]:
        """Go through the brokers here that a worker of this name may be behind."""
        for parent in parents_of(name):
            worker = self._registry.by_name.get(parent)
            if worker is not None and worker.is_broker:
                yield worker

    def _explain(self, record: RequestRecord, worker: WorkerSession, free: Free | Spare) -> None:
        decision = record.decision = explain(self._broker, self.policy_name, worker, free)
        loads = ",".join(f"{each.worker}:{each.load}/{each.slots}:{each.cost:.4g}" for each in decision.considered)
        self._outbox.log(
            "request_routed", record.id, model=record.model, worker=worker.name, policy=decision.policy,
            candidates=decision.candidates, considered=loads, attempt=record.attempt,
        )  # fmt: skip
