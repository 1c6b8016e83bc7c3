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
from transformers import Qwen3MoeConfig

from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.layers import SCALING, Step, make_experts, make_lora, make_weights
from kt_moe.cli.bench.plain import Fused, fuse, grouped_layer
from kt_moe.cli.described import described
from kt_moe.hf.quantizer import put_experts

_VOCABULARY = Qwen3MoeConfig().vocab_size
_LOSS_ROWS = 512
LEARNING_RATE = 1e-4
_WARM_UP = 4  # steps that are not timed


class Trainer:
    """A contestant: a training loop.

    Args:
        step: does a step on tokens [B, S], and gives the loss.
        settings: of `kt-moe bench --step`.
    """

    def __init__(self, step: Callable[[Tensor], float], settings: argparse.Namespace) -> None:
        self._step, self._sequence, self._device = step, settings.sequence, settings.device

    def prepare(self, case: Case) -> None:
        """Random tokens in rows of a sequence, and the first steps, whose losses count and times do not."""
        self._generator = torch.Generator().manual_seed(0)
        self._losses: list[float] = []
        row = min(case.tokens, self._sequence)
        self._size = case.tokens // row, row
        for _ in range(_WARM_UP):
            self.turn()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def turn(self, seconds: float = 0.0) -> list[Step]:
        """One step."""
        ids = torch.randint(_VOCABULARY, self._size, generator=self._generator)
        begin = time.perf_counter()
        self._losses.append(self._step(ids))
        return [(time.perf_counter() - begin,)]

    def figures(self) -> dict[str, Any]:
        """Losses of all steps, and the most memory of the GPU since `prepare`."""
        peak = {"gpu_bytes": torch.cuda.max_memory_allocated()} if self._device == "cuda" else {}
        return {"losses": self._losses, **peak}


def trainer(name: str, settings: argparse.Namespace) -> Trainer:
    """Of the model in bf16, frozen but for LoRA on attention and experts.

    name: "kt_moe" and a format; "resident": its experts by torch's grouped_mm.
    """
    model = skeleton(settings)
    if name == "resident":
        peft.get_peft_model(model, lora_config(settings))
        put_grouped(model, settings, device=settings.device)
    else:
        held = make_experts(name.partition(" ")[2], settings, settings.layers)
        for layer, one in zip(model.model.layers, held, strict=True):
            one.checkpoint_experts = settings.checkpoint_experts
            layer.mlp.experts.load_with(lambda *_, one=one: one)
        peft.get_peft_model(model, lora_config(settings, "experts"))
    return Trainer(torch_step(model, settings.device), settings)


def put_grouped(model: Any, settings: argparse.Namespace, **place: Any) -> None:
    """Give a skeleton experts with LoRA by torch's grouped_mm, where `torch.empty` puts them."""
    weights = make_weights(settings.shape)
    for layer in model.model.layers:
        layer.mlp.experts = GroupedExperts(fuse(weights, **place), settings)


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
        layer = grouped_layer((self.gate_up_proj, self.down_proj))
        return layer(hidden_states, top_k_index, top_k_weights, dict(self.lora.items()))


def skeleton(settings: argparse.Namespace) -> Any:
    """A Qwen3-MoE model of the shape on the device, whose experts (`kt_moe.hf.KtExperts`) have yet to load.

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
    model, architecture = described(config, dtype=torch.bfloat16)
    put_experts(model, architecture, settings.lora_device or settings.device)
    for layer in model.model.layers if settings.compile else ():
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
