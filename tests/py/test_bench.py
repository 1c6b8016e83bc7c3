"""`kt-moe bench`: what it counts, runs, checks and writes. Nothing here looks at how long anything took."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from PIL import Image

from kt_moe.cli import main
from kt_moe.cli.bench import ceilings, contestants, layer, options, report, summary, truth
from kt_moe.cli.bench.data import Inputs, Weights, digest, make_inputs, make_weights
from kt_moe.cli.bench.layer import SCALING, Case, Shape
from kt_moe.cli.bench.peer_process import PeerError, PeerProcess
from kt_moe.cli.bench.peers import PEERS, Job
from kt_moe.cli.errors import UserError
from kt_moe.functional import LORA_NAMES

TINY = Shape("tiny", 64, 32, 6, 2)
SIZES = ["--hidden", "64", "--intermediate", "32", "--experts", "6", "--topk", "2"]
RUN = ["bench", *SIZES, "--threads", "1", "--reps", "1"]


@pytest.fixture(autouse=True)
def short_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SECONDS", 0.002)


def inputs_of(**changes: Any) -> tuple[Weights, Inputs]:
    case = replace(Case(TINY, 12, 8, lora_dtype="bf16"), **changes)
    return make_weights(TINY, 1), make_inputs(case, 1)


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_json_holds_every_case_and_agrees_with_float64(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert main([*RUN, "--tokens", "1,9", "--rank", "0,8", "--peers", "torch", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {
        "schema", "date", "command", "machine", "versions", "layer", "settings", "ceilings", "results",
        "comparisons", "lora_costs", "memory", "notes", "ok",
    }  # fmt: skip
    assert finite(found)
    assert found["ok"]
    assert found["layer"] == {"name": "custom", "hidden": 64, "intermediate": 32, "experts": 6, "topk": 2}
    assert [(r["who"], r["rank"], r["tokens"]) for r in found["results"]] == [
        (who, rank, tokens) for rank in (0, 8) for tokens in (1, 9) for who in ("kt_moe", "torch")
    ]
    for result in found["results"]:
        assert set(result["passes"]) == set(layer.PASSES)
        wanted = {"out", "hidden_states", "topk_weights"}
        assert set(result["errors"]) == wanted | (set(LORA_NAMES) if result["rank"] else set())
        assert all(error < 0.05 for error in result["errors"].values())
        assert set(result["scratch_bytes"]) == (
            {"forward", "backward"} if result["who"] == "kt_moe" else set()
        )
        assert all(count > 0 for count in result["scratch_bytes"].values())
        for figures in result["passes"].values():
            assert figures["bound"] in ("compute", "memory")
            assert figures["seconds"]["q1"] <= figures["seconds"]["median"] <= figures["seconds"]["q3"]
    (machine,) = found["ceilings"]
    rates = [f"{name}_{many}" for name in ("registers", "l1", "l2", "read") for many in ("one", "all")]
    assert all(machine[name]["count"] == 7 for name in rates)
    assert [c["who"] for c in found["comparisons"]] == ["torch"] * 4
    for compared, result in zip(found["comparisons"], found["results"][::2], strict=True):
        assert set(compared["its_time_over_ours"]) == set(layer.PASSES)
        assert set(compared["our_error_over_its"]) == set(result["errors"])
    assert [(c["who"], c["tokens"], c["rank"]) for c in found["lora_costs"]] == [
        (who, tokens, 8) for tokens in (1, 9) for who in ("kt_moe", "torch")
    ]
    assert found["memory"]["weight_ratio"] <= 1.02
    scratch = found["memory"]["scratch"]
    assert scratch["bytes"] == max(max(r["scratch_bytes"].values()) for r in found["results"][::2])
    assert scratch["fewer_experts"]["experts"] == 2


def test_a_picture_of_skewed_recomputed_bf16(tmp_path: Path) -> None:
    file, picture = tmp_path / "bench.json", tmp_path / "roof.png"
    more = ["--routing", "skewed", "--recompute", "--dtype", "bf16", "--isa", "scalar", "--threads", "1,2"]
    assert (
        main([*RUN, "--tokens", "5", "--rank", "3", *more, "--json", str(file), "--plot", str(picture)]) == 0
    )
    found = json.loads(file.read_text())
    assert [(r["isa"], r["threads"]) for r in found["results"]] == [("scalar", 1), ("scalar", 2)]
    assert found["settings"]["recompute"]
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_work_and_traffic_of_a_case() -> None:
    case = Case(Shape("s", 10, 4, 8, 2), tokens=3, rank=5)
    base, lora = 2 * 3 * 2 * 3 * 10 * 4, 2 * 3 * 2 * 5 * (3 * 10 + 3 * 4)
    assert case.flops() == {"forward": base + lora, "backward": base + 2 * lora, "both": 2 * base + 3 * lora}
    expert, pairs, states = 3 * 10 * 4 * 2, 5 * (3 * 10 + 3 * 4) * 4, 3 * 10 * 2
    forward, backward = 4 * (expert + pairs) + 2 * states, 4 * (expert + pairs) + 3 * states + 8 * pairs
    assert case.bytes(4) == {"forward": forward, "backward": backward, "both": forward + backward}
    assert replace(case, lora_dtype="bf16").bytes(4)["forward"] == forward - 4 * pairs / 2
    assert replace(case, rank=0).bytes(4)["both"] == 2 * 4 * expert + 5 * states
    assert case.limited_to(1e12).tokens == 3
    assert case.limited_to(case.flops()["both"] / 2).tokens == 1
    assert case.limited_to(1).tokens == 1


def roof_of(**rates: float) -> ceilings.Ceilings:
    names = [field.name for field in fields(ceilings.Ceilings)]
    return ceilings.Ceilings(**{name: ceilings.Spread.of([rates.get(name, 1.0)]) for name in names})


def test_ceilings_that_moved_are_named() -> None:
    before = roof_of(l2_all=100.0, read_all=10.0)
    assert before.drift(roof_of(l2_all=109.0, read_all=9.1)) == {}
    assert before.drift(roof_of(l2_all=50.0, read_all=12.0)) == {"A from L2": 0.5, "memory read": 1.2}


def test_the_lower_roof_binds() -> None:
    roof = roof_of(l2_all=100.0, read_all=10.0)
    assert roof.bound(flops=1000, moved=10) == ("compute", 10)
    assert roof.bound(flops=1000, moved=200) == ("memory", 20)


def result_of(who: str, rank: int, times: tuple[float, float], **errors: float) -> report.Result:
    rest = {"threads": 2, "isa": "scalar", "touched": 2, "ceilings": roof_of(), "errors": errors}
    return report.Result.of([times], case=Case(TINY, 4, rank), who=who, **rest)


def test_what_lora_costs_is_time_over_that_of_rank_0_of_the_same() -> None:
    results = [
        result_of(who, rank, (1.0 + rank, factor))
        for who, factor in (("kt_moe", 3.0), ("torch", 5.0))
        for rank in (0, 2)
    ]
    costs = summary.lora_costs([*results, replace(results[1], case=Case(TINY, 9, 2))])
    assert [(c["who"], c["rank"], c["time_over_rank_0"]) for c in costs] == [
        ("kt_moe", 2, {"forward": 3.0, "backward": 1.0, "both": 6 / 4}),
        ("torch", 2, {"forward": 3.0, "backward": 1.0, "both": 8 / 6}),
    ]
    assert "torch          tokens 4     rank 2   forward 3.00x" in summary.lora_lines(costs)


def test_errors_are_told_by_kind_of_output_and_where_they_are_worst() -> None:
    cases = [(0.001, 0.01, 0.004), (0.002, 0.01, 0.008)]
    ours = [result_of("kt_moe", 8, (1, 1), out=x, gate_lora_a=x, up_lora_b=b) for x, _, b in cases]
    theirs = [result_of("torch", 8, (2, 4), out=y, gate_lora_a=y, up_lora_b=y) for _, y, _ in cases]
    compared = [c for pair in zip(ours, theirs, strict=True) for c in summary.compare(pair[0], [pair[1]])]
    assert compared[0]["its_time_over_ours"] == {"forward": 2, "backward": 4, "both": 3}
    assert summary.error_lines([*ours, *theirs], compared).split("\n") == [
        "  kt_moe         out 2.0e-03, LoRA 8.0e-03",
        "  torch          out 1.0e-02, LoRA 1.0e-02",
        "  kt_moe over torch, in the case where it is worst: out 0.20, LoRA 0.80",
    ]


def test_spread_is_median_and_quartiles() -> None:
    spread = ceilings.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.q1, spread.median, spread.q3, spread.iqr, spread.count) == (2, 3, 4, 2, 5)
    assert ceilings.Spread.of([7.0]).iqr == 0


def test_experts_are_fitted_to_half_of_the_free_memory() -> None:
    shape = Shape("s", 1024, 512, 100, 4)
    assert layer.fit_experts(shape, 2, 400 * shape.expert_bytes) == shape
    assert layer.fit_experts(shape, 2, 80 * shape.expert_bytes).experts == 20
    with pytest.raises(UserError, match=r"4 experts of 3 MiB, held 2 times, need 0\.0 GiB of free memory"):
        layer.fit_experts(shape, 2, 15 * shape.expert_bytes)


def test_fewer_experts_are_said_to_be_fewer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("kt_moe.cli.bench.session.free_memory", lambda: 16 * TINY.expert_bytes)
    file = tmp_path / "bench.json"
    assert main([*RUN, "--tokens", "2", "--rank", "0", "--json", str(file)]) == 0
    assert "4 experts instead of 6" in capsys.readouterr().out
    assert json.loads(file.read_text())["layer"]["experts"] == 4


def test_few_tokens_take_other_experts_in_turn() -> None:
    shape = Shape("s", 1024, 1024, 64, 8)
    assert layer.variants_of(shape, 1, cache_bytes=20 * shape.expert_bytes) == 8  # all there are
    assert layer.variants_of(shape, 2, cache_bytes=5 * shape.expert_bytes) == 2  # enough for this cache
    assert layer.variants_of(shape, 100, cache_bytes=2**30) == 1
    inputs = make_inputs(Case(shape, 2, 0, variants=3), 0)
    assert len(inputs.topk_ids) == 3
    assert not torch.equal(inputs.topk_ids[0], inputs.topk_ids[1])


def test_inputs_follow_from_the_seed_and_routes_are_distinct() -> None:
    case = Case(TINY, 50, 4)
    same, again, other = make_inputs(case, 3), make_inputs(case, 3), make_inputs(case, 4)
    assert same.digest() == again.digest() != other.digest()
    assert digest(dict(enumerate_names(make_weights(TINY, 3)))) == digest(
        dict(enumerate_names(make_weights(TINY, 3)))
    )
    (ids,), (weights,) = same.topk_ids, same.topk_weights
    assert all(len(set(row)) == TINY.topk for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert all(t.dtype is torch.float32 and torch.equal(t, t.bfloat16().float()) for t in same.lora.values())
    skewed = make_inputs(replace(case, tokens=500, routing="skewed"), 3).topk_ids[0]
    counts = torch.bincount(skewed.flatten(), minlength=TINY.experts)
    assert counts[0] > 3 * counts[-1]


def enumerate_names(tensors: Weights) -> list[tuple[str, torch.Tensor]]:
    return [(str(index), tensor) for index, tensor in enumerate(tensors)]


def test_reference_is_the_tests_own_float64() -> None:
    weights, inputs = inputs_of()
    problem = reference.Problem(
        weights, inputs.hidden_states, inputs.topk_ids[0], inputs.topk_weights[0], inputs.lora,
        (SCALING,) * 3, inputs.grad_out, "bench",
    )  # fmt: skip
    wanted = dict(reference.run(problem, torch.float64).items())
    found = truth.reference(weights, inputs)
    assert set(found) == set(wanted)
    assert max(truth.relative_errors(found, wanted).values()) < 1e-12


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("rival", [contestants.TorchLoop, contestants.GroupedMm])
def test_torch_rivals_compute_the_layer(rival: Any, rank: int) -> None:
    weights, inputs = inputs_of(rank=rank)
    contestant = rival(weights)
    contestant.prepare(inputs)
    assert len(contestants.take_turn(contestant, 1, 0)) == 1
    outputs = contestant.outputs()
    assert len(outputs) == (9 if rank else 3)
    assert max(truth.relative_errors(outputs, truth.reference(weights, inputs)).values()) < 0.05


def test_a_wrong_output_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = contestants.KtMoe.compute
    monkeypatch.setattr(contestants.KtMoe, "compute", lambda *args: right(*args) * 1.1)
    assert main([*RUN, "--tokens", "4", "--rank", "0"]) == 1
    assert "WRONG, tokens 4, rank 0: an output is off" in capsys.readouterr().out


def test_an_output_that_was_not_written_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compute(self: Any, x: torch.Tensor, ids: Any, weights: torch.Tensor, lora: Any) -> torch.Tensor:
        return x * weights.sum() * 0 + torch.empty_like(x)

    monkeypatch.setattr(contestants.KtMoe, "compute", compute)
    assert main([*RUN, "--tokens", "4", "--rank", "0"]) == 1
    assert "4 tokens: not finite: out" in capsys.readouterr().out
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_rivals_process_stands_still_between_requests() -> None:
    job = Job("torch", TINY, 1, 1, "scalar", 12)
    inputs = make_inputs(Case(TINY, 12, 8), 1)
    with PeerProcess(job) as rival:
        rival.prepare(Case(TINY, 12, 8), inputs.digest())
        assert len(rival.take_turn(0)) == 1
        assert set(rival.outputs()) == {"out", "hidden_states", "topk_weights", *inputs.lora}
        until = time.monotonic() + 30  # a signal takes effect soon, not at once
        while state_of(rival._process.pid) != "T":
            assert time.monotonic() < until
        with pytest.raises(PeerError, match="other inputs"):
            rival.prepare(Case(TINY, 12, 8), [0])
        rival._process.kill()
        with pytest.raises(PeerError, match="its process ended: SIGKILL"):
            rival.take_turn(0)


def state_of(process: int) -> str:
    """As ps shows it: R, S, T, ..."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_what_a_rival_raises_is_its_answer() -> None:
    rival = PeerProcess(Job("nobody", TINY, 1, 1, "scalar", 12))
    with pytest.raises(PeerError, match="nobody"), rival:
        pass
    assert rival._process.returncode is not None


