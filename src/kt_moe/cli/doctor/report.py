"""A machine and its findings for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kt_moe import _core
from kt_moe.cli.doctor.findings import Finding
from kt_moe.cli.doctor.gpus import Gpu, Gpus
from kt_moe.cli.doctor.machine import Machine
from kt_moe.cli.nodes import node_lines
from kt_moe.cli.text import cache_text, count_text, size_text


def to_dict(machine: Machine) -> dict[str, Any]:
    """As JSON takes it."""
    used = set().union(*_core.kernel_flags().values())
    return {
        **machine.topology,
        "isa_flags": sorted(machine.flags & used),
        "kernel_sets": machine.kernel_sets,
        "selected": machine.selected,
        "threads": machine.threads,
        "transparent_huge_pages": machine.huge_pages,
        "governors": {governor: cpus for (_, governor), cpus in machine.governors.items()},
        "numa_balancing": machine.numa_balancing,
        "huge_page_pool_bytes": machine.reserved_bytes,
        "free_in_big_blocks": machine.big_blocks,
        "overrides": machine.overrides,
        "environment": machine.environment,
        "gpus": asdict(machine.gpus),
        "probes": machine.probes,
    }


def describe(machine: Machine, findings: list[Finding]) -> str:
    """The machine, a line a node, then each finding with its cost and its cure."""
    topology = machine.topology
    processor = ", ".join(
        (
            topology["model"],
            count_text(topology["packages"], "package"),
            count_text(topology["cores"], "core"),
            count_text(topology["cpus"], "CPU"),
        )
    )
    lines = [processor, f"caches   {_caches(topology)}", *node_lines(machine.nodes)]
    threads, shards = count_text(machine.threads, "thread"), count_text(machine.shards, "shard")
    lines.append(f"kernels  {_kernels(machine)}; {threads}, {shards}")
    if machine.overrides:
        lines.append("set      " + ", ".join(f"{name}={value}" for name, value in machine.overrides.items()))
    if machine.probes is not None:
        lines.append(f"memory   {_placement(machine.probes)}")
    lines += _gpu_lines(machine.gpus)
    lines.append("")
    for finding in findings:
        lines.append(f"{'SLOW' if finding.slow else 'note'}  {finding.what}")
        lines.append(f"      cost: {finding.cost}")
        if finding.mend:
            lines.append(f"      mend: {finding.mend}")
    slow = sum(finding.slow for finding in findings)
    end = f"{count_text(slow, 'finding')} {'costs' if slow == 1 else 'cost'} speed"
    lines.append(end if slow else "nothing found that costs speed and can be mended")
    return "\n".join(lines)


def _gpu_lines(gpus: Gpus) -> list[str]:
    lines = [f"GPU {number}    {_gpu(gpu)}" for number, gpu in enumerate(gpus.gpus)]
    if not lines and gpus.without_cuda:
        lines.append(f"GPU      none: {gpus.without_cuda}")
    if gpus.rates is not None:
        r = gpus.rates
        lines += [
            f"rates    link {r.link / 1e9:.1f} GB/s; GPU {r.gpu_flops / 1e12:.0f} TFLOP/s, "
            f"{r.gpu_bytes / 1e9:,.0f} GB/s; CPU {r.cpu_flops / 1e12:.2f} TFLOP/s, "
            f"{r.cpu_bytes / 1e9:.1f} GB/s; for the same division of experts in every run:",
            "         kt_moe.Gpu(rates=kt_moe.Rates("
            + ", ".join(f"{name}={value:.3g}" for name, value in vars(r).items() if value)
            + "))",
        ]
    return lines


def _gpu(gpu: Gpu) -> str:
    parts = [gpu.name or "NVIDIA"]
    if gpu.memory_bytes:
        parts.append(size_text(gpu.memory_bytes))
    if (link := gpu.link) is not None:
        text = link.address
        if link.generation is not None or link.lanes is not None:
            text += f" PCIe {link.generation or '?'} x{link.lanes or '?'}"
        parts.append(text + (f" at node {link.node}" if link.node is not None else ""))
    if gpu.page_locked is not None and gpu.pageable is not None:
        parts.append(f"{gpu.page_locked / 1e9:.1f} GB/s page-locked, {gpu.pageable / 1e9:.1f} GB/s pageable")
    return ", ".join(parts)


def _caches(topology: dict[str, Any]) -> str:
    names = {"l1d": "L1d", "l2": "L2", "l3": "L3"}
    parts = []
    for key, name in names.items():
        size, count = topology["caches"][key], topology.get(f"{key}_domains", 0)
        if size:
            parts.append(f"{f'{count} x ' if count else ''}{name} {cache_text(size)}")
    return ", ".join(parts) or "unknown"


def _kernels(machine: Machine) -> str:
    other = [f"{name}: {state}" for name, state in machine.kernel_sets.items() if state != "available"]
    return machine.selected + (f" ({'; '.join(other)})" if other else "")


def _placement(probes: list[dict[str, Any]]) -> str:
    pages, right = (sum(probe[key] for probe in probes) for key in ("pages", "right"))
    asked = all(probe["asked"] for probe in probes)
    where = "on the node that was asked for" if asked else "on the node of the thread that touched them first"
    return f"{right} of {pages} pages lie {where}"
