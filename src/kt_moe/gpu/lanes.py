"""Lanes of a device as numbers, a table and events of a trace; passes by step, and what bound them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from kt_moe.gpu.pass_log import PassReport
from kt_moe.gpu.spans import LANES, DeviceSpan
from kt_moe.trace import complete, metadata, name_process

PROCESS = "GPU engine "  # and the device: a process of the trace
_WORKING = ("link", "GPU", "CPU part")
_BOUND = 0.5  # part of the time that a lane has to be busy to bound it
_MOST_STEPS = 10


class LaneTime(NamedTuple):
    """The spans of one name on a lane. seconds: that they last together."""

    lane: str
    name: str
    spans: int
    seconds: float
    flops: int
    bytes: int

    @property
    def working(self) -> bool:
        """Whether the lane did something in them, and did not wait."""
        return not self.name.startswith("wait")


@dataclass(frozen=True)
class LayerPass:
    """A forward or backward of a layer through the GPU engine.

    Attributes:
        device: such as "cuda:0".
        begin, end: in seconds since the profile began, as the device came to it.
        report: what was where.
        busy: seconds in that time in which "link", "GPU" and "CPU part" worked.
    """

    device: str
    begin: float
    end: float
    report: PassReport
    busy: dict[str, float]

    @property
    def bound(self) -> str | None:
        """The lane that worked most of the time; None if none did for half of it."""
        return bound(self.busy, self.end - self.begin)


def bound(busy: dict[str, float], seconds: float) -> str | None:
    """What bound so many seconds: the lane that worked most in them, and for half of them at least."""
    lane = max(busy, key=lambda name: busy[name])
    return lane if busy[lane] > _BOUND * seconds else None


def layer_passes(
    device: str, passes: Iterable[tuple[float, float, PassReport]], spans: Sequence[DeviceSpan]
) -> list[LayerPass]:
    """Passes in order with how busy the lanes were meanwhile; `spans` by lane and begin."""
    lanes = {lane: _Busy([s for s in spans if s.lane == lane and _works(s.name)]) for lane in _WORKING}
    return [
        LayerPass(device, begin, end, report, {lane: busy.within(begin, end) for lane, busy in lanes.items()})
        for begin, end, report in passes
    ]


class _Busy:
    """How long spans in order, none of which lie in another, last within a window."""

    def __init__(self, spans: Sequence[DeviceSpan]) -> None:
        self._spans = spans
        self._ends = [span.end for span in spans]

    def within(self, begin: float, end: float) -> float:
        total = 0.0
        for span in self._spans[bisect_right(self._ends, begin) :]:
            if span.begin >= end:
                break
            total += min(span.end, end) - max(span.begin, begin)
        return total


def steps(passes: Sequence[LayerPass]) -> list[list[LayerPass]]:
    """Passes of one device by step: forwards of layers, then their backwards.

    A forward that computes again for the backward behind it (gradient checkpointing) begins no step.
    """
    found: list[list[LayerPass]] = []
    open_forwards: dict[int, int] = {}  # of the step, by layer: those without a backward
    seen: set[int] = set()
    turned = True  # whether a backward came last
    for i, one in enumerate(passes):
        layer, backward = one.report.layer, one.report.backward
        after = passes[i + 1].report if i + 1 < len(passes) else None
        for_backward = after is not None and after.backward and after.layer == layer
        again = not backward and open_forwards.get(layer, 0) > 0 and for_backward
        if not found or (not backward and not again and (turned or layer in seen)):
            found.append([])
            open_forwards.clear()
            seen.clear()
        found[-1].append(one)
        if backward:
            open_forwards[layer] = max(0, open_forwards.get(layer, 0) - 1)
        elif not again:
            seen.add(layer)
            open_forwards[layer] = open_forwards.get(layer, 0) + 1
        turned = backward or (turned and again)
    return found


def lane_times(spans: Iterable[tuple[str, str, float, int, int]]) -> list[LaneTime]:
    """Of spans as lane, name, seconds, flops and bytes; in the order of `LANES`."""
    found: dict[tuple[str, str], list[Any]] = {}
    for lane, name, seconds, flops, moved in spans:
        total = found.setdefault((lane, name), [0, 0.0, 0, 0])
        for i, more in enumerate((1, seconds, flops, moved)):
            total[i] += more
    order = {lane: number for number, lane in enumerate(LANES)}
    times = [LaneTime(lane, name, *total) for (lane, name), total in found.items() if lane in order]
    return sorted(times, key=lambda time: (order[time.lane], time.name))


def lane_table(device: str, times: Sequence[LaneTime], seconds: float) -> str:
    """How busy the lanes of a device were in so many seconds."""
    title = f"{device}, {seconds:.3f} s"
    lines = [f"{title:<16}{'spans':>9}{'busy s':>10}{'share':>8}{'TFLOP/s':>9}{'GB/s':>8}"]
    for lane, group in groupby(times, key=lambda time: time.lane):
        working = [time for time in group if time.working]
        busy = sum(time.seconds for time in working)
        if lane in ("passes", "host") or not busy:
            continue
        flops, moved = sum(time.flops for time in working), sum(time.bytes for time in working)
        tflops = f"{flops / busy / 1e12:.1f}" if flops else ""
        gb_s = f"{moved / busy / 1e9:.1f}" if moved else ""
        spans = sum(time.spans for time in working)
        share = busy / max(seconds, 1e-9)
        lines.append(f"{lane:<16}{spans:>9}{busy:>10.3f}{share:>8.1%}{tflops:>9}{gb_s:>8}".rstrip())
    waits = [f"{time.name} {time.seconds:.3f} s" for time in times if time.lane == "host"]
    if waits:
        lines.append("calling thread: " + ", ".join(waits))
    return "\n".join(lines)


def step_lines(passes: Sequence[LayerPass]) -> list[str]:
    """A line for each step of one device, the last ones where there are many."""
    all_steps = steps(passes)
    first = max(0, len(all_steps) - _MOST_STEPS)
    return [_step_line(number, all_steps[number]) for number in range(first, len(all_steps))]


def _step_line(number: int, step: Sequence[LayerPass]) -> str:
    reports = [one.report for one in step]
    gpu, gpu_rows, cpu, cpu_rows, moved = (
        sum(getattr(report, name) for report in reports)
        for name in ("gpu_experts", "gpu_rows", "cpu_experts", "cpu_rows", "bytes_moved")
    )
    seconds = max(step[-1].end - step[0].begin, 1e-9)
    busy = {lane: sum(one.busy[lane] for one in step) for lane in _WORKING}
    shares = ", ".join(f"{lane} {part / seconds:.0%}" for lane, part in busy.items())
    by = bound(busy, seconds)
    return (
        f"step {number + 1}: {len(step)} passes, {1e3 * seconds:.1f} ms; "
        f"GPU {gpu:,} experts, {gpu_rows:,} rows; CPU {cpu:,} experts, {cpu_rows:,} rows; "
        f"{moved / 1e9:.2f} GB moved; "
        f"bound by {'none of them' if by is None else f'the {by}'} (busy: {shares})"
    )


def _works(name: str) -> bool:
    return not name.startswith("wait")


class DeviceEvents(NamedTuple):
    """The spans and passes of one device, for a trace."""

    device: str
    spans: Sequence[DeviceSpan]
    passes: Sequence[LayerPass]

    def events(self, process: int) -> Iterator[dict[str, Any]]:
        """As the Trace Event Format has them."""
        yield from name_process(process, PROCESS + self.device)
        used = {span.lane for span in self.spans} | ({"passes"} if self.passes else set())
        for thread, lane in enumerate(LANES):
            if lane in used:
                yield metadata("thread_name", process, thread, name=lane)
                yield metadata("thread_sort_index", process, thread, sort_index=thread)
        for one in self.passes:
            report = {name: value for name, value in vars(one.report).items() if name != "seconds"}
            args = report | {"bound": one.bound or "none"}
            seconds = max(one.end - one.begin, 1e-9)
            args |= {f"busy {lane}": f"{busy / seconds:.0%}" for lane, busy in one.busy.items()}
            name = "backward" if one.report.backward else "forward"
            yield complete(name, one.begin, one.end, process, LANES.index("passes"), args)
        for span in self.spans:
            args = {name: getattr(span, name) for name in ("experts", "rows", "flops", "bytes")}
            args = {"layer": span.layer} | {name: value for name, value in args.items() if value}
            yield complete(span.name, span.begin, span.end, process, LANES.index(span.lane), args)
