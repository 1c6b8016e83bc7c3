"""What costs speed on a machine, what that costs, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kt_moe.cli.doctor.gpus import COPY_BYTES, Gpu
from kt_moe.cli.doctor.machine import Machine, nodes_with_cpus
from kt_moe.cli.text import count_text, ranges_text, size_text

_GIB = 2**30
_LEAST = 0.6  # of what the lanes carry; copies reach 0.8 to 0.9 of it
_MANY_SPINS = 100_000
_SLOWER = "{selected} kernels run, which are slower"
_UNLIMITED = "ulimit -l unlimited (LimitMEMLOCK= of systemd, docker --ulimit memlock=-1)"
_ONE_BY_ONE = "plain torch multiplies, an expert at a time"
# What is so, what it costs, and what mends it; the names are for programs, and the same in every version.
_TEXTS: dict[str, tuple[str, ...]] = {
    "amx-refused": (
        "the CPU has AMX, and the kernel does not let this process use it",
        _SLOWER,
        "Linux 5.16 or newer, and a seccomp filter that lets arch_prctl pass",
    ),
    "instructions-hidden": (
        "CPUs of this family have {hidden}, and this one does not show it",
        _SLOWER,
        "in a virtual machine pass the host's CPU through (QEMU: -cpu host; libvirt: host-passthrough); "
        "else look at the BIOS, and for clearcpuid in /proc/cmdline",
    ),
    "instructions-missing": ("this CPU has no {better}", _SLOWER),
    "affinity": (
        "this process may run on {some} of {all} CPUs: {which}",
        "the others compute nothing",
        "taskset, numactl --physcpubind, docker --cpuset-cpus or a batch system's --cpus-per-task set it",
    ),
    "cpu-limit": (
        "a control group grants the time of {limit:g} CPUs, and the affinity mask has {mask}",
        "{threads} by default, and all pause when the time is used up",
        "docker --cpus, Kubernetes' limits.cpu or systemd's CPUQuota set it",
    ),
    "threads": (
        "{threads} threads on {cpus}",
        "they wait for each other's turns",
        "KT_MOE_THREADS={cores}, or unset it",
    ),
    "smt": (
        "{threads} threads on {on}",
        "threads of one core share its multipliers and caches: seldom faster, at times slower",
        "the default is one a core: compare with KT_MOE_THREADS={cores}",
    ),
    "governor": (
        "the frequency governor is {governor} on {cpus}",
        "cores may run below their highest clock, most of all when work begins",
        "sudo cpupower frequency-set -g performance",
    ),
    "huge-pages-off": (
        "transparent huge pages are off",
        "weights and scratch lie in pages of 4 KiB, whose addresses take longer to look up",
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    ),
    "fragmented": (
        "node {node}: of {free} free, {big} are in blocks of 2 MiB up",
        "few huge pages are to be had",
        "echo 1 | sudo tee /proc/sys/vm/compact_memory",
    ),
    "huge-page-pool": (
        "{size} are kept in the kernel's pool of huge pages",
        "experts cannot have them: kt_moe's huge pages are transparent ones, from ordinary memory",
        "sudo sysctl vm.nr_hugepages=0, unless another program wants them",
    ),
    "little-free": (
        "node {node}: {free} of {size} free{files}",
        "{lies}",
        "{mend}",
    ),
    "memory-limit": (
        "a control group grants {limit} of the machine's {all}",
        "experts have to fit that",
        "docker --memory, Kubernetes' limits.memory or systemd's MemoryMax set it",
    ),
    "memory-not-allowed": (
        "node {node} may give this process no memory",
        "{cost}",
        "docker --cpuset-mems, numactl --membind or a batch system set it",
    ),
    "node-without-memory": (
        "node {node} has cores and no memory",
        "its cores read all weights from another node",
        "put memory modules into its channels, or look whether the BIOS hides them",
    ),
    "node-without-cpus": (
        "node {node} has memory ({size}) and no CPU of this process",
        "its memory is used only when that of the others is full",
    ),
    "numa-balancing": (
        "automatic NUMA balancing is on",
        "the kernel takes pages away for a moment to see who wants them, and moves some of them",
        "echo 0 | sudo tee /proc/sys/kernel/numa_balancing",
    ),
    "placement-refused": (
        "the kernel does not place memory on nodes when asked (mbind): {nodes}",
        "pages come from the node of the thread that first touches them, and no others can be asked for",
        "docker --cap-add SYS_NICE (its default seccomp profile refuses mbind), or another profile",
    ),
    "placed-elsewhere": (
        "{wrong} of {pages} pages asked for on node {node} lie elsewhere",
        "its cores read these from further away",
        "look whether the node is full, or a cpuset or memory policy forbids it (numactl --show)",
    ),
    "placement-unknown": (
        "the kernel does not tell on which node a page lies (move_pages): {nodes}",
        "whether memory is where it was asked for cannot be checked",
        "a seccomp profile that lets move_pages pass",
    ),
    "override": ("{variable} is {value}", "{cost}", "unset {variable}"),
    "gpu-unused": (
        "this machine has {gpus}, and {why}",
        "the CPU computes all experts",
        "a torch with CUDA (pytorch.org/get-started); where it has that: nvidia-smi, docker --gpus all",
    ),
    "page-lock-refused": (
        "memory cannot be page-locked: {why}",
        "each expert is copied twice on its way to the GPU, the first time by a core",
        _UNLIMITED,
    ),
    "memlock": (
        "a process may lock {size} of memory (RLIMIT_MEMLOCK)",
        "where the driver counts experts that are page-locked, those beyond it are copied twice",
        _UNLIMITED,
    ),
    "gpu-link": (
        "{gpu} is connected by {link}, and can have {most}{rest}",
        "weights cross the link in proportion to both",
        "another slot, a riser of that generation, or the BIOS (link speed, bifurcation)",
    ),
    "gpu-link-rate": (
        "copies to {gpu} reach {rate:.1f} GB/s of the {most:.1f} GB/s that its lanes carry",
        "weights arrive so much later",
        "look for another user of the link, a PCIe switch above it, an IOMMU that translates "
        "(iommu=pt), memory on another socket",
    ),
    "gpu-far": (
        "{gpu} is connected to node {node}, whose {what} this process may not use",
        "all weights cross the link between the sockets on their way",
        "numactl --cpunodebind, --membind, or docker --cpuset-cpus, --cpuset-mems with that node",
    ),
    "gpu-integrated": ("{gpu} shares its memory with the CPU", "experts are copied within one memory"),
    "gpu-old": ("{gpu} has {what}, and the kernels need 8.0 (NVIDIA's Ampere)", _ONE_BY_ONE),
    "no-triton": (
        "Triton is not installed",
        _ONE_BY_ONE,
        "pip install triton (torch's CUDA wheels for Linux bring it)",
    ),
    "omp-spins": (
        "{says}",
        "they take cores from the threads that compute experts and launch the GPU's kernels",
        "{mend}",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        name: one of `_TEXTS`.
        slow: it costs speed; otherwise it is only good to know.
        what, cost, mend: sentences without a full stop; mend is empty where nothing does.
    """

    name: str
    slow: bool
    what: str
    cost: str
    mend: str = ""


