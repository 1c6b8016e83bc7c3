"""What the engines of one `kt_moe.Gpu` share: its options, and the layers that were given it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from kt_moe.gpu.plan import Rates

if TYPE_CHECKING:
    from kt_moe import _core
    from kt_moe.experts import Experts
    from kt_moe.gpu.stored import StoredExperts
    from kt_moe.gpu.streams import Streams


class Identity:
    """What a layer's `Experts` and its copies, which share the weights, have in common."""


@dataclass(eq=False)
class _Layer:
    _core: _core.Experts
    stored: StoredExperts | None = None

    def find_stored(self) -> StoredExperts:
        """Where its weights lie; they are looked up once."""
        if self.stored is None:
            from kt_moe.gpu.stored import StoredExperts

            self.stored = StoredExperts(self)
        return self.stored


@dataclass(eq=False)
class Layers:
    """The layers and the options. Layers may come in one thread while another is in a pass.

    Attributes:
        memory, cpu_share, rates: of `kt_moe.Gpu`.
        links: the streams of every engine.
    """

    memory: int | str = "auto"
    cpu_share: float | str = "auto"
    rates: Rates | None = None
    links: list[Streams] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[Identity, _Layer] = weakref.WeakKeyDictionary()
        self._free: dict[torch.device, int] = {}
        self._changes = 0
        self._sizes: tuple[tuple[int, int], int, int] | None = None  # what they are of, and `sizes`

    def add(self, experts: Experts) -> None:
        """A layer is given the options."""
        self._layers.setdefault(experts._identity, _Layer(experts._core))
        self._changes += 1

    def remove(self, experts: Experts) -> None:
        """It is given others."""
        self._layers.pop(experts._identity, None)
        self._changes += 1

    def stored(self, experts: Experts) -> StoredExperts:
        """Where a layer's weights lie."""
        self.add(experts)
        return self._layers[experts._identity].find_stored()

    def sizes(self) -> tuple[int, int]:
        """Bytes of a slot that holds any expert, and the number of experts of all layers."""
        now, found = (self._changes, len(self._layers)), self._sizes
        if found is None or found[0] != now:
            keys = (ref() for ref in self._layers.keyrefs())  # a list, unlike `values`
            layers = [layer for key in keys if key is not None and (layer := self._layers.get(key))]
            stored = [layer.find_stored() for layer in layers]
            found = now, max(s.slot_bytes for s in stored), sum(s.num_experts for s in stored)
            self._sizes = found
        return found[1:]

    def budget(self, device: torch.device) -> int:
        """Bytes for slots on a device; with "auto" at most half of what is free there at the first call."""
        if isinstance(self.memory, int):
            return self.memory
        slot_bytes, every = self.sizes()
        if device.type != "cuda":
            return slot_bytes * every
        if device not in self._free:
            self._free[device] = torch.cuda.mem_get_info(device)[0]
        return auto_memory(slot_bytes * every, self._free[device])

    def rates_for(self, experts: Experts, device: torch.device) -> Rates:
        """The rates given, or measured with the first layer that asks."""
        if self.rates is None:
            from kt_moe.gpu.rates import measure

            self.rates = measure(experts, device)
        return self.rates

    def set_rest_seconds(self, seconds: float) -> None:
        """What an engine has measured of the rest of the model; the first one decides."""
        assert self.rates is not None
        if self.rates.rest_seconds == 0.0:
            self.rates = replace(self.rates, rest_seconds=seconds)

    def finish_links(self) -> None:
        """Let the calling thread wait until every link has brought what it was asked for."""
        for link in self.links:
            link.finish()

    def unlock(self, experts: Experts) -> None:
        """The core is about to move a layer's weights: end copies of them, and unlock their memory."""
        self.finish_links()
        layer = self._layers.get(experts._identity)
        if layer is not None and layer.stored is not None:
            layer.stored.unpin()


def auto_memory(weights: int, free: int) -> int:
    """Bytes of a GPU with so many free that "auto" takes for experts whose weights are so many."""
    return min(weights, free // 2)
