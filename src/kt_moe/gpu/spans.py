"""What a device, its link and the host did while a profile recorded: spans of time on lanes.

Spans of streams lie between CUDA events, which are turned into times when the profile ends, or earlier where
there are very many; the device's clock is compared with the host's when recording begins and when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

if TYPE_CHECKING:
    from kt_moe.gpu.pass_log import PassReport
    from kt_moe.gpu.streams import Streams

LANES = ("passes", "link", "GPU", "uplink", "downlink", "CPU part", "host")
_ON_HOST = ("CPU part", "host")
_MOST_EVENTS = 8192  # spans between CUDA events that wait for the end
_TRIES = 8
_NS = 1e-9

Mark = int | torch.cuda.Event  # ns of the host's clock, or an event of the device


class DeviceSpan(NamedTuple):
    """What happened on a lane, and when, in seconds since the profile began.

    Attributes:
        device: such as "cuda:0".
        lane: "link": experts to the GPU. "GPU": chunks of experts. "uplink", "downlink": rows and LoRA to the
            GPU and from it. "CPU part": the CPU's experts. "host": what the calling thread waits for.
            "passes": forwards and backwards of layers.
        layer: its number, in the order of first calls; -1: of none.
        experts, rows, flops, bytes: how many it is about; 0 where it is about none.
    """

    device: str
    lane: str
    name: str
    begin: float
    end: float
    layer: int
    experts: int = 0
    rows: int = 0
    flops: int = 0
    bytes: int = 0


class _Raw(NamedTuple):
    """A span between two marks, or between two times in ns: of the device's clock, or the host's."""

    lane: str
    name: str
    begin: Mark | float
    end: Mark | float
    about: tuple[int, int, int, int, int]
    report: PassReport | None


class _Noted:
    """What a stream was given since the last event on it."""

    def __init__(self, name: str, layer: int, begin: Mark) -> None:
        self.name, self.layer, self.begin = name, layer, begin
        self.experts = self.bytes = 0


class Recorder:
    """Spans of one engine's device, from its making until `finish`.

    Args:
        streams: of the engine.
        began: the host's clock (`time.perf_counter_ns`) when the profile began.
        most: spans to keep.

    Attributes:
        dropped: spans beyond those.
        layer: of the pass that runs; -1: none does.
    """

    def __init__(self, streams: Streams, began: int, most: int) -> None:
        self.device = str(streams.device)
        self.dropped = 0
        self.layer = -1
        self._streams, self._began, self._most = streams, began, most
        self._clock = _DeviceClock(streams.device) if streams.device.type == "cuda" else None
        self._noted: dict[str | None, _Noted] = {}
        self._waiting: list[_Raw] = []  # between events
        self._kept: list[_Raw] = []  # between times
        self._finished = False

    def note(self, lane: str, name: str, bytes: int, layer: Hashable, experts: int) -> None:
        """Say what the stream of the lane is given next: a span until the next event on it (`close`).

        layer: the number of one; else that of the pass.
        """
        layer = layer if isinstance(layer, int) else self.layer
        noted = self._noted.get(lane)
        if noted is None or (noted.name, noted.layer) != (name, layer):
            self.close(lane)
            noted = self._noted[lane] = _Noted(name, layer, self._streams.mark(lane))
        noted.experts += experts
        noted.bytes += bytes

    def close(self, lane: str | None) -> None:
        """End what was noted of a stream."""
        noted = self._noted.pop(lane, None)
        if noted is not None and lane is not None:
            about = noted.layer, noted.experts, 0, 0, noted.bytes
            self._add(_Raw(lane, noted.name, noted.begin, self._streams.mark(lane), about, None))

    @contextmanager
    def span(
        self, lane: str, name: str, experts: int = 0, rows: int = 0, flops: int = 0, bytes: int = 0
    ) -> Iterator[None]:
        """A span around what the block gives to the caller's stream or does on the host; none if it fails."""
        begin = self.mark(lane)
        yield
        about = self.layer, experts, rows, flops, bytes
        self._add(_Raw(lane, name, begin, self.mark(lane), about, None))

    def mark(self, lane: str) -> Mark:
        """The present point of the caller's stream, or for some lanes of the host's clock."""
        return time.perf_counter_ns() if lane in _ON_HOST else self._streams.mark()

    def begin_pass(self, layer: int) -> Mark:
        """Say that a pass of a layer begins."""
        self.layer = layer
        self._noted.clear()  # what an exception left
        if len(self._waiting) >= _MOST_EVENTS and not self._finished:
            self._resolve(wait=False)
        return self.mark("passes")

    def end_pass(self, begin: Mark, report: PassReport) -> None:
        """Say that it ends."""
        name = "backward" if report.backward else "forward"
        about = self.layer, report.gpu_experts + report.cpu_experts, report.gpu_rows + report.cpu_rows, 0, 0
        self._add(_Raw("passes", name, begin, self.mark("passes"), about, report))
        self.layer = -1

    def finish(self) -> None:
        """Wait for the spans so far, and record no more."""
        if self._finished:
            return
        self._finished = True
        try:
            self._resolve(wait=True)
            if self._clock is not None:
                self._clock.finish()
        except RuntimeError:  # a kernel has failed, which whoever asked for its result is told
            self.dropped += len(self._waiting)
            self._waiting.clear()

    def spans(self) -> list[DeviceSpan]:
        """All but those of passes, by lane and begin."""
        found = [
            DeviceSpan(self.device, raw.lane, raw.name, *self._times(raw), *raw.about)
            for raw in self._kept
            if raw.report is None
        ]
        return sorted(found, key=lambda span: (LANES.index(span.lane), span.begin))

    def passes(self) -> list[tuple[float, float, PassReport]]:
        """Begin, end and report of each pass, by begin."""
        found = [(*self._times(raw), raw.report) for raw in self._kept if raw.report is not None]
        return sorted(found, key=lambda one: one[0])

    def _add(self, raw: _Raw) -> None:
        if self._finished:
            return
        if len(self._kept) + len(self._waiting) >= self._most:
            self.dropped += 1
        elif isinstance(raw.begin, int):
            self._kept.append(raw)
        else:
            self._waiting.append(raw)

    def _resolve(self, wait: bool) -> None:
        """Turn events that were reached into times; or all, waiting for them."""
        clock, left = self._clock, []
        if clock is None:
            return
        for raw in self._waiting:
            begin, end = cast(torch.cuda.Event, raw.begin), cast(torch.cuda.Event, raw.end)
            if wait:
                end.synchronize()
            if wait or end.query():  # type: ignore[no-untyped-call]
                self._kept.append(raw._replace(begin=clock.time(begin), end=clock.time(end)))
            else:
                left.append(raw)
        self._waiting = left

    def _times(self, raw: _Raw) -> tuple[float, float]:
        """Begin and end in seconds since the profile began."""
        times = [cast(float, raw.begin), cast(float, raw.end)]
        if self._clock is not None and isinstance(raw.begin, float):
            times = [self._clock.on_host(at) for at in times]
        begin, end = ((at - self._began) * _NS for at in times)
        return max(begin, 0.0), max(end, begin, 0.0)


