"""How often each expert is chosen: counts of a model, over a training run, as numbers and as a picture.

Every forward pass of a layer adds its routes to `Experts.routed`. Gradient checkpointing runs forward twice
and so counts twice, in all layers alike: shares stay what they are.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kt_moe.files import replacing
from kt_moe.hf.experts import dims_of, division_of
from kt_moe.models import expert_modules

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_STEPS, _EVERY = "steps", "every"
_MOST = 2.0**62  # routes of an expert, so that sums stay in int64

StrPath = str | os.PathLike[str]


def routing_counts(model: nn.Module) -> dict[str, Tensor]:
    """Routes of each expert so far, int64 [E], by the name of the module that has the experts.

    The names are those of `model_experts`. Zeros where experts are not loaded yet, and for those of other
    ranks (`expert_parallel="global"`), while the routes of a rank's own are those of all ranks' tokens.
    """
    found = {}
    for name, module, experts in expert_modules(model):
        division = division_of(module)
        if experts is not None and division is None:
            found[name] = experts.routed
            continue
        found[name] = torch.zeros(dims_of(module)[0], dtype=torch.int64)
        if experts is not None and division is not None:
            found[name][division.part.start : division.part.stop] = experts.routed
    return found


@dataclass(frozen=True)
class Balance:
    """How evenly a layer's routes are spread over its experts.

    Attributes:
        imbalance: routes of the busiest expert over the mean; 1 is even. NaN without routes, as `entropy` is.
        entropy: of the experts' shares, over that of even ones: 1 is even, 0 is one expert alone.
        idle: experts without a route.
    """

    imbalance: float
    entropy: float
    idle: int

    @classmethod
    def of(cls, counts: Tensor) -> Balance:
        """From the routes of each expert, [E]."""
        total, experts = int(counts.sum()), len(counts)
        idle = int((counts == 0).sum())
        if total == 0:
            return cls(math.nan, math.nan, idle)
        shares = counts.double() / total
        entropy = float(torch.special.entr(shares).sum())
        return cls(float(shares.max()) * experts, entropy / math.log(experts) if experts > 1 else 1.0, idle)


class RoutingHistory:
    """Routes of each expert over the steps of a run.

    Between `begin` and `end` the routes of all forward passes count, those outside (an evaluation, a sample
    of text) do not.

    Args:
        every: steps that one row adds up.

    Attributes:
        steps: the last step of each row.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, wanted at least 1")
        self.every, self.steps = every, list[int]()
        self._rows: dict[str, list[Tensor]] = {}
        self._before: dict[str, Tensor] | None = None

    @property
    def counts(self) -> dict[str, Tensor]:
        """Routes of each row, int64 [rows, E], by the names of `routing_counts`."""
        return {name: torch.stack(rows) for name, rows in self._rows.items()}

    def total(self) -> dict[str, Tensor]:
        """Routes of all rows together, int64 [E]."""
        return {name: rows.sum(0) for name, rows in self.counts.items()}

    def begin(self, model: nn.Module) -> None:
        """Forget what was routed since the last `end`."""
        self._before = routing_counts(model)

    def end(self, model: nn.Module, step: int) -> None:
        """Add what was routed since `begin` to the row of `step`.

        Raises:
            RuntimeError: without a `begin`.
            ValueError: the model has other layers than before.
        """
        if self._before is None:
            raise RuntimeError("RoutingHistory.end without begin")
        before, now = self._before, routing_counts(model)
        if self.steps and now.keys() != self._rows.keys():
            raise ValueError(f"the model has experts at {sorted(now)}, the history at {sorted(self._rows)}")
        going_on = bool(self.steps) and self.steps[-1] % self.every != 0
        for name, counts in now.items():
            rows, earlier = self._rows.setdefault(name, []), before.get(name)
            if earlier is not None and bool((counts >= earlier).all()):  # else counted from zero again
                counts = counts - earlier
            if going_on:
                rows[-1] = rows[-1] + counts
            else:
                rows.append(counts)
        if going_on:
            self.steps[-1] = step
        else:
            self.steps.append(step)
        self._before = None

    def save(self, path: StrPath) -> None:
        """Write a safetensors file, whole or not at all: "steps" [rows], and [rows, E] by name, all int64."""
        tensors = {_STEPS: torch.tensor(self.steps, dtype=torch.int64), **self.counts}
        with replacing(Path(path)) as part:
            safetensors.torch.save_file(tensors, part, metadata={_EVERY: str(self.every)})
            part.chmod(0o644)  # safetensors makes files that only their owner reads

    @classmethod
    def load(cls, path: StrPath) -> RoutingHistory:
        """Read what `save` wrote; `begin` and `end` go on with it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file that `save` wrote.
        """
        try:
            with safe_open(path, "pt") as file:
                every = (file.metadata() or {}).get(_EVERY, "")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: no routing history: {error}") from error
        steps = tensors.pop(_STEPS, torch.zeros(0))
        if not every.isdecimal() or not _are_counts(steps, tensors.values()):
            raise ValueError(f"{path}: no routing history")
        history = cls(int(every))
        history.steps = steps.tolist()
        history._rows = {name: list(t) for name, t in tensors.items()}
        return history


def _are_counts(steps: Tensor, rows: Iterable[Tensor]) -> bool:
    """Whether they are as `RoutingHistory.save` describes."""
    return (steps.dtype, steps.dim()) == (torch.int64, 1) and all(
        (t.dtype, t.dim()) == (torch.int64, 2)
        and 0 < len(t) == len(steps)
        and bool((t >= 0).all())
        and bool((t.double().sum(0) < _MOST).all())
        for t in rows
    )


def plot_routing(counts: Mapping[str, Tensor], path: StrPath, title: str = "") -> None:
    """Draw a heat map into a PNG: layers x experts, routes over an equal share of the layer's.

    counts: [E] by module name, as `routing_counts` or `RoutingHistory.total` give them.

    Raises:
        ValueError: no layers.
    """
    from kt_moe.files import save_png

    save_png(routing_figure(counts, title), Path(path))


def routing_figure(counts: Mapping[str, Tensor], title: str = "") -> Any:
    """The matplotlib figure of `plot_routing`. White is an equal share, red more, blue less."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    if not counts:
        raise ValueError("counts has no layers, wanted one at least")
    shares = torch.full((len(counts), max(map(len, counts.values()))), math.nan)
    for row, of_layer in zip(shares, counts.values(), strict=True):
        row[: len(of_layer)] = of_layer / of_layer.double().mean()  # NaN, and so no colour, without routes
    labels = [_label(name) for name in counts]
    most = max(2.0, float(shares.nan_to_num().max()))

    figure = Figure(figsize=(9, 1.8 + min(12.0, max(1.5, 0.12 * len(counts)))), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
    image = axes.imshow(shares.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=norm)
    every = math.ceil(len(labels) / 32)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=8)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    figure.colorbar(image, ax=axes, label="routes over an equal share")
    return figure


def _label(name: str) -> str:
    """The layer's number, or where the name has none, the name."""
    found = _LAYER.search(name)
    return found[1] if found else name
