"""`kt-moe bench`: what it counts, runs, checks and writes. Nothing here looks at how long anything took."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

import kt_moe
from kt_moe.cli import bench, main
from kt_moe.cli.bench import cases, plain, session
from kt_moe.cli.bench.cases import Case, Shape, ceilings_table
from kt_moe.cli.bench.layers import SCALING, OneLayer, make_inputs, make_weights
from kt_moe.functional import LORA_NAMES

TINY = Shape(64, 32, 6, 2)
SIZES = ["--hidden", "64", "--intermediate", "32", "--experts", "6", "--topk", "2"]
RUN = ["bench", *SIZES, "--reps", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_CEILING", 0.002)
    monkeypatch.setattr(session, "_TURN", 0.0)


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_json_holds_every_case_and_agrees_with_float64(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    more = ["--tokens", "5,9", "--rank", "8", "--peers", "torch", "--format", "bf16,int4"]
    assert main([*RUN, *more, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {
        "date", "command", "machine", "gpu", "load_average", "versions", "isa", "threads", "layer",
        "settings", "ceilings", "results",
    }  # fmt: skip
    assert finite(found)
    assert found["layer"] == {"hidden": 64, "intermediate": 32, "experts": 6, "topk": 2}
    everyone = ("kt_moe bf16", "kt_moe int4", "torch")
    assert [(r["tokens"], r["who"]) for r in found["results"]] == [
        (t, who) for t in (5, 9) for who in everyone
    ]
    for result in found["results"]:
        assert set(result["errors"]) == {"out", "hidden_states", "topk_weights", *LORA_NAMES}
        assert result["worst_error"] == max(result["errors"].values())
        assert all(error < (0.5 if "int4" in result["who"] else 0.05) for error in result["errors"].values())
        assert set(result["seconds"]) == {"forward", "backward", "both"}
        seconds = result["seconds"]["both"]
        assert seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert result["share_of_limit"] == result["limit_seconds"] / seconds["median"]
    machine = found["ceilings"]
    rates = [f"{name}_{many}" for name in ("registers", "l1", "l2", "read") for many in ("one", "all")]
    assert all(machine[name]["count"] == 7 for name in rates)


def test_work_and_traffic_of_a_case() -> None:
    case = Case(Shape(10, 4, 8, 2), tokens=3, rank=5)
    base, lora = 2 * 3 * 2 * 3 * 10 * 4, 2 * 3 * 2 * 5 * (3 * 10 + 3 * 4)
    assert case.flops() == (base + lora) + (base + 2 * lora)
    expert, pairs, states = 3 * 10 * 4 * 2, 5 * (3 * 10 + 3 * 4) * 4, 3 * 10 * 2
    touched = 8 * (1 - (6 / 8) ** 3)
    assert case.bytes() == pytest.approx(2 * touched * (expert + pairs) + 5 * states + 8 * pairs)
    assert replace(case, rank=0).bytes() == pytest.approx(2 * touched * expert + 5 * states)


def test_experts_with_tokens_are_as_many_as_are_expected() -> None:
    case = Case(Shape(1, 1, 64, 4), tokens=20, rank=0)
    drawn = [torch.rand(20, 64).topk(4).indices.unique().numel() for _ in range(200)]
    assert case.touched == pytest.approx(sum(drawn) / 200, rel=0.03)


def roof_of(**rates: float) -> dict[str, cases.Spread]:
    names = [f"{name}_{many}" for name in ("registers", "l1", "l2", "read") for many in ("one", "all")]
    return {name: cases.spread([rates.get(name, 1.0)]) for name in names}


def test_the_lower_roof_binds() -> None:
    case = Case(TINY, 4, 0)
    flops, moved = case.flops(), case.bytes()
    found = case.limits(20, roof_of(l2_all=flops / 10, read_all=moved / 2))
    assert (found["bound"], found["limit_seconds"]) == ("compute", pytest.approx(10))
    found = case.limits(20, roof_of(l2_all=flops, read_all=moved / 20))
    assert (found["bound"], found["share_of_limit"]) == ("memory", pytest.approx(1))


def test_spread_is_median_and_quartiles() -> None:
    found = cases.spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"q1": 2, "median": 3, "q3": 4, "count": 5}
    assert cases.spread([7.0]) == {"q1": 7, "median": 7, "q3": 7, "count": 1}


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        ([], True),
        (["--peers", "torch"], False),
        (["--format", "bf16,int8"], False),
        (["--step", "--layers", "2"], False),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    more: list[str], fits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "free_memory", lambda: 3 * TINY.weight_bytes)  # two, and kt_moe's own
    assert main([*RUN, *more, "--tokens", "2"]) == (0 if fits else 2)
    assert ("are free: lower --experts" in capsys.readouterr().err) != fits


def test_few_tokens_take_other_experts_in_turn() -> None:
    shape = Shape(1024, 1024, 64, 8)
    assert [Case(shape, tokens, 0).variants for tokens in (1, 3, 100)] == [8, 2, 1]  # all there are
    assert Case(replace(shape, experts=256), 1, 0).variants == 16
    inputs = make_inputs(Case(TINY, 1, 0))
    assert len(inputs.routes) == 3
    assert len({tuple(ids.flatten().tolist()) for ids, _ in inputs.routes}) > 1


def test_inputs_are_the_same_everywhere_and_routes_are_distinct() -> None:
    case = Case(TINY, 50, 4)
    same, again = make_inputs(case), make_inputs(case)
    torch.testing.assert_close(tuple(again), tuple(same), rtol=0, atol=0)
    ((ids, weights),) = same.routes
    assert all(len(set(row)) == TINY.topk for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert all(t.dtype is torch.float32 and torch.equal(t, t.bfloat16().float()) for t in same.lora.values())
    gate, up, _ = make_weights(TINY, 0)
    assert len({tuple(t.flatten()[:8].tolist()) for t in (*gate, *up)}) == 2 * TINY.experts


def truth_of(weights: Any) -> OneLayer:
    return OneLayer(plain.loop_layer(weights), torch.float64, torch.float64)


def test_truth_is_the_tests_own_float64() -> None:
    case, weights = Case(TINY, 12, 8), make_weights(TINY, 1)
    inputs, truth = make_inputs(case), truth_of(weights)
    ids, route_weights = inputs.routes[0]
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
    return argparse.Namespace(step=False, shape=TINY, tokens=[12], device="cpu")


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("name", ["torch", "grouped_mm"])
def test_rivals_compute_the_layer(name: str, rank: int) -> None:
    case, truth = Case(TINY, 12, rank), truth_of(make_weights(TINY, 0))
    rival = session.make(name, job())
    rival.prepare(case)
    truth.prepare(case)
    assert len(rival.turn(0.0)) == 1
    assert len(rival.outputs()) == (9 if rank else 3)
    assert max(session.relative_errors(rival.outputs(), truth.outputs()).values()) < 0.05


def test_a_wrong_output_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, file = kt_moe.moe, tmp_path / "bench.json"

    def moe(x: Any, ids: Any, weights: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights.register_hook(lambda gradient: gradient * torch.nan)
        return right(x, ids, weights, *args, **kwargs) * 1.1

    monkeypatch.setattr(kt_moe, "moe", moe)
    assert main([*RUN, "--tokens", "4", "--rank", "8", "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert result["errors"]["out"] == pytest.approx(0.1, rel=0.1)
    assert math.isnan(result["errors"]["topk_weights"])
    assert math.isnan(result["worst_error"])


def test_a_contestant_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "others.py").write_text(
        "from kt_moe.cli.bench.layers import OneLayer\n"
        "def sums(settings):\n    return OneLayer(lambda x, ids, w, lora: x * w.sum())\n"
    )
    who = f"{tmp_path}/others.py:sums"
    assert main([*RUN, "--tokens", "2", "--rank", "0", "--peers", f"{who},torch"]) == 0
    assert re.search(f"^ +2  {re.escape(who)} ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers", "torch,nobody"], "--peers has nobody, wanted some of torch, grouped_mm"),
        (["--format", "int5"], "--format has int5, wanted some of bf16"),
        (["--topk", "7"], "--topk is 7, more than the 6 experts there are"),
        (["--json", "no/such/folder/x.json"], "No such file or directory: '"),
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
        bench.add_arguments(parser)
        found = parser.parse_args(argv)
        bench.check(found)
        return found

    layer, step = settings("--preset", name), settings("--preset", name, "--step", "--tokens", "3000,5")
    assert (layer.shape, layer.tokens, layer.layers) == (cases.PRESETS[name], [1, 8, 64, 1024], 48)
    assert (step.tokens, step.checkpoint_experts) == ([2048, 5], "recompute")  # whole rows
    assert settings("--preset", name, "--experts", "9").shape == replace(layer.shape, experts=9)


def test_each_line_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--tokens", "1,2", "--peers", "grouped_mm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.startswith("tokens  who"))
    rows = [line.split()[:2] for line in lines[head + 1 :]]
    assert rows == [["1", "kt_moe"], ["1", "grouped_mm"], ["2", "kt_moe"], ["2", "grouped_mm"]]
    assert len({len(line) for line in lines[head:]}) == 1


def test_ceilings_on_one_thread_and_on_all() -> None:
    shown = ceilings_table(roof_of(read_one=30e9, read_all=60e9), 2).splitlines()
    assert shown[0].split("  ")[-1] == "all over one"
    assert shown[-1].split() == ["memory", "read,", "GB/s", "30.000", "60.000", "2.00x"]
