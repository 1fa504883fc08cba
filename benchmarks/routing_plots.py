"""Plots of waits, where matplotlib is installed (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: The axis of waits is logarithmic: what is less is drawn as this.
_LEAST = 0.01
_Lines = Mapping[str, Sequence[tuple[float, float]]]


def draw(
    path: Path, title: str, axis: str, panels: Mapping[str, _Lines], *, dashed: str, logarithmic: bool = False
) -> bool:
    """Draw waits as lines, side by side.

    Args:
        path: the file to write, .svg or .png.
        title: of the whole.
        axis: what the horizontal axis shows.
        panels: by title, the lines of each panel by name, as points (x, wait in mean service times).
        dashed: the name of the line that others are compared with.
        logarithmic: the horizontal axis is, too.

    Returns:
        Whether it was drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    # Text stays text, and the same figures make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tokenmq", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), sharey=True, squeeze=False)
    for panel, (heading, lines) in zip(axes[0], panels.items(), strict=True):
        _fill(panel, lines, dashed)
        panel.set(title=heading, xlabel=axis, yscale="log", xscale="log" if logarithmic else "linear")
        if logarithmic:
            ticks = [x for x, _ in next(iter(lines.values()))]
            panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
        panel.minorticks_off()
        panel.grid(visible=True, linewidth=0.3)
    axes[0][0].set_ylabel(f"mean service times ({_LEAST:g}: that or less)")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True


def _fill(panel: Any, lines: _Lines, dashed: str) -> None:
    for name, points in lines.items():
        xs, waits = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2}
        if name == dashed:  # above the others, since the best of them are equal to it
            style = {"color": "black", "linestyle": "--", "linewidth": 1.6, "zorder": 5}
        panel.plot(xs, [max(wait, _LEAST) for wait in waits], label=name, **style)
