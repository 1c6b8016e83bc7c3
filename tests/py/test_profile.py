"""The profiler: what it records of a layer, its file, and where it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kt_moe

EXPERTS, HIDDEN, INTERMEDIATE, SLOTS, RANK = 8, 512, 384, 4, 8
PROJECTIONS = {"gate": (HIDDEN, INTERMEDIATE), "up": (HIDDEN, INTERMEDIATE), "down": (INTERMEDIATE, HIDDEN)}


class Layer:
    """A layer with LoRA and its inputs; calling it runs a forward and a backward."""

    def __init__(self, runtime: kt_moe.Runtime, tokens: int, format: str = "bf16") -> None:
        torch.manual_seed(0)
        gate_up = torch.randn(2, EXPERTS, INTERMEDIATE, HIDDEN, dtype=torch.bfloat16) * 0.05
        down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16) * 0.05
        self.experts = kt_moe.Experts(*gate_up, down, format=format, runtime=runtime)
        self.x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16).requires_grad_()
        self.ids = torch.stack([torch.randperm(EXPERTS)[:SLOTS] for _ in range(tokens)])
        self.weights = torch.rand(tokens, SLOTS).requires_grad_()
        self.lora: dict[str, Tensor] = {}
        for name, (width, height) in PROJECTIONS.items():
            self.lora[f"{name}_lora_a"] = torch.randn(EXPERTS, RANK, width).mul_(0.05).requires_grad_()
            self.lora[f"{name}_lora_b"] = torch.randn(EXPERTS, height, RANK).mul_(0.05).requires_grad_()

    def __call__(self) -> Tensor:
        out = kt_moe.moe(self.x, self.ids, self.weights, self.experts, self.lora)
        out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
        return out.detach()


@pytest.fixture(scope="module")
def runtime() -> kt_moe.Runtime:
    return kt_moe.Runtime(threads=2)


@pytest.fixture(scope="module")
def layer(runtime: kt_moe.Runtime) -> Layer:
    made = Layer(runtime, tokens=512)
    made()
    return made


@pytest.fixture(scope="module")
def recorded(layer: Layer, runtime: kt_moe.Runtime) -> kt_moe.Profile:
    """Three steps of the layer."""
    with kt_moe.profile(runtime=runtime) as p:
        for _ in range(3):
            layer()
    return p


def test_every_call_is_recorded(recorded: kt_moe.Profile, layer: Layer) -> None:
    assert [call.direction for call in recorded.calls] == ["forward", "backward"] * 3
    for before, call in zip([None, *recorded.calls], recorded.calls, strict=False):
        assert call.end > call.begin >= (before.end if before else 0.0)
        assert (call.tokens, call.routes, call.experts) == (512, 512 * SLOTS, EXPERTS)
        assert call.most_rows == layer.ids.flatten().bincount().max()


def test_spans_cover_the_calls(recorded: kt_moe.Profile) -> None:
    assert recorded.coverage >= 0.98
    assert max(call.coverage for call in recorded.calls) <= 1.0 + 1e-6
    own = sum(stage.seconds for stage in recorded.stages.values())
    assert own == pytest.approx(recorded.thread_seconds, rel=0.02)
    assert sum(stage.share for stage in recorded.stages.values()) == pytest.approx(1.0, abs=0.02)


def test_the_time_is_that_of_another_clock(layer: Layer, runtime: kt_moe.Runtime) -> None:
    outside = 0.0
    with kt_moe.profile(runtime=runtime) as p:
        for _ in range(5):
            begin = time.perf_counter()
            layer()
            outside += time.perf_counter() - begin
    assert 0.5 * outside < p.seconds < outside  # torch's part is small


def test_spans_of_a_thread_nest_and_lie_in_their_call(recorded: kt_moe.Profile) -> None:
    by_thread = defaultdict(list)
    for span in recorded.spans:
        by_thread[span.thread].append(span)
    assert set(by_thread) == {0, 1}
    for spans in by_thread.values():
        around: list[Any] = []
        inner = defaultdict[int, float](float)
        for i, span in enumerate(spans):
            call = recorded.calls[span.call]
            assert call.begin - 1e-6 <= span.begin <= span.end <= call.end + 1e-6
            while around and around[-1][1].end <= span.begin:
                around.pop()
            if around:
                assert span.end <= around[-1][1].end
                inner[around[-1][0]] += span.end - span.begin
            around.append((i, span))
        for i, span in enumerate(spans):
            assert span.own == pytest.approx(span.end - span.begin - inner[i], abs=1e-6)


def test_the_stages_of_both_directions_are_there(recorded: kt_moe.Profile) -> None:
    wanted = {
        "setup", "route", "dispatch", "lora_p", "gate_up", "activation", "pack_h", "down", "combine",
        "grad_down", "grad_activation", "grad_topk_weights", "pack_grad", "lora_q", "grad_hidden",
        "lora_grad",
    }  # fmt: skip
    assert wanted <= set(recorded.stages)
    assert "decode_weights" not in recorded.stages
    table = recorded.table()
    for stage in wanted:
        assert stage in table
    assert "forward:" in table
    assert "spans cover" in table


def test_products_are_counted(recorded: kt_moe.Profile) -> None:
    """FLOPs of the frozen weights' and LoRA's products, and weights read once a block of routes at most."""
    routes = 512 * SLOTS
    frozen = 2 * routes * HIDDEN * INTERMEDIATE
    low_rank = 2 * routes * RANK
    forward = [call for call in recorded.calls if call.direction == "forward"]
    a_and_b = 3 * low_rank * (HIDDEN + INTERMEDIATE)
    assert all(call.flops == 3 * frozen + a_and_b for call in forward)
    assert recorded.stages["gate_up"].tflops > 0
    weights = 3 * EXPERTS * HIDDEN * INTERMEDIATE * 2
    assert all(weights <= call.bytes_local + call.bytes_remote for call in recorded.calls)


def test_decoding_is_a_stage_of_its_own(runtime: kt_moe.Runtime) -> None:
    layer = Layer(runtime, tokens=256, format="int8")
    with kt_moe.profile(runtime=runtime) as p:
        layer()
    assert p.stages["decode_weights"].seconds > 0


@pytest.mark.parametrize("shards", [1, 3])
def test_results_do_not_change(shards: int) -> None:
    layer = Layer(kt_moe.Runtime(threads=2, shards=shards), tokens=64)
    before = layer()
    with kt_moe.profile(runtime=layer.experts.runtime) as p:
        assert torch.equal(layer(), before)
    assert {span.shard for span in p.spans} == set(range(shards))


def test_spans_beyond_the_limit_are_only_counted(
    layer: Layer, runtime: kt_moe.Runtime, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    with kt_moe.profile(path, runtime, max_spans=100) as p:
        layer()
    assert len(p.spans) == 100
    assert p.dropped == sum(stage.spans for stage in p.stages.values()) - 100
    assert p.coverage >= 0.9
    assert f"{p.dropped} spans" in p.table()
    assert json.loads(path.read_text())["otherData"]["dropped_spans"] == p.dropped


def test_nothing_was_computed(runtime: kt_moe.Runtime) -> None:
    with kt_moe.profile(runtime=runtime) as p:
        pass
    assert (p.calls, p.spans, p.stages, p.coverage, p.seconds) == ([], [], {}, 1.0, 0.0)
    assert "no calls of Runtime(threads=2" in p.table()


def test_the_file_is_a_trace(layer: Layer, runtime: kt_moe.Runtime, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with kt_moe.profile(path, runtime) as p:
        layer()
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    check_trace(path, p)


def check_trace(path: Path, p: kt_moe.Profile) -> None:
    """The rules of the Trace Event Format, and that the spans are the profile's."""
    trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        if event["ph"] != "M":
            assert event["ts"] >= 0
    names = {(e["name"], e["pid"], e["tid"]): e["args"].get("name") for e in events if e["ph"] == "M"}
    shards = p.runtime.shards
    assert [names["process_name", s, 0] for s in range(shards)] == [f"shard {s}" for s in range(shards)]
    complete = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in complete)
    lanes = {(e["pid"], e["tid"]) for e in complete if e["pid"] < shards}
    assert {(pid, tid) for name, pid, tid in names if name == "thread_name"} == lanes
    assert sum(e["pid"] < shards for e in complete) == len(p.spans)
    assert [e["name"] for e in complete if e["pid"] == shards] == [call.direction for call in p.calls]
    for lane in lanes:  # spans of a thread lie within each other or apart
        open_ends: list[float] = []
        for event in (e for e in complete if (e["pid"], e["tid"]) == lane):
            while open_ends and open_ends[-1] <= event["ts"] + 2e-3:
                open_ends.pop()
            assert not open_ends or event["ts"] + event["dur"] <= open_ends[-1] + 2e-3
            open_ends.append(event["ts"] + event["dur"])
    counters = [event["name"] for event in events if event["ph"] == "C"]
    assert set(counters) == {"rows per expert", "FLOPs", "bytes"}
    assert len(counters) == 2 * 3 * len(p.calls)


