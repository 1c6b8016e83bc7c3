"""What a profile records of the GPU engine, with CPU tensors in the GPU's place, and reports of passes."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import make_problem, run_ours
from test_layer import ALL

import kt_moe
from kt_moe.gpu import Gpu, spans
from kt_moe.gpu import streams as streams_module
from kt_moe.gpu.lanes import LayerPass, bound, steps
from kt_moe.gpu.pass_log import PassReport
from kt_moe.gpu.spans import LANES, Recorder
from kt_moe.gpu.streams import Streams

E, H, INNER = 8, 64, 48
EXPERT_BYTES = 3 * 2 * H * INNER
RATES = kt_moe.Rates(link=50e9, gpu_flops=1e13, gpu_bytes=1e12, cpu_flops=1e12, cpu_bytes=5e10)


@dataclass
class Model:
    """Layers that share a `Gpu`; a call is a forward and a backward through all of them."""

    gpu: Gpu
    runtime: kt_moe.Runtime
    problems: list[Any]
    experts: list[kt_moe.Experts]

    def __call__(self) -> None:
        y = self.problems[0].hidden_states.clone().requires_grad_()
        for problem, layer in zip(self.problems, self.experts, strict=True):
            lora = {name: tensor.clone().requires_grad_() for name, tensor in problem.lora.items()}
            y = y + kt_moe.moe(y, problem.topk_ids, problem.topk_weights, layer, lora)
        y.backward(self.problems[0].grad_out)


def make_model(layers: int = 2, share: float | str = 0.3, slots: int = 5) -> Model:
    gpu, runtime = Gpu("cpu", slots * EXPERT_BYTES, share, RATES), kt_moe.Runtime(2)
    problems = [make_problem(60, H, INNER, E, 2, ALL, seed=seed) for seed in range(layers)]
    experts = [kt_moe.Experts(*problem.weights, gpu=gpu, runtime=runtime) for problem in problems]
    return Model(gpu, runtime, problems, experts)


@pytest.fixture(scope="module")
def model() -> Model:
    made = make_model()
    made()
    return made


@pytest.fixture(scope="module")
def traced(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, kt_moe.Profile]:
    """Two steps, and their trace."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    with kt_moe.profile(path, model.runtime) as p:
        model()
        model()
    return path, p


@pytest.fixture(scope="module")
def recorded(traced: tuple[Path, kt_moe.Profile]) -> kt_moe.Profile:
    return traced[1]


def test_every_pass_is_recorded(recorded: kt_moe.Profile, model: Model) -> None:
    numbers = sorted({one.report.layer for one in recorded.passes})
    assert len(numbers) == 2
    order = [(numbers.index(one.report.layer), one.report.backward) for one in recorded.passes]
    assert order == [(0, False), (1, False), (1, True), (0, True)] * 2
    for one in recorded.passes:
        report = one.report
        problem = model.problems[numbers.index(report.layer)]
        routed = len(problem.topk_ids.unique())
        assert (report.gpu_experts + report.cpu_experts, report.gpu_rows + report.cpu_rows) == (routed, 120)
        assert 0 < report.cpu_rows < report.gpu_rows
        assert one.device == "cpu"
    for before, after in zip(recorded.passes, recorded.passes[1:], strict=False):
        assert before.begin < before.end <= after.begin


def test_bytes_that_crossed_are_those_of_the_link(recorded: kt_moe.Profile) -> None:
    link = [span for span in recorded.device_spans if span.lane == "link"]
    moved = sum(one.report.bytes_moved for one in recorded.passes)
    assert sum(span.bytes for span in link) == moved > 0
    assert all(span.bytes == span.experts * EXPERT_BYTES for span in link)
    assert {span.layer for span in link} == {one.report.layer for one in recorded.passes}


def test_lanes_hold_what_they_should(recorded: kt_moe.Profile) -> None:
    names: dict[str, set[str]] = {}
    for span in recorded.device_spans:
        assert span.begin <= span.end
        names.setdefault(span.lane, set()).add(span.name)
    assert names == {
        "link": {"copy_experts"},
        "GPU": {"forward_chunk", "backward_chunk"},
        "uplink": {"copy_in"},
        "downlink": {"copy_out", "copy_lora"},
        "CPU part": {"wait_rows", "cpu_forward", "cpu_backward"},
        "host": {"wait_routes", "wait_cpu", "stage_expert"},  # nothing is page-locked here
    }
    assert set(names) <= set(LANES)