def find(machine: Machine) -> list[Finding]:
    """All findings, those that cost speed first."""
    found = [finding for check in _CHECKS for finding in check(machine)]
    return sorted(found, key=lambda finding: not finding.slow)


def _finding(name: str, slow: bool = True, **values: Any) -> Finding:
    return Finding(name, slow, *(text.format(**values) for text in _TEXTS[name]))


def _instruction_sets(m: Machine) -> Iterator[Finding]:
    hidden = sorted(_expected_flags(m) - m.flags) if m.flags else []
    if {"amx_tile", "amx_bf16"} <= m.flags and m.kernel_sets["amx"] != "available":
        yield _finding("amx-refused", selected=m.selected)
    elif hidden:
        yield _finding("instructions-hidden", selected=m.selected, hidden=", ".join(hidden))
    elif m.kernel_sets["avx512_bf16"] != "available":
        better = "AVX-512 with bf16, or AMX" if m.kernel_sets["avx512"] == "available" else "AVX-512"
        yield _finding("instructions-missing", False, selected=m.selected, better=better)


def _expected_flags(m: Machine) -> set[str]:
    if m.vendor == "GenuineIntel" and m.family == 6 and m.model in (143, 207, 173, 174):  # Sapphire Rapids on
        return {"avx512_bf16", "amx_tile", "amx_bf16"}
    zen4 = m.family == 25 and (0x10 <= m.model < 0x20 or 0x60 <= m.model < 0x80 or 0xA0 <= m.model < 0xB0)
    return {"avx512_bf16"} if m.vendor == "AuthenticAMD" and (zen4 or m.family == 26) else set()


