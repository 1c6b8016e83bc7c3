"""Cuts the GPU's experts of a pass into chunks: as many as are there, or are worth waiting for, at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kt_moe.gpu.chunk import Chunk, Layer
from kt_moe.gpu.pass_log import PassLog
from kt_moe.gpu.prefetch import Feed
from kt_moe.gpu.products import Groups, Matrices, dequantize
from kt_moe.gpu.routes import Rows
from kt_moe.gpu.slots import Slots
from kt_moe.gpu.stored import StoredExperts
from kt_moe.gpu.streams import Streams

# Of a chunk: bytes on the link that hide the launches of its products, and a bound of its temporary memory.
_LINK_BYTES = 128 << 20
_TEMPORARY_BYTES = 512 << 20


class PassData(NamedTuple):
    """The GPU's part of a pass.

    Attributes:
        experts: in the order of the plan.
        row_weights: [rows] fp32, the routing weight of each row.
        low_rank: of gate, up and down, [rows, r] bf16, or None; see `Chunk`.
    """

    experts: tuple[int, ...]
    rows: Rows
    row_weights: Tensor
    low_rank: list[Tensor | None]


class Chunks:
    """The chunks of a pass.

    Args:
        number, stored: of the layer.
        slots: what holds its experts.
        feed: what claims them; its first experts are those of the pass.
        all_fit: whether the slots hold all experts of all layers.
    """

    def __init__(
        self,
        number: int,
        stored: StoredExperts,
        slots: Slots,
        feed: Feed,
        all_fit: bool,
        streams: Streams,
        log: PassLog,
    ) -> None:
        self._number, self._stored, self._slots, self._feed = number, stored, slots, feed
        self._all_fit, self._streams, self._log = all_fit, streams, log

    def of(self, layer: Layer, data: PassData) -> Iterator[Chunk]:
        """Some experts at a time; their slots are claimed, and released behind their products."""
        experts, rows, slots = data.experts, data.rows, self._slots
        first = [0, *accumulate(rows.counts)]
        block_rows = Groups.best_block_rows(rows.counts)  # of the pass: chunks must not change the rounding
        numbers = self._streams.upload(np.array(experts, dtype=np.int32))
        tokens = torch.div(rows.places, rows.position.shape[1], rounding_mode="floor")
        begin = 0
        while begin < len(experts):
            self._feed.advance()
            end = self._end(layer, experts, rows.counts, begin)
            used = slots.use(self._number, experts[begin:end])
            some = slice(first[begin], first[end])
            with self._log.chunk(layer, end - begin, first[end] - first[begin]):
                yield Chunk(
                    first=first[begin],
                    experts=numbers[begin:end],
                    groups=Groups(rows.counts[begin:end], self._streams.upload, block_rows),
                    places=rows.places[some],
                    tokens=tokens[some],
                    row_weights=data.row_weights[some],
                    position=rows.position,
                    weights=self._weights(layer, used),
                    low_rank=[None if p is None else p[some] for p in data.low_rank],
                )
            slots.release(used)
            begin = end
        self._feed.advance()

    def _end(self, layer: Layer, experts: Sequence[int], counts: Sequence[int], begin: int) -> int:
        """How far a chunk reaches: bounded by what has to cross, its temporary memory, and the slots."""
        slots, stored = self._slots, self._stored
        many = self._all_fit or len(slots) >= 2 * len(experts)
        last = min(len(experts), begin + (len(experts) if many else max(1, len(slots) // 2)))
        decoded = 0 if stored.in_place else 6 * layer.hidden * layer.intermediate
        row = 4 * layer.hidden + 14 * layer.intermediate
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

    def _weights(self, layer: Layer, used: Sequence[int]) -> tuple[Matrices, Matrices, Matrices]:
        """gate, up and down of the experts in some slots in bf16: where they lie, or decoded."""
        memory, parts = self._slots.memory, self._stored.parts
        index = self._streams.upload(np.array(used, dtype=np.int32))
        if self._stored.in_place:
            found = [
                memory[:, part.codes : part.codes + 2 * part.rows * part.cols]
                .view(torch.bfloat16)
                .view(-1, part.rows, part.cols)
                for part in parts
            ]
        else:
            shapes = ((layer.intermediate, layer.hidden),) * 2 + ((layer.hidden, layer.intermediate),)
            found = [memory.new_empty(len(used), *shape, dtype=torch.bfloat16) for shape in shapes]
            for part in parts:
                along = 2 if part.projection == 2 else 1
                width = part.cols if part.projection == 2 else part.rows
                dequantize(memory, index, part, found[part.projection].narrow(along, part.first, width))
            index = torch.arange(len(used), dtype=torch.int32, device=memory.device)
        gate, up, down = (Matrices(matrices, index) for matrices in found)
        return gate, up, down
