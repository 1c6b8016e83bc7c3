"""What `kt-moe doctor` looks at: the topology, settings of the kernel, kernels, overrides and a probe.

Settings are those of Documentation/admin-guide (mm/transhuge, mm/hugetlbpage, sysctl/kernel, pm/cpufreq)
and of proc(5). What cannot be read is None or empty.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_moe import _core
from kt_moe.cli.doctor.gpus import Gpus, read_gpus, recorded_gpus

OVERRIDES = ("KT_MOE_ISA", "KT_MOE_THREADS", "KT_MOE_SHARDS", "KT_MOE_NODES", "KT_MOE_PROFILE")
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_BIG_BLOCK = 9  # pages of 4 KiB in powers of two: 2 MiB


@dataclass(frozen=True)
class Machine:
    """A machine as one process sees it.

    Attributes:
        topology: what `_core.read_topology` returns.
        flags, vendor, family, model: of /proc/cpuinfo.
        kernel_sets: name -> "available", or why not.
        selected: the kernel set that runs.
        threads, shards: of a default runtime.
        huge_pages: "always", "madvise" or "never" (transparent huge pages).
        governors: of the CPUs in the affinity mask, by driver and governor: how many.
        numa_balancing: /proc/sys/kernel/numa_balancing; 0 is off.
        reserved_bytes: unused huge pages of the kernel's pool, which only programs that ask for them get.
        big_blocks: node -> free bytes in blocks of 2 MiB and more.
        overrides: environment variables in force.
        environment: of `OPENMP`, those that are set.
        gpus: without measurements, if it is not the machine this runs on.
        probes: what `_core.probe_nodes` returns; None: not the machine this runs on.
    """

    topology: dict[str, Any]
    kernel_sets: dict[str, str]
    selected: str
    threads: int
    shards: int = 1
    vendor: str = ""
    family: int = 0
    model: int = 0
    flags: frozenset[str] = frozenset()
    huge_pages: str | None = None
    governors: dict[tuple[str, str], int] = field(default_factory=dict)
    numa_balancing: int | None = None
    reserved_bytes: int = 0
    big_blocks: dict[int, int] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    gpus: Gpus = field(default_factory=Gpus)
    probes: list[dict[str, Any]] | None = None

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """NUMA nodes, as in `kt_moe.cpu_info()`."""
        nodes: list[dict[str, Any]] = self.topology["nodes"]
        return nodes

    @property
    def mask(self) -> list[int]:
        """CPUs that this process may run on."""
        return sorted(cpu for node in self.nodes for cpu in node["cpus"])


def read_machine() -> Machine:
    """The one this runs on.

    Raises:
        ValueError: an override that does not hold here.
    """
    info = _core.cpu_info()
    topology = _core.read_topology("/")
    runtime = _core.Runtime(None, None, None, None)
    return Machine(
        topology,
        info["kernel_sets"],
        info["selected"],
        runtime.threads,
        shards=runtime.shards,
        overrides={name: os.environ[name] for name in OVERRIDES if os.environ.get(name)},
        environment={name: os.environ[name] for name in OPENMP if os.environ.get(name)},
        gpus=read_gpus(),
        probes=_core.probe_nodes(),
        **_settings(Path("/"), topology),
    )


def read_recorded(root: Path) -> Machine:
    """The one whose /proc and /sys are below `root`: all but its environment and the probe."""
    topology = _core.read_topology(str(root))
    settings = _settings(root, topology)
    sets: dict[str, str] = {}
    for name, flags in _core.kernel_flags().items():
        missing = set(flags) - settings["flags"]
        sets[name] = "this CPU lacks " + ", ".join(sorted(missing)) if missing else "available"
    selected = [name for name, state in sets.items() if state == "available"][-1]
    shards = max(1, nodes_with_cpus(topology))
    return Machine(topology, sets, selected, topology["cores"], shards, gpus=recorded_gpus(root), **settings)


def nodes_with_cpus(topology: dict[str, Any]) -> int:
    """How many NUMA nodes have a CPU of this process."""
    return sum(bool(node["cpus"]) for node in topology["nodes"])


def _settings(root: Path, topology: dict[str, Any]) -> dict[str, Any]:
    cpuinfo = _fields(_read(root / "proc/cpuinfo"))
    meminfo = _fields(_read(root / "proc/meminfo"))
    balancing = _read(root / "proc/sys/kernel/numa_balancing").strip()
    chosen = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    governors: dict[tuple[str, str], int] = {}
    for cpu in (cpu for node in topology["nodes"] for cpu in node["cpus"]):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        if governor := _read(folder / "scaling_governor").strip():
            key = _read(folder / "scaling_driver").strip(), governor
            governors[key] = governors.get(key, 0) + 1
    return {
        "vendor": cpuinfo.get("vendor_id", ""),
        "family": _number(cpuinfo.get("cpu family", "")),
        "model": _number(cpuinfo.get("model", "")),
        "flags": frozenset(cpuinfo.get("flags", "").split()),
        "huge_pages": chosen[1] if chosen else None,
        "governors": governors,
        "numa_balancing": int(balancing) if re.fullmatch("[0-9]{1,9}", balancing) else None,
        "reserved_bytes": _number(meminfo.get("HugePages_Free", ""))
        * _number(meminfo.get("Hugepagesize", ""))
        * 1024,
        "big_blocks": _big_blocks(_read(root / "proc/buddyinfo")),
    }


def _big_blocks(buddyinfo: str) -> dict[int, int]:
    """Free bytes in big blocks by node: "Node 0, zone Normal 5 0 3 ..." counts blocks of 1, 2, 4... pages."""
    found: dict[int, int] = {}
    for node, counts in re.findall(
        r"^Node (\d{1,4}), zone +\w+((?: +\d{1,12})+) *$", buddyinfo, re.MULTILINE
    ):
        blocks = list(enumerate(map(int, counts.split())))[_BIG_BLOCK:]
        size = sum(count * 4096 << order for order, count in blocks)
        found[int(node)] = found.get(int(node), 0) + size
    return found


def _fields(text: str) -> dict[str, str]:
    """Lines "name : value" up to the first empty one."""
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _number(text: str) -> int:
    match = re.match("[0-9]{1,15}", text)
    return int(match[0]) if match else 0


def _read(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
