"""A layer's frozen experts as the core keeps them, for copies to a GPU: where the bytes of each expert lie in
host memory, and how they are laid out in a *slot* of device memory.
"""

from __future__ import annotations

import ctypes
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from kt_moe.gpu.page_lock import PageLock, PageLockError, lock
from kt_moe.host_memory import free_memory

if TYPE_CHECKING:
    from kt_moe import _core

_ALIGN = 64  # bytes on which each part of a matrix begins, as in the core's own memory (LayerBlock)


class StoredPart(NamedTuple):
    """One matrix of an expert in a slot, or one shard's slice of it. docs/formats.md has the formats.

    Codes, scales and zero points are row-major, and a row of codes begins on a byte; there are
    ceil(rows / scale_rows) x ceil(cols / scale_cols) scales and as many zero points, and of each matrix one
    global scale (fp32).
    """

    projection: int
    """0 gate, 1 up, 2 down."""
    first: int
    """First row (gate, up) or column (down) of the slice in the whole matrix."""
    rows: int
    cols: int
    codes: int
    """Byte offset in the slot, a multiple of 64."""
    scales: int
    """The same; -1 where there are none."""
    zeros: int
    """The same, of a byte for each scale; -1 where there are none (the zero point of int4 is 8 then)."""
    global_scale: int
    """The same, of the fp32 by which scales are multiplied, or divided; -1 where there is none."""
    code: str
    """"bf16", "int8", "int4", "e4m3" or "e2m1"."""
    scale: str
    """"none", "f32", "bf16", "e8m0" or "e4m3"."""
    scale_rows: int
    """Rows that share a scale."""
    scale_cols: int
    """Columns that share a scale, at most `cols`."""
    divides: bool
    """Whether scales are divided by the global scale, not multiplied."""


class _Piece(NamedTuple):
    """Codes, scales, zero points or global scale of a part: where they lie for each expert, and where in a
    slot.
    """

    addresses: list[int]
    bytes: int
    offset: int


class HasCore(Protocol):
    """`kt_moe.Experts`, or what stands for them."""

    _core: _core.Experts