def test_the_file_is_written_when_the_block_raises(
    layer: Layer, runtime: kt_moe.Runtime, tmp_path: Path
) -> None:
    p = kt_moe.profile(tmp_path / "t.json", runtime)

    def compute_and_fail() -> None:
        with p:
            layer()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compute_and_fail()
    check_trace(tmp_path / "t.json", p)


def test_a_call_that_fails_is_recorded(layer: Layer, runtime: kt_moe.Runtime) -> None:
    wrong = layer.ids + EXPERTS
    with kt_moe.profile(runtime=runtime) as p:
        with pytest.raises(ValueError, match="topk_ids"), torch.no_grad():
            kt_moe.moe(layer.x, wrong, layer.weights, layer.experts, layer.lora)
        layer()
    assert p.calls[-1].direction == "backward"
    assert p.coverage > 0.9


def test_a_failed_write_leaves_nothing(runtime: kt_moe.Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match=r"t\.json"), kt_moe.profile(folder / "t.json", runtime):
        folder.rmdir()
    assert list(tmp_path.iterdir()) == []
    with kt_moe.profile(runtime=runtime):  # and the runtime has no profile any more
        pass


def test_one_profile_at_a_time(runtime: kt_moe.Runtime, tmp_path: Path) -> None:
    other = kt_moe.Runtime(threads=1)
    with kt_moe.profile(tmp_path / "first.json", runtime):
        with (
            pytest.raises(RuntimeError, match=r"Runtime\(threads=2.*first\.json"),
            kt_moe.profile(runtime=runtime),
        ):
            pass
        with kt_moe.profile(runtime=other):  # of another runtime
            pass
    with (
        kt_moe.profile(runtime=runtime) as p,
        pytest.raises(RuntimeError, match="with block has begun and ended"),
    ):
        p.table()
    with pytest.raises(RuntimeError, match="records once"), p:
        pass


