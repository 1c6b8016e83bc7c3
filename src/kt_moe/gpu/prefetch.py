"""What the link brings, and when: the experts of a pass, then those that later passes are likely to need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kt_moe.gpu.slots import Slots
from kt_moe.gpu.stored import StoredExperts


class Pass(NamedTuple):
    """The forward or the backward of a layer."""

    layer: int
    backward: bool


class PassOrder:
    """Learns which pass follows which: layers forward and then in reverse, or as a trainer has it."""

    def __init__(self) -> None:
        self._after: dict[Pass, Pass] = {}
        self._last: Pass | None = None

    def begin(self, this: Pass) -> None:
        """Say that a pass begins."""
        if self._last is not None:
            self._after[self._last] = this
        self._last = this

    def following(self, this: Pass) -> Iterator[Pass]:
        """The passes that came after this one the last time, nearest first, each once."""
        seen = {this}
        while (after := self._after.get(this)) is not None and after not in seen:
            seen.add(after)
            yield after
            this = after

    def forget(self, layer: int) -> None:
        """Drop a layer that is gone."""
        self._after = {a: b for a, b in self._after.items() if layer not in (a.layer, b.layer)}
        if self._last is not None and self._last.layer == layer:
            self._last = None


class Wanted(NamedTuple):
    """Experts of one layer, in the order in which they are wanted."""

    layer: int
    stored: StoredExperts
    experts: Sequence[int]


class Feed:
    """Claims slots for wanted experts, in order, as far as there is room; wrong guesses only cost time.

    Args:
        slots: of the device.
        wanted: first those of the pass that begins, then guesses.
    """

    def __init__(self, slots: Slots, wanted: Sequence[Wanted]) -> None:
        self._slots, self._wanted = slots, wanted
        self._layer = self._claimed = 0  # place in `wanted`, and how many of its experts are claimed
        if not slots.roomy:
            slots.release_all()  # what the last pass has guessed

    def advance(self) -> None:
        """Claim what there is room for, and start the copies."""
        while self._layer < len(self._wanted):
            layer, stored, experts = self._wanted[self._layer]
            left = experts[self._claimed :]
            claimed = self._slots.claim(layer, stored, left)
            if claimed < len(left):
                self._claimed += claimed
                return
            self._layer, self._claimed = self._layer + 1, 0
