"""How checkpoints hold a quantised matrix: for each format what its tensors are as blocks of codes, and back.

A matrix [out, in] is codes and, for each block of it, a scale and perhaps a zero point; its value is
`(code - zero point) * scale`. docs/formats.md has the formats. A new one is a row of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
_E2M1_MOST, _E4M3_LEAST, _E4M3_MOST = 6.0, 2.0**-9, 448.0
_E8M0 = getattr(torch, "float8_e8m0fnu", None)  # torch 2.7
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLAIN_ORDER = tuple(range(8))
Tensors = Mapping[str, Tensor]  # by role: codes, scales, zeros, order; factor or divisor of nvfp4's scales
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """A matrix [R, C] apart: codes [R, C] as fp32 numbers, scale and zero point of each block [r, c] or None.

    block: rows and columns that share them.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: tuple[int, int]


Rule = Callable[[Tensor, Blocks, Tensors], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        unpack: the tensors of a matrix, and [out, in].
        pack: tensors by role for other codes, scales and zero points, with dtypes and shapes of the old ones.
        nearest: the codes nearest to numbers.
        rule: scales, as they are after they were stored, and zero points that the format gives to values in
            blocks [r, c, elements]; the blocks and tensors are the old ones.
        widened: the old tensors, changed where a value of the matrix is beyond all that they can hold.
        beside: the shapes of other tensors by role, for [out, in], after [E] where experts are together, and
            the shape of the scales.
    """

    unpack: Callable[[Tensors, Shape], Blocks]
    pack: Callable[[Blocks, Tensors], dict[str, Tensor]]
    nearest: Callable[[Tensor], Tensor]
    rule: Rule
    beside: Callable[[Shape, Shape], dict[str, Shape]] = lambda shape, scales: {}
    widened: Callable[[Tensor, Tensors], Tensors] = lambda value, old: old


# ---- fp8 and int8: a code a byte, scales of rows or blocks of any size


def _unpack_bytes(tensors: Tensors, shape: Shape) -> Blocks:
    grid, block = _grid(tensors["scales"].float(), *shape)
    return Blocks(tensors["codes"].float(), grid, None, block)


def _pack_bytes(new: Blocks, old: Tensors) -> dict[str, Tensor]:
    scales = old["scales"]
    return {
        "codes": new.codes.to(old["codes"].dtype),
        "scales": new.scales.to(scales.dtype).reshape(scales.shape),
    }


def _grid(scales: Tensor, out: int, into: int) -> tuple[Tensor, tuple[int, int]]:
    """Scales as [r, c], and rows and columns that share one."""
    if scales.numel() == 1:
        return scales.view(1, 1), (out, into)
    if scales.shape in ((out,), (out, 1)):
        return scales.view(out, 1), (1, into)
    if scales.shape == (ceil(out / 128), ceil(into / 128)):
        return scales, (128, 128)
    if scales.dim() == 2 and scales.shape[0] == out and into % scales.shape[1] == 0:
        return scales, (1, into // scales.shape[1])
    raise ValueError(f"scales are {list(scales.shape)} for a matrix of {[out, into]}")


def _nearest_e4m3(levels: Tensor) -> Tensor:
    return levels.clamp(-_E4M3_MOST, _E4M3_MOST).to(torch.float8_e4m3fn).float()


def _rule_e4m3(rows: Tensor, old: Blocks, tensors: Tensors) -> tuple[Tensor, None]:
    scales, dtype = rows.abs().amax(-1) / _E4M3_MOST, tensors["scales"].dtype
    if dtype is _E8M0:
        scales = torch.exp2(torch.ceil(torch.log2(scales)).clamp(-127, 127))
    return scales.to(dtype).float(), None


# ---- Integers


def _integers(low: int, high: int) -> dict[str, Any]:
    """`nearest` and `rule` of codes in [low, high]; zero points in the middle are symmetric ones."""

    def nearest(levels: Tensor) -> Tensor:
        return levels.round().clamp(low, high)

    def rule(rows: Tensor, old: Blocks, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        zeros, dtype = old.zeros, tensors["scales"].dtype
        if zeros is None or bool((zeros == (low + high + 1) // 2).all()):
            return (rows.abs().amax(-1) / ((high - low) / 2)).to(dtype).float(), zeros
        least, most = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
        scales = ((most - least) / (high - low)).to(dtype).float()
        return scales, (low - least / scales).round().nan_to_num(low).clamp(low, high)

    return {"nearest": nearest, "rule": rule}


def _unpack_int4(tensors: Tensors, shape: Shape) -> Blocks:
    out, into = shape
    grid, zeros = tensors["scales"].float(), tensors.get("zeros")
    points = torch.zeros_like(grid) if zeros is None else _nibbles(zeros, 0)[:out].float() - 8
    codes = _nibbles(tensors["codes"], 1)[:, :into].float() - 8
    return Blocks(codes, grid, points, (1, into // grid.shape[1]))


def _pack_int4(new: Blocks, old: Tensors) -> dict[str, Tensor]:
    scales = old["scales"]
    packed = {
        "codes": _words(new.codes.long() + 8, 1),
        "scales": new.scales.to(scales.dtype).reshape(scales.shape),
    }
    if "zeros" in old and new.zeros is not None:
        packed["zeros"] = _words(new.zeros.long() + 8, 0)
    return packed


def _beside_int4(shape: Shape, scales: Shape) -> dict[str, Shape]:
    out, into = shape[-2:]
    groups = groups_in(scales[-1:], into)
    return {"scales": (out, groups), "zeros": (ceil(out / 8), groups)}


def _unpack_words(tensors: Tensors, shape: Shape, dim: int, order: Shape, less: int) -> Blocks:
    """gptq, gptq_v2 and awq: words of codes along `dim`; zero points are stored less `less`."""
    out, into = shape
    grid = tensors["scales"].float().T
    codes = _nibbles(tensors["codes"], dim, order)[:into, :out].T
    points = (_nibbles(tensors["zeros"], 1, order)[:, :out] + less & 15).T
    return Blocks(codes.float(), grid, points.float(), (1, into // grid.shape[1]))


def _pack_words(new: Blocks, old: Tensors, dim: int, order: Shape, less: int) -> dict[str, Tensor]:
    assert new.zeros is not None
    return {
        "codes": _words(new.codes.long().T, dim, order),
        "zeros": _words((new.zeros.long() - less & 15).T, 1, order),
        "scales": new.scales.T.to(old["scales"].dtype).contiguous(),
    }


def _words_of(dim: int, order: Shape, less: int) -> dict[str, Any]:
    return {
        "unpack": lambda tensors, shape: _unpack_words(tensors, shape, dim, order, less),
        "pack": lambda new, old: _pack_words(new, old, dim, order, less),
        "beside": _beside_words,
        **_integers(0, 15),
    }


def _beside_words(shape: Shape, scales: Shape) -> dict[str, Shape]:
    out, into = shape[-2:]
    groups = groups_in(scales[:1], into)
    return {"scales": (groups, out), "zeros": (groups, ceil(out / 8)), "order": (into,)}


# ---- E2M1: two codes a byte


def _pairs(codes: Tensor) -> Tensor:
    """[out, in] numbers of bytes [out, in / 2] or [out, in / 32, 16]."""
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()
    return _E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)


def _bytes(codes: Tensor, old: Tensor) -> Tensor:
    nibbles = torch.bucketize(codes.abs().contiguous(), _E2M1) | (torch.signbit(codes).long() << 3)
    pairs = nibbles.reshape(*old.shape, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def _nearest_e2m1(levels: Tensor) -> Tensor:
    """A tie goes to the code whose last bit is 0."""
    middles = (_E2M1[1:] + _E2M1[:-1]) / 2
    size = levels.abs()
    below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    return torch.copysign(_E2M1[torch.where(below % 2 == 0, below, above)], levels)


def _unpack_mxfp4(tensors: Tensors, shape: Shape) -> Blocks:
    scales = torch.exp2(tensors["scales"].view(torch.uint8).float() - 127)
    return Blocks(_pairs(tensors["codes"]), scales, None, (1, 32))


def _pack_mxfp4(new: Blocks, old: Tensors) -> dict[str, Tensor]:
    exponents = (torch.log2(new.scales).round() + 127).to(torch.uint8)
    return {"codes": _bytes(new.codes, old["codes"]), "scales": exponents.view(old["scales"].dtype)}


def _rule_mxfp4(rows: Tensor, old: Blocks, tensors: Tensors) -> tuple[Tensor, None]:
    exponents = torch.floor(torch.log2(rows.abs().amax(-1))) - 2
    return torch.exp2(exponents.clamp(-127, 127)), None


def _unpack_nvfp4(tensors: Tensors, shape: Shape) -> Blocks:
    return Blocks(_pairs(tensors["codes"]), _scaled(tensors["scales"], tensors), None, (1, 16))


def _scaled(scales: Tensor, tensors: Tensors) -> Tensor:
    """E4M3 scales times the number of the matrix, or by it."""
    if "factor" in tensors:
        return scales.float() * tensors["factor"].reshape(())
    return scales.float() / tensors["divisor"].reshape(())


def _unscaled(scales: Tensor, tensors: Tensors, least: float = 0.0) -> Tensor:
    """The E4M3 scales nearest to that, at least `least`."""
    whole = tensors["factor" if "factor" in tensors else "divisor"].reshape(())
    levels = scales / whole if "factor" in tensors else scales * whole
    return levels.clamp(least, _E4M3_MOST).to(torch.float8_e4m3fn)


def _widened_nvfp4(value: Tensor, old: Tensors) -> Tensors:
    """With another number of the matrix, by ModelOpt's rule, where the largest scale is too small for it."""
    largest, one = value.abs().max(), torch.ones(())
    if bool(largest <= _E2M1_MOST * _scaled(_E4M3_MOST * one, old)):
        return old
    role = "factor" if "factor" in old else "divisor"
    whole = largest / (_E2M1_MOST * _E4M3_MOST)
    whole = whole if role == "factor" else 1.0 / whole
    new = {**old, role: whole.to(old[role].dtype).reshape(old[role].shape)}
    return {**new, "scales": _unscaled(_scaled(old["scales"], old), new)}


def _pack_nvfp4(new: Blocks, old: Tensors) -> dict[str, Tensor]:
    return {"codes": _bytes(new.codes, old["codes"]), "scales": _unscaled(new.scales, old)}


def _rule_nvfp4(rows: Tensor, old: Blocks, tensors: Tensors) -> tuple[Tensor, None]:
    return _scaled(_unscaled(rows.abs().amax(-1) / _E2M1_MOST, tensors, _E4M3_LEAST), tensors), None


FORMATS: dict[str, Format] = {
    "fp8": Format(_unpack_bytes, _pack_bytes, _nearest_e4m3, _rule_e4m3),
    "int8": Format(_unpack_bytes, _pack_bytes, **_integers(-128, 127)),
    "int4": Format(_unpack_int4, _pack_int4, beside=_beside_int4, **_integers(-8, 7)),
    "gptq": Format(**_words_of(0, _PLAIN_ORDER, 1)),
    "gptq_v2": Format(**_words_of(0, _PLAIN_ORDER, 0)),
    "awq": Format(**_words_of(1, _AWQ_ORDER, 0)),
    "mxfp4": Format(
        _unpack_mxfp4, _pack_mxfp4, _nearest_e2m1, _rule_mxfp4,
        lambda shape, scales: {"scales": (*shape[:-1], shape[-1] // 32)},
    ),
    "nvfp4": Format(
        _unpack_nvfp4, _pack_nvfp4, _nearest_e2m1, _rule_nvfp4,
        lambda shape, scales: {"scales": (*shape[:-1], shape[-1] // 16)}, _widened_nvfp4,
    ),
}  # fmt: skip


def groups_in(found: Shape, into: int) -> int:
    """How many groups a row of `into` columns has by the shape of its scales; 1 for what cannot be.

    Groups are of a power of two of columns. Two scales of 96 columns are of 64 and a rest of 32, or of 48.
    """
    groups = found[0] if found else 0
    if groups < 1 or into % groups:
        return 1
    group = into // groups
    return groups if group & (group - 1) == 0 else 1


def _nibbles(words: Tensor, dim: int, order: Shape = _PLAIN_ORDER) -> Tensor:
    """Codes of 4 bits, 8 a word of int32 along `dim`; nibble n of a word is code order[n]."""
    shifts = torch.tensor([4 * order.index(n) for n in range(8)])
    return ((words.movedim(dim, -1)[..., None] >> shifts) & 15).flatten(-2).movedim(-1, dim).long()


def _words(codes: Tensor, dim: int, order: Shape = _PLAIN_ORDER) -> Tensor:
    """The reverse; filled with zeros."""
    codes = codes.movedim(dim, -1)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    eights = padded.reshape(*padded.shape[:-1], -1, 8)
    words = (eights[..., list(order)] << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()
