"""Adapters on disk: save, load and merge them in the form that plain PEFT and inference servers read.

That form has one key an expert and projection (`...experts.{e}.gate_proj.lora_A.weight`), one rank and one
alpha for all experts, and a linear scaling alpha / r.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import kt_moe.hf  # noqa: F401  (its PEFT tuner knows kt_moe experts)
from kt_moe.checkpoint import Checkpoint

_PREFIX = "base_model.model."
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

StrPath = str | os.PathLike[str]


def save_adapter(model: nn.Module, directory: StrPath, *, adapter_name: str = "default") -> None:
    """Write one adapter of a PEFT model.

    It is what `PeftModel.save_pretrained` writes, with two differences: files are replaced only when all of
    them are complete and on disk, so that a full disk leaves the adapter that was there; and the saved config
    has no lora_dropout, which plain PEFT refuses on experts.

    Args:
        model: a PeftModel, or a transformers model with an adapter added.
        directory: made if it does not exist; other files in it stay.

    Raises:
        ValueError: the model has no adapter of this name.
        OSError: the files cannot be written; those of an older adapter are intact.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"adapter_name is {adapter_name!r}, the model's adapters are {sorted(configs)}")
    config = copy.deepcopy(configs[adapter_name])
    config.inference_mode = True
    config.lora_dropout = 0.0
    config.target_modules = _sorted(config.target_modules)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None)
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state_dict.items()}
    with _replacing(Path(directory)) as new:
        _save(tensors, new / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        config.save_pretrained(str(new))


def load_adapter(
    model: Any, directory: StrPath, *, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on a model, with kt_moe experts or without.

    Args:
        model: a transformers model, or a PeftModel, which gets one adapter more or new values for an old one.
        directory: as written by `save_adapter` or by PEFT; per-expert keys.
        is_trainable: False freezes the adapter.

    Returns:
        the PeftModel; `model` itself if it was one. A further adapter is not made the active one.

    Raises:
        FileNotFoundError: no adapter in the directory.
        ValueError: keys that the model lacks or that the adapter lacks; the message names some.
    """
    path = Path(directory)
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {path}")
    if not any((path / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise FileNotFoundError(f"no {SAFETENSORS_WEIGHTS_NAME} in {path}")  # PEFT would ask the hub for it
    if not isinstance(model, PeftModel):
        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = not is_trainable
        model = get_peft_model(model, config, adapter_name=adapter_name)
    # Else all of it would lie on a GPU for a moment, whatever the place of its parameters.
    where = {"torch_device": "cpu"}
    result: Any = model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **where)
    for what, keys in (("lacks", result.missing_keys), ("has unknown", result.unexpected_keys)):
        if keys:
            raise ValueError(
                f"the adapter in {path} {what} {len(keys)} keys for this model: {sorted(keys)[:3]} ..."
            )
    return model


def merge_adapter(base: StrPath, adapter: StrPath, output: StrPath) -> None:
    """Write the checkpoint W + s B A, shard by shard, and check what was written.

    Args:
        base: directory of a safetensors checkpoint with bf16, fp16 or fp32 weights, one key an expert.
        adapter: directory of an adapter of it with per-expert keys.
        output: must not exist or be empty. It gets the shards and the other files of `base` (tokenizer ...).

    Raises:
        FileNotFoundError: a directory without a checkpoint or adapter.
        ValueError: an adapter that is not plain LoRA on weights of this checkpoint, a checkpoint that is
            malformed, or output is taken.
        OSError: what was read back is not what was to be written, or the disk is full; no output is left.
    """
    base, output = Path(base), Path(output)
    if not base.is_dir():
        raise FileNotFoundError(f"base is {base}, wanted the directory of a checkpoint")
    checkpoint = Checkpoint(base)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output is {output}, which exists already")
    deltas = _read_deltas(Path(adapter))
    _check_complete(deltas, checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        for file in base.iterdir():
            if file.is_file() and file not in checkpoint.files:
                shutil.copyfile(file, scratch / file.name)
        for shard in checkpoint.files:
            _merge_shard(shard, scratch / shard.name, deltas)
            _verify_shard(shard, scratch / shard.name, deltas)
        scratch.chmod(0o755)
        os.replace(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _Delta:
    """s B A of one weight."""

    a: Tensor
    b: Tensor
    scaling: float

    def added_to(self, weight: Tensor) -> Tensor:
        return (weight.float() + self.scaling * (self.b.float() @ self.a.float())).to(weight.dtype)


def _read_deltas(directory: Path) -> dict[str, _Delta]:
    """The adapter's pairs by the name of the weight they change."""
    if not (directory / CONFIG_NAME).is_file() or not (directory / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} in {directory}")
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the adapter in {directory} is {config.peft_type}, wanted LoRA")
    for option in ("use_dora", "lora_bias", "fan_in_fan_out", "layer_replication"):
        if getattr(config, option, None):
            raise ValueError(f"the adapter in {directory} has {option}, which merge_adapter does not know")
    tensors = safetensors.torch.load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    deltas = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."), None)
        if b is None:
            raise ValueError(f"the adapter in {directory} has {key} but no lora_B beside it")
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha
        )
        r = a.shape[0]
        deltas[f"{module}.weight"] = _Delta(a, b, alpha / (r**0.5 if config.use_rslora else r))
    if tensors:
        raise ValueError(
            f"merge_adapter merges lora_A and lora_B, the adapter also has {sorted(tensors)[:3]}"
        )
    return deltas


def _check_complete(deltas: dict[str, _Delta], checkpoint: Checkpoint) -> None:
    """Every pair must find its weight, or the merge would silently leave it out."""
    missing = sorted(deltas.keys() - checkpoint.tensors.keys())
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} weights that the adapter changes: {missing[:3]}"
        )
    for name, delta in deltas.items():
        shape, wanted = checkpoint.tensors[name].shape, (delta.b.shape[0], delta.a.shape[1])
        if shape != wanted:
            raise ValueError(f"{name} is {list(shape)}, the adapter is for {list(wanted)}")


