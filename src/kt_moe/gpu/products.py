"""The products of a chunk of experts on one device: what they compute, and which code computes them.

A chunk is n experts ("groups") and the rows routed to them, sorted by group. Operands are bf16, sums are
fp32, and a result is rounded once when it is stored. The same inputs give the same bits on every run: nothing
adds up atomically. Triton computes for tensors on the current CUDA device where it is installed, and plain
PyTorch (`torch_products`) otherwise.

Dimensions: m rows of the chunk, H hidden size, I intermediate size (or a shard's part of it), T tokens, K
slots of a token, S matrices that lie in one tensor.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kt_moe.gpu import torch_products

if TYPE_CHECKING:
    from kt_moe.gpu.stored import StoredPart

# What a tile of so many rows costs, against one of 128. Up to 64 rows a tile takes as long as its part of the
# weight takes from the L2 cache, so a few large tiles beat many small ones.
_TILE_COSTS = {16: 0.60, 32: 0.64, 64: 0.72, 128: 1.0}


class Matrices(NamedTuple):
    """One matrix for each group, out of S that lie in one tensor."""

    data: Tensor  # [S, rows, cols] bf16; the last dimension is contiguous, the other strides are arbitrary
    index: Tensor  # type: ignore[assignment]  # [n] int32 on the device: which matrix each group uses


class Term(NamedTuple):
    """A product that is added up with others in one accumulator."""

    a: Tensor  # [R, K] bf16; the last dimension is contiguous, the row stride is arbitrary
    b: Matrices  # [N, K] if transposed, else [K, N]
    transposed: bool
    rows: Tensor | None = None  # [m] int32: row i of the product reads a[rows[i]]; None: a[i]


class Groups:
    """The rows of a chunk by group, and how they are cut into tiles of rows.

    Args:
        counts: rows of each of the n groups; 0 is allowed.
        upload: brings a small array to the device, where `offsets` and `tiles` are.
        block_rows: rows of a full tile; None: `best_block_rows(counts)`. Chunks of one pass take the same, so
            that how it is cut into chunks does not change how results are rounded.

    Attributes:
        counts: n integers on the host.
        rows: m, their sum.
        offsets: [n + 1] int32: the first row of each group, and m.
        block_rows: rows of a full tile: 16, 32, 64 or 128.
        tiles: [number of tiles, 4] int32: group, first row, rows, 0. A tile lies in one group.
    """

    def __init__(
        self,
        counts: Sequence[int],
        upload: Callable[[np.ndarray], Tensor] = torch.from_numpy,
        block_rows: int | None = None,
    ) -> None:
        self.counts = tuple(int(count) for count in counts)
        n = len(self.counts)
        rows = np.array(self.counts, dtype=np.int64)
        offsets = np.zeros(n + 1, dtype=np.int64)
        np.cumsum(rows, out=offsets[1:])
        self.rows = int(offsets[-1])
        if self.rows >= 2**31:
            raise ValueError(f"{self.rows} rows in a chunk, wanted fewer than 2**31")
        self.block_rows = block_rows or self.best_block_rows(self.counts)
        tiles = _cut(rows, offsets, self.block_rows)
        begin = (n + 4) // 4 * 4  # the tiles begin on 16 bytes
        host = np.zeros(begin + tiles.size, dtype=np.int32)
        host[: n + 1], host[begin:] = offsets, tiles.ravel()
        table = upload(host)
        self.offsets, self.tiles = table[: n + 1], table[begin:].view(-1, 4)

    @staticmethod
    def best_block_rows(counts: Sequence[int]) -> int:
        """The rows of a tile with which groups of so many rows take least time."""
        rows = np.array(counts, dtype=np.int64)
        return min(_TILE_COSTS, key=lambda block: _TILE_COSTS[block] * int((-(-rows // block)).sum()))


def _cut(rows: np.ndarray, offsets: np.ndarray, block: int) -> np.ndarray:
    """Tiles of at most `block` rows: [number of tiles, 4]."""
    tiles_of = -(-rows // block)
    ends = np.cumsum(tiles_of)
    group = np.repeat(np.arange(len(rows)), tiles_of)
    tiles = np.zeros((len(group), 4), dtype=np.int64)
    within = block * (np.arange(len(group)) - (ends - tiles_of)[group])
    tiles[:, 0] = group
    tiles[:, 1] = offsets[:-1][group] + within
    tiles[:, 2] = np.minimum(block, rows[group] - within)
    return tiles


def grouped_gemm(
    terms: Sequence[Term],
    groups: Groups,
    out: Tensor,
    *,
    scale: float = 1.0,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    bias_index: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out[i] (+)= row_scale[i] * (scale * sum of terms + bias of the group of i), rounded once.

    Args:
        terms: 1 to 4 products, added up in this order.
        groups: the rows by group.
        out: [m, N] bf16 or fp32; the last dimension is contiguous.
        scale: of the sum of products.
        row_scale: [m] fp32, contiguous; None means 1.
        bias: [S, N] bf16, contiguous; None means 0.
        bias_index: [n] int32: which bias each group adds; given exactly when bias is.
        accumulate: add to what `out` holds.
    """
    _code_for(out).grouped_gemm(terms, groups, out, scale, row_scale, bias, bias_index, accumulate)


