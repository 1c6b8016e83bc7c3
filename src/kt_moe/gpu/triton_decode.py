"""The Triton kernel that decodes stored weights to bf16. docs/formats.md has the formats.

A matrix is a sequence of units: up to 32 neighbouring columns that share a scale, 16 bytes of 4-bit codes.
The value of a code is made from bits, without tables and conversions: an integer n < 2^23 is the mantissa of
2^23 + n, and the bits of a small float, moved to the places of fp32's, are that float times a power of two.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

_TWO_23: tl.constexpr = tl.constexpr(0x4B000000)  # the bits of 2^23


@triton.jit
def _counted(n):
    """2^23 + n of an integer."""
    return (n | _TWO_23).to(tl.float32, bitcast=True)


@triton.jit
def _small_float(codes, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Codes of sign, exponent and mantissa; subnormal ones are subnormal in fp32 until they are scaled."""
    magnitude = (codes & (1 << (BITS - 1)) - 1) << (23 - MANTISSA)
    sign = (codes >> (BITS - 1)) << 31
    return (magnitude | sign).to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def _e4m3(codes):
    return tl.where((codes & 127) == 127, float("nan"), _small_float(codes, 8, 3, 7))


@triton.jit
def _scale(raw, place, mask, SCALE: tl.constexpr):
    if SCALE == "f32":
        return tl.load(raw.to(tl.pointer_type(tl.float32)) + place, mask=mask, other=0.0)
    if SCALE == "bf16":
        return tl.load(raw.to(tl.pointer_type(tl.bfloat16)) + place, mask=mask, other=0.0).to(tl.float32)
    exponent = tl.load(raw + place, mask=mask, other=127).to(tl.int32)
    if SCALE == "e4m3":
        return _e4m3(exponent)
    odd = ((exponent == 0) | (exponent == 255)).to(tl.int32)
    return (exponent << 23 | odd << 22).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["index"])
def dequantize(
    raw, index, out,
    SLOT_BYTES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, OUT_MATRIX: tl.constexpr,
    OUT_STRIDE: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, ZEROS: tl.constexpr,
    GLOBAL_SCALE: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr, DIVIDES: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """UNITS units of UNIT columns of one expert. See `products.dequantize`."""
    ACROSS: tl.constexpr = (COLS + UNIT - 1) // UNIT
    PACKED: tl.constexpr = CODE == "int4" or CODE == "e2m1"
    expert = tl.program_id(1).to(tl.int64)
    raw += tl.load(index + expert).to(tl.int64) * SLOT_BYTES
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row, col = unit // ACROSS, unit % ACROSS * UNIT
    exists = row < ROWS
    j = tl.arange(0, UNIT)[None, :]
    there = exists[:, None] & (col[:, None] + j < COLS)
    to = out + expert * OUT_MATRIX + row.to(tl.int64)[:, None] * OUT_STRIDE + col[:, None] + j

    if CODE == "bf16":
        weights = (raw + CODES).to(tl.pointer_type(tl.bfloat16)) + row[:, None] * COLS + col[:, None] + j
        tl.store(to, tl.load(weights, mask=there, other=0.0), mask=there)
        return

    place = row // SCALE_ROWS * ((COLS + SCALE_COLS - 1) // SCALE_COLS) + col // SCALE_COLS
    scale = _scale(raw + SCALES, place, exists, SCALE)[:, None]
    if GLOBAL_SCALE >= 0:
        global_scale = tl.load((raw + GLOBAL_SCALE).to(tl.pointer_type(tl.float32)))
        scale = tl.div_rn(scale, global_scale) if DIVIDES else scale * global_scale
    if PACKED:
        ROW_BYTES: tl.constexpr = (COLS + 1) // 2
        byte = col[:, None] // 2 + tl.arange(0, UNIT // 2)[None, :]
        pairs = tl.load(
            raw + CODES + row[:, None] * ROW_BYTES + byte, mask=exists[:, None] & (byte < ROW_BYTES), other=0
        )
        codes = tl.interleave((pairs & 15).to(tl.int32), (pairs >> 4).to(tl.int32))
    else:
        codes = tl.load(raw + CODES + row[:, None] * COLS + col[:, None] + j, mask=there, other=0).to(
            tl.int32
        )

    if CODE == "int4":
        if ZEROS >= 0:
            zero = tl.load(raw + ZEROS + place, mask=exists, other=0).to(tl.int32)[:, None]
            value = _counted(codes) - _counted(zero)
        else:
            value = _counted(codes) - 8388616.0  # 2^23 + 8
    elif CODE == "int8":
        value = _counted(codes ^ 128) - 8388736.0  # 2^23 + 128
    elif CODE == "e4m3":
        value = _e4m3(codes)
    else:
        value = _small_float(codes, 4, 1, 1)
    product = value * scale
    bits = product.to(tl.bfloat16).to(tl.int16, bitcast=True)
    bits = tl.where(product == product, bits, 0x7FC0)
    tl.store(to, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=there)
