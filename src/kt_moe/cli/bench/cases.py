"""What is timed: layer shapes, cases with their work and traffic, and random weights and inputs.

The same seed gives the same numbers in every process of one machine.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kt_moe.cli.errors import UserError
from kt_moe.functional import LORA_NAMES

Weights = tuple[Tensor, Tensor, Tensor]  # gate, up [E, I, H]; down [E, H, I]; bf16
Routes = tuple[Tensor, Tensor]  # expert ids [T, K] int64, weights [T, K] fp32

SCALING = 2.0  # alpha / r of every LoRA product
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer: H, I, E and K."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    topk: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's three matrices in bf16."""
        return 3 * self.hidden * self.intermediate * 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts in bf16."""
        return self.experts * self.expert_bytes

    def __str__(self) -> str:
        return f"{self.name}: H {self.hidden}, I {self.intermediate}, E {self.experts}, K {self.topk}"


# From each model's config.json. gpt-oss has another activation and biases: its shape is timed with SiLU.
PRESETS = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
        Shape("qwen3-235b-a22b", 4096, 1536, 128, 8),
        Shape("deepseek-v3", 7168, 2048, 256, 8),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2),
        Shape("gpt-oss-120b", 2880, 2880, 128, 4),
        Shape("kimi-k2", 7168, 2048, 384, 8),
    )
}


@dataclass(frozen=True)
class Case:
    """A batch of tokens through the layers, forward and backward.

    Args:
        rank: of the LoRA pairs on gate, up and down; 0 means none.
        routing: "uniform", or "skewed" (one expert gets almost every token, most get few).
        variants: sets of routes the steps take in turn, so that few tokens' experts do not stay in a cache.
        layers: each with routes of its own.
    """

    shape: Shape
    tokens: int
    rank: int
    routing: str = "uniform"
    variants: int = 1
    layers: int = 1
    seed: int = 0

    def __str__(self) -> str:
        return f"tokens {self.tokens}, rank {self.rank}"

    def flops(self) -> dict[str, float]:
        """Multiplications and additions of a layer that the mathematics needs, by pass.

        A LoRA pair is two products in forward and four in backward (two to its input, one each to A and B).
        What is computed twice, as with --recompute, counts once.
        """
        s, routes = self.shape, 2.0 * self.tokens * self.shape.topk
        base = routes * 3 * s.hidden * s.intermediate
        lora = routes * self.rank * 3 * (s.hidden + s.intermediate)
        return {"forward": base + lora, "backward": base + 2 * lora, "both": 2 * base + 3 * lora}

    def bytes(self, touched: float) -> dict[str, float]:
        """Bytes of a layer that must pass between memory and cores where `touched` experts have tokens.

        Each pass reads these experts' weights and LoRA pairs once. Forward reads the hidden states and writes
        as many; backward reads them and the output's gradient, and writes theirs and the LoRA gradients of
        all experts, which autograd wants dense.
        """
        s = self.shape
        lora = self.rank * 3 * (s.hidden + s.intermediate) * 4
        states, read = self.tokens * s.hidden * 2, touched * (s.expert_bytes + lora)
        forward, backward = read + 2 * states, read + 3 * states + s.experts * lora
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def limited_to(self, flops: float) -> Case:
        """The same with no more tokens than `flops` suffice for, and one set of routes."""
        tokens = int(flops / (self.layers * self.flops()["both"] / self.tokens))
        return replace(self, tokens=max(1, min(self.tokens, tokens)), variants=1)


def variants_of(shape: Shape, tokens: int, cache_bytes: int) -> int:
    """Sets of routes needed so that a step finds none of its experts in a cache of this size; at most 16."""
    touched = min(shape.experts, tokens * shape.topk) * shape.expert_bytes
    return max(1, min(16, shape.experts // (tokens * shape.topk), -(-4 * cache_bytes // touched)))


def fit_experts(shape: Shape, copies: int, free: int) -> Shape:
    """The shape with as many experts as half of `free` bytes holds `copies` times.

    Raises:
        UserError: not even the experts of one token fit.
    """
    most = free // 2 // (copies * shape.expert_bytes)
    if most < shape.topk:
        need = 2 * copies * shape.topk * shape.expert_bytes
        raise UserError(
            f"{shape.topk} experts of {shape.expert_bytes / MIB:.0f} MiB, held {copies} times, need "
            f"{need / GIB:.1f} GiB of free memory, there are {free / GIB:.1f} GiB"
        )
    return replace(shape, experts=min(shape.experts, most))


@dataclass(frozen=True)
class Inputs:
    """What goes into the layers, and the gradient that comes back.

    Attributes:
        hidden_states: [T, H] bf16.
        routes: by variant, then by layer; a token's weights sum to 1.
        lora: of every layer, as `kt_moe.moe` takes it; their values are bf16 whatever their dtype.
        grad_out: [T, H] bf16.
    """

    hidden_states: Tensor
    routes: list[list[Routes]]
    lora: dict[str, Tensor]
    grad_out: Tensor

    @property
    def touched(self) -> float:
        """Experts of the first layer with tokens, the mean over the variants."""
        return sum(len(set(layers[0][0].flatten().tolist())) for layers in self.routes) / len(self.routes)

    def digest(self) -> list[int]:
        """Tells whether two processes made the same inputs."""
        ids = {f"{v}.{n}": ids for v, layers in enumerate(self.routes) for n, (ids, _) in enumerate(layers)}
        return digest({"x": self.hidden_states, "g": self.grad_out, **self.lora, **ids})


def digest(tensors: dict[str, Tensor]) -> list[int]:
    """A number for each tensor that follows from its bits."""
    return [zlib.crc32(t.cpu().contiguous().view(torch.int16).numpy().tobytes()) for t in tensors.values()]


def make_weights(shape: Shape, seed: int) -> Weights:
    """Normal, scaled so that every product's result is about as large as its input."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    gate, up = (_normal((e, i, h), h**-0.5, seed + n) for n in range(2))
    return gate, up, _normal((e, h, i), i**-0.5, seed + 2)


