"""`kt-moe bench --grow`: what it varies, and what it writes. Nothing here looks at how long anything took."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import kt_moe
from kt_moe.cli import main
from kt_moe.cli.bench import ceilings, contestants, growth, options, report
from kt_moe.cli.bench.data import make_inputs, make_weights
from kt_moe.cli.bench.layer import Case, Shape

RUN = [
    "bench", "--quick", "--hidden", "64", "--intermediate", "32", "--experts", "16", "--topk", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SECONDS", 0.002)
    monkeypatch.setattr(growth, "_QUICK_SECONDS", 0.002)


def settings(*argv: str) -> options.Settings:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.read(parser.parse_args(argv))


def test_each_axis_varies_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    grow = ["--grow", "tokens,experts,rank,threads", "--tokens", "1,20", "--rank", "0,4", "--threads", "1,2"]
    assert main([*RUN, *grow, "--json", str(file), "--plot", str(picture)]) == 0
    found = json.loads(file.read_text())
    assert found["ok"]
    assert found["results"] == []
    points = [
        (p["axis"], p["value"], p["tokens"], p["experts"], p["rank"], p["threads"]) for p in found["growth"]
    ]
    all_threads = found["ceilings"][0]["threads"]
    assert points == [
        ("tokens", 1, 1, 16, 16, all_threads),
        ("tokens", 20, 20, 16, 16, all_threads),
        ("experts", 8, 256, 8, 16, all_threads),
        ("experts", 16, 256, 16, 16, all_threads),
        ("rank", 0, 256, 16, 0, all_threads),
        ("rank", 4, 256, 16, 4, all_threads),
        ("threads", 1, 256, 16, 16, 1),
        ("threads", 2, 256, 16, 16, 2),
    ]
    for point in found["growth"]:
        assert set(point["passes"]) == {"forward", "backward", "both"}
        assert min(point["scratch_bytes"].values()) > 0
    powers = [set(point["slope"].values()) == {None} for point in found["growth"]]
    assert powers == [
        True,
        False,
        True,
        False,
        True,
        True,
        True,
        False,
    ]  # none from the first, or from rank 0
    by_experts = [p["scratch_bytes"]["backward"] for p in found["growth"] if p["axis"] == "experts"]
    assert by_experts[1] <= 1.5 * by_experts[0]
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert "ceilings of 1 threads" in capsys.readouterr().out


def test_values_are_powers_of_two_up_to_what_there_is() -> None:
    grow = ("--grow", "tokens,experts,rank,threads")
    usual = settings(*grow)
    assert usual.grow["tokens"] == [2**n for n in range(15)]
    assert usual.grow["experts"] == [8, 16, 32, 64, 128, 256]
    assert usual.grow["rank"] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert usual.grow["threads"][-1] == kt_moe.cpu_info()["cpus"]
    assert (usual.tokens, usual.ranks, usual.shape.experts) == ([1024], [16], 128)
    given = settings(*grow, "--tokens", "64,2", "--rank", "8", "--experts", "40", "--threads", "1")
    assert given.grow["tokens"] == [2, 64]
    assert given.grow["experts"] == [8, 16, 32, 40]
    assert (given.tokens, given.ranks, given.threads, given.shape.experts) == ([1024], [8], [1], 40)
    assert list(settings("--grow", "rank").grow) == ["rank"]
    assert settings().grow == {}


def test_points_that_memory_cannot_hold_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shape = Shape("custom", 64, 32, 16, 2)
    monkeypatch.setattr("kt_moe.cli.bench.session.free_memory", lambda: 4 * 12 * shape.expert_bytes)
    enough = int(Case(replace(shape, experts=12), 256, 64).memory())
    monkeypatch.setattr("kt_moe.cli.bench.growth.free_memory", lambda: enough)
    file = tmp_path / "growth.json"
    assert (
        main([*RUN, "--grow", "experts,rank", "--threads", "1", "--rank", "0,1,64", "--json", str(file)]) == 0
    )
    found = json.loads(file.read_text())
    assert [(p["axis"], p["value"]) for p in found["growth"]] == [("experts", 8), ("rank", 0), ("rank", 1)]
    notes = "\n".join(found["notes"])
    assert "12 experts instead of 16" in notes
    assert "experts 16: more than memory holds" in notes
    assert "rank 64: needs 0.0 GiB beside the weights" in notes


def test_an_output_that_is_not_finite_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = contestants.KtMoe.compute

    def compute(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(self, x, *rest) * (float("nan") if len(x) == 3 else 1.0)

    monkeypatch.setattr(contestants.KtMoe, "compute", compute)
    assert main([*RUN, "--grow", "tokens", "--tokens", "2,3", "--threads", "1"]) == 1
    assert "WRONG, tokens 3: not finite: out" in capsys.readouterr().out


def test_slope_is_the_power_of_growth() -> None:
    def point(value: int, seconds: float) -> growth.Point:
        names = [field.name for field in fields(ceilings.Ceilings)]
        roof = ceilings.Ceilings(**{name: ceilings.Spread.of([1.0]) for name in names})
        case = Case(Shape("s", 8, 8, 4, 2), value, 0)
        result = report.Result.of(
            [(seconds, seconds)], case=case, who="kt_moe", threads=1, isa="scalar", touched=2, ceilings=roof
        )
        return growth.Point("tokens", value, result)

    assert growth.slope("forward", point(8, 3.0), point(2, 3.0)) == 0
    assert growth.slope("backward", point(8, 12.0), point(2, 3.0)) == pytest.approx(1)
    assert growth.slope("forward", point(8, 48.0), point(2, 3.0)) == pytest.approx(2)
    assert growth.slope("forward", point(8, 48.0), None) is None
    other = replace(point(4, 1.0), axis="rank")
    found = growth.to_dicts([point(1, 1.0), point(2, 2.0), other])
    assert [p["slope"]["forward"] for p in found] == [None, pytest.approx(1), None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers", "torch"], "--grow times kt_moe alone: leave out --peers"),
        (["--tokens", "1,2"], "--tokens has 2 values, but only what --grow names may vary"),
        (["--isa", "scalar,avx2"], "--isa has 2 values, but only what --grow names may vary"),
    ],
)
def test_options_that_do_not_go_with_growth(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--grow", "rank", *more]) == 2
    assert message in capsys.readouterr().err


def test_only_what_can_grow(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*RUN, "--grow", "tokens,hidden"])
    assert "has 'hidden', wanted some of tokens, experts, rank, threads" in capsys.readouterr().err


def test_scratch_bytes_are_those_of_the_last_call() -> None:
    shape = Shape("s", 64, 32, 6, 2)
    runtime = kt_moe.Runtime(threads=1)
    ours = contestants.KtMoe(make_weights(shape, 0), runtime, recompute=False)
    assert runtime.scratch_bytes == 0
    found = []
    for tokens in (400, 4, 400):
        ours.prepare(make_inputs(Case(shape, tokens, 8), 0))
        found.append(ours.scratch())
        assert runtime.scratch_bytes == found[-1]["backward"]
    assert found[0] == found[2]
    routes = 400 * 2
    assert found[0]["forward"] >= routes * 32 * 2  # h
    assert found[0]["backward"] >= 3 * routes * 32 * 2  # h, dG and dU
    assert found[1]["backward"] < found[0]["backward"]
