"""What a simulated rule is judged by: figures of one run, their mean over seeds with confidence, tables, plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos_figures import percentile
from routing_load import SERVICE_S
from routing_rules import Outcome

#: Of each run, what came first is left out: it found an empty cluster.
WARM_UP = 0.1
#: Student's t for 95 % by degrees of freedom; more of them are taken for infinitely many.
_T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_T95_MANY = 1.96
#: Below this a wait is nothing: plots have logarithmic axes.
_LEAST_SHOWN = 1e-3


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
    if min(below) < _LEAST_SHOWN:
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


def draw(
    path: Path,
    title: str,
    axis: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    logarithmic: bool = False,
) -> bool:
    """Draw lines over a logarithmic axis of waits, where matplotlib is installed.

    Args:
        path: the file to write, .svg or .png.
        title: of the whole.
        axis: what the horizontal axis shows.
        panels: by title, the lines of each panel by name, as points (x, wait).
        logarithmic: the horizontal axis is, too.

    Returns:
        Whether it was drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tokenmq", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), sharey=True, squeeze=False)
    for panel, (heading, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            xs, waits = zip(*points, strict=True)
            style = (
                {"color": "black", "linestyle": "--"} if name == "central queue" else {"marker": "o", "markersize": 3}
            )
            panel.plot(xs, [max(wait, _LEAST_SHOWN) for wait in waits], label=name, linewidth=1.2, **style)
        panel.set(title=heading, xlabel=axis, yscale="log", xscale="log" if logarithmic else "linear")
        if logarithmic:
            ticks = [x for x, _ in next(iter(lines.values()))]
            panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
            panel.minorticks_off()
        panel.grid(visible=True, linewidth=0.3)
    axes[0][0].set_ylabel("mean service times")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True
