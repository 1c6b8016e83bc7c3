"""What the core's backward offers to those who write a part of the gradients themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Problem
from strategies import make_problem
from torch import Tensor

import kt_moe
from kt_moe import _core

IDLE = [1, 4]  # experts
NAMES = [f"{p}_lora_{m}" for p in ("gate", "up", "down") for m in "ab"]


def backward(
    problem: Problem, experts: kt_moe.Experts, dtype: torch.dtype, start: float, **options: Any
) -> dict[str, Tensor]:
    """LoRA gradients, written over tensors full of `start`."""
    lora = tuple(problem.lora[name] for name in NAMES)
    grads = {name: torch.full(problem.lora[name].shape, start, dtype=dtype) for name in NAMES}
    _core.backward(
        experts._core, problem.hidden_states, problem.topk_ids.contiguous(), problem.topk_weights, lora,
        problem.scaling, 0.0, 0, None, problem.grad_out, None, None,
        tuple(grads.values()), **options,
    )  # fmt: skip
    return grads


@pytest.fixture(params=[(1, "tensor"), (3, "tensor"), (3, "expert")])
def layer(request: pytest.FixtureRequest) -> tuple[Problem, kt_moe.Experts]:
    shards, placement = request.param
    problem = make_problem(40, 64, 96, 6, 2, {"gate": 4, "up": 8, "down": 3}, lora_dtype=torch.bfloat16)
    for expert in IDLE:
        problem.topk_ids[problem.topk_ids == expert] = 6
    runtime = kt_moe.Runtime(threads=2, shards=shards)
    return problem, kt_moe.Experts(*problem.weights, runtime=runtime, placement=placement)


def test_rows_of_idle_experts_are_left_alone_on_demand(layer: tuple[Problem, kt_moe.Experts]) -> None:
    cleared = backward(*layer, torch.float32, 7.0)
    kept = backward(*layer, torch.float32, 7.0, clear_idle=False)
    busy = [e for e in range(6) if e not in IDLE]
    for name in NAMES:
        assert not cleared[name][IDLE].any()
        assert (kept[name][IDLE] == 7).all()
        assert torch.equal(kept[name][busy], cleared[name][busy])
        assert cleared[name][busy].any()


def test_gradients_of_bf16_parameters_in_fp32(layer: tuple[Problem, kt_moe.Experts]) -> None:
    narrow, wide = (backward(*layer, dtype, float("nan")) for dtype in (torch.bfloat16, torch.float32))
    for name in NAMES:
        assert torch.equal(wide[name].bfloat16(), narrow[name])
        assert not torch.equal(wide[name].bfloat16().float(), wide[name])


def test_forward_wants_somewhere_to_write(layer):
    problem, experts = layer
    lora = tuple(problem.lora[name] for name in NAMES)
    with pytest.raises(ValueError, match="out is None, wanted a tensor"):
        _core.forward(
            experts._core, problem.hidden_states, problem.topk_ids.contiguous(), problem.topk_weights, lora,
            problem.scaling, 0.0, 0, None, None,
        )  # fmt: skip
