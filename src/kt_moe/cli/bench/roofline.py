"""The roofline picture (Williams, Waterman and Patterson 2009): rates over FLOP a byte, under ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kt_moe.cli.bench.report import Result
from kt_moe.files import save_png

_MARKS = {"forward": "^", "backward": "v"}


def plot_roofline(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw forward and backward of every result into a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    points = [
        (result, name, result.case.flops()[name] / result.case.bytes(result.touched)[name])
        for result in results
        for name in _MARKS
        if name in result.seconds
    ]
    left, right = min(x for _, _, x in points) / 2, max(x for _, _, x in points) * 2
    roofs = [result.ceilings for result in results]
    corners = [roof.l2_all.median / roof.read_all.median for roof in roofs]
    left = min(left, *(corner / 2 for corner in corners))  # so that memory's slope shows
    _draw_ceilings(axes, results, left, right)
    names = list(dict.fromkeys(_label(result, results) for result in results))
    for result, name, x in points:
        label = _label(result, results)
        rate = result.figures(name)["flops_per_second"] / 1e12
        axes.plot(x, rate, _MARKS[name], color=f"C{names.index(label) + 1}", markersize=6, alpha=0.8)
        axes.annotate(f" {result.case.tokens}", (x, rate), fontsize=6, va="center")
    for index, label in enumerate(names):
        axes.plot([], [], "s", color=f"C{index + 1}", label=label)
    for name, mark in _MARKS.items():
        axes.plot([], [], mark, color="grey", label=f"{name}; the number is tokens")
    axes.set(xlabel="FLOP a byte that must move", ylabel="TFLOP/s", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save_png(figure, path)


def _draw_ceilings(axes: object, results: Sequence[Result], left: float, right: float) -> None:
    """Roofs of every runtime that took part: memory's slope, then the peaks on registers and from L2."""
    for index, ceilings in enumerate(dict.fromkeys(result.ceilings for result in results)):
        for style, peak, text in (
            ("-", ceilings.registers_all, "on registers"),
            ("--", ceilings.l2_all, "with A from L2"),
        ):
            corner = min(max(peak.median / ceilings.read_all.median, left), right)
            slope = left * ceilings.read_all.median / 1e12
            label = f"peak {text}, memory read" if index == 0 else None
            axes.plot(  # type: ignore[attr-defined]
                [left, corner, right],
                [slope, min(corner * ceilings.read_all.median, peak.median) / 1e12, peak.median / 1e12],
                style,
                color="C0",
                linewidth=1,
                label=label,
            )


def _label(result: Result, results: Sequence[Result]) -> str:
    """The contestant, with what else differs among the results."""
    parts = [result.who]
    if len({r.case.rank for r in results}) > 1:
        parts.append(f"rank {result.case.rank}")
    if len({r.isa for r in results}) > 1:
        parts.append(result.isa)
    if len({r.threads for r in results}) > 1:
        parts.append(f"{result.threads} threads")
    return ", ".join(parts)
