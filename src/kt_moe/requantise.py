"""Matrices that checkpoints store quantised: decoded, and encoded again by their format's own rule.

Formats and the names of their tensors are those of docs/formats.md. Encoding takes for each block the scale
that the format's rule gives, or the one that was there, whichever leaves the smaller error; a block that did
not change stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from kt_moe.checkpoint import TensorInfo
from kt_moe.quantised_formats import FORMATS, Blocks, Format, Tensors

_FLOATS = ("BF16", "F16", "F32")
_WORDS = {"codes": ("I32",), "zeros": ("I32",), "order": ("I32", "I64"), "scales": _FLOATS}
_DTYPES: dict[str, dict[str, tuple[str, ...]]] = {  # by role; what names alone do not tell
    **{format: {"scales": (*_FLOATS, "F8_E8M0")} for format in ("fp8", "int8")},
    **{format: _WORDS for format in ("int4", "gptq", "gptq_v2", "awq")},
    "mxfp4": {"codes": ("U8",), "scales": ("U8", "F8_E8M0")},
    "nvfp4": {"codes": ("U8",), "scales": ("F8_E4M3",), "factor": _FLOATS, "divisor": _FLOATS},
}


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores a matrix, or one for each expert in the same tensors.

    Attributes:
        format: a name of `FORMATS`.
        names: of its tensors, by role.
        shape: [out, in], after [E] where experts are together.
    """

    format: str
    names: Mapping[str, str]
    shape: tuple[int, ...]

    def check(self, tensors: Tensors) -> None:
        """ValueError for zero points of a symmetric gptq_v2 file whose config does not say so."""
        zeros = self._blocks(tensors).zeros if self.format == "gptq" else None
        if zeros is not None and bool((zeros == 9).all()):
            raise ValueError(
                f"{self.names['zeros']} holds nothing but 8, the zero points of a symmetric gptq_v2 file, "
                "and quantization_config has no checkpoint_format gptq_v2"
            )

    def decode(self, tensors: Tensors) -> Tensor:
        """The value of one matrix, fp32 [out, in]."""
        parts = self._blocks(tensors)
        shape = parts.codes.shape
        zeros = 0.0 if parts.zeros is None else _spread(parts.zeros, parts.block, shape)
        return (parts.codes - zeros) * _spread(parts.scales, parts.block, shape)

    def encode(self, value: Tensor, old: Tensors) -> dict[str, Tensor]:
        """The tensors of one matrix with another value, fp32 [out, in].

        Args:
            old: those it had, whose dtypes and shapes the new ones have.

        Raises:
            ValueError: a value that is not finite, or beyond what the scales hold.
        """
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{self.names['codes']} merged is not finite")
        # Where the old tensors do not reach as far as the values, both what they cut off and wider ones do.
        ways = [self._encoded(value, old)]
        if (wider := self._format.widened(value, old)) is not old:
            ways.append(self._encoded(value, wider))
        return min(ways, key=lambda new: float((self.decode(new) - value).square().sum()))

    def _encoded(self, value: Tensor, old: Tensors) -> dict[str, Tensor]:
        format, parts = self._format, self._blocks(old)
        rows = _in_blocks(value, parts.block)
        best = _quantised(rows, parts.scales, parts.zeros, format.nearest)
        new = _quantised(rows, *format.rule(rows, parts, old), format.nearest)
        same = (rows == _in_blocks(self.decode(old), parts.block)).all(-1)
        better = ((new.error < best.error) & ~same)[..., None]
        codes = torch.where(better, new.codes, best.codes)
        scales = torch.where(better[..., 0], new.scales, best.scales)
        zeros = None
        if best.zeros is not None and new.zeros is not None:
            zeros = torch.where(better[..., 0], new.zeros, best.zeros)
        codes = _from_blocks(codes, parts.block, value.shape)
        codes = torch.where(_spread(same, parts.block, value.shape), parts.codes, codes)
        return {**old, **format.pack(replace(parts, codes=codes, scales=scales, zeros=zeros), old)}

    @property
    def _format(self) -> Format:
        return FORMATS[self.format]

    def _blocks(self, tensors: Tensors) -> Blocks:
        parts = self._format.unpack(tensors, self.shape[-2:])
        if "order" in tensors:
            in_order = torch.arange(self.shape[-1]) // parts.block[1]
            if not torch.equal(tensors["order"].long(), in_order):
                raise ValueError(f"{self.names['order']}: columns in act-order, which merge_checkpoint lacks")
        return parts


@dataclass(frozen=True)
class _Quantised:
    codes: Tensor  # [r, c, elements of a block]
    scales: Tensor  # [r, c]
    zeros: Tensor | None
    error: Tensor  # [r, c], sum of squares; infinite where the scale is none


