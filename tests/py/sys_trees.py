"""Recorded machines: trees of /sys and /proc as Linux lays them out, from a compact description.

The layout is that of Documentation/ABI (sysfs-devices-node, sysfs-devices-system-cpu), of proc(5) and of
Documentation/admin-guide (cgroup-v1, cgroup-v2, mm/transhuge, sysctl/kernel).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kt_moe import _core
from kt_moe.cli.doctor import machine as seen
from kt_moe.cli.terminal import ranges_text
from kt_moe.host_memory import free_memory

SAPPHIRE_RAPIDS = ("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8480+")
GENOA = ("AuthenticAMD", 25, 17, "AMD EPYC 9554 64-Core Processor")
AVX512 = "avx2 fma f16c avx512f avx512dq avx512bw avx512vl"
AMX = f"{AVX512} avx512_bf16 amx_bf16 amx_tile amx_int8"


@dataclass(frozen=True)
class Node:
    """A NUMA node.

    Attributes:
        cores: the CPUs of each.
        gib: its memory; `free` of it is free.
        package: the socket of its cores.
        l3: cores that share an L3; None: all of the package.
    """

    id: int
    cores: tuple[tuple[int, ...], ...] = ()
    gib: float = 64
    free: float = 0.9
    package: int = 0
    l3: int | None = None

    @property
    def cpus(self) -> list[int]:
        """Ascending."""
        return sorted(itertools.chain(*self.cores))


@dataclass(frozen=True)
class Machine:
    """What a tree is made from.

    Attributes:
        distances: of each node to each; None: 10 to itself, 12 within its package, 32 beyond.
        offline: CPUs that are there and off.
        allowed: the affinity mask in proc/self/status; None: all CPUs that are online.
        mems: nodes that may give memory; None: all.
        cpu: vendor, family, model, name.
        files: further ones, and others in their place; None: there is none.
    """

    nodes: tuple[Node, ...]
    distances: tuple[tuple[int, ...], ...] | None = None
    offline: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None
    mems: tuple[int, ...] | None = None
    cpu: tuple[str, int, int, str] = SAPPHIRE_RAPIDS
    flags: str = AMX
    files: dict[str, str | None] = field(default_factory=dict)

    @property
    def cpus(self) -> list[int]:
        """Those that are online, ascending."""
        return sorted(set(itertools.chain(*(n.cpus for n in self.nodes))) - set(self.offline))

    def with_files(self, files: dict[str, str | None]) -> Machine:
        """The same with these files too."""
        return replace(self, files={**self.files, **files})


def gpu(address: str = "0000:17:00.0", vendor: str = "0x10de") -> dict[str, str | None]:
    """Files of a GPU."""
    here = f"sys/bus/pci/devices/{address}"
    return {f"{here}/vendor": f"{vendor}\n", f"{here}/class": "0x030200\n"}


def list_text(numbers: Iterable[int]) -> str:
    """As the kernel writes lists: "0-3,8"."""
    return ranges_text(sorted(numbers)).replace(" ", "")


def write_tree(root: Path, machine: Machine) -> Path:
    """Write the machine's files below `root`, and return it."""
    files: dict[str, str | None] = {**_proc(machine), **_cpus(machine), **_nodes(machine), **machine.files}
    for name, text in files.items():
        if text is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def _proc(machine: Machine) -> dict[str, str]:
    vendor, family, model, name = machine.cpu
    allowed = machine.cpus if machine.allowed is None else machine.allowed
    mems = [n.id for n in machine.nodes if n.gib] if machine.mems is None else machine.mems
    total = sum(n.gib for n in machine.nodes)
    free = sum(n.gib * n.free for n in machine.nodes)
    return {
        "proc/cpuinfo": f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        f"model name\t: {name}\nflags\t\t: fpu {machine.flags}\n\n",
        "proc/meminfo": f"MemTotal:  {_kib(total)} kB\nMemFree:  {_kib(free)} kB\n"
        f"MemAvailable:  {_kib(free)} kB\n",
        "proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{list_text(allowed)}\n"
        f"Mems_allowed_list:\t{list_text(mems)}\n",
        "proc/self/cgroup": "0::/\n",
        "proc/sys/kernel/numa_balancing": "0\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    }


def _cpus(machine: Machine) -> dict[str, str]:
    top = "sys/devices/system/cpu"
    everyone = set(machine.cpus) | set(machine.offline)
    files = {
        f"{top}/online": list_text(machine.cpus) + "\n",
        f"{top}/offline": list_text(machine.offline) + "\n",
        f"{top}/present": list_text(everyone) + "\n",
    }
    for node in machine.nodes:
        package = [n for n in machine.nodes if n.package == node.package]
        for number, core in enumerate(node.cores):
            if node.l3 is None:
                sharers = set(itertools.chain(*(n.cpus for n in package)))
            else:
                first = number // node.l3 * node.l3
                sharers = set(itertools.chain(*node.cores[first : first + node.l3]))
            siblings = set(core) - set(machine.offline)
            for cpu in siblings:
                here = f"{top}/cpu{cpu}"
                files |= {
                    f"{here}/topology/core_cpus_list": list_text(siblings) + "\n",
                    f"{here}/topology/thread_siblings_list": list_text(siblings) + "\n",
                    f"{here}/topology/physical_package_id": f"{node.package}\n",
                    f"{here}/topology/die_id": "0\n",
                    f"{here}/topology/core_id": f"{core[0]}\n",
                    f"{here}/cpufreq/scaling_governor": "performance\n",
                }
                caches = [
                    (1, "Data", "48K", siblings),
                    (1, "Instruction", "32K", siblings),
                    (2, "Unified", "2048K", siblings),
                    (3, "Unified", "32M", sharers - set(machine.offline)),
                ]
                for index, (level, kind, size, shared) in enumerate(caches):
                    cache = f"{here}/cache/index{index}"
                    files |= {
                        f"{cache}/level": f"{level}\n",
                        f"{cache}/type": f"{kind}\n",
                        f"{cache}/size": f"{size}\n",
                        f"{cache}/shared_cpu_list": list_text(shared) + "\n",
                    }
    return files


def _nodes(machine: Machine) -> dict[str, str]:
    top = "sys/devices/system/node"
    files = {
        f"{top}/online": list_text(n.id for n in machine.nodes) + "\n",
        f"{top}/has_memory": list_text(n.id for n in machine.nodes if n.gib) + "\n",
    }
    for i, node in enumerate(machine.nodes):
        row = machine.distances[i] if machine.distances else [_distance(node, n) for n in machine.nodes]
        online = [cpu for cpu in node.cpus if cpu not in machine.offline]
        lines = {"MemTotal": _kib(node.gib), "MemFree": _kib(node.gib * node.free), "Active(file)": 2048}
        files |= {
            f"{top}/node{node.id}/cpulist": list_text(online) + "\n",
            f"{top}/node{node.id}/distance": " ".join(map(str, row)) + "\n",
            f"{top}/node{node.id}/meminfo": "".join(
                f"Node {node.id} {name}:  {kib} kB\n" for name, kib in lines.items()
            ),
        }
    return files


def _distance(a: Node, b: Node) -> int:
    return 10 if a is b else 12 if a.package == b.package else 32


def _kib(gib: float) -> int:
    return int(gib * 2**20)


def cores(first: int, count: int, sibling: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Cores of the CPUs first, first + 1, ..., with SMT siblings `sibling` further on."""
    return tuple((c,) if sibling is None else (c, c + sibling) for c in range(first, first + count))


def xeon_snc2() -> Machine:
    """Two sockets of 56 cores, each two nodes; 224 CPUs."""
    return Machine(tuple(Node(n, cores(28 * n, 28, 112), 256, package=n // 2) for n in range(4)))


def epyc_nps4() -> Machine:
    """Two sockets of four nodes of 16 cores; eight cores share an L3; 256 CPUs."""
    nodes = tuple(Node(n, cores(16 * n, 16, 128), 96, package=n // 4, l3=8) for n in range(8))
    return Machine(nodes, cpu=GENOA, flags=f"{AVX512} avx512_bf16")


def single() -> Machine:
    """One node of eight cores without SMT."""
    return Machine((Node(0, cores(0, 8)),))


def cxl() -> Machine:
    """One socket, and a node that is memory alone."""
    return Machine((Node(0, cores(0, 16, 16)), Node(1, (), 256)), distances=((10, 14), (14, 10)))


def gaps() -> Machine:
    """Nodes 0, 2 and 8, as on POWER, and where sockets are empty."""
    return Machine(tuple(Node(n, cores(8 * i, 8), package=i) for i, n in enumerate((0, 2, 8))))


def memoryless() -> Machine:
    """Node 1 has CPUs and no memory; node 2 is nearer to it than node 0."""
    nodes = tuple(Node(n, cores(8 * n, 8), 0 if n == 1 else 64, package=n) for n in range(3))
    return Machine(nodes, distances=((10, 32, 32), (32, 10, 12), (32, 12, 10)))


def offline() -> Machine:
    """Two nodes with SMT; the siblings of node 0 and the last core of node 1 are off."""
    nodes = tuple(Node(n, cores(8 * n, 8, 16), package=n) for n in range(2))
    return Machine(nodes, offline=(*range(16, 24), 15, 31))


def asymmetric() -> Machine:
    """A node of 24 cores and one of 8."""
    return Machine((Node(0, cores(0, 24), 192), Node(1, cores(24, 8), 32, package=1)))


def sixteen() -> Machine:
    """Sixteen nodes of 128 CPUs: more than 1024 in all."""
    return Machine(tuple(Node(n, cores(64 * n, 64, 1024), 128, package=n) for n in range(16)))


def container() -> Machine:
    """Twelve CPUs, and no folder of nodes."""
    machine = Machine((Node(0, cores(0, 12)),))
    return machine.with_files({name: None for name in _nodes(machine)})


MACHINES: dict[str, Callable[[], Machine]] = {
    make.__name__: make
    for make in (
        xeon_snc2,
        epyc_nps4,
        single,
        cxl,
        gaps,
        memoryless,
        offline,
        asymmetric,
        sixteen,
        container,
    )
}


def read_tree(root: Path) -> dict[str, Any]:
    """The machine whose /proc and /sys are below `root`, as the doctor sees one without measurements."""
    settings, sets = seen.settings_of(root), {}
    for name, flags in _core.kernel_flags().items():
        missing = set(flags) - set(settings["isa_flags"])
        sets[name] = "this CPU lacks " + ", ".join(sorted(missing)) if missing else "available"
    topology = settings["topology"]
    return {
        **settings,
        "kernel_sets": sets,
        "selected": [name for name, state in sets.items() if state == "available"][-1],
        "threads": topology["cores"],
        "shards": max(1, sum(bool(node["cpus"]) for node in topology["nodes"])),
        "available_bytes": free_memory(root),
        "environment": {},
        "probes": [],
        "gpus": [],
    }
