"""Reading a trace: JSON of the Trace Event Format, of which complete events (ph X) and names (ph M) matter.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A file may come
from anywhere, so everything in it is checked; times are microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from kt_moe.cli.errors import UserError

_MOST_BYTES = 1 << 30
_MOST_LANES = 1024
_MOST_STAGES = 64
_LONGEST_NAME = 40
_LATEST = 1e15  # about 30 years

Lane = tuple[int, int]  # process, thread


class Window(NamedTuple):
    """Times in us."""

    begin: float
    end: float


class TraceSpan(NamedTuple):
    """A complete event. call: -1 where it has none. flops and bytes (see `kt_moe.profiler.Span`): 0 there.

    moved: bytes that a lane of a GPU engine moved.
    """

    stage: str
    lane: Lane
    begin: float
    end: float
    call: int
    flops: int = 0
    bytes_local: int = 0
    bytes_remote: int = 0
    moved: int = 0


class TraceCall(NamedTuple):
    """A forward or backward."""

    name: str
    begin: float
    end: float


class Recorded(NamedTuple):
    """What a profile notes beside the events. dropped: spans and calls that it did not keep."""

    threads: int
    shards: int
    dropped: int


@dataclass(frozen=True)
class Trace:
    """Spans by lane and begin; calls by number. recorded: None where the file is of another's making."""

    path: Path
    spans: list[TraceSpan]
    calls: dict[int, TraceCall] = field(default_factory=dict)
    processes: dict[int, str] = field(default_factory=dict)
    threads: dict[Lane, str] = field(default_factory=dict)
    recorded: Recorded | None = None

    def whole(self) -> Window:
        """From the first begin to the last end of its spans, of which there are some."""
        return Window(min(s.begin for s in self.spans), max(s.end for s in self.spans))

    def window_of(self, call: int) -> Window:
        """A call's.

        Raises:
            UserError: there is none of that number.
        """
        if call in self.calls:
            return Window(self.calls[call].begin, self.calls[call].end)
        spans = [span for span in self.spans if span.call == call]
        if not spans:
            numbers = sorted({*self.calls, *(span.call for span in self.spans if span.call >= 0)})
            there = f"calls {numbers[0]} to {numbers[-1]}" if numbers else "no calls"
            raise UserError(f"--call {call}: {self.path} has {there}")
        return replace(self, spans=spans).whole()

    def within(self, window: Window) -> Trace:
        """What overlaps a window."""
        spans = [s for s in self.spans if s.end > window.begin and s.begin < window.end]
        calls = {n: c for n, c in self.calls.items() if c.end > window.begin and c.begin < window.end}
        return replace(self, spans=spans, calls=calls)


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        UserError: no such file, not JSON, not a trace, or one too large to be drawn; says what is wrong.
    """
    events, recorded = _content(path)
    found: dict[Lane, list[TraceSpan]] = {}
    trace = Trace(path, [], recorded=recorded)
    for index, event in enumerate(events):
        where = f"{path}: traceEvents[{index}]"
        if not isinstance(event, dict) or not isinstance(event.get("ph"), str):
            raise UserError(f'{where} is no event: wanted an object with a string "ph"')
        if event["ph"] == "M":
            _take_name(trace, event, where)
        elif event["ph"] == "X":
            begin, duration = (_time(event, key, where) for key in ("ts", "dur"))
            lane = _id(event, "pid", where), _id(event, "tid", where)
            name = _text(event, "name", where)
            found.setdefault(lane, []).append(TraceSpan(name, lane, begin, begin + duration, *_about(event)))
    calls = next((pid for pid, name in trace.processes.items() if name == "calls"), None)
    for lane in sorted(found):
        if lane[0] == calls:
            trace.calls.update(
                {s.call: TraceCall(s.stage, s.begin, s.end) for s in found[lane] if s.call >= 0}
            )
        else:
            trace.spans.extend(sorted(found[lane], key=lambda span: (span.begin, -span.end)))
    _check_size(trace)
    return trace


def _content(path: Path) -> tuple[list[Any], Recorded | None]:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path} is no ordinary file")
        if size > _MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than the {_MOST_BYTES:,} that can be drawn")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
        raise UserError(f"{path} is not JSON: {str(error)[:100]}") from None
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise UserError(
            f'{path} is no trace: wanted a list of events, or an object with one as "traceEvents"'
        )
    return events, _recorded(content)


def _recorded(content: Any) -> Recorded | None:
    noted = content.get("otherData") if isinstance(content, dict) else None
    threads, shards, spans, calls = (
        _count(noted, key) for key in ("threads", "shards", "dropped_spans", "dropped_calls")
    )
    if not (1 <= threads <= _MOST_LANES and 1 <= shards <= _MOST_LANES):
        return None
    return Recorded(threads, shards, max(spans, 0) + max(calls, 0))


def _time(event: dict[str, Any], key: str, where: str) -> float:
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LATEST:
        raise UserError(f"{where}: {key} is {_shown(value)}, wanted microseconds, at least 0")
    return float(value)


def _id(event: dict[str, Any], key: str, where: str) -> int:
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
        raise UserError(f"{where}: {key} is {_shown(value)}, wanted an integer")
    return value


def _text(event: dict[str, Any], key: str, where: str) -> str:
    value = event.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {_shown(value)}, wanted a string")
    printable = "".join(c if c.isascii() and c.isprintable() else "?" for c in value[: _LONGEST_NAME + 1])
    return printable if len(printable) <= _LONGEST_NAME else printable[: _LONGEST_NAME - 3] + "..."


def _about(event: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """The last fields of a `TraceSpan`."""
    args = event.get("args")
    flops, local, remote, moved = (
        max(_count(args, key), 0) for key in ("flops", "bytes_local", "bytes_remote", "bytes")
    )
    return _count(args, "call"), flops, local, remote, moved


def _count(values: Any, key: str) -> int:
    """An integer of 0 or more; -1 where there is none."""
    count = values.get(key) if isinstance(values, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 1 << 63 else -1


def _shown(value: Any) -> str:
    if value is None or isinstance(value, dict | list):
        return "missing" if value is None else f"a {type(value).__name__}"
    return repr(value)[:40]


def _take_name(trace: Trace, event: dict[str, Any], where: str) -> None:
    if event.get("name") not in ("process_name", "thread_name"):
        return
    args = event.get("args")
    name = _text(args if isinstance(args, dict) else {}, "name", f"{where}: args")
    process = _id(event, "pid", where)
    if event["name"] == "process_name":
        trace.processes[process] = name
    else:
        trace.threads[process, _id(event, "tid", where)] = name


def innermost(spans: Iterable[TraceSpan]) -> Iterator[tuple[str, float, float]]:
    """One lane's time as (stage, begin, end): of spans that lie in one another the innermost, in order."""
    around: list[TraceSpan] = []
    now = 0.0

    def until(time: float) -> Iterator[tuple[str, float, float]]:
        nonlocal now
        while around:
            end = min(around[-1].end, time)
            if end > now:
                yield around[-1].stage, now, end
                now = end
            if around[-1].end > time:
                return
            around.pop()

    for span in spans:
        yield from until(span.begin)
        now = max(now, span.begin)
        around.append(span)
    yield from until(_LATEST * 2)


def _check_size(trace: Trace) -> None:
    if not trace.spans:
        raise UserError(f'{trace.path} has no spans: no complete events ("ph": "X") of threads')
    if (lanes := len({span.lane for span in trace.spans})) > _MOST_LANES:
        raise UserError(
            f"{trace.path} has {lanes:,} threads, more than the {_MOST_LANES:,} that can be drawn"
        )
    if (stages := len({span.stage for span in trace.spans})) > _MOST_STAGES:
        raise UserError(f"{trace.path} has {stages:,} names, more than the {_MOST_STAGES} that can be drawn")