def test_a_missing_rival_is_left_out_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(PEERS, "kt-kernel", replace(PEERS["kt-kernel"], package="no_such_package"))
    monkeypatch.setattr(ceilings.Ceilings, "drift", lambda *_: {})  # a busy machine adds a note of its own
    file = tmp_path / "bench.json"
    assert main([*RUN, "--tokens", "2", "--rank", "0", "--peers", "kt-kernel", "--json", str(file)]) == 0
    wanted = "kt-kernel: not installed; try: pip install kt-kernel==0.7.2"
    assert wanted in capsys.readouterr().out
    assert json.loads(file.read_text())["notes"] == [wanted]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers", "torch,nobody"], "--peers has nobody, wanted some of torch, grouped_mm, kt-kernel"),
        (["--topk", "7"], "--topk is 7, more than the 6 experts there are"),
        (["--isa", "mmx"], "mmx"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: no file can be written there"),
    ],
)
def test_options_that_cannot_be_met(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--tokens", "1", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", "8,0"], "argument --tokens: is '0', wanted a whole number from 1"),
        (["--rank", "-1"], "argument --rank: "),
        (["--preset", "gpt-2"], "invalid choice: 'gpt-2'"),
        (["--routing", "none"], "invalid choice: 'none'"),
    ],
)
def test_malformed_options(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *more])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_plot_without_matplotlib_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else real(n, *a))
    assert main([*RUN, "--plot", str(tmp_path / "roof.png")]) == 2
    assert "--plot needs matplotlib: pip install 'kt_moe[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", layer.PRESETS)
