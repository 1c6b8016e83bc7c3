"""The layer in plain PyTorch: the truth (float64), the rival (bf16 eager), and our own rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

PROJECTIONS = ("gate", "up", "down")
LORA_NAMES = tuple(f"{p}_lora_{m}" for p in PROJECTIONS for m in "ab")
Masks = dict[str, Tensor]  # projection -> [T, K, in], the factor of each input element of its LoRA A product


@dataclass(repr=False)
class Problem:
    """Inputs of one layer call, and the gradient that comes back to it."""

    weights: tuple[Tensor, Tensor, Tensor]  # gate, up [E, I, H]; down [E, H, I]; bf16
    hidden_states: Tensor  # [T, H] bf16
    topk_ids: Tensor  # [T, K]; E means no route
    topk_weights: Tensor  # [T, K] fp32
    lora: dict[str, Tensor]
    scaling: tuple[float, float, float]
    grad_out: Tensor  # [T, H] bf16
    made_by: str  # the call that makes it again
    biases: tuple[Tensor | None, ...] = (None, None, None)  # of gate, up [E, I] and down [E, H]; bf16
    activation: str = "silu"

    def __repr__(self) -> str:
        return self.made_by

    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient."""
        return {"hidden_states": self.hidden_states, "topk_weights": self.topk_weights, **self.lora}


def gpt_oss(G: Tensor, U: Tensor) -> Tensor:
    """As transformers' GptOssExperts has it."""
    gate, up = G.clamp(max=7.0), U.clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda G, U: silu(G) * U,
    "gpt_oss": gpt_oss,
    "clamped_silu": lambda G, U: silu(G.clamp(max=10.0)) * U.clamp(-10.0, 10.0),
    "gelu_tanh": lambda G, U: gelu(G, approximate="tanh") * U,
    "gelu": lambda G, U: gelu(G) * U,
    "softcapped_silu": lambda G, U: 4 * torch.tanh(G / 4) * torch.sigmoid(G) * 25 * torch.tanh(U / 25),
}
LIMITS = {"gpt_oss": 7.0, "clamped_silu": 10.0}  # beyond which there is no gradient


