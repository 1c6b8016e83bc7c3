"""Whole training steps of a Qwen3-MoE model with random weights, made from a shape without any file."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import kt_moe
from kt_moe.architectures import architecture_of
from kt_moe.cli.bench.cases import SCALING, Weights, make_lora, make_weights
from kt_moe.cli.bench.contestants import allocated, fuse, grouped_experts, synchronize
from kt_moe.gpu import Gpu
from kt_moe.hf import KtExperts
from kt_moe.host_memory import resident

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_HEADS = {"qwen3-30b-a3b": (32, 4, 128, 151936), "qwen3-235b-a22b": (64, 4, 128, 151936)}
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
        begin = time.perf_counter()
        self._settings, self._device = settings, torch.device(settings.device)
        weights = make_weights(settings.shape, 0)
        if name == "roundpipe":
            pinned = self._device.type == "cuda"
            model = torch_model(weights, settings, torch.device("cpu"), torch.bfloat16, pinned)
        elif name == "resident":
            model = torch_model(weights, settings, self._device, torch.float32)
        else:
            gpu = (
                "off"
                if name == "cpu"
                else kt_moe.Gpu(settings.device, settings.gpu_memory, settings.cpu_share)
            )
            model = kt_model(weights, settings, name.partition(" ")[2] or settings.format[0], gpu)
        if settings.compile:
            for layer in model.model.layers:
                layer.self_attn.compile()
        self._step = roundpipe_step(model) if name == "roundpipe" else torch_step(model, self._device)
        self._vocabulary, self._build_seconds = model.config.vocab_size, time.perf_counter() - begin

    def run(self, tokens: int) -> dict[str, Any]:
        """Times and losses of steps on random tokens, about as many, and the memory that they take."""
        settings, generator = self._settings, torch.Generator().manual_seed(0)
        size = (max(1, tokens // settings.sequence), min(tokens, settings.sequence))
        seconds, losses = [], []
        for number in range(_WARM_UP + settings.reps):
            if number == _WARM_UP:
                allocated(self._device, reset=True)
            ids = torch.randint(self._vocabulary, size, generator=generator)
            begin = time.perf_counter()
            losses.append(self._step(ids))
            seconds.append(time.perf_counter() - begin)
        return {
            "tokens": size[0] * size[1],
            "seconds": seconds[_WARM_UP:],
            "losses": losses,
            "gpu_bytes": allocated(self._device, peak=True),
            "host_bytes": resident("VmHWM"),
            "build_seconds": self._build_seconds,
        }


def torch_step(model: Any, device: torch.device) -> Any:
    """A step on tokens [B, S], which gives the loss: gradient checkpointing, AdamW where LoRA lies."""
    # transformers 5.2x has another name for it, 5.17 only the old one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    on_device = [p for p in trained if p.device.type == device.type]
    optimizer = torch.optim.AdamW(on_device, lr=_LEARNING_RATE, fused=True)
    for parameter in trained:
        if parameter.device.type != device.type:
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
    try:  # its own is compiled now
        adam: Any = roundpipe.optim.Adam(
            trained, lr=_LEARNING_RATE, weight_decay=0.01, decoupled_weight_decay=True
        )
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


def skeleton(settings: argparse.Namespace) -> Any:
    """A model in bf16 on the device, each of whose layers still lacks its experts."""
    shape = settings.shape
    heads, key_heads, size, vocabulary = _HEADS.get(shape.name, (4, 2, 16, 1024))
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
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
    model.to_empty(device=settings.device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    with torch.device(settings.device):  # its buffers are no parameters
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.train()


def kt_model(weights: Weights, settings: argparse.Namespace, format: str, gpu: Gpu | str) -> Any:
    """The model with kt_moe's experts, and LoRA on them and on attention."""
    model = skeleton(settings)
    architecture, runtime = architecture_of(model), kt_moe.Runtime(threads=settings.threads)
    for module, layer in zip(architecture.modules, model.model.layers, strict=True):
        held = kt_moe.Experts(*weights, format=format, runtime=runtime, gpu=gpu)
        held.recompute, held.checkpoint_experts = settings.recompute, settings.checkpoint_experts
        layer.mlp.experts = KtExperts(architecture, module, held)
        layer.mlp.experts.lora_device = "cpu" if gpu == "off" else settings.lora_device
    return _with_lora(model, settings, [*_ATTENTION, "experts"])


def torch_model(
    weights: Weights,
    settings: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    pin: bool = False,
) -> Any:
    """The model in plain torch, all of it on the device, its LoRA in `dtype`.

    pin: the experts, on the CPU, lie in page-locked memory.
    """
    model = _with_lora(skeleton(settings).to(device), settings, _ATTENTION, dtype)
    for layer in model.model.layers:
        base = fuse(weights, device=device, pin_memory=pin)
        layer.mlp.experts = GroupedExperts(base, settings, device, dtype)
    return model


class GroupedExperts(nn.Module):
    """Frozen experts with LoRA by torch's grouped_mm."""

    def __init__(
        self,
        weights: tuple[Tensor, Tensor],
        settings: argparse.Namespace,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(w, requires_grad=False) for w in weights)
        self.lora = nn.ParameterDict()
        for name, tensor in make_lora(settings.shape, settings.rank).items():
            value = torch.zeros_like(tensor) if name.endswith("b") else tensor  # as PEFT begins
            self.lora[name] = nn.Parameter(value.to(device, dtype, copy=True))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]"""
        base = (self.gate_up_proj, self.down_proj)
        return grouped_experts(hidden_states, top_k_index, top_k_weights, base, dict(self.lora.items()))


def _with_lora(
    model: Any, settings: argparse.Namespace, targets: list[str], dtype: torch.dtype = torch.float32
) -> Any:
    """The model with LoRA, all else frozen."""
    config = peft.LoraConfig(r=settings.rank, lora_alpha=SCALING * settings.rank, target_modules=targets)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype is torch.float32)
    return wrapped.get_base_model()
