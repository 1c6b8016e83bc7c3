"""Measures how long a model computes between the experts of its layers, for `plan.cut`."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from statistics import median

from kt_moe.gpu.prefetch import Pass
from kt_moe.gpu.spans import Mark
from kt_moe.gpu.streams import Streams

_TIMES = 2  # that a pass of a training step is looked at: kernels are compiled in the first of them
_LEAST = 5e-4  # seconds; less counts as 0


class RestTimer:
    """From points of the caller's stream at the begin and the end of every pass of a training step.

    `arrive`, `begin` and `leave` follow each other in a pass; one that fails lacks the last, or the last two.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._left: tuple[Pass, Mark] | None = None  # the last pass and its end, until the next one
        self._since: tuple[Pass, Mark] | None = None  # the same during that one
        self._arrived: Mark | None = None
        self._this: Pass | None = None
        self._waiting: deque[tuple[Pass, Pass, Mark, Mark]] = deque()  # for the device
        # From a pass to the next: how often it was measured, and the least seconds.
        self._gaps: dict[tuple[Pass, Pass], tuple[int, float]] = {}

    def arrive(self) -> None:
        """The caller's stream has come to a pass."""
        self._since, self._left, self._this = self._left, None, None
        self._arrived = self._streams.mark()

    def begin(self, this: Pass, train: bool) -> float | None:
        """Say which pass it is, and whether it belongs to a training step.

        Returns:
            seconds of a layer, forward and backward together, rounded to a power of 2^(1/4); None: not known.
        """
        if not train:
            return None
        self._this = this
        while self._waiting:
            last, after, begin, end = self._waiting[0]
            seconds = self._streams.seconds(begin, end)
            if seconds is None:
                break
            times, least = self._gaps.get((last, after), (0, math.inf))
            self._gaps[last, after] = times + 1, min(least, seconds)
            self._waiting.popleft()
        if self._since is None or self._arrived is None:
            return None
        last, left = self._since
        self._waiting.append((last, this, left, self._arrived))
        known = {pair: least for pair, (times, least) in self._gaps.items() if times >= _TIMES}
        trained = any(after.backward for _, after in known)
        return _of_layer(known) if trained and (last, this) in known else None

    def leave(self) -> None:
        """The pass has given all its work to the caller's stream."""
        self._left = None if self._this is None else (self._this, self._streams.mark())


def _of_layer(gaps: dict[tuple[Pass, Pass], float]) -> float:
    layers = len({this.layer for pair in gaps for this in pair})
    by_kind: defaultdict[tuple[bool, bool], list[float]] = defaultdict(list)
    for (last, after), gap in gaps.items():
        by_kind[last.backward, after.backward].append(gap)
    # What comes once a step, such as the loss and the optimizer, is not of a layer.
    of_layers = [len(kind) * median(kind) for kind in by_kind.values() if 2 * len(kind) >= layers]
    seconds = sum(of_layers) / layers
    return 2.0 ** (round(4 * math.log2(seconds)) / 4) if seconds > _LEAST else 0.0
