"""What is timed: shapes of layers, and cases with their work and traffic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

MIB, GIB = 2**20, 2**30

Spread = dict[str, float]  # median and quartiles of repeated measurements, and their count


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer: H, I, E and K."""

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
        return f"H {self.hidden}, I {self.intermediate}, E {self.experts}, K {self.topk}"


# From each model's config.json. gpt-oss has another activation and biases: its shape is timed with SiLU.
PRESETS = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "qwen3-235b-a22b": Shape(4096, 1536, 128, 8),
    "deepseek-v3": Shape(7168, 2048, 256, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "gpt-oss-120b": Shape(2880, 2880, 128, 4),
    "kimi-k2": Shape(7168, 2048, 384, 8),
}


@dataclass(frozen=True)
class Case:
    """A batch of tokens through a layer or a model, forward and backward.

    Args:
        rank: of the LoRA pairs on gate, up and down; 0 means none.
        variants: sets of routes the steps take in turn, so that few tokens' experts do not stay in a cache.
    """

    shape: Shape
    tokens: int
    rank: int
    variants: int = 1

    def flops(self) -> float:
        """Multiplications and additions of a layer that the mathematics needs.

        A LoRA pair is two products in forward and four in backward: two to its input, one each to A and B.
        """
        s, routes = self.shape, 2.0 * self.tokens * self.shape.topk
        return routes * (6 * s.hidden * s.intermediate + 9 * self.rank * (s.hidden + s.intermediate))

    def bytes(self, touched: float) -> float:
        """Bytes of a layer that must pass between memory and cores where `touched` experts have tokens.

        Each pass reads these experts' weights and LoRA pairs once. Forward reads the hidden states and writes
        as many; backward reads them and the output's gradient, and writes theirs and the LoRA gradients of
        all experts, which autograd wants dense.
        """
        s = self.shape
        lora = self.rank * 3 * (s.hidden + s.intermediate) * 4
        states = self.tokens * s.hidden * 2
        return 2 * touched * (s.expert_bytes + lora) + 5 * states + s.experts * lora

    def limited_to(self, flops: float) -> Case:
        """The same with no more tokens than `flops` suffice for, and one set of routes."""
        tokens = int(flops / (self.flops() / self.tokens))
        return replace(self, tokens=max(1, min(self.tokens, tokens)), variants=1)


def variants_of(shape: Shape, tokens: int, cache_bytes: int) -> int:
    """Sets of routes needed so that a step finds none of its experts in a cache of this size; at most 16."""
    touched = min(shape.experts, tokens * shape.topk) * shape.expert_bytes
    return max(1, min(16, shape.experts // (tokens * shape.topk), -(-4 * cache_bytes // touched)))


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample; quartiles are interpolated between samples."""
    two = [*samples, *samples][: max(2, len(samples))]
    q1, median, q3 = statistics.quantiles(two, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "count": len(samples)}