class _DeviceClock:
    """The clock of a device's events, and what the host's says at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._first_host, self._first = self._both()
        self._base, self._base_time = self._first, 0.0
        self._rate = 1.0

    def time(self, event: torch.cuda.Event) -> float:
        """ns since the first event."""
        ms: float = self._base.elapsed_time(event)
        ns = 1e6 * ms  # from fp32, so that long ones are not exact
        at = self._base_time + ns
        if abs(ns) > 1e9:
            self._base, self._base_time = event, at
        return at

    def finish(self) -> None:
        """Compare the clocks again: they do not tick at quite the same rate."""
        host, event = self._both()
        elapsed = self.time(event)
        if elapsed > 1e9:
            self._rate = (host - self._first_host) / elapsed

    def on_host(self, time: float) -> float:
        """The host's ns for the device's."""
        return self._first_host + self._rate * time

    def _both(self) -> tuple[int, torch.cuda.Event]:
        """An event and the host's ns of it: of some tries the one least disturbed."""
        best: tuple[int, int, torch.cuda.Event] | None = None
        for _ in range(_TRIES):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            before = time.perf_counter_ns()
            event.record(self._stream)
            event.synchronize()
            took = time.perf_counter_ns() - before
            if best is None or took < best[0]:
                best = took, before + took // 2, event
        assert best is not None
        return best[1], best[2]
