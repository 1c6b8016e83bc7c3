"""Tensors on their way to the core: refused by name, or brought into the form it reads."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    """Refuse what has no rows of numbers in memory.

    Raises:
        TypeError: not a torch.Tensor.
        ValueError: on meta, sparse, nested or of another layout that is not strided.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, wanted a torch.Tensor")
    if value.is_meta:
        raise ValueError(f"{name} is on meta, wanted a tensor with data")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name} is {layout}, wanted a dense tensor")


def on_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, on the CPU and without autograd; the tensor itself where its memory is so already."""
    wanted = dtype or tensor.dtype
    if tensor.is_cpu and tensor.dtype is wanted and not tensor.is_neg() and tensor.is_contiguous():
        return tensor  # most calls, most tensors: each conversion below costs a microsecond
    # A view with the negative bit (`z.conj().imag`) holds the numbers with the other sign.
    return tensor.detach().to("cpu", wanted).resolve_neg().contiguous()
