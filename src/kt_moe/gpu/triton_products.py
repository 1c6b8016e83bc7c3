"""`Products` by Triton kernels: which tiles, which grid, and the launch.

`Products` describes the arguments. Tensors are on the current CUDA device. Tiles are looked up, not measured:
the same shapes give the same bits on every run, and nothing is compiled but what is used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kt_moe.gpu import torch_products, triton_decode, triton_gemm, triton_rows
from kt_moe.gpu.triton_launch import launch

if TYPE_CHECKING:
    from kt_moe.gpu.products import Groups, Term
    from kt_moe.gpu.stored import StoredPart


class Tile(NamedTuple):
    """What one program of a product computes: m rows and n columns, k columns of the operands at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # blocks of operands in flight


# By rows of a tile. 128 x 256 has the most products for each byte from the L2 cache; eight warps hold its
# sums in 128 registers a thread. Tiles of fewer rows wait for weights, and are small so that several are on a
# multiprocessor and have enough of them on their way.
_WIDE = {
    16: Tile(16, 128, 64, 4, 4),
    32: Tile(32, 128, 64, 4, 4),
    64: Tile(64, 128, 64, 4, 4),
    128: Tile(128, 256, 64, 8, 3),
}
# For fewer than 256 columns, and for sums that are added to what is there, which takes registers.
_MIDDLE = Tile(128, 128, 64, 8, 3)
# For results of a LoRA rank, up to 64 columns. They wait for X: tiles of few rows make enough programs, each
# with long rows of X on their way.
_NARROW = Tile(32, 64, 128, 4, 3)
# Of gate and up together, with two sums for each column.
_GATE_UP = {
    16: Tile(16, 64, 64, 4, 4),
    32: Tile(32, 64, 64, 4, 4),
    64: Tile(64, 64, 64, 4, 4),
    128: Tile(128, 128, 64, 8, 3),
}
# Triton 3.6 makes wrong products of 64 rows and more with 16 or 32 columns of a transposed matrix for Hopper.
_LEAST_GATE_UP = 64
# m is the longer side of the result here, n the rank; the sum goes over rows, k at a time.
_OUTER = Tile(64, 64, 64, 4, 4)
_SHORTEST = 16  # side of a tile that tensor cores multiply
_COPY_BLOCK = 4096  # words; a link's latency is hidden by some hundred KiB under way
_COPY_PROGRAMS = 256  # in all, so that products find room beside them
_MUCH_SHARED_MEMORY = (9, 10)  # compute capabilities with 227 KiB a block, which the tiles above are made for


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
    if groups.rows == 0:
        return
    count, columns, unused = len(terms), out.shape[-1], 4 - len(terms)
    jobs = out.shape[0] if out.dim() == 3 else 1
    scales = (scale, scale) if isinstance(scale, float) else (scale[0], scale[-1])
    weights, to = weighted or (None, None)
    tile, split = _gemm_tile(groups.block_rows, columns, accumulate, out.device)
    pointers = [p for term in terms for p in _pointers(term)] + [None] * (4 * unused)
    shapes = [s for term in terms for s in _shape(term)] + [0] * (5 * unused)
    grid = (groups.tiles.shape[0] * split * -(-columns // tile.n), jobs)
    launch(
        triton_gemm.grouped_gemm, grid,
        (groups.tiles, out, *map(float, scales), row_scale, bias, bias_index, weights, to, *pointers),
        (*shapes, count, columns, out.stride(-2), 0 if to is None else to.stride(-2),
         *(0 if x is None else _job_stride(x, 3) for x in (terms[0].a, out, to)),
         _job_stride(terms[0].b.data, 4), accumulate, split, tile.m, tile.n, tile.k),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


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
    if groups.rows == 0:
        return
    g, u = saved or (None, None)
    like = h if h is not None else u
    if like is None:
        return
    columns, main = like.shape[1], up[0]
    tiles = _GATE_UP if gate else _WIDE
    tile = _fitted(tiles[groups.block_rows], max(columns, _LEAST_GATE_UP), like.device)
    x_stride, up_matrix, up_stride, transposed, K = _shape(main)
    _, gate_matrix, gate_stride, _, _ = _shape(gate[0]) if gate else (0,) * 5
    low: list[Tensor | None] = []
    low_shapes: list[int] = []
    for terms in (gate, up):
        low += _pointers(terms[1]) if len(terms) > 1 else [None] * 4
        low_shapes += _shape(terms[1]) if len(terms) > 1 else [0] * 5
    grid = (groups.tiles.shape[0] * -(-columns // tile.n),)
    launch(
        triton_gemm.gate_up, grid,
        (groups.tiles, h, g, u, bias_gate, bias_up, bias_index,
         main.a, main.rows, *(gate[0].b if gate else (None, None)), *main.b, *low),
        (x_stride, gate_matrix, gate_stride, up_matrix, up_stride, transposed, K, *low_shapes,
         columns, *(0 if x is None else x.stride(0) for x in (h, g, u)), activation, tile.m, tile.n, tile.k),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


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
    rows, columns = dh.shape
    if rows == 0:
        return
    block = min(1024, _power_of_2(columns))
    launch(
        triton_rows.activation_grad, (rows,), (dh, g, u, weights, dg, du, h, dweights),
        (columns, *(0 if x is None else x.stride(0) for x in (dh, g, u, dg, du, h)), activation, block),
        num_warps=max(1, block // 256),
    )  # fmt: skip


def combine(y: Tensor, inverse: Tensor, first: int, out: Tensor) -> None:
    tokens, topk = inverse.shape
    if tokens == 0 or y.shape[0] == 0:
        return
    block = min(2048, _power_of_2(out.shape[1]))
    launch(
        triton_rows.combine, (tokens,), (y, inverse, first, y.shape[0], out),
        (out.shape[1], topk, _power_of_2(topk), y.stride(0), out.stride(0), block),
        num_warps=max(1, block // 256),
    )  # fmt: skip


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
    stride_m, stride_n = out.stride(-2), out.stride(-1)
    if a.shape[-1] < b.shape[-1]:  # the longer side is the rows of tiles
        a, b, a_rows, b_rows, stride_m, stride_n = b, a, b_rows, a_rows, stride_n, stride_m
    M, N, jobs = a.shape[-1], b.shape[-1], out.shape[0] if out.dim() == 4 else 1
    tile = _fitted(_OUTER, N, out.device)
    grid = (-(-M // tile.m) * -(-N // tile.n), len(groups.counts), jobs)
    launch(
        triton_gemm.grouped_outer, grid, (a, a_rows, b, b_rows, groups.offsets, out, index),
        (a.stride(-2), b.stride(-2), M, N, out.stride(-3), stride_m, stride_n,
         _job_stride(a, 3), _job_stride(b, 3), _job_stride(out, 4), tile.m, tile.n, tile.k),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def drop(rows: Tensor, permutation: Tensor, projection: int, probability: float, seed: int) -> None:
    count, columns = rows.shape
    if count == 0:
        return
    block = min(1024, _power_of_2(columns))
    launch(
        triton_rows.drop, (count, -(-columns // block)), (rows, permutation, seed),
        (columns, rows.stride(0), projection, int(probability * 2.0**32), block),
        num_warps=max(1, block // 256),
    )  # fmt: skip


def dequantize(raw: Tensor, index: Tensor, part: StoredPart, out: Tensor) -> None:
    unit = _unit(part)
    if unit == 1 and part.code in ("int4", "e2m1"):  # a byte holds codes of two scales
        return torch_products.dequantize(raw, index, part, out)
    units = 8192 // unit
    grid = (-(-part.rows * -(-part.cols // unit) // units), index.shape[0])
    launch(
        triton_decode.dequantize, grid, (raw, index, out),
        (raw.stride(0), part.rows, part.cols, out.stride(0), out.stride(1), part.codes, part.scales,
         part.zeros, part.global_scale, part.code, part.scale, part.scale_rows, part.scale_cols, part.divides,
         unit, units),
        num_warps=8,
    )  # fmt: skip


def copy_from_host(to: Tensor, source: Tensor, index: Tensor | None = None) -> None:
    arrays = 1 if index is None else len(index)
    if to.numel() == 0 or arrays == 0:
        return
    words, source_words = to.view(-1), source.view(-1)
    if to.dtype == source.dtype:  # the fewest words
        size = to.nbytes if index is None else to.nbytes // to.shape[0]
        word = torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.uint8
        words, source_words = words.view(word), source_words.view(word)
    count = words.numel() if index is None else words.numel() // to.shape[0]
    programs = min(-(-count // _COPY_BLOCK), max(1, _COPY_PROGRAMS // arrays))
    launch(
        triton_rows.copy_from_host, (programs, arrays), (words, source_words, count, index), (_COPY_BLOCK,),
        num_warps=4,
    )  # fmt: skip


def add_from_host(to: Tensor, source: Tensor, rows: Tensor | None = None) -> None:
    count, columns = source.shape
    if count == 0:
        return
    block = min(2048, _power_of_2(columns))
    launch(
        triton_rows.add_from_host, (count,), (to, source, rows), (columns, to.stride(0), block),
        num_warps=max(1, block // 256),
    )  # fmt: skip


def _pointers(term: Term) -> tuple[Tensor | None, ...]:
    return term.a, term.rows, term.b.data, term.b.index


def _shape(term: Term) -> tuple[int, int, int, bool, int]:
    matrices = term.b.data
    return term.a.stride(-2), matrices.stride(-3), matrices.stride(-2), term.transposed, term.a.shape[-1]


def _job_stride(x: Tensor, dimensions: int) -> int:
    """From one job to the next; 0 if the tensor has no dimension for them, or one job alone."""
    return x.stride(0) if x.dim() == dimensions and x.shape[0] > 1 else 0


@functools.cache
def _gemm_tile(block_rows: int, columns: int, accumulate: bool, device: torch.device) -> tuple[Tile, int]:
    """The tile for results of so many columns, and into how many of its parts a tile of rows is split."""
    if columns <= _NARROW.n:
        rows = min(block_rows, _NARROW.m)
        return _fitted(_NARROW, columns, device)._replace(m=rows), block_rows // rows
    tile = _WIDE[block_rows]
    if block_rows == _MIDDLE.m and (accumulate or columns < tile.n):
        tile = _MIDDLE
    return _fitted(tile, columns, device), 1


@functools.cache
def _fitted(tile: Tile, columns: int, device: torch.device) -> Tile:
    """The tile with no more columns than there are, and n and k halved on GPUs with less shared memory."""
    if _has_less(device):
        tile = tile._replace(n=max(64, tile.n // 2), k=tile.k // 2)
    return tile._replace(n=max(_SHORTEST, min(tile.n, _power_of_2(columns))))


@functools.cache
def _has_less(device: torch.device) -> bool:
    """Whether a block has less shared memory than the tiles are made for."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] not in _MUCH_SHARED_MEMORY


def _unit(part: StoredPart) -> int:
    """The columns that share a scale, up to 32; a power of two."""
    if part.scale_cols >= part.cols or part.code == "bf16":
        return 32
    return min(32, part.scale_cols & -part.scale_cols)


def _power_of_2(n: int) -> int:
    """The smallest one from n on."""
    return 1 << max(0, n - 1).bit_length()
