"""How fast a worker is: tokens a second of one stream, from what its finished requests tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..protocol.limits import FASTEST_TOKENS_PER_S, SLOWEST_TOKENS_PER_S

#: Weight of the newest request: the last dozen or so count.
_SMOOTHING = 0.15
#: A measurement counts half after this time without a new one: a worker that was slow once is not left out for ever.
_HALF_LIFE_S = 60.0
#: Measured speeds are taken in steps of this factor: no two workers measure the same, and one that is a thousandth
#: faster than the others would get all requests while they are idle.
_STEP = 1.1
#: A worker that has never had a request is taken for so much faster than usual: it gets one, and is measured.
_UNTRIED = 2.0


@dataclass(slots=True)
class Speed:
    """The exponentially weighted speed of a worker.

    It is the speed of a stream, not the sum over streams, which says how much a worker has to do rather than how fast
    it does it: an idle worker would look slow and stay idle. Both sums are smoothed, and not their ratio, so that
    long streams count more than short ones.
    """

    _tokens: float = 0.0
    _seconds: float = 0.0
    _measured_at: float = -math.inf

    @property
    def measured(self) -> float | None:
        """Tokens a second; None before the first measurement."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def measure(self, tokens: int, seconds: float, now: float) -> None:
        """Take the decoding of one request: `tokens` after the first one, in so many seconds."""
        if tokens < 1 or seconds <= 0:
            return  # a single token has no pace
        # Workers measure their own requests, and what they say can be anything: a broker that reckoned with it could
        # divide by nothing, and one liar would hide what all the others do.
        seconds = min(max(seconds, tokens / FASTEST_TOKENS_PER_S), tokens / SLOWEST_TOKENS_PER_S)
        if self._seconds == 0:
            self._tokens, self._seconds = float(tokens), seconds
        else:
            self._tokens += _SMOOTHING * (tokens - self._tokens)
            self._seconds += _SMOOTHING * (seconds - self._seconds)
        self._measured_at = now

    def at(self, now: float, usual: float | None, *, tried: bool) -> float:
        """Return what to reckon with.

        Args:
            now: the time.
            usual: what workers here do; None where nobody was measured.
            tried: whether the worker has ever had a request.
        """
        measured = self.measured
        if measured is None:
            return 1.0 if usual is None else _in_steps(usual if tried else _UNTRIED * usual)
        if usual is not None:
            measured = usual + (measured - usual) * 0.5 ** ((now - self._measured_at) / _HALF_LIFE_S)
        return _in_steps(measured)


def _in_steps(speed: float) -> float:
    return float(_STEP ** round(math.log(speed, _STEP)))
