"""A profile as a file of the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt_moe.profiler import Call, Span

Event = dict[str, Any]


def write_trace(path: Path, other: dict[str, Any], events: Iterable[Event]) -> None:
    """Write the events, and `other` as what is said of all of them.

    Raises:
        OSError: the file cannot be written.
    """
    encode = json.JSONEncoder(separators=(",", ":")).encode
    with path.open("w") as file:
        file.write(f'{{"displayTimeUnit":"ms","otherData":{encode(other)},"traceEvents":[')
        for number, event in enumerate(events):
            file.write((",\n" if number else "\n") + encode(event))
        file.write("\n]}\n")


def complete(name: str, begin: float, end: float, process: int, thread: int, args: dict[str, Any]) -> Event:
    """Something that took from `begin` to `end`, in seconds since the profile began."""
    us = {"ts": round(1e6 * begin, 3), "dur": round(1e6 * (end - begin), 3)}
    return {"name": name, "ph": "X", **us, "pid": process, "tid": thread, "args": args}


def metadata(what: str, process: int, thread: int = 0, **args: Any) -> Event:
    """A name or a place of a process or thread."""
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": args}


def name_process(process: int, name: str) -> Iterator[Event]:
    """A process under its name, in the order of numbers."""
    yield metadata("process_name", process, name=name)
    yield metadata("process_sort_index", process, sort_index=process)


def host_events(calls: Sequence[Call], spans: Iterable[Span], shards: int) -> Iterator[Event]:
    """Shards as processes, threads as threads, and behind them a process for the calls."""
    for shard in range(shards):
        yield from name_process(shard, f"shard {shard}")
    yield from name_process(shards, "calls")
    for number, call in enumerate(calls):
        about = {"call": number, "tokens": call.tokens, "routes": call.routes, "experts": call.experts}
        yield complete(call.direction, call.begin, call.end, shards, 0, about | _work(call))
        counters = {
            "rows per expert": {"max": call.most_rows, "mean": call.routes // max(call.experts, 1)},
            "FLOPs": {"of the call": call.flops},
            "bytes": {"local": call.bytes_local, "remote": call.bytes_remote},
        }
        for name, values in counters.items():
            for at, args in ((call.begin, values), (call.end, dict.fromkeys(values, 0))):
                yield {
                    "name": name, "ph": "C", "ts": round(1e6 * at, 3), "pid": shards, "tid": 0, "args": args
                }  # fmt: skip
    named = set()
    for span in spans:
        lane = (span.shard, span.thread)
        if lane not in named:
            named.add(lane)
            yield metadata("thread_name", *lane, name=f"thread {span.thread}")
        about = {name: value for name in ("expert", "rows") if (value := getattr(span, name)) >= 0}
        yield complete(span.stage, span.begin, span.end, *lane, {"call": span.call} | about | _work(span))


def _work(of: Call | Span) -> dict[str, int]:
    names = ("flops", "bytes_local", "bytes_remote")
    return {name: value for name in names if (value := getattr(of, name))}
