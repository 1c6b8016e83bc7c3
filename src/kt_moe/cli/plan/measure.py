"""Forward and backward of one layer of a model's shapes on this machine, in seconds and bytes.

Of a large layer only some experts are made, and get the tokens they would have among all: the work of an
expert is the same, and the layer's time is that of its experts together.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from kt_moe import Experts, Runtime
from kt_moe.cli.bench.cases import Case, Shape, make_weights
from kt_moe.cli.bench.contestants import KtMoe, Step
from kt_moe.cli.plan.memory import scratch_bytes
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.shapes import ExpertLayer
from kt_moe.experts import PROJECTIONS
from kt_moe.host_memory import resident

_SECONDS = 3.0  # of timed steps, about
_WEIGHTS = 1 << 29  # bytes of bf16 weights, about
_PILOT = 64  # tokens of the step that tells how many are affordable


@dataclass(frozen=True)
class Speed:
    """What a short run of one layer took.

    Attributes:
        forward, backward: seconds of the whole layer with all its tokens.
        experts, tokens: that were really there.
        scratch: bytes of the runtime's scratch memory with all tokens.
    """

    forward: float
    backward: float
    experts: int
    tokens: int
    scratch: int
    isa: str
    threads: int

    def tokens_per_second(self, layers: int, tokens: int, twice: bool) -> float:
        """Of all layers one after the other; twice: checkpointing computes forward again."""
        return tokens / (layers * (self.forward * (2 if twice else 1) + self.backward))


def process_bytes() -> int:
    """Resident bytes of this process once PyTorch has loaded what a training step uses of it."""
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    heads = functional.silu(x @ x).view(1, 64, 4, 16).transpose(1, 2)
    out = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    functional.cross_entropy(out.float().reshape(-1, 16), torch.zeros(256, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([x]).step()
    return resident()


def sample(layer: ExpertLayer, tokens: int, free: int) -> tuple[int, int] | None:
    """How many experts to make, and how many tokens give them the rows they have in the whole layer.

    None if a quarter of the free memory does not hold the experts of one token twice.
    """
    expert = len(layer.projections) * layer.hidden * layer.intermediate * 2
    if 2 * layer.topk * expert > free // 4:
        return None
    experts = min(layer.experts, max(layer.topk, min(_WEIGHTS, free // 8) // expert))
    return experts, max(1, round(tokens * experts / layer.experts))


def measure(layer: ExpertLayer, run: Run, format: str, runtime: Runtime, free: int) -> Speed | None:
    """Time the layer with random weights and routes; None if there is no memory for it."""
    found = sample(layer, run.tokens, free)
    if found is None:
        return None
    experts, tokens = found
    shape = Shape("planned", layer.hidden, layer.intermediate, experts, layer.topk)
    one = KtMoe([make_experts(shape, layer, format, runtime)])

    def steps(tokens: int, seconds: float) -> list[Step]:
        one.prepare(Case(shape, tokens, run.rank))
        projections = set(run.projections) & set(layer.projections)
        one.lora = [{n: t for n, t in one.lora[0].items() if n.split("_")[0] in projections}]
        return one.turn(1, seconds)

    pilot = min(tokens, _PILOT)
    affordable = max(pilot, int(pilot * _SECONDS / (3 * sum(steps(pilot, 0.0)[0]))))
    tokens = min(tokens, affordable)
    forward, backward = (statistics.median(times) for times in zip(*steps(tokens, _SECONDS), strict=True))
    more = run.tokens / tokens
    here = replace(run, batch=1, sequence=tokens)
    rows = tokens * layer.topk // experts  # of an expert, at least in the largest block
    rest = scratch_bytes(layer, run, runtime.threads) - scratch_bytes(layer, here, runtime.threads, rows)
    return Speed(
        forward * more, backward * more, experts, tokens,
        runtime.scratch_bytes + rest, runtime.isa, runtime.threads,
    )  # fmt: skip


def make_experts(shape: Shape, layer: ExpertLayer, format: str, runtime: Runtime) -> Experts:
    """Random ones like the layer's; the values of biases cost nothing, so theirs are zero."""
    made = dict(zip(PROJECTIONS, make_weights(shape, seed=0), strict=True))
    weights: dict[str, Any] = {"gate": None, **{p: made[p] for p in layer.projections}}
    if layer.biases:
        shapes = {p: made[p].shape[:2] for p in layer.projections}
        weights |= {f"{p}_bias": torch.zeros(*size, dtype=torch.bfloat16) for p, size in shapes.items()}
    return Experts(**weights, activation=layer.activation, format=format, runtime=runtime)
