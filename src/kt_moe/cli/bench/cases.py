"""What is timed: shapes of layers, and cases with their work and traffic, against the machine's ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kt_moe.cli.terminal import table

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
    """

    shape: Shape
    tokens: int
    rank: int

    @property
    def variants(self) -> int:
        """Sets of routes that steps take in turn, so that few tokens' experts do not stay in a cache."""
        return max(1, min(16, self.shape.experts // (self.tokens * self.shape.topk)))

    @property
    def touched(self) -> float:
        """Experts that have tokens, in the mean, as each token takes K of E at random."""
        s = self.shape
        return s.experts * (1 - (1 - s.topk / s.experts) ** self.tokens)

    def flops(self) -> float:
        """Multiplications and additions of a layer that the mathematics needs.

        A LoRA pair is two products in forward and four in backward: two to its input, one each to A and B.
        """
        s, routes = self.shape, 2.0 * self.tokens * self.shape.topk
        return routes * (6 * s.hidden * s.intermediate + 9 * self.rank * (s.hidden + s.intermediate))

    def bytes(self) -> float:
        """Bytes of a layer that must pass between memory and cores.

        Each pass reads weights and LoRA pairs of the experts with tokens once. Forward reads the hidden
        states and writes as many; backward reads them and the output's gradient, and writes theirs and the
        LoRA gradients of all experts, which autograd wants dense.
        """
        s = self.shape
        lora = self.rank * 3 * (s.hidden + s.intermediate) * 4
        states = self.tokens * s.hidden * 2
        return 2 * self.touched * (s.expert_bytes + lora) + 5 * states + s.experts * lora

    def limits(self, seconds: float, ceilings: dict[str, Spread]) -> dict[str, Any]:
        """Work and traffic of both passes, the seconds that they take at least, and their part of `seconds`.

        ceilings: by the names of `_core.measure_ceilings`.
        """
        work, rates = {"flops": self.flops(), "bytes": self.bytes()}, {"flops": "l2_all", "bytes": "read_all"}
        least = {name: amount / ceilings[rates[name]]["median"] for name, amount in work.items()}
        most = max(least.values())
        bound = "compute" if most == least["flops"] else "memory"
        return {**work, "bound": bound, "limit_seconds": most, "share_of_limit": most / seconds}


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample; quartiles are interpolated between samples."""
    two = [*samples, *samples][: max(2, len(samples))]
    q1, median, q3 = statistics.quantiles(two, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "count": len(samples)}


def ceilings_table(found: dict[str, Spread], threads: int) -> str:
    """Ceilings on one thread and on all of them, and what more threads give."""
    rows = [["ceilings", "1 thread", f"{threads} threads", "all over one"]]
    for name, label, unit in (
        ("registers", "multiply-add on registers alone, TFLOP/s", 1e12),
        ("l1", "micro-kernel, operands in L1, TFLOP/s", 1e12),
        ("l2", "micro-kernel, A from L2, TFLOP/s", 1e12),
        ("read", "memory read, GB/s", 1e9),
    ):
        one, every = (found[f"{name}_{many}"]["median"] for many in ("one", "all"))
        rows.append([label, f"{one / unit:.3f}", f"{every / unit:.3f}", f"{every / one:.2f}x"])
    return table(rows, right=(1, 2, 3))
