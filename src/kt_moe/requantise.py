"""Matrices that checkpoints store quantised: decoded, and encoded again by their format's own rule.

A matrix [out, in] is codes and, for each block of it, a scale and perhaps a zero point; its value is
`(code - zero point) * scale`. Formats and the names of their tensors are those of docs/formats.md. Encoding
takes for each block the scale that the format's rule gives, or the one that was there, whichever leaves the
smaller error: where nothing changed, the codes stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from kt_moe.checkpoint import TensorInfo

_FLOATS = ("BF16", "F16", "F32")
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
_BY_ROW = ("fp8", "int8", "int4")  # whose scales are stored as numbers, rows first
_E8M0 = getattr(torch, "float8_e8m0fnu", None)  # torch 2.7
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")  # of fp8 and int8
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLAIN_ORDER = tuple(range(8))
Tensors = Mapping[str, Tensor]  # by role: codes, scales, zeros, order


@dataclass(frozen=True)
class Blocks:
    """A matrix [R, C] apart: codes [R, C] as fp32 numbers, scale and zero point of each block [r, c] or None.

    block: rows and columns that share them.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores a matrix, or one for each expert in the same tensors.

    Attributes:
        format: "fp8", "int8", "int4" (compressed-tensors), "gptq", "awq" or "mxfp4".
        names: of its tensors, by role.
        shape: [out, in], after [E] where experts are together.
    """

    format: str
    names: Mapping[str, str]
    shape: tuple[int, ...]

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
        parts = self._blocks(old)
        rows = _in_blocks(value, parts.block)
        best = _quantised(rows, parts.scales, parts.zeros, self._round)
        new = _quantised(rows, *self._rule(rows, parts, old["scales"].dtype), self._round)
        better = (new.error < best.error)[..., None]
        codes = torch.where(better, new.codes, best.codes)
        scales = torch.where(better[..., 0], new.scales, best.scales)
        zeros = None
        if best.zeros is not None and new.zeros is not None:
            zeros = torch.where(better[..., 0], new.zeros, best.zeros)
        codes = _from_blocks(codes, parts.block, value.shape)
        codes = torch.where(codes == parts.codes, parts.codes, codes)  # where both are zero, the sign it had
        return self._tensors(codes, scales, zeros, old)

    def _blocks(self, tensors: Tensors) -> Blocks:
        codes, scales = tensors["codes"], tensors["scales"]
        out, into = self.shape[-2:]
        if self.format in ("fp8", "int8"):
            grid, block = _grid(scales.float(), out, into)
            return Blocks(codes.float(), grid, None, block)
        if self.format == "mxfp4":
            nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-3).long()
            values = _E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
            return Blocks(values, torch.exp2(scales.float() - 127), None, (1, 32))
        zeros = tensors.get("zeros")
        if self.format == "int4":
            grid = scales.float()
            found = None if zeros is None else _nibbles(zeros, 0)[:out].float() - 8
            symmetric = torch.zeros_like(grid)
            return Blocks(
                _nibbles(codes, 1)[:, :into].float() - 8,
                grid,
                symmetric if found is None else found,
                (1, into // grid.shape[1]),
            )
        grid = scales.float().T
        assert zeros is not None
        if self.format == "gptq":
            if "order" in tensors and not torch.equal(
                tensors["order"].long(), torch.arange(into) // (into // grid.shape[1])
            ):
                raise ValueError(f"{self.names['order']}: columns in act-order, which merge_checkpoint lacks")
            points = (_nibbles(zeros, 1)[:, :out] + 1 & 15).T
            return Blocks(
                _nibbles(codes, 0)[:into].T.float(), grid, points.float(), (1, into // grid.shape[1])
            )
        points = _nibbles(zeros, 1, _AWQ_ORDER)[:, :out].T
        levels = _nibbles(codes, 1, _AWQ_ORDER)[:, :out].T
        return Blocks(levels.float(), grid, points.float(), (1, into // grid.shape[1]))

    def _tensors(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, old: Tensors
    ) -> dict[str, Tensor]:
        shape, dtype = old["scales"].shape, old["scales"].dtype
        new = dict(old)
        new["scales"] = scales.to(dtype).reshape(shape) if self.format in _BY_ROW else scales
        if self.format == "fp8":
            new["codes"] = codes.to(torch.float8_e4m3fn)
        elif self.format == "int8":
            new["codes"] = codes.to(torch.int8)
        elif self.format == "mxfp4":
            nibbles = torch.bucketize(codes.abs().contiguous(), _E2M1) | (torch.signbit(codes).long() << 3)
            pairs = nibbles.reshape(*old["codes"].shape, 2)
            new["codes"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
            new["scales"] = (torch.log2(scales).round() + 127).to(dtype)
        elif self.format == "int4":
            new["codes"] = _words(codes.long() + 8, 1)
            if "zeros" in old:
                assert zeros is not None
                new["zeros"] = _words(zeros.long() + 8, 0)
        else:
            assert zeros is not None
            gptq = self.format == "gptq"
            order = _PLAIN_ORDER if gptq else _AWQ_ORDER
            new["codes"] = _words(codes.long().T, 0 if gptq else 1, order)
            new["zeros"] = _words((zeros.long() - 1 & 15 if gptq else zeros.long()).T, 1, order)
            new["scales"] = scales.T.to(dtype).contiguous()
        return new

    def _round(self, levels: Tensor) -> Tensor:
        """The nearest codes."""
        if self.format == "fp8":
            return levels.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        if self.format == "mxfp4":  # a tie goes to the code whose last bit is 0
            middles = (_E2M1[1:] + _E2M1[:-1]) / 2
            size = levels.abs()
            below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
            index = torch.where(below % 2 == 0, below, above)
            return torch.copysign(_E2M1[index], levels)
        low, high = self._range()
        return levels.round().clamp(low, high)

    def _range(self) -> tuple[int, int]:
        return {"int8": (-128, 127), "int4": (-8, 7)}.get(self.format, (0, 15))

    def _rule(self, rows: Tensor, old: Blocks, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scales, rounded as they are stored, and zero points that the format gives to values in blocks."""
        largest = rows.abs().amax(-1)
        zeros = old.zeros
        if self.format == "mxfp4":
            exponents = torch.floor(torch.log2(largest)) - 2
            return torch.exp2(exponents.clamp(-127, 127)), None
        if self.format == "fp8":
            scales = largest / 448
            if dtype is _E8M0:
                scales = torch.exp2(torch.ceil(torch.log2(scales)).clamp(-127, 127))
        elif zeros is None or bool((zeros == (sum(self._range()) + 1) // 2).all()):  # symmetric
            low, high = self._range()
            scales = largest / ((high - low) / 2)
        else:
            least, most = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
            low, high = self._range()
            scales = ((most - least) / (high - low)).to(dtype).float()
            zeros = (low - least / scales).round().nan_to_num(low).clamp(low, high)
        return scales.to(dtype).float(), zeros


@dataclass(frozen=True)
class _Quantised:
    codes: Tensor  # [r, c, elements of a block]
    scales: Tensor  # [r, c]
    zeros: Tensor | None
    error: Tensor  # [r, c], sum of squares; infinite where the scale is none


def _quantised(
    rows: Tensor, scales: Tensor, zeros: Tensor | None, nearest: Callable[[Tensor], Tensor]
) -> _Quantised:
    usable = (scales > 0) & scales.isfinite()
    wide = torch.where(usable, scales, 1.0)[..., None]
    shift = -0.0 if zeros is None else zeros[..., None]  # -0.0: adding it leaves a zero its sign
    codes = nearest(rows / wide + shift)
    error = ((codes - shift) * wide - rows).square().sum(-1)
    return _Quantised(codes, scales, zeros, torch.where(usable, error, torch.inf))


def stored_as(name: str, tensors: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> Stored | None:
    """How a checkpoint stores a matrix, or one for each expert; None: as a tensor of floats of this name.

    Args:
        name: of the tensor if it is one, "...gate_proj.weight" or "...experts.gate_up_proj".
        shape: [out, in], after [E] where experts are together.

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
        zeros = f"{stem}.weight_zero_point"
        roles |= {"zeros": zeros} if zeros in tensors else {}
        if f"{stem}.weight_g_idx" in tensors:
            raise ValueError(f"{stem}.weight_g_idx: columns in act-order, which merge_checkpoint lacks")
        return _checked(Stored("int4", roles, shape), tensors, (out, ceil(into / 8)))
    if f"{stem}.qweight" in tensors:
        codes = f"{stem}.qweight"
        roles = {"codes": codes, "scales": f"{stem}.scales", "zeros": f"{stem}.qzeros"}
        gptq = tensors[codes].shape == (ceil(into / 8), out)
        if gptq and f"{stem}.g_idx" in tensors:
            roles["order"] = f"{stem}.g_idx"
        packed = (ceil(into / 8), out) if gptq else (into, ceil(out / 8))
        return _checked(Stored("gptq" if gptq else "awq", roles, shape), tensors, packed)
    raise KeyError(name)


def _checked(stored: Stored, tensors: Mapping[str, TensorInfo], packed: tuple[int, ...]) -> Stored:
    for name in stored.names.values():
        if name not in tensors:
            raise ValueError(f"the checkpoint lacks {name}")
    wanted = {"codes": packed, **_beside_codes(stored, tensors[stored.names["scales"]].shape)}
    for role, name in stored.names.items():
        found = tensors[name].shape
        if found != wanted.get(role, found):
            raise ValueError(f"{name} is {list(found)}, wanted {list(wanted[role])} for {list(stored.shape)}")
    scales = stored.names["scales"]
    if stored.format in ("fp8", "int8") and tensors[scales].dtype not in _SCALES:
        raise ValueError(f"{scales} is {tensors[scales].dtype}, wanted one of {', '.join(_SCALES)}")
    return stored


def _beside_codes(stored: Stored, scales: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes by role, for the number of groups that the scales have if it divides the columns."""
    out, into = stored.shape[-2:]
    if stored.format == "mxfp4":
        return {"scales": (*stored.shape[:-1], into // 32)}
    if stored.format == "int4":
        groups = _groups(scales[-1:], into)
        return {"scales": (out, groups), "zeros": (ceil(out / 8), groups)}
    if stored.format in ("gptq", "awq"):
        groups = _groups(scales[:1], into)
        return {"scales": (groups, out), "zeros": (groups, ceil(out / 8)), "order": (into,)}
    return {}  # `_grid` looks at those of fp8 and int8


def _groups(found: tuple[int, ...], into: int) -> int:
    return found[0] if found and found[0] and into % found[0] == 0 else 1


def _grid(scales: Tensor, out: int, into: int) -> tuple[Tensor, tuple[int, int]]:
    """Scales of fp8 or int8 as [r, c], and rows and columns that share one."""
    if scales.numel() == 1:
        return scales.view(1, 1), (out, into)
    if scales.shape in ((out,), (out, 1)):
        return scales.view(out, 1), (1, into)
    if scales.shape == (ceil(out / 128), ceil(into / 128)):
        return scales, (128, 128)
    if scales.dim() == 2 and scales.shape[0] == out and into % scales.shape[1] == 0:
        return scales, (1, into // scales.shape[1])
    raise ValueError(f"scales are {list(scales.shape)} for a matrix of {[out, into]}")


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


def _nibbles(words: Tensor, dim: int, order: tuple[int, ...] = _PLAIN_ORDER) -> Tensor:
    """Codes of 4 bits, 8 a word of int32 along `dim`; nibble n of a word is code order[n]."""
    shifts = torch.tensor([4 * order.index(n) for n in range(8)])
    return ((words.movedim(dim, -1)[..., None] >> shifts) & 15).flatten(-2).movedim(-1, dim).long()


def _words(codes: Tensor, dim: int, order: tuple[int, ...] = _PLAIN_ORDER) -> Tensor:
    """The reverse; filled with zeros."""
    codes = codes.movedim(dim, -1)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    eights = padded.reshape(*padded.shape[:-1], -1, 8)
    words = (eights[..., list(order)] << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()
