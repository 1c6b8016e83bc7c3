"""Launches of compiled Triton kernels without what Triton does at every call to find the compiled kernel.

That takes 50 to 100 us for kernels with many constants, and a chunk has dozens of launches.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}
# Before 3.3 a compiled kernel took other arguments.
_TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int
) -> None:
    """kernel[grid](*arguments, *constants, **options), compiled at the first call of its kind.

    Args:
        grid: number of programs in one dimension, two or three.
        arguments: tensors, None, floats, and integers of which Triton knows no more than the type.
        constants: `tl.constexpr` parameters, which come behind the arguments.
        options: num_warps and num_stages.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            kinds.append((argument.dtype, address % 16 == 0))
            values.append(address)
        else:
            kinds.append(None if argument is None else _integer_kind(argument))
            values.append(argument)
    key = (id(kernel), _device(), *kinds, *constants, *options.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*values, *constants)
        return
    compiled = kernel[grid](*arguments, *constants, **options)
    if _TAKES_CONSTANTS and hasattr(compiled, "function"):  # Triton's interpreter has none
        _compiled[key] = compiled


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _integer_kind(value: float) -> Any:
    """Triton compiles for the width of an integer."""
    if isinstance(value, float):
        return float
    return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
