"""Time by stage, as numbers and as a table: of what a profile recorded, or of what a trace file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

NOT_WORKING = ("wait", "idle")


class ThreadTime(NamedTuple):
    """All spans of a stage on one thread. seconds: without spans within them; the rest: see `Span`."""

    spans: int
    seconds: float
    flops: int
    bytes_local: int
    bytes_remote: int


class StageTime(NamedTuple):
    """All spans of a stage.

    Attributes:
        spans: how many there were.
        seconds: spent in it by all threads together, without spans within it.
        share: of threads x wall time.
        tflops, gb_s: TFLOP/s and GB/s, as if all threads were in it all that time.
        imbalance: most seconds of a thread over the threads' mean; 1 is even.
    """

    spans: int
    seconds: float
    share: float
    tflops: float
    gb_s: float
    imbalance: float


@dataclass(frozen=True)
class Summary:
    """Where the time of threads x wall time went.

    Args:
        threads, shards: of the runtime.
        by_thread: a time for each thread, by stage.
        directions: how many calls there were and their wall time in seconds, by name.
        covered: seconds of all threads that spans cover.
    """

    threads: int
    shards: int
    by_thread: Mapping[str, Sequence[ThreadTime]]
    directions: Mapping[str, tuple[int, float]]
    covered: float

    @property
    def seconds(self) -> float:
        """Wall time of all calls together."""
        return sum(wall for _, wall in self.directions.values())

    @property
    def thread_seconds(self) -> float:
        """Threads x wall time."""
        return self.seconds * self.threads

    @property
    def coverage(self) -> float:
        """Part of threads x wall time that spans cover; 1 without calls."""
        return self.covered / self.thread_seconds if self.covered > 0 else 1.0

    @property
    def imbalance(self) -> float:
        """Most seconds that a thread was busy, neither waiting nor idle, over the threads' mean."""
        busy = [0.0] * self.threads
        for stage, threads in self.by_thread.items():
            if stage not in NOT_WORKING:
                busy = [sum_ + time.seconds for sum_, time in zip(busy, threads, strict=True)]
        return max(busy) * len(busy) / max(sum(busy), 1e-9)

    @cached_property
    def stages(self) -> dict[str, StageTime]:
        """Stages that took any time."""
        found = {}
        for stage, threads in self.by_thread.items():
            total, spans = sum(t.seconds for t in threads), sum(t.spans for t in threads)
            if spans == 0:
                continue
            each = max(total / len(threads), 1e-9)
            flops = sum(t.flops for t in threads)
            moved = sum(t.bytes_local + t.bytes_remote for t in threads)
            share, imbalance = total / max(self.thread_seconds, 1e-9), max(t.seconds for t in threads) / each
            found[stage] = StageTime(spans, total, share, flops / each / 1e12, moved / each / 1e9, imbalance)
        return found

    def table(self) -> str:
        """Stages by their share of the time, and below them what calls there were."""
        lines = [
            f"{'stage':<16}{'spans':>9}{'thread s':>10}{'share':>8}{'TFLOP/s':>9}{'GB/s':>8}{'max/mean':>10}"
        ]
        for name, s in sorted(self.stages.items(), key=lambda item: -item[1].seconds):
            tflops, gb_s = f"{s.tflops:.3f}" if s.tflops else "", f"{s.gb_s:.1f}" if s.gb_s else ""
            lines.append(
                f"{name:<16}{s.spans:>9}{s.seconds:>10.3f}{s.share:>8.1%}{tflops:>9}{gb_s:>8}"
                f"{s.imbalance:>10.2f}"
            )
        lines.append("")
        for direction, (calls, wall) in self.directions.items():
            if calls:
                lines.append(f"{direction + ':':<10}{calls:>7} x {1e3 * wall / calls:.2f} ms")
        idle = sum(self.stages[name].share for name in NOT_WORKING if name in self.stages)
        shards = f"{self.shards} shard{'s' * (self.shards > 1)}"
        lines.append(
            f"{self.threads} threads, {shards}; waiting or idle {idle:.1%}, "
            f"busiest thread {self.imbalance:.2f} x the mean; spans cover {self.coverage:.1%}"
        )
        return "\n".join(lines)
