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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kt_moe.adapter_files import scratch
from kt_moe.cli.terminal import UserError
from kt_moe.files import replacing

ROUTING = "routing.safetensors"  # also in a checkpoint


class RunDirectory:
    """One run's files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = root / "adapter_model.safetensors"
        self.curve, self.metrics = root / "loss.png", root / "metrics.json"
        self.routing, self.heat_map = root / ROUTING, root / "routing.png"
        self._run = root / "run.json"

    def check_free(self) -> None:
        """Refuse early, before anything slow, to write over another run.

        Raises:
            UserError: an adapter or a run is in the way.
        """
        if self.adapter.exists() or self._run.exists():
            raise UserError(
                f"{self.root} has a run already: pass --resume to go on with it, --overwrite to start anew, "
                "or another --output_dir"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within `with`: no other run uses the directory, which is made. The lock ends with the process.

        Raises:
            UserError: another run does.
            OSError: the directory cannot be made or written to.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / ".run.lock"
        try:
            lock = FileLock(file).acquire(blocking=False)
        except Timeout:
            raise UserError(f"another run is writing to --output_dir {self.root}") from None
        with lock:
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
                with suppress(OSError):  # files are in it
                    self.root.rmdir()

    def start(self, record: dict[str, Any]) -> None:
        """Make the directory ready for a new run; an older adapter stays until the new one replaces it."""
        if self._run.exists():  # so the checkpoints are ours to delete
            for folder in self.root.glob("checkpoint-*"):
                shutil.rmtree(folder)
        for file in (self.metrics, self.curve, self.heat_map, self.routing):
            file.unlink(missing_ok=True)
        write_json(self._run, record)

    def resume(self, wanted: str, record: dict[str, Any]) -> Path:
        """The checkpoint to go on from.

        wanted: a checkpoint's directory, or "last": the newest complete one.

        Raises:
            UserError: there is none, or an option differs from the run's; names it.
        """
        checkpoint = self.last_checkpoint() if str(wanted).lower() in ("last", "true") else Path(wanted)
        before = _read_json(self._run)
        if checkpoint is None or before is None or _read_json(checkpoint / "trainer_state.json") is None:
            raise UserError(f"--resume_from_checkpoint: no complete checkpoint in {checkpoint or self.root}")
        for name, value in json.loads(json.dumps(record, default=str)).items():
            if (was := before.get(name)) != value:
                said = f"{name} was {was!r} when the run began, now it is {value!r}"
                raise UserError(f"--resume_from_checkpoint: {said}")
        return checkpoint

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: the trainer writes trainer_state.json last."""
        states = ((path, _read_json(path)) for path in self.root.glob("checkpoint-*/trainer_state.json"))
        complete = [(state["global_step"], path.parent) for path, state in states if state is not None]
        return max(complete)[1] if complete else None

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
