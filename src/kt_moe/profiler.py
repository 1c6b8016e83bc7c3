"""Where the time of layers goes: what every thread did, as numbers, a table and a trace."""

from __future__ import annotations

import os
import threading
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from kt_moe import _core
from kt_moe.files import check_writable, replacing
from kt_moe.runtime import Runtime, default_runtime, live_runtimes

_attaching = threading.Lock()


class Call(NamedTuple):
    """A forward or backward of one layer. Times in seconds since the profile began.

    Attributes:
        direction: "forward" or "backward".
        coverage: part of threads x wall time that spans cover, waiting and idle ones included.
        experts: how many have a route; most_rows: routes of the one with most.
        flops, bytes_local, bytes_remote: see `Span`.
    """

    direction: str
    begin: float
    end: float
    coverage: float
    tokens: int
    routes: int
    experts: int
    most_rows: int
    flops: int
    bytes_local: int
    bytes_remote: int


class Span(NamedTuple):
    """What a thread did, and when, in seconds since the profile began.

    Attributes:
        own: of end - begin, what is not in spans within this one.
        call: place in `Profile.calls`; -1: outside of any.
        expert, rows: -1 where it is about none.
        flops: of products, multiplications and additions. bytes_local: read and written by design (caches
            aside) in the memory of the shard that did, bytes_remote: in that of others.
    """

    stage: str
    thread: int
    shard: int
    begin: float
    end: float
    own: float
    call: int
    expert: int
    rows: int
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


