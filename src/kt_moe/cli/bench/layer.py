"""What is timed: layer shapes, cases, and how much work and memory a case is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kt_moe.cli.errors import UserError

PASSES = ("forward", "backward", "both")
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
    """One line of the benchmark: a batch of tokens through the layer, forward and backward.

    Args:
        rank: of the LoRA pairs on gate, up and down; 0 means none.
        routing: "uniform", or "skewed" (one expert gets almost every token, most get few).
        lora_dtype: "fp32" or "bf16".
        variants: sets of routes the steps take in turn, so that few tokens' experts do not stay in a cache.
    """

    shape: Shape
    tokens: int
    rank: int
    routing: str = "uniform"
    lora_dtype: str = "fp32"
    variants: int = 1

    def __str__(self) -> str:
        return f"tokens {self.tokens}, rank {self.rank}"

    @property
    def lora_numbers(self) -> int:
        """Elements of all LoRA tensors together."""
        return self.shape.experts * self.rank * 3 * (self.shape.hidden + self.shape.intermediate)

    def memory(self) -> int:
        """About how many bytes a step needs beside the weights, at least."""
        routes = self.tokens * self.shape.topk
        # LoRA: drawn in bf16, kept in up to fp32 by the inputs and by their leaf, and its gradient. Routes: G
        # and U saved, h, dG and dU as scratch. Tokens: six matrices in bf16, sums in fp32.
        return (
            14 * self.lora_numbers
            + 10 * routes * self.shape.intermediate
            + 20 * self.tokens * self.shape.hidden
        )

    def flops(self) -> dict[str, float]:
        """Multiplications and additions that the mathematics needs, by pass.

        A LoRA pair is two products in forward and four in backward (two to its input, one each to A and B).
        What is computed twice, as with --recompute, counts once.
        """
        s = self.shape
        base = 2.0 * self.tokens * s.topk * 3 * s.hidden * s.intermediate
        lora = 2.0 * self.tokens * s.topk * self.rank * 3 * (s.hidden + s.intermediate)
        forward, backward = base + lora, base + 2 * lora
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def bytes(self, touched: float) -> dict[str, float]:
        """Bytes that must pass between memory and cores where `touched` experts have tokens, by pass.

        Each pass reads these experts' weights and LoRA pairs once. Forward reads the hidden states and writes
        as many; backward reads them and the output's gradient, and writes theirs and the LoRA gradients of
        all experts, which autograd wants dense.
        """
        s = self.shape
        lora = self.lora_numbers // s.experts * (4 if self.lora_dtype == "fp32" else 2)
        states = self.tokens * s.hidden * 2
        read = touched * (s.expert_bytes + lora)
        forward = read + 2 * states
        backward = read + 3 * states + s.experts * lora
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def limited_to(self, flops: float) -> Case:
        """The same with no more tokens than `flops` suffice for, and one set of routes."""
        tokens = int(flops / (self.flops()["both"] / self.tokens))
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
