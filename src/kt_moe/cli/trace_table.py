"""The tables of a trace: those of `kt_moe.Profile.table`, from what the file holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from kt_moe.cli.trace import Trace, TraceCall, TraceSpan, innermost
from kt_moe.gpu.lanes import PROCESS, lane_table, lane_times
from kt_moe.stages import Summary, ThreadTime

_US = 1e-6
_NOTHING = ThreadTime(0, 0.0, 0, 0, 0)


def trace_table(trace: Trace, call: int | None = None) -> str:
    """Of all calls or of one; a line that says why, where the file does not hold what is needed.

    Lanes of GPU engines have a table each, of what lies in the time of the calls that the other table is of.
    """
    devices = {pid: name for pid, name in trace.processes.items() if name.startswith(PROCESS)}
    threads = replace(trace, spans=[span for span in trace.spans if span.lane[0] not in devices])
    tables = [] if devices and not trace.calls else [_stage_table(threads, call)]
    shown = trace if call is None or call not in trace.calls else trace.within(trace.window_of(call))
    for pid, name in sorted(devices.items()):
        spans = [span for span in shown.spans if span.lane[0] == pid]
        if spans:
            tables.append(_lane_table(name.removeprefix(PROCESS), spans, trace))
    return "\n\n".join(tables)


def _lane_table(device: str, spans: list[TraceSpan], trace: Trace) -> str:
    seconds = _US * (max(span.end for span in spans) - min(span.begin for span in spans))
    found = (
        (trace.threads.get(s.lane, ""), s.stage, _US * (s.end - s.begin), s.flops, s.moved) for s in spans
    )
    return lane_table(device, lane_times(found), seconds)


def _stage_table(trace: Trace, call: int | None) -> str:
    if trace.recorded is None:
        return f"no table: {trace.path} does not say how many threads and shards there were"
    calls = trace.calls if call is None else {n: c for n, c in trace.calls.items() if n == call}
    if not any(c.end > c.begin for c in calls.values()):
        return (
            f"no table: {trace.path} does not say how long {'calls' if call is None else f'call {call}'} took"
        )
    spans = trace.spans if call is None else [span for span in trace.spans if span.call == call]
    strangers = {span.lane[1] for span in spans} - set(range(trace.recorded.threads))
    if strangers:
        return f"no table: {trace.path} has a thread {min(strangers)}, but {trace.recorded.threads} threads"
    table = summary(spans, calls.values(), trace.recorded.threads, trace.recorded.shards).table()
    if trace.recorded.dropped:
        table += f"\n{trace.recorded.dropped} spans were dropped from the trace; the numbers above lack them"
    return table


def summary(spans: Iterable[TraceSpan], calls: Iterable[TraceCall], threads: int, shards: int) -> Summary:
    """Of spans on threads 0 to threads - 1, each of which may work for several shards, and their calls."""
    of_thread: list[list[TraceSpan]] = [[] for _ in range(threads)]
    for span in spans:
        of_thread[span.lane[1]].append(span)
    by_thread: dict[str, list[ThreadTime]] = defaultdict(lambda: [_NOTHING] * threads)
    for thread, theirs in enumerate(of_thread):
        for stage, time in _by_stage(theirs).items():
            by_thread[stage][thread] = time
    directions: dict[str, tuple[int, float]] = {}
    for call in calls:
        count, wall = directions.get(call.name, (0, 0.0))
        directions[call.name] = count + 1, wall + _US * (call.end - call.begin)
    covered = sum(time.seconds for times in by_thread.values() for time in times)
    return Summary(threads, shards, by_thread, directions, covered)


def _by_stage(spans: list[TraceSpan]) -> dict[str, ThreadTime]:
    """Of one thread."""
    seconds: dict[str, float] = defaultdict(float)
    for stage, begin, end in innermost(sorted(spans, key=lambda span: (span.begin, -span.end))):
        seconds[stage] += _US * (end - begin)
    found: dict[str, ThreadTime] = {}
    for span in spans:
        count, _, flops, local, remote = found.get(span.stage, _NOTHING)
        found[span.stage] = ThreadTime(
            count + 1,
            seconds[span.stage],
            flops + span.flops,
            local + span.bytes_local,
            remote + span.bytes_remote,
        )
    return found
