"""Random weights and inputs of a case: the same for the same seed, in every process of one machine."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_moe.cli.bench.layer import Case, Shape
from kt_moe.functional import LORA_NAMES

Weights = tuple[Tensor, Tensor, Tensor]  # gate, up [E, I, H]; down [E, H, I]; bf16

_CHUNK = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """What goes into a layer call, and the gradient that comes back.

    Attributes:
        hidden_states: [T, H] bf16.
        topk_ids: a [T, K] int64 for each variant of the case.
        topk_weights: a [T, K] fp32 for each variant; a token's sum is 1.
        lora: the tensors `kt_moe.moe` takes, empty at rank 0; their values are bf16 whatever their dtype.
        grad_out: [T, H] bf16.
    """

    hidden_states: Tensor
    topk_ids: list[Tensor]
    topk_weights: list[Tensor]
    lora: dict[str, Tensor]
    grad_out: Tensor

    @property
    def touched(self) -> float:
        """Experts with tokens, the mean over the variants."""
        return sum(len(set(ids.flatten().tolist())) for ids in self.topk_ids) / len(self.topk_ids)

    def digest(self) -> list[int]:
        """Tells whether two processes made the same inputs."""
        return digest({"x": self.hidden_states, "g": self.grad_out, **self.lora}) + [
            int((ids * torch.arange(1, ids.numel() + 1).view_as(ids)).sum()) for ids in self.topk_ids
        ]


def digest(tensors: dict[str, Tensor]) -> list[int]:
    """A number for each tensor that a change of its bits would change."""
    bits = {2: torch.int16, 4: torch.int32}
    return [int(t.contiguous().view(bits[t.element_size()]).sum()) for t in tensors.values()]


def make_weights(shape: Shape, seed: int) -> Weights:
    """Normal, scaled so that every product's result is about as large as its input."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    pool = _Pool(seed)
    return pool.take((e, i, h), h**-0.5), pool.take((e, i, h), h**-0.5), pool.take((e, h, i), i**-0.5)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Inputs of a case; those of all cases of one rank have the same LoRA tensors."""
    generator = torch.Generator().manual_seed(seed)
    size = (case.tokens, case.shape.hidden)
    hidden_states = torch.randn(size, generator=generator).bfloat16()
    grad_out = (torch.randn(size, generator=generator) * 0.1).bfloat16()
    routes = [draw_routes(case, generator) for _ in range(case.variants)]
    lora = make_lora(case.shape, case.rank, seed)
    return Inputs(
        hidden_states,
        [ids for ids, _ in routes],
        [weights for _, weights in routes],
        {name: tensor.to(DTYPES[case.lora_dtype]) for name, tensor in lora.items()},
        grad_out,
    )


def make_lora(shape: Shape, rank: int, seed: int) -> dict[str, Tensor]:
    """bf16 LoRA tensors by the names `kt_moe.moe` takes; none at rank 0."""
    if rank == 0:
        return {}
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    pool = _Pool(seed + 1)
    sizes = {"gate": (h, i), "up": (h, i), "down": (i, h)}
    tensors = {}
    for name in LORA_NAMES:
        into, out = sizes[name.split("_")[0]]
        tensors[name] = pool.take((e, rank, into) if name.endswith("a") else (e, out, rank), 0.02)
    return tensors


def draw_routes(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [T, K] and weights [T, K]: experts drawn without replacement, a softmax over their scores.

    A score is log p + Gumbel noise.
    """
    experts = torch.arange(1, case.shape.experts + 1)
    popularity = -1.5 * experts.log() if case.routing == "skewed" else torch.zeros(case.shape.experts)
    uniform = torch.rand(case.tokens, case.shape.experts, generator=generator)
    scores = popularity - (-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
    top, ids = scores.topk(case.shape.topk)
    return ids, top.softmax(-1)


class _Pool:
    """Hands out normal numbers, each tensor pieced together from random places of one list of them.

    Gigabytes are then a copy away; drawing each number would take longer than the benchmark.
    """

    def __init__(self, seed: int) -> None:
        self._numbers = torch.randn(2 * _CHUNK, generator=torch.Generator().manual_seed(seed))
        self._places = random.Random(seed)

    def take(self, size: tuple[int, ...], scale: float) -> Tensor:
        tensor = torch.empty(size, dtype=torch.bfloat16)
        numbers = (self._numbers * scale).bfloat16()
        for piece in torch.split(tensor.view(-1), _CHUNK):
            start = self._places.randrange(_CHUNK)
            piece.copy_(numbers[start : start + len(piece)])
        return tensor
