"""The picture of a trace: a lane for each thread, shards one below the other, stages as colours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kt_moe.cli.trace import Lane, Trace, TraceSpan, Window, innermost
from kt_moe.files import save_png

_WIDTH, _LANE, _REST, _TALLEST = 14, 0.28, 2.0, 60.0  # inches: of the picture, a lane, all else, at most
_DPI, _COLUMNS = 120, 3000
# Products are strong colours; moving data is pale; not working is grey. What is not here gets the spare ones.
_COLORS = {
    "gate_up": "#1f77b4", "activation": "#17becf", "down": "#2ca02c",
    "combine": "#bcbd22", "reduce": "#e7cb94",
    "grad_down": "#d62728", "grad_activation": "#ff7f0e", "grad_hidden": "#9467bd", "lora_grad": "#8c564b",
    "lora_p": "#e377c2", "lora_q": "#ad3f8a", "dispatch": "#9edae5", "pack_h": "#c7e9c0",
    "pack_grad": "#ffbb78", "pack": "#aec7e8", "decode": "#ff9896",
    "grad_topk_weights": "#7f5f00", "zero_grad": "#dbdb8d",
    "route": "#393b79", "setup": "#9c9ede", "fetch": "#843c39", "wait": "#bdbdbd", "idle": "#eeeeee",
    "copy_experts": "#3182bd", "forward_chunk": "#31a354", "backward_chunk": "#e6550d", "copy_in": "#6baed6",
    "copy_out": "#9ecae1", "copy_lora": "#bcbddc", "cpu_forward": "#74c476", "cpu_backward": "#fd8d3c",
    "forward": "#a1d99b", "backward": "#fdae6b", "wait_rows": "#cccccc", "wait_routes": "#b0b0b0",
    "wait_cpu": "#969696", "stage_expert": "#8c6d31", "lock_pages": "#ad494a",
}  # fmt: skip
_SPARE = ("#5254a3", "#637939", "#8c6d31", "#ad494a", "#7b4173", "#3182bd", "#e6550d", "#31a354")


def plot_trace(trace: Trace, window: Window, path: Path, title: str) -> None:
    """Draw what of the trace lies in the window into a PNG. There must be something."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    lanes = sorted({span.lane for span in trace.spans})
    colors = stage_colors(span.stage for span in trace.spans)
    height = min(_REST + _LANE * len(lanes), _TALLEST)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    _draw_spans(
        axes, raster(trace.spans, lanes, list(colors), window, _COLUMNS), window, list(colors.values())
    )
    _draw_calls(axes, trace, window)
    _name_lanes(axes, trace, lanes)
    axes.set_xlabel("ms from the trace's beginning")
    axes.set_title(_plain(title), fontsize=10, loc="left", pad=18)
    _draw_legend(figure, colors)
    save_png(figure, path)


def raster(
    spans: Iterable[TraceSpan], lanes: Sequence[Lane], stages: Sequence[str], window: Window, columns: int
) -> NDArray[np.int64]:
    """[lanes, columns]: which stage, of those innermost, took most of a column's time; -1: none."""
    by_lane: dict[Lane, list[TraceSpan]] = {lane: [] for lane in lanes}
    for span in spans:
        by_lane[span.lane].append(span)
    number = {stage: i for i, stage in enumerate(stages)}
    width = (window.end - window.begin) / columns
    result = np.full((len(lanes), columns), -1)
    for row, of_lane in enumerate(by_lane.values()):
        time = np.zeros((len(stages), columns))
        for stage, begin, end in innermost(of_lane):
            first, last = (
                (min(max(t, window.begin), window.end) - window.begin) / width for t in (begin, end)
            )
            left, right = min(int(first), columns - 1), min(int(last), columns - 1)
            of_stage = time[number[stage]]
            of_stage[left:right] += 1.0
            of_stage[left] -= first - left
            of_stage[right] += last - right
        most = time.argmax(axis=0)
        result[row] = np.where(time.max(axis=0) > 1.0 - time.sum(axis=0), most, -1)
    return result


def stage_colors(stages: Iterable[str]) -> dict[str, str]:
    """A colour for every stage, known ones in their usual order."""
    there = dict.fromkeys(stages)
    colors = {stage: color for stage, color in _COLORS.items() if stage in there}
    unknown = sorted(there.keys() - _COLORS.keys())
    return colors | {stage: _SPARE[i % len(_SPARE)] for i, stage in enumerate(unknown)}


def _draw_spans(axes: Any, stages: NDArray[np.int64], window: Window, colors: Sequence[str]) -> None:
    from matplotlib.colors import to_rgb

    palette = np.array([*(to_rgb(color) for color in colors), to_rgb("white")])  # the last one is number -1
    extent = (window.begin / 1e3, window.end / 1e3, len(stages) - 0.5, -0.5)
    axes.imshow(palette[stages], extent=extent, aspect="auto", interpolation="nearest")
    for row in range(1, len(stages)):
        axes.axhline(row - 0.5, color="white", linewidth=2)


def _draw_calls(axes: Any, trace: Trace, window: Window) -> None:
    shown = sorted(trace.calls.items())
    for number, call in shown:
        left, right = call.begin / 1e3, call.end / 1e3
        if left > window.begin / 1e3:
            axes.axvline(left, color="black", linewidth=0.6, zorder=10)
        if len(shown) <= 16:
            axes.annotate(
                f"{_plain(call.name)} {number}",
                (max(left, window.begin / 1e3), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, 3),
                textcoords="offset points",
                fontsize=7,
                annotation_clip=right > window.begin / 1e3,
            )


def _name_lanes(axes: Any, trace: Trace, lanes: Sequence[Lane]) -> None:
    names = []
    for process, thread in lanes:
        of_process = trace.processes.get(process, f"process {process}")
        of_thread = trace.threads.get((process, thread), f"thread {thread}")
        names.append(_plain(f"{of_process}, {of_thread}"))
    axes.set_yticks(range(len(lanes)), names, fontsize=7)
    for row in range(1, len(lanes)):
        if lanes[row][0] != lanes[row - 1][0]:
            axes.axhline(row - 0.5, color="black", linewidth=0.8, zorder=10)


def _draw_legend(figure: Any, colors: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, label=_plain(stage)) for stage, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=11, fontsize=7, frameon=False)


def _plain(text: str) -> str:
    text = os.fsencode(text).decode(errors="replace")  # names of files need not be UTF-8
    return text.replace("$", r"\$")  # matplotlib would set it as a formula, or fail to
