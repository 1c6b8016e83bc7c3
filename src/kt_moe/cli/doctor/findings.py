"""What costs speed on a machine, what that costs, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kt_moe.cli.doctor.gpus import Gpu
from kt_moe.cli.doctor.machine import Machine
from kt_moe.cli.text import count_text, ranges_text, size_text

_GIB = 2**30
_LEAST = 0.6  # of what the lanes carry; copies reach 0.8 to 0.9 of it
_MANY_SPINS = 100_000
_ONE_BY_ONE = "plain torch multiplies, an expert at a time"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        name: for programs, the same in every version.
        what, cost, mend: sentences without a full stop; mend is empty where nothing does.
        slow: it costs speed; otherwise it is only good to know.
    """

    name: str
    what: str
    cost: str
    mend: str = ""
    slow: bool = True


def find(machine: Machine) -> list[Finding]:
    """All findings, those that cost speed first."""
    found = [finding for check in _CHECKS for finding in check(machine)]
    return sorted(found, key=lambda finding: not finding.slow)


def _instruction_sets(m: Machine) -> Iterator[Finding]:
    vendor, family, model = m.cpu
    expected: set[str] = set()
    if vendor == "GenuineIntel" and family == 6 and model in (143, 207, 173, 174):  # Sapphire Rapids on
        expected = {"avx512_bf16", "amx_tile", "amx_bf16"}
    zen4 = family == 25 and (0x10 <= model < 0x20 or 0x60 <= model < 0x80 or 0xA0 <= model < 0xB0)
    if vendor == "AuthenticAMD" and (zen4 or family == 26):
        expected = {"avx512_bf16"}
    hidden = sorted(expected - set(m.isa_flags)) if m.isa_flags else []
    cost = f"{m.selected} kernels run, which are slower"
    if {"amx_tile", "amx_bf16"} <= set(m.isa_flags) and m.kernel_sets["amx"] != "available":
        yield Finding(
            "amx-refused",
            "the CPU has AMX, and the kernel does not let this process use it",
            cost,
            "Linux 5.16 or newer, and a seccomp filter that lets arch_prctl pass",
        )
    elif hidden:
        yield Finding(
            "instructions-hidden",
            f"CPUs of this family have {', '.join(hidden)}, and this one does not show it",
            cost,
            "in a virtual machine pass the host's CPU through (QEMU: -cpu host; libvirt: host-passthrough); "
            "else look at the BIOS, and for clearcpuid in /proc/cmdline",
        )


def _cpus(m: Machine) -> Iterator[Finding]:
    mask = sorted(cpu for node in m.nodes for cpu in node["cpus"])
    online, limit = m.topology["online_cpus"], m.topology["cgroup_cpu_limit"]
    cores = m.topology["cores"]
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
            f"{count_text(cores, 'thread')} by default, and all pause when the time is used up",
            "docker --cpus, Kubernetes' limits.cpu or systemd's CPUQuota set it",
        )
    for governor, number in m.governors.items():
        if governor != "performance":
            yield Finding(
                "governor",
                f"the frequency governor is {governor} on {count_text(number, 'CPU')}",
                "cores may run below their highest clock, most of all when work begins",
                "sudo cpupower frequency-set -g performance",
                # These drivers' "powersave" lets the CPU itself choose, up to its highest clock.
                slow=m.frequency_driver not in ("intel_pstate", "amd-pstate-epp"),
            )


