"""What the machine can do, measured beside the contestants, and what a case takes at least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

import kt_moe
from kt_moe import _core
from kt_moe.cli.bench.cases import GIB, MIB, Case
from kt_moe.cli.bench.contestants import synchronize
from kt_moe.host_memory import free_memory

SECONDS = 0.2  # for each ceiling
_STEADY = 0.1
_LINK_BYTES = 512 * MIB

Spread = dict[str, float]  # median and quartiles of repeated measurements, and their count
Ceilings = dict[str, Spread]  # by the names of `_core.measure_ceilings`


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample; quartiles are interpolated between samples."""
    q1, median, q3 = statistics.quantiles(
        [*samples, *samples][: max(2, len(samples))], n=4, method="inclusive"
    )
    return {"median": median, "q1": q1, "q3": q3, "count": len(samples)}


def ceilings(runtime: kt_moe.Runtime) -> Ceilings:
    """Rates of one runtime on this machine."""
    l3 = kt_moe.cpu_info()["caches"]["l3"]
    # Where groups of cores have an L3 each, l3 is one group's: half of it a thread is more than all of them.
    size = min(4 * GIB, max(256 * MIB, 4 * l3, runtime.threads * l3 // 2), free_memory() // 4)
    lists = _core.measure_ceilings(runtime._core, SECONDS, size)
    return {name: spread(samples) for name, samples in lists.items()}


def drift(before: Ceilings, after: Ceilings) -> dict[str, float]:
    """Ceilings of all threads that were 10 % higher or lower when measured again: new over old."""
    ratios = {n: after[n]["median"] / before[n]["median"] for n in before if n.endswith("_all")}
    return {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > _STEADY}


def bound(case: Case, touched: float, found: Ceilings) -> tuple[str, dict[str, float]]:
    """What limits both passes, "compute" or "memory", and the seconds that each pass takes at least."""
    compute = {name: flops / found["l2_all"]["median"] for name, flops in case.flops().items()}
    memory = {name: moved / found["read_all"]["median"] for name, moved in case.bytes(touched).items()}
    name = "compute" if compute["both"] >= memory["both"] else "memory"
    return name, {key: max(compute[key], memory[key]) for key in compute}


def link_rate(device: torch.device) -> float:
    """Bytes a second from page-locked memory to the device, the median of five copies of 512 MiB."""
    cuda = device.type == "cuda"
    host = torch.empty(_LINK_BYTES if cuda else MIB, dtype=torch.uint8, pin_memory=cuda)
    there, rates = torch.empty_like(host, device=device), []
    for _ in range(6):
        synchronize(device)
        begin = time.perf_counter()
        there.copy_(host, non_blocking=True)
        synchronize(device)
        rates.append(host.nbytes / (time.perf_counter() - begin))
    return statistics.median(rates[1:])
