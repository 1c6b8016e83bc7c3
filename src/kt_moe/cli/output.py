"""The output directory of a run: what may be written there, where a run resumes, files that appear whole.

adapter_model.safetensors, adapter_config.json   written last: their presence means the run is complete
loss.png, metrics.json                           loss curve; losses, speed and memory as numbers
routing.png, routing.safetensors                 how often experts were chosen: all in all, and over the run
run.json                                         the settings, so that a resumed run is the same run
checkpoints/checkpoint-N/                        the trainer's own, for resuming
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from kt_moe.cli.errors import UserError
from kt_moe.files import replacing

ROUTING = "routing.safetensors"  # also in a checkpoint
_OURS = ("run.json", "metrics.json", "loss.png", "routing.png", ROUTING)


class RunDirectory:
    """One run's files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.adapter = root / "adapter_model.safetensors"
        self.curve = root / "loss.png"
        self.metrics = root / "metrics.json"
        self.routing, self.heat_map = root / ROUTING, root / "routing.png"
        self._run = root / "run.json"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse early what `start` and `resume` would refuse, before anything slow.

        Raises:
            UserError: an adapter or a run is in the way, there is nothing to resume, or root is a file.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--output {self.root} is a file, wanted a directory")
        nearest = next(p for p in (self.root, *self.root.absolute().parents) if p.exists())
        if not os.access(nearest, os.W_OK):
            raise UserError(f"--output {self.root}: no permission to write in {nearest}")
        if resume:
            if self.last_checkpoint() is None:
                raise UserError(f"--resume: no complete checkpoint in {self.checkpoints}")
            return
        if overwrite:
            return
        if self.adapter.exists():
            raise UserError(
                f"{self.root} already has an adapter; pass another --output, --overwrite to start anew, "
                "or --resume to finish an interrupted run"
            )
        if self._run.exists():
            raise UserError(
                f"{self.root} holds an unfinished run; pass --resume to go on with it, or --overwrite"
            )

    def start(self, record: dict[str, Any]) -> None:
        """Make the directory ready for a new run; an older adapter stays until the new one replaces it."""
        self.root.mkdir(parents=True, exist_ok=True)
        if self._run.exists():  # so the checkpoints are ours to delete
            for folder in self.checkpoints.glob("checkpoint-*"):
                shutil.rmtree(folder)
        for name in _OURS:
            (self.root / name).unlink(missing_ok=True)
        write_json(self._run, record)

    def resume(self, record: dict[str, Any]) -> Path:
        """The checkpoint to go on from.

        Raises:
            UserError: a setting differs from the run's; names it.
        """
        try:
            before = json.loads(self._run.read_text())
        except (OSError, ValueError):
            raise UserError(f"--resume: {self._run} is missing or damaged") from None
        for name, value in record.items():
            if before.get(name) != value:
                raise UserError(
                    f"--resume: {name} was {before.get(name)!r} when the run began, now it is {value!r}"
                )
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            raise UserError(f"--resume: no complete checkpoint in {self.checkpoints}")
        return checkpoint

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: the trainer writes trainer_state.json last."""
        found = [(path.name.rpartition("-")[2], path) for path in self.checkpoints.glob("checkpoint-*")]
        complete = [(int(n), p) for n, p in found if n.isdecimal() and _is_json(p / "trainer_state.json")]
        return max(complete)[1] if complete else None


def finished_log(checkpoint: Path) -> list[dict[str, Any]] | None:
    """The trainer's log if the checkpoint is a run's last step, else None."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    log: list[dict[str, Any]] = state["log_history"]
    return log if state["global_step"] >= state["max_steps"] else None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; the file appears whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