def _huge_pages(m: Machine) -> Iterator[Finding]:
    if m.transparent_huge_pages == "never":
        yield Finding(
            "huge-pages-off",
            "transparent huge pages are off",
            "weights and scratch lie in pages of 4 KiB, whose addresses take longer to look up",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if m.shared_huge_pages in ("never", "deny"):
        yield Finding(
            "shared-huge-pages-off",
            "memory that processes share has no transparent huge pages",
            "experts that several processes share lie in pages of 4 KiB, and take a tenth longer",
            "echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled, where processes share "
            "experts",
            slow=False,
        )
    if m.huge_page_pool_bytes >= _GIB:
        yield Finding(
            "huge-page-pool",
            f"{size_text(m.huge_page_pool_bytes)} are kept in the kernel's pool of huge pages",
            "experts of one process cannot have them: its huge pages are transparent ones, from ordinary "
            "memory; experts that several processes share can",
            "sudo sysctl vm.nr_hugepages=0, unless processes share experts or another program wants them",
            slow=False,
        )


def _memory(m: Machine) -> Iterator[Finding]:
    with_memory = [node for node in m.nodes if node["memory_bytes"]]
    total, limit = m.memory_bytes, m.topology["cgroup_memory_limit"]
    if m.available_bytes < total // 10:
        yield Finding(
            "little-free",
            f"{size_text(m.available_bytes)} of {size_text(total)} are left for a run",
            "experts may not fit",
            "end the programs that use it" + (", or raise the control group's limit" if limit else ""),
        )
    for node in with_memory if len(with_memory) > 1 else ():
        # The kernel rather takes another node's memory than drop what this one holds of files.
        free, size, files = node["free_bytes"], node["memory_bytes"], node["cache_bytes"]
        if free < size // 10:
            drop = files > size // 4
            yield Finding(
                "node-full",
                f"node {node['id']}: {size_text(free)} of {size_text(size)} free"
                + (f", {size_text(files)} hold pages of files" if drop else ""),
                "what does not fit lies on another node, further away",
                "sync; echo 1 | sudo tee /proc/sys/vm/drop_caches"
                if drop
                else "end the programs that use it",
            )


def _nodes(m: Machine) -> Iterator[Finding]:
    several = len(m.nodes) > 1
    for node in m.nodes:
        number, cpus, memory = node["id"], bool(node["cpus"]), node["memory_bytes"]
        if memory and not node["memory_allowed"]:
            yield Finding(
                "memory-not-allowed",
                f"node {number} may give this process no memory",
                "its cores read all weights from another node" if cpus else "its memory is lost to experts",
                "docker --cpuset-mems, numactl --membind or a batch system set it",
                slow=cpus,
            )
        elif several and cpus and not memory:
            yield Finding(
                "node-without-memory",
                f"node {number} has cores and no memory",
                "its cores read all weights from another node",
                "put memory modules into its channels, or look whether the BIOS hides them",
            )
    if several and m.numa_balancing:
        yield Finding(
            "numa-balancing",
            "automatic NUMA balancing is on",
            "the kernel takes pages away for a moment to see who wants them, and moves some of them",
            "echo 0 | sudo tee /proc/sys/kernel/numa_balancing",
        )
    probes = m.probes if several else []
    if refused := [probe["node"] for probe in probes if not probe["asked"]]:
        yield Finding(
            "placement-refused",
            f"the kernel does not place memory on nodes when asked (mbind): {ranges_text(refused)}",
            "pages come from the node of the thread that first touches them, and no others can be asked for",
            "docker --cap-add SYS_NICE (its default seccomp profile refuses mbind), or another profile",
        )
    for probe in probes:
        if wrong := probe["pages"] - probe["right"] - probe["unknown"]:
            yield Finding(
                "placed-elsewhere",
                f"{wrong} of {probe['pages']} pages asked for on node {probe['node']} lie elsewhere",
                "its cores read these from further away",
                "look whether the node is full, or a cpuset or memory policy forbids it (numactl --show)",
            )


def _gpus(m: Machine) -> Iterator[Finding]:
    gpus = m.gpus
    if gpus.gpus and gpus.without_cuda:
        yield Finding(
            "gpu-unused",
            f"this machine has {count_text(len(gpus.gpus), 'NVIDIA GPU')}, and {gpus.without_cuda}",
            "the CPU computes all experts",
            "a torch with CUDA (pytorch.org/get-started); where it has that: nvidia-smi, docker --gpus all",
        )
        return
    for number, gpu in enumerate(gpus.gpus):
        name, (major, minor) = f"GPU {number}", gpu.capability
        yield from _link(m, name, gpu)
        if gpu.name and gpu.capability < (8, 0):
            what = f"compute capability {major}.{minor}" if major else "no CUDA"
            yield Finding(
                "gpu-old", f"{name} has {what}, and the kernels need 8.0 (NVIDIA's Ampere)", _ONE_BY_ONE
            )
    if gpus.triton is False:
        mend = "pip install triton (torch's CUDA wheels for Linux bring it)"
        yield Finding("no-triton", "Triton is not installed", _ONE_BY_ONE, mend)
    if gpus.page_lock not in ("", "pinned"):
        yield Finding(
            "page-lock-refused",
            f"memory cannot be page-locked: {gpus.page_lock}",
            "each expert is copied twice on its way to the GPU, the first time by a core",
            "ulimit -l unlimited (LimitMEMLOCK= of systemd, docker --ulimit memlock=-1)",
        )


def _link(m: Machine, name: str, gpu: Gpu) -> Iterator[Finding]:
    """A measured rate decides: a virtual machine may say anything, and GPUs at rest lower the speed."""
    if (link := gpu.link) is None:
        return
    rate, most = gpu.copy_rate, link.most_rate
    narrow = rate is None and link.lanes is not None and link.lanes < (link.most_lanes or 0)
    if narrow or (rate is not None and rate < _LEAST * most):
        states = ((link.generation, link.lanes), (link.most_generation, link.most_lanes))
        now, best = (f"PCIe {generation or '?'} x{lanes or '?'}" for generation, lanes in states)
        reached = "" if rate is None else f", and copies reach {rate / 1e9:.1f} of {most / 1e9:.1f} GB/s"
        yield Finding(
            "gpu-link",
            f"{name} is connected by {now}, can have {best}{reached}",
            "weights cross the link in proportion to it",
            "another slot or riser, or the BIOS (link speed, bifurcation)"
            if now != best
            else "look for another user of the link, a PCIe switch above it, an IOMMU that translates "
            "(iommu=pt), memory on another socket",
        )
    node = next((node for node in m.nodes if node["id"] == link.node), None)
    if node is not None and len(m.nodes) > 1 and not (node["cpus"] and node["memory_allowed"]):
        yield Finding(
            "gpu-far",
            f"{name} is connected to node {link.node}, whose {'memory' if node['cpus'] else 'cores'} "
            "this process may not use",
            "all weights cross the link between the sockets on their way",
            "numactl --cpunodebind, --membind, or docker --cpuset-cpus, --cpuset-mems with that node",
        )


def _spinning(m: Machine) -> Iterator[Finding]:
    """OpenMP's threads, torch's, that wait busily."""
    policy, spins = (m.environment.get(name, "") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    many = spins.lower().startswith("inf") or (spins.isdecimal() and int(spins) > _MANY_SPINS)
    cost = "they take cores from the threads that compute experts and launch the GPU's kernels"
    if policy.lower() == "active" or many:
        which = f"GOMP_SPINCOUNT is {spins[:20]}" if many else f"OMP_WAIT_POLICY is {policy}"
        mend = f"unset {which.split()[0]}, or OMP_WAIT_POLICY=passive"
        yield Finding("omp-spins", f"{which}: torch's threads stay awake while they wait", cost, mend)
    elif m.gpus.page_lock and not policy and not spins:  # a GPU
        says = "OMP_WAIT_POLICY is not set: torch's threads stay awake for milliseconds after every loop"
        yield Finding("omp-spins", says, cost, "OMP_WAIT_POLICY=passive before Python starts")


_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _instruction_sets, _cpus, _huge_pages, _memory, _nodes, _gpus, _spinning,
)  # fmt: skip
