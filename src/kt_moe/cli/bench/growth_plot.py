"""The picture of growth: a log-log panel for each thing that was varied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kt_moe.cli.bench.growth import Point
from kt_moe.files import save_png

_PASSES = (("forward", "C0", "^"), ("backward", "C1", "v"))
_LABELS = {"tokens": "tokens", "experts": "experts", "rank": "LoRA rank", "threads": "threads"}
# How time should go where it is a straight line, and through which point the line is drawn: the last, where
# fixed costs count least, or the first. Time over rank is a constant and a proportional part: no such line.
_IDEALS = {"tokens": (1, -1), "experts": (0, 0), "threads": (-1, 0)}


def plot_growth(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw forward and backward of every point into a PNG, a panel an axis."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    names = list(dict.fromkeys(point.axis for point in points))
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(6 * columns, 4.2 * lines), dpi=120, layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw_panel(axes, name, [point for point in points if point.axis == name])
        if index == 0:
            axes.legend(fontsize=8)
    figure.suptitle(title if columns > 1 else title.replace("; ", ";\n"), fontsize=10)
    save_png(figure, path)


def _draw_panel(axes: Any, name: str, points: Sequence[Point]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = [point for point in points if point.value > 0]  # rank 0 has no place on a log axis
    for which, color, mark in _PASSES:
        xs = [point.value for point in shown]
        spreads = [point.result.seconds[which] for point in shown]
        times = [spread.median * 1e3 for spread in spreads]
        axes.plot(xs, times, f"{mark}-", color=color, markersize=5, linewidth=1.2, label=which)
        axes.fill_between(
            xs, [s.q1 * 1e3 for s in spreads], [s.q3 * 1e3 for s in spreads], color=color, alpha=0.2
        )
        least = [point.result.least_seconds(which) * 1e3 for point in shown]
        axes.plot(xs, least, "--", color=color, linewidth=0.8, label=f"{which}, least by the ceilings")
        if name in _IDEALS and xs:
            power, anchor = _IDEALS[name]
            ideal = [times[anchor] * (x / xs[anchor]) ** power for x in xs]
            axes.plot(
                xs, ideal, ":", color="grey", linewidth=1, label="straight" if which == "backward" else None
            )
        for point in points:
            if point.value == 0:
                level = point.result.seconds[which].median * 1e3
                axes.axhline(level, linestyle="-.", color=color, linewidth=0.8)
                axes.annotate(
                    f"{which}, rank 0",
                    (0.01 if which == "forward" else 0.99, level),
                    xycoords=("axes fraction", "data"),
                    fontsize=7,
                    ha="left" if which == "forward" else "right",
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    measured = [line.get_ydata() for line in axes.lines if line.get_linestyle() != ":"]
    axes.set_ylim(0.7 * min(map(min, measured)), 1.4 * max(map(max, measured)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    values = [point.value for point in shown]
    axes.set_xticks(values, [str(value) for value in values], fontsize=8 if len(values) < 10 else 6)
    axes.set(xlabel=_LABELS[name], ylabel="ms")
    axes.grid(alpha=0.3, which="both")
