"""The activations as Triton functions on tiles of G and U. `kt_moe.activations` has the formulas."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kt_moe import activations

_GPT_OSS_ALPHA: tl.constexpr = tl.constexpr(activations.GPT_OSS_ALPHA)
_GPT_OSS_LIMIT: tl.constexpr = tl.constexpr(activations.GPT_OSS_LIMIT)
_CLAMPED_SILU_LIMIT: tl.constexpr = tl.constexpr(activations.CLAMPED_SILU_LIMIT)
_BEYOND_LIMIT: tl.constexpr = tl.constexpr(activations.BEYOND_LIMIT)
_GELU_SLOPE: tl.constexpr = tl.constexpr(activations.GELU_SLOPE)
_GELU_CUBIC: tl.constexpr = tl.constexpr(activations.GELU_CUBIC)
_GELU_FAR: tl.constexpr = tl.constexpr(activations.GELU_FAR)
_GATE_SOFTCAP: tl.constexpr = tl.constexpr(activations.GATE_SOFTCAP)
_UP_SOFTCAP: tl.constexpr = tl.constexpr(activations.UP_SOFTCAP)


@triton.jit
def _at_most(x, most: tl.constexpr):
    return tl.where(x > most, most, x)  # a NaN stays one


@triton.jit
def _clamp(x, most: tl.constexpr):
    return _at_most(tl.where(x < -most, -most, x), most)


@triton.jit
def _away(G, U, LIMIT: tl.constexpr):
    return tl.where(G > LIMIT, G * _BEYOND_LIMIT, G), tl.where(tl.abs(U) > LIMIT, U * _BEYOND_LIMIT, U)


@triton.jit
def _stopped(G, U, dG, dU, LIMIT: tl.constexpr):
    return tl.where(G > LIMIT, 0.0, dG), tl.where(tl.abs(U) > LIMIT, 0.0, dU)


@triton.jit
def to_save(G, U, ACTIVATION: tl.constexpr):
    """G and U as they are saved: away from the limits that they are beyond."""
    if ACTIVATION == "gpt_oss":
        G, U = _away(G, U, _GPT_OSS_LIMIT)
    elif ACTIVATION == "clamped_silu":
        G, U = _away(G, U, _CLAMPED_SILU_LIMIT)
    return G, U


@triton.jit
def limited_grad(G, U, dG, dU, ACTIVATION: tl.constexpr):
    """dG and dU, which are 0 beyond the activation's limits."""
    if ACTIVATION == "gpt_oss":
        dG, dU = _stopped(G, U, dG, dU, _GPT_OSS_LIMIT)
    elif ACTIVATION == "clamped_silu":
        dG, dU = _stopped(G, U, dG, dU, _CLAMPED_SILU_LIMIT)
    return dG, dU


@triton.jit
def _normal(x):
    """The normal distribution and its density; formulas of src/cpp/kernels/generic/activations.h."""
    t, e = tl.abs(x), tl.exp(-0.5 * x * x)
    k = 1.0 / (1.0 + 0.3 * t)
    m = -0.156158209 + 0.0354236774 * k
    m = 0.204556361 + m * k
    m = -0.052033633 + m * k
    m = 0.127691567 + m * k
    m = 0.100176007 + m * k
    m = 0.120712124 + m * k
    m = 0.119632006 + m * k
    tail = e * (k * m)
    return tl.where(x < 0.0, tail, 1.0 - tail), 0.398942280 * e


@triton.jit
def _softcap(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP) and its slope; near 0, where 1 - e cancels, by the series of tanh."""
    t = _at_most(tl.abs(x) * (1.0 / CAP), 20.0)
    e, square = tl.exp(-2.0 * t), t * t
    q = 1.0 / (1.0 + e)
    near = t + t * square * (-1.0 / 3.0 + square * (2.0 / 15.0 - 17.0 / 315.0 * square))
    tanh = tl.where(t < 0.2, near, (1.0 - e) * q)
    return CAP * tl.where(x < 0.0, -tanh, tanh), 4.0 * e * q * q


@triton.jit
def activate(G, U, ACTIVATION: tl.constexpr):
    """h = act * up, the factors of G and of U, and the derivative of each.

    Without a gate U is given for both, and h = act; the functions above likewise, whose first result counts.
    """
    up_slope = 1.0
    if ACTIVATION == "gpt_oss":
        gate, up = _at_most(G, _GPT_OSS_LIMIT), _clamp(U, _GPT_OSS_LIMIT) + 1.0
        s = tl.sigmoid(_GPT_OSS_ALPHA * gate)
        act = gate * s
        slope = s + _GPT_OSS_ALPHA * act * (1.0 - s)
    elif ACTIVATION == "clamped_silu":
        gate, up = _at_most(G, _CLAMPED_SILU_LIMIT), _clamp(U, _CLAMPED_SILU_LIMIT)
        s = tl.sigmoid(gate)
        act = gate * s
        slope = s + act * (1.0 - s)
    elif ACTIVATION == "softcapped_silu":
        capped, capped_slope = _softcap(G, _GATE_SOFTCAP)
        up, up_slope = _softcap(U, _UP_SOFTCAP)
        s = tl.sigmoid(G)
        act = capped * s
        slope = capped_slope * s + act * (1.0 - s)
    elif ACTIVATION == "gelu":
        up, near = U, _clamp(G, _GELU_FAR)
        below, density = _normal(near)
        act = G * below
        slope = below + near * density
    elif ACTIVATION == "gelu_tanh":
        up, near = U, _clamp(G, _GELU_FAR)  # so that no infinity meets a 0
        square = near * near
        s = tl.sigmoid(_GELU_SLOPE * near * (1.0 + _GELU_CUBIC * square))
        act = G * s
        slope = s + act * (1.0 - s) * (_GELU_SLOPE * (1.0 + 3.0 * _GELU_CUBIC * square))
    elif ACTIVATION == "relu2":
        up, positive = U, tl.where(G < 0.0, 0.0, G)  # a NaN stays one
        act = positive * positive
        slope = positive + positive
    else:
        up = U
        s = tl.sigmoid(G)
        act = G * s
        slope = s * (1.0 + G * (1.0 - s))
    return act, up, slope, up_slope
