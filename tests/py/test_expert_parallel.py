"""Experts divided over processes of a gloo group compute what one process does on all their tokens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import expert_parallel_ranks as ranks
import pytest
import torch
from reference import LORA_NAMES
from torch import Tensor

import kt_moe
from kt_moe.expert_parallel import ExpertParallel, local_experts
from kt_moe.token_exchange import ROWS, Routes, chunk_count, partition

HERE = Path(__file__).parent
WORLDS = (2, 3, 4)
pytestmark = pytest.mark.timeout(300)


def run(
    part: str, world: int, directory: Path, codes: list[int] | None = None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """What each rank found; those that end with another code than 0 are left out."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, *sys.path)))}
    command = [sys.executable, "-W", "ignore", str(HERE / "expert_parallel_ranks.py"), part]
    running = [
        subprocess.Popen([*command, str(rank), str(world), str(directory), device], env=environment)
        for rank in range(world)
    ]
    try:
        found = [process.wait(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    assert found == (codes or [0] * world)
    return [torch.load(directory / f"{part}-{r}.pt") for r, code in enumerate(found) if code == 0]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    world = request.param
    return world, run("results", world, tmp_path_factory.mktemp(f"ranks{world}"))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of all elements; 0 of two empty tensors."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    difference = (found.double() - wanted.double()).norm()
    return 0.0 if difference == 0 else float(difference / wanted.double().norm())


def alone(world: int, routing: str, dtype: torch.dtype, chunks: int = 1) -> dict[str, Tensor]:
    """One process with all experts and the tokens of all ranks, a call for each chunk of these."""
    problem = ranks.problem_of(world, routing)
    leaves = {name: ranks.leaf(tensor) for name, tensor in problem.leaves().items()}
    leaves["hidden_states"] = ranks.leaf(problem.hidden_states, dtype)
    experts = ranks.experts_of(problem, range(ranks.EXPERTS[world]))
    lora = {name: leaves[name] for name in LORA_NAMES}
    x, weights = leaves["hidden_states"], leaves["topk_weights"]
    of_ranks = torch.arange(len(x)).split(ranks.TOKENS[world])
    out = torch.empty_like(x)
    for chunk in range(chunks):
        at = torch.cat([t[len(t) * chunk // chunks : len(t) * (chunk + 1) // chunks] for t in of_ranks])
        ids, of_chunk = problem.topk_ids[at], weights[at]
        part = kt_moe.moe(x[at], ids, of_chunk, experts, lora, scaling=problem.scaling)
        out = out.index_copy(0, at, part)
    return ranks.gradients(out, problem.grad_out, leaves)


def together(found: list[dict[str, Any]], case: str) -> dict[str, Tensor]:
    """What all ranks found: their tokens one after the other, and so their experts."""
    names = {name for one in found for name in one[case]}
    return {name: torch.cat([one[case][name] for one in found if name in one[case]]) for name in names}


@pytest.mark.parametrize("routing", ranks.ROUTINGS)
@pytest.mark.parametrize("dtype", ranks.DTYPES)
def test_equals_one_process(results: Any, routing: str, dtype: str) -> None:
    world, found = results
    wanted = alone(world, routing, ranks.DTYPES[dtype])
    got = together(found, f"{routing} {dtype}")
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        # The parts of a token are added in another order, which bf16 may round to the number beside.
        most = 1e-3 if tensor.dtype is torch.bfloat16 else 1e-5
        assert error(tensor, wanted[name]) < most, name
        if name in LORA_NAMES:  # rows arrive in the order that one process has them
            assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("dtype", ranks.DTYPES)
def test_chunks_equal_as_many_calls_of_one_process(results: Any, chunks: int, dtype: str) -> None:
    world, found = results
    wanted = alone(world, "random", ranks.DTYPES[dtype], chunks)
    got = together(found, f"{chunks} chunks {dtype}")
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        most = 1e-3 if tensor.dtype is torch.bfloat16 else 1e-5
        assert error(tensor, wanted[name]) < most, name
        if name in LORA_NAMES:
            assert torch.equal(tensor, wanted[name]), name
    if dtype == "fp32":
        for case in ("only lora", *(f"checkpoint {re} {choice}" for re, choice in ranks.CHECKPOINTS)):
            again = together(found, f"{chunks} chunks {case}")
            assert again.keys() >= {"out", *LORA_NAMES}
            assert all(torch.equal(tensor, got[name]) for name, tensor in again.items()), case
        whole = together(found, "random fp32")
        assert not all(torch.equal(tensor, whole[name]) for name, tensor in got.items())


def test_parts_by_load(results: Any) -> None:
    world, found = results
    assert [one["parts"]["by load"] for one in found] != [one["parts"]["equal"] for one in found]
    wanted, got = alone(world, "random", torch.float32), together(found, "by load")
    assert got.keys() == wanted.keys()
    assert all(error(tensor, wanted[name]) < 1e-5 for name, tensor in got.items())
    assert all(torch.equal(got[name], wanted[name]) for name in LORA_NAMES)


def test_is_bitwise_the_same_again(results: Any) -> None:
    _, found = results
    for one in found:
        assert one["again"].keys() == one["random fp32"].keys()
        assert all(torch.equal(t, one["random fp32"][name]) for name, t in one["again"].items())


def test_gradients_of_lora_are_means_over_ranks(results: Any) -> None:
    world, found = results
    for one in found:
        for name, tensor in one["average"].items():
            factor = world if name in LORA_NAMES else 1
            assert error(tensor * factor, one["random fp32"][name]) < 1e-6, name


@pytest.mark.parametrize(("reentrant", "choice"), ranks.CHECKPOINTS)
def test_gradient_checkpointing(results: Any, reentrant: bool, choice: str) -> None:
    _, found = results
    wanted = together(found, "random fp32")
    got = together(found, f"checkpoint {reentrant} {choice}")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())


def test_dropout(results: Any) -> None:
    _, found = results
    got, again = together(found, "dropout"), together(found, "dropout checkpoint")
    assert all(torch.equal(tensor, again[name]) for name, tensor in got.items())
    assert error(got["out"], together(found, "random fp32")["out"]) > 1e-2


def test_gradients_where_they_are_wanted(results: Any) -> None:
    _, found = results
    wanted = together(found, "random fp32")
    assert torch.equal(together(found, "no_grad")["out"], wanted["out"])
    twice = together(found, "two calls")
    assert all(error(tensor, 2 * wanted[name]) < 1e-6 for name, tensor in twice.items())
    only = together(found, "only lora")
    assert only.keys() == {"out", *LORA_NAMES}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in only.items())
    first, *others = (one["only tokens of rank 0"] for one in found)
    assert torch.equal(first["hidden_states"], found[0]["random fp32"]["hidden_states"])
    assert all(one.keys() == {"out"} for one in others)


@pytest.mark.parametrize("wrapper", ranks.WRAPPERS)
def test_twenty_steps(results: Any, wrapper: str) -> None:
    world, found = results
    router = wrapper != "frozen router"
    problem = ranks.problem_of(world)
    whole = range(ranks.EXPERTS[world])
    experts = ranks.experts_of(problem, whole)

    def layer(x: Tensor, ids: Tensor, weights: Tensor, lora: Any, **options: Any) -> Tensor:
        return kt_moe.moe(x, ids, weights, experts, lora, **options)

    block = ranks.Block(problem, whole, layer, router)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    optimizer = ranks.optimizer_of(block)
    # A wrapper adds up gradients of the router in another order. That moves a number of the layer across a
    # boundary of rounding to bf16 now and then, from which on the runs are no longer equal.
    most = 1e-3 if router else 1e-5
    for step in range(ranks.STEPS):
        optimizer.zero_grad()
        out = block(problem.hidden_states.float())
        tokens = [ranks.tokens_of(world, rank) for rank in range(world)]
        losses = [ranks.loss_of(out[of_rank], problem, of_rank) for of_rank in tokens]
        sum(losses).backward()
        for p in block.parameters():
            if p.requires_grad:  # divided before, it would be rounded to other numbers in bf16
                p.grad *= 1 / world
        optimizer.step()
        for one, loss in zip(found, losses, strict=True):
            assert one[wrapper]["losses"][step].item() == pytest.approx(loss.item(), rel=most)
    found = [one[wrapper] for one in found]
    of_ranks, clipped = together(found, "parameters"), together(found, "clipped")
    norm = torch.nn.utils.clip_grad_norm_(block.parameters(), ranks.MAX_NORM)  # of the last step
    assert norm > ranks.MAX_NORM
    for one in found:
        assert one["norm"].item() == pytest.approx(norm.item(), rel=most)
    for name, p in block.named_parameters():
        if name.startswith("router"):
            assert all(error(one["parameters"][name], p.detach()) < most for one in found), name
            continue
        assert error(p.detach(), before[name]) > 1e-2, name
        assert error(of_ranks[name], p.detach()) < most, name
        assert error(clipped[name], p.grad) < 10 * most, name
    first, *others = (one["gathered"] for one in found)
    assert others == [None] * (world - 1)
    assert first.keys() == set(LORA_NAMES)
    assert all(torch.equal(t, of_ranks[f"lora.{name}"]) for name, t in first.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus(tmp_path: Path) -> None:
    found = run("results", 2, tmp_path, device="cuda")
    for routing in ranks.ROUTINGS:
        for dtype in ranks.DTYPES:
            wanted, got = alone(2, routing, ranks.DTYPES[dtype]), together(found, f"{routing} {dtype}")
            assert got.keys() == wanted.keys()
            assert all(error(tensor, wanted[name]) < 1e-2 for name, tensor in got.items())
    wanted = together(found, "random fp32")
    for reentrant, choice in ranks.CHECKPOINTS:
        got = together(found, f"checkpoint {reentrant} {choice}")
        assert all(error(tensor, wanted[name]) < 1e-2 for name, tensor in got.items())
    plain, *wrapped = ([one[wrapper] for one in found] for wrapper in ranks.WRAPPERS[1:])
    for others in wrapped:
        for one, other in zip(plain, others, strict=True):
            torch.testing.assert_close(one["losses"], other["losses"], rtol=1e-2, atol=1e-4)
            assert all(error(one["parameters"][n], t) < 1e-2 for n, t in other["parameters"].items())


def test_what_ranks_do_not_agree_about(tmp_path: Path) -> None:
    first, second, third = run("errors", 3, tmp_path)
    for text in (one["recomputed by one"] for one in (first, second, third)):
        assert text.startswith("RuntimeError: ranks call expert parallel layers differently")
        assert "step is forward on rank 0 and backward on ranks 1, 2" in text
    for text in (one["recorded by some"] for one in (first, second, third)):
        assert "grad mode is True on ranks 0, 2 and False on rank 1" in text
    assert first["ids"] == "ValueError: topk_ids holds 6 to 6, wanted [0, 5]"
    assert first["lora"].startswith("ValueError: up_lora_a ")
    assert first["array"].startswith("TypeError: up_lora_a ")
    for name in ("ids", "lora", "array"):
        for one in (second, third):
            assert one[name].startswith("RuntimeError: expert parallel layer 0 failed on rank 0: ")
            assert one[name].endswith(first[name])
    assert third["seed"] == "TypeError: seed is 'seven', wanted an integer or None"
    for one in (first, second):
        assert one["seed"] == f"RuntimeError: expert parallel layer 1 failed on rank 2: {third['seed']}"
    for one in (first, second, third):
        assert "layer is 0 on ranks 0, 2 and 2 on rank 1" in one["layers in another order"]
        assert "K is 2 on ranks 0, 2 and 1 on rank 1" in one["K"]
        assert "num_experts is 5 on ranks 0, 2 and 6 on rank 1" in one["num_experts"]
        assert "hidden_size is 64 on ranks 0, 2 and 32 on rank 1" in one["hidden_size"]
        assert "ranks have 2, 5, 1 experts, wanted 5 together" in one["part"]
        assert "on rank 1 experts is a Problem, wanted kt_moe.Experts or None" in one["kind"]
        assert "average is False on ranks 0, 2 and True on rank 1" in one["average"]
        assert "chunks is None on ranks 0, 2 and 2 on rank 1" in one["chunks"]
        for wrong in ("3", "2.0"):
            text = f"ValueError: on rank 0 chunks is {wrong}, wanted 1, 2, 4 or None"
            assert one[f"{wrong} chunks"] == text
        assert all(norm.isnan() for norm in one["norms"])
        assert one["norm 0"].startswith("ValueError: norm_type is 0.0, wanted a number above 0 ")
        assert one["clipped by NaN"].isnan()
        assert one["worked in between"] == one["works still"] == ""
    assert [one["group"] for one in (first, second)] == [
        "", "ValueError: process 1 is not in the group, wanted one of its members"
    ]  # fmt: skip


def test_a_rank_that_is_gone_ends_the_others(tmp_path: Path) -> None:
    found = run("killed", 3, tmp_path, [0, 7, 0])
    found += run("killed_in_forward", 3, tmp_path, [0, -signal.SIGKILL, 0])
    assert all("Error" in one["killed"] for one in found)


def test_what_happens_to_one_rank_is_told_to_the_others(tmp_path: Path) -> None:
    for one in run("faults", 3, tmp_path, [0, 1, 0]):
        for name, wanted in {
            "slow": "as it should be", "afterwards": "as it should be", "chunks afterwards": "chunks",
        }.items():  # fmt: skip
            assert all(torch.equal(t, one[wanted][key]) for key, t in one[name].items())
        wanted = "RuntimeError: expert parallel layer 0 failed on rank 1: MemoryError: no memory for dG"
        assert one["backward"] == one["backward in chunks"].replace("layer 1", "layer 0") == wanted
        assert one["forward in chunks"] == one["backward in chunks"]
        assert "RuntimeError" in one["silent"]
        assert one["seconds"] < 30
        assert "rank 1 failed: ValueError: a row of the data set is empty" in one["uncaught"]


def test_partition() -> None:
    assert partition(5, 3) == [range(2), range(2, 4), range(4, 5)]
    assert partition(5, 4) == [range(2), range(2, 4), range(4, 5), range(5, 5)]  # as torch.chunk
    assert partition(2, 4) == [range(1), range(1, 2), range(2, 2), range(2, 2)]
    assert partition(8, 1) == [range(8)]
    with pytest.raises(ValueError, match="num_experts is 0"):
        partition(0, 2)


def test_partition_by_load() -> None:
    assert partition(6, 2, [5, 0, 0, 1, 1, 3]) == [range(3), range(3, 6)]
    assert partition(6, 3, [9, 1, 1, 1, 1, 1]) == [range(1), range(1, 5), range(5, 6)]  # at most 4 of them
    assert partition(2, 3, [0, 3]) == [range(2), range(2, 2), range(2, 2)]
    assert partition(3, 2, [0, 0, 0]) == [range(2), range(2, 3)]  # nothing is known
    random = torch.Generator().manual_seed(1)
    for world in (1, 3, 8, 100):
        counts = torch.rand(64, generator=random).pow(4)
        parts = partition(64, world, counts.tolist())
        assert [e for part in parts for e in part] == list(range(64))
        most = max(float(counts[part.start : part.stop].sum()) for part in parts)
        even = max(float(counts[part.start : part.stop].sum()) for part in partition(64, world))
        assert max(float(counts.max()), float(counts.sum()) / world) * 0.999 <= most <= even * 1.001
        assert max(map(len, parts)) <= 2 * -(-64 // world)
    for counts in ([1.0], [1.0, float("nan")], [1.0, -1.0]):
        with pytest.raises(ValueError, match=r"counts is .* wanted 2 finite numbers of 0 or more"):
            partition(2, 2, counts)


def test_how_many_chunks() -> None:
    each = 8 * ROWS  # routes of eight experts with that many rows
    assert [chunk_count([n * each // 2] * 2, 8) for n in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]
    assert chunk_count([9 * each, 0], 8) == 4
    assert chunk_count([9 * each, -1], 8) == 1


def test_a_token_is_sent_once_to_a_rank() -> None:
    ids = torch.tensor([[0, 1, 4], [5, 5, 5], [3, 0, 3]])
    routes = Routes.of(ids, partition(5, 2))
    assert routes.sizes == [2, 2]
    assert routes.tokens.tolist() == [0, 2, 0, 2]
    assert routes.ids.tolist() == [[0, 1, 3], [3, 0, 3], [2, 2, 1], [0, 2, 0]]
    first, second = routes.divided(3, 2)
    assert (first.tokens.tolist(), first.sizes) == ([0, 0], [1, 1])
    assert (second.tokens.tolist(), second.sizes) == ([2, 2], [1, 1])
    assert second.ids.tolist() == [[3, 0, 3], [0, 2, 0]]
    assert routes.part_sizes == [[0, 1, 0, 1], [0, 1, 0, 1]]


def test_without_a_group() -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        ExpertParallel(None, 4)
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        local_experts(4)
