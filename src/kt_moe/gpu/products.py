"""The products of a chunk of experts on one device: what they compute, and which code computes them.

A chunk is n experts ("groups") and the rows routed to them, sorted by group. Operands are bf16, sums are
fp32, and a result is rounded once when it is stored. The same inputs give the same bits on every run: nothing
adds up atomically.

Dimensions: m rows of the chunk, H hidden size, I intermediate size (or a shard's part of it), T tokens, K
routes of a token, S matrices that lie in one tensor.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kt_moe.gpu.stored import StoredPart

GATE, UP, DOWN = range(3)  # projections of an expert

# What a tile of so many rows costs, against one of 128. Up to 64 rows a tile takes as long as its part of the
# weight takes from the L2 cache, so a few large tiles beat many small ones.
_TILE_COSTS = {16: 0.60, 32: 0.64, 64: 0.72, 128: 1.0}


class Matrices(NamedTuple):
    """One matrix for each group, out of S that lie in one tensor."""

    data: Tensor  # [S, rows, cols] bf16, or [jobs, S, rows, cols]; the last dimension is contiguous
    index: Tensor  # type: ignore[assignment]  # [n] int32 on the device: which matrix each group uses


class Term(NamedTuple):
    """A product that is added up with others in one accumulator. Of jobs see `Products.grouped_gemm`."""

    a: Tensor  # [R, K] bf16, or [jobs, R, K]; the last dimension is contiguous, other strides are arbitrary
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
        tables: int32 arrays that are brought to the device in the same copy.

    Attributes:
        counts: n integers on the host.
        rows: m, their sum.
        offsets: [n + 1] int32: the first row of each group, and m.
        block_rows: rows of a full tile: 16, 32, 64 or 128.
        tiles: [number of tiles, 4] int32: group, first row, rows, 0. A tile lies in one group.
        tables: those of the arguments.
    """

    def __init__(
        self,
        counts: Sequence[int],
        upload: Callable[[np.ndarray], Tensor] = torch.from_numpy,
        block_rows: int | None = None,
        tables: Sequence[np.ndarray] = (),
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
        # The tiles come first, as kernels read them in steps of 16 bytes.
        parts = [tiles.ravel(), offsets, *tables]
        table = upload(np.concatenate(parts).astype(np.int32))
        found = torch.split_with_sizes(table, [len(part) for part in parts])
        self.tiles, self.offsets, self.tables = found[0].view(-1, 4), found[1], found[2:]

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


class Products(Protocol):
    """What `torch_products` and `triton_products` both are."""

    def grouped_gemm(
        self,
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
        """out[i] (+)= row_scale[i] * (scale * sum of terms + bias of the group of i), rounded once.

        With a scale for each job, `out` and the matrices of the one term have a dimension more: one or two
        jobs of one shape. Where `a` lacks it, both read the same.

        Args:
            terms: 1 to 4 products, added up in this order.
            groups: the rows by group.
            out: [m, N] bf16 or fp32, or [jobs, m, N]; the last dimension is contiguous.
            scale: of the sum of products; of each job.
            row_scale: [m] fp32, contiguous; None means 1.
            bias: [S, N] bf16, contiguous; None means 0.
            bias_index: [n] int32: which bias each group adds; given exactly when bias is.
            accumulate: add to what `out` holds.
            weighted: w [m] fp32, contiguous, and where w[i] times the result, before that is rounded, is
                written as well: like `out`, in bf16.
        """

    def gate_up(
        self,
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
        """h = act(G, U), where G and U are the sums of their terms and the bias, kept in fp32 until then.

        Args:
            gate, up: 1 or 2 products each. The first ones have the same a and rows, and matrices of one
                shape; both or none are transposed. No product of gate: there is no gate, and h = act(U).
            groups: the rows by group.
            activation: as `kt_moe.Experts` takes it.
            h: [m, I] bf16, or None.
            saved: G (None without a gate) and U for backward, [m, I] bf16 each, or None. What is beyond an
                activation's limit is saved times 1 + 2^-8, so that rounding cannot put it on the limit.
            bias_gate, bias_up: [S, I] bf16, contiguous; None means 0.
            bias_index: [n] int32: which biases each group adds.
        """

    def activation_grad(
        self,
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
        """dweights = <dh, act(G, U)>; dG, dU of weights * dh; h = act(G, U).

        Args:
            dh: [m, I] fp32, the gradient of h without the routing weights.
            g, u: [m, I] bf16, as `gate_up` saves them; g and dg are None without a gate.
            weights: [m] fp32, contiguous: the routing weights.
            activation: as `kt_moe.Experts` takes it. What is beyond a limit gets no gradient.
            dg, du, h: [m, I] bf16, written.
            dweights: [m] fp32, contiguous, written.
        """

    def combine(self, y: Tensor, inverse: Tensor, first: int, out: Tensor) -> None:
        """out[t] += y[row - first] for each row that `inverse` has for t and y has, one after the other.

        Rows are added in ascending order, and each sum is rounded to fp32: how the rows of a pass are cut
        into several y does not matter.

        Args:
            y: [m, H] fp32: the rows [first, first + m) of a pass; the last dimension is contiguous.
            inverse: [T, K] int32, contiguous: the row of each route in the pass, no two equal; -1 where there
                is none.
            first: the row of the pass that y begins with.
            out: [T, H] fp32; the last dimension is contiguous. Tokens without a row in y stay as they are.
        """

    def grouped_outer(
        self,
        a: Tensor,
        b: Tensor,
        groups: Groups,
        out: Tensor,
        index: Tensor,
        *,
        a_rows: Tensor | None = None,
        b_rows: Tensor | None = None,
    ) -> None:
        """out[index[g]] = the sum over the rows i of group g of a[a_rows[i]]' b[b_rows[i]].

        Groups without rows write zeros. Made for a small M or N: one of them is a LoRA rank. Two jobs may
        be given as to `grouped_gemm`.

        Args:
            a, b: [R, M] and [R, N] bf16, or [jobs, ...]; the last dimension is contiguous.
            groups: the rows by group.
            out: [S, M, N] fp32 or bf16, or [jobs, ...], any strides.
            index: [n] int32, each at most once: the matrix of `out` that each group writes.
            a_rows, b_rows: [m] int32: the rows of a and b; None means row i.
        """

    def drop(self, rows: Tensor, permutation: Tensor, projection: int, probability: float, seed: int) -> None:
        """Zero in place what LoRA dropout drops, by the hash of src/cpp/moe/lora.cpp. The rest stays.

        Args:
            rows: [m, n] bf16 or fp32, inputs of a LoRA A product; the last dimension is contiguous.
            permutation: [m] int32 or int64, contiguous: token * K + k of each row.
            projection: GATE, UP or DOWN.
            probability: of dropping, in [0, 1).
            seed: in [0, 2**63).
        """

    def dequantize(self, raw: Tensor, index: Tensor, part: StoredPart, out: Tensor) -> None:
        """Stored weights to bf16, bit for bit what `Experts.dequantize()` returns; a NaN becomes 0x7fc0.

        Args:
            raw: [S, bytes of a slot] uint8: experts as they are stored; the last dimension is contiguous.
                Slots and the parts in them begin on 16 bytes.
            index: [n] int32: the slot of each expert.
            part: where one matrix, or a shard's slice of it, lies in a slot, and its format.
            out: [n, rows, cols] bf16; the last dimension is contiguous.
        """

    def copy_from_host(self, to: Tensor, source: Tensor, index: Tensor | None = None) -> None:
        """to = source, or of E arrays those that `index` has.

        By a kernel that reads the host's memory, which must stay until it has: copy engines are busy with
        weights.

        Args:
            to: contiguous; [E, ...] with an index.
            source: contiguous, of as many elements, in page-locked memory of the host; fp32 is rounded
                where `to` is bf16.
            index: [n] int32 on the device of `to`.
        """

    def add_from_host(self, to: Tensor, source: Tensor, rows: Tensor | None = None) -> None:
        """to[rows[i]] += source[i], likewise.

        Args:
            to: [T, C] fp32; the last dimension is contiguous.
            source: [n, C] fp32 in page-locked memory of the host, contiguous.
            rows: [n] int64 on the device of `to`, each at most once; None means row i.
        """


@functools.cache
def products_for(device: torch.device) -> Products:
    """The code for tensors on a device, which must be current: Triton's kernels, or else plain PyTorch.

    Triton has to be installed, and the GPU to multiply bf16 (NVIDIA Ampere and later).
    """
    if (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    ):
        from kt_moe.gpu import triton_products

        return triton_products
    from kt_moe.gpu import torch_products

    return torch_products
