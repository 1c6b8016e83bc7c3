"""What the machine can do, measured beside the layer, and how near a time comes to it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kt_moe
from kt_moe import _core
from kt_moe.cli.bench.layer import GIB, MIB
from kt_moe.host_memory import free_memory

SECONDS = 0.2  # for each ceiling
_STEADY = 0.1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample; quartiles are interpolated between samples."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))

    @property
    def iqr(self) -> float:
        """Interquartile range."""
        return self.q3 - self.q1


@dataclass(frozen=True)
class Ceilings:
    """Rates of one runtime on this machine: FLOP/s, and bytes/s of `read_all`.

    Attributes:
        registers_one, registers_all: of the multiply-add on registers alone, on one and on all threads.
        l1_one, l1_all: of the micro-kernel with operands in the L1 cache.
        l2_one, l2_all: the same with A streaming from half the L2 cache.
        read_one, read_all: of reading memory.
    """

    registers_one: Spread
    registers_all: Spread
    l1_one: Spread
    l1_all: Spread
    l2_one: Spread
    l2_all: Spread
    read_one: Spread
    read_all: Spread

    def drift(self, later: Ceilings) -> dict[str, float]:
        """Those of all threads that were 10 % higher or lower when measured again: new over old."""
        names = {"registers_all": "on registers", "l2_all": "A from L2", "read_all": "memory read"}
        ratios = {
            text: getattr(later, name).median / getattr(self, name).median for name, text in names.items()
        }
        return {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > _STEADY}

    def bound(self, flops: float, moved: float) -> tuple[str, float]:
        """What limits this work and traffic, "compute" or "memory", and the seconds it takes at least."""
        compute, memory = flops / self.l2_all.median, moved / self.read_all.median
        return ("compute", compute) if compute >= memory else ("memory", memory)


def measure(runtime: kt_moe.Runtime) -> Ceilings:
    """Measure for SECONDS each."""
    lists = _core.measure_ceilings(runtime._core, SECONDS, read_bytes(runtime.threads))
    return Ceilings(**{name: Spread.of(samples) for name, samples in lists.items()})


def read_bytes(threads: int) -> int:
    """To read memory from: several times the caches, at most a quarter of what is free."""
    l3: int = kt_moe.cpu_info()["caches"]["l3"]
    # Where groups of cores have an L3 each, l3 is one group's: half of it a thread is more than all of them.
    wanted = min(4 * GIB, max(256 * MIB, 4 * l3, threads * l3 // 2))
    return min(wanted, free_memory() // 4)


def machine() -> dict[str, Any]:
    """`kt_moe.cpu_info()` without what depends on overrides, and how busy other programs keep the machine."""
    info = kt_moe.cpu_info()
    names = ("model", "cores", "numa_nodes", "caches", "isa_features")
    return {**{name: info[name] for name in names}, "load_average": os.getloadavg()[0]}
