"""What a simulated rule is judged by: figures of one run, their mean over seeds with confidence, tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chaos_figures import percentile
from routing_load import SERVICE_S
from routing_rules import Outcome

#: Of each run, what came first is left out: it found an empty cluster.
WARM_UP = 0.1
#: Student's t for 95 % by degrees of freedom; more of them are taken for infinitely many.
_T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_T95_MANY = 1.96
#: Below this a wait is nothing to divide by.
_NOTHING = 1e-3


@dataclass(frozen=True, slots=True)
class Figures:
    """One run under one rule, in units of the mean service time.

    Attributes:
        mean: of the waits.
        p50: their median.
        p99: what 99 % of them do not exceed.
        response: mean of wait and service together.
    """

    mean: float
    p50: float
    p99: float
    response: float

    @classmethod
    def of(cls, outcome: Outcome) -> Figures:
        """Take the figures of a run."""
        first = int(len(outcome.waits_s) * WARM_UP)
        waits = sorted(outcome.waits_s[first:])
        return cls(
            mean=statistics.fmean(waits) / SERVICE_S,
            p50=percentile(waits, 0.5) / SERVICE_S,
            p99=percentile(waits, 0.99) / SERVICE_S,
            response=statistics.fmean(outcome.responses_s[first:]) / SERVICE_S,
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds, and half the width of its 95 % confidence interval; infinite with one seed."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate from one value a seed."""
        if len(values) < 2:
            return cls(values[0], math.inf)
        t = _T95[len(values) - 1] if len(values) <= len(_T95) else _T95_MANY
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        """Return it for a table."""
        width = f"±{self.half_width:.2f}" if math.isfinite(self.half_width) else ""
        return f"{self.mean:8.3f}{width:>7}"


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate | None:
    """Estimate a ratio from pairs of the same seed; None where a divisor is nothing."""
    if min(below) < _NOTHING:
        return None
    return Estimate.of([a / b for a, b in zip(above, below, strict=True)])


def table(results: Mapping[str, Sequence[Figures]], optimum: str) -> Iterator[str]:
    """Yield the lines of a table of the rules.

    Args:
        results: by the rule's name, the figures of each seed, all in one order.
        optimum: the rule that others are divided by.
    """
    yield f"  {'':28} {'mean':>15} {'p50':>15} {'p99':>15} {'wait + service':>15}  mean / {optimum}"
    best = [figures.mean for figures in results[optimum]]
    for rule, runs in results.items():
        columns = [
            Estimate.of([getattr(figures, name) for figures in runs]) for name in ("mean", "p50", "p99", "response")
        ]
        compared = ratio([figures.mean for figures in runs], best)
        yield f"  {rule:28} {' '.join(map(str, columns))} {compared or '-'!s:>16}"
