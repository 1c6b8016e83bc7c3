"""The layer in plain PyTorch: the truth (float64) and the competitor (bf16 eager) that every result is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


@dataclass
class Problem:
    """Inputs of one layer call, and the gradient that comes back to it."""

    weights: tuple[Tensor, Tensor, Tensor]  # gate, up [E, I, H]; down [E, H, I]; bf16
    hidden_states: Tensor  # [T, H] bf16
    topk_ids: Tensor  # [T, K]; E means no route
    topk_weights: Tensor  # [T, K] fp32
    lora: dict[str, Tensor]
    scaling: tuple[float, float, float]
    grad_out: Tensor  # [T, H] bf16

    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient."""
        return {"hidden_states": self.hidden_states, "topk_weights": self.topk_weights, **self.lora}


def moe(hidden_states, topk_ids, topk_weights, weights, lora, scaling, masks=None) -> Tensor:
    """The mathematics, expert by expert, in whatever dtype the tensors have.

    masks: projection -> [T, K, in] factors of the LoRA A product's input (dropout), or None.
    """
    names = ("gate", "up", "down")
    out = torch.zeros_like(hidden_states)
    for e in range(weights[0].shape[0]):
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue

        def project(x, p, e=e, token=token, slot=slot):
            y = F.linear(x, weights[p][e])
            a, b = lora.get(f"{names[p]}_lora_a"), lora.get(f"{names[p]}_lora_b")
            if a is None:
                return y
            dropped = x if masks is None else x * masks[names[p]][token, slot].to(x.dtype)
            return y + scaling[p] * F.linear(F.linear(dropped, a[e]), b[e])

        x = hidden_states[token]
        y = project(F.silu(project(x, 0)) * project(x, 1), 2)
        out = out.index_add(0, token, y * topk_weights[token, slot, None].to(y.dtype))
    return out


def run(problem: Problem, dtype: torch.dtype, masks=None) -> dict[str, Tensor]:
    """`out` and the gradient of every leaf, computed in `dtype`."""
    leaves = {k: v.detach().to(dtype, copy=True).requires_grad_() for k, v in problem.leaves().items()}
    lora = {k: v for k, v in leaves.items() if k in LORA_NAMES}
    weights = tuple(w.to(dtype) for w in problem.weights)
    out = moe(leaves["hidden_states"], problem.topk_ids, leaves["topk_weights"], weights, lora, problem.scaling, masks)
    out.backward(problem.grad_out.to(dtype))
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return {"out": out.detach(), **grads}


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth|; the absolute error when the truth is zero."""
    norm = truth.double().norm().item()
    return (result.double() - truth.double()).norm().item() / (norm or 1.0)
