"""Measures how long a model computes between the experts of its layers, for `plan.cut`."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from statistics import median

from kt_moe.gpu.prefetch import Pass
from kt_moe.gpu.spans import Mark
from kt_moe.gpu.streams import Streams

_TIMES = 2  # that a model's passes are looked at: kernels are compiled in the first of them
_LEAST = 5e-4  # seconds that are worth a thought


class Elsewhere:
    """From points of the caller's stream at the begin and the end of every pass.

    `arrive`, `begin` and `leave` follow each other in every pass.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._left: tuple[Pass, Mark] | None = None  # the last pass and its end
        self._arrived: Mark | None = None
        self._this: Pass | None = None
        self._waiting: deque[tuple[Pass, Pass, Mark, Mark]] = deque()  # for the device
        self._gaps: dict[tuple[Pass, Pass], list[float]] = {}  # seconds from a pass to the next

    def arrive(self) -> None:
        """The caller's stream has come to a pass."""
        if self._this is not None:
            self._left = None  # the last pass failed
        self._this, self._arrived = None, self._streams.mark()

    def begin(self, this: Pass) -> float | None:
        """Say which pass it is.

        Returns:
            seconds of a layer, forward and backward together, rounded to a power of 2^(1/4); None: not known.
        """
        self._this = this
        while self._waiting:
            last, after, begin, end = self._waiting[0]
            seconds = self._streams.seconds(begin, end)
            if seconds is None:
                break
            self._gaps.setdefault((last, after), []).append(seconds)
            self._waiting.popleft()
        if self._left is None or self._arrived is None:
            return None
        last, left = self._left
        self._waiting.append((last, this, left, self._arrived))
        trained = any(after.backward for _, after in self._gaps)
        return self._of_layer() if trained and len(self._gaps.get((last, this), ())) >= _TIMES else None

    def leave(self) -> None:
        """The pass has given all its work to the caller's stream."""
        self._left = None if self._this is None else (self._this, self._streams.mark())
        self._this = None

    def _of_layer(self) -> float:
        layers = len({this.layer for pair in self._gaps for this in pair})
        by_kind: defaultdict[tuple[bool, bool], list[float]] = defaultdict(list)
        for (last, after), gaps in self._gaps.items():
            by_kind[last.backward, after.backward].append(min(gaps))
        # What comes once a step, such as the loss and the optimizer, is not of a layer.
        seconds = (
            sum(len(gaps) * median(gaps) for gaps in by_kind.values() if 2 * len(gaps) >= layers) / layers
        )
        return 2.0 ** (round(4 * math.log2(seconds)) / 4) if seconds > _LEAST else 0.0
