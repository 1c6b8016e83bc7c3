"""What is predicted of a step on CPU, link and GPU together, and `kt-moe plan` about it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import PEFT_WARNINGS, tiny_config
from user_errors import one_line_error

import kt_moe
from kt_moe.cli import main
from kt_moe.cli.plan import dry_run, speed
from kt_moe.cli.train import parse
from kt_moe.gpu.plan import cut, layer_costs
from kt_moe.gpu.predict import (
    CARDS,
    LINKS,
    REFERENCE,
    ROUTINGS,
    Workload,
    expected_routes,
    predict,
    reference_machine,
)

pytestmark = PEFT_WARNINGS

QWEN = Workload(
    layers=48, hidden=2048, intermediate=768, experts=128, topk=8, stored_bytes=3 * 2048 * 768 * 2,
    rank=48, tokens=8192,
)  # fmt: skip
ALL = QWEN.layers * QWEN.experts * QWEN.stored_bytes


@given(
    experts=st.integers(1, 300),
    topk=st.integers(1, 300),
    tokens=st.integers(1, 40_000),
    routing=st.sampled_from(ROUTINGS),
)
def test_routes(experts: int, topk: int, tokens: int, routing: str) -> None:
    work = replace(QWEN, experts=experts, topk=min(topk, experts), tokens=tokens)
    rows = expected_routes(work, routing)
    assert rows.sum() == tokens * work.topk
    assert rows.min() >= 0
    assert rows.max() <= tokens + 1
    if routing == "even":
        assert rows.max() - rows.min() <= 1
    else:
        assert (np.diff(rows) <= 1).all()


def test_skewed_routes_are_drawn_without_replacement() -> None:
    uniform = torch.rand(20_000, 128, generator=torch.Generator().manual_seed(0)).clamp(1e-9, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    ids = (-1.5 * torch.arange(1, 129).log() + gumbel).topk(8).indices
    drawn = torch.bincount(ids.flatten(), minlength=128).numpy()
    assert np.abs(expected_routes(replace(QWEN, tokens=20_000), "skewed") - drawn).sum() < 0.05 * drawn.sum()


def test_a_step_is_its_layers() -> None:
    found = predict(QWEN, REFERENCE, ALL // 4)
    costs = layer_costs(REFERENCE, 2048, 768, QWEN.stored_bytes, 48, 0.75, True, True)
    plan = cut(expected_routes(QWEN, "even"), costs)
    assert found.seconds == pytest.approx(48 * max(plan.seconds))
    assert (found.link, found.gpu, found.cpu) == pytest.approx([48 * s for s in plan.seconds])
    assert (found.gpu_experts, found.cpu_experts) == (len(plan.gpu), len(plan.cpu))
    assert found.gpu_rows + found.cpu_rows == 8192 * 8
    assert found.bytes_moved == pytest.approx(48 * len(plan.gpu) * 2 * 0.75 * QWEN.stored_bytes)
    assert found.tokens_per_second == pytest.approx(8192 / found.seconds)


def test_a_step_takes_no_longer_for_what_fits_beside_the_link() -> None:
    without, short, long = (
        predict(QWEN, replace(REFERENCE, rest_seconds=e), ALL // 4) for e in (0.0, 1e-3, 1.0)
    )
    assert without.seconds < short.seconds < without.seconds + 48 * 1e-3
    assert long.seconds == pytest.approx(48 * 1.0 + long.gpu)
    assert long.cpu == 0.0


def test_more_of_anything_is_no_slower() -> None:
    def speed(work: Workload = QWEN, rates: kt_moe.Rates = REFERENCE, memory: int = 8 << 30) -> float:
        return predict(work, rates, memory).tokens_per_second

    assert speed() < speed(memory=20 << 30) < speed(memory=ALL)
    assert speed() < speed(replace(QWEN, stored_bytes=QWEN.stored_bytes // 4))
    assert speed() > speed(replace(QWEN, recompute=True)) > 0.6 * speed()
    by_link = [speed(rates=reference_machine(link)) for link in LINKS]
    assert by_link == sorted(by_link)
    by_cpus = [speed(rates=reference_machine(cpus=cpus)) for cpus in (8, 16, 32, 64)]
    assert by_cpus == sorted(by_cpus)
    assert predict(QWEN, REFERENCE, ALL).bound == "GPU"
    assert predict(replace(QWEN, tokens=16384), REFERENCE, 8 << 30).bound == "link"
    assert predict(QWEN, REFERENCE, 8 << 30, cpu_share=1.0).bound == "CPU"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="is 100 bytes, wanted at least 9437184"):
        predict(QWEN, REFERENCE, 100)
    with pytest.raises(ValueError, match="routing is 'odd'"):
        predict(QWEN, REFERENCE, ALL, "odd")
    assert predict(QWEN, REFERENCE, 0, cpu_share=1.0).gpu_experts == 0


# kt-moe plan


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(tiny_config().to_json_string())
    return path


def plan(config: Path, *more: str) -> int:
    return main(["plan", str(config), "--no-measure", *more])


def test_a_plan_for_a_gpu_that_is_not_here(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--plan_gpu", "24GiB", "--rates", "link=1e9,cpu_flops=2e12,rest_seconds=0.004"]
    assert plan(config, "--gpu-memory", "36864B", *more) == 0
    text = capsys.readouterr().out
    assert "speed of the experts, predicted, with 36.00 KiB of them on the GPU" in text
    assert "  given: link=1e+09, cpu_flops=2e+12, rest_seconds=0.004\n" in text
    assert "  assumed, an H200 on PCIe 5 and 16 vCPUs with AMX: gpu_flops=3.3e+14, gpu_bytes=2.6e+12" in text
    assert "; loss and optimizer come on top" in text
    assert plan(config, "--plan_gpu", "24GiB") == 0
    text = capsys.readouterr().out
    assert "cpu_bytes=6.9e+10\n" in text  # and no rest, of which nothing is known
    assert "; attention and all else come on top" in text
    assert "\n  even " in text
    assert "\n  skewed " in text
    assert max(map(len, text.splitlines())) <= 160


def test_a_gpu_by_its_name(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured on an H200 is expected of others in proportion to their data sheets."""
    for card, link in (("h200", REFERENCE.link), ("rtx4090", LINKS["PCIe 4 x16"])):
        assert plan(config, "--plan_gpu", card, "--rates", "cpu_flops=1e12", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        rates = found["speed"]["rates"]
        assert found["gpu"]["available"] == CARDS[card][0] << 30
        assert (rates["link"], rates["cpu_flops"], rates["cpu_bytes"]) == (link, 1e12, REFERENCE.cpu_bytes)
        assert found["speed"]["sources"]["gpu_flops"] == f"expected of an {card} by its data sheet"
        if card == "h200":
            assert rates["gpu_flops"] == REFERENCE.gpu_flops
    assert rates["gpu_flops"] == pytest.approx(REFERENCE.gpu_flops * 165 / 989)


def test_a_plan_for_a_gpu_as_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--plan_gpu", "24GiB", "--rates", "link=1e9", "--json", "--format", "int8"]
    assert plan(config, *more, "--gradient-checkpointing") == 0
    found = json.loads(capsys.readouterr().out)["speed"]
    expert = 3 * 32 * 24 + 4 * (24 + 24 + 32)
    assert found["memory"] == 2 * 8 * expert  # all experts of both layers
    assert found["rates"]["link"] == 1e9
    assert found["sources"]["link"] == "given"
    assert [one["routing"] for one in found["predictions"]] == list(ROUTINGS)
    assert all(one["bytes_moved"] == 0 for one in found["predictions"])


def test_a_plan_without_a_gpu(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--gpu", "off"], ["--plan_gpu", "24GiB", "--cpu-share", "1"]):
        assert plan(config, *options, "--rates", "link=1e9,cpu_flops=1e12", "--json") == 0
        found = json.loads(capsys.readouterr().out)["speed"]
        assert found["memory"] == 0
        assert {one["gpu_experts"] for one in found["predictions"]} == {0}
    assert plan(config, "--rates", "link=1e9,cpu_flops=1e12") == 0
    text = capsys.readouterr().out
    assert "speed of the experts, predicted, on the CPU alone\n" in text
    assert "\n  given: cpu_flops=1e+12\n" in text
    assert re.search(r"\n  even +0 experts +8 experts .* CPU +[\d,.]+ tokens/s\n", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "lnk=3"], "unexpected keyword argument 'lnk'; wanted link=55e9 and the like"),
        (["--rates", "link=0"], "--experts_gpu_rates link=0: Rates: link is 0.0, wanted a positive number"),
        (["--rates", "link"], "--experts_gpu_rates link: "),
        (["--experts_gpu_rates", "link=nan"], "--experts_gpu_rates link=nan: Rates: link is nan"),
        (["--plan_gpu", "rtx9"], "--plan_gpu is 'rtx9', wanted a positive number of bytes"),
        (["--plan_gpu", "rtx9"], "; or one of rtx3090, rtx4090"),
        (
            ["--plan_gpu", "24GiB", "--gpu-memory", "10B"],
            "--experts_gpu_memory: the GPU memory for experts is 10 bytes, wanted",
        ),
    ],
)
def test_user_errors(
    config: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in one_line_error(capsys, "plan", lambda: plan(config, *options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_options_of_a_gpu_want_one(config: Path) -> None:
    for option in (["--gpu-memory", "6GiB"], ["--cpu-share", "1"]):
        with pytest.warns(UserWarning, match="is for a GPU, and PyTorch"):
            plan(config, *option)
        assert plan(config, "--plan_gpu", "24GiB", *option) == 0


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_rates_of_this_machine_are_measured(
    tmp_path: Path, model_type: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text(tiny_config(model_type).to_json_string())
    given = ["--batch-size", "1", "--seq-len", "16", "--threads", "1", "--format", "int4"]
    given += ["--experts_gpu_rates", "link=1e9"]
    options, measured = (
        parse("plan", ["--model", str(config), *given, "--json"]),
        speed.gpu_rates,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (8 << 30, 8 << 30))
    monkeypatch.setattr(speed, "gpu_rates", lambda experts, _: measured(experts, torch.device("cpu")))
    assert dry_run(options) == 0
    found = json.loads(capsys.readouterr().out)["speed"]
    sources = found["sources"]
    assert (sources.pop("link"), sources.pop("rest_seconds")[:7]) == ("given", "assumed")
    assert set(sources.values()) == {"measured"}
    assert found["memory"] > 0