class Profile:
    """What `profile` returns: records between entry and exit, and is read after that."""

    def __init__(self, path: str | os.PathLike[str] | None, runtime: Runtime, max_spans: int) -> None:
        self.path = None if path is None else Path(path).absolute()
        self.runtime = runtime
        self._max_spans = max_spans
        self._core: _core.Profile | None = None
        self._recording = False
        self._process = 0

    def __enter__(self) -> Profile:
        if self.path is not None:
            check_writable(self.path)
        with _attaching:
            if self._core is not None or self._recording:
                raise RuntimeError("a profile records once; call kt_moe.profile again for another")
            if (other := self.runtime._profile) is not None:
                raise RuntimeError(f"{self.runtime!r} has a profile already: {other!r}")
            self.runtime._profile = self
        self._recording, self._process = True, os.getpid()
        try:
            self._core = _core.Profile(self.runtime._core, self._max_spans)  # waits for a call that runs
        finally:
            if self._core is None:
                self._detach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        core = self._core
        if core is None or not self._recording:
            raise RuntimeError("the profile is not recording")
        try:
            core.stop()
        finally:
            if core.stopped:  # also if Ctrl-C came while a call was waited for
                self._detach()
                if self.path is not None and self._process == os.getpid():  # a forked child has but a copy
                    with replacing(self.path) as part:
                        core.write(part)

    def _detach(self) -> None:
        self._recording = False
        self.runtime._profile = None

    def __repr__(self) -> str:
        return f"kt_moe.profile({None if self.path is None else str(self.path)!r})"

    @cached_property
    def calls(self) -> list[Call]:
        """Every forward and backward of a layer, in order."""
        return [Call(*values) for values in self._read().calls()]

    @cached_property
    def spans(self) -> list[Span]:
        """Those kept, by thread and begin; a span within another comes behind it."""
        return [Span(*values) for values in self._read().spans()]

    @cached_property
    def stages(self) -> dict[str, StageTime]:
        """Stages that took any time. Dropped spans count here too."""
        found = {}
        for stage, threads in self._read().totals().items():
            seconds = [of_thread[1] for of_thread in threads]
            total, spans = sum(seconds), sum(of_thread[0] for of_thread in threads)
            if spans == 0:
                continue
            each = max(total / len(threads), 1e-9)
            flops, moved = sum(t[2] for t in threads), sum(t[3] + t[4] for t in threads)
            share, imbalance = total / max(self.thread_seconds, 1e-9), max(seconds) / each
            found[stage] = StageTime(spans, total, share, flops / each / 1e12, moved / each / 1e9, imbalance)
        return found

    @property
    def seconds(self) -> float:
        """Wall time of all calls together."""
        return sum(wall for _, wall, _ in self._read().directions().values())

    @property
    def thread_seconds(self) -> float:
        """Threads x wall time."""
        return self.seconds * self.runtime.threads

    @property
    def coverage(self) -> float:
        """Part of threads x wall time that spans cover, waiting and idle ones included; 1 without calls."""
        covered = sum(covered for _, _, covered in self._read().directions().values())
        return covered / self.thread_seconds if covered > 0 else 1.0

    @property
    def imbalance(self) -> float:
        """Most seconds that a thread was busy, neither waiting nor idle, over the threads' mean."""
        busy = [0.0] * self.runtime.threads
        for stage, threads in self._read().totals().items():
            if stage not in ("wait", "idle"):
                busy = [sum_ + of_thread[1] for sum_, of_thread in zip(busy, threads, strict=True)]
        return max(busy) * len(busy) / max(sum(busy), 1e-9)

    @property
    def dropped(self) -> int:
        """Spans beyond `max_spans`: neither in `spans` nor in the trace, but in `stages` and the table."""
        return self._read().dropped

    def table(self) -> str:
        """Stages by their share of the time, and below them what calls there were."""
        stages = sorted(self.stages.items(), key=lambda item: -item[1].seconds)
        lines = [
            f"{'stage':<16}{'spans':>9}{'thread s':>10}{'share':>8}{'TFLOP/s':>9}{'GB/s':>8}{'max/mean':>10}"
        ]
        for name, s in stages:
            tflops, gb_s = f"{s.tflops:.3f}" if s.tflops else "", f"{s.gb_s:.1f}" if s.gb_s else ""
            lines.append(
                f"{name:<16}{s.spans:>9}{s.seconds:>10.3f}{s.share:>8.1%}{tflops:>9}{gb_s:>8}"
                f"{s.imbalance:>10.2f}"
            )
        lines.append("")
        for direction, (calls, wall, _) in self._read().directions().items():
            if calls:
                lines.append(f"{direction + ':':<10}{calls:>7} x {1e3 * wall / calls:.2f} ms")
        idle = sum(self.stages[name].share for name in ("wait", "idle") if name in self.stages)
        if not self.calls:
            return f"no calls of {self.runtime!r}; for experts with another give runtime=experts.runtime"
        shards = f"{self.runtime.shards} shard{'s' * (self.runtime.shards > 1)}"
        lines.append(
            f"{self.runtime.threads} threads, {shards}; waiting or idle {idle:.1%}, "
            f"busiest thread {self.imbalance:.2f} x the mean; spans cover {self.coverage:.1%}"
        )
        if dropped := self.dropped + self._read().dropped_calls:
            lines.append(f"{dropped} spans beyond max_spans were dropped; the numbers above include them")
        return "\n".join(lines)

    def _read(self) -> _core.Profile:
        if self._core is None or self._recording:
            raise RuntimeError("the profile can be read when its with block has begun and ended")
        return self._core


def profile(
    path: str | os.PathLike[str] | None = None,
    runtime: Runtime | None = None,
    *,
    max_spans: int = 1_000_000,
) -> Profile:
    """Record what every thread does in the layers of a `with` block.

    ::

        with kt_moe.profile("trace.json") as p:
            loss.backward()
        print(p.table())

    The environment variable KT_MOE_PROFILE=path does so for every runtime, from its making until the
    interpreter exits; of several that were used, the second's file is named path-2, and so on.

    Args:
        path: gets the spans as a trace for https://ui.perfetto.dev, chrome://tracing and `kt-moe
            trace-view`, when the block ends, also if by an exception; whole or not at all. None: no file.
        runtime: whose threads to watch. None: the only one there is, or else `default_runtime()`.
        max_spans: to keep, of all threads together (72 bytes each); later ones are counted only.

    Raises:
        ValueError: max_spans is not positive.
        OSError: at entry, the file could not be written there.
        RuntimeError: at entry, the runtime has a profile already.
    """
    if max_spans < 1:
        raise ValueError(f"max_spans is {max_spans}, wanted at least 1")
    if runtime is None:
        runtimes = live_runtimes()
        runtime = runtimes[0] if len(runtimes) == 1 else default_runtime()
    if not isinstance(runtime, Runtime):
        raise TypeError(f"runtime is a {type(runtime).__name__}, wanted kt_moe.Runtime or None")
    return Profile(path, runtime, max_spans)