class StoredExperts:
    """The stored bytes of one layer's experts. Keeps their memory alive.

    Attributes:
        parts: how one expert lies in a slot: gate if there is one, up, down, of each its slices in order.
        slot_bytes: size of a slot, a multiple of 64.
        expert_bytes: what is copied for one expert.
        num_experts: E.
    """

    def __init__(self, experts: HasCore) -> None:
        self._core = experts._core
        self.num_experts = self._core.num_experts
        parts: list[StoredPart] = []
        self._pieces: list[_Piece] = []
        self.slot_bytes = 0
        for projection, slices in enumerate(self._core.weights_at()):
            for stored in slices:
                codes, scales, zeros, global_scale = (
                    self._add(stored[name], stored[f"{name}_bytes"])
                    for name in ("codes", "scales", "zeros", "global_scale")
                )
                parts.append(
                    StoredPart(
                        projection, stored["first"], stored["rows"], stored["cols"], codes, scales, zeros,
                        global_scale, stored["code"], stored["scale"], stored["scale_rows"],
                        stored["scale_cols"], stored["divides"],
                    )
                )  # fmt: skip
        self.parts = tuple(parts)
        self._lock: PageLock | None = None
        self._unlock: weakref.finalize[[], StoredExperts] | None = None
        self._runs: list[list[tuple[int, int, int]] | None] = [None] * self.num_experts
        self.expert_bytes = sum(size for _, size, _ in self._spans(0))

    def _add(self, addresses: list[int], size: int) -> int:
        if size == 0:
            return -1
        offset = self.slot_bytes
        self._pieces.append(_Piece(addresses, size, offset))
        self.slot_bytes = -(-(offset + size) // _ALIGN) * _ALIGN
        return offset

    def runs(self, expert: int) -> list[tuple[Tensor, int]]:
        """The bytes of an expert as the core has them, in as few pieces as possible.

        One piece in a layer's own memory with one slice; more where the memory is cut among shards or belongs
        to a checkpoint's files.

        Returns:
            [n] uint8 tensors over the core's memory, which must not be written, each with its offset in the
            slot. They keep the memory alive, but not page-locked.
        """
        return [
            (_view(self._core, address, size), offset) for address, size, offset in self.addresses(expert)
        ]

    def addresses(self, expert: int) -> list[tuple[int, int, int]]:
        """Address, bytes and offset in the slot of each run."""
        runs = self._runs[expert]
        if runs is None:
            runs = self._runs[expert] = self._spans(expert)
        return runs

    def _spans(self, expert: int) -> list[tuple[int, int, int]]:
        spans: list[tuple[int, int, int]] = []
        for addresses, size, offset in self._pieces:
            address = addresses[expert]
            if spans:
                begin, _, first = spans[-1]
                # Between the two lies padding at most, on the pages of its neighbours.
                if address - begin == offset - first:
                    spans[-1] = (begin, address + size - begin, first)
                    continue
            spans.append((address, size, offset))
        return spans if self._lock is None else _cut(spans, self._lock.begins)

    def copy_expert(self, expert: int, to: Tensor) -> None:
        """Copy an expert into a slot in host memory: for copies to a GPU of memory that is not page-locked.

        Args:
            to: uint8, on the CPU, 1-D, contiguous, at least `slot_bytes` long.
        """
        if to.dtype is not torch.uint8 or not to.is_cpu or to.dim() != 1 or len(to) < self.slot_bytes:
            raise ValueError(
                f"to is {to.dtype} {list(to.shape)} on {to.device}, "
                f"wanted uint8 of at least [{self.slot_bytes}] on cpu"
            )
        for host, offset in self.runs(expert):
            to[offset : offset + len(host)].copy_(host)

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A copy of the biases of gate, up [E, I] and down [E, H] in bf16 on the CPU; None: there is none."""
        hidden, inner = self._core.hidden_size, self._core.intermediate_size
        biases: list[Tensor | None] = []
        for name, rows in (("gate", inner), ("up", inner), ("down", hidden)):
            bias = None
            if self._core.bias(name, None):
                bias = torch.empty((self.num_experts, rows), dtype=torch.bfloat16, device="cpu")
                self._core.bias(name, bias)
            biases.append(bias)
        return biases[0], biases[1], biases[2]

    @property
    def in_place(self) -> bool:
        """Whether products can read a slot as it is: whole bf16 matrices."""
        whole = len({part.projection for part in self.parts}) == len(self.parts)
        return whole and all(part.code == "bf16" for part in self.parts)

    @property
    def pinned(self) -> bool:
        """Whether the core's memory is page-locked, so that runs can be copied without waiting."""
        return self._lock is not None

    def pin(self, before_unpin: Callable[[], object] | None = None) -> str:
        """Page-lock the core's memory where it lies, until `unpin` or the end of this object.

        Memory that `Experts.rebalance` moves afterwards stays locked in its old place as well, with the same
        numbers: unpin before that.

        Args:
            before_unpin: called before the memory is unlocked, in any thread; it waits for copies that read
                it, and must not refer to this object. Not called at the interpreter's exit nor in a forked
                child, where the memory is not unlocked.

        Returns:
            "pinned", or a sentence that says why not; then nothing is locked.
        """
        if self._lock is not None:
            return "pinned"
        spans = [span[:2] for expert in range(self.num_experts) for span in self._spans(expert)]
        if self._core.mapped and (why := _too_large(sum(size for _, size in spans))):
            return why
        try:
            read_only = self._core.mapped or self._core.shared
            self._lock = lock(spans, self._core, read_only=read_only, before_release=before_unpin)
        except PageLockError as error:
            return str(error)
        self._unlock = weakref.finalize(self, self._lock.release)
        self._unlock.atexit = False
        self._runs = [None] * self.num_experts
        return "pinned"

    def unpin(self) -> None:
        """Unlock the memory. Runs that were handed out must not be copied without waiting any more."""
        if self._unlock is not None:
            self._lock = None
            self._runs = [None] * self.num_experts
            self._unlock()
            self._unlock = None


def _view(core: _core.Experts, address: int, size: int) -> Tensor:
    """[size] uint8 over the core's memory."""
    memory = (ctypes.c_uint8 * size).from_address(address)
    memory.core = core  # type: ignore[attr-defined]  # the tensor keeps `memory`, and that keeps the core
    return torch.frombuffer(memory, dtype=torch.uint8)


def _too_large(size: int) -> str:
    """Why pages of a mapped file should not be locked: the kernel could not drop them any more."""
    free = free_memory()
    if size <= free // 2:
        return ""
    return f"the mapped file has {size} bytes of weights, more than half of the {free} bytes that are free"


def _cut(spans: list[tuple[int, int, int]], begins: list[int]) -> list[tuple[int, int, int]]:
    """No span across a place where a page-locked region begins."""
    pieces: list[tuple[int, int, int]] = []
    for address, size, offset in spans:
        cuts = begins[bisect_right(begins, address) : bisect_left(begins, address + size)]
        for begin, end in zip([address, *cuts], [*cuts, address + size], strict=True):
            pieces.append((begin, end - begin, offset + begin - address))
    return pieces
