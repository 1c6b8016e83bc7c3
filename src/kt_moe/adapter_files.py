"""An adapter's two files: written together, and read as what a stranger wrote.

adapter_config.json and adapter_model.safetensors belong together. Old weights are replaced before the config,
and weights repeat in their metadata, as `kt_moe_config`, the config that they were saved with: a reader that
comes between the two, or after a process was killed there, sees that they differ. Where no weights were, they
come last: where they lie, the adapter is complete.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kt_moe.lora_options import check_names, check_numbers, numbers_by_pattern, of_pattern

_CONFIG = "kt_moe_config"
_NOT_COMPARED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
}  # fmt: skip
_KT_KERNEL = "fused_expert_lora.safetensors"  # where kt-kernel keeps LoRA of routed experts
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WRITERS_SECONDS = 1.0  # that a writer may take between the two files


def write_adapter(directory: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Replace an adapter's files when all of them are complete and on disk. Other files stay.

    Raises:
        OSError: the files cannot be written; those of an older adapter are intact.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with scratch(directory, "new") as new:
        config.save_pretrained(str(new))
        text = (new / CONFIG_NAME).read_text()
        metadata = {"format": "pt", _CONFIG: json.dumps(_compared(json.loads(text)))}
        save_tensors(_apart(tensors), new / SAFETENSORS_WEIGHTS_NAME, metadata)
        first = (directory / SAFETENSORS_WEIGHTS_NAME).exists()
        files = sorted(new.iterdir(), key=lambda file: (file.name == SAFETENSORS_WEIGHTS_NAME) != first)
        for file in files:
            _sync(file)
        with _locked(directory):  # of two writers' pairs one is there in the end, not a part of each
            for file in files:
                os.replace(file, directory / file.name)
    _sync(directory)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory, as of tied layers, each with memory of its own: files have no others."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors, which were saved together, on the CPU.

    Raises:
        FileNotFoundError: no adapter in the directory.
        ValueError: no LoRA adapter, files that do not belong together, LoRA of experts in kt-kernel's file,
            numbers or tensors that no adapter has (NaN, infinite, integers, complex, without dimensions, one
            of a pair); names them.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {directory}")
    names = [name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (directory / name).is_file()]
    if not names:
        raise FileNotFoundError(f"no {SAFETENSORS_WEIGHTS_NAME} in {directory}")
    end = time.monotonic() + _WRITERS_SECONDS
    while True:
        text = (directory / CONFIG_NAME).read_bytes()
        options = _parse(directory, text)
        tensors, saved_with = _read_tensors(directory / names[0])
        changed = {} if saved_with is None else _changes(saved_with, _compared(options))
        if not changed:
            break
        if time.monotonic() > end:
            _check_options(directory, options)
            name = next(iter(changed))
            raise ValueError(
                f"{CONFIG_NAME} in {directory} is not the one that {names[0]} was saved with: {name} is "
                f"{changed[name][1]!r} and was {changed[name][0]!r}. A save was interrupted, or the file was "
                "changed; save the adapter again"
            )
        time.sleep(0.01)
    if saved_with is None and (directory / _KT_KERNEL).is_file():
        raise ValueError(
            f"the adapter in {directory} has LoRA of experts in {_KT_KERNEL}, which kt-kernel alone reads: "
            f"python -m kt_kernel.sft.convert_kt_to_sglang_adapter {directory} OUTPUT "
            "--base-model-name-or-path MODEL writes an adapter with all of it"
        )
    _check_options(directory, options)
    _check_tensors(directory, tensors)
    _check_ranks(directory, options, tensors)
    return _config(directory, options, text), tensors


@contextmanager
def scratch(directory: Path, name: str) -> Iterator[Path]:
    """A new directory `.kt_moe-{name}-...`, gone at the end; those of killed processes are removed first.

    It is locked while it is in use.
    """
    with _locked(directory):
        for old in directory.glob(f".kt_moe-{glob.escape(name)}-*"):
            if old.is_dir() and not old.is_symlink():
                try:
                    descriptor = os.open(old, os.O_RDONLY)
                except FileNotFoundError:  # its owner has just removed it
                    continue
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old, ignore_errors=True)
                except OSError:
                    pass  # in use
                finally:
                    os.close(descriptor)
        new = Path(tempfile.mkdtemp(dir=directory, prefix=f".kt_moe-{name}-"))
        lock = os.open(new, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(lock)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Write a safetensors file that others may read, the same bytes for the same tensors.

    OSError where it cannot be written.
    """
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(path)
    path.chmod(0o644)  # safetensors makes files that only their owner reads; servers run as others


