"""The machine this runs on as the scaling model takes it: nodes that are all alike, rates measured on one."""

from __future__ import annotations

import statistics
from typing import Any

import kt_moe
from kt_moe import _core
from kt_moe.cli.bench.ceilings import SECONDS, measure, read_bytes
from kt_moe.cli.numa.predict import Machine


def read(usual_remote: float) -> tuple[Machine, int]:
    """A node of it, and how many there are; KT_MOE_NODES chooses some. Takes seconds.

    Args:
        usual_remote: bytes/s of the links, where they cannot be measured.

    Raises:
        ValueError: an override that does not hold here.
    """
    nodes = sorted(set(kt_moe.Runtime().nodes))
    cores, cache = node_of(_core.read_topology("/"), nodes)
    local, remote, flops = measure_node(nodes, cores)
    notes = [f"measured on node {nodes[0]}: reads of memory, and products whose operands come from L2"]
    if remote is None:
        why = "there is no other node" if len(nodes) == 1 else "the kernel does not place memory there"
        notes.append(f"remote is not measured but the default: {why}")
    return Machine(cores, local, remote or usual_remote, flops, cache, tuple(notes)), len(nodes)


def node_of(topology: dict[str, Any], nodes: list[int]) -> tuple[int, int]:
    """Cores of a node that a runtime uses, and bytes of its last caches: the means over `nodes`."""
    chosen = [node for node in topology["nodes"] if node["id"] in nodes]
    cpus = {cpu for node in chosen for cpu in node["cpus"]}
    cores = min(topology["cores"], sum(len(node["cores"]) for node in chosen))
    level = "l3" if topology["caches"]["l3"] else "l2"
    caches = sum(not cpus.isdisjoint(domain) for domain in topology[f"{level}_sharing"])
    return max(1, cores // len(chosen)), topology["caches"][level] * caches // len(chosen)


def measure_node(nodes: list[int], cores: int) -> tuple[float, float | None, float]:
    """What the first of `nodes` reaches: bytes/s of its memory, bytes/s of the others', FLOP/s of a core."""
    runtime = kt_moe.Runtime(threads=cores, shards=1, nodes=nodes[:1])
    ceilings = measure(runtime)
    far = _core.measure_read(runtime._core, nodes[1:], SECONDS, read_bytes(cores)) if nodes[1:] else []
    return (
        ceilings.read_all.median,
        statistics.median(far) if far else None,
        ceilings.l2_all.median / runtime.threads,
    )