def test_paths_are_checked_at_entry(runtime: kt_moe.Runtime, tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="no directory"),
        kt_moe.profile(tmp_path / "no" / "t", runtime),
    ):
        pytest.fail("entered")
    with pytest.raises(IsADirectoryError, match="is a directory"), kt_moe.profile(tmp_path, runtime):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="max_spans is 0"):
        kt_moe.profile(runtime=runtime, max_spans=0)
    with kt_moe.profile(runtime=runtime):  # a refusal leaves none behind
        pass


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of a machine with a GPU
def test_a_torch_profiler_sees_ranges(layer: Layer) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        layer()
    names = {event.key for event in p.key_averages()}
    assert {"kt_moe.forward", "kt_moe.backward"} <= names


def test_bytes_of_other_nodes() -> None:
    """docs/numa.md has the formulas: rows that are gathered, and the partial sums of out that are reduced."""
    T, H, inner, E, K, places = 96, 128, 192, 2, 1, 2
    runtime = kt_moe.Runtime(threads=2, shards=4, nodes=[0] * places)
    experts = kt_moe.Experts(
        torch.randn(E, inner, H), torch.randn(E, inner, H), torch.randn(E, H, inner), runtime=runtime
    )
    ids = torch.arange(T).remainder(E).unsqueeze(1)
    with kt_moe.profile(runtime=runtime) as p:
        kt_moe.moe(torch.randn(T, H, dtype=torch.bfloat16), ids, torch.ones(T, K), experts)
    stages = ("dispatch", "reduce")
    far = {stage: sum(s.bytes_remote for s in p.spans if s.stage == stage) for stage in stages}
    assert far["dispatch"] == 2 * T * K * H * (places - 1)  # x is the first node's
    # Tokens are shared out in runs of 64: one node reduces 64, the other 32; the result is the first node's.
    first = next(s for s in p.spans if s.stage == "combine" and s.shard == 0)
    assert first.thread == 0
    assert far["reduce"] in {4 * T * H + 2 * n * H for n in (32, 64)}
    assert {s.thread for s in p.spans if s.shard in (2, 3)} == {1}


