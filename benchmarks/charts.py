"""Bars and lines of relays, one colour for each, where matplotlib is installed (the extra `bench`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from relays import BARE, BROKER, NATS, PROXY
from rounds import brief
from runs import Spread

#: What tokenmq does stands out; one relay has one colour in all plots.
_COLOURS = {PROXY: "#9aa0a6", BARE: "#c9a66b", NATS: "#7fb3c8", BROKER: "#1d4e89"}
_OTHER = "#1d4e89"
_BAR = 0.8

#: By group, by name within the group.
Bars = Mapping[str, Mapping[str, Spread]]
#: By panel, by the line's name: points.
Panels = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def bars(path: Path, title: str, axis: str, groups: Bars, *, logarithmic: bool = False) -> None:
    """Draw medians as bars, with a thin line from the least to the most of the rounds.

    Args:
        path: the .svg file to write.
        title: of the whole.
        axis: what is measured, with its unit.
        groups: what belongs together; bars of one name have one colour.
        logarithmic: the axis is.
    """
    pyplot = _pyplot()
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    thick = _BAR / len(names)
    figure, panel = pyplot.subplots(figsize=(6.4, 0.7 + len(groups) * (0.25 + 0.22 * len(names))))
    for number, name in enumerate(names):
        found = [(at, group[name]) for at, group in enumerate(groups.values()) if name in group]
        places = [at + (number - (len(names) - 1) / 2) * thick for at, _ in found]
        medians = [each.median for _, each in found]
        reach = [[each.median - each.least for _, each in found], [each.most - each.median for _, each in found]]
        panel.barh(
            places, medians, thick * 0.9, xerr=reach, label=name, color=_COLOURS.get(name, _OTHER),
            error_kw={"linewidth": 0.8, "ecolor": "#333333"},
        )  # fmt: skip
        for place, (_, each) in zip(places, found, strict=True):
            panel.annotate(
                brief(each.median), (each.most, place), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
    panel.set_yticks(range(len(groups)), list(groups))
    panel.invert_yaxis()
    panel.set(title=title, xlabel=axis, xscale="log" if logarithmic else "linear")
    panel.margins(x=0.12)
    if logarithmic:  # so that the shortest bar is as long as a half or more of a decade
        reached = [edge for group in groups.values() for each in group.values() for edge in (each.least, each.most)]
        panel.set_xlim(10 ** math.floor(math.log10(min(reached) / 3)), max(reached) * 3)
    panel.grid(visible=True, axis="x", linewidth=0.3)
    panel.set_axisbelow(True)
    if len(names) > 1:
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(pyplot, figure, path)


def lines(
    path: Path, title: str, axes: tuple[str, str], panels: Panels, *, ticks: Sequence[str] = (), logarithmic: str
) -> None:
    """Draw lines, side by side.

    Args:
        path: the .svg file to write.
        title: of the whole.
        axes: what the horizontal and the vertical axis show.
        panels: the lines of each panel.
        ticks: names of the places 0, 1, 2 ... on the horizontal axis; none for numbers.
        logarithmic: which axes are: "x", "y" or "xy". The others begin at 0.
    """
    pyplot = _pyplot()
    figure, made = pyplot.subplots(
        1, len(panels), figsize=(1.4 + 3 * len(panels), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (heading, named) in zip(made[0], panels.items(), strict=True):
        for name, points in named.items():
            panel.plot(
                *zip(*points, strict=True), label=name, color=_COLOURS.get(name), marker="o", markersize=3,
                linewidth=2 if name == BROKER else 1.2,
            )  # fmt: skip
        panel.set(title=heading, xlabel=axes[0])
        for axis in logarithmic:
            panel.set(**{f"{axis}scale": "log"})
        if "x" in logarithmic:
            places = sorted({x for points in named.values() for x, _ in points})
            panel.set_xticks(places, [f"{place:,g}" for place in places])
            panel.minorticks_off()
        if ticks:
            panel.set_xticks(range(len(ticks)), list(ticks))
        panel.grid(visible=True, linewidth=0.3)
    if "y" not in logarithmic:  # of all panels
        made[0][0].set_ylim(bottom=0)
    made[0][0].set_ylabel(axes[1])
    made[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    _save(pyplot, figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the same figures make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tokenmq", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