@lru_cache(maxsize=1)
def make_lora(shape: Shape, rank: int) -> dict[str, Tensor]:
    """fp32 LoRA tensors by the names `kt_moe.moe` takes, whose values bf16 has too; none at rank 0."""
    tensors = {}
    for seed, name in enumerate(LORA_NAMES if rank else ()):
        into, out = (shape.hidden, shape.intermediate)[:: -1 if name.startswith("down") else 1]
        size = (shape.experts, rank, into) if name.endswith("a") else (shape.experts, out, rank)
        tensors[name] = _normal(size, 0.02, seed).float()
    return tensors


@lru_cache(maxsize=1)  # all contestants of a process share them
def make_inputs(case: Case) -> Inputs:
    """Inputs of a case; those of all cases of one rank have the same LoRA tensors."""
    generator = torch.Generator().manual_seed(case.seed)
    size = (case.tokens, case.shape.hidden)
    x, grad_out = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    routes = [[draw_routes(case, generator) for _ in range(case.layers)] for _ in range(case.variants)]
    return Inputs(x, routes, make_lora(case.shape, case.rank), grad_out)


def draw_routes(case: Case, generator: torch.Generator) -> Routes:
    """Experts drawn without replacement, and a softmax over their scores: log p + Gumbel noise."""
    experts = torch.arange(1, case.shape.experts + 1)
    popularity = -1.5 * experts.log() if case.routing == "skewed" else torch.zeros(case.shape.experts)
    uniform = torch.rand(case.tokens, case.shape.experts, generator=generator)
    scores = popularity - (-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
    top, ids = scores.topk(case.shape.topk)
    return ids, top.softmax(-1)


def _normal(size: tuple[int, int, int], scale: float, seed: int) -> Tensor:
    """bf16. Every expert has the numbers of the first in another order: to draw all would take minutes."""
    generator = torch.Generator().manual_seed(seed)
    first = (torch.randn(size[1:], generator=generator) * scale).bfloat16()
    every = torch.empty(size, dtype=torch.bfloat16)
    for expert in range(size[0]):
        every[expert] = first.roll(17 * expert)
    return every