def _cpus(m: Machine) -> Iterator[Finding]:
    mask, online, limit = m.mask, m.topology["online_cpus"], m.topology["cgroup_cpu_limit"]
    cpus, cores = m.topology["cpus"], m.topology["cores"]
    if len(mask) < online:
        yield _finding("affinity", some=len(mask), all=online, which=ranges_text(mask))
    if limit is not None and limit < len(mask):
        yield _finding("cpu-limit", limit=limit, mask=len(mask), threads=count_text(cores, "thread"))
    if m.threads > cpus:
        yield _finding("threads", threads=m.threads, cpus=count_text(cpus, "CPU"), cores=cores)
    elif m.threads > cores and m.topology["threads_per_core"] > 1:
        yield _finding("smt", False, threads=m.threads, on=count_text(cores, "core"), cores=cores)


def _governor(m: Machine) -> Iterator[Finding]:
    # These drivers' "powersave" lets the CPU itself choose, up to its highest clock.
    chosen_by_cpu = ("intel_pstate", "amd-pstate-epp")
    for (driver, governor), cpus in sorted(m.governors.items()):
        if governor != "performance":
            slow = driver not in chosen_by_cpu
            yield _finding("governor", slow, governor=governor, cpus=count_text(cpus, "CPU"))


def _huge_pages(m: Machine) -> Iterator[Finding]:
    if m.huge_pages == "never":
        yield _finding("huge-pages-off")
    for node in m.nodes:
        free, big = node["free_bytes"], m.big_blocks.get(node["id"])
        if m.huge_pages != "never" and big is not None and free > _GIB and big < free // 4:
            yield _finding("fragmented", node=node["id"], free=size_text(free), big=size_text(big))
    if m.reserved_bytes >= _GIB:
        yield _finding("huge-page-pool", False, size=size_text(m.reserved_bytes))


def _memory(m: Machine) -> Iterator[Finding]:
    with_memory = [node for node in m.nodes if node["memory_bytes"]]
    several, total = len(with_memory) > 1, sum(node["memory_bytes"] for node in with_memory)
    for node in with_memory:
        cache, size = node["cache_bytes"], node["memory_bytes"]
        # Among several nodes the kernel rather takes another's memory than drop what it holds of files.
        available = node["free_bytes"] + (0 if several else cache)
        if available < size // 10:
            drop = several and cache > size // 4
            yield _finding(
                "little-free",
                node=node["id"],
                free=size_text(available),
                size=size_text(size),
                files=f", {size_text(cache)} hold pages of files" if drop else "",
                lies="what does not fit lies on another node, further away"
                if several
                else "experts may not fit",
                mend="sync; echo 1 | sudo tee /proc/sys/vm/drop_caches"
                if drop
                else "end the programs that use it",
            )
    limit = m.topology["cgroup_memory_limit"]
    if limit is not None and limit < total // 2:
        yield _finding("memory-limit", False, limit=size_text(limit), all=size_text(total))


def _nodes(m: Machine) -> Iterator[Finding]:
    several = len(m.nodes) > 1
    for node in m.nodes:
        number, cpus, memory = node["id"], bool(node["cpus"]), node["memory_bytes"]
        if memory and not node["memory_allowed"]:
            cost = "its cores read all weights from another node" if cpus else "its memory is lost to experts"
            yield _finding("memory-not-allowed", cpus, node=number, cost=cost)
        elif several and cpus and not memory:
            yield _finding("node-without-memory", node=number)
        elif several and not cpus and memory:
            yield _finding("node-without-cpus", False, node=number, size=size_text(memory))
    if several and m.numa_balancing:
        yield _finding("numa-balancing")


