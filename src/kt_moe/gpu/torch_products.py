"""`Products` in plain PyTorch, group by group: for CPU tensors, and for GPUs without Triton.

Operands are widened to fp32, so products of bf16 numbers are exact and sums are fp32. `Products` describes
the arguments. On a GPU, each call waits for the device: it reads the groups' matrices' numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kt_moe.activations import ACTIVATIONS

if TYPE_CHECKING:
    from kt_moe.gpu.products import Groups, Term
    from kt_moe.gpu.stored import StoredPart

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def grouped_gemm(
    terms: Sequence[Term],
    groups: Groups,
    out: Tensor,
    *,
    scale: float | Sequence[float] = 1.0,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    bias_index: Tensor | None = None,
    accumulate: bool = False,
    weighted: tuple[Tensor, Tensor] | None = None,
) -> None:
    if not isinstance(scale, float):
        for job, factor in enumerate(scale):
            grouped_gemm(
                [_job(term, job) for term in terms], groups, out[job], scale=factor, row_scale=row_scale,
                bias=bias, bias_index=bias_index, accumulate=accumulate,
                weighted=None if weighted is None else (weighted[0], weighted[1][job]),
            )  # fmt: skip
        return
    for rows, sums in _sums(terms, groups):
        at = slice(rows.start, rows.stop)
        sums *= scale
        if bias is not None and bias_index is not None:
            sums += bias[bias_index[rows.group]].float()
        if row_scale is not None:
            sums *= row_scale[at, None]
        if accumulate:
            sums += out[at].float()
        out[at] = sums
        if weighted is not None:
            weighted[1][at] = weighted[0][at, None] * sums


def gate_up(
    gate: Sequence[Term],
    up: Sequence[Term],
    groups: Groups,
    activation: str,
    *,
    h: Tensor | None = None,
    saved: tuple[Tensor | None, Tensor] | None = None,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
    bias_index: Tensor | None = None,
) -> None:
    of_gate = (G for _, G in _sums(gate, groups)) if gate else itertools.repeat(None)
    for (rows, U), G in zip(_sums(up, groups), of_gate, strict=False):
        at = slice(rows.start, rows.stop)
        for sums, bias in ((G, bias_gate), (U, bias_up)):
            if sums is not None and bias is not None and bias_index is not None:
                sums += bias[bias_index[rows.group]].float()
        if h is not None:
            h[at] = ACTIVATIONS[activation](G, U)
        if saved is not None:
            for to, rounded in zip(saved, ACTIVATIONS[activation].to_save(G, U), strict=True):
                if to is not None and rounded is not None:
                    to[at] = rounded


def activation_grad(
    dh: Tensor,
    g: Tensor | None,
    u: Tensor,
    weights: Tensor,
    activation: str,
    dg: Tensor | None,
    du: Tensor,
    h: Tensor,
    dweights: Tensor,
) -> None:
    act, dG, dU = ACTIVATIONS[activation].with_gradients(None if g is None else g.float(), u.float())
    dweights.copy_(_row_sums(dh * act))
    weighted = weights[:, None] * dh
    if dg is not None and dG is not None:
        dg.copy_(weighted * dG)
    du.copy_(weighted * dU)
    h.copy_(act)


def _row_sums(x: Tensor) -> Tensor:
    """[m, n] -> [m] in halves: the same additions for a row whatever others there are, unlike `sum`."""
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        left, right = x[:, :half], x[:, half:]
        x = left.clone()
        x[:, : right.shape[1]] += right
    return x.sum(1)


def combine(y: Tensor, inverse: Tensor, first: int, out: Tensor) -> None:
    for at in (inverse - first).sort(1).values.unbind(1):
        token = ((at >= 0) & (at < y.shape[0])).nonzero()[:, 0]
        out[token] += y[at[token]]


def grouped_outer(
    a: Tensor,
    b: Tensor,
    groups: Groups,
    out: Tensor,
    index: Tensor,
    *,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
) -> None:
    if out.dim() == 4:
        for job in range(len(out)):
            left, right = (x[job] if x.dim() == 3 else x for x in (a, b))
            grouped_outer(left, right, groups, out[job], index, a_rows=a_rows, b_rows=b_rows)
        return
    matrices, end = index.tolist(), 0
    for matrix, count in zip(matrices, groups.counts, strict=True):
        begin, end = end, end + count
        A, B = (_take(x, rows, begin, end) for x, rows in ((a, a_rows), (b, b_rows)))
        out[matrix] = A.mT @ B


def copy_from_host(to: Tensor, source: Tensor, index: Tensor | None = None) -> None:
    if index is None:
        to.view(-1).copy_(source.view(-1), non_blocking=True)
    else:
        for array in index.tolist():
            to[array].copy_(source[array], non_blocking=True)


def add_from_host(to: Tensor, source: Tensor, rows: Tensor | None = None) -> None:
    source = source.to(to.device, non_blocking=True)
    if rows is None:
        to += source
    else:
        to.index_add_(0, rows, source)  # each row once, so that the order of additions is fixed


def drop(rows: Tensor, permutation: Tensor, projection: int, probability: float, seed: int) -> None:
    key = _mix(seed + _mix(permutation.long() * 3 + (projection + 1)))
    column = torch.arange(rows.shape[1], device=rows.device) * _as_signed(0x9E3779B97F4A7C15)
    bits = _shift(_mix(key[:, None] + column), 32)
    rows.masked_fill_(bits < int(probability * 2.0**32), 0.0)


def dequantize(raw: Tensor, index: Tensor, part: StoredPart, out: Tensor) -> None:
    for i, slot in enumerate(index.tolist()):
        out[i] = _decode(raw[slot], part)


class _Rows:
    """The rows of one group."""

    def __init__(self, group: int, start: int, stop: int) -> None:
        self.group, self.start, self.stop = group, start, stop


def _job(term: Term, job: int) -> Term:
    a, (data, index) = term.a, term.b
    matrices = term.b._replace(data=data[job] if data.dim() == 4 else data, index=index)
    return term._replace(a=a[job] if a.dim() == 3 else a, b=matrices)


def _sums(terms: Sequence[Term], groups: Groups) -> Iterator[tuple[_Rows, Tensor]]:
    """The sum of the products of each group that has rows, in fp32."""
    matrices = [term.b.index.tolist() for term in terms]
    end = 0
    for group, count in enumerate(groups.counts):
        begin, end = end, end + count
        if count == 0:
            continue
        sums = None
        for term, matrix in zip(terms, matrices, strict=True):
            B = term.b.data[matrix[group]].float()
            product = _take(term.a, term.rows, begin, end) @ (B.mT if term.transposed else B)
            sums = product if sums is None else sums.add_(product)
        assert sums is not None
        yield _Rows(group, begin, end), sums


def _take(x: Tensor, rows: Tensor | None, begin: int, end: int) -> Tensor:
    return (x[begin:end] if rows is None else x[rows[begin:end]]).float()


def _as_signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 2**63 else bits


def _shift(x: Tensor, by: int) -> Tensor:
    """Of 64 bits without a sign, to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014); int64 multiplies modulo 2^64."""
    x = (x ^ _shift(x, 30)) * _as_signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _as_signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _decode(slot: Tensor, part: StoredPart) -> Tensor:
    """One matrix [rows, cols] out of the bytes of a slot."""
    rows, cols = part.rows, part.cols
    if part.code == "bf16":
        return _read(slot, part.codes, torch.bfloat16, rows * cols).view(rows, cols)
    packed = part.code in ("int4", "e2m1")
    row_bytes = (cols + 1) // 2 if packed else cols
    codes = _read(slot, part.codes, torch.uint8, rows * row_bytes).view(rows, row_bytes)
    if packed:
        codes = torch.stack((codes & 15, codes >> 4), -1).view(rows, -1)[:, :cols]
    blocks = -(-rows // part.scale_rows), -(-cols // part.scale_cols)
    values = _values(codes, part.code)
    if part.code == "int4":
        if part.zeros < 0:
            values -= 8.0
        else:
            zeros = _read(slot, part.zeros, torch.uint8, blocks[0] * blocks[1]).view(blocks)
            values -= _spread(zeros.float(), part)
    product = values * _spread(_scales(slot, part, blocks[0] * blocks[1]).view(blocks), part)
    nan = torch.tensor(0x7FC0, dtype=torch.int16, device=slot.device).view(torch.bfloat16)
    return torch.where(product.isnan(), nan, product.bfloat16())


def _read(slot: Tensor, first: int, dtype: torch.dtype, count: int) -> Tensor:
    return slot[first : first + count * dtype.itemsize].view(dtype)


def _spread(blocks: Tensor, part: StoredPart) -> Tensor:
    """A number of each block to each element of it."""
    wide = blocks.repeat_interleave(part.scale_rows, 0).repeat_interleave(part.scale_cols, 1)
    return wide[: part.rows, : part.cols]


def _values(codes: Tensor, code: str) -> Tensor:
    """What codes stand for, in fp32; of int4 before the zero point."""
    if code == "int8":
        return codes.view(torch.int8).float()
    if code == "int4":
        return codes.float()
    every = np.arange(256 if code == "e4m3" else 16)
    if code == "e4m3":  # without infinities
        exponent, mantissa = every >> 3 & 15, every & 7
        magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
        magnitude[every & 127 == 127] = np.nan
        table = np.where(every < 128, magnitude, -magnitude)
    else:
        table = np.array(_E2M1 + tuple(-x for x in _E2M1))
    return torch.from_numpy(table.astype(np.float32)).to(codes.device)[codes.int()]


def _scales(slot: Tensor, part: StoredPart, count: int) -> Tensor:
    """`count` scales in fp32."""
    if part.scale == "f32":
        return _read(slot, part.scales, torch.float32, count)
    if part.scale == "bf16":
        return _read(slot, part.scales, torch.bfloat16, count).float()
    if part.scale == "e4m3":
        scales = _values(_read(slot, part.scales, torch.uint8, count), "e4m3")
        if part.global_scale < 0:
            return scales
        global_scale = _read(slot, part.global_scale, torch.float32, 1)
        return scales / global_scale if part.divides else scales * global_scale
    exponents = _read(slot, part.scales, torch.uint8, count).int()
    bits = exponents << 23 | (((exponents == 0) | (exponents == 255)).int() << 22)
    return bits.view(torch.float32)