def _saved(activation: str, G: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """What backward gets of G and U: rounded, and still beyond a limit that they were beyond."""
    if limit := LIMITS.get(activation):
        G = torch.where(G.gt(limit), G * (1 + 2**-8), G)
        U = torch.where(U.abs() > limit, U * (1 + 2**-8), U)
    return _round(G), _round(U)


def moe(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: tuple[Tensor, ...],
    lora: dict[str, Tensor],
    scaling: tuple[float, ...],
    masks: Masks | None = None,
    biases: tuple[Tensor | None, ...] = (None, None, None),
    activation: str = "silu",
) -> Tensor:
    """The mathematics, expert by expert, in whatever dtype the tensors have."""
    out = torch.zeros_like(hidden_states)
    for e in range(weights[0].shape[0]):
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue

        def project(x: Tensor, i: int, e: int = e, token: Tensor = token, slot: Tensor = slot) -> Tensor:
            p = PROJECTIONS[i]
            bias = biases[i]
            y = linear(x, weights[i][e], None if bias is None else bias[e])
            if f"{p}_lora_a" not in lora:
                return y
            dropped = x if masks is None else x * masks[p][token, slot].to(x.dtype)
            return y + scaling[i] * linear(linear(dropped, lora[f"{p}_lora_a"][e]), lora[f"{p}_lora_b"][e])

        x = hidden_states[token]
        y = project(ACTIVATIONS[activation](project(x, 0), project(x, 1)), 2)
        out = out.index_add(0, token, y * topk_weights[token, slot, None].to(y.dtype))
    return out


def run(problem: Problem, dtype: torch.dtype, masks: Masks | None = None) -> dict[str, Tensor]:
    """`out` and the gradient of every leaf, computed in `dtype`."""
    leaves = {k: v.detach().to(dtype, copy=True).requires_grad_() for k, v in problem.leaves().items()}
    lora = {k: v for k, v in leaves.items() if k in LORA_NAMES}
    weights = tuple(w.to(dtype) for w in problem.weights)
    hidden_states, topk_weights = leaves["hidden_states"], leaves["topk_weights"]
    biases = tuple(None if b is None else b.to(dtype) for b in problem.biases)
    out = moe(
        hidden_states, problem.topk_ids, topk_weights, weights, lora, problem.scaling, masks,
        biases, problem.activation,
    )  # fmt: skip
    out.backward(problem.grad_out.to(dtype)) if out.requires_grad else None
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return {"out": out.detach(), **grads}


def run_rounded(problem: Problem, masks: Masks | None = None, p_drop: float = 0.0) -> dict[str, Tensor]:
    """float64, but rounded to bf16 exactly where the core rounds: every GEMM operand, once, and the results.

    Forward and backward are written out as src/cpp/README.md has them; what is left of a difference to the
    core is its fp32 accumulation.
    """
    r = _round
    x, grad_out = problem.hidden_states.double(), problem.grad_out.double()
    gate, up, down = (w.double() for w in problem.weights)
    gate_bias, up_bias, down_bias = (
        torch.zeros(w.shape[:2], dtype=torch.float64) if b is None else b.double()
        for w, b in zip(problem.weights, problem.biases, strict=True)
    )
    act = ACTIVATIONS[problem.activation]
    keep = 1.0 - p_drop
    lora = {k: r(v.double()) for k, v in problem.lora.items()}
    out, dx = torch.zeros_like(x), torch.zeros_like(x)
    dw = torch.zeros_like(problem.topk_weights, dtype=torch.float64)
    grads = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in problem.lora.items()}

    for e in range(gate.shape[0]):
        token, slot = (problem.topk_ids == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        w = problem.topk_weights[token, slot, None].double()
        pairs = _pairs(problem, lora, masks, token, slot, e, keep)
        X, dY = x[token], grad_out[token]
        P = {p: r(pairs[p].scale * (X * pairs[p].mask) @ pairs[p].a.T) for p in ("gate", "up")}
        G = X @ gate[e].T + P["gate"] @ pairs["gate"].b.T + gate_bias[e]
        U = X @ up[e].T + P["up"] @ pairs["up"].b.T + up_bias[e]
        h = r(act(G, U))
        Pd = pairs["down"].scale * (h * pairs["down"].mask) @ pairs["down"].a.T
        out.index_add_(0, token, w * (h @ down[e].T + r(Pd) @ pairs["down"].b.T + down_bias[e]))

        Qd = pairs["down"].scale * dY @ pairs["down"].b
        dh = dY @ down[e] + (r(Qd) @ pairs["down"].a) * pairs["down"].mask
        G, U = (v.requires_grad_() for v in _saved(problem.activation, G, U))
        h = act(G, U)
        dG, dU = (r(d) for d in torch.autograd.grad(h, (G, U), w * dh))
        h = h.detach()
        dw[token, slot] = (dh * h).sum(-1) + dY @ down_bias[e]
        h = r(h)
        Q = {p: r(pairs[p].scale * d @ pairs[p].b) for p, d in (("gate", dG), ("up", dU))}
        dx_e = dG @ gate[e] + dU @ up[e]
        for p in ("gate", "up"):
            dx_e = dx_e + (Q[p] @ pairs[p].a) * pairs[p].mask
        dx.index_add_(0, token, dx_e)
        products = {
            "gate_lora_a": Q["gate"].T @ (X * pairs["gate"].mask),
            "gate_lora_b": dG.T @ P["gate"],
            "up_lora_a": Q["up"].T @ (X * pairs["up"].mask),
            "up_lora_b": dU.T @ P["up"],
            "down_lora_a": r(w * Qd).T @ (h * pairs["down"].mask),
            "down_lora_b": dY.T @ r(w * Pd),
        }
        for name in problem.lora:
            grads[name][e] = products[name]
    grads = {k: r(v) if problem.lora[k].dtype is torch.bfloat16 else v for k, v in grads.items()}
    return {"out": r(out), "hidden_states": r(dx), "topk_weights": dw, **grads}


@dataclass
class _Pair:
    a: Tensor
    b: Tensor
    scale: float
    mask: Tensor  # 0 or 1, [routes, in]


def _pairs(problem, lora, masks, token, slot, e, keep) -> dict[str, _Pair]:
    """LoRA of each projection of one expert; rank 0 where there is none."""
    H, inner = problem.hidden_states.shape[1], problem.weights[0].shape[1]
    pairs = {}
    for i, p in enumerate(PROJECTIONS):
        into, out = (inner, H) if p == "down" else (H, inner)
        none = torch.zeros(1, 0, into, dtype=torch.float64), torch.zeros(1, out, 0, dtype=torch.float64)
        has = f"{p}_lora_a" in lora
        a, b = (lora[f"{p}_lora_a"][e], lora[f"{p}_lora_b"][e]) if has else (none[0][0], none[1][0])
        mask = torch.ones(len(token), into) if masks is None else (masks[p][token, slot] > 0)
        pairs[p] = _Pair(a, b, problem.scaling[i] / keep, mask.double())
    return pairs


def _round(x: Tensor) -> Tensor:
    """To bf16 and back. Through fp32, as the core holds it there."""
    return x.float().bfloat16().double()


def dropout_masks(problem: Problem, p_drop: float, seed: int) -> Masks:
    """The core's masks: a hash of seed, projection, place in topk_ids and column; kept: 1 / (1 - p_drop)."""
    T, K = problem.topk_ids.shape
    H, inner = problem.hidden_states.shape[1], problem.weights[0].shape[1]

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    masks = {}
    with np.errstate(over="ignore"):
        for i, p in enumerate(PROJECTIONS):
            stream = np.arange(T * K, dtype=np.uint64) * np.uint64(3) + np.uint64(i)
            key = mix(np.uint64(seed) + mix(stream + np.uint64(1)))[:, None]
            column = np.arange(inner if p == "down" else H, dtype=np.uint64)[None]
            bits = mix(key + column * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
            kept = bits >= np.uint64(int(p_drop * 2.0**32))
            masks[p] = torch.from_numpy(kept.reshape(T, K, -1).astype(np.float64)) / (1.0 - p_drop)
    return masks


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth|; the absolute error when the truth is zero."""
    norm = truth.double().norm().item()
    return (result.double() - truth.double()).norm().item() / (norm or 1.0)
