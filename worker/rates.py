"""How quickly an engine works, smoothed: exponentially weighted sums over the last seconds. Pure: told the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: How quickly the figures follow: two thirds of the past are forgotten in so many seconds.
MEMORY_S = 5.0


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine has done up to a moment, or, decayed, of late; `at` is that moment.

    Immutable, so that another thread that reads it has all figures of one moment.
    """

    at: float
    steps: float = 0.0
    tokens: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0

    def decayed(self, now: float) -> Work:
        """Return what is left of it now."""
        left = math.exp(-max(0.0, now - self.at) / MEMORY_S)
        return Work(
            now,
            self.steps * left,
            self.tokens * left,
            self.prefill_s * left,
            self.decode_s * left,
            self.prompt_tokens * left,
            self.cached_tokens * left,
        )

    def plus(self, more: Work) -> Work:
        """Return the sum with what was done at `more.at`."""
        old = self.decayed(more.at)
        return Work(
            more.at,
            old.steps + more.steps,
            old.tokens + more.tokens,
            old.prefill_s + more.prefill_s,
            old.decode_s + more.decode_s,
            old.prompt_tokens + more.prompt_tokens,
            old.cached_tokens + more.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """The figures for a Load; see there."""

    tokens_per_s: float = 0.0
    steps_per_s: float = 0.0
    prefill_use: float = 0.0
    decode_use: float = 0.0
    prefix_hits: float = 0.0


def rates(work: Work, now: float) -> Rates:
    """Return the figures of the moment."""
    recent = work.decayed(now)
    hits = work.cached_tokens / work.prompt_tokens if work.prompt_tokens > 0 else 0.0
    return Rates(
        tokens_per_s=recent.tokens / MEMORY_S,
        steps_per_s=recent.steps / MEMORY_S,
        prefill_use=min(1.0, recent.prefill_s / MEMORY_S),
        decode_use=min(1.0, recent.decode_s / MEMORY_S),
        prefix_hits=min(1.0, max(0.0, hits)),
    )
