"""The dispatch policies: pure choosers of one worker among those that have a free slot.

A policy is given candidates in no particular order, never none. Ties are broken in least-recently-used order, so
that equal workers take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol, TypeAlias, TypeVar


class Candidate(Protocol):
    """What a policy may know of a worker."""

    @property
    def load(self) -> int:
        """Requests at the worker, of all brokers, running or waiting."""

    @property
    def speed(self) -> float:
        """Relative weight; 1 is normal."""

    @property
    def last_used(self) -> int:
        """Number of the dispatch that went to it last; 0 before the first."""


CandidateT = TypeVar("CandidateT", bound=Candidate)
Policy: TypeAlias = Callable[[Sequence[CandidateT], Random], CandidateT]


def shortest_queue(candidates: Sequence[CandidateT], _random: Random) -> CandidateT:
    """Choose the worker with the fewest requests in relation to its speed (FastChat's `shortest_queue`, with a load
    that is exact instead of a heartbeat old)."""
    return min(candidates, key=lambda worker: (worker.load / worker.speed, worker.last_used))


def lottery(candidates: Sequence[CandidateT], random: Random) -> CandidateT:
    """Choose a worker at random, with a probability in proportion to its speed (FastChat's `lottery`)."""
    return random.choices(candidates, weights=[worker.speed for worker in candidates])[0]


#: By the names that `--policy` takes.
POLICIES: dict[str, Policy[Candidate]] = {"shortest-queue": shortest_queue, "lottery": lottery}
DEFAULT_POLICY = "shortest-queue"
