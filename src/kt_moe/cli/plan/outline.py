"""A model without its weights, made by transformers on the meta device: its own code says what it has.

Its experts are taken out as `KtMoeConfig` takes them out, LoRA is put on by PEFT, and a forward pass without
data counts what autograd would keep.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface

from kt_moe.architectures import Architecture
from kt_moe.cli.described import described, resolve_targets
from kt_moe.cli.errors import UserError
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.shapes import Activations, ExpertLayer, Outline
from kt_moe.hf import KtExperts, KtLoraExperts

_ATTENTION = "kt_moe_plan"
_TOPK = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")  # K, by config
DTYPE = torch.bfloat16  # of the rest of the model, as `kt-moe finetune` loads it


def outline(config: Any, run: Run, trust_remote_code: bool = False) -> Outline:
    """Build the model of a config without memory and look at it.

    trust_remote_code: whether its code may be the checkpoint's own.

    Raises:
        UserError: no layer with routed experts, or a target that the model lacks.
    """
    AttentionInterface.register(_ATTENTION, _attention)
    model, architecture = described(
        config, dtype=DTYPE, attn_implementation=_ATTENTION, trust_remote_code=trust_remote_code
    )
    layers = _expert_layers(model, architecture)
    names = [*run.modules, *(["experts"] if run.projections else [])]
    lora = LoraConfig(r=run.rank, target_modules=names, task_type="CAUSAL_LM")
    lora.target_modules = resolve_targets(model, architecture, lora)
    rest = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    with torch.device("meta"):
        model = get_peft_model(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_experts = 0
    for module in model.modules():
        if isinstance(module, KtLoraExperts):
            of_experts += sum(p.numel() for p in module.parameters())
    return Outline(
        architecture.model_type, tuple(layers), rest, trained - of_experts, _activations(model, run)
    )


def _expert_layers(model: nn.Module, architecture: Architecture) -> list[ExpertLayer]:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    chosen = [int(value) for name in _TOPK if (value := getattr(config, name, None)) is not None]
    if not chosen:
        raise UserError(f"the config of {architecture.model_type} has none of {', '.join(_TOPK)}")
    layers = []
    for module in architecture.modules:
        if module.same_as is None:  # else its weights are another's
            biases = hasattr(model.get_submodule(module.path), "down_proj_bias")
            sizes = module.num_experts, module.hidden_size, module.intermediate_size
            kind = module.activation, biases, module.gated
            layers.append(ExpertLayer(module.number, *sizes, chosen[0], *kind))
    return layers


def _activations(model: Any, run: Run) -> Activations:
    """Run a forward pass on the meta device and count what it saves; parameters are not counted."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # alive, so that no other storage takes its address
        return tensor

    def total() -> int:
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    decoder_layers = _stand_in(model)
    bounds: list[int] = []
    hooks = [layer.register_forward_pre_hook(lambda *_: bounds.append(total())) for layer in decoder_layers]
    hooks += [layer.register_forward_hook(lambda *_: bounds.append(total())) for layer in decoder_layers]
    ids = torch.zeros(run.batch, run.sequence, dtype=torch.long, device="meta")
    model.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(input_ids=ids, labels=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = tuple(after - before for before, after in zip(bounds[::2], bounds[1::2], strict=True))
    hidden = model.config.get_text_config().hidden_size
    boundary = run.tokens * hidden * DTYPE.itemsize
    return Activations(layers, total() - sum(layers), out.logits.nbytes, boundary)


def _stand_in(model: nn.Module) -> list[nn.Module]:
    """Put tensors without data where the core would compute; the decoder layers."""
    lists: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, (KtExperts, KtLoraExperts)) and not name.endswith(".base_layer"):
            trained = [p for p in module.parameters() if p.requires_grad]
            module.forward = _experts_forward(trained[:1])  # type: ignore[method-assign, assignment]
            above = name[: name.rindex(".layers.") + len(".layers")]
            lists[above] = model.get_submodule(above)
    return [layer for layers in lists.values() for layer in layers.children()]


def _experts_forward(lora: Sequence[Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = _Kept.apply(hidden_states.shape, hidden_states, ids, weights, *lora)  # type: ignore[no-untyped-call]
        return out

    return forward


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """What a fused attention keeps: its inputs and its result, no matrix of all pairs of tokens."""
    batch, heads, tokens, _ = query.shape
    shape = (batch, tokens, heads, value.shape[-1])
    out: Tensor = _Kept.apply(shape, query, key, value)  # type: ignore[no-untyped-call]
    return out, None


class _Kept(torch.autograd.Function):
    """A result of a given shape that keeps all inputs, and itself, for a backward that never comes."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], first: Tensor, *others: Tensor) -> Tensor:
        out = first.new_empty(shape)
        ctx.save_for_backward(first, *others, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError
