"""`kt-moe trace-view`: what it draws, and files it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kt_moe.cli import main
from kt_moe.cli.trace import TraceSpan, Window, innermost, read_trace
from kt_moe.cli.trace_plot import raster, stage_colors

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
