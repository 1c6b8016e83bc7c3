"""Bytes of expert weights by format: what `WeightAt::bytes` in src/cpp/base/weight.h counts."""

from __future__ import annotations

from dataclasses import dataclass

_CODE_BITS = {"bf16": 16, "int8": 8, "int4": 4, "fp8": 8, "mxfp4": 4}
_SCALE_BYTES = {"none": 0, "f32": 4, "bf16": 2, "e8m0": 1}


@dataclass(frozen=True)
class WeightType:
    """How a matrix is kept: codes, and scales of blocks of them.

    Args:
        format: "bf16", "int8", "int4", "fp8" or "mxfp4".
        scale: type of a scale: "none", "f32", "bf16" or "e8m0".
        scale_rows, scale_cols: of the block that shares a scale; 0 columns: the whole row.
        zero_points: a byte for each scale.
    """

    format: str
    scale: str = "none"
    scale_rows: int = 1
    scale_cols: int = 0
    zero_points: bool = False

    def nbytes(self, rows: int, cols: int) -> int:
        """Of a [rows, cols] matrix; a row of codes begins on a byte."""
        codes = rows * _ceil_div(cols * _CODE_BITS[self.format], 8)
        if self.scale == "none":
            return codes
        group = min(self.scale_cols or cols, cols)
        scales = _ceil_div(rows, self.scale_rows) * _ceil_div(cols, group)
        return codes + scales * (_SCALE_BYTES[self.scale] + self.zero_points)

    def __str__(self) -> str:
        if self.scale == "none":
            return self.format
        block = f"{self.scale_rows} x {self.scale_cols}" if self.scale_cols else "row"
        if self.scale_rows == 1 and self.scale_cols:
            block = str(self.scale_cols)
        zeros = " and zero points" if self.zero_points else ""
        return f"{self.format}, {self.scale} scales{zeros} per {block}"


# What weights are quantised to on loading.
QUANTISED = {
    kind.format: kind
    for kind in (
        WeightType("bf16"),
        WeightType("int8", "f32", 1, 128),
        WeightType("int4", "bf16", 1, 32),
        WeightType("fp8", "f32", 128, 128),
        WeightType("mxfp4", "e8m0", 1, 32),
    )
}


def projection_bytes(kind: WeightType, experts: int, hidden: int, intermediate: int) -> dict[str, int]:
    """Of all experts of a layer, by projection: gate and up [I, H], down [H, I]."""
    wide, tall = kind.nbytes(intermediate, hidden), kind.nbytes(hidden, intermediate)
    return {"gate": experts * wide, "up": experts * wide, "down": experts * tall}


def bias_bytes(experts: int, hidden: int, intermediate: int) -> int:
    """Of all experts of a layer with biases, which are bf16 beside weights of any format."""
    return 2 * experts * (2 * intermediate + hidden)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