def test_chunks_are_those_of_the_passes(recorded: kt_moe.Profile) -> None:
    chunks = [span for span in recorded.device_spans if span.lane == "GPU"]
    ranks = sum(problem_ranks())
    product, low_rank = 2 * H * INNER, 2 * ranks * (H + INNER)
    for one in recorded.passes:
        within = [c for c in chunks if one.begin <= c.begin and c.end <= one.end]
        assert sum(c.experts for c in within) == one.report.gpu_experts
        assert sum(c.rows for c in within) == one.report.gpu_rows
        assert {c.layer for c in within} == {one.report.layer}
        assert {c.name for c in within} == {"backward_chunk" if one.report.backward else "forward_chunk"}
        if not one.report.backward:
            assert sum(c.flops for c in within) == one.report.gpu_rows * (3 * product + low_rank)
        assert one.busy["GPU"] == pytest.approx(sum(c.end - c.begin for c in within))
        assert 0.0 < one.busy["CPU part"] <= one.end - one.begin


def problem_ranks() -> list[int]:
    problem = make_problem(60, H, INNER, E, 2, ALL)
    return [problem.lora[f"{name}_lora_a"].shape[1] for name in ("gate", "up", "down")]


def test_the_cores_calls_lie_in_the_cpu_part(recorded: kt_moe.Profile) -> None:
    """The core's clock and the engine's have one zero."""
    parts = [s for s in recorded.device_spans if s.name in ("cpu_forward", "cpu_backward")]
    parts.sort(key=lambda span: span.begin)
    assert len(parts) == len(recorded.calls) == 8
    for part, call in zip(parts, recorded.calls, strict=True):
        assert part.name == f"cpu_{call.direction}"
        assert part.begin - 1e-3 <= call.begin <= call.end <= part.end + 1e-3


def test_the_table_has_a_block_for_the_device(recorded: kt_moe.Profile) -> None:
    stages, device = recorded.table().split("\n\ncpu, ")
    assert "spans cover" in stages
    lines = device.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == ["link", "GPU", "uplink", "downlink", "CPU part"]
    assert lines[6].startswith("calling thread: ")
    assert len(lines) == 9
    for number, line in enumerate(lines[7:], 1):
        assert line.startswith(f"step {number}: 4 passes, ")
        assert "bound by " in line
    rows = sum(one.report.gpu_rows for one in recorded.passes[:4])
    assert f" experts, {rows} rows; CPU" in lines[7]


def test_the_trace_has_lanes_beside_the_threads(traced: tuple[Path, kt_moe.Profile]) -> None:
    path, p = traced
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"].get("name") for e in events if e["ph"] == "M"}
    pid = p.runtime.shards + 1
    assert names["process_name", pid, 0] == "GPU engine cpu"
    assert [names["thread_name", pid, tid] for tid in range(len(LANES))] == list(LANES)
    ours = [event for event in events if event["ph"] == "X" and event["pid"] == pid]
    assert len(ours) == len(p.device_spans) + len(p.passes)
    link = next(event for event in ours if event["name"] == "copy_experts")
    assert link["args"].keys() == {"layer", "experts", "bytes"}
    one = next(event for event in ours if event["tid"] == 0)
    assert one["args"]["gpu_rows"] == p.passes[0].report.gpu_rows
    found = lane_rows(p.table())
    assert found.keys() == set(LANES) - {"passes", "host"}
    for lane, (count, busy) in found.items():
        of_lane = [e for e in ours if e["tid"] == LANES.index(lane) and not e["name"].startswith("wait_")]
        assert count == len(of_lane)
        assert busy <= sum(e["dur"] for e in of_lane) / 1e6 + 2e-3


def lane_rows(table: str) -> dict[str, tuple[int, float]]:
    """Spans and busy seconds of each lane."""
    lines = table.partition("\n\ncpu, ")[2].partition("\ncalling thread")[0].splitlines()[1:]
    cells = {line[:16].strip(): line[16:].split() for line in lines}
    return {lane: (int(count), float(busy)) for lane, (count, busy, *_) in cells.items()}


def test_all_on_the_gpu(tmp_path: Path) -> None:
    model = make_model(1, 0.0)
    path = tmp_path / "t.json"
    with kt_moe.profile(path, model.runtime) as p:
        model()
    assert p.calls == []
    assert p.table().startswith("cpu, ")
    assert "CPU 0 experts, 0 rows" in p.table()


def test_all_on_the_cpu() -> None:
    model = make_model(1, 1.0)
    with kt_moe.profile(runtime=model.runtime) as p:
        model()
    assert [one.report.gpu_experts for one in p.passes] == [0, 0]
    assert {span.lane for span in p.device_spans} == {"uplink", "downlink", "CPU part", "host"}


def test_results_do_not_change_and_nothing_is_recorded_without_a_profile(model: Model) -> None:
    problem, experts = model.problems[0], model.experts[0]
    before = run_ours(problem, model.runtime, experts=experts)
    with kt_moe.profile(runtime=model.runtime) as p:
        during = run_ours(problem, model.runtime, experts=experts)
    kept = len(p.device_spans)
    after = run_ours(problem, model.runtime, experts=experts)
    assert len(p.device_spans) == kept
    engine = model.gpu.engine(torch.device("cpu"))
    assert engine is not None
    assert engine._streams.recorder is None
    for name, value in before.items():
        assert torch.equal(value, during[name])
        assert torch.equal(value, after[name])


def test_only_the_watched_runtime_is_recorded(model: Model) -> None:
    other = kt_moe.Runtime(1)
    with kt_moe.profile(runtime=other) as p:
        model()
    assert p.passes == []
    assert p.device_spans == []


def test_spans_beyond_the_limit_are_counted(model: Model) -> None:
    with kt_moe.profile(runtime=model.runtime, max_spans=7) as p:
        model()
    assert len(p.device_spans) + len(p.passes) == 7
    assert "spans of GPUs beyond max_spans were dropped" in p.table()


def test_a_pass_that_fails_leaves_no_span(model: Model) -> None:
    problem, experts = model.problems[0], model.experts[0]
    with kt_moe.profile(runtime=model.runtime) as p:
        with pytest.raises(ValueError, match="topk_ids"):
            kt_moe.moe(problem.hidden_states, problem.topk_ids + 20, problem.topk_weights, experts)
        model()
    assert len(p.passes) == 4


def test_threads_record_together(model: Model) -> None:
    with kt_moe.profile(runtime=model.runtime) as p:
        threads = [threading.Thread(target=model) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(p.passes) == 12
    assert all(one.end >= one.begin for one in p.passes)


def test_the_environment_s_profile_is_written_for_the_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_moe import profile_at_exit

    monkeypatch.setattr(profile_at_exit, "_until_exit", [])
    monkeypatch.setattr(profile_at_exit.atexit, "register", lambda *_: None)
    monkeypatch.setenv("KT_MOE_PROFILE", str(tmp_path / "t.json"))
    model = make_model(1, 0.0)
    monkeypatch.delenv("KT_MOE_PROFILE")
    model()
    profile_at_exit._write_at_exit(profile_at_exit.os.getpid())
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert any(event["name"] == "backward_chunk" for event in events)


# Reports


def test_a_report_has_a_line_for_the_last_pass_of_each_layer() -> None:
    model = make_model(2, "auto")
    assert model.gpu.report().startswith("no layer was computed with it yet")
    model()
    model()
    lines = model.gpu.report().splitlines()
    assert [line.split()[3] for line in lines] == ["forward", "forward", "backward", "backward"]
    assert all("predicted: link " in line for line in lines)
    model.gpu.cpu_share = 0.5
    model()
    assert "predicted" not in model.gpu.report()
    del model.experts[1]
    assert len(model.gpu.report().splitlines()) == 2


# Steps, and what binds them


def passes(*order: str) -> list[LayerPass]:
    """Of "F0", "B0" and so on."""
    found = []
    for number, name in enumerate(order):
        report = PassReport(int(name[1:]), name[0] == "B", 1, 0, 1, 0, 0, (0.0, 0.0, 0.0))
        busy = {"link": 0.0, "GPU": 0.0, "CPU part": 0.0}
        found.append(LayerPass("cpu", number, number + 1.0, report, busy))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "F0 F1 B1 B0 | F0 F1 B1 B0",
        "F0 B0 | F0 B0",
        "F0 F1 F1 B1 F0 B0 | F0 F1 F1 B1 F0 B0",  # gradient checkpointing
        "F0 F1 | F0 F1",  # evaluation
        "B1 B0 | F0 F1",  # the profile began in the middle
        "F0",
    ],
)
def test_steps(text: str) -> None:
    wanted = [part.split() for part in text.split(" | ")]
    found = steps(passes(*text.replace("| ", "").split()))
    names = [[("B" if p.report.backward else "F") + str(p.report.layer) for p in step] for step in found]
    assert names == wanted