def _merged(name: str, weight: Tensor, deltas: dict[str, _Delta]) -> Tensor:
    if name not in deltas:
        return weight
    if weight.dtype not in _FLOATS:
        raise ValueError(f"{name} is {weight.dtype}, merge_adapter needs bfloat16, float16 or float32")
    return deltas[name].added_to(weight)


def _merge_shard(source: Path, target: Path, deltas: dict[str, _Delta]) -> None:
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        tensors = {name: _merged(name, file.get_tensor(name), deltas) for name in file.keys()}  # noqa: SIM118 (no mapping)
    _save(tensors, target, metadata)


def _verify_shard(source: Path, target: Path, deltas: dict[str, _Delta]) -> None:
    with safe_open(source, "pt") as old, safe_open(target, "pt") as new:
        if set(old.keys()) != set(new.keys()):
            raise OSError(f"{target.name} was written with other tensors than {source}")
        for name in old.keys():  # noqa: SIM118
            wanted, found = _merged(name, old.get_tensor(name), deltas), new.get_tensor(name)
            if not torch.equal(
                wanted.view(torch.uint8), found.view(torch.uint8)
            ):  # bytes: a NaN equals itself
                raise OSError(f"{name} reads back from {target.name} differently from what was written")


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A scratch directory whose files take their places in `directory` when all are written and synced."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".new-") as scratch:
        yield Path(scratch)
        files = sorted(Path(scratch).iterdir())
        for file in files:
            _sync(file)
        for file in files:
            os.replace(file, directory / file.name)
    _sync(directory)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(0o644)  # safetensors makes files that only their owner reads; servers run as others


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sorted(targets: Any) -> Any:
    return targets if targets is None or isinstance(targets, str) else sorted(targets)
