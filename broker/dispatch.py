"""The dispatch policies: which of the workers that have a free slot gets a request.

A policy is two pure functions: `rank` orders workers, and `choose` takes one. Where `choose` only wants the worker of
the least rank, it asks `workers.least()`, which the pool keeps at hand in logarithmic time however many workers there
are; whatever looks at all of them costs linear time. Ties are broken in least-recently-used order, so that equal
workers take turns.

One's own policy is a `Policy` that an installed package names in its entry points, in the group `tokenmq.policies`:

    [options.entry_points]
    tokenmq.policies =
        biggest-first = my_package:BIGGEST_FIRST
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

#: With affinity a worker gets at most this much more than its part of all requests (bounded loads: Mirrokni, Thorup,
#: Zadimoghaddam 2016): more overloads it, less sends too many to where nothing is cached.
AFFINITY_SLACK = 0.25
#: A worker that has so much of its slots free is not overloaded, however idle the others are.
AFFINITY_FREE = 0.5
ENTRY_POINTS = "tokenmq.policies"


class Job(Protocol):
    """What a policy may know of a request."""

    @property
    def model(self) -> str:
        """The model that it asks for."""

    @property
    def affinity(self) -> str:
        """What it has in common with requests that one worker best serves; "" for nothing."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, estimated from its size."""

    @property
    def expected_tokens(self) -> int:
        """Tokens to be generated at most."""


class Candidate(Protocol):
    """What a policy may know of a worker."""

    @property
    def name(self) -> str:
        """The worker's name."""

    @property
    def load(self) -> int:
        """Requests at the worker, of all brokers, running or waiting."""

    @property
    def slots(self) -> int:
        """Requests that it runs at a time."""

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that this broker's requests there may cost at most, prompts and answers."""

    @property
    def speed(self) -> float:
        """Tokens a second of one stream, measured or set; only relations count."""

    @property
    def last_used(self) -> int:
        """Number of the dispatch that went to it last; 0 before the first."""

    @property
    def cost(self) -> float:
        """What a request would find there, in relation to its speed: the queue, and what slows its engine down."""


class Candidates(Protocol):
    """The workers that may take a request: at least one, each with a free slot, in no particular order."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __iter__(self) -> Iterator[Candidate]:
        """Go through them."""

    def __getitem__(self, index: int) -> Candidate:
        """Return one, by a number from 0."""

    def least(self) -> Candidate:
        """Return the one of the least rank; of several the one that was used longest ago."""


def least_rank(_job: Job, workers: Candidates, _random: Random) -> Candidate:
    """Choose the worker of the least rank."""
    return workers.least()


def _cost(worker: Candidate) -> float:
    return worker.cost


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to choose workers.

    Attributes:
        choose: takes one of the workers for a request. The random numbers are the broker's, so that a simulation
            can repeat them.
        rank: orders the workers, the least first. It is computed when something about a worker changes, and so must
            follow from the worker alone.
    """

    choose: Callable[[Job, Candidates, Random], Candidate] = least_rank
    rank: Callable[[Candidate], float] = _cost


def _lottery(_job: Job, workers: Candidates, random: Random) -> Candidate:
    drawn = list(workers)
    return random.choices(drawn, weights=[worker.speed for worker in drawn])[0]


def _power_of_two(_job: Job, workers: Candidates, random: Random) -> Candidate:
    # Mitzenmacher 2001: the better of two drawn at random is nearly as good as the best of all.
    if len(workers) == 1:
        return workers[0]
    first = random.randrange(len(workers))
    second = random.randrange(len(workers) - 1)
    pair = workers[first], workers[second + (second >= first)]
    return min(pair, key=lambda worker: (worker.cost, worker.last_used))


def _tokens(worker: Candidate) -> float:
    return worker.outstanding_tokens / worker.speed


def _kinship(affinity: str, worker: str) -> bytes:
    """Return the weight of a worker for an affinity: rendezvous hashing (Thaler, Ravishankar 1998)."""
    return blake2b(f"{affinity}\0{worker}".encode(), digest_size=8).digest()


def _prefix_affinity(job: Job, workers: Candidates, _random: Random) -> Candidate:
    # Hashes instead of a table of who has what: brokers that know nothing of each other, or have just been started,
    # send a conversation to the same worker.
    if not job.affinity:
        return workers.least()
    each = (1 + AFFINITY_SLACK) * (sum(worker.load for worker in workers) + 1)
    each /= sum(worker.speed for worker in workers)
    able = [
        worker
        for worker in workers
        if worker.load < max(math.ceil(each * worker.speed), AFFINITY_FREE * worker.slots)
    ]
    return max(able, key=lambda worker: _kinship(job.affinity, worker.name))


#: By the names that `--policy` takes. `shortest-queue` and `lottery` are FastChat's, with a load that is exact
#: instead of a heartbeat old.
POLICIES: dict[str, Policy] = {
    "shortest-queue": Policy(),
    "lottery": Policy(_lottery),
    "round-robin": Policy(rank=lambda worker: 0.0),
    "power-of-two": Policy(_power_of_two),
    "least-tokens": Policy(rank=_tokens),
    "prefix-affinity": Policy(_prefix_affinity),
}
DEFAULT_POLICY = "shortest-queue"


def policy_names() -> list[str]:
    """Return the names of all policies, installed ones included."""
    return sorted({*POLICIES, *(point.name for point in _installed())})


def find_policy(name: str) -> Policy:
    """Return the policy of a name; an installed one is imported now.

    Raises:
        ValueError: there is none of that name, or what the entry point names is no policy; the message says which.
    """
    if name in POLICIES:
        return POLICIES[name]
    for point in _installed():
        if point.name != name:
            continue
        try:
            found = point.load()
        except Exception as error:
            raise ValueError(f"policy {name!r} ({point.value}) cannot be loaded: {error}") from error
        if not isinstance(found, Policy):
            raise ValueError(f"policy {name!r} ({point.value}) is a {type(found).__name__}, not a Policy")
        return found
    raise ValueError(f"unknown policy {name!r}; known are {', '.join(policy_names())}")


def _installed() -> Iterable[EntryPoint]:
    """Return the policies of installed packages."""
    # Imported here: it takes an eighth of a start, and the policies above need none of it.
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINTS)
