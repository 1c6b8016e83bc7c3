"""The GPUs of a machine: how they are connected, by /sys, and how fast copies and products are, by torch.

The files are those of Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import importlib.util
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_moe.gpu.page_lock import PageLockError, lock
from kt_moe.gpu.plan import Rates
from kt_moe.gpu.streams import streams_of

PCI = "sys/bus/pci/devices"  # under the root
_NVIDIA = "0x10de"
_DISPLAY = "0x03"  # the class of VGA and 3D controllers
COPY_BYTES = 64 << 20  # of a measurement
_COPIES = 4
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
    def rate(self) -> float | None:
        """Bytes a second each way that the lanes in use carry."""
        if self.generation is None or self.lanes is None:
            return None
        return _LANE_BYTES[self.generation] * self.lanes


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: "" where only /sys was read; then what follows is unknown.
        capability: CUDA's compute capability; (0, 0): not NVIDIA's.
        integrated: it shares the CPU's memory.
        page_locked, pageable: bytes a second from such memory to it; None: not measured.
    """

    name: str
    link: Link | None
    capability: tuple[int, int] = (0, 0)
    integrated: bool = False
    memory_bytes: int = 0
    page_locked: float | None = None
    pageable: float | None = None


@dataclass(frozen=True)
class Gpus:
    """All GPUs.

    Attributes:
        without_cuda: why torch uses none of them; "" if it does, or is not known to do.
        triton: whether it is installed; None: unknown.
        page_lock: "pinned" if `COPY_BYTES` could be page-locked, or why not; "" if that was not tried.
        memlock: bytes that a process may lock (RLIMIT_MEMLOCK); None: no limit.
        rates: of a small layer on the first GPU; None: not measured.
    """

    gpus: tuple[Gpu, ...] = ()
    without_cuda: str = ""
    triton: bool | None = None
    page_lock: str = ""
    memlock: int | None = None
    rates: Rates | None = None


def recorded_gpus(root: Path) -> Gpus:
    """NVIDIA's, as the tree below `root` shows them; links may be at rest, where GPUs lower their speed."""
    limit = re.search(r"^Max locked memory +([0-9]{1,18}) ", _read(root / "proc/self/limits"), re.MULTILINE)
    gpus = tuple(Gpu("", link) for link in nvidia_links(root))
    return Gpus(gpus, memlock=int(limit[1]) if limit else None)


def read_gpus() -> Gpus:
    """Those of this machine, and measurements of those that torch can use: a second or two."""
    links = nvidia_links(Path("/"))
    if not torch.cuda.is_available():
        return Gpus(tuple(Gpu("", link) for link in links), without_cuda=_why_no_cuda())
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        address = _address(properties) or (links[0].address if len(links) == 1 else "")
        found.append(_measured(torch.device("cuda", number), properties, address))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Gpus(
        tuple(found),
        triton=importlib.util.find_spec("triton") is not None,
        page_lock=_page_lock(),
        memlock=None if limit == resource.RLIM_INFINITY else limit,
        rates=measure_rates(torch.device("cuda", 0)),
    )


def nvidia_links(root: Path) -> list[Link]:
    """The connections of NVIDIA's GPUs, by address."""
    folder = root / PCI
    try:
        devices = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
    return [
        read_link(root, address)
        for address in devices
        if _read(folder / address / "vendor") == _NVIDIA
        and _read(folder / address / "class").startswith(_DISPLAY)
    ]


def read_link(root: Path, address: str) -> Link:
    """One connection; the speed is the present one."""
    folder = root / PCI / address
    generation, most_generation = (
        _generation(_read(folder / f"{which}_link_speed")) for which in ("current", "max")
    )
    lanes, most_lanes = (_lanes(_read(folder / f"{which}_link_width")) for which in ("current", "max"))
    node = _read(folder / "numa_node")
    number = int(node) if re.fullmatch(r"[0-9]{1,4}", node) else None
    return Link(address, generation, lanes, most_generation, most_lanes, number)


def _measured(device: torch.device, properties: Any, address: str) -> Gpu:
    """A GPU with its link's state and rates while copies cross it."""
    link = None

    def look() -> None:
        nonlocal link
        root = Path("/")
        if address and (root / PCI / address).exists():  # not under WSL
            link = read_link(root, address)

    rates: tuple[float | None, float | None] = None, None
    try:
        rates = measure_copies(device, look)
    except RuntimeError:  # no memory left, or another's fault
        look()
    nvidia = torch.version.cuda is not None
    return Gpu(
        properties.name,
        link,
        (properties.major, properties.minor) if nvidia else (0, 0),
        bool(getattr(properties, "is_integrated", False)),
        properties.total_memory,
        *rates,
    )


def measure_copies(
    device: torch.device, meanwhile: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Bytes a second to the device from page-locked and from pageable memory.

    meanwhile: called while copies from page-locked memory are on their way.
    """
    streams = streams_of(device)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    page_locked = streams.host_empty((COPY_BYTES,), torch.uint8)
    pageable = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cpu")

    def seconds(source: torch.Tensor) -> float:
        best = float("inf")
        for _ in range(_COPIES):
            begin = time.perf_counter()
            there.copy_(source, non_blocking=True)
            streams.record().synchronize()
            best = min(best, time.perf_counter() - begin)
        return best

    rates = COPY_BYTES / seconds(page_locked), COPY_BYTES / seconds(pageable)
    for _ in range(_COPIES * 4):
        there.copy_(page_locked, non_blocking=True)
    meanwhile()
    streams.record().synchronize()
    return rates


def measure_rates(device: torch.device) -> Rates | None:
    """What `kt_moe.Gpu` measures at its first call, of a small layer; None if that fails."""
    from kt_moe import Experts
    from kt_moe.cli.bench.cases import Shape, make_weights
    from kt_moe.gpu.rates import measure

    try:
        weights = make_weights(Shape("doctor", hidden=2048, intermediate=768, experts=8, topk=1), seed=0)
        return measure(Experts(*weights, gpu="off"), device)
    except RuntimeError:
        return None


def _page_lock() -> str:
    memory = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cpu")
    try:
        lock([(memory.data_ptr(), memory.nbytes)], memory).release()
    except PageLockError as error:
        return str(error)
    return "pinned"


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no driver or no device"


def _address(properties: Any) -> str:
    """On the PCI bus; "" where this torch does not tell."""
    bus = getattr(properties, "pci_bus_id", None)
    if not isinstance(bus, int):
        return ""
    domain, device = (getattr(properties, f"pci_{name}_id", 0) for name in ("domain", "device"))
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def _generation(speed: str) -> int | None:
    """Of "32.0 GT/s PCIe"; None of "Unknown"."""
    found = re.match(r"([0-9]{1,3}(?:\.[0-9])?) GT/s", speed)
    return None if found is None else _GENERATIONS.get(float(found[1]))


def _lanes(width: str) -> int | None:
    return int(width) if re.fullmatch("[0-9]{1,2}", width) and 1 <= int(width) <= 32 else None


def _read(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""
