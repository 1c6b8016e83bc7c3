"""Loss curves of runs as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
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
    """Draw training loss (pale: every step, strong: running mean) and held-out loss of each run into a PNG.

    runs: a name for the legend, "" for none, and its losses.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, curves) in enumerate(runs.items()):
        prefix = f"{name}: " if name else ""
        # Of two curves that agree, the later one lies inside the earlier one.
        look: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.5 * (len(runs) - index)}
        steps, losses = ([point[at] for point in curves["train"]] for at in (0, 1))
        window = max(1, len(losses) // 20)
        means = [fmean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]
        axes.plot(steps, losses, **look, alpha=0.25)
        axes.plot(steps, means, **look, label=f"{prefix}training, mean of {window}")
        if held_out := curves["held_out"]:
            axes.plot(
                *zip(*held_out, strict=True), **look, marker="o", linestyle="--", label=f"{prefix}held-out"
            )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)
