"""Stored experts on the device: a cache of slots of one size, filled over the link, the oldest used again.

Frozen weights never change, so an expert that is still in its slot need not cross the link again: where all
experts fit, each does so once. A slot is *claimed* from the moment its expert is wanted for a coming product
until that product is launched; only others are used again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from kt_moe.gpu.stored import StoredExperts
from kt_moe.gpu.streams import Event, Streams

Key = tuple[Hashable, int]  # a layer and one of its experts
_STAGING_SLOTS = 4


class Slots:
    """The memory and what lies in it.

    Args:
        streams: of the device.
        slot_bytes: size of a slot, at least that of any expert to be fetched.
        count: number of slots, at least 1.
        roomy: whether every expert of every layer can have a slot: then none is taken back from its expert.

    Attributes:
        memory: [count, slot_bytes] uint8 on the device.
        bytes_moved: over the link so far.
    """

    def __init__(self, streams: Streams, slot_bytes: int, count: int, roomy: bool = False) -> None:
        self.roomy = roomy
        self.memory = torch.empty(count, slot_bytes, dtype=torch.uint8, device=streams.device)
        self.bytes_moved = 0
        self._streams = streams
        self._address = self.memory.data_ptr()
        # The memory may have been another tensor's before, and the link's copies are not torch's.
        streams.wait(streams.record(), "link")
        streams.used_by(self.memory, "link")
        self._waited: Event | None = None  # the last event that the link has waited for
        self._slot_of: dict[Key, int] = {}
        self._holds: list[Key | None] = [None] * count
        self._ready: list[Event | None] = [None] * count  # its bytes have come
        self._used: list[Event | None] = [None] * count  # the product that read it last is done
        self._released: tuple[int, Event] | None = None  # the stream of the last `release`, and its event
        self._unclaimed: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # least recent first
        self._staging: list[tuple[Tensor, Event]] = []  # in host memory, and behind its last copy

    def __len__(self) -> int:
        return len(self._holds)

    def arrived(self, key: Key) -> bool:
        """Whether the expert is there: in a slot, and its copy done."""
        slot = self._slot_of.get(key)
        if slot is None:
            return False
        ready = self._ready[slot]
        if ready is not None and ready.query():
            self._ready[slot] = ready = None
        return ready is None

    def claim(self, layer: Hashable, stored: StoredExperts, experts: Sequence[int]) -> int:
        """Claim slots for experts, in order, and start the copies of those that are not there.

        Returns:
            how many of them are claimed now: fewer than asked for where no unclaimed slot is left.
        """
        fresh: list[int] = []
        done = 0
        if self.roomy:
            slot_of, every = self._slot_of, len(experts)
            experts = [expert for expert in experts if (layer, expert) not in slot_of]
            done = every - len(experts)
        try:
            for expert in experts:
                slot = self._slot_of.get((layer, expert))
                if slot is not None:
                    self._unclaimed.pop(slot, None)
                elif self._unclaimed:
                    self._fill(layer, stored, expert, fresh)
                else:
                    break
                done += 1
            if fresh:
                ready = self._streams.record("link")
                for slot in fresh:
                    self._ready[slot] = ready
        except BaseException:
            for slot in fresh:  # nothing tells when their bytes have come
                if (key := self._holds[slot]) is not None:
                    self._holds[slot] = None
                    self._slot_of.pop(key, None)
                self._unclaimed[slot] = None
            raise
        return done

    def _fill(self, layer: Hashable, stored: StoredExperts, expert: int, fresh: list[int]) -> None:
        """Put an expert into the slot used least recently, which `fresh` has before its copy begins."""
        slot = next(iter(self._unclaimed))
        if (old := self._holds[slot]) is not None:
            self._slot_of.pop(old, None)
            self._holds[slot] = None
        fresh.append(slot)
        self._copy(layer, stored, expert, slot)
        del self._unclaimed[slot]
        self._holds[slot] = (layer, expert)
        self._slot_of[layer, expert] = slot

    def _copy(self, layer: Hashable, stored: StoredExperts, expert: int, slot: int) -> None:
        used = self._used[slot]
        if used is not None and used is not self._waited:
            self._streams.wait(used, "link")
            self._waited = used
        self._used[slot] = self._ready[slot] = None
        assert stored.slot_bytes <= self.memory.shape[1]
        self.bytes_moved += stored.expert_bytes
        address = self._address + slot * self.memory.shape[1]
        if stored.pinned:
            self._streams.note("link", "copy_experts", stored.expert_bytes, layer, 1)
            for host, size, offset in stored.addresses(expert):
                self._streams.copy(address + offset, host, size, "link")
        else:
            with self._streams.span("host", "stage_expert"):
                staging = self._stage(stored, expert)
            self._streams.note("link", "copy_experts", stored.expert_bytes, layer, 1)
            self._streams.copy(address, staging.data_ptr(), stored.slot_bytes, "link")
            self._staging.append((staging, self._streams.record("link")))

    def _stage(self, stored: StoredExperts, expert: int) -> Tensor:
        """The expert's bytes in page-locked memory, of which there are a few slots."""
        if len(self._staging) < _STAGING_SLOTS:
            staging = self._streams.host_empty((self.memory.shape[1],), torch.uint8)
        else:
            staging, copied = self._staging.pop(0)
            copied.synchronize()
        stored.copy_expert(expert, staging)
        return staging

    def use(self, layer: Hashable, experts: Sequence[int]) -> list[int]:
        """The slots of claimed experts, whose bytes the current stream's later work waits for."""
        slots = [self._slot_of[layer, expert] for expert in experts]
        for event in dict.fromkeys(self._ready[slot] for slot in slots):
            if event is not None:
                self._streams.wait(event)
        return slots

    def release(self, slots: Sequence[int]) -> None:
        """Take claims back: the work that reads the slots has been given to the current stream."""
        stream = self._streams.current()
        if self._released is not None and self._released[0] != stream:
            self._streams.wait(self._released[1])  # so that one event stands for all reads of a slot
        used = self._streams.record()
        self._released = stream, used
        for slot in slots:
            self._used[slot] = used
        if not self.roomy:
            for slot in slots:
                self._unclaimed.pop(slot, None)
                self._unclaimed[slot] = None

    def release_all(self) -> None:
        """Take all claims back."""
        if claimed := [slot for slot in range(len(self)) if slot not in self._unclaimed]:
            self.release(claimed)

    def forget(self, layer: Hashable) -> None:
        """Drop a layer's experts, whose host memory is about to go: waits for its copies."""
        for key in [key for key in self._slot_of if key[0] == layer]:
            slot = self._slot_of[key]
            if (ready := self._ready[slot]) is not None:
                ready.synchronize()
            self._holds[slot], self._ready[slot] = None, None
            self._unclaimed[slot] = None
            self._unclaimed.move_to_end(slot, last=False)
            del self._slot_of[key]  # last: what an interrupt leaves is forgotten the next time
