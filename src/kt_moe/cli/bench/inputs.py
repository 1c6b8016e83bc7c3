"""Random weights, LoRA tensors, routes and hidden states of a case.

The same seed gives the same numbers in every process of one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kt_moe.cli.bench.cases import Case, Shape
from kt_moe.functional import LORA_NAMES

SCALING = 2.0  # alpha / r of every LoRA product

Layer = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]  # x, ids, weights, LoRA -> [T, H]
Weights = tuple[Tensor, Tensor, Tensor]  # gate, up [E, I, H]; down [E, H, I]; bf16
Routes = tuple[Tensor, Tensor]  # expert ids [T, K] int64, weights [T, K] fp32


class Inputs(NamedTuple):
    """What goes into a layer, and the gradient that comes back.

    Attributes:
        hidden_states, grad_out: [T, H] bf16.
        routes: by variant; a token's weights sum to 1.
        lora: as `kt_moe.moe` takes it.
    """

    hidden_states: Tensor
    grad_out: Tensor
    routes: list[Routes]
    lora: dict[str, Tensor]

    @property
    def touched(self) -> float:
        """Experts with tokens, the mean over the variants."""
        return sum(len(torch.unique(ids)) for ids, _ in self.routes) / len(self.routes)


def make_inputs(case: Case) -> Inputs:
    """Inputs of a case."""
    generator = torch.Generator().manual_seed(0)
    size = (case.tokens, case.shape.hidden)
    x, grad_out = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    routes = [_draw_routes(case, generator) for _ in range(case.variants)]
    return Inputs(x, grad_out, routes, make_lora(case.shape, case.rank))


def _draw_routes(case: Case, generator: torch.Generator) -> Routes:
    """Top K of random scores, and their softmax."""
    scores = torch.randn(case.tokens, case.shape.experts, generator=generator)
    top, ids = scores.topk(case.shape.topk)
    return ids, top.softmax(-1)


def make_weights(shape: Shape, seed: int) -> Weights:
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
