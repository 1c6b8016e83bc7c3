"""Adapter tensors of experts between their two forms: stacked in memory, one key an expert on disk.

Plain PEFT fuses per-expert keys on loading before our tuner sees them; the fused form is undone here. It
stores gate_up's A [E, 2r, H] as `lora_A` [E * 2r, H], expert-major, and its block-diagonal B [E, 2I, 2r] as
`lora_B` [2I, 2r * E], expert fastest.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from kt_moe.architectures import Architecture
from kt_moe.functional import PROJECTIONS

_PREFIX = "base_model.model."


def split_by_expert(
    state_dict: dict[str, Tensor], architecture: Architecture, adapter_name: str
) -> dict[str, Tensor]:
    """Replace stacked `{path}.lora_A.{adapter}.gate` by `{path}.{e}.gate_proj.lora_A.{adapter}.weight`."""
    stacked = re.compile(rf"(.+)\.(lora_[AB])\.{re.escape(adapter_name)}\.({'|'.join(PROJECTIONS)})$")
    names = dict(zip(PROJECTIONS, architecture.projections, strict=True))
    result = {}
    for key, tensor in state_dict.items():
        found = stacked.match(key)
        if found is None:
            result[key] = tensor
            continue
        path, matrix, projection = architecture.disk_path(found[1]), found[2], names[found[3]]
        for e, one in enumerate(tensor):
            result[f"{path}.{e}.{projection}.{matrix}.{adapter_name}.weight"] = one.clone()
    return result


def fused_to_stacked(
    state_dict: dict[str, Tensor], path: str, experts: Any, adapter_name: str
) -> dict[str, Tensor]:
    """Take the fused tensors of the experts at `path` out of `state_dict`.

    Args:
        state_dict: as PEFT converted it; the tensors found are removed.
        path: of the tuner layer in the model.
        experts: has num_experts and intermediate_dim.

    Returns:
        the same tensors under the model's keys, `{path}.lora_A.{adapter}.gate` and so on.

    Raises:
        ValueError: an adapter for another number of experts, or one trained fused that cannot be split.
    """
    e, i = experts.num_experts, experts.intermediate_dim
    stacked: dict[tuple[str, str], Tensor] = {}
    for prefix in (path, _PREFIX + path):
        gate_up_a = state_dict.pop(f"{prefix}.base_layer.lora_A.weight", None)
        gate_up_b = state_dict.pop(f"{prefix}.base_layer.lora_B.weight", None)
        down_a = state_dict.pop(f"{prefix}.lora_A.weight", None)
        down_b = state_dict.pop(f"{prefix}.lora_B.weight", None)
        if gate_up_a is not None and gate_up_b is not None:
            a, b = _unflatten(gate_up_a, gate_up_b, e, path)
            r = a.shape[1] // 2
            if b[:, :i, r:].any() or b[:, i:, :r].any():
                raise ValueError(
                    f"the adapter of {path} was trained on fused experts; its gate and up share one LoRA"
                )
            stacked["A", "gate"], stacked["A", "up"] = a[:, :r], a[:, r:]
            stacked["B", "gate"], stacked["B", "up"] = b[:, :i, :r], b[:, i:, r:]
        if down_a is not None and down_b is not None:
            stacked["A", "down"], stacked["B", "down"] = _unflatten(down_a, down_b, e, path)
    return {f"{path}.lora_{m}.{adapter_name}.{p}": t.contiguous() for (m, p), t in stacked.items()}


def _unflatten(a: Tensor, b: Tensor, num_experts: int, path: str) -> tuple[Tensor, Tensor]:
    """[r * E, in] expert-major and [out, r * E] expert fastest -> [E, r, in] and [E, out, r]."""
    if a.shape[0] % num_experts or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"the adapter of {path} is for another number of experts: "
            f"lora_A has {a.shape[0]} rows, which do not divide into {num_experts}"
        )
    r = a.shape[0] // num_experts
    return a.view(num_experts, r, -1), b.reshape(b.shape[0], r, num_experts).permute(2, 0, 1)
