"""A model without its weights, made by transformers on the meta device: its own code says what it has.

Its experts are taken out as `KtMoeConfig` takes them out, LoRA is put on by PEFT, and a forward pass without
data counts what autograd would keep.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface

from kt_moe.architectures import ExpertModule
from kt_moe.cli.described import described, resolve_targets
from kt_moe.cli.plan.options import Run
from kt_moe.cli.terminal import UserError
from kt_moe.hf import KtExperts, KtLoraExperts

_ATTENTION = "kt_moe_plan"
_TOPK = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")  # K, by config
DTYPE = torch.bfloat16  # of the rest of the model, as `kt-moe finetune` loads it


@dataclass(frozen=True)
class Outline:
    """What memory and speed follow from. Bytes of tensors are those beside the routed experts.

    Attributes:
        layers: of routed experts with weights of their own.
        topk: K, the experts of a token.
        rest_bytes: parameters and buffers.
        rest_lora: numbers of LoRA parameters.
        kept: by each decoder layer for backward.
        outside: kept for backward by embedding, last norm, head and loss.
        logits: the logits themselves, in the model's dtype.
        boundary: the hidden states between two layers.
    """

    model_type: str
    layers: tuple[ExpertModule, ...]
    topk: int
    rest_bytes: int
    rest_lora: int
    kept: tuple[int, ...]
    outside: int
    logits: int
    boundary: int


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
    text = model.config.get_text_config()
    topk = next((value for name in _TOPK if (value := getattr(text, name, None)) is not None), None)
    if topk is None:
        raise UserError(f"the config of {architecture.model_type} has none of {', '.join(_TOPK)}")
    layers = tuple(module for module in architecture.modules if module.same_as is None)
    names = [*run.modules, *(["experts"] if run.projections else [])]
    lora = LoraConfig(r=run.rank, target_modules=names, task_type="CAUSAL_LM")
    lora.target_modules = resolve_targets(model, architecture, lora)
    rest = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    with torch.device("meta"):
        model = get_peft_model(model, lora)
    of_experts = [m for m in model.modules() if isinstance(m, KtLoraExperts)]
    rest_lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest_lora -= sum(p.numel() for m in of_experts for p in m.parameters())
    return Outline(architecture.model_type, layers, int(topk), rest, rest_lora, *_activations(model, run))


def _activations(model: Any, run: Run) -> tuple[tuple[int, ...], int, int, int]:
    """Run a forward pass on the meta device and count what it saves; parameters are not counted."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # alive, so that no other storage takes its address
        return tensor

    def total(*_: Any) -> int:
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    before: list[int] = []
    after: list[int] = []
    for layer in _stand_in(model):
        layer.register_forward_pre_hook(lambda *_: before.append(total()))
        layer.register_forward_hook(lambda *_: after.append(total()))
    ids = torch.zeros(run.batch, run.sequence, dtype=torch.long, device="meta")
    model.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(input_ids=ids, labels=ids, use_cache=False)
    layers = tuple(end - begin for begin, end in zip(before, after, strict=True))
    boundary = run.tokens * model.config.get_text_config().hidden_size * DTYPE.itemsize
    return layers, total() - sum(layers), out.logits.nbytes, boundary


def _stand_in(model: nn.Module) -> list[nn.Module]:
    """Put tensors without data where the core would compute; the decoder layers."""
    lists: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, (KtExperts, KtLoraExperts)) and not name.endswith(".base_layer"):
            trained = [p for p in module.parameters() if p.requires_grad]
            module.forward = partial(_experts, trained[:1])  # type: ignore[method-assign]
            above = name[: name.rindex(".layers.") + len(".layers")]
            lists[above] = model.get_submodule(above)
    return [layer for layers in lists.values() for layer in layers.children()]


def _experts(lora: Sequence[Tensor], hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = _Kept.apply(hidden_states.shape, hidden_states, ids, weights, *lora)  # type: ignore[no-untyped-call]
    return out


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """What a fused attention keeps: its inputs and its result, no matrix of all pairs of tokens."""
    batch, heads, tokens, _ = query.shape
    shape = (batch, tokens, heads, value.shape[-1])
    return _Kept.apply(shape, query, key, value), None  # type: ignore[no-untyped-call]


class _Kept(torch.autograd.Function):
    """A result of a given shape that keeps all inputs, and itself, for a backward that never comes."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], first: Tensor, *others: Tensor) -> Tensor:
        out = first.new_empty(shape)
        ctx.save_for_backward(first, *others, out)
        return out
