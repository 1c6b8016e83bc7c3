"""The activations of experts, as tensors in any dtype, with their derivatives: h = value(G) * factor(U), and
of experts without a gate h = value(U).

"silu": silu(G) * U. "gelu": gelu(G) * U, the exact one; "gelu_tanh": GELU's approximation by tanh. Two have
limits: "clamped_silu" (DeepSeek-V4), silu(min(G, 10)) * clamp(U, -10, 10); and "gpt_oss",
g * sigmoid(1.702 g) * (clamp(U, -7, 7) + 1) with g = min(G, 7). "softcapped_silu" (Inkling 2):
cap(G, 4) * sigmoid(G) * cap(U, 25), where cap(x, c) = c * tanh(x / c). "relu2": relu(G)^2 * U.

The core's are in src/cpp/kernels (`kernel_set.h` has the constants), those of Triton in
`gpu/triton_activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GPT_OSS_ALPHA, GPT_OSS_LIMIT, CLAMPED_SILU_LIMIT = 1.702, 7.0, 10.0
BEYOND_LIMIT = 1.0 + 2.0**-8  # what is beyond a limit is saved times this: see `to_save`
# GELU by tanh is g * sigmoid(SLOPE * (g + CUBIC * g^3)). From FAR on both GELUs' second factor is 0 or 1.
GELU_SLOPE, GELU_CUBIC, GELU_FAR = 1.5957691216, 0.044715, 16.0
GATE_SOFTCAP, UP_SOFTCAP = 4.0, 25.0

WithSlope = tuple[Tensor, Tensor]  # a function's value and its derivative


def _itself(U: Tensor) -> WithSlope:
    return U, torch.ones_like(U)


@dataclass(frozen=True)
class Activation:
    """h = value(G) * factor(U), or without a gate, where G is None, value(U).

    Attributes:
        value, factor: give a function's value and its derivative.
        limit: what value is taken of counts as the limit above it, and so does the U of factor if its
            magnitude is larger, with its sign; 0: none.
    """

    value: Callable[[Tensor], WithSlope]
    factor: Callable[[Tensor], WithSlope] = _itself
    limit: float = 0.0

    def __call__(self, G: Tensor | None, U: Tensor) -> Tensor:
        """h."""
        return self.with_gradients(G, U)[0]

    def with_gradients(self, G: Tensor | None, U: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """h, dh / dG and dh / dU; what is beyond the limit has none."""
        if G is None:
            h, slope = self.value(U.clamp(max=self.limit) if self.limit else U)
            return h, None, slope.masked_fill(U.gt(self.limit), 0.0) if self.limit else slope
        gate, up = (G.clamp(max=self.limit), U.clamp(-self.limit, self.limit)) if self.limit else (G, U)
        value, slope = self.value(gate)
        factor, factor_slope = self.factor(up)
        by_gate, by_up = factor * slope, value * factor_slope
        if self.limit:
            by_gate.masked_fill_(G.gt(self.limit), 0.0)
            by_up.masked_fill_(U.abs() > self.limit, 0.0)
        return value * factor, by_gate, by_up

    def to_save(self, G: Tensor | None, U: Tensor) -> tuple[Tensor | None, Tensor]:
        """G and U for a backward that gets them rounded: away from the limits that they are beyond."""
        if self.limit:
            beyond = U.gt(self.limit) if G is None else U.abs() > self.limit
            U = torch.where(beyond, U * BEYOND_LIMIT, U)
            G = None if G is None else torch.where(G.gt(self.limit), G * BEYOND_LIMIT, G)
        return G, U


def _silu(G: Tensor) -> WithSlope:
    s = torch.sigmoid(G)
    return G * s, s * (1.0 + G * (1.0 - s))


def _gpt_oss(G: Tensor) -> WithSlope:
    s = torch.sigmoid(GPT_OSS_ALPHA * G)
    value = G * s
    return value, s + GPT_OSS_ALPHA * value * (1.0 - s)


def _and_one(U: Tensor) -> WithSlope:
    return U + 1.0, torch.ones_like(U)


def _near(G: Tensor) -> Tensor:
    """So that no infinity meets a 0."""
    return G.clamp(-GELU_FAR, GELU_FAR)


def _gelu_tanh(G: Tensor) -> WithSlope:
    x = _near(G)
    s = torch.sigmoid(GELU_SLOPE * x * (1.0 + GELU_CUBIC * x * x))
    value = G * s
    return value, s + value * (1.0 - s) * (GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * x * x))


def _gelu(G: Tensor) -> WithSlope:
    x = _near(G)
    below, density = 0.5 * torch.erfc(x * -math.sqrt(0.5)), torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return G * below, below + x * density


def _softcap(x: Tensor, cap: float) -> WithSlope:
    return cap * torch.tanh(x / cap), torch.cosh(x / cap).pow(-2)


def _softcapped_silu(G: Tensor) -> WithSlope:
    s = torch.sigmoid(G)
    capped, slope = _softcap(G, GATE_SOFTCAP)
    value = capped * s
    return value, slope * s + value * (1.0 - s)


def _softcapped_up(U: Tensor) -> WithSlope:
    return _softcap(U, UP_SOFTCAP)


def _relu2(G: Tensor) -> WithSlope:
    x = G.clamp(min=0.0)
    return x * x, x + x


# Those of `kt_moe.Experts`, in the core's order.
ACTIVATIONS = {
    "silu": Activation(_silu),
    "gpt_oss": Activation(_gpt_oss, _and_one, limit=GPT_OSS_LIMIT),
    "clamped_silu": Activation(_silu, limit=CLAMPED_SILU_LIMIT),
    "gelu_tanh": Activation(_gelu_tanh),
    "gelu": Activation(_gelu),
    "softcapped_silu": Activation(_softcapped_silu, _softcapped_up),
    "relu2": Activation(_relu2),
}
