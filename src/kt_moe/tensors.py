"""Tensors for the core: refused by name, brought into the form it reads, or made for its results."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kt_moe import _core

_RECYCLED = 1 << 20  # bytes: of smaller tensors the allocator keeps the pages itself


def check_module(name: str, value: object) -> None:
    """TypeError unless it is a torch.nn.Module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} is a {type(value).__name__}, wanted a torch.nn.Module")


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


def refuse_tracing(tensors: Iterable[Tensor | None]) -> None:
    """Refuse calls that torch records or transforms, of which it would see no operation.

    Raises:
        NotImplementedError: one of torch.func's transforms, make_fx, torch.export or torch.jit.trace calls.
    """
    # By the modules that have to be there for it: importing them takes seconds.
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    if torch._C._are_functorch_transforms_active():
        what = "torch.func"
    elif proxies is not None and proxies.get_proxy_mode() is not None:
        what = "make_fx or torch.export"
    elif fakes is not None and any(isinstance(tensor, fakes.FakeTensor) for tensor in tensors):
        what = "a FakeTensorMode"
    elif torch._C._get_tracing_state() is not None:
        what = "torch.jit.trace"
    else:
        return
    raise NotImplementedError(
        f"kt_moe computes experts outside of torch, so {what} cannot record or transform a call: call it "
        "eagerly, also within torch.compile, which breaks the graph here by itself"
    )


class Versions:
    """Which tensors a call was given, by name, to tell in backward which of them was changed since."""

    def __init__(self, names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
        # weak: what is saved for backward, and whether it is, is autograd's and its hooks' to decide
        self._given = [
            (name, weakref.ref(tensor), tensor._version)
            for name, tensor in zip(names, tensors, strict=True)
            if tensor is not None and not tensor.is_inference()
        ]

    def saved_tensors(self, ctx: Any) -> tuple[Tensor, ...]:
        """Those of an autograd node. RuntimeError, naming the tensor, where one was changed in place."""
        try:
            return ctx.saved_tensors  # type: ignore[no-any-return]
        except RuntimeError as error:
            changed = [
                n for n, ref, version in self._given if (t := ref()) is not None and t._version != version
            ]
            if not changed:
                raise
            raise RuntimeError(
                f"{' and '.join(changed)} changed in place between forward and backward, which needs the "
                f"values that forward had: {error}"
            ) from None


def numbers(name: str, count: str, values: Iterable[float] | Tensor | None) -> list[float] | None:
    """As a list of floats; None stays.

    count: how many are wanted, for the message alone.

    Raises:
        TypeError: not numbers.
        ValueError: a tensor of other than one dimension, or as in `check_tensor`.
    """
    if values is None:
        return None
    if isinstance(values, Tensor):
        check_tensor(name, values)
        if values.dim() != 1:
            raise ValueError(f"{name} has shape {list(values.shape)}, wanted [{count}]")
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        return [float(number) for number in (values.tolist() if isinstance(values, Tensor) else values)]
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise TypeError(f"{name} is {values!r}, wanted a tensor or sequence of {count} numbers") from None


def empty(shape: Sequence[int], dtype: torch.dtype, runtime: _core.Runtime) -> Tensor:
    """A tensor for a result, on the CPU whatever the default device.

    A large one lies in memory of earlier results that are gone: the pages of fresh memory cost a call with
    few tokens more than all it computes. Its storage cannot be resized.

    Raises:
        MemoryError: there is no memory for a large one (torch's RuntimeError for a small one).
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _RECYCLED:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = torch.frombuffer(_core.ResultMemory(runtime, count * dtype.itemsize), dtype=dtype)
    # Not a view, which autograd would let nobody change in place.
    result = torch.empty(0, dtype=dtype, device="cpu")
    result.set_(memory.untyped_storage(), 0, shape)  # type: ignore[call-overload]
    deterministic = torch.utils.deterministic
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        result.fill_(torch.nan)  # as torch.empty does
    return result
