"""Triton kernels that go over rows once, at memory speed: activation gradient, sums of routes, dropout.

`copy_from_host` and `add_from_host` read page-locked memory of the host where it lies. Copies by the GPU's
copy engine would wait behind all the weights that it was asked for before.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kt_moe.gpu.triton_activations import activate, limited_grad


@triton.jit(do_not_specialize=["weights", "dweights"])
def activation_grad(
    dh, g, u, weights, dg, du, h, dweights,
    N: tl.constexpr, DH_STRIDE: tl.constexpr, G_STRIDE: tl.constexpr, U_STRIDE: tl.constexpr,
    DG_STRIDE: tl.constexpr, DU_STRIDE: tl.constexpr, H_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. See `Products.activation_grad`."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, N, BLOCK):
        col = first + tl.arange(0, BLOCK)
        mask = col < N
        d = tl.load(dh + row * DH_STRIDE + col, mask=mask, other=0.0)
        U = tl.load(u + row * U_STRIDE + col, mask=mask, other=0.0).to(tl.float32)
        if g is not None:
            G = tl.load(g + row * G_STRIDE + col, mask=mask, other=0.0).to(tl.float32)
            act, up, slope, up_slope = activate(G, U, ACTIVATION)
            hidden = act * up
            dG, dU = weight * d * up * slope, weight * d * act * up_slope
            dG, dU = limited_grad(G, U, dG, dU, ACTIVATION)
            tl.store(dg + row * DG_STRIDE + col, dG.to(tl.bfloat16), mask=mask)
        else:
            hidden, _, slope, _ = activate(U, U, ACTIVATION)
            dU = weight * d * slope
            dU, _ = limited_grad(U, U, dU, dU, ACTIVATION)
        dot += d * hidden
        tl.store(du + row * DU_STRIDE + col, dU.to(tl.bfloat16), mask=mask)
        tl.store(h + row * H_STRIDE + col, hidden.to(tl.bfloat16), mask=mask)
    tl.store(dweights + row, tl.sum(dot, 0))


@triton.jit(do_not_specialize=["inverse", "first", "count"])
def combine(
    y, inverse, first, count, out,
    H: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, Y_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token; ROUTES is the power of two from K on. See `Products.combine`."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, ROUTES)
    rows = tl.load(inverse + token * K + k, mask=k < K, other=-1) - first
    if tl.max(((rows >= 0) & (rows < count)).to(tl.int32), 0) == 0:
        return
    for begin in range(0, H, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        at = out + token * OUT_STRIDE + col
        sum = tl.load(at, mask=col < H, other=0.0)
        row = -1
        for _ in tl.static_range(K):
            row = tl.min(tl.where((rows > row) & (rows < count), rows, count), 0)
            there = (row < count) & (col < H)
            sum += tl.load(y + row.to(tl.int64) * Y_STRIDE + col, mask=there, other=0.0)
        tl.store(at, sum, mask=col < H)


@triton.jit
def _mix(x):
    """The finaliser of SplitMix64, as src/cpp/moe/lora.cpp has it."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["permutation", "seed"])
def drop(
    rows, permutation, seed: tl.uint64,
    N: tl.constexpr, STRIDE: tl.constexpr, PROJECTION: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of one row. See `Products.drop`."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stream = tl.load(permutation + row).to(tl.uint64) * 3 + PROJECTION
    key = _mix(seed + _mix(stream + 1))
    bits = _mix(key + col.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32
    at = rows + row * STRIDE + col
    value = tl.load(at, mask=col < N, other=0.0)
    tl.store(at, tl.where(bits < THRESHOLD, 0.0, value).to(value.dtype), mask=col < N)


@triton.jit(do_not_specialize=["words", "index"])
def copy_from_host(to, source, words, index, BLOCK: tl.constexpr):
    """Words of one of several arrays. See `Products.copy_from_host`."""
    array = tl.program_id(1)
    if index is not None:
        array = tl.load(index + array)
    first = array.to(tl.int64) * words
    for begin in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
        i = begin + tl.arange(0, BLOCK)
        value = tl.load(source + first + i, mask=i < words)
        tl.store(to + first + i, value.to(to.dtype.element_ty), mask=i < words)


@triton.jit(do_not_specialize=["rows"])
def add_from_host(to, source, rows, N: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One row. See `Products.add_from_host`."""
    i = tl.program_id(0).to(tl.int64)
    row = i if rows is None else tl.load(rows + i).to(tl.int64)
    for begin in range(0, N, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        at = to + row * STRIDE + col
        value = tl.load(source + i * N + col, mask=col < N, other=0.0)
        tl.store(at, tl.load(at, mask=col < N, other=0.0) + value, mask=col < N)
