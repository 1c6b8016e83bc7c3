"""A Qwen3-MoE model with random weights, made from a shape without any file; for `kt-moe bench --step`."""

from __future__ import annotations

from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import kt_moe
from kt_moe.architectures import architecture_of
from kt_moe.cli.bench.data import Weights, make_lora
from kt_moe.cli.bench.gpu_options import GpuSettings
from kt_moe.cli.bench.gpu_stack import fuse, fuse_lora, grouped_experts
from kt_moe.cli.bench.layer import SCALING
from kt_moe.gpu import Gpu
from kt_moe.hf import KtExperts

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_HEADS = {"qwen3-30b-a3b": (32, 4, 128), "qwen3-235b-a22b": (64, 4, 128)}  # heads, of keys, their size
_LOSS_ROWS = 512


def skeleton(settings: GpuSettings) -> Any:
    """A model in bf16 on the device, each of whose layers still lacks its experts."""
    shape, device = settings.shape, torch.device(settings.device)
    heads, key_heads, size = _HEADS.get(shape.name, (4, 2, 16))
    config = Qwen3MoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.topk,
        norm_topk_prob=True,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=size,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).bfloat16()
    architecture_of(model)  # remembered for the model without experts
    for layer in model.model.layers:
        layer.mlp.experts = nn.Identity()
    model.to_empty(device=device)
    torch.manual_seed(settings.seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    with torch.device(device):  # its buffers are no parameters
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.train()


def kt_model(weights: Weights, settings: GpuSettings, format: str, gpu: Gpu | str) -> Any:
    """The model with kt_moe's experts, and LoRA on them and on attention; `gpu` as for `kt_moe.Experts`."""
    model, runtime = skeleton(settings), settings.runtime()
    architecture = architecture_of(model)
    for module, layer in zip(architecture.modules, model.model.layers, strict=True):
        held = kt_moe.Experts(*weights, format=format, runtime=runtime, gpu=gpu)
        held.recompute, held.checkpoint_experts = settings.recompute, settings.checkpoint_experts
        experts = KtExperts(architecture, module)
        experts.lora_device = "cpu" if gpu == "off" else settings.lora_device
        experts.load_with(lambda module, progress, held=held: held)  # type: ignore[misc]
        experts.load()
        layer.mlp.experts = experts
    return _with_lora(model, settings.rank, [*_ATTENTION, "experts"])


def torch_model(
    weights: Weights, settings: GpuSettings, device: torch.device, dtype: torch.dtype, pin: bool = False
) -> Any:
    """The model in plain torch, all of it on the device, its LoRA in `dtype`.

    pin: the experts, on the CPU, lie in page-locked memory.
    """
    model = skeleton(settings).to(device)
    model = _with_lora(model, settings.rank, _ATTENTION, dtype)
    lora = fuse_lora(make_lora(settings.shape, settings.rank, settings.seed))
    for layer in model.model.layers:
        layer.mlp.experts = GroupedExperts(fuse(weights, device=device, pin_memory=pin), lora, device, dtype)
    return model


def with_checkpoints(model: Any) -> Any:
    """The model, whose backward computes one layer after the other again."""
    # transformers 5.2x has another name for it, 5.17 only the old one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def with_compiled_attention(model: Any) -> Any:
    """The model, whose attention modules are compiled when they are first called."""
    for layer in model.model.layers:
        layer.self_attn.compile()
    return model


class GroupedExperts(nn.Module):
    """Frozen experts with LoRA by torch's grouped_mm."""

    def __init__(
        self,
        weights: tuple[Tensor, Tensor],
        lora: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(w, requires_grad=False) for w in weights)
        self._names = list(lora)
        for name, tensor in lora.items():
            value = torch.zeros_like(tensor) if name.startswith("b_") else tensor  # as PEFT begins
            setattr(self, name, nn.Parameter(value.to(device, dtype, copy=True)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]"""
        lora = [getattr(self, name) for name in self._names]
        base = (self.gate_up_proj, self.down_proj)
        return grouped_experts(hidden_states, top_k_index, top_k_weights, base, lora)


def _with_lora(model: Any, rank: int, targets: list[str], dtype: torch.dtype = torch.float32) -> Any:
    """The model with LoRA, all else frozen."""
    config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype is torch.float32)
    return wrapped.get_base_model()


def next_token_loss(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Mean loss of predicting each token from the one before; hidden [B, S, H], head [V, H], ids [B, S].

    The logits exist for some rows at a time, and the gradient of `hidden` is made with them.
    """
    loss = _Loss.apply(hidden[:, :-1].flatten(0, 1), head, ids[:, 1:].flatten())  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden)
        parts = (torch.split(t, _LOSS_ROWS) for t in (hidden.detach(), grad, labels))
        for rows, grad_rows, row_labels in zip(*parts, strict=True):
            with torch.enable_grad():
                rows.requires_grad_()
                logits = linear(rows, head).float()
                part = cross_entropy(logits, row_labels, reduction="sum") / len(labels)
            grad_rows.copy_(*torch.autograd.grad(part, rows))
            loss += part.detach()
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None
