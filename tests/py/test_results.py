"""Large results lie in memory that earlier results gave back; nobody who holds a result may notice."""

from __future__ import annotations

import gc
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import Problem
from strategies import make_problem, run_ours
from torch import Tensor

import kt_moe
from kt_moe import tensors


@pytest.fixture
def recycle_all(monkeypatch) -> None:
    monkeypatch.setattr(tensors, "_RECYCLED", 1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(70, 96, 64, 6, 3, {"gate": 8, "up": 8, "down": 8})


def make_experts(problem: Problem) -> kt_moe.Experts:
    return kt_moe.Experts(*problem.weights, runtime=kt_moe.Runtime(threads=2))


def step(problem: Problem, experts: kt_moe.Experts) -> dict[str, Tensor]:
    return run_ours(problem, experts.runtime, experts=experts)


def storages(results: dict[str, Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in results.values()}


def test_large_results_are_recycled():
    runtime = kt_moe.Runtime(threads=1)
    first = tensors.empty((1 << 18,), torch.float32, runtime._core)
    place = first.data_ptr()
    first.fill_(7.0)
    del first
    again = tensors.empty((1 << 18,), torch.float32, runtime._core)
    assert again.data_ptr() == place
    assert (again == 7.0).all()
    assert not again.untyped_storage().resizable()


def test_small_results_are_torchs_own():
    runtime = kt_moe.Runtime(threads=1)
    assert tensors.empty((100,), torch.float32, runtime._core).untyped_storage().resizable()


def test_too_large_a_result_is_a_memory_error():
    runtime = kt_moe.Runtime(threads=1)
    with pytest.raises(MemoryError):
        tensors.empty((1 << 58,), torch.bfloat16, runtime._core)
    assert tensors.empty((1 << 18,), torch.float32, runtime._core).fill_(1.0).sum() == 1 << 18


@pytest.mark.usefixtures("recycle_all")
def test_results_that_are_held_are_nobody_elses(problem):
    experts = make_experts(problem)
    first = step(problem, experts)
    kept = {k: v.clone() for k, v in first.items()}
    others = [step(problem, experts) for _ in range(3)]
    assert not storages(first) & set().union(*map(storages, others))
    for other in others:
        for name, tensor in kept.items():
            assert torch.equal(first[name], tensor), name
            assert torch.equal(other[name], tensor), name


@pytest.mark.usefixtures("recycle_all")
def test_results_outlive_experts_and_runtime(problem):
    experts = make_experts(problem)
    results = step(problem, experts)
    kept = {k: v.clone() for k, v in results.items()}
    del experts
    gc.collect()
    for name, tensor in kept.items():
        assert torch.equal(results[name], tensor), name


@pytest.mark.usefixtures("recycle_all")
def test_a_result_is_an_ordinary_tensor(problem):
    experts = make_experts(problem)
    x = problem.hidden_states.clone().requires_grad_()
    out = kt_moe.moe(x, problem.topk_ids, problem.topk_weights, experts)
    assert out._base is None
    assert out.is_contiguous()
    truth = out.detach().clone()
    out.mul_(2)  # autograd lets no view of an unknown base change in place
    assert torch.equal(out.detach(), truth * 2)
    out.sum().backward()
    assert x.grad is not None
    buffer = io.BytesIO()
    torch.save(out.detach(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), truth * 2)
    assert torch.equal(out.detach().share_memory_(), truth * 2)


@pytest.mark.usefixtures("recycle_all")
def test_default_device_and_dtype_are_the_users(problem):
    experts = make_experts(problem)
    truth = step(problem, experts)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            result = tensors.empty((3, 5), torch.bfloat16, experts.runtime._core)
        results = step(problem, experts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.is_cpu
    assert (result.shape, result.dtype) == ((3, 5), torch.bfloat16)
    for name in truth:
        assert torch.equal(results[name], truth[name]), name


@pytest.mark.usefixtures("recycle_all")
def test_uninitialized_memory_is_filled_where_torch_does():
    runtime = kt_moe.Runtime(threads=1)
    tensors.empty((4096,), torch.float32, runtime._core).fill_(1.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert tensors.empty((4096,), torch.float32, runtime._core).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("recycle_all")
def test_threads_that_share_experts_share_no_result(problem):
    experts = make_experts(problem)
    truth = step(problem, experts)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: step(problem, experts), range(80)):
            for name in truth:
                assert torch.equal(results[name], truth[name]), name
