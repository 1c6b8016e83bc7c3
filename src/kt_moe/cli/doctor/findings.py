"""What costs speed on a machine, what that costs, and what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kt_moe.cli.terminal import count_text, ranges_text, size_text
from kt_moe.gpu.predict import LINKS

_LEAST = 0.7  # of what copies reach by the link that a GPU can have


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        name: for programs, the same in every version.
        what, cost, mend: sentences without a full stop.
    """

    name: str
    what: str
    cost: str
    mend: str


def find(machine: dict[str, Any]) -> list[Finding]:
    """All findings about what `read_machine` returned."""
    return [finding for check in (_cpu, _memory, _gpus, _threads) for finding in check(machine)]


def describe(findings: list[Finding]) -> str:
    """Each finding with its cost and its mend."""
    lines = []
    for found in findings:
        lines += [f"SLOW  {found.what}", f"      cost: {found.cost}", f"      mend: {found.mend}"]
    return "\n".join(lines) or "nothing found that costs speed and can be mended"


def _cpu(m: dict[str, Any]) -> Iterator[Finding]:
    if {"amx_tile", "amx_bf16"} <= set(m["isa_flags"]) and m["kernel_sets"]["amx"] != "available":
        what = "the CPU has AMX, and the kernel does not let this process use it"
        mend = "Linux 5.16 or newer, and a seccomp filter that lets arch_prctl pass"
        yield Finding("amx-refused", what, f"{m['selected']} kernels run, which are slower", mend)
    mask = sorted(cpu for node in m["topology"]["nodes"] for cpu in node["cpus"])
    online, limit = m["topology"]["online_cpus"], m["topology"]["cgroup_cpu_limit"]
    if len(mask) < online:
        yield Finding(
            "affinity",
            f"this process may run on {len(mask)} of {online} CPUs: {ranges_text(mask)}",
            "the others compute nothing",
            "taskset, numactl --physcpubind, docker --cpuset-cpus or a batch system's --cpus-per-task set it",
        )
    if limit is not None and limit < len(mask):
        yield Finding(
            "cpu-limit",
            f"a control group grants the time of {limit:g} CPUs, and the affinity mask has {len(mask)}",
            f"{count_text(m['threads'], 'thread')} run, and all pause when the time is used up",
            "docker --cpus, Kubernetes' limits.cpu or systemd's CPUQuota set it",
        )


def _memory(m: dict[str, Any]) -> Iterator[Finding]:
    if m["transparent_huge_pages"] == "never":
        yield Finding(
            "huge-pages-off",
            "transparent huge pages are off",
            "weights and scratch lie in pages of 4 KiB, whose addresses take longer to look up",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    nodes = [node for node in m["topology"]["nodes"] if node["memory_bytes"]]
    for node in nodes if len(nodes) > 1 else ():
        number, free, size, files = (node[k] for k in ("id", "free_bytes", "memory_bytes", "cache_bytes"))
        if free < size // 10:
            # The kernel rather takes another node's memory than drop what this one holds of files.
            drop = files > size // 4
            held = f", {size_text(files)} hold pages of files" if drop else ""
            yield Finding(
                "node-full",
                f"node {number}: {size_text(free)} of {size_text(size)} free{held}",
                "what does not fit lies on another node, further away",
                "sync; echo 1 | sudo tee /proc/sys/vm/drop_caches" if drop else "end programs that use it",
            )
    refused = [probe["node"] for probe in m["probes"] if not probe["asked"]]
    if refused and len(nodes) > 1:
        yield Finding(
            "placement-refused",
            f"the kernel does not place memory on nodes when asked (mbind): {ranges_text(refused)}",
            "pages come from the node of the thread that first touches them, and no others can be asked for",
            "docker --cap-add SYS_NICE (its default seccomp profile refuses mbind), or another profile",
        )


def _gpus(m: dict[str, Any]) -> Iterator[Finding]:
    if m["nvidia_gpus"] and "without_cuda" in m:
        yield Finding(
            "gpu-unused",
            f"this machine has {count_text(m['nvidia_gpus'], 'NVIDIA GPU')}, and {m['without_cuda']}",
            "the CPU computes all experts",
            "a torch with CUDA (pytorch.org/get-started); where it has that: nvidia-smi, docker --gpus all",
        )
    for number, gpu in enumerate(m["gpus"]):
        link = "PCIe 5 x16" if gpu["capability"] >= [9, 0] else "PCIe 4 x16"
        if 0 < gpu["copy_rate"] < _LEAST * LINKS[link]:
            reached, most = (rate / 1e9 for rate in (gpu["copy_rate"], LINKS[link]))
            yield Finding(
                "gpu-link",
                f"copies to GPU {number} reach {reached:.1f} GB/s, by {link}, which it can use, {most:.1f}",
                "weights cross the link in proportion to it",
                "another slot or riser, the BIOS (link speed, bifurcation), iommu=pt, the socket that the "
                "GPU is at (numactl), no other program on the link",
            )
        if gpu["capability"] < [8, 0]:
            what = f"GPU {number} has compute capability {'.'.join(map(str, gpu['capability']))}"
            mend = "a GPU of 8.0 (NVIDIA's Ampere) or newer, which the kernels need"
            yield Finding("gpu-old", what, "plain torch multiplies, an expert at a time", mend)
    if m.get("page_lock"):
        yield Finding(
            "page-lock-refused",
            f"memory cannot be page-locked: {m['page_lock']}",
            "each expert is copied twice on its way to the GPU, the first time by a core",
            "ulimit -l unlimited (LimitMEMLOCK= of systemd, docker --ulimit memlock=-1)",
        )


def _threads(m: dict[str, Any]) -> Iterator[Finding]:
    """OpenMP's threads, torch's, that wait busily, as they do where nothing is set."""
    policy = m["environment"].get("OMP_WAIT_POLICY", "").lower()
    if policy == "active" or (m["gpus"] and not policy and "GOMP_SPINCOUNT" not in m["environment"]):
        yield Finding(
            "omp-spins",
            f"OMP_WAIT_POLICY is {policy or 'not set'}: torch's threads stay awake while they wait",
            "they take cores from the threads that compute experts and launch the GPU's kernels",
            "OMP_WAIT_POLICY=passive before Python starts",
        )
