"""Bytes of expert weights by format, as the core counts them."""

from __future__ import annotations

from typing import Any

from kt_moe import _core

# What weights are quantised to on loading: format, type of the scales, and rows and columns of the block that
# shares one (0 columns: a row), as `_core.matrix_bytes` takes them.
QUANTISED: dict[str, dict[str, Any]] = {
    format: {"format": format, **kind} for format, kind in _core.quantized_types().items()
}


def projection_bytes(
    kind: dict[str, Any], experts: int, hidden: int, intermediate: int, gated: bool = True
) -> dict[str, int]:
    """Of all experts of a layer, by projection: gate, if there is one, and up [I, H], down [H, I]."""
    wide = experts * _core.matrix_bytes(intermediate, hidden, **kind)
    down = experts * _core.matrix_bytes(hidden, intermediate, **kind)
    return {**({"gate": wide} if gated else {}), "up": wide, "down": down}


def bias_bytes(experts: int, hidden: int, intermediate: int, gated: bool = True) -> int:
    """Of all experts of a layer with biases, which are bf16 beside weights of any format."""
    return 2 * experts * ((2 if gated else 1) * intermediate + hidden)