def _sort_metadata(path: Path) -> None:
    """Metadata in the order of their names: safetensors writes them in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compared(options: dict[str, Any]) -> dict[str, Any]:
    """Everything that says what an adapter computes."""
    return {key: value for key, value in options.items() if key not in _NOT_COMPARED}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: (old.get(name), new.get(name)) for name in names}


def _parse(directory: Path, text: bytes) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_NAME} in {directory} is no JSON: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{CONFIG_NAME} in {directory} is a {type(options).__name__}, wanted an object")
    return options


def _check_options(directory: Path, options: dict[str, Any]) -> None:
    """ValueError unless the config is LoRA's, with ranks and alphas that are such numbers."""
    where = f"{CONFIG_NAME} in {directory}"
    if options.get("peft_type") != "LORA":
        raise ValueError(f"{where} is of peft_type {options.get('peft_type')!r}, wanted 'LORA'")
    check_numbers(where, options)


def _check_ranks(directory: Path, options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError for a rank that no tensor has room for: memory is taken by the config's ranks."""
    where = f"{CONFIG_NAME} in {directory}"
    most = max((max(tensor.shape) for key, tensor in tensors.items() if ".lora_" in key), default=0)
    for key, rank in numbers_by_pattern(where, options, "r", "rank_pattern").items():
        if most and rank > most:
            raise ValueError(
                f"{where} has rank {rank}{of_pattern(key)}, and no LoRA tensor has more than {most} rows"
            )


def _config(directory: Path, options: dict[str, Any], text: bytes) -> LoraConfig:
    """PEFT's config of this file."""
    where = f"{CONFIG_NAME} in {directory}"
    check_names(where, options)
    with tempfile.TemporaryDirectory() as snapshot:  # the file itself may change meanwhile
        (Path(snapshot) / CONFIG_NAME).write_bytes(text)
        try:
            config = PeftConfig.from_pretrained(snapshot)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is no config of PEFT: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{where} is of {type(config).__name__}, wanted LoraConfig")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors, and the config they were saved with if the file says so."""
    try:
        if path.name == WEIGHTS_NAME:
            return load_peft_weights(str(path.parent), device="cpu"), None
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            saved_with = (file.metadata() or {}).get(_CONFIG)
            return tensors, None if saved_with is None else dict(json.loads(saved_with))
    except (SafetensorError, RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    def refuse(key: str, what: str, wanted: str) -> None:
        raise ValueError(f"{key} of the adapter in {directory} {what}, wanted {wanted}")

    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"the weights of the adapter in {directory} are no tensors by name")
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            refuse(key, f"is a {type(tensor).__name__}", "a tensor")
        if tensor.layout is not torch.strided:
            refuse(key, f"is {tensor.layout}", "a dense tensor")
        lora = re.search(r"\.lora_(?:embedding_)?[AB](?:\.|$)", key)
        if key.endswith(".bias"):  # of lora_bias: a vector
            lora = None
        if lora and tensor.dtype not in _FLOATS:
            refuse(key, f"is {tensor.dtype}", "a floating-point tensor")
        if tensor.dtype.is_complex:
            refuse(key, f"is {tensor.dtype}", "real numbers")
        if tensor.dim() < (2 if lora else 1):
            refuse(key, f"has shape {list(tensor.shape)}", "two dimensions" if lora else "a dimension")
        if 0 in tensor.shape:
            refuse(key, f"has shape {list(tensor.shape)}", "some elements")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            refuse(key, "has values that are NaN or infinite", "finite ones")
        if lora:
            other = key[: lora.start()] + _swapped(lora[0]) + key[lora.end() :]
            if other not in tensors:
                refuse(key, f"has no {other} beside it", "both")
            elif tensors[other].dim() == 2 and not _ranks_agree(key, tensor, tensors[other]):
                shapes = f"{list(tensor.shape)} beside {list(tensors[other].shape)}"
                refuse(key, f"has shape {shapes}", "one rank in both")


def _swapped(name: str) -> str:
    return name.translate(str.maketrans("AB", "BA"))


def _ranks_agree(key: str, tensor: Tensor, other: Tensor) -> bool:
    a, b = (tensor, other) if re.search(r"lora_(?:embedding_)?A", key) else (other, tensor)
    return a.dim() != 2 or a.shape[0] == b.shape[1]
