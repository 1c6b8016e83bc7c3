"""The experts inside a model: every `MoELayer`, and transformers' modules that kt_moe computes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from kt_moe.experts import Experts
from kt_moe.hf.experts import is_kt_experts, loaded_experts
from kt_moe.layer import MoELayer
from kt_moe.tensors import check_module

_WRAPPED = re.compile(r"^base_model\.model\.|\.base_layer$")  # what PEFT adds to a module's name


def model_experts(model: nn.Module) -> dict[str, Experts]:
    """The experts of each layer by the name of the module that has them.

        for experts in kt_moe.model_experts(model).values():
            experts.rebalance()  # by the routes so far; or .page_nodes(), .recompute = True

    The names are the model's own, whether or not PEFT wraps it, and those of `routing_counts`. Experts that
    are not loaded yet (`KtMoeConfig(lazy=True)`, or `experts_implementation="kt_moe"` before the first
    forward) are left out.
    """
    return {name: experts for name, _, experts in expert_modules(model) if experts is not None}


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Experts | None]]:
    """Names, modules and their experts, None where these are not loaded. TypeError for what is no model."""
    check_module("model", model)
    for path, module in model.named_modules():
        name = _WRAPPED.sub("", path)
        if isinstance(module, MoELayer):
            yield name, module, module.experts
        elif is_kt_experts(module):
            yield name, module, loaded_experts(module)
