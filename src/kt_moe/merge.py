"""An adapter merged into a checkpoint: W + s B A, shard by shard, and what was written checked."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kt_moe.adapter_files import save_tensors, scratch
from kt_moe.adapters import StrPath
from kt_moe.checkpoint import Checkpoint, check_path
from kt_moe.merge_changes import Change, Changes, Fused, changes_of
from kt_moe.requantise import Stored


@dataclass(frozen=True)
class Requantised:
    """What encoding merged matrices again in their quantised format left of them, all of a format together.

    Attributes:
        matrices: how many; each expert's counts.
        error: relative L2 error of what is stored against W + s B A.
        of_change: the same difference against s B A alone: 0 where all of the adapter arrived, 1 where
            nothing did, because what it adds is smaller than the steps of the format.
    """

    matrices: int
    error: float
    of_change: float


def merge_checkpoint(base: StrPath, adapter: StrPath, output: StrPath) -> dict[str, Requantised]:
    """Write the checkpoint W + s B A, shard by shard, and check what was written.

    The adapter is read as onto a model, by `load_adapter`'s rules: experts per expert or fused, shared
    experts, routers, modules_to_save.

    Args:
        base: directory of a safetensors checkpoint, experts one by one or fused. Weights are bf16, fp16 or
            fp32, or quantised as docs/adapters.md lists; quantised ones are decoded, changed, and encoded
            again by their format's rule, with scales as fine as they were.
        adapter: directory of an adapter of it.
        output: must not exist or be empty. It gets the shards and the other files of `base` (tokenizer ...),
            but no symbolic links that lead out of it.

    Returns:
        for each quantised format of a changed matrix ("fp8", "int8", "int4", "gptq", "gptq_v2",
        "awq", "mxfp4", "nvfp4") how much
        encoding it again took away; {} where all of them are floats.

    Raises:
        TypeError: a path is something else.
        FileNotFoundError: a directory without a checkpoint or adapter.
        ValueError: an adapter that is not plain LoRA on weights of this checkpoint, a checkpoint that is
            malformed or quantised in another way, or output is taken.
        OSError: what was read back is not what was to be written, or the disk is full; no output is left.
    """
    base, adapter = Path(check_path("base", base)), Path(check_path("adapter", adapter))
    output = Path(check_path("output", output))
    if not base.is_dir():
        raise FileNotFoundError(f"base is {base}, wanted the directory of a checkpoint")
    checkpoint = Checkpoint(base)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output is {output}, which exists already")
    changes = changes_of(base, adapter, checkpoint)
    output = output.resolve()  # a link leads to the result, and is not replaced
    output.parent.mkdir(parents=True, exist_ok=True)
    errors: dict[str, _Errors] = {}
    with ExitStack() as stack, scratch(output.parent, output.name) as new:
        merger = _Merger(checkpoint, changes, stack, errors)
        _copy_others(base, new, checkpoint)
        for shard in checkpoint.files:
            digests = _merge_shard(shard, new / shard.name, merger)
            _verify_shard(shard, new / shard.name, digests)
        new.chmod(0o755)
        os.replace(new, output)
    return {format: one.relative() for format, one in errors.items()}


merge_adapter = merge_checkpoint  # the older name


@dataclass
class _Errors:
    """Sums of squares."""

    matrices: int = 0
    difference: float = 0.0
    wanted: float = 0.0
    change: float = 0.0

    def relative(self) -> Requantised:
        error, of_change = (
            sqrt(self.difference / whole) if whole else 0.0 for whole in (self.wanted, self.change)
        )
        return Requantised(self.matrices, error, of_change)


class _Merger:
    """Gives the tensors of a checkpoint their new values; reads those that belong together from any shard."""

    def __init__(
        self, checkpoint: Checkpoint, changes: Changes, stack: ExitStack, errors: dict[str, _Errors]
    ) -> None:
        self._tensors, self._changes, self._stack, self._errors = checkpoint.tensors, changes, stack, errors
        self._files: dict[Path, Any] = {}
        self._noted: set[str] = set()  # matrices in the sums of errors: one in several shards is made in each

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint."""
        path = self._tensors[name].file
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, "pt"))
        return self._files[path].get_tensor(name)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self, name: str) -> dict[str, Tensor]:
        """The new value of a tensor, and of those that are quantised together with it."""
        owner = self._changes.owner.get(name)
        if owner is not None:
            return self._requantised(owner)
        weight = self.read(name)
        if name not in self._changes.of:
            return {name: weight}
        merged = self._changes.of[name].apply(weight)
        if not bool(torch.isfinite(merged).all()) and bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} merged is beyond what {weight.dtype} holds")
        return {name: merged}

    def _requantised(self, owner: str) -> dict[str, Tensor]:
        change, stored = self._changes.of[owner], self._changes.stored[owner]
        old = {role: self.read(name) for role, name in stored.names.items()}
        stored.check(old)
        errors = _Errors() if owner in self._noted else self._errors.setdefault(stored.format, _Errors())
        self._noted.add(owner)
        made = [_encoded(stored, one, change, e, errors) for e, one in _matrices(stored, old)]
        if len(stored.shape) == 2:
            return {stored.names[role]: tensor for role, tensor in made[0].items()}
        return {name: torch.stack([one[role] for one in made]) for role, name in stored.names.items()}


def _matrices(
    stored: Stored, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """The tensors of each matrix and its expert's number; None where there is one matrix."""
    if len(stored.shape) == 2:
        yield None, dict(tensors)
        return
    for e in range(stored.shape[0]):
        yield e, {role: tensor[e] for role, tensor in tensors.items()}


def _encoded(
    stored: Stored, old: dict[str, Tensor], change: Change, e: int | None, errors: _Errors
) -> dict[str, Tensor]:
    before = stored.decode(old)
    wanted = (
        change.of_expert(before, e) if isinstance(change, Fused) and e is not None else change.apply(before)
    )
    new = stored.encode(wanted, old)
    errors.matrices += 1
    errors.difference += float((stored.decode(new) - wanted).double().square().sum())
    errors.wanted += float(wanted.double().square().sum())
    errors.change += float((wanted - before).double().square().sum())
    return new


def _copy_others(base: Path, new: Path, checkpoint: Checkpoint) -> None:
    """The files beside the shards; of a symbolic link what it leads to, if that belongs to `base`."""
    root = base.resolve()
    # a snapshot in the hub's cache is made of links into the blobs beside it
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for file in base.iterdir():
        if not file.is_file() or file in checkpoint.files:
            continue
        if not any(file.resolve().is_relative_to(folder) for folder in allowed):
            warnings.warn(f"{file} leads out of {base} and is not copied", stacklevel=3)
            continue
        shutil.copyfile(file, new / file.name)


def _merge_shard(source: Path, target: Path, merger: _Merger) -> dict[str, bytes]:
    """Write a shard; what its tensors are, for `_verify_shard`."""
    with safe_open(source, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in tensors:
            found = merger.merged(name)
            tensors |= {own: found[own].contiguous() for own in names if own in found}
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    save_tensors(tensors, target, metadata)
    return digests


def _verify_shard(source: Path, target: Path, digests: Mapping[str, bytes]) -> None:
    with safe_open(target, "pt") as new:
        if set(new.keys()) != digests.keys():
            raise OSError(f"{target.name} was written with other tensors than {source}")
        for name, wanted in digests.items():
            if _digest(new.get_tensor(name)) != wanted:
                raise OSError(f"{name} reads back from {target.name} differently from what was written")


def _digest(tensor: Tensor) -> bytes:
    """Of dtype, shape and bytes: a NaN equals itself."""
    of = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode())
    of.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return of.digest()
