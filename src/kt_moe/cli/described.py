"""A model by its config alone, built by transformers on the meta device: its own code says what it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kt_moe.architectures import Architecture, architecture_of
from kt_moe.cli.errors import UserError
from kt_moe.hf.quantizer import put_experts
from kt_moe.hf.targets import find_targets

ATTENTION = "attention"


def read_config(name: str, **options: Any) -> Any:
    """The config of a model directory, of a config.json, or of a model on the hub.

    options: of `AutoConfig.from_pretrained`, such as revision.

    Raises:
        UserError: no such file, or not one that transformers knows.
    """
    path = Path(name)
    if path.exists() and not (path if path.is_file() else path / "config.json").is_file():
        raise UserError(f"{path} is not a model directory: it has no config.json")
    if not path.exists() and (path.is_absolute() or name.count("/") > 1 or name.startswith(".")):
        raise UserError(f"there is no {path}, and it is no name of a model on the hub")
    with blamed_on(name):
        return AutoConfig.from_pretrained(path if path.exists() else name, **options)


@contextmanager
def blamed_on(name: str | Path) -> Iterator[None]:
    """What transformers raises for a config it cannot build a model of, of whatever type, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{name}: no config of a model: {type(error).__name__}: {text[:500]}") from error


def described(config: Any, **options: Any) -> tuple[Any, Architecture]:
    """The model of a config without memory, its experts still transformers' own, and what is known of them.

    options: of `from_config`.

    Raises:
        ValueError: no layer with routed experts, or some that the core cannot compute.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    return model, architecture_of(model)


def resolve_targets(model: nn.Module, architecture: Architecture, lora: Any) -> Any:
    """`target_modules` for a LoraConfig, in which "attention" stands for all linear layers in attention.

    Args:
        model: as `described` gives it; its experts are replaced.
        lora: a LoraConfig; one that has words in a string, separated by commas, means these words.

    Raises:
        UserError: a name that matches nothing; lists those there are.
    """
    put_experts(model, architecture)
    names = split_targets(lora.target_modules)
    if names is None or names == ["all-linear"]:
        return lora.target_modules
    if ATTENTION in names:
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        found = {n.rpartition(".")[2] for n in linear if "attn" in n or ATTENTION in n}
        names = list((set(names) | found) - {ATTENTION})
    lora.target_modules = set(names)
    try:
        find_targets(model, lora, architecture)
    except ValueError as error:
        raise UserError(str(error)) from error
    return sorted(names)


def split_targets(given: Any) -> list[str] | None:
    """Names in `lora_target_modules`, also words with commas between; None: a regular expression, or none."""
    if isinstance(given, str):
        return given.split(",") if re.fullmatch(r"[\w.,-]+", given) else None
    return None if given is None else [name for word in given for name in word.split(",")]
