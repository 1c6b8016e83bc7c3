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
from kt_moe.cli.terminal import UserError
from kt_moe.hf.quantizer import put_experts
from kt_moe.hf.targets import find_targets


def read_config(name: str | None, **options: Any) -> Any:
    """The config of a model directory, of a config.json, or of a model on the hub.

    options: of `AutoConfig.from_pretrained`, such as revision.

    Raises:
        UserError: no such file, or not one that transformers knows.
    """
    if not name:
        raise UserError("--model_name_or_path is missing: a directory, or a name on the hub")
    if (name.startswith(("/", ".")) or name.count("/") > 1) and not Path(name).exists():
        raise UserError(f"there is no {name}, and it is no name of a model on the hub")
    with blamed_on(name if Path(name).exists() else f"{name}, which is no directory here"):
        return AutoConfig.from_pretrained(name, **options)


@contextmanager
def blamed_on(name: str | Path) -> Iterator[None]:
    """What transformers raises for a config it cannot build a model of, of whatever type, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: no config of a model: {type(error).__name__}: {error}") from error


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

    model: as `described` gives it; its experts are replaced.

    Raises:
        UserError: a name that matches nothing; lists those there are.
    """
    put_experts(model, architecture)
    names = split_targets(lora.target_modules)
    if names is None or names == ["all-linear"]:
        return lora.target_modules
    if "attention" in names:
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        found = {name.rpartition(".")[2] for name in linear if "attn" in name or "attention" in name}
        names = list({*names} - {"attention"} | found)
    lora.target_modules = set(names)
    try:
        find_targets(model, lora, architecture)
    except ValueError as error:
        known = ", and the words attention and experts" if "match nothing" in str(error) else ""
        raise UserError(f"{error}{known}") from error
    return sorted(names)


def split_targets(given: Any) -> list[str] | None:
    """Names in `lora_target_modules`, which may have commas between; None: a regular expression, or none."""
    if given is None or (isinstance(given, str) and not re.fullmatch(r"[\w.,-]+", given)):
        return None
    return ",".join([given] if isinstance(given, str) else given).split(",")
