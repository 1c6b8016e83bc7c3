"""MoELayer: the experts with their LoRA parameters, as a torch module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kt_moe.experts import Experts
from kt_moe.functional import Lora, MoEFunction


def outer_sizes(num_experts: int, projection: str) -> tuple[int, int]:
    """How many A's and B's a projection has where the outer one, on the hidden size's side, is shared."""
    return (num_experts, 1) if projection == "down" else (1, num_experts)


class MoELayer(nn.Module):
    """Frozen routed experts with trainable LoRA on some of their projections.

    Args:
        experts: the frozen weights; not part of the state dict.
        rank: r of every LoRA pair.
        alpha: numerator of the scaling.
        dropout: probability of dropping an element of a LoRA product's input while training.
        targets: which of "gate", "up" and "down" get a LoRA pair; None: all that the experts have.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
        dtype: of the LoRA parameters, fp32 or bf16.
        shared_outer: whether A of gate and up, and B of down, are one matrix [1, ...] for all experts.

    Parameters are named `{projection}_lora_a` and `{projection}_lora_b`. A starts Kaiming-uniform as in PEFT,
    B at zero.
    """

    def __init__(
        self,
        experts: Experts,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        shared_outer: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(experts, Experts):
            raise TypeError(f"experts is a {type(experts).__name__}, wanted kt_moe.Experts")
        targets = experts.projections if targets is None else targets
        unknown = [t for t in targets if t not in experts.projections]
        if unknown or isinstance(targets, str) or len(set(targets)) < len(targets):
            raise ValueError(f"targets is {targets!r}, wanted some of {list(experts.projections)}")
        if rank < 1:
            raise ValueError(f"rank is {rank}, wanted at least 1")
        self.experts, self.rank, self.alpha, self.targets = experts, rank, alpha, tuple(targets)
        self.lora = Lora(alpha / (math.sqrt(rank) if use_rslora else rank), dropout)
        e, h, i = experts.num_experts, experts.hidden_size, experts.intermediate_size
        for projection in self.targets:
            into, out = (i, h) if projection == "down" else (h, i)
            experts_a, experts_b = outer_sizes(e, projection) if shared_outer else (e, e)
            a = torch.empty(experts_a, rank, into, dtype=dtype)
            bound = into**-0.5  # that of kaiming_uniform_(a=sqrt(5)) on one [r, in] matrix
            nn.init.uniform_(a, -bound, bound)
            setattr(self, f"{projection}_lora_a", nn.Parameter(a))
            setattr(
                self, f"{projection}_lora_b", nn.Parameter(torch.zeros(experts_b, out, rank, dtype=dtype))
            )

    def lora_params(self) -> dict[str, Tensor]:
        """The LoRA tensors under the names `kt_moe.moe` takes."""
        # by name: named_parameters() leaves out a tensor that two projections share
        names = (f"{projection}_lora_{matrix}" for projection in self.targets for matrix in "ab")
        return {name: getattr(self, name) for name in names}

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]; see `MoEFunction.apply`."""
        lora = self.lora if self.training else Lora(self.lora.scaling)
        pairs = self.lora_params()
        out: Tensor = MoEFunction.apply(hidden_states, topk_ids, topk_weights, self.experts, lora, **pairs)
        return out

    def extra_repr(self) -> str:
        return f"{self.experts!r}, rank={self.rank}, alpha={self.alpha}, targets={self.targets}"
