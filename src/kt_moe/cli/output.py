"""The output directory of a run: what may be written there, where a run resumes, files that appear whole.

adapter_model.safetensors, adapter_config.json   written last: their presence means the run is complete
run.json                                         the options, so that a resumed run is the same run
checkpoint-N/                                    the trainer's own, for resuming
loss.png, metrics.json, routing.*                of --report
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kt_moe.adapter_files import scratch
from kt_moe.cli.errors import UserError
from kt_moe.files import replacing

ROUTING = "routing.safetensors"  # also in a checkpoint
_OURS = ("run.json", "metrics.json", "loss.png", "routing.png", ROUTING)


class RunDirectory:
    """One run's files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = root / "adapter_model.safetensors"
        self.curve, self.metrics = root / "loss.png", root / "metrics.json"
        self.routing, self.heat_map = root / ROUTING, root / "routing.png"
        self._run = root / "run.json"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse early, before anything slow, what `start` and `resume` would refuse.

        Raises:
            UserError: an adapter or a run is in the way, there is nothing to resume, or root is a file.
        """
        if resume and overwrite:
            raise UserError("--resume_from_checkpoint and --overwrite exclude each other")
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--output_dir {self.root} is a file, wanted a directory")
        nearest = next(p for p in (self.root, *self.root.absolute().parents) if p.exists())
        if not os.access(nearest, os.W_OK):
            raise UserError(f"--output_dir {self.root}: no permission to write in {nearest}")
        if resume or overwrite:
            return
        for file, what in ((self.adapter, "already has an adapter"), (self._run, "holds an unfinished run")):
            if file.exists():
                raise UserError(
                    f"{self.root} {what}: pass --resume_from_checkpoint last to go on with its run, "
                    "--overwrite to start anew, or another --output_dir"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within `with`: no other run uses the directory, which is made. The lock ends with the process.

        Raises:
            UserError: another run does.
        """
        made = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / ".run.lock"
        lock: AbstractContextManager[Any]
        try:
            lock = FileLock(file).acquire(blocking=False)
        except Timeout:
            raise UserError(f"another run is writing to --output_dir {self.root}") from None
        except OSError:  # a file system without locks
            lock = nullcontext()
        with lock:
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
                if made and not any(self.root.iterdir()):
                    self.root.rmdir()

    def start(self, record: dict[str, Any]) -> None:
        """Make the directory ready for a new run; an older adapter stays until the new one replaces it."""
        if self._run.exists():  # so the checkpoints are ours to delete
            for folder in self.root.glob("checkpoint-*"):
                shutil.rmtree(folder)
        for name in _OURS:
            (self.root / name).unlink(missing_ok=True)
        write_json(self._run, record)

    def resume(self, wanted: str, record: dict[str, Any]) -> Path:
        """The checkpoint to go on from.

        wanted: a checkpoint's directory, or "last": the newest complete one.

        Raises:
            UserError: there is none, or an option differs from the run's; names it.
        """
        checkpoint = self.last_checkpoint() if wanted == "last" else Path(wanted)
        if checkpoint is None or _read_json(checkpoint / "trainer_state.json") is None:
            raise UserError(f"--resume_from_checkpoint: no complete checkpoint in {checkpoint or self.root}")
        if (before := _read_json(self._run)) is None:
            raise UserError(f"--resume_from_checkpoint: {self._run} is missing or damaged")
        for name, value in json.loads(json.dumps(record, default=str)).items():
            if (was := before.get(name)) != value:
                said = f"{name} was {was!r} when the run began, now it is {value!r}"
                raise UserError(f"--resume_from_checkpoint: {said}")
        return checkpoint

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: the trainer writes trainer_state.json last."""
        numbered = [(path, path.name.removeprefix("checkpoint-")) for path in self.root.glob("checkpoint-*")]
        complete = {
            int(number): path
            for path, number in numbered
            if number.isdecimal() and _read_json(path / "trainer_state.json") is not None
        }
        return complete[max(complete)] if complete else None

    @contextmanager
    def whole(self) -> Iterator[Path]:
        """Within `with`: a directory whose files then come here, the adapter's weights last."""
        with scratch(self.root, "run") as folder:
            yield folder
            files = sorted(folder.iterdir(), key=lambda file: file.name == self.adapter.name)
            for file in files:
                file.chmod(0o644)  # safetensors lets only the owner read, but servers run as others
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            for file in files:
                file.replace(self.root / file.name)


def finished(checkpoint: Path) -> bool:
    """Whether a checkpoint is a run's last step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; the file appears whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, default=str) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found
