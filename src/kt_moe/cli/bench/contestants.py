"""Who is timed, and how: a layer of experts in one loop for all of them."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import kt_moe
from kt_moe.cli.bench import plain
from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.inputs import SCALING, Layer, make_inputs, make_weights

Step = tuple[float, ...]  # seconds of forward and of backward, or of both together


@dataclass
class OneLayer:
    """A layer on the CPU as a differentiable function.

    Attributes:
        layer: a function of hidden states [T, H], ids and weights [T, K], and LoRA as `kt_moe.moe` takes it.
        lora_dtype: of the LoRA tensors.
        dtype: of hidden states and routing weights; None: bf16 and fp32.
    """

    layer: Layer
    lora_dtype: torch.dtype = torch.float32
    dtype: torch.dtype | None = None

    def prepare(self, case: Case) -> None:
        """Get ready for the steps of a case. ValueError: it cannot be run."""
        inputs = make_inputs(case)
        self._x = inputs.hidden_states.to(self.dtype).detach().requires_grad_()
        self._grad_out = inputs.grad_out.to(self.dtype)
        self._routes = [(ids, w.to(self.dtype).detach().requires_grad_()) for ids, w in inputs.routes]
        copies = {name: t.to(self.lora_dtype, copy=True) for name, t in inputs.lora.items()}
        self._lora = {name: tensor.requires_grad_() for name, tensor in copies.items()}

    def step(self, variant: int) -> Step:
        """One forward and backward."""
        ids, weights = self._routes[variant]
        leaves = {"hidden_states": self._x, "topk_weights": weights, **self._lora}
        for leaf in leaves.values():
            leaf.grad = None
        begin = time.perf_counter()
        out = self.layer(self._x, ids, weights, self._lora)
        middle = time.perf_counter()
        torch.autograd.backward(out, self._grad_out)
        end = time.perf_counter()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        self._results = {"out": out.detach(), **grads}
        return middle - begin, end - middle

    def turn(self, variants: int, seconds: float) -> list[Step]:
        """Steps for about `seconds`, at least one; an untimed one wakes caches, clocks and threads first."""
        self.step(variants - 1)
        steps: list[Step] = []
        end = time.perf_counter() + seconds
        while not steps or time.perf_counter() < end:
            steps.append(self.step(len(steps) % variants))
        return steps

    def figures(self) -> dict[str, Any]:
        """What is known of the last turn beside its times."""
        return {}

    def outputs(self) -> dict[str, Any]:
        """Of a step, as fp64 arrays: "out", and the gradients by the names of the tensors."""
        self.step(0)
        return {name: tensor.double().numpy() for name, tensor in self._results.items()}


def make(name: str, settings: argparse.Namespace) -> Any:
    """The contestant of that name: one of kt_moe's or torch's, or what a function makes, "FILE.py:NAME"."""
    file, _, function = name.rpartition(":")
    if file:
        sys.path.insert(0, str(Path(file).parent))
        return getattr(import_module(Path(file).stem), function)(settings)
    if settings.step:
        from kt_moe.cli.bench.training import Trainer  # transformers and PEFT, which take seconds to import

        return Trainer(name, settings)

    if name.startswith("kt_moe"):
        (experts,) = make_experts(name, settings, 1)
        return OneLayer(lambda x, ids, w, lora: kt_moe.moe(x, ids, w, experts, lora, scaling=SCALING))
    weights = make_weights(settings.shape, 0)
    layer = plain.loop_layer(weights) if name == "torch" else plain.grouped_layer(plain.fuse(weights))
    return OneLayer(layer, torch.bfloat16)


def make_experts(name: str, settings: argparse.Namespace, number: int) -> list[kt_moe.Experts]:
    """kt_moe's, of that many layers: "kt_moe int4" and so on, or "cpu"."""
    on_gpu = settings.step and settings.device == "cuda" and name != "cpu"
    gpu = kt_moe.Gpu("cuda", settings.gpu_memory) if on_gpu else "off"
    weights, format = make_weights(settings.shape, 0), name.partition(" ")[2] or settings.format[0]
    return [kt_moe.Experts(*weights, format=format, gpu=gpu) for _ in range(number)]