def test_experts_at_home_read_far_what_others_have() -> None:
    T, H, inner, E, places = 96, 128, 192, 2, 2
    runtime = kt_moe.Runtime(threads=2, nodes=[0] * places)
    gate, up, down = torch.randn(E, inner, H), torch.randn(E, inner, H), torch.randn(E, H, inner)
    experts = kt_moe.Experts(gate, up, down, runtime=runtime, placement="expert")
    x, weights = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True), torch.ones(T, 1)
    for second in (0, 31, T):  # tokens of the expert that lives in the second place
        ids = (torch.arange(T) < second).long().unsqueeze(1)
        with kt_moe.profile(runtime=runtime) as p:
            kt_moe.moe(x, ids, weights, experts).float().sum().backward()
        far = {(s.call, s.stage): 0 for s in p.spans}
        for s in p.spans:
            far[s.call, s.stage] += s.bytes_remote
        assert far[0, "dispatch"] == far[1, "dispatch"] == 2 * second * H  # x and dY are the first place's
        assert far[0, "gate_up"] == far[1, "grad_down"] == 2 * 2 * second * inner  # G and U, as if they were
        assert far[0, "down"] == far[1, "grad_hidden"] == 0
        # The first 64 tokens are the first place's to add up, the other 32 the second's.
        near = min(second, 64), T - 64 - max(second - 64, 0)
        for call in (0, 1):
            assert far[call, "combine"] == 4 * H * sum(near) + 2 * H * 32


SCRIPT = """
import os, sys, torch, kt_moe
experts = kt_moe.Experts(*torch.randn(2, 2, 32, 64), torch.randn(2, 64, 32))
x, ids, weights = torch.randn(5, 64), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
kt_moe.moe(x, ids, weights, experts)
if os.fork() == 0:
    kt_moe.moe(x, ids, weights, experts)
    sys.exit()
os.wait()
assert not os.path.exists(os.environ["KT_MOE_PROFILE"]), "written by the child"
kt_moe.moe(x, ids, weights, experts)
"""


@pytest.fixture
def in_environment() -> Any:
    """Run the script with KT_MOE_PROFILE set to a path."""

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "KT_MOE_PROFILE": str(path)}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_the_environment_asks_for_a_profile(in_environment: Any, tmp_path: Path) -> None:
    done = in_environment(tmp_path / "trace.json")
    assert done.returncode == 0
    assert done.stderr.startswith(f"KT_MOE_PROFILE: {tmp_path / 'trace.json'}\nstage ")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"].count("forward") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_a_path_in_the_environment_that_cannot_be(in_environment: Any, tmp_path: Path) -> None:
    done = in_environment(tmp_path / "no" / "trace.json")
    assert done.returncode == 1
    assert "no directory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_is_no_ordinary_file_stays(kind: str, runtime: kt_moe.Runtime, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(OSError, match="no ordinary file"), kt_moe.profile(path, runtime):
        pytest.fail("entered")
    assert path.is_fifo() == (kind == "pipe")


def test_a_link_stays_and_what_it_leads_to_is_replaced(
    layer: Layer, runtime: kt_moe.Runtime, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "trace.json")
    with kt_moe.profile(tmp_path / "link", runtime):
        layer()
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_child_that_is_forked_while_a_thread_computes_and_a_profile_records() -> None:
    code = """if True:
        import os, threading, torch, kt_moe
        runtime = kt_moe.Runtime(threads=2)
        experts = kt_moe.Experts(*torch.randn(2, 2, 64, 64), torch.randn(2, 64, 64), runtime=runtime)
        x, ids, weights = torch.randn(64, 64), torch.zeros(64, 1, dtype=torch.long), torch.ones(64, 1)
        wanted, over = kt_moe.moe(x, ids, weights, experts), threading.Event()
        def work():
            while not over.is_set():
                kt_moe.moe(x, ids, weights, experts)
        with kt_moe.profile(runtime=runtime):
            thread = threading.Thread(target=work)
            thread.start()
            for _ in range(12):
                child = os.fork()
                if child == 0:
                    same = all(torch.equal(kt_moe.moe(x, ids, weights, experts), wanted) for _ in range(20))
                    with kt_moe.profile(runtime=runtime) as p:  # the parent's stays the parent's
                        kt_moe.moe(x, ids, weights, experts)
                    os._exit(0 if same and len(p.calls) == 1 else 1)
                status = os.waitpid(child, 0)[1]
                if status != 0:
                    print("child", status)
            over.set()
            thread.join()
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
