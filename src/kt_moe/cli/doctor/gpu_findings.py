"""What about the GPUs costs speed, and what mends it."""

from __future__ import annotations

from collections.abc import Iterator

from kt_moe.cli.doctor.finding import Finding
from kt_moe.cli.doctor.gpus import COPY_BYTES, Gpu
from kt_moe.cli.doctor.machine import Machine
from kt_moe.cli.text import count_text, size_text

_LEAST = 0.6  # of what the lanes carry; copies reach 0.8 to 0.9 of it
_MANY_SPINS = 100_000
_UNLIMITED = "ulimit -l unlimited (LimitMEMLOCK= of systemd, docker --ulimit memlock=-1)"


def gpu_findings(m: Machine) -> Iterator[Finding]:
    """Of all GPUs."""
    gpus = m.gpus.gpus
    if gpus and m.gpus.without_cuda:
        yield Finding(
            "gpu-unused",
            True,
            f"this machine has {count_text(len(gpus), 'NVIDIA GPU')}, and {m.gpus.without_cuda}",
            "the CPU computes all experts",
            "a torch with CUDA (pytorch.org/get-started); where it has that: nvidia-smi, docker --gpus all",
        )
        return
    for number, gpu in enumerate(gpus):
        yield from _link(m, f"GPU {number}", gpu)
        yield from _kernels(m, f"GPU {number}", gpu)
    if m.gpus.page_lock not in ("", "pinned"):
        yield Finding(
            "page-lock-refused",
            True,
            f"memory cannot be page-locked: {m.gpus.page_lock}",
            "each expert is copied twice on its way to the GPU, the first time by a core",
            _UNLIMITED,
        )
    elif gpus and m.gpus.memlock is not None and (not m.gpus.page_lock or m.gpus.memlock >= COPY_BYTES):
        # Locked in spite of a lower limit: the driver does not count it.
        yield Finding(
            "memlock",
            False,
            f"a process may lock {size_text(m.gpus.memlock)} of memory (RLIMIT_MEMLOCK)",
            "where the driver counts experts that are page-locked, those beyond it are copied twice",
            _UNLIMITED,
        )


def _link(m: Machine, name: str, gpu: Gpu) -> Iterator[Finding]:
    link = gpu.link
    if link is None or gpu.integrated:
        return
    fewer = link.lanes is not None and link.most_lanes is not None and link.lanes < link.most_lanes
    slower = (
        link.generation is not None
        and link.most_generation is not None
        and link.generation < link.most_generation
    )
    measured = gpu.page_locked is not None
    if gpu.page_locked is not None and link.rate is not None and gpu.page_locked > link.rate:
        return  # a virtual machine may say anything about the link
    if fewer or slower:
        # At rest GPUs lower the speed, but not the number of lanes.
        yield Finding(
            "gpu-link",
            fewer or measured,
            f"{name} is connected by PCIe {link.generation or '?'} x{link.lanes or '?'}, and can have PCIe "
            f"{link.most_generation or '?'} x{link.most_lanes or '?'}"
            + ("" if fewer or measured else "; it may be at rest"),
            "weights cross the link in proportion to both",
            "another slot, a riser of that generation, or the BIOS (link speed, bifurcation)",
        )
    if gpu.page_locked is not None and link.rate is not None and gpu.page_locked < _LEAST * link.rate:
        yield Finding(
            "gpu-link-rate",
            True,
            f"copies to {name} reach {gpu.page_locked / 1e9:.1f} GB/s of the {link.rate / 1e9:.1f} GB/s "
            "that its lanes carry",
            "weights arrive so much later",
            "look for another user of the link, a PCIe switch above it, an IOMMU that translates "
            "(iommu=pt), memory on another socket",
        )
    node = next((node for node in m.nodes if node["id"] == link.node), None)
    if node is not None and len(m.nodes) > 1 and not (node["cpus"] and node["memory_allowed"]):
        yield Finding(
            "gpu-far",
            True,
            f"{name} is connected to node {link.node}, whose "
            + ("memory" if node["cpus"] else "cores")
            + " this process may not use",
            "all weights cross the link between the sockets on their way",
            "numactl --cpunodebind, --membind, or docker --cpuset-cpus, --cpuset-mems with that node",
        )


def _kernels(m: Machine, name: str, gpu: Gpu) -> Iterator[Finding]:
    if not gpu.name:
        return
    if gpu.integrated:
        yield Finding(
            "gpu-integrated",
            False,
            f"{name} shares its memory with the CPU",
            "experts are copied within one memory",
        )
    if gpu.capability < (8, 0):
        major, minor = gpu.capability
        what = f"compute capability {major}.{minor}" if major else "no CUDA"
        yield Finding(
            "gpu-old",
            True,
            f"{name} has {what}, and the kernels need 8.0 (NVIDIA's Ampere)",
            "plain torch multiplies, an expert at a time",
        )
    elif m.gpus.triton is False:
        yield Finding(
            "no-triton",
            True,
            "Triton is not installed",
            "plain torch multiplies, an expert at a time",
            "pip install triton (torch's CUDA wheels for Linux bring it)",
        )


def spinning(m: Machine) -> Iterator[Finding]:
    """OpenMP's threads, torch's, that wait busily."""
    policy, spins = (m.environment.get(name, "") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    many = spins.lower().startswith("inf") or (spins.isdecimal() and int(spins) > _MANY_SPINS)
    if policy.lower() == "active" or many:
        which = f"GOMP_SPINCOUNT is {spins[:20]}" if many else f"OMP_WAIT_POLICY is {policy}"
        says = f"{which}: torch's threads stay awake while they wait"
        remedy = f"unset {which.split()[0]}, or OMP_WAIT_POLICY=passive"
    elif m.gpus.page_lock and not policy and not spins:  # a GPU, and not that of a recorded machine
        says = "OMP_WAIT_POLICY is not set: torch's threads stay awake for milliseconds after every loop"
        remedy = "OMP_WAIT_POLICY=passive before Python starts"
    else:
        return
    cost = "they take cores from the threads that compute experts and launch the GPU's kernels"
    yield Finding("omp-spins", True, says, cost, remedy)