def test_what_binds() -> None:
    assert bound({"link": 0.9, "GPU": 0.3, "CPU part": 0.8}, 1.0) == "link"
    assert bound({"link": 0.2, "GPU": 0.3, "CPU part": 0.1}, 1.0) is None


# The device's clock


class FakeDevice:
    """A device whose clock runs fast, and whose events are recorded at once."""

    rate = 1.0 + 5e-4

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self, stream: object = None) -> None:
            self.ns = time.perf_counter_ns() * FakeDevice.rate

        def synchronize(self) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: FakeDevice.Event) -> float:
            return float(torch.tensor((other.ns - self.ns) / 1e6, dtype=torch.float32))  # as CUDA returns it

    class Streams(Streams):
        def mark(self, name: str | None = None) -> Any:
            event = FakeDevice.Event(enable_timing=True)
            event.record()
            return event


def test_the_devices_clock_is_brought_to_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeDevice.Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(spans, "_MOST_EVENTS", 4)
    began = time.perf_counter_ns()
    streams = FakeDevice.Streams(torch.device("cuda", 0))
    streams.recorder = recorder = Recorder(streams, began, 1000)
    wanted = []
    for i in range(13):
        recorder.begin_pass(i)
        clock = [time.perf_counter_ns()]
        streams.note("link", "copy_experts", 10, i, 1)
        clock.append(time.perf_counter_ns())
        streams.note("link", "copy_experts", 10, i, 1)
        time.sleep(0.1)
        clock.append(time.perf_counter_ns())
        streams.record("link")
        clock.append(time.perf_counter_ns())
        wanted.append([(at - began) / 1e9 for at in clock])
    recorder.finish()
    found = recorder.spans()
    assert [(span.layer, span.experts, span.bytes) for span in found] == [(i, 2, 20) for i in range(13)]
    for span, (before, begun, ending, ended) in zip(found, wanted, strict=True):
        # By one comparison of the clocks it would be off by 6e-4 at the end.
        assert before - 2e-4 < span.begin < begun + 2e-4
        assert ending - 2e-4 < span.end < ended + 2e-4


def test_a_span_does_not_last_while_its_stream_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later:
        def __init__(self, done: bool) -> None:
            self.done = done

        def synchronize(self) -> None:
            pass

        def query(self) -> bool:
            return self.done

    streams = streams_module.Streams(torch.device("cpu"))
    streams.recorder = recorder = Recorder(streams, time.perf_counter_ns(), 1000)
    for done in (True, False):
        streams.wait(Later(done), "link")
        streams.note("link", "copy_experts", 1, 0, 1)
    streams.wait(Later(True), "link")
    streams.note("link", "copy_experts", 1, 0, 1)
    streams.record("link")
    recorder.finish()
    assert [span.experts for span in recorder.spans()] == [1, 2]


def test_a_fault_of_the_device_costs_its_spans_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(self: Recorder, wait: bool) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Recorder, "_resolve", fail)
    with kt_moe.profile(tmp_path / "t.json", model.runtime) as p:
        model()
    assert len(p.calls) == 4
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
