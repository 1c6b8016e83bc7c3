"""Triton kernels that multiply: grouped products, the fused gate and up products, grouped outer products.

All dimensions and strides are constants of a compiled kernel: they belong to the model, and constant strides
let the compiler prove that loads of 16 bytes are aligned. Pointers and a scale are arguments, so other counts
of rows need no other kernel. Rows past the end of a tile, and columns that are rows of a transposed matrix,
are read at the last one there is, which needs no mask, and not stored. What is left of a sum's K columns
after full blocks comes in a block of its own, with a mask.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kt_moe.gpu.triton_activations import activate, to_save

# Tiles of rows that are multiplied by one block of columns before the next block: their rows, and the blocks
# of columns, stay in the L2 cache meanwhile.
_BAND: tl.constexpr = tl.constexpr(8)


@triton.jit
def _tile(tiles, N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Group, first row, number of rows (0 or less for some parts of split tiles) and first column."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program, count = tl.program_id(0), tl.num_programs(0) // BLOCKS
    band = program // (_BAND * BLOCKS)
    within = program - band * (_BAND * BLOCKS)
    height = tl.minimum(count - band * _BAND, _BAND)
    tile = band * _BAND + within % height
    entry, part = tiles + tile // SPLIT * 4, tile % SPLIT * BLOCK_M
    return tl.load(entry), tl.load(entry + 1) + part, tl.load(entry + 2) - part, within // height * BLOCK_N


@triton.jit
def _columns(first, N: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Columns of a result; those of a transposed matrix are its rows, and there the last one stands in."""
    cols = first + tl.arange(0, BLOCK_N)
    if TRANSPOSED and N % BLOCK_N != 0:
        cols = tl.minimum(cols, N - 1)
    return cols