def test_presets_and_what_changes_them(name: str) -> None:
    def settings(*argv: str) -> options.Settings:
        parser = options.argparse.ArgumentParser()
        options.add_arguments(parser)
        return options.read(parser.parse_args(argv))

    plain, quick = settings("--preset", name), settings("--preset", name, "--quick", "--tokens", "3")
    assert plain.shape == layer.PRESETS[name]
    assert (quick.shape.name, quick.tokens, quick.ranks) == (name, [3], [0, 16])
    assert quick.shape.experts == min(32, plain.shape.experts)
    assert settings("--preset", name, "--experts", "9").shape == replace(plain.shape, experts=9)
    assert settings("--preset", name, "--hidden", "64").shape.name == "custom"


def test_columns_are_aligned() -> None:
    roof = roof_of(registers_all=2.0e15, l2_all=2.0e15, read_all=6.0e12)
    result = report.Result.of(
        [(1.23, 20.1), (1.19, 20.2)], case=Case(layer.PRESETS["kimi-k2"], 16384, 256), who="grouped_mm",
        threads=2, isa="avx2", touched=384, ceilings=roof, scratch={"forward": 5 * 2**20, "backward": 2**33},
    )  # fmt: skip
    header, *rows = [report.header(), *report.rows(result).splitlines()]
    assert len(rows) == 3
    for name in ("who", "pass", "bound"):
        start = header.index(name)
        assert all(row[start - 1] == " " and row[start] != " " for row in rows)
    for name in ("ms", "tokens/s", "share", "scratch"):
        end = header.index(name) + len(name)
        assert all(row[end - 1] != " " and (len(row) == end or row[end] == " ") for row in rows)
