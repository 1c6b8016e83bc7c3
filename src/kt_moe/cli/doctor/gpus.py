"""The GPUs of a machine: how they are connected, by /sys, and how fast copies and products are, by torch.

The files are those of Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_moe import Experts, Rates
from kt_moe.cli.bench.cases import Shape
from kt_moe.cli.bench.inputs import make_weights
from kt_moe.distributed import pci_address
from kt_moe.gpu.page_lock import PageLockError, lock
from kt_moe.gpu.rates import link_rate, measure
from kt_moe.host_memory import read_text

PCI = "sys/bus/pci/devices"  # under the root
_NVIDIA = "0x10de"
_DISPLAY = "0x03"  # the class of VGA and 3D controllers
_LOCKED_BYTES = 64 << 20  # of the try whether memory can be page-locked
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}  # GT/s -> of PCI Express
_LANE_BYTES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # a second, each way


@dataclass(frozen=True)
class Link:
    """A GPU's connection by PCI Express; None: unknown.

    Attributes:
        address: such as "0000:17:00.0".
        generation, lanes: in use; most_generation, most_lanes: of the GPU.
        node: the NUMA node it is connected to.
    """

    address: str
    generation: int | None = None
    lanes: int | None = None
    most_generation: int | None = None
    most_lanes: int | None = None
    node: int | None = None

    @property
    def most_rate(self) -> float:
        """Bytes a second each way that the GPU's lanes could carry; 0: unknown."""
        return _LANE_BYTES.get(self.most_generation or 0, 0.0) * (self.most_lanes or 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: "" where only /sys was read; then what follows is unknown.
        link: None: unknown, or within one memory with the CPU.
        capability: CUDA's compute capability; (0, 0): not NVIDIA's.
        copy_rate: bytes a second from page-locked memory to it; None: not measured.
    """

    name: str
    link: Link | None
    capability: tuple[int, int] = (0, 0)
    memory_bytes: int = 0
    free_bytes: int = 0
    copy_rate: float | None = None


@dataclass(frozen=True)
class Gpus:
    """All GPUs.

    Attributes:
        without_cuda: why torch uses none of them; "" if it does, or is not known to do.
        triton: whether it is installed; None: unknown.
        page_lock: "pinned" if memory could be page-locked, or why not; "" if that was not tried.
        rates: of a small layer on the first GPU; None: not measured.
    """

    gpus: tuple[Gpu, ...] = ()
    without_cuda: str = ""
    triton: bool | None = None
    page_lock: str = ""
    rates: Rates | None = None


def recorded_gpus(root: Path) -> Gpus:
    """NVIDIA's, as the tree below `root` shows them; links may be at rest, where GPUs lower their speed."""
    folder = root / PCI
    found = []
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        if read_text(device / "vendor").strip() == _NVIDIA and read_text(device / "class").startswith(
            _DISPLAY
        ):
            found.append(Gpu("", read_link(root, device.name)))
    return Gpus(tuple(found))


def read_gpus() -> Gpus:
    """Those of this machine, and measurements of those that torch can use: a second or two."""
    seen = recorded_gpus(Path("/")).gpus
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "finds no driver or no device" if built else "is built without CUDA"
        return Gpus(seen, without_cuda=f"torch {torch.__version__} {why}")
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        only = seen[0].link.address if len(seen) == 1 and seen[0].link is not None else ""
        found.append(_measured(torch.device("cuda", number), properties, pci_address(properties) or only))
    triton = importlib.util.find_spec("triton") is not None
    return Gpus(tuple(found), "", triton, _page_lock(), measure_rates(torch.device("cuda", 0)))


def _measured(device: torch.device, properties: Any, address: str) -> Gpu:
    """A GPU with the rate of copies, and its link's state right after them, before it rests."""
    try:
        rate = link_rate(device)
    except RuntimeError:  # no memory left, or another's fault
        rate = None
    connected = (Path("/") / PCI / address).exists() and not getattr(properties, "is_integrated", False)
    link = read_link(Path("/"), address) if address and connected else None  # none under WSL
    capability = (properties.major, properties.minor) if torch.version.cuda is not None else (0, 0)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(properties.name, link, capability, total, free, rate)


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
    return "pinned"


def read_link(root: Path, address: str) -> Link:
    """One connection; the speed is the present one."""
    folder = root / PCI / address
    speeds = (_number(r"(\d{1,3}(?:\.\d)?) GT/s", folder / f"{w}_link_speed") for w in ("current", "max"))
    generation, most_generation = (_GENERATIONS.get(speed or 0.0) for speed in speeds)
    widths = (_number(r"(\d{1,2})$", folder / f"{which}_link_width") for which in ("current", "max"))
    lanes, most_lanes = (int(width) if width and width <= 32 else None for width in widths)
    node = _number(r"(\d{1,4})$", folder / "numa_node")
    return Link(address, generation, lanes, most_generation, most_lanes, None if node is None else int(node))


def _number(pattern: str, file: Path) -> float | None:
    found = re.match(pattern, read_text(file).strip(), re.ASCII)
    return None if found is None else float(found[1])
