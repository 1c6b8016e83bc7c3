"""`kt_moe.wrap(model)`: experts of a loaded model are taken over, layer by layer, and theirs are freed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

from kt_moe.architectures import architecture_of
from kt_moe.computation import is_experts, output_norm
from kt_moe.expert_parallel import local_experts
from kt_moe.experts import Experts
from kt_moe.hf.experts import KtExperts, expert_parameters, pack
from kt_moe.hf.kt_config import checked_config
from kt_moe.hf.quantizer import KtMoeConfig, KtMoeQuantizer, guard_loaded_model
from kt_moe.hf.tuner import take_over
from kt_moe.hf.unmarked import mark
from kt_moe.tensors import check_module

_OF_CHECKPOINTS = ("cache_dir", "paged", "lazy", "rest")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def wrap(model: nn.Module, config: KtMoeConfig | None = None) -> nn.Module:
    """Let kt_moe compute the routed experts of a model that is in memory; the model itself is changed.

        model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")
        kt_moe.wrap(model, kt_moe.KtMoeConfig(format="int4", gpu_memory="6GiB"))
        model = peft.get_peft_model(model, LoraConfig(target_modules=["q_proj", "experts"]))

    Layer after layer is packed and its parameters are dropped, so that memory never holds more than one layer
    twice, unless something else refers to the parameters, as an optimizer does that was made before. Experts
    are frozen from then on. The model is what `from_pretrained(..., quantization_config=config)` gives, but
    from weights in memory: `kt_moe.KtMoeConfig` needs no memory for torch's experts in between.

    Args:
        model: a transformers model, or one inside wrappers such as PEFT's whose adapters are elsewhere;
            experts may get LoRA beside these (`add_adapter`).
            Experts may be on any device, in bf16, fp16 or fp32; what is not bf16 is rounded to it. Best call
            it before the model is sharded. Experts that fully_shard or ZeRO-3 have gathered (`unshard()`,
            `GatheredParameters`) are taken over too, but these keep their shards in memory.
        config: how experts are held and computed; those of its options that are about checkpoints have to be
            at their defaults. Format "as-stored" is bf16.

    Returns:
        `model`.

    Raises:
        TypeError: model or config is something else.
        ValueError: the model has no experts, or some that the core cannot compute; an adapter or a
            parametrization on them; parameters that are not here (on "meta", sharded, partitioned) or of
            another dtype; several models at once; hooks on the experts; options about checkpoints. Nothing
            has been changed then. Also weights that the format cannot hold, which are found when their layer
            is packed: as after an interrupt, the model works on with the layers before taken over, and may
            be given again.
    """
    check_module("model", model)
    config = checked_config(config)
    if given := [name for name in _OF_CHECKPOINTS if getattr(config, name)]:
        raise ValueError(f"config has {', '.join(given)}, which is for experts from a checkpoint")
    _refuse_sharded(model)
    architecture = architecture_of(model)
    inner = _the_model(model)
    theirs = {m.path: inner.get_submodule(m.path) for m in architecture.modules}
    left = {path: module for path, module in theirs.items() if not isinstance(module, KtExperts)}
    if not left:
        raise ValueError("the experts of this model are kt_moe's already")
    for path, module in left.items():
        _refuse_unless_here(path, module)
    config.warn_without_gpu()

    options = {
        "format": "bf16" if config.format == "as-stored" else config.format,
        "placement": config.placement, "runtime": config.runtime(), "gpu": config.make_gpu(),
    }  # fmt: skip
    size = sum(_nbytes(module) for module in left.values())
    del theirs, module
    group = config.new_group()
    packed: dict[str | None, Experts | None] = {}
    with logging.tqdm(total=size, desc="Packing experts", unit="B", unit_scale=True) as bar:
        for described in architecture.modules:
            if described.path in left:
                module = left.pop(described.path)
                part = None if group is None else local_experts(described.num_experts, group)
                experts = packed.get(described.same_as)  # where a model ties the parameters of two modules
                if experts is None and part != range(0):
                    experts = pack(module, part=part, **options)
                ours = KtExperts(architecture, described, experts, output_norm(module))
                packed[described.path] = experts
                if experts is not None:
                    experts.recompute = config.recompute
                    experts.checkpoint_experts = config.checkpoint_experts
                if group is not None:
                    ours.divide(group)
                ours.lora_device, ours.training = config.lora_device, module.training
                guard_loaded_model(inner, KtMoeQuantizer(config))  # from the first layer on
                for parent, name in list(_places(inner, module)):
                    mark(parent, module)
                    setattr(parent, name, ours)
                bar.update(_nbytes(module))
                del module  # and with it the last reference to the parameters
    take_over(model)
    return model


def _the_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model in it; ValueError if there are several, none of which is part of another."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    outer = [n for n in found if not any(n != o and (not o or n.startswith(f"{o}.")) for o in found)]
    if len(outer) > 1:
        raise ValueError(f"model has several transformers models, {outer}: wrap them one by one")
    return found[outer[0]]


def _places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The parents of a module, of which models that tie layers have several, and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is module:
                yield parent, name


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _refuse_sharded(model: nn.Module) -> None:
    """ValueError where experts are not whole in this process; names what shards them."""
    for path, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "model is in FullyShardedDataParallel, whose flat parameters would keep the experts: call "
                "kt_moe.wrap before"
            )
        for name, parameter in module.named_parameters(path, recurse=False) if is_experts(module) else ():
            if isinstance(parameter, DTensor):
                raise ValueError(
                    f"{name} is sharded by fully_shard, wanted it whole: call kt_moe.wrap before"
                )
            if hasattr(parameter, "ds_id") and parameter.numel() == 0:
                raise ValueError(
                    f"{name} is partitioned by ZeRO-3, wanted it whole: call kt_moe.wrap within "
                    "deepspeed.zero.GatheredParameters"
                )


def _refuse_unless_here(path: str, module: nn.Module) -> None:
    """ValueError unless these are experts of transformers whose parameters are in this process."""
    if not is_experts(module):
        raise ValueError(
            f"{path} is a {type(module).__name__}, which has an adapter on the experts: call kt_moe.wrap "
            'before PEFT, and put LoRA on them with LoraConfig(target_modules=["experts"]), or save it and '
            "kt_moe.load_adapter it into the model without it"
        )
    if any(part in ("original_module", "modules_to_save") for part in path.split(".")):
        raise ValueError(f"{path} is in modules_to_save, which trains it: kt_moe's experts are frozen")
    # accelerate, for a device_map, gives modules a forward and a hook, which are no obstacle.
    own_forward = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if own_forward or any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(f"{path} has hooks or a forward of its own, which kt_moe would not call")
    for name, parameter in _parameters(path, module):
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"{name} is {parameter.dtype}, wanted bfloat16, float16 or float32")
        if parameter.is_meta:
            raise ValueError(f"{name} is on meta, wanted loaded weights")


def _parameters(path: str, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in zip(*expert_parameters(module), strict=True):
        yield f"{path}.{name}", parameter