def _quantised(
    rows: Tensor, scales: Tensor, zeros: Tensor | None, nearest: Callable[[Tensor], Tensor]
) -> _Quantised:
    usable = (scales != 0) & scales.isfinite()
    wide = torch.where(usable, scales, 1.0)[..., None]
    shift = -0.0 if zeros is None else zeros[..., None]  # -0.0: adding it leaves a zero its sign
    codes = nearest(rows / wide + shift)
    error = ((codes - shift) * wide - rows).square().sum(-1)
    return _Quantised(codes, scales, zeros, torch.where(usable, error, torch.inf))


def stored_as(
    name: str, tensors: Mapping[str, TensorInfo], shape: tuple[int, ...], gptq: str = "gptq"
) -> Stored | None:
    """How a checkpoint stores a matrix, or one for each expert; None: as a tensor of floats of this name.

    Args:
        name: of the tensor if it is one, "...gate_proj.weight" or "...experts.gate_up_proj".
        shape: [out, in], after [E] where experts are together.
        gptq: which format tensors with GPTQ's names are, "gptq" or "gptq_v2".

    Raises:
        KeyError: the checkpoint has none.
        ValueError: it is stored in a way that is not known here; names the tensor.
    """
    stem = name.removesuffix(".weight")
    if name in tensors:
        dtype = tensors[name].dtype
        if dtype in _FLOATS:
            return None
        scales = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in tensors), None)
        if dtype == "U8" and f"{name}_scale_2" in tensors:  # ModelOpt
            roles = {"codes": name, "scales": f"{name}_scale", "factor": f"{name}_scale_2"}
            return _checked(Stored("nvfp4", roles, shape), tensors, (*shape[:-1], shape[-1] // 2))
        format = {"F8_E4M3": "fp8", "I8": "int8"}.get(dtype)
        if format is None or scales is None or f"{name}_zero_point" in tensors:
            raise ValueError(f"{name} is {dtype}, stored in a way that merge_checkpoint does not know")
        return _checked(Stored(format, {"codes": name, "scales": scales}, shape), tensors, shape)
    if f"{name}_blocks" in tensors:
        roles = {"codes": f"{name}_blocks", "scales": f"{name}_scales"}
        packed = (*shape[:-1], shape[-1] // 32, 16)
        return _checked(Stored("mxfp4", roles, shape), tensors, packed)
    out, into = shape[-2:]
    if f"{stem}.weight_packed" in tensors:
        roles = {"codes": f"{stem}.weight_packed", "scales": f"{stem}.weight_scale"}
        if f"{stem}.weight_global_scale" in tensors:
            roles["divisor"] = f"{stem}.weight_global_scale"
            return _checked(Stored("nvfp4", roles, shape), tensors, (out, into // 2))
        zeros = f"{stem}.weight_zero_point"
        roles |= {"zeros": zeros} if zeros in tensors else {}
        if f"{stem}.weight_g_idx" in tensors:
            raise ValueError(f"{stem}.weight_g_idx: columns in act-order, which merge_checkpoint lacks")
        return _checked(Stored("int4", roles, shape), tensors, (out, ceil(into / 8)))
    if f"{stem}.qweight" in tensors:
        codes = f"{stem}.qweight"
        roles = {"codes": codes, "scales": f"{stem}.scales", "zeros": f"{stem}.qzeros"}
        by_columns = tensors[codes].shape == (ceil(into / 8), out)
        if by_columns and f"{stem}.g_idx" in tensors:
            roles["order"] = f"{stem}.g_idx"
        packed = (ceil(into / 8), out) if by_columns else (into, ceil(out / 8))
        return _checked(Stored(gptq if by_columns else "awq", roles, shape), tensors, packed)
    raise KeyError(name)


def _checked(stored: Stored, tensors: Mapping[str, TensorInfo], packed: tuple[int, ...]) -> Stored:
    for name in stored.names.values():
        if name not in tensors:
            raise ValueError(f"the checkpoint lacks {name}")
    scales = stored.names["scales"]
    beside = FORMATS[stored.format].beside(stored.shape, tensors[scales].shape)
    for role, name in stored.names.items():
        found, wanted = tensors[name].shape, {"codes": packed, **beside}.get(role)
        if wanted is not None and found != wanted:
            raise ValueError(f"{name} is {list(found)}, wanted {list(wanted)} for {list(stored.shape)}")
    for role, allowed in _DTYPES[stored.format].items():
        name = stored.names.get(role, "")
        if name and tensors[name].dtype not in allowed:
            raise ValueError(f"{name} is {tensors[name].dtype}, wanted one of {', '.join(allowed)}")
    return stored


def _in_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] to [r, c, elements of a block], those at the edges filled with zeros."""
    rows, cols = block
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % cols, 0, -matrix.shape[0] % rows))
    grid = len(padded) // rows, padded.shape[1] // cols
    return padded.reshape(grid[0], rows, grid[1], cols).transpose(1, 2).flatten(2)


def _from_blocks(blocks: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    wide = blocks.view(*blocks.shape[:2], *block).transpose(1, 2).flatten(2).flatten(0, 1)
    return wide[: shape[0], : shape[1]]


def _spread(grid: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """One number an element from one a block."""
    wide = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]
