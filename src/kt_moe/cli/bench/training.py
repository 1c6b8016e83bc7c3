"""Whole training steps of a Qwen3-MoE model with random weights, made from a shape without any file."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kt_moe.architectures import architecture_of
from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.contestants import Step, make_experts
from kt_moe.cli.bench.inputs import SCALING, make_lora, make_weights
from kt_moe.cli.bench.plain import Fused, fuse, grouped_experts
from kt_moe.hf import KtExperts

_VOCABULARY = Qwen3MoeConfig().vocab_size
_LOSS_ROWS = 512
LEARNING_RATE = 1e-4
_WARM_UP = 4  # steps that are not timed


class Trainer:
    """A contestant's training loop.

    Args:
        name: "cpu", "resident", or "kt_moe" and a format.
        settings: of `kt-moe bench --step`.
    """

    def __init__(self, name: str, settings: argparse.Namespace) -> None:
        self._sequence, self._device = settings.sequence, settings.device
        self._step = self.step_of(name, settings)

    def step_of(self, name: str, settings: argparse.Namespace) -> Callable[[Tensor], float]:
        """Make the model; a function of tokens [B, S] that does a step and gives the loss."""
        model = resident_model(settings) if name == "resident" else kt_model(name, settings)
        return torch_step(model, settings.device)

    def prepare(self, case: Case) -> None:
        """Random tokens in rows of a sequence, and the first steps, whose losses count and times do not."""
        self._generator = torch.Generator().manual_seed(0)
        self._losses: list[float] = []
        row = min(case.tokens, self._sequence)
        self._size = case.tokens // row, row
        for _ in range(_WARM_UP):
            self.turn(1, 0.0)
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def turn(self, variants: int, seconds: float) -> list[Step]:
        """One step."""
        ids = torch.randint(_VOCABULARY, self._size, generator=self._generator)
        begin = time.perf_counter()
        self._losses.append(self._step(ids))
        return [(time.perf_counter() - begin,)]

    def figures(self) -> dict[str, Any]:
        """Losses of all steps, and the most memory of the GPU since `prepare`."""
        peak = {"gpu_bytes": torch.cuda.max_memory_allocated()} if self._device == "cuda" else {}
        return {"losses": self._losses, **peak}


def kt_model(name: str, settings: argparse.Namespace) -> Any:
    """The model in bf16 with kt_moe's experts and LoRA on them and on attention, all else frozen."""
    model, held = skeleton(settings), make_experts(name, settings, settings.layers)
    architecture = architecture_of(model)
    for module, layer, one in zip(architecture.modules, model.model.layers, held, strict=True):
        one.checkpoint_experts = settings.checkpoint_experts
        layer.mlp.experts = KtExperts(architecture, module, one)
        layer.mlp.experts.lora_device = "cpu" if name == "cpu" else settings.lora_device or settings.device
    peft.get_peft_model(model, lora_config(settings, "experts"))
    return model


def resident_model(settings: argparse.Namespace) -> Any:
    """The same with experts by torch's grouped_mm."""
    model, weights = skeleton(settings), make_weights(settings.shape, 0)
    peft.get_peft_model(model, lora_config(settings))
    for layer in model.model.layers:
        layer.mlp.experts = GroupedExperts(fuse(weights, device=settings.device), settings)
    return model


def lora_config(settings: argparse.Namespace, *more: str) -> peft.LoraConfig:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", *more]
    return peft.LoraConfig(r=settings.rank, lora_alpha=SCALING * settings.rank, target_modules=targets)


class GroupedExperts(nn.Module):
    """Frozen experts with LoRA by torch's grouped_mm."""

    def __init__(self, weights: Fused, settings: argparse.Namespace) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(w, requires_grad=False) for w in weights)
        self.lora = nn.ParameterDict()
        for name, tensor in make_lora(settings.shape, settings.rank).items():
            value = torch.zeros_like(tensor) if name.endswith("b") else tensor  # as PEFT begins
            self.lora[name] = nn.Parameter(value.to(weights[0].device, copy=True))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]"""
        base = (self.gate_up_proj, self.down_proj)
        return grouped_experts(hidden_states, top_k_index, top_k_weights, base, dict(self.lora.items()))


def skeleton(settings: argparse.Namespace) -> Any:
    """A Qwen3-MoE model of the shape on the device, each of whose layers still lacks its experts.

    As in all models of that family, a head has 128 columns, and 64 columns of the hidden size have one head.
    """
    shape, heads = settings.shape, max(1, settings.shape.hidden // 64)
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.topk,
        norm_topk_prob=True,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(4, heads),
        head_dim=128,
        use_cache=False,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).bfloat16()
    architecture_of(model)  # remembered for the model without experts
    for layer in model.model.layers:
        layer.mlp.experts = nn.Identity()
        if settings.compile:
            layer.self_attn.compile()
    model.to_empty(device=settings.device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    with torch.device(settings.device):  # its buffers are no parameters
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.train()


def torch_step(model: Any, device: str) -> Callable[[Tensor], float]:
    """A step on tokens [B, S], which gives the loss: gradient checkpointing, AdamW where LoRA lies."""
    # transformers 5.2x has another name for it, 5.17 only the old one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    on_device = [p for p in trained if p.device.type == device]
    optimizer = torch.optim.AdamW(on_device, lr=LEARNING_RATE, fused=True)
    for parameter in trained:
        if parameter.device.type != device:
            _update_in_backward(parameter)

    def step(ids: Tensor) -> float:
        ids = ids.to(device)
        hidden = model.model(input_ids=ids).last_hidden_state
        loss = next_token_loss(hidden, model.lm_head.weight, ids)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return step


def _update_in_backward(parameter: Tensor) -> None:
    """Let backward update a parameter of the host as soon as its gradient is there.

    The GPU goes on with the layers before it meanwhile. Backward reads the parameter no more.
    """
    optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, fused=True)

    def update(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]


def next_token_loss(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Mean loss of predicting each token from the one before; hidden [B, S, H], head [V, H], ids [B, S].

    The logits exist for some rows at a time, and are made again in backward.
    """

    def part(rows: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(linear(rows, head).float(), labels, reduction="sum")

    rows, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    pairs = zip(torch.split(rows, _LOSS_ROWS), torch.split(labels, _LOSS_ROWS), strict=True)
    parts = [checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.stack(parts).sum() / len(labels)
