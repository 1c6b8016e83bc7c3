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


def is_again(before: Pass | None, this: Pass) -> bool:
    """Whether a pass is a forward that gradient checkpointing computes again, as the pass before tells.

    It comes behind the forward of the same layer, or behind the backward of another one.
    """
    if before is None or this.backward:
        return False
    return (this.layer == before.layer) != before.backward


class PassOrder:
    """Learns which pass follows which: layers forward and then in reverse, or as a trainer has it.

    What follows depends on the two last passes: with gradient checkpointing a layer's forward is followed by
    that of the next layer the first time, and by its own backward the second time.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[Pass | None, Pass], Pass] = {}
        self._last: tuple[Pass | None, Pass | None] = (None, None)

    def begin(self, this: Pass) -> bool:
        """Say that a pass begins; returns whether it seems to be a forward that is computed again."""
        before, last = self._last
        if last is not None:
            self._after[before, last] = this
        self._last = last, this
        return is_again(last, this)

    def following(self) -> Iterator[tuple[Pass, bool]]:
        """The passes that came after the present one the last time, nearest first, until two come again.

        With each whether its routes are known: those of a backward, and of a forward that is computed again
        for it, but of nothing behind a forward with new routes.
        """
        before, this = self._last
        known = True
        seen: set[tuple[Pass | None, Pass]] = set()
        while this is not None and (before, this) not in seen:
            seen.add((before, this))
            if (after := self._after.get((before, this))) is not None:
                known = known and (after.backward or is_again(this, after))
                yield after, known
            before, this = this, after

    def forget(self, layer: int) -> None:
        """Drop a layer that is gone."""
        self._after = {
            pair: after
            for pair, after in self._after.items()
            if layer not in (after.layer, *(p.layer for p in pair if p is not None))
        }
        if any(p is not None and p.layer == layer for p in self._last):
            self._last = None, None


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
