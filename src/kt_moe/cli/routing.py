"""How often experts are chosen while a run trains, for `--report`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kt_moe.cli.output import ROUTING
from kt_moe.routing_stats import RoutingHistory

_ROWS = 100  # of a run, about


class RoutingWatch(TrainerCallback):  # type: ignore[misc]
    """Counts the routes of training steps, not those of evaluation; its history goes into checkpoints.

    checkpoint: the one that a run resumes from, with its history.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.history: RoutingHistory | None = None
        # A checkpoint may have none: the process may have ended between the two.
        if checkpoint is not None and (file := checkpoint / ROUTING).exists():
            self.history = RoutingHistory.load(file)

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