def gate_up(
    gate: Sequence[Term],
    up: Sequence[Term],
    groups: Groups,
    activation: str,
    *,
    h: Tensor | None = None,
    saved: tuple[Tensor, Tensor] | None = None,
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
    bias_index: Tensor | None = None,
) -> None:
    """h = act(G, U), where G and U are the sums of their terms and the bias, kept in fp32 until then.

    Args:
        gate, up: 1 or 2 products each. The first ones have the same a and rows, and matrices of one shape;
            both or none are transposed.
        groups: the rows by group.
        activation: as `kt_moe.Experts` takes it.
        h: [m, I] bf16, or None.
        saved: G and U for backward, [m, I] bf16 each, or None. What is beyond a limit of the activation is
            saved times 1 + 2^-8, so that rounding cannot put it on the limit.
        bias_gate, bias_up: [S, I] bf16, contiguous; None means 0.
        bias_index: [n] int32: which biases each group adds.
    """
    like = h if h is not None else saved[0] if saved is not None else gate[0].a
    _code_for(like).gate_up(gate, up, groups, activation, h, saved, bias_gate, bias_up, bias_index)


def activation_grad(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    weights: Tensor,
    activation: str,
    dg: Tensor,
    du: Tensor,
    h: Tensor,
    dweights: Tensor,
) -> None:
    """dweights = <dh, act(G, U)>; dG, dU of weights * dh; h = act(G, U).

    Args:
        dh: [m, I] fp32, the gradient of h without the routing weights.
        g, u: [m, I] bf16, as `gate_up` saves them.
        weights: [m] fp32, contiguous: the routing weights.
        activation: as `kt_moe.Experts` takes it. What is beyond a limit gets no gradient.
        dg, du, h: [m, I] bf16, written.
        dweights: [m] fp32, contiguous, written.
    """
    _code_for(dh).activation_grad(dh, g, u, weights, activation, dg, du, h, dweights)


def combine(y: Tensor, position: Tensor, first: int, out: Tensor) -> None:
    """out[t] += y[row - first] for each row that `position` has for t, one after the other, where y has it.

    Rows are added in ascending order, and each sum is rounded to fp32: how the rows of a pass are cut into
    several y does not matter.

    Args:
        y: [m, H] fp32: the rows [first, first + m) of a pass; the last dimension is contiguous.
        position: [T, K] int32, contiguous: the row of each route in the pass, no two equal; negative where
            there is none.
        first: the row of the pass that y begins with.
        out: [T, H] fp32; the last dimension is contiguous. Tokens without a row in y stay as they are.
    """
    _code_for(out).combine(y, position, first, out)


def grouped_outer(
    a: Tensor,
    b: Tensor,
    groups: Groups,
    out: Tensor,
    index: Tensor,
    *,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """out[index[g]] = scale * the sum over the rows i of group g of a[a_rows[i]]' b[b_rows[i]].

    Groups without rows write zeros. Made for a small M or N: one of them is a LoRA rank.

    Args:
        a, b: [R, M] and [R, N] bf16; the last dimension is contiguous.
        groups: the rows by group.
        out: [S, M, N] fp32 or bf16, any strides.
        index: [n] int32, each at most once: the matrix of `out` that each group writes.
        a_rows, b_rows: [m] int32: the rows of a and b; None means row i.
        scale: of the sums.
    """
    _code_for(out).grouped_outer(a, b, groups, out, index, a_rows, b_rows, scale)


def drop(rows: Tensor, places: Tensor, projection: int, probability: float, seed: int) -> None:
    """Zero in place what LoRA dropout drops, by the hash of src/cpp/moe/dropout.cpp. The rest stays as it is.

    Args:
        rows: [m, n] bf16 or fp32, inputs of a LoRA A product; the last dimension is contiguous.
        places: [m] int32 or int64, contiguous: token * K + slot of each row.
        projection: 0 gate, 1 up, 2 down.
        probability: of dropping, in [0, 1).
        seed: in [0, 2**63).
    """
    if probability > 0.0:
        _code_for(rows).drop(rows, places, projection, probability, seed)


def dequantize(raw: Tensor, index: Tensor, part: StoredPart, out: Tensor) -> None:
    """Stored weights to bf16, bit for bit what `Experts.dequantize()` returns; a NaN becomes 0x7fc0.

    Args:
        raw: [S, bytes of a slot] uint8: experts as they are stored; the last dimension is contiguous. Slots
            and the parts in them begin on 16 bytes.
        index: [n] int32: the slot of each expert.
        part: where one matrix, or a shard's slice of it, lies in a slot, and its format.
        out: [n, rows, cols] bf16; the last dimension is contiguous.
    """
    _code_for(out).dequantize(raw, index, part, out)


def copy_from_host(to: Tensor, source: Tensor, index: Tensor | None = None) -> None:
    """to = source, or of E arrays those that `index` has.

    By a kernel that reads the host's memory, which must stay until it has: copy engines are busy with
    weights.

    Args:
        to: contiguous; [E, ...] with an index.
        source: like `to`, in page-locked memory of the host.
        index: [n] int32 on the device of `to`.
    """
    _code_for(to).copy_from_host(to, source, index)


def add_from_host(to: Tensor, source: Tensor, rows: Tensor | None = None) -> None:
    """to[rows[i]] += source[i], likewise.

    Args:
        to: [T, C] fp32; the last dimension is contiguous.
        source: [n, C] fp32 in page-locked memory of the host, contiguous.
        rows: [n] int64 on the device of `to`, each at most once; None means row i.
    """
    _code_for(to).add_from_host(to, source, rows)


def _code_for(tensor: Tensor) -> Any:
    """The module that computes on the device of a tensor."""
    return _triton_code() if tensor.is_cuda and _triton_runs(tensor.device) else torch_products


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton is installed and this GPU multiplies bf16 (NVIDIA Ampere and later)."""
    return (
        torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


@functools.cache
def _triton_code() -> Any:
    from kt_moe.gpu import triton_products

    return triton_products
