"""The weighted sum of adapters on experts, as PEFT's `add_weighted_adapter` makes it of other layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kt_moe.lora_options import is_finite

KINDS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")

_WITH_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_SIGN_METHODS = ("total", "frequency")


def check_weighted(
    adapters: Sequence[str], weights: Sequence[float], kind: str, density: float | None, sign_method: str
) -> None:
    """Check the arguments of `add_weighted_adapter`, of which `kind` is the combination_type.

    Raises:
        ValueError: no adapter, not one finite weight for each, a kind that experts do not know, a density or
            majority_sign_method that is none of that kind; names it.
    """
    if not adapters:
        raise ValueError(f"adapters is {adapters!r}, wanted at least one name")
    if len(weights) != len(adapters):
        raise ValueError(f"weights has {len(weights)} numbers for {len(adapters)} adapters: {adapters}")
    if not all(map(is_finite, weights)):
        raise ValueError(f"weights is {weights!r}, wanted finite numbers")
    if kind not in KINDS:
        raise ValueError(f"combination_type is {kind!r}, kt_moe experts know {list(KINDS)}")
    if kind in _WITH_DENSITY and not (is_finite(density) and 0.0 <= float(density or 0.0) <= 1.0):
        raise ValueError(f"density is {density!r}, wanted a number in [0, 1] for combination_type={kind!r}")
    if kind in ("ties", "dare_ties") and sign_method not in _SIGN_METHODS:
        raise ValueError(f"majority_sign_method is {sign_method!r}, wanted one of {list(_SIGN_METHODS)}")


def combine(
    parts: Sequence[tuple[Tensor, Tensor, float]], rank: int, kind: str, of_matrices: Callable[[Any], Any]
) -> tuple[Tensor, Tensor]:
    """A [E, rank, in] and B [E, out, rank] of the sum of weight * B A.

    Args:
        parts: A [E, r, in], B [E, out, r] and the weight, scaling included, of each adapter; at least one.
        rank: of the result.
        kind: "cat" puts the ranks side by side and is exact, "svd" is the best approximation of that rank;
            the others combine A's and B's apart, by `of_matrices`.
        of_matrices: PEFT's combination of 2-D matrices, of a layer with `lora_A`, `lora_B` and `scaling`, as
            a pair (A, B).

    Raises:
        ValueError: ranks that do not fit into `rank`.
    """
    if kind not in ("cat", "svd"):
        pairs = [of_matrices(_layer(parts, e)) for e in range(len(parts[0][0]))]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    a = torch.cat([a * weight for a, _, weight in parts], dim=1)
    b = torch.cat([b.to(a) for _, b, _ in parts], dim=2)
    if kind == "svd":  # of B A by way of both triangles: no matrix is larger than the ranks together
        left, upper = torch.linalg.qr(b)
        right, lower = torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(upper @ lower.mT)
        a, b = (vh @ right.mT)[:, :rank], (left @ u * s.unsqueeze(1))[:, :, :rank]
    missing = rank - a.shape[1]
    if missing < 0:
        raise ValueError(f"the adapters' ranks on experts are {a.shape[1]} together, wanted at most {rank}")
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))


def _layer(parts: Sequence[tuple[Tensor, Tensor, float]], expert: int) -> SimpleNamespace:
    """One expert's matrices as PEFT reads a layer, adapters named by their numbers."""
    return SimpleNamespace(
        lora_A={str(i): SimpleNamespace(weight=a[expert]) for i, (a, _, _) in enumerate(parts)},
        lora_B={str(i): SimpleNamespace(weight=b[expert]) for i, (_, b, _) in enumerate(parts)},
        scaling={str(i): weight for i, (_, _, weight) in enumerate(parts)},
    )
