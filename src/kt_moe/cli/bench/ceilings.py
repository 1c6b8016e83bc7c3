"""What the machine can do, measured beside the contestants, and what a case takes at least."""

from __future__ import annotations

import kt_moe
from kt_moe import _core
from kt_moe.cli.bench.cases import GIB, MIB, Case, Spread, spread
from kt_moe.cli.text import table
from kt_moe.host_memory import free_memory

SECONDS = 0.2  # for each ceiling
_LABELS = {
    "registers": ("multiply-add on registers alone, TFLOP/s", 1e12),
    "l1": ("micro-kernel, operands in L1, TFLOP/s", 1e12),
    "l2": ("micro-kernel, A from L2, TFLOP/s", 1e12),
    "read": ("memory read, GB/s", 1e9),
}

Ceilings = dict[str, Spread]  # by the names of `_core.measure_ceilings`


def measure(runtime: kt_moe.Runtime) -> Ceilings:
    """Rates of one runtime on this machine."""
    l3 = kt_moe.cpu_info()["caches"]["l3"]
    # Where groups of cores have an L3 each, l3 is one group's: half of it a thread is more than all of them.
    size = min(4 * GIB, max(256 * MIB, 4 * l3, runtime.threads * l3 // 2), free_memory() // 4)
    lists = _core.measure_ceilings(runtime._core, SECONDS, size)
    return {name: spread(samples) for name, samples in lists.items()}


def bound(case: Case, touched: float, found: Ceilings) -> tuple[float, str]:
    """The seconds that both passes take at least, and what limits them: "compute" or "memory"."""
    compute, memory = (
        case.flops() / found["l2_all"]["median"],
        case.bytes(touched) / found["read_all"]["median"],
    )
    return max((compute, "compute"), (memory, "memory"))


def ceilings_table(found: Ceilings, threads: int) -> str:
    """On one thread and on all of them, and what more threads give."""
    rows = [["ceilings", "1 thread", f"{threads} threads", "all over one"]]
    for name, (label, unit) in _LABELS.items():
        one, every = (found[f"{name}_{many}"]["median"] for many in ("one", "all"))
        rows.append([label, f"{one / unit:.3f}", f"{every / unit:.3f}", f"{every / one:.2f}x"])
    return table(rows, right=(1, 2, 3))
