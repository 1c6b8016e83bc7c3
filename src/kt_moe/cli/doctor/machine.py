"""What `kt-moe doctor` looks at: the topology, settings of the kernel, kernel sets, GPUs and a probe.

Settings are those of Documentation/admin-guide/mm/transhuge and of proc(5). What cannot be read is empty or
0; what is read is a dictionary, as `kt-moe doctor --json` prints it.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kt_moe import Experts, _core
from kt_moe.cli.bench.cases import Shape
from kt_moe.cli.bench.layers import make_weights
from kt_moe.cli.terminal import count_text, size_text
from kt_moe.gpu.page_lock import PageLockError, lock
from kt_moe.gpu.rates import link_rate, measure
from kt_moe.host_memory import free_memory, read_text, resident

_PCI = "sys/bus/pci/devices"
_VARIABLES = (
    "KT_MOE_ISA", "KT_MOE_THREADS", "KT_MOE_SHARDS", "KT_MOE_NODES", "KT_MOE_PROFILE", "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)  # fmt: skip
_LOCKED_BYTES = 64 << 20  # of the try whether memory can be page-locked


def read_machine() -> dict[str, Any]:
    """The one this runs on, as this process sees it; measurements of GPUs take a second or two.

    topology: what `_core.read_topology` returns. kernel_sets: name -> "available", or why not; `selected`
    runs, by so many threads and shards. available_bytes: of memory that a run may take, as `kt-moe plan`
    counts them. environment: variables that change how kt_moe or torch's threads run. probes: what
    `_core.probe_nodes` returns. More is from `settings_of` and `read_gpus`.

    Raises:
        ValueError: an override that does not hold here.
    """
    info, runtime = _core.cpu_info(), _core.Runtime(None, None, None, None)
    return {
        **settings_of(Path("/")),
        "kernel_sets": info["kernel_sets"],
        "selected": info["selected"],
        "threads": runtime.threads,
        "shards": runtime.shards,
        "available_bytes": free_memory() + resident("RssAnon"),  # a run will not be beside this process
        "environment": {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
        "probes": _core.probe_nodes(),
        **read_gpus(),
    }


def settings_of(root: Path) -> dict[str, Any]:
    """What the files below `root` say.

    isa_flags: those of /proc/cpuinfo that some kernel set needs. transparent_huge_pages: "always", "madvise"
    or "never". nvidia_gpus: that are in the machine.
    """
    text = read_text(root / "proc/cpuinfo").split("\n\n", 1)[0]
    cpu = dict(re.findall(r"^(\S.*?)\s*: (.*)$", text, re.MULTILINE))
    pages = re.search(r"\[(\w+)\]", read_text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    devices = [*(root / _PCI).iterdir()] if (root / _PCI).is_dir() else []
    nvidia = [d for d in devices if read_text(d / "vendor").strip() == "0x10de"]
    used = set().union(*_core.kernel_flags().values())
    return {
        "topology": _core.read_topology(str(root)),
        "isa_flags": sorted(used & set(cpu.get("flags", "").split())),
        "transparent_huge_pages": pages[1] if pages else "",
        # the class of VGA and 3D controllers
        "nvidia_gpus": sum(read_text(d / "class").startswith("0x03") for d in nvidia),
    }


def read_gpus() -> dict[str, Any]:
    """What torch and measurements say of the GPUs here.

    gpus: that torch uses, each with its name, CUDA's compute capability, and `copy_rate`, the bytes a second
    from page-locked memory to it; without_cuda: why it uses none. page_lock:
    why memory cannot be page-locked, or "". rates: of a small layer on CPU and first GPU. Where the GPU has
    no memory left, rates are 0 or missing.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "finds no driver or no device" if built else "is built without CUDA"
        return {"gpus": [], "without_cuda": f"torch {torch.__version__} {why}"}
    return {
        "gpus": [_measured(torch.device("cuda", n)) for n in range(torch.cuda.device_count())],
        "page_lock": _page_lock(),
        "rates": measure_rates(torch.device("cuda", 0)),
    }


def _measured(device: torch.device) -> dict[str, Any]:
    properties, rate = torch.cuda.get_device_properties(device), 0.0
    with suppress(RuntimeError):
        rate = link_rate(device)
    return {"name": properties.name, "capability": [properties.major, properties.minor], "copy_rate": rate}


def measure_rates(device: torch.device) -> dict[str, float]:
    """What `kt_moe.Gpu` measures at its first call, of a small layer."""
    weights = make_weights(Shape(hidden=2048, intermediate=768, experts=8, topk=1))
    with suppress(RuntimeError):
        rates = measure(Experts(*weights, gpu="off"), device)
        return {name: rate for name, rate in vars(rates).items() if rate}
    return {}


def _page_lock() -> str:
    memory = torch.zeros(_LOCKED_BYTES, dtype=torch.uint8, device="cpu")
    try:
        lock([(memory.data_ptr(), memory.nbytes)], memory).release()
    except PageLockError as error:
        return str(error)
    return ""


def describe(m: dict[str, Any]) -> str:
    """What will run, and where."""
    counts = (count_text(m["topology"][f"{noun.lower()}s"], noun) for noun in ("package", "core", "CPU"))
    other = [f"{name}: {state}" for name, state in m["kernel_sets"].items() if state != "available"]
    kernels = m["selected"] + (f" ({'; '.join(other)})" if other else "")
    lines = [
        ", ".join((m["topology"]["model"], *counts)),
        f"memory   {size_text(m['available_bytes'])} for a run",
        f"kernels  {kernels}; {count_text(m['threads'], 'thread')}, {count_text(m['shards'], 'shard')}",
    ]
    if m["environment"]:
        lines.append("set      " + ", ".join(f"{name}={value}" for name, value in m["environment"].items()))
    for number, gpu in enumerate(m["gpus"]):
        copies = f"{gpu['copy_rate'] / 1e9:.1f} GB/s from page-locked memory"
        lines.append(f"GPU {number}    {gpu['name']}, {copies}")
    if "without_cuda" in m:
        lines.append(f"GPU      none: {m['without_cuda']}")
    if m.get("rates"):
        given = ", ".join(f"{name}={rate:.3g}" for name, rate in m["rates"].items())
        lines.append(f"rates    kt_moe.Gpu(rates=kt_moe.Rates({given}))")
    return "\n".join(lines)
