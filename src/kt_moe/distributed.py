"""Several processes of one job on a machine: what each may use of it, and the memory that they share."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

EXPERT_PARALLEL = ("auto", "off", "host", "global")


def local_ranks() -> tuple[int, int]:
    """This process's number among those of its job on this machine, and how many they are.

    By LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun and accelerate set. (0, 1) where they are not set.

    Raises:
        ValueError: they are not two numbers, the first less than the second.
    """
    texts = [os.environ.get(name, "").strip() for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if not all(texts):
        return 0, 1
    if not all(text.isdecimal() and len(text) < 7 for text in texts) or int(texts[0]) >= int(texts[1]):
        raise ValueError(
            f"LOCAL_RANK is {texts[0]!r} and LOCAL_WORLD_SIZE is {texts[1]!r}, "
            "wanted two numbers, the first less than the second"
        )
    return int(texts[0]), int(texts[1])


def is_shared(choice: str) -> bool:
    """Whether experts are to lie in shared memory, for a value of `EXPERT_PARALLEL`."""
    return choice == "host" or (choice == "auto" and local_ranks()[1] > 1)


def shared_directory() -> str:
    """Where processes of this user find the experts that others have in memory; made if it is not there.

    Raises:
        OSError: it cannot be made, or it is another user's, or others may write it.
    """
    processes = os.stat("/proc/self/ns/pid").st_ino  # those that see each other in /proc
    path = Path(tempfile.gettempdir(), f"kt_moe-{os.geteuid()}-{processes}")
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{path} is no directory that only this user may write, which shared experts need: remove it, "
            "or set TMPDIR to another directory"
        )
    return str(path)


def cores_of_rank(machine: dict[str, Any]) -> tuple[int, list[int] | None]:
    """Threads and NUMA nodes of this process, if the processes of its job divide the machine among them.

    A process that a launcher has bound already, to fewer CPUs than the launcher has, keeps those. With
    several nodes, each process takes cores of the node of its GPU, cuda:LOCAL_RANK, which it shares with the
    processes whose GPUs are at the same node. Where one has no such GPU, all are spread over the nodes
    evenly. Where there are more nodes than processes, each has several, whatever the GPUs.

    Args:
        machine: what `kt_moe.cpu_info` returns.

    Returns:
        the number of threads, and the nodes; None for these: all.
    """
    rank, size = local_ranks()
    if size == 1 or _is_bound():
        return machine["cores"], None
    nodes = {node["id"]: len(node["cores"]) for node in machine["nodes"] if node["cores"]}
    ids = list(nodes)
    if len(ids) == 1:
        return max(1, _part(machine["cores"], rank, size)), None
    allowed = machine["cores"] / sum(nodes.values())  # a cgroup may allow fewer than the mask
    if size < len(ids):
        own = ids[rank * len(ids) // size : (rank + 1) * len(ids) // size]
        return max(1, int(sum(nodes[i] for i in own) * allowed)), own
    of_gpus = [_gpu_node(i) for i in range(size)]
    at = [node for node in of_gpus if node is not None and node in nodes]
    if len(at) < size:
        at = [ids[i * len(ids) // size] for i in range(size)]
    beside = [i for i in range(size) if at[i] == at[rank]]
    cores = _part(int(nodes[at[rank]] * allowed), beside.index(rank), len(beside))
    return max(1, cores), [at[rank]]


def _part(whole: int, number: int, parts: int) -> int:
    return (number + 1) * whole // parts - number * whole // parts


def _is_bound() -> bool:
    """Whether this process may use fewer CPUs than the one that started it."""
    try:
        return os.sched_getaffinity(0) < os.sched_getaffinity(os.getppid())
    except OSError:  # it is gone
        return False


def _gpu_node(index: int) -> int | None:
    """The NUMA node of cuda:index, if the system tells."""
    import torch  # which takes a second, and only several processes on several nodes get here

    if index >= torch.cuda.device_count():
        return None
    address = pci_address(torch.cuda.get_device_properties(index))
    try:
        return int(Path("/sys/bus/pci/devices", address, "numa_node").read_text())
    except (OSError, ValueError):  # an older torch, or a virtual machine
        return None


def pci_address(properties: Any) -> str:
    """Of a GPU on the PCI bus, such as "0000:17:00.0"; "" where this torch does not tell.

    properties: what `torch.cuda.get_device_properties` returns.
    """
    bus = getattr(properties, "pci_bus_id", None)
    if not isinstance(bus, int):
        return ""
    domain, device = (getattr(properties, f"pci_{name}_id", 0) for name in ("domain", "device"))
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"
