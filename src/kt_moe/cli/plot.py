"""Pictures as PNG; loss curves, taken from a trainer's log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kt_moe.files import save_png

Curve = list[tuple[int, float]]  # (step, loss)


@dataclass(frozen=True)
class History:
    """Losses by step, in nats a token: of the training batches, of the held-out rows (step 0: untrained)."""

    train: Curve
    held_out: Curve

    @classmethod
    def from_log(cls, log: list[dict[str, Any]]) -> History:
        """From `trainer.state.log_history`."""

        def curve(key: str) -> Curve:
            return [(entry["step"], entry[key]) for entry in log if key in entry]

        return cls(curve("loss"), curve("eval_loss"))

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def smooth(curve: Curve, window: int) -> Curve:
    """Mean of each point and the up to window - 1 points before it."""
    means = []
    for end in range(1, len(curve) + 1):
        recent = curve[max(0, end - window) : end]
        means.append((curve[end - 1][0], sum(loss for _, loss in recent) / len(recent)))
    return means


def plot_losses(runs: Mapping[str, History], path: Path, title: str) -> None:
    """Draw training loss (pale: every step, strong: running mean) and held-out loss of each run into a PNG.

    runs: a name for the legend, "" for none, and its losses.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, history) in enumerate(runs.items()):
        color, prefix = f"C{index}", f"{name}: " if name else ""
        width = 1.5 * (
            len(runs) - index
        )  # of two curves that agree, the later one lies inside the earlier one
        window = max(1, len(history.train) // 20)
        label = f"{prefix}training, mean of {window}"
        axes.plot(*_xy(history.train), color=color, alpha=0.25, linewidth=0.5 * width)
        axes.plot(*_xy(smooth(history.train, window)), color=color, linewidth=width, label=label)
        if history.held_out:
            look: dict[str, Any] = {
                "marker": "o",
                "markersize": 2 + 2 * width,
                "linestyle": "--",
                "linewidth": width,
            }
            axes.plot(*_xy(history.held_out), color=color, label=f"{prefix}held-out", **look)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]
