"""What the simulated clusters are, and what arrives at them: the same for each rule that is compared.

Lengths are a bounded Pareto distribution, arrivals a Poisson process or one whose rate is switched between bursts and
quiet times (a Markov-modulated Poisson process). Everything is drawn from a seed, so that all rules see the same
requests at the same times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from tokenmq.protocol.limits import NORMAL_PRIORITY

#: Seconds that a request takes on average, on a worker of average speed: a chat answer of a model of medium size.
SERVICE_S = 5.0

#: Lengths: the share of requests above x tokens falls as x to this power, between the least and the most. Their
#: squared coefficient of variation is 3.1 (1 for exponential ones).
PARETO_SHAPE = 1.5
LEAST_TOKENS = 64
MOST_TOKENS = 8_192

#: Bursts: their mean length, that of the time between them, and the rates in both over the mean one. 3 x 30 s and
#: 0.5 x 120 s are 150 s of mean rate.
BURST_S, QUIET_S = 30.0, 120.0
BURST_RATE, QUIET_RATE = 3.0, 0.5

#: Conversations that have requests at the same time, per slot: each request belongs to one of them.
CONVERSATIONS_PER_SLOT = 4
#: Clients do not know how long an answer will be; they bound it by one of these powers of two.
_LEAST_BOUND = 256

POISSON, BURSTY = "poisson", "bursty"
ARRIVALS = (POISSON, BURSTY)
PARETO, EXPONENTIAL, FIXED = "pareto", "exponential", "fixed"
LENGTHS = (PARETO, EXPONENTIAL, FIXED)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers.

    Attributes:
        speeds: of each worker: tokens a second of one stream.
        slots: streams that each of them runs at a time.
    """

    speeds: tuple[float, ...]
    slots: int = 1

    @property
    def tokens_per_s(self) -> float:
        """What all slots together generate."""
        return sum(self.speeds) * self.slots

    @classmethod
    def of(cls, workers: int, ratios: tuple[float, ...] = (1.0,), slots: int = 1) -> Cluster:
        """Make workers of these speeds in turn, on average such that a mean request takes SERVICE_S."""
        relative = [ratios[number % len(ratios)] for number in range(workers)]
        unit = mean_tokens() / SERVICE_S * workers / sum(relative)
        return cls(tuple(unit * ratio for ratio in relative), slots)


@dataclass(frozen=True, slots=True)
class Job:
    """One request.

    Attributes:
        number: of the request, from 0, in the order of arrival.
        arrived_at: seconds.
        tokens: its length. What takes time is each token but the first, which is there at once; there is one more
            than these.
        bound_tokens: the bound on it that the client gives.
        conversation: which one it belongs to.
        client: who sends it.
        priority: of the request.
    """

    number: int
    arrived_at: float
    tokens: int
    bound_tokens: int
    conversation: int = 0
    client: int = 0
    priority: int = NORMAL_PRIORITY


def bound_of(tokens: int) -> int:
    """Return the bound that a client gives for a request of this length: the next power of two, 256 at least."""
    return max(_LEAST_BOUND, 1 << tokens.bit_length())


def mean_tokens() -> float:
    """Return the mean length, the same for all kinds."""
    shape, ratio = PARETO_SHAPE, LEAST_TOKENS / MOST_TOKENS
    return shape / (shape - 1) * LEAST_TOKENS * (1 - ratio ** (shape - 1)) / (1 - ratio**shape)


def draw_tokens(lengths: str, random: Random) -> int:
    """Draw the length of a request."""
    if lengths == FIXED:
        return round(mean_tokens())
    if lengths == EXPONENTIAL:
        return max(1, round(random.expovariate(1 / mean_tokens())))
    least, most = LEAST_TOKENS**-PARETO_SHAPE, MOST_TOKENS**-PARETO_SHAPE
    return round((least - random.random() * (least - most)) ** (-1 / PARETO_SHAPE))


def arrival_times(arrivals: str, rate: float, random: Random) -> Iterator[float]:
    """Yield the times of arrivals, without end.

    Args:
        arrivals: POISSON or BURSTY.
        rate: arrivals a second on average.
        random: what they are drawn from.
    """
    now = 0.0
    if arrivals == POISSON:
        while True:
            now += random.expovariate(rate)
            yield now
    phase_end, bursts = 0.0, True
    while True:
        bursts = not bursts
        begin, phase_end = phase_end, phase_end + random.expovariate(1 / (BURST_S if bursts else QUIET_S))
        now = begin + random.expovariate(rate * (BURST_RATE if bursts else QUIET_RATE))
        while now < phase_end:  # arrivals have no memory: what would come later is drawn anew
            yield now
            now += random.expovariate(rate * (BURST_RATE if bursts else QUIET_RATE))


def jobs_of(
    cluster: Cluster, load: float, arrivals: str, count: int, seed: str, *, lengths: str = PARETO
) -> list[Job]:
    """Draw what arrives at a cluster.

    Args:
        cluster: the workers.
        load: what arrives over what all slots can do, 0 to 1.
        arrivals: POISSON or BURSTY.
        count: requests.
        seed: of all that is drawn.
        lengths: their distribution, one of LENGTHS.
    """
    rate = load * cluster.tokens_per_s / mean_tokens()
    times = arrival_times(arrivals, rate, Random(f"{seed}/times"))
    sizes, talks = Random(f"{seed}/lengths"), Random(f"{seed}/conversations")
    conversations = CONVERSATIONS_PER_SLOT * cluster.slots * len(cluster.speeds)
    drawn = ((at, draw_tokens(lengths, sizes)) for at in islice(times, count))
    return [
        Job(number, at, tokens, bound_of(tokens), talks.randrange(conversations))
        for number, (at, tokens) in enumerate(drawn)
    ]
