"""What `kt-moe doctor` looks at: the topology, settings of the kernel, kernels, overrides and a probe.

Settings are those of Documentation/admin-guide (mm/transhuge, mm/hugetlbpage, sysctl/kernel, pm/cpufreq)
and of proc(5). What cannot be read is None or empty.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_moe import _core
from kt_moe.cli.doctor.gpus import Gpus, read_gpus
from kt_moe.host_memory import free_memory, read_text, resident

OVERRIDES = ("KT_MOE_ISA", "KT_MOE_THREADS", "KT_MOE_SHARDS", "KT_MOE_NODES", "KT_MOE_PROFILE")
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@dataclass(frozen=True)
class Machine:
    """A machine as one process sees it. As JSON its fields have the same names.

    Attributes:
        topology: what `_core.read_topology` returns.
        cpu: vendor, family and model of /proc/cpuinfo; isa_flags: its flags.
        kernel_sets: name -> "available", or why not; `selected` runs.
        threads, shards: of a default runtime.
        memory_bytes: of all nodes; available_bytes: that a run may take, as `kt-moe plan` counts them.
        transparent_huge_pages: "always", "madvise" or "never".
        shared_huge_pages: the same of memory that processes share, "advise", "never", "deny" and others.
        governors: of the CPUs in the affinity mask: how many; frequency_driver: theirs.
        numa_balancing: /proc/sys/kernel/numa_balancing; 0 is off.
        huge_page_pool_bytes: unused huge pages that only programs that ask for them get.
        overrides, environment: variables of `OVERRIDES` and `OPENMP` that are set.
        probes: what `_core.probe_nodes` returns.
    """

    topology: dict[str, Any]
    kernel_sets: dict[str, str]
    selected: str
    threads: int
    shards: int = 1
    memory_bytes: int = 0
    available_bytes: int = 0
    cpu: tuple[str, int, int] = ("", 0, 0)
    isa_flags: tuple[str, ...] = ()
    transparent_huge_pages: str | None = None
    shared_huge_pages: str | None = None
    governors: dict[str, int] = field(default_factory=dict)
    frequency_driver: str = ""
    numa_balancing: int | None = None
    huge_page_pool_bytes: int = 0
    overrides: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    gpus: Gpus = field(default_factory=Gpus)
    probes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """NUMA nodes, as in `kt_moe.cpu_info()`."""
        nodes: list[dict[str, Any]] = self.topology["nodes"]
        return nodes


def read_machine() -> Machine:
    """The one this runs on.

    Raises:
        ValueError: an override that does not hold here.
    """
    info, runtime = _core.cpu_info(), _core.Runtime(None, None, None, None)
    return Machine(
        kernel_sets=info["kernel_sets"],
        selected=info["selected"],
        threads=runtime.threads,
        shards=runtime.shards,
        available_bytes=free_memory() + resident("RssAnon"),  # a run will not be beside this process
        overrides={name: os.environ[name] for name in OVERRIDES if os.environ.get(name)},
        environment={name: os.environ[name] for name in OPENMP if os.environ.get(name)},
        gpus=read_gpus(),
        probes=_core.probe_nodes(),
        **settings_of(Path("/")),
    )


def settings_of(root: Path) -> dict[str, Any]:
    """What the files below `root` say, by the names of `Machine`'s fields."""
    topology = _core.read_topology(str(root))
    cpu, memory = (_fields(read_text(root / "proc" / name)) for name in ("cpuinfo", "meminfo"))
    used = set().union(*_core.kernel_flags().values())
    huge = root / "sys/kernel/mm/transparent_hugepage"
    chosen, of_shared = (
        re.search(r"\[(\w+)\]", read_text(huge / name)) for name in ("enabled", "shmem_enabled")
    )
    balancing = read_text(root / "proc/sys/kernel/numa_balancing").strip()
    cpus = [cpu for node in topology["nodes"] for cpu in node["cpus"]]
    folders = [root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq" for cpu in cpus]
    governors = Counter(read_text(folder / "scaling_governor").strip() for folder in folders)
    del governors[""]
    return {
        "topology": topology,
        "memory_bytes": _number(memory, "MemTotal") * 1024,
        "cpu": (cpu.get("vendor_id", ""), _number(cpu, "cpu family"), _number(cpu, "model")),
        "isa_flags": tuple(sorted(used & set(cpu.get("flags", "").split()))),
        "transparent_huge_pages": chosen[1] if chosen else None,
        "shared_huge_pages": of_shared[1] if of_shared else None,
        "governors": dict(governors),
        "frequency_driver": max(
            (read_text(folder / "scaling_driver").strip() for folder in folders), default=""
        ),
        "numa_balancing": int(balancing) if re.fullmatch("[0-9]{1,9}", balancing) else None,
        "huge_page_pool_bytes": _number(memory, "HugePages_Free") * _number(memory, "Hugepagesize") * 1024,
    }


def _fields(text: str) -> dict[str, str]:
    """Lines "name : value" up to the first empty one."""
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _number(fields: dict[str, str], name: str) -> int:
    match = re.match("[0-9]{1,15}", fields.get(name, ""))
    return int(match[0]) if match else 0
