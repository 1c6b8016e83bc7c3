"""What `kt-moe doctor` looks at: the topology, settings of the kernel, kernel sets, GPUs and a probe.

Settings are those of Documentation/admin-guide/mm/transhuge and of proc(5), GPUs' connections those of
Documentation/ABI/testing/sysfs-bus-pci. What cannot be read is empty or 0.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kt_moe import Experts, Rates, _core
from kt_moe.cli.bench.cases import Shape
from kt_moe.cli.bench.layers import make_weights
from kt_moe.cli.text import count_text, size_text
from kt_moe.distributed import pci_address
from kt_moe.gpu.page_lock import PageLockError, lock
from kt_moe.gpu.rates import link_rate, measure
from kt_moe.host_memory import free_memory, read_text, resident

_PCI = "sys/bus/pci/devices"
_VARIABLES = (
    "KT_MOE_ISA", "KT_MOE_THREADS", "KT_MOE_SHARDS", "KT_MOE_NODES", "KT_MOE_PROFILE", "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)  # fmt: skip
_LOCKED_BYTES = 64 << 20  # of the try whether memory can be page-locked


@dataclass(frozen=True)
class Gpu:
    """One that torch uses.

    Attributes:
        capability: CUDA's compute capability.
        copy_rate: bytes a second from page-locked memory to it; 0: not measured.
        link: its PCI Express connection, "PCIe 5 x8"; best_link: the one it can have, which carries at most
            `most_rate` bytes a second; "" and 0: unknown, as under WSL, or there is none.
    """

    name: str
    capability: tuple[int, int]
    copy_rate: float = 0.0
    link: str = ""
    best_link: str = ""
    most_rate: float = 0.0


@dataclass(frozen=True)
class Machine:
    """A machine as one process sees it. As JSON its fields have the same names.

    Attributes:
        topology: what `_core.read_topology` returns.
        kernel_sets: name -> "available", or why not; `selected` runs.
        threads, shards: of a default runtime.
        cpu: vendor, family and model of /proc/cpuinfo; isa_flags: its flags that some kernel set needs.
        available_bytes: of memory that a run may take, as `kt-moe plan` counts them.
        transparent_huge_pages: "always", "madvise" or "never".
        environment: variables that change how kt_moe or torch's threads run.
        nvidia_gpus: that are in the machine; gpus: that torch uses; without_cuda: why it uses none.
        triton: whether it is installed; page_lock: why memory cannot be page-locked: of a GPU alone.
        rates: of a small layer on CPU and first GPU; None: not measured.
        probes: what `_core.probe_nodes` returns.
    """

    topology: dict[str, Any]
    kernel_sets: dict[str, str]
    selected: str
    threads: int
    shards: int
    cpu: tuple[str, int, int]
    isa_flags: tuple[str, ...]
    available_bytes: int
    transparent_huge_pages: str
    environment: dict[str, str] = field(default_factory=dict)
    nvidia_gpus: int = 0
    gpus: tuple[Gpu, ...] = ()
    without_cuda: str = ""
    triton: bool = True
    page_lock: str = ""
    rates: Rates | None = None
    probes: list[dict[str, Any]] = field(default_factory=list)


def read_machine() -> Machine:
    """The one this runs on; measurements of GPUs take a second or two.

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
        environment={name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
        probes=_core.probe_nodes(),
        **read_gpus(),
        **settings_of(Path("/")),
    )


