"""Adapters for programs that serve models, which read less than PEFT does.

vLLM, SGLang and llama.cpp want one rank and one alpha, and experts with LoRA on gate, up and down. An
exported adapter computes the same: ranks are filled with zeros, scalings go into B, and projections without
LoRA get zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from kt_moe.adapter_files import write_adapter
from kt_moe.adapters import StrPath, check_adapter_name, save_adapter
from kt_moe.checkpoint import check_path
from kt_moe.hf.config import Names
from kt_moe.hf.initial import pair_of
from kt_moe.hf.lora import INITIAL_VALUES, KtLoraExperts
from kt_moe.hf.portable import PREFIX, ExpertsForm, Matrices
from kt_moe.tensors import check_module

# Programs, and whether they read LoRA on experts that checkpoints hold fused, as PEFT writes it.
_SERVERS = {"vllm": True, "sglang": False, "llamacpp": False}
TARGETS = ("peft", *_SERVERS)
# Layers that SGLang 0.5.23 makes one of: it fails, or drops LoRA, where an adapter has some of them only.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


def export_adapter(
    model: Any, directory: StrPath, *, target: str = "peft", adapter_name: str = "default"
) -> None:
    """Write one adapter of a model for another program.

    Args:
        model: a PeftModel with kt_moe experts, or a transformers model with an adapter added.
        directory: made if it does not exist; other files in it stay.
        target: "peft": as `save_adapter`. "vllm", "sglang": what these load. "llamacpp": what
            convert_lora_to_gguf.py reads.

    Raises:
        TypeError: model or directory is something else.
        ValueError: an unknown target or adapter, or something in the adapter that the program does not have;
            names it.
        OSError: the files cannot be written; those of an older adapter are intact.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, wanted one of {list(TARGETS)}")
    if target == "peft":
        save_adapter(model, directory, adapter_name=adapter_name)
        return
    check_module("model", model)
    path = Path(check_path("directory", directory))
    config = check_adapter_name(model, adapter_name)
    if config.modules_to_save or config.trainable_token_indices:
        raise ValueError(f"the adapter has modules_to_save or trainable tokens, which {target} does not read")
    for option, off in (("use_dora", False), ("lora_bias", False), ("bias", "none")):
        if (value := getattr(config, option, off)) != off:
            raise ValueError(f"the adapter has {option}={value!r}, which {target} does not read")
    if config.init_lora_weights not in INITIAL_VALUES and not getattr(config, "has_fixed", False):
        raise ValueError(
            f"the adapter has init_lora_weights={config.init_lora_weights!r}, which may have changed the "
            "base model's weights: convert it first (path_initial_model_for_weight_conversion of PEFT)"
        )
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.r
    }
    rank = max(int(layer.r[adapter_name]) for layer in layers.values())
    tensors: dict[str, Tensor] = {}
    modules, parameters, experts = set(), set(), set()  # of what has LoRA; and layers of experts by modules
    for name, layer in layers.items():
        if isinstance(layer, KtLoraExperts):
            form = layer.form(name)
            fused_on_disk = form.module.keyed is None
            if fused_on_disk and not _SERVERS[target]:
                raise ValueError(f"{target} reads no LoRA on experts of {layer.architecture.model_type}")
            matrices = _all_projections(form, layer, adapter_name, rank)
            if fused_on_disk:
                tensors |= _weights(form.fuse(matrices))
                parameters |= {f"{name}.{fused}" for fused in layer.fused}
                continue
            shared = target == "sglang" and adapter_name in layer.shared_outer
            found = _weights(_shared_outer(form, matrices) if shared else form.split(matrices))
            experts.add(name)
            modules |= {f"{form.module.disk_path(name)}.{word}" for word in form.module.words.values()}
        elif isinstance(layer, Linear) or (
            target == "llamacpp" and isinstance(layer, ParamWrapper) and layer.num_experts == 1
        ):
            scaling = float(layer.scaling[adapter_name])
            a, b = _filled(*pair_of(layer, adapter_name), rank, scaling)
            found = _weights({f"{name}.lora_A": a, f"{name}.lora_B": b})
            modules.add(name)
        else:
            raise ValueError(
                f"the adapter has LoRA on {name}, a {type(layer).__name__}, which {target} lacks"
            )
        tensors |= found
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in _partners(base, layers.keys()) if target == "sglang" else ():
        a, b = torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank)
        tensors |= _weights({f"{name}.lora_A": a, f"{name}.lora_B": b})
        modules.add(name)
    names = Names.of(base)
    saved = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=names.shortest_modules(modules, experts),
        target_parameters=names.shortest_parameters(parameters),
        task_type=config.task_type,
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path or getattr(model, "name_or_path", None),
    )
    if any(name.endswith(".gate_up_proj") for name in parameters):
        saved.rank_pattern = saved.alpha_pattern = {"gate_up_proj": 2 * rank}
    write_adapter(path, saved, {f"{PREFIX}{k}": t.contiguous() for k, t in tensors.items()})


def _partners(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The layers without LoRA that SGLang makes one of with those that have it, once each."""
    known = dict(model.named_modules())
    wanted = {
        f"{name.rpartition('.')[0]}.{other}"
        for name in names
        for group in _TOGETHER
        if name.rpartition(".")[2] in group
        for other in group
    }
    for name in sorted(wanted - set(names)):
        if isinstance(known.get(name), nn.Linear):
            yield name, known[name]


def _all_projections(form: ExpertsForm, layer: KtLoraExperts, adapter_name: str, rank: int) -> Matrices:
    """LoRA of all projections, with scaling 1 at this rank."""
    matrices: Matrices = {}
    for projection in form.module.words:
        if projection in layer.pairs[adapter_name].pairs:
            scaling = layer.scaling_of(adapter_name, projection)
            matrices[projection] = _filled(*layer.matrices(adapter_name, projection), rank, scaling)
        else:
            into, out = form.size(projection)
            experts = form.num_experts
            matrices[projection] = torch.zeros(experts, rank, into), torch.zeros(experts, out, rank)
    return matrices


def _shared_outer(form: ExpertsForm, matrices: Matrices) -> dict[str, Tensor]:
    """SGLang's form with shared outer matrices: a tensor for all experts, those that are shared [1, ...]."""
    names = form.module.words
    result: dict[str, Tensor] = {}
    for projection, (a, b) in matrices.items():
        place = f"{form.module.disk_path(form.path)}.{names[projection]}"
        down = projection == "down"
        result |= {f"{place}.lora_A": a if down else a[:1], f"{place}.lora_B": b[:1] if down else b}
    return result


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{key}.weight": tensor for key, tensor in tensors.items()}


@torch.no_grad()
def _filled(a: Tensor, b: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [.., rank, in] and B [.., out, rank] with scaling 1, on the CPU."""
    missing = rank - a.shape[-2]
    a, b = a.detach().cpu(), b.detach().cpu() * scaling
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
