"""Loss curves of runs as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kt_moe.files import save_png

Curves = dict[str, list[tuple[int, float]]]  # (step, loss) by name


def losses_of(log: list[dict[str, Any]]) -> Curves:
    """Losses in nats a token from `trainer.state.log_history`: "train" and "held_out"."""
    keys = {"train": "loss", "held_out": "eval_loss"}
    return {
        name: [(entry["step"], entry[key]) for entry in log if key in entry] for name, key in keys.items()
    }


def plot_losses(runs: Mapping[str, Curves], path: Path, title: str) -> None:
    """Draw training loss (pale) and held-out loss of each run into a PNG.

    runs: a name for the legend, "" for none, and its losses.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (run, curves) in enumerate(runs.items()):
        # Of two curves that agree, the later one lies inside the earlier one.
        look: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.5 * (len(runs) - index)}
        for name, more in (("train", {"alpha": 0.4}), ("held_out", {"marker": "o"})):
            steps, losses = ([point[at] for point in curves[name]] for at in (0, 1))
            axes.plot(steps, losses, **look, **more, label=f"{run} {name}".strip().replace("_", " "))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)
