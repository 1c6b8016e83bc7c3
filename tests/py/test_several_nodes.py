"""What only a machine with several memory nodes can show: where pages lie. `make numa` emulates one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import make_problem

import kt_moe
from kt_moe.cli.doctor.findings import find
from kt_moe.cli.doctor.machine import read_machine
from kt_moe.experts import PLACEMENTS

NODES: list[dict[str, Any]] = kt_moe.cpu_info()["nodes"]
WITH_CPUS = [node["id"] for node in NODES if node["cpus"]]
BOTH = [node["id"] for node in NODES if node["cpus"] and node["memory_bytes"] > 0]

pytestmark = pytest.mark.skipif(len(BOTH) < 2, reason="one memory node")

E, H, INNER = 8, 512, 768  # an expert is 2.25 MiB: most huge pages belong to two


@pytest.fixture(scope="module")
def weights() -> tuple[torch.Tensor, ...]:
    shapes = ((E, INNER, H), (E, INNER, H), (E, H, INNER))
    return tuple(torch.randn(s, dtype=torch.bfloat16) for s in shapes)


def elsewhere(experts: kt_moe.Experts) -> int:
    """Pages that lie on other nodes than those of their shard; there must be some that do not."""
    pages = experts.page_nodes()
    assert all(shard["wanted"] > 0 and shard["unknown"] == 0 for shard in pages)
    return sum(shard["elsewhere"] for shard in pages)


def test_a_shard_for_every_node_with_cpus() -> None:
    runtime = kt_moe.Runtime()
    assert runtime.nodes == WITH_CPUS
    assert runtime.shards == len(WITH_CPUS)


@pytest.mark.parametrize("format", ["bf16", "int4"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_lie_where_they_are_multiplied(
    weights: tuple[torch.Tensor, ...], format: str, placement: str
) -> None:
    for shards in (len(WITH_CPUS), 2 * len(WITH_CPUS)):
        runtime = kt_moe.Runtime(threads=shards, shards=shards)
        assert elsewhere(kt_moe.Experts(*weights, format=format, placement=placement, runtime=runtime)) == 0


@pytest.mark.parametrize("node", BOTH)
def test_a_chosen_node_has_all(weights: tuple[torch.Tensor, ...], node: int) -> None:
    runtime = kt_moe.Runtime(nodes=[node])
    assert elsewhere(kt_moe.Experts(*weights, runtime=runtime)) == 0


def test_pages_follow_experts_home(weights: tuple[torch.Tensor, ...]) -> None:
    experts = kt_moe.Experts(*weights, placement="expert", runtime=kt_moe.Runtime())
    seen = set()
    for popularity in ([8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 9, 9, 9, 9], [1, 5, 2, 6, 3, 7, 4, 8], [0] * 8):
        experts.rebalance(popularity)
        assert elsewhere(experts) == 0
        seen.add(tuple(experts.homes or ()))
    assert len(seen) > 2
    assert all(torch.equal(a, b) for a, b in zip(experts.dequantize(), weights, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_results_are_those_of_one_node(placement: str) -> None:
    problem = make_problem(T=50, H=64, inner=96, E=4, K=2, ranks={"gate": 4, "down": 4})
    results = []
    for runtime, placed in ((kt_moe.Runtime(nodes=BOTH[:1]), "tensor"), (kt_moe.Runtime(), placement)):
        experts = kt_moe.Experts(*problem.weights, runtime=runtime, placement=placed)
        x = problem.hidden_states.clone().requires_grad_()
        out = kt_moe.moe(x, problem.topk_ids, problem.topk_weights, experts, problem.lora)
        out.backward(problem.grad_out)
        assert x.grad is not None
        results.append((out.detach().float(), x.grad.float()))
    for one, several in zip(*results, strict=True):
        assert (one - several).norm() < 2**-7 * one.norm()  # they differ in when sums are rounded


def test_every_page_is_where_it_was_asked_for() -> None:
    machine = read_machine()
    assert [probe["node"] for probe in machine["probes"]] == [n["id"] for n in NODES if n["memory_bytes"] > 0]
    assert all(probe["right"] == probe["pages"] > 0 for probe in machine["probes"])
    assert "placement-refused" not in {finding.name for finding in find(machine)}
