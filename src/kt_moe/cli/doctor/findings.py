"""What is wrong with a machine for kt_moe, what it costs and what mends it: a function for each subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kt_moe.cli.doctor.finding import Finding
from kt_moe.cli.doctor.gpu_findings import gpu_findings, spinning
from kt_moe.cli.doctor.machine import Machine, nodes_with_cpus
from kt_moe.cli.text import count_text, ranges_text, size_text

_GIB = 2**30


def find(machine: Machine) -> list[Finding]:
    """All findings, those that cost speed first."""
    found = [finding for check in _CHECKS for finding in check(machine)]
    return sorted(found, key=lambda finding: not finding.slow)


def _instruction_sets(m: Machine) -> Iterator[Finding]:
    slower = f"{m.selected} kernels run, which are slower"
    if {"amx_tile", "amx_bf16"} <= m.flags and m.kernel_sets["amx"] != "available":
        yield Finding(
            "amx-refused",
            True,
            "the CPU has AMX, and the kernel does not let this process use it",
            slower,
            "Linux 5.16 or newer, and a seccomp filter that lets arch_prctl pass",
        )
        return
    hidden = sorted(_expected_flags(m) - m.flags) if m.flags else []
    if hidden:
        yield Finding(
            "instructions-hidden",
            True,
            f"CPUs of this family have {', '.join(hidden)}, and this one does not show it",
            slower,
            "in a virtual machine pass the host's CPU through (QEMU: -cpu host; libvirt: host-passthrough); "
            "else look at the BIOS, and for clearcpuid in /proc/cmdline",
        )
    elif m.kernel_sets["avx512_bf16"] != "available":
        better = "AVX-512 with bf16, or AMX" if m.kernel_sets["avx512"] == "available" else "AVX-512"
        yield Finding("instructions-missing", False, f"this CPU has no {better}", slower)


def _expected_flags(m: Machine) -> set[str]:
    if m.vendor == "GenuineIntel" and m.family == 6 and m.model in (143, 207, 173, 174):  # Sapphire Rapids on
        return {"avx512_bf16", "amx_tile", "amx_bf16"}
    zen4 = m.family == 25 and (0x10 <= m.model < 0x20 or 0x60 <= m.model < 0x80 or 0xA0 <= m.model < 0xB0)
    if m.vendor == "AuthenticAMD" and (zen4 or m.family == 26):
        return {"avx512_bf16"}
    return set()


def _cpus(m: Machine) -> Iterator[Finding]:
    mask, online, limit = m.mask, m.topology["online_cpus"], m.topology["cgroup_cpu_limit"]
    if len(mask) < online:
        yield Finding(
            "affinity",
            True,
            f"this process may run on {len(mask)} of {online} CPUs: {ranges_text(mask)}",
            "the others compute nothing",
            "taskset, numactl --physcpubind, docker --cpuset-cpus or a batch system's --cpus-per-task set it",
        )
    if limit is not None and limit < len(mask):
        yield Finding(
            "cpu-limit",
            True,
            f"a control group grants the time of {limit:g} CPUs, and the affinity mask has {len(mask)}",
            f"{count_text(m.topology['cores'], 'thread')} by default, and all pause when the time is used up",
            "docker --cpus, Kubernetes' limits.cpu or systemd's CPUQuota set it",
        )
    cpus = m.topology["cpus"]
    if m.threads > cpus:
        yield Finding(
            "threads",
            True,
            f"{m.threads} threads on {count_text(cpus, 'CPU')}",
            "they wait for each other's turns",
            f"KT_MOE_THREADS={m.topology['cores']}, or unset it",
        )
    elif m.threads > m.topology["cores"] and m.topology["threads_per_core"] > 1:
        cores = m.topology["cores"]
        yield Finding(
            "smt",
            False,
            f"{m.threads} threads on {count_text(cores, 'core')}",
            "threads of one core share its multipliers and caches: seldom faster, at times slower",
            f"the default is one a core: compare with KT_MOE_THREADS={cores}",
        )


def _governor(m: Machine) -> Iterator[Finding]:
    # These drivers' "powersave" lets the CPU itself choose, up to its highest clock.
    chosen_by_cpu = ("intel_pstate", "amd-pstate-epp")
    for (driver, governor), cpus in sorted(m.governors.items()):
        if governor == "performance":
            continue
        yield Finding(
            "governor",
            driver not in chosen_by_cpu,
            f"the frequency governor is {governor} on {count_text(cpus, 'CPU')}",
            "cores may run below their highest clock, most of all when work begins",
            "sudo cpupower frequency-set -g performance",
        )


def _huge_pages(m: Machine) -> Iterator[Finding]:
    if m.huge_pages == "never":
        yield Finding(
            "huge-pages-off",
            True,
            "transparent huge pages are off",
            "weights and scratch lie in pages of 4 KiB, whose addresses take longer to look up",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    for node in m.nodes:
        free, big = node["free_bytes"], m.big_blocks.get(node["id"])
        if m.huge_pages != "never" and big is not None and free > _GIB and big < free // 4:
            yield Finding(
                "fragmented",
                True,
                f"node {node['id']}: of {size_text(free)} free, {size_text(big)} are in blocks of 2 MiB up",
                "few huge pages are to be had",
                "echo 1 | sudo tee /proc/sys/vm/compact_memory",
            )
    if m.reserved_bytes >= _GIB:
        yield Finding(
            "huge-page-pool",
            False,
            f"{size_text(m.reserved_bytes)} are kept in the kernel's pool of huge pages",
            "experts cannot have them: kt_moe's huge pages are transparent ones, from ordinary memory",
            "sudo sysctl vm.nr_hugepages=0, unless another program wants them",
        )


def _memory(m: Machine) -> Iterator[Finding]:
    with_memory = [node for node in m.nodes if node["memory_bytes"]]
    several, total = len(with_memory) > 1, sum(node["memory_bytes"] for node in with_memory)
    for node in with_memory:
        cache = node["cache_bytes"]
        # Among several nodes the kernel rather takes another's memory than drop what it holds of files.
        available = node["free_bytes"] + (0 if several else cache)
        if available >= node["memory_bytes"] // 10:
            continue
        drop = several and cache > node["memory_bytes"] // 4
        yield Finding(
            "little-free",
            True,
            f"node {node['id']}: {size_text(available)} of {size_text(node['memory_bytes'])} free"
            + (f", {size_text(cache)} hold pages of files" if drop else ""),
            "what does not fit lies on another node, further away" if several else "experts may not fit",
            "sync; echo 1 | sudo tee /proc/sys/vm/drop_caches" if drop else "end the programs that use it",
        )
    limit = m.topology["cgroup_memory_limit"]
    if limit is not None and limit < total // 2:
        yield Finding(
            "memory-limit",
            False,
            f"a control group grants {size_text(limit)} of the machine's {size_text(total)}",
            "experts have to fit that",
            "docker --memory, Kubernetes' limits.memory or systemd's MemoryMax set it",
        )


def _nodes(m: Machine) -> Iterator[Finding]:
    several = len(m.nodes) > 1
    for node in m.nodes:
        name, cpus = f"node {node['id']}", bool(node["cpus"])
        if node["memory_bytes"] and not node["memory_allowed"]:
            yield Finding(
                "memory-not-allowed",
                cpus,
                f"{name} may give this process no memory",
                "its cores read all weights from another node" if cpus else "its memory is lost to experts",
                "docker --cpuset-mems, numactl --membind or a batch system set it",
            )
        elif several and cpus and not node["memory_bytes"]:
            yield Finding(
                "node-without-memory",
                True,
                f"{name} has cores and no memory",
                "its cores read all weights from another node",
                "put memory modules into its channels, or look whether the BIOS hides them",
            )
        elif several and not cpus and node["memory_bytes"]:
            yield Finding(
                "node-without-cpus",
                False,
                f"{name} has memory ({size_text(node['memory_bytes'])}) and no CPU of this process",
                "its memory is used only when that of the others is full",
            )
    if several and m.numa_balancing:
        yield Finding(
            "numa-balancing",
            True,
            "automatic NUMA balancing is on",
            "the kernel takes pages away for a moment to see who wants them, and moves some of them",
            "echo 0 | sudo tee /proc/sys/kernel/numa_balancing",
        )


def _placement(m: Machine) -> Iterator[Finding]:
    if m.probes is None or len(m.nodes) == 1:
        return
    refused = [probe["node"] for probe in m.probes if not probe["asked"]]
    if refused:
        yield Finding(
            "placement-refused",
            True,
            f"the kernel does not place memory on nodes when asked (mbind): {ranges_text(refused)}",
            "pages come from the node of the thread that first touches them, and no others can be asked for",
            "docker --cap-add SYS_NICE (its default seccomp profile refuses mbind), or another profile",
        )
    for probe in m.probes:
        wrong = probe["pages"] - probe["right"] - probe["unknown"]
        if wrong:
            yield Finding(
                "placed-elsewhere",
                True,
                f"{wrong} of {probe['pages']} pages asked for on node {probe['node']} lie elsewhere",
                "its cores read these from further away",
                "look whether the node is full, or a cpuset or memory policy forbids it (numactl --show)",
            )
    if unknown := [probe["node"] for probe in m.probes if probe["unknown"] == probe["pages"]]:
        yield Finding(
            "placement-unknown",
            False,
            f"the kernel does not tell on which node a page lies (move_pages): {ranges_text(unknown)}",
            "whether memory is where it was asked for cannot be checked",
            "a seccomp profile that lets move_pages pass",
        )


def _overrides(m: Machine) -> Iterator[Finding]:
    best = [name for name, state in m.kernel_sets.items() if state == "available"][-1]
    cores, nodes = m.topology["cores"], nodes_with_cpus(m.topology)
    costs = {
        "KT_MOE_ISA": (m.selected != best, f"{best} kernels would be faster"),
        "KT_MOE_THREADS": (m.threads < cores, f"{count_text(cores, 'core')} could compute"),
        "KT_MOE_SHARDS": (m.shards < nodes, f"{count_text(nodes, 'node')} share weights that lie on either"),
    }
    for name, value in m.overrides.items():
        slow, cost = costs.get(name, (False, ""))
        if slow:
            yield Finding("override", True, f"{name} is {value}", cost, f"unset {name}")


_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _instruction_sets,
    _cpus,
    _governor,
    _huge_pages,
    _memory,
    _nodes,
    _placement,
    _overrides,
    gpu_findings,
    spinning,
)