@triton.jit
def _pointers(b, k, cols, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[k, columns] of a matrix."""
    if TRANSPOSED:
        return b + cols[None, :] * STRIDE + k[:, None]
    return b + k[:, None] * STRIDE + cols[None, :]


@triton.jit
def _load(at, k, cols, LEFT: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, MASK_N: tl.constexpr):
    """A block [k, columns], of which LEFT rows exist, and N columns if MASK_N."""
    if MASK_N:
        if LEFT < BLOCK_K:
            return tl.load(at, mask=(k[:, None] < LEFT) & (cols[None, :] < N), other=0.0)
        return tl.load(at, mask=cols[None, :] < N, other=0.0)
    if LEFT < BLOCK_K:
        return tl.load(at, mask=k[:, None] < LEFT, other=0.0)
    return tl.load(at)


@triton.jit
def _load_left(at, k, LEFT: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block [rows, k], of which LEFT columns exist."""
    if LEFT < BLOCK_K:
        return tl.load(at, mask=k[None, :] < LEFT, other=0.0)
    return tl.load(at)


@triton.jit
def _add_product(
    acc, a, a_rows, b, b_index, rows, group, first_col,
    A_STRIDE: tl.constexpr, B_MATRIX: tl.constexpr, B_STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a[rows] @ the group's matrix."""
    REST: tl.constexpr = K % BLOCK_K
    MASK_N: tl.constexpr = not TRANSPOSED and N % BLOCK_N != 0
    if a_rows is not None:
        rows = tl.load(a_rows + rows)
    a_at = a + rows.to(tl.int64)[:, None] * A_STRIDE
    b_at = b + tl.load(b_index + group).to(tl.int64) * B_MATRIX
    cols = _columns(first_col, N, BLOCK_N, TRANSPOSED)
    if K >= BLOCK_K:
        k = tl.arange(0, BLOCK_K)
        left, right = a_at + k[None, :], _pointers(b_at, k, cols, B_STRIDE, TRANSPOSED)
        for _ in range(K // BLOCK_K):
            x = tl.load(left)
            w = _load(right, k, cols, BLOCK_K, N, BLOCK_K, MASK_N)
            acc = tl.dot(x, w, acc)
            left += BLOCK_K
            right += BLOCK_K if TRANSPOSED else BLOCK_K * B_STRIDE
    if REST != 0:
        TAIL: tl.constexpr = 16 if REST <= 16 else (32 if REST <= 32 else (64 if REST <= 64 else 128))
        k_tail = tl.arange(0, TAIL)
        left_tail = a_at + (K - REST + k_tail)[None, :]
        right_tail = _pointers(b_at, K - REST + k_tail, cols, B_STRIDE, TRANSPOSED)
        x_tail = _load_left(left_tail, k_tail, REST, TAIL)
        acc = tl.dot(x_tail, _load(right_tail, k_tail, cols, REST, N, TAIL, MASK_N), acc)
    return acc


@triton.jit
def _biased(acc, bias, bias_index, group, cols, N: tl.constexpr):
    if bias is not None:
        at = bias + tl.load(bias_index + group).to(tl.int64) * N + cols
        acc += tl.load(at, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


# Of each term: row stride of a; strides of b between matrices and between rows; transposed; columns of a.
@triton.jit(do_not_specialize=[
    "tiles", "row_scale", "bias_index", "weights",
    "rows0", "index0", "rows1", "index1", "rows2", "index2", "rows3", "index3",
])  # fmt: skip
def grouped_gemm(
    tiles, out, scale, scale_1, row_scale, bias, bias_index, weights, weighted,
    a0, rows0, b0, index0, a1, rows1, b1, index1, a2, rows2, b2, index2, a3, rows3, b3, index3,
    A0: tl.constexpr, M0: tl.constexpr, B0: tl.constexpr, T0: tl.constexpr, K0: tl.constexpr,
    A1: tl.constexpr, M1: tl.constexpr, B1: tl.constexpr, T1: tl.constexpr, K1: tl.constexpr,
    A2: tl.constexpr, M2: tl.constexpr, B2: tl.constexpr, T2: tl.constexpr, K2: tl.constexpr,
    A3: tl.constexpr, M3: tl.constexpr, B3: tl.constexpr, T3: tl.constexpr, K3: tl.constexpr,
    TERMS: tl.constexpr, N: tl.constexpr, OUT_STRIDE: tl.constexpr, WEIGHTED_STRIDE: tl.constexpr,
    A_JOB: tl.constexpr, OUT_JOB: tl.constexpr, WEIGHTED_JOB: tl.constexpr, B_JOB: tl.constexpr,
    ACCUMULATE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of rows times a block of columns, all terms in one accumulator. See `Products.grouped_gemm`."""
    job = tl.program_id(1)
    a0 += job * A_JOB
    b0 += job.to(tl.int64) * B_JOB
    out += job * OUT_JOB
    if job > 0:
        scale = scale_1
    group, first, count, col = _tile(tiles, N, SPLIT, BLOCK_M, BLOCK_N)
    if count <= 0:
        return
    i = tl.arange(0, BLOCK_M)
    rows = first + tl.minimum(i, count - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _add_product(acc, a0, rows0, b0, index0, rows, group, col, A0, M0, B0, T0, K0, N, BLOCK_N, BLOCK_K)
    if TERMS > 1:
        acc = _add_product(
            acc, a1, rows1, b1, index1, rows, group, col, A1, M1, B1, T1, K1, N, BLOCK_N, BLOCK_K
        )
    if TERMS > 2:
        acc = _add_product(
            acc, a2, rows2, b2, index2, rows, group, col, A2, M2, B2, T2, K2, N, BLOCK_N, BLOCK_K
        )
    if TERMS > 3:
        acc = _add_product(
            acc, a3, rows3, b3, index3, rows, group, col, A3, M3, B3, T3, K3, N, BLOCK_N, BLOCK_K
        )
    cols = col + tl.arange(0, BLOCK_N)
    acc = _biased(acc * scale, bias, bias_index, group, cols, N)
    if row_scale is not None:
        acc *= tl.load(row_scale + rows)[:, None]
    at = out + rows.to(tl.int64)[:, None] * OUT_STRIDE + cols[None, :]
    mask = (i[:, None] < count) & (cols[None, :] < N)
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)
    if weights is not None:
        acc *= tl.load(weights + rows)[:, None]
        at = weighted + job * WEIGHTED_JOB + rows.to(tl.int64)[:, None] * WEIGHTED_STRIDE + cols[None, :]
        tl.store(at, acc.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=[
    "tiles", "bias_index", "rows", "gate_index", "up_index", "low_gate_index", "low_up_index",
])  # fmt: skip
def gate_up(
    tiles, h, g, u, bias_gate, bias_up, bias_index, x, rows, gate, gate_index, up, up_index,
    low_gate_x, low_gate_rows, low_gate, low_gate_index, low_up_x, low_up_rows, low_up, low_up_index,
    X_STRIDE: tl.constexpr, GATE_MATRIX: tl.constexpr, GATE_STRIDE: tl.constexpr, UP_MATRIX: tl.constexpr,
    UP_STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, K: tl.constexpr,
    LOW_GATE_X_STRIDE: tl.constexpr, LOW_GATE_MATRIX: tl.constexpr, LOW_GATE_STRIDE: tl.constexpr,
    LOW_GATE_TRANSPOSED: tl.constexpr, LOW_GATE_K: tl.constexpr,
    LOW_UP_X_STRIDE: tl.constexpr, LOW_UP_MATRIX: tl.constexpr, LOW_UP_STRIDE: tl.constexpr,
    LOW_UP_TRANSPOSED: tl.constexpr, LOW_UP_K: tl.constexpr,
    N: tl.constexpr, H_STRIDE: tl.constexpr, G_STRIDE: tl.constexpr, U_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G and U of a tile in two accumulators; a block of X is read once for both. See `Products.gate_up`.

    `gate` is None where there is none, and then so is all of G.
    """
    GATED: tl.constexpr = gate is not None
    group, first, count, col = _tile(tiles, N, 1, BLOCK_M, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    row = first + tl.minimum(i, count - 1)
    if GATED:
        G = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    U = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if low_gate is not None:
        G = _add_product(
            G, low_gate_x, low_gate_rows, low_gate, low_gate_index, row, group, col, LOW_GATE_X_STRIDE,
            LOW_GATE_MATRIX, LOW_GATE_STRIDE, LOW_GATE_TRANSPOSED, LOW_GATE_K, N, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if low_up is not None:
        U = _add_product(
            U, low_up_x, low_up_rows, low_up, low_up_index, row, group, col, LOW_UP_X_STRIDE,
            LOW_UP_MATRIX, LOW_UP_STRIDE, LOW_UP_TRANSPOSED, LOW_UP_K, N, BLOCK_N, BLOCK_K,
        )  # fmt: skip

    MASK_N: tl.constexpr = not TRANSPOSED and N % BLOCK_N != 0
    cols = _columns(col, N, BLOCK_N, TRANSPOSED)
    up_at = up + tl.load(up_index + group).to(tl.int64) * UP_MATRIX
    x_row = row if rows is None else tl.load(rows + row)
    x_at = x + x_row.to(tl.int64)[:, None] * X_STRIDE
    k = tl.arange(0, BLOCK_K)
    left = x_at + k[None, :]
    up_right = _pointers(up_at, k, cols, UP_STRIDE, TRANSPOSED)
    if GATED:
        gate_at = gate + tl.load(gate_index + group).to(tl.int64) * GATE_MATRIX
        gate_right = _pointers(gate_at, k, cols, GATE_STRIDE, TRANSPOSED)
    for _ in range(K // BLOCK_K):
        block = tl.load(left)
        if GATED:
            gate_block = _load(gate_right, k, cols, BLOCK_K, N, BLOCK_K, MASK_N)
        up_block = _load(up_right, k, cols, BLOCK_K, N, BLOCK_K, MASK_N)
        if GATED:
            G = tl.dot(block, gate_block, G)
        U = tl.dot(block, up_block, U)
        left += BLOCK_K
        if GATED:
            gate_right += BLOCK_K if TRANSPOSED else BLOCK_K * GATE_STRIDE
        up_right += BLOCK_K if TRANSPOSED else BLOCK_K * UP_STRIDE
    REST: tl.constexpr = K % BLOCK_K
    if REST != 0:
        x_tail = _load_left(left, k, REST, BLOCK_K)
        if GATED:
            G = tl.dot(x_tail, _load(gate_right, k, cols, REST, N, BLOCK_K, MASK_N), G)
        U = tl.dot(x_tail, _load(up_right, k, cols, REST, N, BLOCK_K, MASK_N), U)

    cols = col + tl.arange(0, BLOCK_N)
    U = _biased(U, bias_up, bias_index, group, cols, N)
    if GATED:
        G = _biased(G, bias_gate, bias_index, group, cols, N)
    mask = (i[:, None] < count) & (cols[None, :] < N)
    to = row.to(tl.int64)[:, None]
    if h is not None:
        if GATED:
            act, up_factor, _, _ = activate(G, U, ACTIVATION)
            hidden = act * up_factor
        else:
            hidden, _, _, _ = activate(U, U, ACTIVATION)
        tl.store(h + to * H_STRIDE + cols[None, :], hidden.to(tl.bfloat16), mask=mask)
    if u is not None:
        if GATED:
            G, U = to_save(G, U, ACTIVATION)
            tl.store(g + to * G_STRIDE + cols[None, :], G.to(tl.bfloat16), mask=mask)
        else:
            U, _ = to_save(U, U, ACTIVATION)
        tl.store(u + to * U_STRIDE + cols[None, :], U.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["offsets", "index", "a_rows", "b_rows"])
def grouped_outer(
    a, a_rows, b, b_rows, offsets, out, index,
    A_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    OUT_MATRIX: tl.constexpr, OUT_STRIDE_M: tl.constexpr, OUT_STRIDE_N: tl.constexpr,
    A_JOB: tl.constexpr, B_JOB: tl.constexpr, OUT_JOB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of one group's a' b, its rows added up in order. See `Products.grouped_outer`."""
    group, job = tl.program_id(1), tl.program_id(2).to(tl.int64)
    a += job * A_JOB
    b += job * B_JOB
    out += job * OUT_JOB
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        there = i < end
        a_row = i if a_rows is None else tl.load(a_rows + i, mask=there, other=0)
        b_row = i if b_rows is None else tl.load(b_rows + i, mask=there, other=0)
        a_at = a + a_row.to(tl.int64)[None, :] * A_STRIDE + m[:, None]
        b_at = b + b_row.to(tl.int64)[:, None] * B_STRIDE + n[None, :]
        left = tl.load(a_at, mask=there[None, :] & (m[:, None] < M), other=0.0)
        right = tl.load(b_at, mask=there[:, None] & (n[None, :] < N), other=0.0)
        acc = tl.dot(left, right, acc)
    to = out + tl.load(index + group).to(tl.int64) * OUT_MATRIX
    to = to + m[:, None] * OUT_STRIDE_M + n[None, :] * OUT_STRIDE_N
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
