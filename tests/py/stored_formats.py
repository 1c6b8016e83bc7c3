"""Experts as every kind of checkpoint stores them, with what they stand for: written from the formats'
descriptions, sharing nothing with the library.

Each function makes the tensors of one matrix [out, in] (or of a whole layer) from random codes and returns
them with the value: bf16(code * scale), one product in fp32, rounded to nearest even.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Matrix = tuple[dict[str, Tensor], Tensor]  # tensors by the tail of their names, and the value


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=rng(seed))


def random_scales(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=rng(seed + 1)) * 0.02 + 0.001).to(dtype)


def spread(scales: Tensor, rows: int, cols: int, block: tuple[int, int]) -> Tensor:
    """One fp32 factor an element from one a block, the last ones cut off at the edges."""
    wide = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[:rows, :cols]


def int32(words: Tensor) -> Tensor:
    """The low 32 bits of int64 numbers."""
    return torch.from_numpy(words.numpy().astype(np.uint64).astype(np.uint32).view(np.int32).copy())


def pack_nibbles(codes: Tensor, dim: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """8 codes along `dim` a word; nibble n of it is code order[n] of the 8. Padded with zeros."""
    codes = codes.movedim(dim, -1)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    eights = codes.unflatten(-1, (-1, 8))[..., list(order)]
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return int32(words).movedim(-1, dim).contiguous()


def fp8(
    out: int,
    inp: int,
    seed: int,
    *,
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype = torch.float32,
    scale_shape: tuple[int, ...] | None = None,
    tail: str = "weight_scale_inv",
) -> Matrix:
    codes = random_codes(0, 256, (out, inp), seed).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3F  # not NaN
    grid = (-(-out // block[0]), -(-inp // block[1]))
    if scale_dtype == torch.float8_e8m0fnu:
        exponents = random_codes(110, 130, grid, seed)
        stored = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
        scales = torch.exp2(exponents.float() - 127)
    else:
        stored = random_scales(grid, seed, scale_dtype)
        scales = stored
    value = codes.view(torch.float8_e4m3fn).float() * spread(scales, out, inp, block)
    tensors = {"weight": codes.view(torch.float8_e4m3fn), tail: stored.reshape(scale_shape or grid)}
    return tensors, value.bfloat16()


def int8_rows(out: int, inp: int, seed: int) -> Matrix:
    codes = random_codes(-128, 128, (out, inp), seed).to(torch.int8)
    scales = random_scales((out, 1), seed)
    return {"weight": codes, "weight_scale": scales}, (codes.float() * scales).bfloat16()


def compressed_tensors(
    out: int,
    inp: int,
    seed: int,
    *,
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    asymmetric: bool = False,
) -> Matrix:
    """INT4 "pack-quantized": codes -8..7 stored with 8 added, 8 a word along the columns; zero points the
    same along the rows; w = (code - zero point) * scale."""
    codes = random_codes(-8, 8, (out, inp), seed)
    scales = random_scales((out, inp // group), seed, dtype)
    tensors = {
        "weight_packed": pack_nibbles(codes + 8, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out, inp]),
    }
    if asymmetric:
        zeros = random_codes(-8, 8, (out, inp // group), seed + 2)
        tensors["weight_zero_point"] = pack_nibbles(zeros + 8, 0)
        codes = codes - zeros.repeat_interleave(group, 1)
    return tensors, (codes.float() * spread(scales, out, inp, (1, group))).bfloat16()


def zero_points(shape: tuple[int, int], seed: int, asymmetric: bool) -> Tensor:
    return random_codes(0, 16, shape, seed + 2) if asymmetric else torch.full(shape, 8)


def gptq(
    out: int,
    inp: int,
    seed: int,
    *,
    group: int,
    dtype: torch.dtype = torch.float16,
    asymmetric: bool = False,
    g_idx: bool = True,
) -> Matrix:
    """qweight [in/8, out], qzeros [groups, out/8] with 1 subtracted, scales [groups, out]."""
    codes = random_codes(0, 16, (out, inp), seed)
    zeros = zero_points((out, inp // group), seed, asymmetric)
    scales = random_scales((inp // group, out), seed, dtype)
    tensors = {
        "qweight": pack_nibbles(codes.T, 0),
        "qzeros": pack_nibbles((zeros.T - 1) & 15, 1),
        "scales": scales,
    }
    if g_idx:
        tensors["g_idx"] = (torch.arange(inp) // group).to(torch.int32)
    value = (codes - zeros.repeat_interleave(group, 1)).float() * spread(scales.T, out, inp, (1, group))
    return tensors, value.bfloat16()


def awq(out: int, inp: int, seed: int, *, group: int, asymmetric: bool = True) -> Matrix:
    """qweight [in, out/8], qzeros [groups, out/8], nibbles in the order 0 2 4 6 1 3 5 7; scales
    [groups, out]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes = random_codes(0, 16, (out, inp), seed)
    zeros = zero_points((out, inp // group), seed, asymmetric)
    scales = random_scales((inp // group, out), seed, torch.float16)
    tensors = {
        "qweight": pack_nibbles(codes.T, 1, order),
        "qzeros": pack_nibbles(zeros.T, 1, order),
        "scales": scales,
    }
    value = (codes - zeros.repeat_interleave(group, 1)).float() * spread(scales.T, out, inp, (1, group))
    return tensors, value.bfloat16()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(experts: int, out: int, inp: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks [E, out, in/32, 16], scales [E, out, in/32], value [E, out, in])."""
    codes = random_codes(0, 16, (experts, out, inp), seed)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).unflatten(-1, (-1, 16))
    scales = random_codes(100, 140, (experts, out, inp // 32), seed + 1).to(torch.uint8)
    factors = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    return blocks, scales, (E2M1[codes] * factors).bfloat16()


def nvfp4(out: int, inp: int, seed: int, *, modelopt: bool = False) -> Matrix:
    """E2M1, two codes a byte, lower nibbles first; E4M3 scales for 16 columns; and one fp32 number a matrix,
    by which compressed-tensors divides the scales and ModelOpt multiplies them, rounding that to fp32."""
    codes = random_codes(0, 16, (out, inp), seed)
    scales = random_codes(0, 0x7F, (out, inp // 16), seed + 1).to(torch.uint8).view(torch.float8_e4m3fn)
    whole = torch.rand(1, generator=rng(seed + 2)) + 0.5
    whole = whole * 1e-4 if modelopt else whole * 3e3
    tensors = {
        "weight" if modelopt else "weight_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scales,
        "weight_scale_2" if modelopt else "weight_global_scale": whole[0] if modelopt else whole,
        "input_scale" if modelopt else "input_global_scale": torch.ones(1),  # of activations
    }
    factors = scales.float() * whole if modelopt else scales.float() / whole
    return tensors, (E2M1[codes] * factors.repeat_interleave(16, 1)).bfloat16()


def kt_part(codes: Tensor, bits: int) -> Tensor:
    """The bytes of one part, tile by tile: row blocks of 64 (int8) or 128 (int4), column blocks of 3584,
    tiles of 32 rows by 64 bytes, each two halves of [k/4][row][4]. int4: low nibbles are 64 columns, high the
    next."""
    rows, cols = codes.shape
    row_block, tile_cols = (64, 64) if bits == 8 else (128, 128)
    tiles = []
    for r0 in range(0, rows, row_block):
        for c0 in range(0, cols, 3584):
            for r in range(r0, min(r0 + row_block, rows), 32):
                for c in range(c0, min(c0 + 3584, cols), tile_cols):
                    tile = codes[r : r + 32, c : c + tile_cols]
                    if bits == 4:
                        tile = (tile[:, :64] & 15) | (tile[:, 64:] & 15) << 4
                    tiles.append((tile & 255).reshape(2, 16, 16, 4).transpose(1, 2).reshape(-1))
    return torch.cat(tiles).to(torch.uint8).view(torch.int8)


def kt_matrix(
    out: int, inp: int, seed: int, *, bits: int, parts: int, down: bool
) -> tuple[list[Matrix], Tensor]:
    """The parts of one matrix, cut between rows or, for down, between columns, and its value."""
    shape = (out, inp // parts) if down else (out // parts, inp)
    made: list[Matrix] = []
    for part in range(parts):
        limit = 1 << (bits - 1)
        codes = random_codes(-limit, limit, shape, seed + 10 * part)
        scales = random_scales((shape[0],), seed + 10 * part)
        factor = 1 if bits == 8 else 16
        value = (codes.float() * (scales[:, None] * factor)).bfloat16()
        made.append(({"weight": kt_part(codes, bits), "scale": scales}, value))
    return made, torch.cat([value for _, value in made], 1 if down else 0)
