"""The layer in plain PyTorch: the truth (float64), the rival (bf16 eager), and our own rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

PROJECTIONS = ("gate", "up", "down")
LORA_NAMES = tuple(f"{p}_lora_{m}" for p in PROJECTIONS for m in "ab")
Masks = dict[str, Tensor]  # projection -> [T, K, in], the factor of each input element of its LoRA A product


@dataclass(repr=False)
class Problem:
    """Inputs of one layer call, and the gradient that comes back to it."""

    weights: tuple[Tensor | None, Tensor, Tensor]  # gate or none, up [E, I, H]; down [E, H, I]; bf16
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


def gpt_oss(G: Tensor | None, U: Tensor) -> Tensor:
    """As transformers' GptOssExperts has it."""
    gate = (U if G is None else G).clamp(max=7.0)
    up = U.clamp(min=-7.0, max=7.0)
    return (1 if G is None else up + 1) * gate * torch.sigmoid(1.702 * gate)


def _product(
    value: Callable[[Tensor], Tensor], factor: Callable[[Tensor], Tensor] = lambda U: U
) -> Callable[[Tensor | None, Tensor], Tensor]:
    """Of G and U, or of U alone."""
    return lambda G, U: value(U) if G is None else value(G) * factor(U)


ACTIVATIONS: dict[str, Callable[[Tensor | None, Tensor], Tensor]] = {
    "silu": _product(silu),
    "gpt_oss": gpt_oss,
    "clamped_silu": _product(lambda G: silu(G.clamp(max=10.0)), lambda U: U.clamp(-10.0, 10.0)),
    "gelu_tanh": _product(lambda G: gelu(G, approximate="tanh")),
    "gelu": _product(gelu),
    "softcapped_silu": _product(
        lambda G: 4 * torch.tanh(G / 4) * torch.sigmoid(G), lambda U: 25 * torch.tanh(U / 25)
    ),
    "relu2": _product(lambda G: relu(G).square()),
}
LIMITS = {"gpt_oss": 7.0, "clamped_silu": 10.0}  # beyond which there is no gradient


def _saved(activation: str, G: Tensor | None, U: Tensor) -> list[Tensor]:
    """What backward gets of G and U, or of U alone: rounded, and still beyond limits that they were."""
    if limit := LIMITS.get(activation):
        beyond = U.gt(limit) if G is None else U.abs() > limit
        U = torch.where(beyond, U * (1 + 2**-8), U)
        G = None if G is None else torch.where(G.gt(limit), G * (1 + 2**-8), G)
    return [_round(v) for v in (G, U) if v is not None]


def moe(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: tuple[Tensor | None, ...],
    lora: dict[str, Tensor],
    scaling: tuple[float, ...],
    masks: Masks | None = None,
    biases: tuple[Tensor | None, ...] = (None, None, None),
    activation: str = "silu",
) -> Tensor:
    """The mathematics, expert by expert, in whatever dtype the tensors have."""
    out = torch.zeros_like(hidden_states)
    for e in range(weights[1].shape[0]):
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
        gate = None if weights[0] is None else project(x, 0)
        y = project(ACTIVATIONS[activation](gate, project(x, 1)), 2)
        out = out.index_add(0, token, y * topk_weights[token, slot, None].to(y.dtype))
    return out


def run(problem: Problem, dtype: torch.dtype, masks: Masks | None = None) -> dict[str, Tensor]:
    """`out` and the gradient of every leaf, computed in `dtype`."""
    leaves = {k: v.detach().to(dtype, copy=True).requires_grad_() for k, v in problem.leaves().items()}
    lora = {k: v for k, v in leaves.items() if k in LORA_NAMES}
    weights = tuple(None if w is None else w.to(dtype) for w in problem.weights)
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
    W = {p: w.double() for p, w in zip(PROJECTIONS, problem.weights, strict=True) if w is not None}
    bias = {
        p: torch.zeros(W[p].shape[:2], dtype=torch.float64) if b is None else b.double()
        for p, b in zip(PROJECTIONS, problem.biases, strict=True)
        if p in W
    }
    inner = [p for p in W if p != "down"]  # gate and up
    act = ACTIVATIONS[problem.activation]
    keep = 1.0 - p_drop
    lora = {k: r(v.double()) for k, v in problem.lora.items()}
    out, dx = torch.zeros_like(x), torch.zeros_like(x)
    dw = torch.zeros_like(problem.topk_weights, dtype=torch.float64)
    grads = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in problem.lora.items()}

    for e in range(W["up"].shape[0]):
        token, slot = (problem.topk_ids == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        w = problem.topk_weights[token, slot, None].double()
        pairs = _pairs(problem, lora, masks, token, slot, e, keep)
        X, dY = x[token], grad_out[token]
        P = {p: r(pairs[p].scale * (X * pairs[p].mask) @ pairs[p].a.T) for p in inner}
        Y = {p: X @ W[p][e].T + P[p] @ pairs[p].b.T + bias[p][e] for p in inner}  # G and U
        h = r(act(Y.get("gate"), Y["up"]))
        Pd = pairs["down"].scale * (h * pairs["down"].mask) @ pairs["down"].a.T
        out.index_add_(0, token, w * (h @ W["down"][e].T + r(Pd) @ pairs["down"].b.T + bias["down"][e]))

        Qd = pairs["down"].scale * dY @ pairs["down"].b
        dh = dY @ W["down"][e] + (r(Qd) @ pairs["down"].a) * pairs["down"].mask
        saved = [v.requires_grad_() for v in _saved(problem.activation, Y.get("gate"), Y["up"])]
        h = act(saved[0] if len(saved) == 2 else None, saved[-1])
        d = dict(zip(inner, (r(d) for d in torch.autograd.grad(h, saved, w * dh)), strict=True))
        h = h.detach()
        dw[token, slot] = (dh * h).sum(-1) + dY @ bias["down"][e]
        h = r(h)
        Q = {p: r(pairs[p].scale * d[p] @ pairs[p].b) for p in inner}
        dx.index_add_(0, token, sum(d[p] @ W[p][e] + (Q[p] @ pairs[p].a) * pairs[p].mask for p in inner))
        products = {
            "down_lora_a": r(w * Qd).T @ (h * pairs["down"].mask),
            "down_lora_b": dY.T @ r(w * Pd),
        }
        for p in inner:
            products[f"{p}_lora_a"] = Q[p].T @ (X * pairs[p].mask)
            products[f"{p}_lora_b"] = d[p].T @ P[p]
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
    H, inner = problem.hidden_states.shape[1], problem.weights[1].shape[1]
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
    H, inner = problem.hidden_states.shape[1], problem.weights[1].shape[1]

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
