"""What `kt-moe finetune` keeps of the routing: a history while it trains, a file and a heat map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kt_moe.cli.errors import UserError
from kt_moe.cli.output import ROUTING
from kt_moe.models import model_experts
from kt_moe.routing_stats import Balance, RoutingHistory

_ROWS = 100  # of a run, about


class RoutingWatch(TrainerCallback):  # type: ignore[misc]
    """Counts the routes of training steps, not those of evaluation; its history goes into checkpoints.

    checkpoint: the one that a run resumes from, with its history.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.history: RoutingHistory | None = None
        if checkpoint is not None:
            self.history = load_history(checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.history is None:
            self.history = RoutingHistory(math.ceil(state.max_steps / _ROWS))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        assert self.history is not None
        self.history.begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        assert self.history is not None
        self.history.end(model, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.history is not None
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.history.save(folder / ROUTING)


def load_history(checkpoint: Path) -> RoutingHistory | None:
    """That of a checkpoint; None if it has none: the process may have ended between the two."""
    file = checkpoint / ROUTING
    return RoutingHistory.load(file) if file.exists() else None


def read_popularity(file: Path) -> dict[str, Tensor]:
    """Routes of each expert in an earlier run, [E] by layer.

    Raises:
        UserError: no such file, or no routing history.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"--popularity {file} is no ordinary file")
    try:
        return RoutingHistory.load(file).total()
    except (OSError, ValueError) as error:
        raise UserError(f"--popularity {file}: {error}") from error


def share_out(model: Any, popularity: dict[str, Tensor]) -> None:
    """Give a model's experts homes by what `read_popularity` read.

    Raises:
        UserError: it is of another model.
    """
    layers = model_experts(model)
    wanted = {name: experts.num_experts for name, experts in layers.items()}
    if wanted != {name: len(counts) for name, counts in popularity.items()}:
        raise UserError("--popularity is of another model: its layers or their experts differ")
    for name, experts in layers.items():
        experts.rebalance(popularity[name])


def balances(history: RoutingHistory) -> dict[str, Balance]:
    """Of all steps together, by layer."""
    return {name: Balance.of(counts) for name, counts in history.total().items()}


def routing_line(found: dict[str, Balance]) -> str:
    """For people: the least even layer, and idle experts."""
    name, worst = max(found.items(), key=lambda item: item[1].imbalance)
    idle = sum(balance.idle for balance in found.values())
    return f"busiest expert {worst.imbalance:.1f} times the mean ({name}), {idle} never chosen"
