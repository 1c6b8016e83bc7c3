"""Who is timed, and how: layers of experts in one loop for all of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kt_moe
from kt_moe.cli.bench.cases import GIB, Case
from kt_moe.cli.bench.inputs import make_inputs, make_weights

SCALING = 2.0  # alpha / r of every LoRA product

Step = tuple[float, ...]  # seconds of forward and of backward, or of both together
Layer = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]  # x, ids, weights, LoRA -> [T, H]


@dataclass
class Stack:
    """Layers as a differentiable function: one, or x = x + layer(x) for each.

    Attributes:
        layers: functions of hidden states [T, H], ids and weights [T, K], and LoRA as `kt_moe.moe` takes it.
        last: tells, after a step, "link_bytes" that experts took, "cpu_rows" (a share), and so on.
        device: of the hidden states; `lora_device` of the LoRA tensors, `lora_dtype` their type.
        dtype: of hidden states and routing weights; None: bf16 and fp32.
        residual: whether a layer adds to its input.
    """

    layers: Sequence[Layer]
    last: Callable[[], dict[str, Any]] = dict
    device: str = "cpu"
    lora_device: str = "cpu"
    lora_dtype: torch.dtype = torch.float32
    dtype: torch.dtype | None = None
    residual: bool = False

    def prepare(self, case: Case) -> None:
        """Get ready for the steps of a case. ValueError: it cannot be run."""
        inputs, place = make_inputs(case), (self.device, self.dtype)
        self._x = inputs.hidden_states.to(*place).detach().requires_grad_()
        self._grad_out = inputs.grad_out.to(*place)
        self._routes = [
            [(ids.to(self.device), w.to(*place).detach().requires_grad_()) for ids, w in layers]
            for layers in inputs.routes
        ]
        self.lora: list[dict[str, Tensor]] = []  # those before go first
        for _ in self.layers:
            copies = {n: t.to(self.lora_device, self.lora_dtype, copy=True) for n, t in inputs.lora.items()}
            self.lora.append({name: tensor.requires_grad_() for name, tensor in copies.items()})

    def step(self, variant: int) -> Step:
        """One forward and backward, the device's work included."""
        routes = self._routes[variant]
        for leaf in (self._x, *(w for _, w in routes), *(t for pairs in self.lora for t in pairs.values())):
            leaf.grad = None
        x = self._x
        synchronize(self.device)
        begin = time.perf_counter()
        for layer, (ids, weights), lora in zip(self.layers, routes, self.lora, strict=True):
            y = layer(x, ids, weights, lora)
            x = x + y if self.residual else y
        synchronize(self.device)
        middle = time.perf_counter()
        torch.autograd.backward(x, self._grad_out)
        synchronize(self.device)
        end = time.perf_counter()
        first = {"hidden_states": self._x, "topk_weights": routes[0][1], **self.lora[0]}
        self._results = {"out": x.detach(), **{n: t.grad for n, t in first.items() if t.grad is not None}}
        return middle - begin, end - middle

    def turn(self, variants: int, seconds: float) -> list[Step]:
        """Steps for about `seconds`, at least one; an untimed one wakes caches, clocks and threads first."""
        self.step(variants - 1)
        peak_bytes(self.device, reset=True)
        steps: list[Step] = []
        end = time.perf_counter() + seconds
        while not steps or time.perf_counter() < end:
            steps.append(self.step(len(steps) % variants))
        return steps

    def outputs(self) -> dict[str, Any]:
        """Of a step, as fp64 arrays: "out", and the gradients of the first layer's tensors by their name."""
        self.step(0)
        return {name: tensor.cpu().double().numpy() for name, tensor in self._results.items()}

    def figures(self) -> dict[str, Any]:
        """What is known of the last turn."""
        peak = {"gpu_bytes": peak_bytes(self.device)} if self.device == "cuda" else {}
        return peak | self.last()


def make(name: str, settings: argparse.Namespace) -> Any:
    """The contestant of that name, in the process that it is timed in."""
    from kt_moe.cli.bench import rivals

    torch.set_num_threads(settings.threads)
    if settings.mode == "step":
        from kt_moe.cli.bench.training import Trainer  # transformers and PEFT, which take seconds to import

        return Trainer(name, settings)
    device, number = settings.device, range(settings.layers)
    place = {"device": device, "lora_device": device, "residual": settings.mode == "gpu"}
    if name.startswith(("kt_moe", "cpu")):
        experts = make_experts(name, settings, settings.layers)
        place["lora_device"] = "cpu" if name == "cpu" else settings.lora_device
        return Stack([kt_layer(one) for one in experts], lambda: kt_figures(experts[0], device), **place)
    weights = make_weights(settings.shape, 0)
    if name == "torch":
        return Stack([rivals.loop_layer(weights)], lora_dtype=torch.bfloat16)
    if name == "grouped_mm":
        return Stack([rivals.grouped_layer([rivals.fuse(weights)], 0)], lora_dtype=torch.bfloat16)
    if name.startswith("kt-kernel"):
        return rivals.KtKernel(weights, settings.threads, max(settings.tokens))
    streamed = rivals.Streamed(weights, settings.layers, device) if name == "streamed" else None
    base = streamed or [rivals.fuse(weights, device=device) for _ in number]
    layers = [rivals.grouped_layer(base, index, recompute=True) for index in number]
    return Stack(layers, lambda: {"link_bytes": streamed.link_bytes if streamed else 0}, **place)


def make_experts(name: str, settings: argparse.Namespace, number: int) -> list[kt_moe.Experts]:
    """kt_moe's, of that many layers: "kt_moe int4" and so on, "kt_moe-resident", or "cpu"."""
    memory, share = settings.gpu_memory, settings.cpu_share
    gpu: kt_moe.Gpu | str = "off"
    if name == "kt_moe-resident":
        memory, share = f"{1.1 * number * settings.shape.weight_bytes / GIB + 1:.0f}GiB", 0.0
    if settings.mode != "layer" and name != "cpu":
        gpu = kt_moe.Gpu(settings.device, memory, share)
    runtime, weights = kt_moe.Runtime(settings.threads, isa=settings.isa), make_weights(settings.shape, 0)
    format, made = name.partition(" ")[2] or settings.format[0], []
    for _ in range(number):
        made.append(kt_moe.Experts(*weights, format=format, runtime=runtime, gpu=gpu))
        made[-1].recompute = settings.recompute
    return made


def kt_layer(experts: kt_moe.Experts) -> Layer:
    """This library, called as a user calls it."""
    return lambda x, ids, weights, lora: kt_moe.moe(x, ids, weights, experts, lora, scaling=SCALING)


def kt_figures(experts: kt_moe.Experts, device: str) -> dict[str, Any]:
    """Of the last forward and backward of every layer that shares these experts' GPU, or their runtime."""
    numbered = torch.empty(0, device=device).device  # "cuda:0", as hidden states have it
    engine = None if experts.gpu.cpu_share == 1.0 else experts.gpu.engine(numbered)
    if engine is None:
        return {"scratch_bytes": experts.runtime.scratch_bytes}
    passes = engine.log.last.values()
    moved, cpu, gpu = (sum(getattr(p, n) for p in passes) for n in ("bytes_moved", "cpu_rows", "gpu_rows"))
    return {"link_bytes": moved, "cpu_rows": cpu / (cpu + gpu)}


def peak_bytes(device: str, reset: bool = False) -> int:
    """The most bytes of tensors on a GPU since the last reset; 0 for the CPU."""
    if device == "cpu":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def synchronize(device: str) -> None:
    """Wait for the device's work."""
    if device != "cpu":
        torch.cuda.synchronize()
