"""Bytes of expert weights by format, as the core counts them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kt_moe import _core


@dataclass(frozen=True)
class WeightType:
    """How a matrix is kept: codes, and scales of blocks of them.

    Args:
        format: one of `kt_moe.experts.FORMATS`.
        scale: type of a scale: "none", "f32", "bf16", "e8m0" or "e4m3".
        scale_rows, scale_cols: of the block that shares a scale; 0 columns: the whole row.
        zero_points: a byte for each scale.
        global_scale: an fp32 that scales the scales of the matrix.
    """

    format: str
    scale: str = "none"
    scale_rows: int = 1
    scale_cols: int = 0
    zero_points: bool = False
    global_scale: bool = False

    def nbytes(self, rows: int, cols: int) -> int:
        """Of a [rows, cols] matrix; a row of codes begins on a byte."""
        return _core.matrix_bytes(rows, cols, **asdict(self))

    def __str__(self) -> str:
        if self.scale == "none":
            return self.format
        block = f"{self.scale_rows} x {self.scale_cols}" if self.scale_cols else "row"
        if self.scale_rows == 1 and self.scale_cols:
            block = str(self.scale_cols)
        zeros = " and zero points" if self.zero_points else ""
        whole = ", an f32 scale per matrix" if self.global_scale else ""
        return f"{self.format}, {self.scale} scales{zeros} per {block}{whole}"


# What weights are quantised to on loading.
QUANTISED = {format: WeightType(format, **type) for format, type in _core.quantized_types().items()}


def projection_bytes(
    kind: WeightType, experts: int, hidden: int, intermediate: int, gated: bool = True
) -> dict[str, int]:
    """Of all experts of a layer, by projection: gate, if there is one, and up [I, H], down [H, I]."""
    wide, tall = kind.nbytes(intermediate, hidden), kind.nbytes(hidden, intermediate)
    gate = {"gate": experts * wide} if gated else {}
    return {**gate, "up": experts * wide, "down": experts * tall}


def bias_bytes(experts: int, hidden: int, intermediate: int, gated: bool = True) -> int:
    """Of all experts of a layer with biases, which are bf16 beside weights of any format."""
    return 2 * experts * ((2 if gated else 1) * intermediate + hidden)
