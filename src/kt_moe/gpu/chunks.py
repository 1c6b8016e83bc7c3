"""Cuts the GPU's experts of a pass into chunks: as many as are there, or are worth waiting for, at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kt_moe.gpu.chunk import Chunk, Layer
from kt_moe.gpu.pass_log import PassLog
from kt_moe.gpu.prefetch import Feed
from kt_moe.gpu.products import DOWN, Groups, Matrices
from kt_moe.gpu.routes import Rows
from kt_moe.gpu.slots import Slots
from kt_moe.gpu.stored import StoredExperts
from kt_moe.gpu.streams import Streams

# Of a chunk: bytes on the link that hide the launches of its products, and a bound of its temporary memory,
# which is that of gate and up of 128 experts of Qwen3-30B-A3B and of some thousand tokens.
_LINK_BYTES = 128 << 20
_TEMPORARY_BYTES = 1 << 30


class PassData(NamedTuple):
    """The GPU's part of a pass.

    Attributes:
        experts: in the order of the plan.
        row_weights: [rows] fp32, the routing weight of each row.
        low_rank: for each stack of LoRA matrices, [jobs, rows, r] bf16; see `Chunk`.
    """

    experts: tuple[int, ...]
    rows: Rows
    row_weights: Tensor
    low_rank: Sequence[Tensor]


class Chunks:
    """The chunks of a pass.

    Args:
        number, stored: of the layer.
        slots: what holds its experts.
        feed: what claims them; its first experts are those of the pass.
    """

    def __init__(
        self,
        number: int,
        stored: StoredExperts,
        slots: Slots,
        feed: Feed,
        streams: Streams,
        log: PassLog,
    ) -> None:
        self._number, self._stored, self._slots, self._feed = number, stored, slots, feed
        self._streams, self._log = streams, log

    def of(self, layer: Layer, data: PassData, backward: bool) -> Iterator[Chunk]:
        """Some experts at a time; their slots are claimed, and released behind their products."""
        experts, rows, slots = data.experts, data.rows, self._slots
        first = [0, *accumulate(rows.counts)]
        block_rows = Groups.best_block_rows(rows.counts)  # of the pass: chunks must not change the rounding
        tokens = torch.div(rows.permutation, rows.inverse.shape[1], rounding_mode="floor")
        begin = 0
        while begin < len(experts):
            self._feed.advance()
            end = self._end(layer, experts, rows.counts, begin, backward)
            used = slots.use(self._number, experts[begin:end])
            groups = Groups(
                rows.counts[begin:end], self._streams.upload, block_rows,
                [np.array(experts[begin:end]), np.array(used), np.arange(end - begin)],
            )  # fmt: skip
            numbers, in_slots, in_order = groups.tables
            some = slice(first[begin], first[end])
            low_rank = [p[:, some] for p in data.low_rank]
            with self._log.chunk(layer, end - begin, first[end] - first[begin]):
                yield Chunk(
                    first=first[begin],
                    experts=numbers,
                    groups=groups,
                    permutation=rows.permutation[some],
                    tokens=tokens[some],
                    row_weights=data.row_weights[some],
                    inverse=rows.inverse,
                    weight=partial(self._weight, layer, in_slots, in_order),
                    low_rank_in=low_rank[: len(layer.lora_in)],
                    low_rank_down=None if layer.lora_down is None else low_rank[-1],
                )
            slots.release(used)
            begin = end
        self._feed.advance()

    def _end(
        self, layer: Layer, experts: Sequence[int], counts: Sequence[int], begin: int, backward: bool
    ) -> int:
        """How far a chunk reaches: bounded by what has to cross, its temporary memory, and the slots."""
        slots, stored = self._slots, self._stored
        many = slots.roomy or len(slots) >= 2 * len(experts)
        last = min(len(experts), begin + (len(experts) if many else max(1, len(slots) // 2)))
        # Gate and up lie there at once, or down alone.
        decoded = 0 if stored.in_place else 2 * len(layer.inner) * layer.hidden * layer.intermediate
        row = layer.row_bytes(backward)
        crossing = temporary = 0
        for end in range(begin, last):
            temporary += decoded + row * counts[end]
            if end > begin and temporary > _TEMPORARY_BYTES:
                return end
            if not slots.arrived((self._number, experts[end])):
                crossing += stored.slot_bytes
                if crossing >= _LINK_BYTES:
                    return end + 1
        return last

    def _weight(self, layer: Layer, in_slots: Tensor, in_order: Tensor, projection: int) -> Matrices:
        """A projection's matrices of the experts in some slots, in bf16: where they lie, or decoded.

        Args:
            in_slots: [n] int32, the slots.
            in_order: [n] int32, 0 to n - 1.
        """
        memory = self._slots.memory
        parts = [part for part in self._stored.parts if part.projection == projection]
        if self._stored.in_place:
            (part,) = parts
            codes = memory[:, part.codes : part.codes + 2 * part.rows * part.cols]
            return Matrices(codes.view(torch.bfloat16).view(-1, part.rows, part.cols), in_slots)
        down = projection == DOWN
        shape = (layer.hidden, layer.intermediate) if down else (layer.intermediate, layer.hidden)
        matrices = memory.new_empty(len(in_slots), *shape, dtype=torch.bfloat16)
        for part in parts:
            to = matrices.narrow(2 if down else 1, part.first, part.cols if down else part.rows)
            layer.products.dequantize(memory, in_slots, part, to)
        return Matrices(matrices, in_order)
