"""Whole training steps of a Qwen3-MoE model with random weights, made from a shape without any file."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kt_moe.architectures import architecture_of
from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.contestants import SCALING, Step, make_experts, peak_bytes, synchronize
from kt_moe.cli.bench.inputs import make_lora, make_weights
from kt_moe.cli.bench.rivals import Fused, fuse, grouped_experts
from kt_moe.hf import KtExperts
from kt_moe.host_memory import resident

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LOSS_ROWS = 512
_LEARNING_RATE = 1e-4
_WARM_UP = 4  # steps that are not timed: RoundPipe's plan follows from the first three


class Trainer:
    """A contestant's training loop.

    Args:
        name: "cpu", "resident", "roundpipe", or "kt_moe" and a format.
        settings: of `kt-moe bench --gpu --step`, with one rank and one number of threads.
    """

    def __init__(self, name: str, settings: argparse.Namespace) -> None:
        if name == "roundpipe":
            importlib.import_module(name)  # that it is missing is said before a model is made
        begin = time.perf_counter()
        self._sequence, self._device = settings.sequence, settings.device
        model = make_model(name, settings)
        for layer in model.model.layers if settings.compile else ():
            layer.self_attn.compile()
        self._step = roundpipe_step(model) if name == "roundpipe" else torch_step(model, self._device)
        self._vocabulary, self._build_seconds = model.config.vocab_size, time.perf_counter() - begin

    def prepare(self, case: Case) -> None:
        """Random tokens in rows of a sequence, and the first steps, whose losses count and times do not."""
        self._generator = torch.Generator().manual_seed(0)
        self._losses: list[float] = []
        row = min(case.tokens, self._sequence)
        self._size = case.tokens // row, row
        for _ in range(_WARM_UP):
            self.turn(1, 0.0)
        peak_bytes(self._device, reset=True)

    def turn(self, variants: int, seconds: float) -> list[Step]:
        """One step."""
        ids = torch.randint(self._vocabulary, self._size, generator=self._generator)
        begin = time.perf_counter()
        self._losses.append(self._step(ids))
        return [(time.perf_counter() - begin,)]

    def figures(self) -> dict[str, Any]:
        """Losses of all steps, memory of the host and the GPU at its peak, and what making the model took."""
        return {
            "losses": self._losses,
            "gpu_bytes": peak_bytes(self._device),
            "host_bytes": resident("VmHWM"),
            "build_seconds": self._build_seconds,
        }


def make_model(name: str, settings: argparse.Namespace) -> Any:
    """The model in bf16 with LoRA on attention and experts, all else frozen.

    RoundPipe's is on the host, with its experts in page-locked memory and its LoRA in bf16.
    """
    model, ours, dtype = skeleton(settings), name not in ("resident", "roundpipe"), torch.float32
    place = {"device": settings.device}
    if name == "roundpipe":
        dtype, place = torch.bfloat16, {"device": "cpu", "pin_memory": settings.device == "cuda"}
        model.to("cpu")
    if ours:
        architecture, held = architecture_of(model), make_experts(name, settings, settings.layers)
        for module, layer, one in zip(architecture.modules, model.model.layers, held, strict=True):
            one.checkpoint_experts = settings.checkpoint_experts
            layer.mlp.experts = KtExperts(architecture, module, one)
            layer.mlp.experts.lora_device = "cpu" if name == "cpu" else settings.lora_device
    targets = [*_ATTENTION, "experts"] if ours else _ATTENTION
    lora = peft.LoraConfig(r=settings.rank, lora_alpha=SCALING * settings.rank, target_modules=targets)
    peft.get_peft_model(model, lora, autocast_adapter_dtype=dtype is torch.float32)
    if not ours:
        weights = make_weights(settings.shape, 0)
        for layer in model.model.layers:
            layer.mlp.experts = GroupedExperts(fuse(weights, **place), settings, dtype)
    return model


class GroupedExperts(nn.Module):
    """Frozen experts with LoRA by torch's grouped_mm."""

    def __init__(self, weights: Fused, settings: argparse.Namespace, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(w, requires_grad=False) for w in weights)
        self.lora = nn.ParameterDict()
        for name, tensor in make_lora(settings.shape, settings.rank).items():
            value = torch.zeros_like(tensor) if name.endswith("b") else tensor  # as PEFT begins
            self.lora[name] = nn.Parameter(value.to(weights[0].device, dtype, copy=True))

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
    model.to_empty(device=settings.device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    with torch.device(settings.device):  # its buffers are no parameters
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.train()


def torch_step(model: Any, device: str) -> Any:
    """A step on tokens [B, S], which gives the loss: gradient checkpointing, AdamW where LoRA lies."""
    # transformers 5.2x has another name for it, 5.17 only the old one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    on_device = [p for p in trained if p.device.type == device]
    optimizer = torch.optim.AdamW(on_device, lr=_LEARNING_RATE, fused=True)
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
        synchronize(device)
        return float(loss.detach())

    return step


def _update_in_backward(parameter: Tensor) -> None:
    """Let backward update a parameter of the host as soon as its gradient is there.

    The GPU goes on with the layers before it meanwhile. Backward reads the parameter no more.
    """
    optimizer = torch.optim.AdamW([parameter], lr=_LEARNING_RATE, fused=True)

    def update(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]


def roundpipe_step(model: Any) -> Any:
    """The same by RoundPipe 0.1.1 (https://github.com/ITcarrot/RoundPipe), as its documentation has it.

    It keeps all weights in page-locked memory, copies layer after layer to the GPU, keeps hidden states of
    the layers on the host, computes a layer again in backward, and updates on the CPU. What differs from
    kt_moe here: LoRA is bf16 on the GPU with fp32 copies for its optimizer; that runs while the next step
    does, which so uses parameters one update older; a step is two microbatches where there are two rows. Its
    ready-made wrapper of Qwen3-MoE calls transformers by arguments that transformers 5 has dropped, so the
    layers are listed here.
    """
    import roundpipe  # type: ignore[import-not-found,unused-ignore]

    layers = [_First(model.model), *map(_Middle, model.model.layers), _Last(model)]
    pipe = roundpipe.RoundPipe(nn.Sequential(*layers), optim_dtype=torch.float32, name="qwen3_moe")
    trained = list(pipe.optim_parameters())
    decay = {"weight_decay": 0.01, "decoupled_weight_decay": True}
    try:  # its own is compiled now
        adam: Any = roundpipe.optim.Adam(trained, lr=_LEARNING_RATE, **decay)
    except (RuntimeError, OSError) as error:
        print(f"roundpipe.optim.Adam does not compile, torch's AdamW instead: {error}", file=sys.stderr)
        adam = torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)

    def update() -> None:
        adam.step()
        adam.zero_grad()

    def step(ids: Tensor) -> float:
        config = roundpipe.RoundPipeRunConfig(num_microbatch=min(2, len(ids)))
        loss = pipe.forward_backward(input_args=(ids,), run_config=config)
        pipe.step(update)  # at once: the update runs beside the next step
        return float(loss)

    return step


class _First(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens, self.rotary_emb = model.embed_tokens, model.rotary_emb

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        hidden = self.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return hidden, *self.rotary_emb(hidden, positions), ids


class _Middle(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, cosines, sines, ids = state
        return self.layer(hidden, position_embeddings=(cosines, sines)), cosines, sines, ids


class _Last(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, state: tuple[Tensor, ...]) -> Tensor:
        return next_token_loss(self.norm(state[0]), self.lm_head.weight, state[-1])


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
