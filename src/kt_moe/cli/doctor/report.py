"""A machine and its findings for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kt_moe.cli.doctor.findings import Finding
from kt_moe.cli.doctor.gpus import Gpu, Gpus
from kt_moe.cli.doctor.machine import Machine
from kt_moe.cli.text import cache_text, count_text, ranges_text, size_text, table


def to_json(machine: Machine, findings: list[Finding]) -> str:
    """Everything; the topology's keys lie beside the machine's own."""
    found = asdict(machine)
    found = {**found.pop("topology"), **found}
    return json.dumps({"machine": found, "findings": [asdict(one) for one in findings]}, indent=2)


def describe(machine: Machine, findings: list[Finding]) -> str:
    """The machine, a line a node, then each finding with its cost and its cure."""
    topology, slow = machine.topology, sum(finding.slow for finding in findings)
    counts = (count_text(topology[f"{noun.lower()}s"], noun) for noun in ("package", "core", "CPU"))
    other = [f"{name}: {state}" for name, state in machine.kernel_sets.items() if state != "available"]
    kernels = machine.selected + (f" ({'; '.join(other)})" if other else "")
    free = size_text(machine.available_bytes)
    lines = [
        ", ".join((topology["model"], *counts)),
        f"caches   {_caches(topology)}",
        *_node_lines(machine.nodes),
        f"memory   {size_text(machine.memory_bytes)}, {free} of it for a run",
        f"kernels  {kernels}; {count_text(machine.threads, 'thread')}, {count_text(machine.shards, 'shard')}",
    ]
    if machine.overrides:
        lines.append("set      " + ", ".join(f"{name}={value}" for name, value in machine.overrides.items()))
    lines += [*_gpu_lines(machine.gpus), ""]
    for finding in findings:
        lines += [f"{'SLOW' if finding.slow else 'note'}  {finding.what}", f"      cost: {finding.cost}"]
        lines += [f"      mend: {finding.mend}"] if finding.mend else []
    end = f"{count_text(slow, 'finding')} {'costs' if slow == 1 else 'cost'} speed"
    return "\n".join([*lines, end if slow else "nothing found that costs speed and can be mended"])


def _node_lines(nodes: list[dict[str, Any]]) -> list[str]:
    """A line a node; memory and distances only where there are several."""
    rows = []
    for node in nodes:
        parts = ranges_text(node["cpus"]).split(", ")
        cpus = ", ".join(parts if len(parts) <= 4 else [*parts[:2], "...", parts[-1]])  # of odd masks
        row = [f"node {node['id']}", count_text(len(node["cores"]), "core")]
        row.append(f"CPUs {cpus}" if node["cpus"] else "no CPUs")
        if len(nodes) > 1:
            memory = bool(node["memory_bytes"])
            row.append(size_text(node["memory_bytes"]) if memory else "no memory")
            row.append(f"{size_text(node['free_bytes'])} free" if memory else "")
            row.append("distances " + " ".join(map(str, node["distances"])))
        rows.append(row)
    return table(rows, right=(1, 3, 4)).splitlines()


def _gpu_lines(gpus: Gpus) -> Iterator[str]:
    for number, gpu in enumerate(gpus.gpus):
        yield f"GPU {number}    {_gpu(gpu)}"
    if not gpus.gpus and gpus.without_cuda:
        yield f"GPU      none: {gpus.without_cuda}"
    if (r := gpus.rates) is not None:
        yield (
            f"rates    link {r.link / 1e9:.1f} GB/s; GPU {r.gpu_flops / 1e12:.0f} TFLOP/s, "
            f"{r.gpu_bytes / 1e9:,.0f} GB/s; CPU {r.cpu_flops / 1e12:.2f} TFLOP/s, "
            f"{r.cpu_bytes / 1e9:.1f} GB/s; for the same division of experts in every run:"
        )
        given = ", ".join(f"{name}={value:.3g}" for name, value in vars(r).items() if value)
        yield f"         kt_moe.Gpu(rates=kt_moe.Rates({given}))"


def _gpu(gpu: Gpu) -> str:
    parts = [gpu.name or "NVIDIA"]
    if gpu.memory_bytes:
        parts.append(f"{size_text(gpu.free_bytes)} of {size_text(gpu.memory_bytes)} free")
    if (link := gpu.link) is not None:
        known = link.generation is not None or link.lanes is not None
        text = link.address + (f" PCIe {link.generation or '?'} x{link.lanes or '?'}" if known else "")
        parts.append(text + (f" at node {link.node}" if link.node is not None else ""))
    if gpu.copy_rate is not None:
        parts.append(f"{gpu.copy_rate / 1e9:.1f} GB/s from page-locked memory")
    return ", ".join(parts)


def _caches(topology: dict[str, Any]) -> str:
    parts = []
    for key, name in (("l1d", "L1d"), ("l2", "L2"), ("l3", "L3")):
        if size := topology["caches"][key]:
            count = topology.get(f"{key}_domains", 0)
            parts.append(f"{f'{count} x ' if count else ''}{name} {cache_text(size)}")
    return ", ".join(parts) or "unknown"
