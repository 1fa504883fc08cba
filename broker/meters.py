"""How much a peer has used of what it may: token buckets, and the accounts that have several.

An account belongs to a key where there are keys, so that more connections bring no more. Nothing here knows a message
or a socket.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .limits import Limits

#: Clocks are floats: what is nearer than this is now. Else a peer that waits as told could come a rounding too early.
_NOW_S = 1e-6
#: Bursts, in seconds' worth of the rate.
_QUERIES_BURST_S = 5
_REFUSALS_BURST_S = 10
_STRAYS_BURST_S = 10
#: What is refused was received nevertheless: so many bytes of it count as one more refusal. A peer that keeps on then
#: costs the broker 50 MiB a second at most before it is cut off.
_REFUSED_BYTES = 256 * 1024
#: Nobody knows when one of a peer's requests will end; it may ask again so often.
_OPEN_RETRY_S = 1.0


class Refusal(NamedTuple):
    """Why something is not done now.

    Attributes:
        retry_after_s: when it may be asked again, in seconds from now, more than 0.
        why: which limit it is, for a person.
    """

    retry_after_s: float
    why: str


class TokenBucket:
    """A rate with a burst: in any time of t seconds no more passes than burst + rate * t.

    Written as the generic cell rate algorithm (ITU-T I.371): all state is the time at which the bucket would be full
    again, so that a call is a few comparisons. A clock that is set back gives nobody more: the bucket fills when the
    clock is where it was.
    """

    __slots__ = ("_burst_s", "_each_s", "_full_at")

    def __init__(self, rate: float, burst: float) -> None:
        """Make a full bucket.

        Args:
            rate: what may pass a second; 0 for no limit.
            burst: what may pass at once, more than 0.

        Raises:
            ValueError: one of them makes no sense.
        """
        if not 0 <= rate < math.inf:
            raise ValueError(f"a rate must be 0 or more, got {rate}")
        if not 0 < burst < math.inf:
            raise ValueError(f"a burst must be more than 0, got {burst}")
        #: Seconds in which the bucket regains 1, and all of it.
        self._each_s = 1 / rate if rate else 0.0
        self._burst_s = burst * self._each_s if rate else math.inf
        self._full_at = -math.inf

    def take(self, amount: float, now: float) -> float:
        """Let this much pass now, if it may.

        Args:
            amount: how much, 0 or more. More than the burst passes when the bucket is full, and is paid for after it.
            now: seconds of a monotonic clock.

        Returns:
            0.0 when it has passed, else the seconds after which it could, if nothing else does.
        """
        full_at = self._full_at
        cost_s = amount * self._each_s
        if full_at <= now:
            self._full_at = now + cost_s
            return 0.0
        spare_s = self._burst_s - cost_s
        wait_s = full_at - now - spare_s if spare_s > 0.0 else full_at - now
        if wait_s > _NOW_S:
            return wait_s
        self._full_at = full_at + cost_s
        return 0.0

    def wait_s(self, amount: float, now: float) -> float:
        """Return what `take` would, and let nothing pass."""
        wait_s = self._full_at - now - max(0.0, self._burst_s - amount * self._each_s)
        return wait_s if wait_s > _NOW_S else 0.0

    def give_back(self, amount: float) -> None:
        """Undo the last `take`, which let this much pass."""
        self._full_at -= amount * self._each_s


class Account:
    """What one client may do: the holder of a key with all its connections, or one connection."""

    __slots__ = ("_bytes", "_controls", "_limits", "_most_open", "_queries", "_requests")

    def __init__(self, limits: Limits) -> None:
        """Have used nothing."""
        self._limits = limits
        self._most_open = limits.open_requests or math.inf
        self._requests = _bucket(limits.requests_per_s)
        # A smaller burst would let nobody else's bytes pass while the largest request waits for a full bucket.
        self._bytes = TokenBucket(limits.bytes_per_s, max(limits.bytes_per_s, limits.message_bytes))
        self._queries = _bucket(limits.queries_per_s, _QUERIES_BURST_S)
        self._controls = _bucket(limits.messages_per_s)

    def request(self, size_bytes: int, open_requests: int, now: float) -> Refusal | None:
        """Account for a request of this size, or tell why it is refused; then nothing but `refused` is to count it.

        Args:
            size_bytes: payload and attachments.
            open_requests: how many of the same peer's wait or run, without this one.
            now: seconds of a monotonic clock.
        """
        if open_requests >= self._most_open:
            return Refusal(_OPEN_RETRY_S, f"more than {self._limits.open_requests} requests open at a time")
        wait_s = self._requests.take(1, now)
        if wait_s:
            # Whichever takes longer, or the peer would come back in vain.
            wait_s = max(wait_s, self._bytes.wait_s(size_bytes, now))
            return Refusal(wait_s, f"more than {self._limits.requests_per_s} requests a second")
        wait_s = self._bytes.take(size_bytes, now)
        if wait_s:
            self._requests.give_back(1)
            return Refusal(wait_s, f"more than {self._limits.bytes_per_s} bytes of requests a second")
        return None

    def query(self, now: float) -> Refusal | None:
        """Account for a management question, or tell why it is refused."""
        wait_s = self._queries.take(1, now)
        return Refusal(wait_s, f"more than {self._limits.queries_per_s} questions a second") if wait_s else None

    def control(self, now: float) -> bool:
        """Account for a message that no ERROR can answer; False when there are too many: drop it, as `refused`."""
        return not self._controls.take(1, now)


class Refusals:
    """How often one session may be refused, or bring what is of no use, before it is cut off."""

    __slots__ = ("_bucket", "_most")

    def __init__(self, limits: Limits) -> None:
        """Have used nothing."""
        self._bucket = _bucket(limits.refusals_per_s, _REFUSALS_BURST_S)
        self._most = max(1.0, limits.refusals_per_s * _REFUSALS_BURST_S)

    def take(self, now: float, size_bytes: int = 0) -> bool:
        """Account for one; False when the peer has had too many and is to be cut off.

        Args:
            now: seconds of a monotonic clock.
            size_bytes: how large the message was. None counts for more than all that may come at once.
        """
        return not self._bucket.take(min(self._most, 1 + size_bytes / _REFUSED_BYTES), now)


class WorkerAccount:
    """What one worker may do: the holder of a key with all its workers, or one connection."""

    __slots__ = ("_messages",)

    def __init__(self, limits: Limits) -> None:
        """Have used nothing."""
        self._messages = _bucket(limits.worker_messages_per_s)

    def message(self, now: float) -> bool:
        """Account for a message that is not CHUNKS; False when there are too many."""
        return not self._messages.take(1, now)


class Strays:
    """How many CHUNKS one worker may send of requests that it does not hold."""

    __slots__ = ("_bucket",)

    def __init__(self, limits: Limits) -> None:
        """Have used nothing."""
        self._bucket = _bucket(limits.stray_chunks_per_s, _STRAYS_BURST_S)

    def take(self, now: float) -> bool:
        """Account for one; False when there are too many."""
        return not self._bucket.take(1, now)


def _bucket(rate: int, burst_s: int = 1) -> TokenBucket:
    return TokenBucket(rate, max(rate * burst_s, 1))
