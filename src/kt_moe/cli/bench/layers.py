"""A layer of experts in one loop for all contestants, with random weights, LoRA, routes and hidden states.

The same seed gives the same numbers in every process of one machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kt_moe
from kt_moe.cli.bench.cases import Case, Shape
from kt_moe.functional import LORA_NAMES

SCALING = 2.0  # alpha / r of every LoRA product

Layer = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]  # x, ids, weights, LoRA -> [T, H]
Weights = tuple[Tensor, Tensor, Tensor]  # gate, up [E, I, H]; down [E, H, I]; bf16
Step = tuple[float, ...]  # seconds of forward and of backward, or of both together


class Inputs(NamedTuple):
    """What goes into a layer, and the gradient that comes back.

    Attributes:
        hidden_states, grad_out: [T, H] bf16.
        routes: by variant; expert ids [T, K] int64 and weights [T, K] fp32, whose sum is 1.
        lora: as `kt_moe.moe` takes it.
    """

    hidden_states: Tensor
    grad_out: Tensor
    routes: list[tuple[Tensor, Tensor]]
    lora: dict[str, Tensor]


def make_inputs(case: Case) -> Inputs:
    """Inputs of a case."""
    generator = torch.Generator().manual_seed(0)
    size = (case.tokens, case.shape.hidden)
    x, grad_out = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    scores = torch.randn(case.variants, case.tokens, case.shape.experts, generator=generator)
    top, ids = scores.topk(case.shape.topk)
    return Inputs(x, grad_out, [*zip(ids, top.softmax(-1), strict=True)], make_lora(case.shape, case.rank))


def make_weights(shape: Shape, seed: int = 0) -> Weights:
    """Normal, scaled so that every product's result is about as large as its input."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    gate, up = (_normal((e, i, h), h**-0.5, seed + n) for n in range(2))
    return gate, up, _normal((e, h, i), i**-0.5, seed + 2)


def make_lora(shape: Shape, rank: int) -> dict[str, Tensor]:
    """fp32 LoRA tensors by the names `kt_moe.moe` takes, whose values bf16 has too; none at rank 0."""
    tensors = {}
    for seed, name in enumerate(LORA_NAMES if rank else ()):
        into, out = (shape.hidden, shape.intermediate)[:: -1 if name.startswith("down") else 1]
        size = (shape.experts, rank, into) if name.endswith("a") else (shape.experts, out, rank)
        tensors[name] = _normal(size, 0.02, seed).float()
    return tensors


def _normal(size: tuple[int, int, int], scale: float, seed: int) -> Tensor:
    """bf16. Every expert has the numbers of the first in another order: to draw all would take minutes."""
    generator = torch.Generator().manual_seed(seed)
    first = (torch.randn(size[1:], generator=generator) * scale).bfloat16()
    every = torch.empty(size, dtype=torch.bfloat16)
    for expert in range(size[0]):
        every[expert] = first.roll(17 * expert)
    return every


def make_experts(format: str, settings: argparse.Namespace, number: int = 1) -> list[kt_moe.Experts]:
    """kt_moe's, of that many layers."""
    gpu = kt_moe.Gpu("cuda", settings.gpu_memory) if settings.device == "cuda" else "off"
    return [kt_moe.Experts(*make_weights(settings.shape), format=format, gpu=gpu) for _ in range(number)]


class OneLayer:
    """A contestant: a layer on the CPU as a differentiable function.

    Args:
        layer: a function of hidden states [T, H], ids and weights [T, K], and LoRA as `kt_moe.moe` takes it.
        lora_dtype: of the LoRA tensors.
        dtype: of hidden states and routing weights; None: bf16 and fp32.
    """

    def __init__(
        self, layer: Layer, lora_dtype: torch.dtype = torch.float32, dtype: torch.dtype | None = None
    ) -> None:
        self._layer, self._lora_dtype, self._dtype = layer, lora_dtype, dtype

    def prepare(self, case: Case) -> None:
        """Get ready for the steps of a case. ValueError: it cannot be run."""
        self._variants, inputs = case.variants, make_inputs(case)
        self._x = inputs.hidden_states.to(self._dtype).detach().requires_grad_()
        self._grad_out = inputs.grad_out.to(self._dtype)
        self._routes = [(ids, w.to(self._dtype).detach().requires_grad_()) for ids, w in inputs.routes]
        copies = {name: t.to(self._lora_dtype, copy=True) for name, t in inputs.lora.items()}
        self._lora = {name: tensor.requires_grad_() for name, tensor in copies.items()}

    def step(self, variant: int) -> Step:
        """One forward and backward."""
        ids, weights = self._routes[variant]
        leaves = {"hidden_states": self._x, "topk_weights": weights, **self._lora}
        for leaf in leaves.values():
            leaf.grad = None
        begin = time.perf_counter()
        out = self._layer(self._x, ids, weights, self._lora)
        middle = time.perf_counter()
        torch.autograd.backward(out, self._grad_out)
        end = time.perf_counter()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        self._results = {"out": out.detach(), **grads}
        return middle - begin, end - middle

    def turn(self, seconds: float) -> list[Step]:
        """Steps for about `seconds`, at least one; an untimed one wakes caches, clocks and threads first."""
        self.step(self._variants - 1)
        steps: list[Step] = []
        end = time.perf_counter() + seconds
        while not steps or time.perf_counter() < end:
            steps.append(self.step(len(steps) % self._variants))
        return steps

    def figures(self) -> dict[str, Any]:
        """What is known of the last turn beside its times."""
        return {}

    def outputs(self) -> dict[str, Any]:
        """Of a step, as fp64 arrays: "out", and the gradients by the names of the tensors."""
        self.step(0)
        return {name: tensor.double().numpy() for name, tensor in self._results.items()}