def settings_of(root: Path) -> dict[str, Any]:
    """What the files below `root` say, by the names of `Machine`'s fields."""
    text = read_text(root / "proc/cpuinfo").split("\n\n", 1)[0]
    cpu = dict(re.findall(r"^(\S.*?)\s*: (.*)$", text, re.MULTILINE))
    family, model = (int(re.sub(r"\D", "", cpu.get(name, ""))[:9] or 0) for name in ("cpu family", "model"))
    pages = re.search(r"\[(\w+)\]", read_text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    devices = [*(root / _PCI).iterdir()] if (root / _PCI).is_dir() else []
    nvidia = [d for d in devices if read_text(d / "vendor").strip() == "0x10de"]
    used = set().union(*_core.kernel_flags().values())
    return {
        "topology": _core.read_topology(str(root)),
        "cpu": (cpu.get("vendor_id", ""), family, model),
        "isa_flags": tuple(sorted(used & set(cpu.get("flags", "").split()))),
        "transparent_huge_pages": pages[1] if pages else "",
        # the class of VGA and 3D controllers
        "nvidia_gpus": sum(read_text(d / "class").startswith("0x03") for d in nvidia),
    }


def read_gpus() -> dict[str, Any]:
    """What torch and measurements say of the GPUs here, by the names of `Machine`'s fields."""
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "finds no driver or no device" if built else "is built without CUDA"
        return {"without_cuda": f"torch {torch.__version__} {why}"}
    return {
        "gpus": tuple(_measured(torch.device("cuda", n)) for n in range(torch.cuda.device_count())),
        "triton": importlib.util.find_spec("triton") is not None,
        "page_lock": _page_lock(),
        "rates": measure_rates(torch.device("cuda", 0)),
    }


def _measured(device: torch.device) -> Gpu:
    """A GPU with its link's state right after copies: at rest GPUs lower its speed."""
    properties = torch.cuda.get_device_properties(device)
    try:
        rate = link_rate(device)
    except RuntimeError:  # no memory left, or another's fault
        rate = 0.0
    link = read_link(Path("/", _PCI, pci_address(properties)))
    return Gpu(properties.name, (properties.major, properties.minor), rate, **link)


def read_link(folder: Path) -> dict[str, Any]:
    """A PCI device's connection, by the names of `Gpu`'s fields; nothing where the files do not say."""
    files = (f"{which}_link_{what}" for which in ("current", "max") for what in ("speed", "width"))
    numbers = [re.match(r"\d{1,3}(\.\d)?\b", read_text(folder / file), re.ASCII) for file in files]
    speed, lanes, most_speed, most_lanes = (float(number[0]) if number else 0.0 for number in numbers)
    if not (speed and lanes and most_speed and 0 < most_lanes <= 32):
        return {}
    pairs = ((speed, lanes), (most_speed, most_lanes))
    now, best = (f"PCIe {int(3 + math.log2(speed / 8))} x{lanes:.0f}" for speed, lanes in pairs)
    most = most_speed * 1e9 / 8 * 128 / 130 * most_lanes  # a bit a transfer, less the code's
    return {"link": now, "best_link": best, "most_rate": most}


def measure_rates(device: torch.device) -> Rates | None:
    """What `kt_moe.Gpu` measures at its first call, of a small layer; None if that fails."""
    try:
        weights = make_weights(Shape(hidden=2048, intermediate=768, experts=8, topk=1), seed=0)
        return measure(Experts(*weights, gpu="off"), device)
    except RuntimeError:
        return None


def _page_lock() -> str:
    memory = torch.zeros(_LOCKED_BYTES, dtype=torch.uint8, device="cpu")
    try:
        lock([(memory.data_ptr(), memory.nbytes)], memory).release()
    except PageLockError as error:
        return str(error)
    return ""


def describe(machine: Machine) -> str:
    """What will run, and where."""
    topology = machine.topology
    counts = (count_text(topology[f"{noun.lower()}s"], noun) for noun in ("package", "core", "CPU"))
    other = [f"{name}: {state}" for name, state in machine.kernel_sets.items() if state != "available"]
    kernels = machine.selected + (f" ({'; '.join(other)})" if other else "")
    lines = [
        ", ".join((topology["model"], *counts)),
        f"memory   {size_text(machine.available_bytes)} for a run",
        f"kernels  {kernels}; {count_text(machine.threads, 'thread')}, {count_text(machine.shards, 'shard')}",
    ]
    if machine.environment:
        lines.append("set      " + ", ".join(f"{n}={value}" for n, value in machine.environment.items()))
    for number, gpu in enumerate(machine.gpus):
        copies = f"{gpu.copy_rate / 1e9:.1f} GB/s from page-locked memory"
        lines.append(f"GPU {number}    " + ", ".join(filter(None, (gpu.name, gpu.link, copies))))
    if machine.without_cuda:
        lines.append(f"GPU      none: {machine.without_cuda}")
    if machine.rates is not None:
        given = ", ".join(f"{name}={value:.3g}" for name, value in vars(machine.rates).items() if value)
        lines.append(f"rates    kt_moe.Gpu(rates=kt_moe.Rates({given}))")
    return "\n".join(lines)
