"""Where the time of layers goes: what every thread did, as numbers, a table and a trace."""

from __future__ import annotations

import os
import threading
import time
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from kt_moe import _core
from kt_moe.files import check_writable, replacing
from kt_moe.gpu.lanes import (
    DeviceEvents,
    LayerPass,
    lane_table,
    lane_times,
    layer_passes,
    step_lines,
)
from kt_moe.gpu.spans import DeviceSpan, Recorder
from kt_moe.runtime import Runtime, default_runtime, live_runtimes
from kt_moe.stages import StageTime, Summary, ThreadTime
from kt_moe.trace import host_events, write_trace

if TYPE_CHECKING:
    from kt_moe.gpu.streams import Streams

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


class Profile:
    """What `profile` returns: records between entry and exit, and is read after that."""

    def __init__(self, path: str | os.PathLike[str] | None, runtime: Runtime, max_spans: int) -> None:
        self.path = None if path is None else Path(path).absolute()
        self.runtime = runtime
        self._max_spans = max_spans
        self._core: _core.Profile | None = None
        self._recording = False
        self._process = 0
        self._began = 0  # by time.perf_counter_ns
        self._recorders: dict[Streams, Recorder] = {}

    def __enter__(self) -> Profile:
        if self.path is not None:
            check_writable(self.path)
        with _attaching:
            if self._core is not None or self._recording:
                raise RuntimeError("a profile records once; call kt_moe.profile again for another")
            if (other := self.runtime._profile) is not None:
                raise RuntimeError(f"{self.runtime!r} has a profile already: {other!r}")
            self._began = time.perf_counter_ns()
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
                if self._process == os.getpid():  # a forked child has but a copy
                    for recorder in self._recorders.values():
                        recorder.finish()
                    if self.path is not None:
                        self.write(self.path)

    def write(self, path: Path) -> None:
        """Write the spans as a trace, whole or not at all; what the end of the block does with `path`."""
        shards = self.runtime.shards
        other = {
            "threads": self.runtime.threads,
            "shards": shards,
            "dropped_spans": self.dropped,
            "dropped_calls": self._read().dropped_calls,
        }
        of_devices = (device.events(number) for number, device in enumerate(self._devices, shards + 1))
        events = chain(host_events(self.calls, self.spans, shards), *of_devices)
        with replacing(path) as part:
            write_trace(part, other, events)

    def _recorder(self, streams: Streams) -> Recorder:
        """What records the lanes of a GPU engine."""
        found = self._recorders.get(streams)
        if found is None:
            found = self._recorders.setdefault(streams, Recorder(streams, self._began, self._max_spans))
        return found

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

    @property
    def device_spans(self) -> list[DeviceSpan]:
        """What the link, the GPU and the host did for layers on a GPU, by device, lane and begin."""
        return [span for device in self._devices for span in device.spans]

    @property
    def passes(self) -> list[LayerPass]:
        """Forwards and backwards of layers through the GPU engine, by device, in order."""
        return [one for device in self._devices for one in device.passes]

    @property
    def stages(self) -> dict[str, StageTime]:
        """Stages that took any time. Dropped spans count here too."""
        return self._summary.stages

    @property
    def seconds(self) -> float:
        """Wall time of all calls together."""
        return self._summary.seconds

    @property
    def thread_seconds(self) -> float:
        """Threads x wall time."""
        return self._summary.thread_seconds

    @property
    def coverage(self) -> float:
        """Part of threads x wall time that spans cover, waiting and idle ones included; 1 without calls."""
        return self._summary.coverage

    @property
    def imbalance(self) -> float:
        """Most seconds that a thread was busy, neither waiting nor idle, over the threads' mean."""
        return self._summary.imbalance

    @property
    def dropped(self) -> int:
        """Spans beyond `max_spans`: neither in `spans` nor in the trace, but in `stages` and the table."""
        return self._read().dropped

    def table(self) -> str:
        """Stages by their share of the time, and below them what calls there were."""
        if not self.calls and not self._devices:
            return f"no calls of {self.runtime!r}; for experts with another give runtime=experts.runtime"
        blocks = [_device_table(device) for device in self._devices]
        if self.calls:
            blocks.insert(0, self._summary.table())
        text = "\n\n".join(blocks)
        if dropped := self.dropped + self._read().dropped_calls:
            text += f"\n{dropped} spans beyond max_spans were dropped; the numbers above include them"
        if dropped := sum(recorder.dropped for recorder in self._recorders.values()):
            text += f"\n{dropped} spans of GPUs beyond max_spans were dropped; the numbers above lack them"
        return text

    @cached_property
    def _summary(self) -> Summary:
        totals, directions = self._read().totals(), self._read().directions()
        return Summary(
            self.runtime.threads,
            self.runtime.shards,
            {stage: [ThreadTime(*time) for time in threads] for stage, threads in totals.items()},
            {direction: (calls, wall) for direction, (calls, wall, _) in directions.items()},
            sum(covered for _, _, covered in directions.values()),
        )

    @cached_property
    def _devices(self) -> list[DeviceEvents]:
        """Devices with spans."""
        self._read()
        found = []
        for recorder in self._recorders.values():
            spans = recorder.spans()
            passes = layer_passes(recorder.device, recorder.passes(), spans)
            if spans or passes:
                found.append(DeviceEvents(recorder.device, spans, passes))
        return sorted(found, key=lambda device: device.device)

    def _read(self) -> _core.Profile:
        if self._core is None or self._recording:
            raise RuntimeError("the profile can be read when its with block has begun and ended")
        return self._core


def _device_table(device: DeviceEvents) -> str:
    every = [(span.begin, span.end) for span in device.spans] + [(p.begin, p.end) for p in device.passes]
    seconds = max(end for _, end in every) - min(begin for begin, _ in every)
    times = lane_times((s.lane, s.name, s.end - s.begin, s.flops, s.bytes) for s in device.spans)
    return "\n".join([lane_table(device.device, times, seconds), *step_lines(device.passes)])


def profile(
    path: str | os.PathLike[str] | None = None,
    runtime: Runtime | None = None,
    *,
    max_spans: int = 1_000_000,
) -> Profile:
    """Record what every thread does in the layers of a `with` block.

        with kt_moe.profile("trace.json") as p:
            loss.backward()
        print(p.table())

    The environment variable KT_MOE_PROFILE=path does so for every runtime, from its making until the
    interpreter exits; of several that were used, the second's file is named path-2, and so on.

    Of layers with hidden states on a GPU it records what the link, the GPU and the calling thread do as well;
    the end of the block waits for the GPU.

    Args:
        path: gets the spans as a trace for https://ui.perfetto.dev and chrome://tracing, when the block ends,
            also if by an exception; whole or not at all. None: no file.
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
