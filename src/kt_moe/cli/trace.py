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
    """A complete event. call: -1 where it has none."""

    stage: str
    lane: Lane
    begin: float
    end: float
    call: int


class TraceCall(NamedTuple):
    """A forward or backward."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Trace:
    """Spans by lane and begin; calls by number."""

    path: Path
    spans: list[TraceSpan]
    calls: dict[int, TraceCall] = field(default_factory=dict)
    processes: dict[int, str] = field(default_factory=dict)
    threads: dict[Lane, str] = field(default_factory=dict)

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
    events = _events(path)
    found: dict[Lane, list[TraceSpan]] = {}
    trace = Trace(path, [])
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
            found.setdefault(lane, []).append(TraceSpan(name, lane, begin, begin + duration, _call(event)))
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


def _events(path: Path) -> list[Any]:
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
    return events


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


def _call(event: dict[str, Any]) -> int:
    args = event.get("args")
    call = args.get("call") if isinstance(args, dict) else None
    return call if isinstance(call, int) and not isinstance(call, bool) and 0 <= call < 1 << 63 else -1


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
