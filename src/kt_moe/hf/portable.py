"""Adapter tensors of experts between their two forms: stacked in memory, one key an expert on disk.

Plain PEFT fuses per-expert keys on loading before our tuner sees them; the fused form is undone here. For
gpt-oss, whose checkpoints have no key an expert, it does not, and cannot read such an adapter. The fused form
stores gate_up's A [E, 2r, H] as `lora_A` [E * 2r, H], expert-major, and its block-diagonal B [E, 2I, 2r] as
`lora_B` [2I, 2r * E], expert fastest.
"""

from __future__ import annotations

import re
import warnings

import torch
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
    if architecture.fused_on_disk and any(map(stacked.match, state_dict)):
        warnings.warn(
            f"adapters of {architecture.model_type} experts are written with a key an expert, which kt_moe "
            "reads again; plain PEFT and vLLM know none for this family, and would leave the experts out",
            stacklevel=2,
        )
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
    state_dict: dict[str, Tensor],
    path: str,
    num_experts: int,
    intermediate: int,
    rank: int,
    adapter_name: str,
) -> dict[str, Tensor]:
    """Take the fused tensors of the experts at `path` out of `state_dict`.

    Args:
        state_dict: as PEFT converted it; the tensors found are removed.
        path: of the tuner layer in the model.
        num_experts, intermediate: E and I.
        rank: r of the adapter.

    Returns:
        the same tensors under the model's keys, `{path}.lora_A.{adapter}.gate` and so on.

    Raises:
        ValueError: an adapter of another rank or number of experts, or one trained fused that does not split.
    """
    e, i, r = num_experts, intermediate, rank
    stacked: dict[tuple[str, str], Tensor] = {}
    for prefix in (path, _PREFIX + path):
        gate_up = _pop_pair(state_dict, f"{prefix}.base_layer", e * 2 * r)
        down = _pop_pair(state_dict, prefix, e * r)
        if gate_up is not None:
            a, b = _unflatten(*gate_up, e)
            if b[:, :i, r:].any() or b[:, i:, :r].any():
                raise ValueError(
                    f"the adapter of {path} was trained on fused experts: gate and up share a LoRA"
                )
            stacked["A", "gate"], stacked["A", "up"] = a[:, :r], a[:, r:]
            stacked["B", "gate"], stacked["B", "up"] = b[:, :i, :r], b[:, i:, r:]
        if down is not None:
            stacked["A", "down"], stacked["B", "down"] = _unflatten(*down, e)
    return {f"{path}.lora_{m}.{adapter_name}.{p}": t.contiguous() for (m, p), t in stacked.items()}


def per_expert_to_stacked(
    state_dict: dict[str, Tensor], path: str, architecture: Architecture, num_experts: int, adapter_name: str
) -> dict[str, Tensor]:
    """Take the per-expert tensors of the experts at `path`, left as they are by PEFT, out of `state_dict`.

    Returns:
        the same tensors under the model's keys, `{path}.lora_A.{adapter}.gate` and so on.

    Raises:
        ValueError: an adapter that lacks some of the experts.
    """
    stacked = {}
    for prefix in (path, _PREFIX + path):
        for projection, name in zip(PROJECTIONS, architecture.projections, strict=True):
            for matrix in ("lora_A", "lora_B"):
                keys = [f"{prefix}.{e}.{name}.{matrix}.weight" for e in range(num_experts)]
                found = [state_dict.pop(key) for key in keys if key in state_dict]
                if found and len(found) != num_experts:
                    raise ValueError(
                        f"the adapter of {path} has {name}.{matrix} of {len(found)} experts, "
                        f"wanted {num_experts}"
                    )
                if found:
                    stacked[f"{path}.{matrix}.{adapter_name}.{projection}"] = torch.stack(found)
    return stacked


def _pop_pair(state_dict: dict[str, Tensor], path: str, total_rank: int) -> tuple[Tensor, Tensor] | None:
    a = state_dict.pop(f"{path}.lora_A.weight", None)
    b = state_dict.pop(f"{path}.lora_B.weight", None)
    if a is None or b is None:
        return None
    if not a.shape[0] == b.shape[1] == total_rank:
        raise ValueError(
            f"the adapter of {path} has another rank or number of experts than the model: all experts' ranks "
            f"together are {a.shape[0]}, wanted {total_rank}"
        )
    return a, b


def _unflatten(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[r * E, in] expert-major and [out, r * E] expert fastest -> [E, r, in] and [E, out, r]."""
    a = a.view(num_experts, -1, a.shape[1])
    return a, b.reshape(b.shape[0], a.shape[1], num_experts).permute(2, 0, 1)
