"""Experts with biases, from tensors and checkpoints, and gpt-oss models; test_layer.py has the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from reference import PROJECTIONS
from strategies import make_experts, make_problem, run_ours
from tiny_models import PEFT_WARNINGS, error, gradients, load, save_tiny_checkpoint, tokens, with_lora
from torch import Tensor

import kt_moe

pytestmark = PEFT_WARNINGS

PROBLEM = make_problem(9, 32, 40, 3, 2, {}, biased=PROJECTIONS, activation="gpt_oss")


def stored(layout: str) -> dict[str, Tensor]:
    """The problem's experts as a checkpoint of layer 0 has them."""
    root = "model.layers.0.mlp.experts"
    if layout == "fused":  # gate and up alternate, all transposed
        gate_up = torch.stack(PROBLEM.weights[:2], dim=2).flatten(1, 2)
        bias = torch.stack([b for b in PROBLEM.biases[:2] if b is not None], dim=2).flatten(1, 2)
        tensors = {
            "gate_up_proj": gate_up.mT,
            "gate_up_proj_bias": bias,
            "down_proj": PROBLEM.weights[2].mT,
            "down_proj_bias": PROBLEM.biases[2],
        }
        return {f"{root}.{name}": t.contiguous() for name, t in tensors.items() if t is not None}
    return {
        f"{root}.{e}.{p}_proj.{kind}": t[e].contiguous()
        for kind, stacks in (("weight", PROBLEM.weights), ("bias", PROBLEM.biases))
        for p, t in zip(PROJECTIONS, stacks, strict=True)
        if t is not None
        for e in range(3)
    }


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("how", ["memory", "packed", "paged", "int8"])
def test_biases_of_a_checkpoint(layout: str, how: str, tmp_path: Path) -> None:
    if layout == "fused" and how == "paged":
        pytest.skip("transposed weights are not what memory holds")
    safetensors.torch.save_file(stored(layout), tmp_path / "model.safetensors")
    options: dict[str, Any] = {
        "memory": {}, "packed": {"cache_dir": tmp_path / "packed"}, "paged": {"paged": True},
        "int8": {"format": "int8"},
    }[how]  # fmt: skip
    runtime = kt_moe.Runtime(threads=2)
    expected = run_ours(PROBLEM, runtime, experts=make_experts(PROBLEM, runtime))
    for _ in range(2):  # a packed layer is made, then found
        experts = kt_moe.Experts.from_checkpoint(
            tmp_path / "model.safetensors", 0, activation="gpt_oss", runtime=runtime, **options
        )
        ours = run_ours(PROBLEM, runtime, experts=experts)
        for name, value in expected.items():
            if how == "int8":
                assert error(ours[name], value) < 0.05, name
            else:
                assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_biases_are_rounded_to_bf16(dtype: torch.dtype) -> None:
    runtime = kt_moe.Runtime(threads=1)
    biases = {f"{p}_bias": b.to(dtype) * 1.0009 for p, b in zip(PROJECTIONS, PROBLEM.biases, strict=True)}
    rounded = {name: b.bfloat16() for name, b in biases.items()}
    first, second = (
        run_ours(
            PROBLEM,
            runtime,
            experts=kt_moe.Experts(*PROBLEM.weights, **b, activation="gpt_oss", runtime=runtime),
        )
        for b in (biases, rounded)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refused_biases() -> None:
    for name, bias, message in (
        ("gate_bias", torch.zeros(3, 32), r"gate_bias has shape \[3, 32\], wanted .*3, 40"),
        ("down_bias", torch.zeros(3, 40), r"down_bias has shape \[3, 40\], wanted .*3, 32"),
        ("up_bias", torch.zeros(3, 40, dtype=torch.int32), "up_bias"),
        ("up_bias", torch.zeros(40), "up_bias"),
    ):
        with pytest.raises(ValueError, match=message):
            kt_moe.Experts(*PROBLEM.weights, **{name: bias})
    with pytest.raises(TypeError, match="down_bias is a list"):
        kt_moe.Experts(*PROBLEM.weights, down_bias=[0.0])


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("swiglu_alpha", r"of GptOssExperts._apply_gate \(alpha 2.5, limit 7\)"),
        ("swiglu_limit", "gpt_oss with gate and up clamped to 2.5"),
    ],
)
def test_another_activation_is_refused(option: str, what: str, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, "gpt_oss", **{option: 2.5})
    with pytest.raises(ValueError, match=f"'gpt_oss' .*: it lacks the activation {what}"):
        load(tmp_path)


@pytest.mark.parametrize("targets", [["experts"], ["q_proj", "experts"], ["up_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("kt", [True, False], ids=["KtMoeConfig", "experts_implementation"])
def test_lora_trains_and_is_read_again(targets: list[str], kt: bool, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, "gpt_oss")
    base = load(tmp_path, kt=kt, **({} if kt else {"experts_implementation": "kt_moe"}))
    ours = with_lora(tmp_path, targets, base=base)
    out = ours(tokens(), labels=tokens())
    out.loss.backward()
    assert all(g is not None and g.any() for g in gradients(ours).values())
    ours.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path), tmp_path / "adapter")
    assert torch.equal(again(tokens()).logits, out.logits)
    kt_moe.merge_adapter(tmp_path, tmp_path / "adapter", tmp_path / "merged")
    plain = peft.PeftModel.from_pretrained(load(tmp_path, kt=False), tmp_path / "adapter")
    merged = load(tmp_path / "merged", kt=False)
    assert error(merged(tokens()).logits, plain(tokens()).logits) < 1e-5


def test_an_adapter_beside_the_experts_is_like_any_other(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, "gpt_oss")
    ours = with_lora(tmp_path, ["q_proj"])
    ours.save_pretrained(tmp_path / "adapter")  # a warning would be an error