def _placement(m: Machine) -> Iterator[Finding]:
    probes = m.probes if m.probes is not None and len(m.nodes) > 1 else []
    if refused := [probe["node"] for probe in probes if not probe["asked"]]:
        yield _finding("placement-refused", nodes=ranges_text(refused))
    for probe in probes:
        if wrong := probe["pages"] - probe["right"] - probe["unknown"]:
            yield _finding("placed-elsewhere", wrong=wrong, pages=probe["pages"], node=probe["node"])
    if unknown := [probe["node"] for probe in probes if probe["unknown"] == probe["pages"]]:
        yield _finding("placement-unknown", False, nodes=ranges_text(unknown))


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
            yield _finding("override", variable=name, value=value, cost=cost)


def _gpus(m: Machine) -> Iterator[Finding]:
    gpus = m.gpus.gpus
    if gpus and m.gpus.without_cuda:
        yield _finding("gpu-unused", gpus=count_text(len(gpus), "NVIDIA GPU"), why=m.gpus.without_cuda)
        return
    for number, gpu in enumerate(gpus):
        yield from _link(m, f"GPU {number}", gpu)
        yield from _kernels(m, f"GPU {number}", gpu)
    if m.gpus.page_lock not in ("", "pinned"):
        yield _finding("page-lock-refused", why=m.gpus.page_lock)
    elif gpus and m.gpus.memlock is not None and (not m.gpus.page_lock or m.gpus.memlock >= COPY_BYTES):
        # Locked in spite of a lower limit: the driver does not count it.
        yield _finding("memlock", False, size=size_text(m.gpus.memlock))


def _link(m: Machine, name: str, gpu: Gpu) -> Iterator[Finding]:
    link, rate = gpu.link, gpu.page_locked
    if link is None or gpu.integrated or (rate is not None and link.rate is not None and rate > link.rate):
        return  # a virtual machine may say anything about the link
    fewer = link.lanes is not None and link.most_lanes is not None and link.lanes < link.most_lanes
    slower = (
        link.generation is not None
        and link.most_generation is not None
        and link.generation < link.most_generation
    )
    if fewer or slower:
        # At rest GPUs lower the speed, but not the number of lanes.
        certain = fewer or rate is not None
        now, most = (
            f"PCIe {generation or '?'} x{lanes or '?'}"
            for generation, lanes in ((link.generation, link.lanes), (link.most_generation, link.most_lanes))
        )
        rest = "" if certain else "; it may be at rest"
        yield _finding("gpu-link", certain, gpu=name, link=now, most=most, rest=rest)
    if rate is not None and link.rate is not None and rate < _LEAST * link.rate:
        yield _finding("gpu-link-rate", gpu=name, rate=rate / 1e9, most=link.rate / 1e9)
    node = next((node for node in m.nodes if node["id"] == link.node), None)
    if node is not None and len(m.nodes) > 1 and not (node["cpus"] and node["memory_allowed"]):
        yield _finding("gpu-far", gpu=name, node=link.node, what="memory" if node["cpus"] else "cores")


def _kernels(m: Machine, name: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.name and gpu.integrated:
        yield _finding("gpu-integrated", False, gpu=name)
    if gpu.name and gpu.capability < (8, 0):
        major, minor = gpu.capability
        what = f"compute capability {major}.{minor}" if major else "no CUDA"
        yield _finding("gpu-old", gpu=name, what=what)
    elif gpu.name and m.gpus.triton is False:
        yield _finding("no-triton")


def _spinning(m: Machine) -> Iterator[Finding]:
    """OpenMP's threads, torch's, that wait busily."""
    policy, spins = (m.environment.get(name, "") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    many = spins.lower().startswith("inf") or (spins.isdecimal() and int(spins) > _MANY_SPINS)
    if policy.lower() == "active" or many:
        which = f"GOMP_SPINCOUNT is {spins[:20]}" if many else f"OMP_WAIT_POLICY is {policy}"
        says = f"{which}: torch's threads stay awake while they wait"
        yield _finding("omp-spins", says=says, mend=f"unset {which.split()[0]}, or OMP_WAIT_POLICY=passive")
    elif m.gpus.page_lock and not policy and not spins:  # a GPU, and not that of a recorded machine
        says = "OMP_WAIT_POLICY is not set: torch's threads stay awake for milliseconds after every loop"
        yield _finding("omp-spins", says=says, mend="OMP_WAIT_POLICY=passive before Python starts")


_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _instruction_sets, _cpus, _governor, _huge_pages, _memory, _nodes, _placement, _overrides, _gpus,
    _spinning,
)  # fmt: skip
