"""`kt-moe trace-view`: what it draws, and files it refuses in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kt_moe
from kt_moe.cli import main
from kt_moe.cli.trace import TraceSpan, Window, innermost, read_trace
from kt_moe.cli.trace_plot import raster, stage_colors
from kt_moe.cli.trace_table import summary

LANE = (0, 0)


def span(name: str, ts: float, dur: float, pid: int = 0, tid: int = 0, **args: Any) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": ts, "dur": dur, "pid": pid, "tid": tid, "args": args}


def name(what: str, text: Any, pid: int, tid: int = 0) -> dict[str, Any]:
    return {"name": f"{what}_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": text}}


def events() -> list[dict[str, Any]]:
    """Two calls of 1 ms on two shards with a thread each."""
    found = [name("process", f"shard {s}", s) for s in range(2)] + [name("process", "calls", 2)]
    for call, direction in enumerate(("forward", "backward")):
        begin = 2000.0 * call
        found.append(span(direction, begin, 1000, pid=2, call=call))
        for s in range(2):
            found += [
                name("thread", f"thread {s}", s, s),
                span("gate_up", begin, 600, s, s, call=call),
                span("activation", begin + 100, 50, s, s, call=call),
                span("wait", begin + 600, 400, s, s, call=call),
            ]
    return found


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events()}))
    return path


def view(*args: str | Path) -> int:
    return main(["trace-view", *map(str, args)])


def test_a_picture(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view(trace) == 0
    picture = trace.with_suffix(".png")
    assert str(picture) in capsys.readouterr().out
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colors = stage_colors(["gate_up", "activation", "wait"])
    for color in colors.values():
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(axis=1).sum() > 100


def test_names_and_calls_are_read(trace: Path) -> None:
    found = read_trace(trace)
    assert found.processes[1] == "shard 1"
    assert found.threads[1, 1] == "thread 1"
    assert [call.name for call in found.calls.values()] == ["forward", "backward"]
    assert found.window_of(1) == Window(2000.0, 3000.0)
    assert found.whole() == Window(0.0, 3000.0)
    assert len(found.within(Window(650.0, 1500.0)).spans) == 2


def test_windows(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trace.with_name("out.png")
    assert view(trace, "-o", out, "--call", "1") == 0
    assert view(trace, "-o", out, "--from", "0.1", "--to", "0.2") == 0
    assert view(trace, "-o", out, "--from", "2.5") == 0
    assert view(trace, "-o", out, "--call", "7") == 2
    assert "calls 0 to 1" in capsys.readouterr().err
    assert view(trace, "-o", out, "--from", "9") == 2
    assert "ends at 3 ms" in capsys.readouterr().err
    assert view(trace, "-o", out, "--from", "2", "--to", "1") == 2
    assert view(trace, "-o", out, "--from", "0", "--call", "1") == 2
    assert view(trace, "-o", trace.parent / "no" / "out.png") == 2
    assert "no directory" in capsys.readouterr().err


NOTED = {"threads": 2, "shards": 2, "dropped_spans": 0, "dropped_calls": 0}


def noted(path: Path, content: list[dict[str, Any]], **other: Any) -> Path:
    path.write_text(json.dumps({"otherData": NOTED | other, "traceEvents": content}))
    return path


def test_a_table_of_all_calls_or_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = events()
    for event in found:
        if event["ph"] == "X":
            event["ts"], event["dur"] = 1000 * event["ts"], 1000 * event["dur"]
    gate_up, _, wait = [e for e in found if e["ph"] == "X" and e["pid"] == 1][:3]
    gate_up["args"] |= {"flops": 24 * 10**11, "bytes_local": 5 * 10**9, "bytes_remote": 10**9}
    gate_up["dur"], wait["ts"], wait["dur"] = 800_000, 800_000, 200_000
    trace = noted(tmp_path / "t.json", found)
    assert view(trace, "--table") == 0
    assert (tmp_path / "t.png").exists()
    assert capsys.readouterr().out.splitlines()[:-2] == [
        "stage               spans  thread s   share  TFLOP/s    GB/s  max/mean",
        "gate_up                 4     2.400   60.0%    2.000     5.0      1.08",
        "wait                    4     1.400   35.0%                       1.14",
        "activation              4     0.200    5.0%                       1.00",
        "",
        "forward:        1 x 1000.00 ms",
        "backward:       1 x 1000.00 ms",
        "2 threads, 2 shards; waiting or idle 35.0%, busiest thread 1.08 x the mean; spans cover 100.0%",
    ]
    assert view(trace, "--table", "--call", "1") == 0
    out = capsys.readouterr().out
    assert "gate_up                 2     1.100   55.0% " in out
    assert "forward" not in out
    assert view(trace, "--table", "--from", "1") == 2
    assert "--table is of whole calls" in capsys.readouterr().err


def test_the_trace_is_not_drawn_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, more in (("t.json", ["-o", str(tmp_path / "t.json")]), ("t.png", [])):
        noted(tmp_path / file, events())
        before = (tmp_path / file).read_bytes()
        assert view(tmp_path / file, *more) == 2
        assert "is the trace itself" in capsys.readouterr().err
        assert (tmp_path / file).read_bytes() == before


def test_what_lasts_no_time_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = noted(tmp_path / "t.json", [span("s", 0, 1e-321)])
    assert view(trace) == 2
    assert "no spans from 0 to" in capsys.readouterr().err


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    trace = noted(tmp_path / os.fsdecode(b"bad\xff.json"), events())
    assert view(trace) == 0


@pytest.mark.parametrize(
    ("other", "call", "message"),
    [
        ({"threads": None}, None, "does not say how many threads and shards there were"),
        ({"threads": -1}, None, "does not say how many threads and shards there were"),
        ({"threads": 1 << 40}, None, "does not say how many threads and shards there were"),
        ({"threads": 1}, None, "has a thread 1, but 1 threads"),
        ({}, 7, "does not say how long call 7 took"),
        (
            {"dropped_spans": 3, "dropped_calls": 1},
            None,
            "4 spans were dropped from the trace; the numbers above lack them",
        ),
    ],
)
def test_a_table_says_what_it_lacks(
    other: dict[str, Any], call: int | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = noted(tmp_path / "t.json", [*events(), span("gate_up", 5000, 10, call=7)], **other)
    assert view(trace, "--table", *([] if call is None else ["--call", str(call)])) == 0
    out = capsys.readouterr().out
    assert message in out
    assert ("no table" in out) == ("dropped" not in message)
    assert (tmp_path / "t.png").exists()


def test_a_table_of_a_list_of_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_text(json.dumps([span("a", 1, 1)]))
    assert view(tmp_path / "t.json", "--table") == 0
    assert "no table: " in capsys.readouterr().out


@pytest.mark.parametrize("shards", [1, 3])
def test_the_table_of_a_trace_is_that_of_its_profile(shards: int, tmp_path: Path) -> None:
    runtime = kt_moe.Runtime(threads=2, shards=shards)
    experts = kt_moe.Experts(*torch.randn(2, 4, 96, 64), torch.randn(4, 64, 96), runtime=runtime)
    x, ids = torch.randn(32, 64, requires_grad=True), torch.arange(64).reshape(32, 2) % 4
    with kt_moe.profile(tmp_path / "t.json", runtime) as p:
        kt_moe.moe(x, ids, torch.ones(32, 2), experts).sum().backward()  # type: ignore[no-untyped-call]
    trace = read_trace(tmp_path / "t.json")
    assert trace.recorded == (2, shards, 0)
    found = summary(trace.spans, trace.calls.values(), 2, shards)
    assert found.stages.keys() == p.stages.keys()
    rounding = 50e-9  # spans begin and end on nanoseconds in a file
    for stage, times in found.by_thread.items():
        for thread, time in enumerate(times):
            spans = [s for s in p.spans if (s.stage, s.thread) == (stage, thread)]
            assert time.spans == len(spans)
            assert time.seconds == pytest.approx(sum(s.own for s in spans), abs=rounding)
            work = [sum(s[-3:][i] for s in spans) for i in range(3)]
            assert [time.flops, time.bytes_local, time.bytes_remote] == work
    assert found.coverage == pytest.approx(p.coverage, rel=0.01)
    assert [calls for calls, _ in found.directions.values()] == [1, 1]
    assert found.seconds == pytest.approx(p.seconds, abs=rounding)


def test_the_innermost_span_has_the_time() -> None:
    spans = [
        TraceSpan("a", LANE, 0, 10, 0),
        TraceSpan("b", LANE, 2, 6, 0),
        TraceSpan("c", LANE, 3, 4, 0),
        TraceSpan("d", LANE, 12, 15, 0),
        TraceSpan("e", LANE, 14, 20, 0),  # a trace of another's making, not nested
    ]
    assert list(innermost(spans)) == [
        ("a", 0, 2), ("b", 2, 3), ("c", 3, 4), ("b", 4, 6), ("a", 6, 10), ("d", 12, 14), ("e", 14, 20),
    ]  # fmt: skip


def test_a_column_shows_what_took_most_of_it() -> None:
    spans = [TraceSpan("a", LANE, 0, 40, 0), *(TraceSpan("b", LANE, t, t + 3, 0) for t in range(10, 20, 5))]
    drawn = raster(spans, [LANE], ["a", "b"], Window(0, 60), 6)
    assert drawn.tolist() == [[0, 1, 0, 0, -1, -1]]
    assert raster(spans, [LANE], ["a", "b"], Window(10, 13), 3).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("\x00\xff", "not JSON"),
        ("{}", "no trace"),
        ("3", "no trace"),
        ('{"traceEvents": {}}', "no trace"),
        ("[]", "no spans"),
        ("[3]", "no event"),
        ('[{"ph": 3}]', "no event"),
        (json.dumps([span("a", float("nan"), 1)]), "ts is nan"),
        (json.dumps([span("a", float("inf"), 1)]), "ts is inf"),
        (json.dumps([span("a", 1, -1)]), "dur is -1"),
        (json.dumps([span("a", 1, 10**400)]), "dur is 1000"),
        (json.dumps([span("a", "1", 1)]), "ts is '1'"),  # type: ignore[arg-type]
        (json.dumps([span("a", True, 1)]), "ts is True"),
        (json.dumps([span("a", 1, 1, pid=1 << 70)]), "pid is"),
        (json.dumps([span("a", 1, 1, tid=[[[]]])]), "tid is a list"),  # type: ignore[arg-type]
        (json.dumps([span(3, 1, 1)]), "name is 3"),  # type: ignore[arg-type]
        (json.dumps([{"name": "a", "ph": "X"}]), "ts is missing"),
        (json.dumps([name("process", 7, 0)]), "args: name is 7"),
        (json.dumps([span("a", 1, 1, tid=t) for t in range(2000)]), "2,000 threads"),
        (json.dumps([span(f"{i}", 1, 1) for i in range(100)]), "100 names"),
        (json.dumps([span("a", 1, 0)]), "no spans from"),
    ],
)
def test_files_that_are_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    path.write_text(content, encoding="latin-1")
    assert view(path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 500
    assert not path.with_suffix(".png").exists()


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view(tmp_path / "t.json") == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_odd_names_and_deep_nests_are_drawn(tmp_path: Path) -> None:
    names = ["$x^$", "_a", "\x1b[31m", "é" * 10, "n" * 5000, "\\frac{", "%s{}", "", "$"]
    odd = [span(text, 10 * i, 5) for i, text in enumerate(names)]
    deep = [span("a", 200 + i / 100, 500 - i / 50) for i in range(20_000)]
    path = tmp_path / "t.json"
    path.write_text(
        json.dumps([name("process", "$$\\", 0), *odd, *deep, span("$", 1, 1, -5, -(1 << 60), call=0)])
    )
    assert view(path, "-o", tmp_path / "p.png") == 0
    assert view(path, "-o", tmp_path / "p.png", "--call", "0") == 0
