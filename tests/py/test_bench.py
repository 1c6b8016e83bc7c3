"""`kt-moe bench`: what it counts, runs, checks and writes. Nothing here looks at how long anything took."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from in_process import InProcess

import kt_moe
from kt_moe.cli import main
from kt_moe.cli.bench import cases, ceilings, contestants, options, remote, rivals, session
from kt_moe.cli.bench.cases import Case, Shape
from kt_moe.cli.bench.ceilings import ceilings_table
from kt_moe.cli.bench.contestants import SCALING, Stack
from kt_moe.cli.bench.inputs import make_inputs, make_weights
from kt_moe.cli.bench.remote import Remote, RemoteError
from kt_moe.cli.bench.report import results_table
from kt_moe.functional import LORA_NAMES

TINY = Shape("tiny", 64, 32, 6, 2)
SIZES = ["--hidden", "64", "--intermediate", "32", "--experts", "6", "--topk", "2"]
RUN = ["bench", *SIZES, "--threads", "1", "--reps", "1"]
PASSES = {"forward", "backward", "both"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SECONDS", 0.002)
    monkeypatch.setattr(session, "Remote", InProcess)


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_json_holds_every_case_and_agrees_with_float64(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    more = ["--tokens", "1,9", "--rank", "0,8", "--peers", "torch", "--format", "bf16,int4", "--recompute"]
    assert main([*RUN, *more, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {
        "schema", "date", "command", "machine", "load_average", "versions", "layer", "settings", "ceilings",
        "results", "notes", "ok",
    }  # fmt: skip
    assert finite(found)
    assert found["ok"]
    assert found["layer"] == {"name": "custom", "hidden": 64, "intermediate": 32, "experts": 6, "topk": 2}
    everyone = ("kt_moe bf16", "kt_moe int4", "torch")
    assert [(r["rank"], r["tokens"], r["who"]) for r in found["results"]] == [
        (rank, tokens, who) for rank in (0, 8) for tokens in (1, 9) for who in everyone
    ]
    for number, result in enumerate(found["results"]):
        wanted = {"out", "hidden_states", "topk_weights"}
        assert set(result["errors"]) == wanted | (set(LORA_NAMES) if result["rank"] else set())
        assert result["worst_error"] == max(result["errors"].values())
        assert all(error < (0.5 if "int4" in result["who"] else 0.05) for error in result["errors"].values())
        assert ("scratch_bytes" in result) == result["who"].startswith("kt_moe")
        for name in ("seconds", "flops", "bytes", "limit_seconds", "share_of_limit"):
            assert set(result[name]) == PASSES
        seconds = result["seconds"]["both"]
        assert seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert result["share_of_limit"]["both"] == result["limit_seconds"]["both"] / seconds["median"]
        assert result["flops_per_second"] == result["flops"]["both"] / seconds["median"]
        first = found["results"][number // 3 * 3]["seconds"]["both"]["median"]
        assert result["time_over_first"] == seconds["median"] / first
    (machine,) = found["ceilings"]
    rates = [f"{name}_{many}" for name in ("registers", "l1", "l2", "read") for many in ("one", "all")]
    assert all(machine[name]["count"] == 7 for name in rates)


def test_work_and_traffic_of_a_case() -> None:
    case = Case(Shape("s", 10, 4, 8, 2), tokens=3, rank=5)
    base, lora = 2 * 3 * 2 * 3 * 10 * 4, 2 * 3 * 2 * 5 * (3 * 10 + 3 * 4)
    assert case.flops() == {"forward": base + lora, "backward": base + 2 * lora, "both": 2 * base + 3 * lora}
    expert, pairs, states = 3 * 10 * 4 * 2, 5 * (3 * 10 + 3 * 4) * 4, 3 * 10 * 2
    forward, backward = 4 * (expert + pairs) + 2 * states, 4 * (expert + pairs) + 3 * states + 8 * pairs
    assert case.bytes(4) == {"forward": forward, "backward": backward, "both": forward + backward}
    assert replace(case, rank=0).bytes(4)["both"] == 2 * 4 * expert + 5 * states
    assert case.limited_to(1e12).tokens == 3
    assert case.limited_to(case.flops()["both"] * 2 / 3).tokens == 2
    assert replace(case, layers=2).limited_to(case.flops()["both"] * 2 / 3).tokens == 1
    assert case.limited_to(1).tokens == 1


def roof_of(**rates: float) -> ceilings.Ceilings:
    names = [f"{name}_{many}" for name in ("registers", "l1", "l2", "read") for many in ("one", "all")]
    return {name: cases.spread([rates.get(name, 1.0)]) for name in names}


def test_ceilings_that_moved_are_named() -> None:
    before = roof_of(l2_all=100.0, read_all=10.0)
    assert ceilings.drift(before, roof_of(l2_all=109.0, read_all=9.1)) == {}
    moved = ceilings.drift(before, roof_of(l2_all=50.0, read_all=12.0))
    assert moved == {"l2_all": 0.5, "read_all": 1.2}


def test_the_lower_roof_binds() -> None:
    case = Case(TINY, 4, 0)
    flops, moved = case.flops()["both"], case.bytes(3)["both"]
    name, limits = ceilings.bound(case, 3, roof_of(l2_all=flops / 10, read_all=moved / 2))
    assert (name, limits["both"]) == ("compute", pytest.approx(10))
    name, limits = ceilings.bound(case, 3, roof_of(l2_all=flops, read_all=moved / 20))
    assert (name, limits["both"]) == ("memory", pytest.approx(20))


def test_spread_is_median_and_quartiles() -> None:
    found = cases.spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"q1": 2, "median": 3, "q3": 4, "count": 5}
    assert cases.spread([7.0]) == {"q1": 7, "median": 7, "q3": 7, "count": 1}


def test_fewer_experts_are_said_to_be_fewer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "free_memory", lambda: 16 * TINY.expert_bytes)
    many = ["--format", "bf16,int4"]  # with the original and one being packed four copies: two experts each
    assert main([*RUN, *many, "--tokens", "2", "--rank", "0"]) == 0
    printed = capsys.readouterr().out
    assert "2 experts instead of 6" in printed
    assert "E 2, K 2" in printed
    assert main([*RUN, "--format", "bf16,int8,int4", "--tokens", "2"]) == 2
    assert (
        "a token needs 2 experts, and half of the 0.0 GiB of free memory holds 5 times no"
        in capsys.readouterr().err
    )


def test_few_tokens_take_other_experts_in_turn() -> None:
    shape = Shape("s", 1024, 1024, 64, 8)
    assert cases.variants_of(shape, 1, cache_bytes=20 * shape.expert_bytes) == 8  # all there are
    assert cases.variants_of(shape, 2, cache_bytes=5 * shape.expert_bytes) == 2  # enough for this cache
    assert cases.variants_of(shape, 100, cache_bytes=2**30) == 1
    inputs = make_inputs(Case(TINY, 2, 0, variants=3, layers=2))
    assert [len(layers) for layers in inputs.routes] == [2, 2, 2]
    assert len({tuple(ids.flatten().tolist()) for layers in inputs.routes for ids, _ in layers}) > 1


def test_inputs_are_the_same_everywhere_and_routes_are_distinct() -> None:
    case = Case(TINY, 50, 4)
    same, again = make_inputs(case), make_inputs(case)
    torch.testing.assert_close(tuple(again), tuple(same), rtol=0, atol=0)
    ((ids, weights),) = same.routes[0]
    assert all(len(set(row)) == TINY.topk for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert all(t.dtype is torch.float32 and torch.equal(t, t.bfloat16().float()) for t in same.lora.values())
    ((skewed, _),) = make_inputs(replace(case, tokens=500, routing="skewed")).routes[0]
    counts = torch.bincount(skewed.flatten(), minlength=TINY.experts)
    assert counts[0] > 3 * counts[-1]
    gate, up, _ = make_weights(TINY, 0)
    assert len({tuple(t.flatten()[:8].tolist()) for t in (*gate, *up)}) == 2 * TINY.experts


def truth_of(weights: Any) -> Stack:
    return Stack([rivals.loop_layer(weights)], lora_dtype=torch.float64, dtype=torch.float64)


def test_truth_is_the_tests_own_float64() -> None:
    case, weights = Case(TINY, 12, 8), make_weights(TINY, 1)
    inputs, truth = make_inputs(case), truth_of(weights)
    ids, route_weights = inputs.routes[0][0]
    problem = reference.Problem(
        weights,
        inputs.hidden_states,
        ids,
        route_weights,
        inputs.lora,
        (SCALING,) * 3,
        inputs.grad_out,
        "bench",
    )
    wanted = {n: t.detach().numpy() for n, t in reference.run(problem, torch.float64).items()}
    truth.prepare(case)
    assert set(truth.outputs()) == set(wanted)
    assert max(session.relative_errors(truth.outputs(), wanted).values()) < 1e-12


def job() -> argparse.Namespace:
    return argparse.Namespace(mode="layer", shape=TINY, threads=1, device="cpu", layers=1, tokens=[12])


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("name", ["torch", "grouped_mm"])
def test_rivals_compute_the_layer(name: str, rank: int) -> None:
    case, truth = Case(TINY, 12, rank), truth_of(make_weights(TINY, 0))
    rival = contestants.make(name, job())
    rival.prepare(case)
    truth.prepare(case)
    assert len(rival.turn(1, 0.0)) == 1
    assert len(rival.outputs()) == (9 if rank else 3)
    assert max(session.relative_errors(rival.outputs(), truth.outputs()).values()) < 0.05


def test_a_wrong_output_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kt_moe.moe
    monkeypatch.setattr(kt_moe, "moe", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert main([*RUN, "--tokens", "4", "--rank", "0"]) == 1
    assert "WRONG, kt_moe bf16, tokens 4, rank 0: an output is off" in capsys.readouterr().out


def test_one_output_that_is_not_finite_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kt_moe.moe

    def moe(x: Any, ids: Any, weights: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights.register_hook(lambda gradient: gradient * torch.nan)
        return right(x, ids, weights, *args, **kwargs)

    monkeypatch.setattr(kt_moe, "moe", moe)
    assert main([*RUN, "--tokens", "4", "--rank", "8", "--format", "int4"]) == 1
    printed = capsys.readouterr().out
    assert re.search("WRONG, kt_moe int4, tokens 4, rank 8: an output is off: .*'topk_weights': nan", printed)


def test_a_rivals_process_stands_still_between_calls() -> None:
    case = Case(TINY, 12, 8)
    with Remote(contestants.make, "torch", job()) as rival:
        rival.prepare(case)
        assert len(rival.turn(1, 0.0)) == 1
        assert set(rival.outputs()) == {"out", "hidden_states", "topk_weights", *LORA_NAMES}
        until = time.monotonic() + 30  # a signal takes effect soon, not at once
        while Path(f"/proc/{rival._process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < until
        with pytest.raises(RemoteError, match=r"AttributeError: .*'nothing'"):
            rival.nothing()
        with pytest.raises(RemoteError, match="its process ended or hangs"):
            rival.step(Unpickled(os._exit, 3))


@dataclass
class Unpickled:
    """Calls something in the process that unpickles it."""

    call: Any
    argument: float

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


def test_a_rivals_process_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Remote(Fraction, 1) as rival:
        assert rival.limit_denominator(5) == 1
        monkeypatch.setattr(remote, "_PATIENCE", 0.5)
        with pytest.raises(RemoteError, match="its process ended or hangs"):
            rival.limit_denominator(Unpickled(time.sleep, 600))


def test_a_rival_that_fails_is_left_out_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "kt_kernel" else real(n, *a))
    assert main([*RUN, "--tokens", "2", "--rank", "8", "--peers", "kt-kernel,torch"]) == 0
    printed = capsys.readouterr().out
    assert "note: kt-kernel is left out: ModuleNotFoundError: No module named 'kt_kernel'" in printed
    assert "; pip install kt-kernel==0.7.2" in printed
    assert len(re.findall("^ +2 +8  (kt_moe bf16|torch) ", printed, re.MULTILINE)) == 2


def test_a_case_that_a_rival_does_not_take_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Rival(Stack):
        def prepare(self, case: Case) -> None:
            if not case.rank:
                raise ValueError("no LoRA rank 0")
            super().prepare(case)

    def rival(weights: Any, threads: int, tokens: int) -> Stack:
        return Rival([rivals.loop_layer(weights)], lora_dtype=torch.bfloat16)

    monkeypatch.setattr(rivals, "KtKernel", rival)
    assert main([*RUN, "--tokens", "2", "--rank", "0,8", "--peers", "kt-kernel"]) == 0
    printed = capsys.readouterr().out
    assert "note: kt-kernel, tokens 2, rank 0 is left out: ValueError: no LoRA rank 0\n" in printed
    assert re.findall("^ +2 +(.)  kt-kernel ", printed, re.MULTILINE) == ["8"]


def test_one_run_with_everyone_in_a_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "Remote", Remote)
    assert main([*RUN, "--tokens", "2", "--rank", "8"]) == 0
    assert re.search("^ +2 +8  kt_moe bf16 ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers", "torch,nobody"], "--peers has nobody, wanted some of torch, grouped_mm, kt-kernel"),
        (["--format", "int5"], "--format has int5, wanted some of bf16"),
        (["--topk", "7"], "--topk is 7, more than the 6 experts there are"),
        (["--isa", "mmx"], "mmx"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: No such file"),
    ],
)
def test_options_that_cannot_be_met(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--tokens", "1", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", cases.PRESETS)
def test_presets_and_what_changes_them(name: str) -> None:
    def settings(*argv: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        options.add_arguments(parser)
        return options.read(parser.parse_args(argv))

    plain, quick = settings("--preset", name), settings("--preset", name, "--quick", "--tokens", "3")
    assert (plain.shape, plain.tokens, plain.reps) == (cases.PRESETS[name], [1, 8, 64, 1024], 7)
    assert (quick.shape.name, quick.tokens, quick.rank, quick.reps) == (name, [3], [0, 16], 3)
    assert quick.shape.experts == min(32, plain.shape.experts)
    assert settings("--preset", name, "--experts", "9").shape == replace(plain.shape, experts=9)
    assert settings("--preset", name, "--hidden", "64").shape.name == "custom"


def test_columns_that_no_result_has_are_left_out() -> None:
    both = {"median": 1.5, "q1": 1.25, "q3": 2.0}
    results = [
        {
            "who": "kt_moe bf16",
            "tokens": 8,
            "seconds": {"both": both},
            "cpu_rows": 0.25,
            "losses": [7.0, 6.0],
        },
        {"who": "cpu", "tokens": 16, "seconds": {"both": both}, "worst_error": None},
    ]
    assert results_table(results).splitlines() == [
        "tokens  who               ms       q1       q3  CPU rows  first loss",
        "     8  kt_moe bf16  1500.00  1250.00  2000.00       25%       7.000",
        "    16  cpu          1500.00  1250.00  2000.00         -           -",
    ]
    ceilings = ceilings_table(roof_of(read_one=30e9, read_all=60e9), 2).splitlines()
    assert ceilings[0].split("  ")[-1] == "all over one"
    assert ceilings[-1].split() == ["memory", "read,", "GB/s", "30.000", "60.000", "2.00x"]
