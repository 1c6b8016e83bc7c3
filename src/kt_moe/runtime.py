"""Where the experts are computed: threads, shards and the kernel set."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kt_moe import _core

if TYPE_CHECKING:
    from kt_moe.profiler import Profile


class Runtime:
    """A pool of worker threads and the kernels chosen for this CPU.

    Args:
        threads: number of threads, the calling one included. None: KT_MOE_THREADS, or the cores this process
            may use (affinity mask and cgroup limit).
        shards: slices of the intermediate dimension, at most 64, each with memory on NUMA nodes of its own
            while there are enough. None: KT_MOE_SHARDS, or the number of nodes.
        isa: "scalar", "avx2", "avx512", "avx512_bf16" or "amx". None: KT_MOE_ISA, or the best this CPU has.
        nodes: NUMA nodes, by the kernel's numbers, to whose CPUs and memory threads and weights are bound.
            One may be named more than once, to have several places on it as if they were nodes of their own.
            None: KT_MOE_NODES ("0,2-3"), or all whose CPUs this process may use.

    Threads stay on their nodes where there are several, the calling one during a call. A change of the
    process's affinity mask after this reaches the calling thread alone.

    Raises:
        ValueError: a number out of range, an unknown ISA, or one this CPU lacks, or a node that is not there
            or has no CPU for this process.
    """

    def __init__(
        self,
        threads: int | None = None,
        shards: int | None = None,
        isa: str | None = None,
        nodes: Sequence[int] | None = None,
    ) -> None:
        self._core = _core.Runtime(threads, shards, isa, None if nodes is None else list(nodes))
        self._profile: Profile | None = None  # that records what it does

    @property
    def threads(self) -> int:
        """Threads that compute, the calling one included."""
        return self._core.threads

    @property
    def shards(self) -> int:
        """Slices of the intermediate dimension."""
        return self._core.shards

    @property
    def isa(self) -> str:
        """Name of the kernel set in use."""
        return self._core.isa

    @property
    def scratch_bytes(self) -> int:
        """Most scratch memory in use at once during the last forward or backward; it is kept for the next.

        Waits while one is running. What a forward saves for its backward is in tensors, not here. The memory
        of results of 1 MiB and more is kept too, up to the most that was in use at once.
        """
        return self._core.scratch_bytes

    def __repr__(self) -> str:
        return f"Runtime(threads={self.threads}, shards={self.shards}, isa={self.isa!r})"


_default: Runtime | None = None
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """The runtime used where none is given; made once, at first use.

    Raises:
        OSError: KT_MOE_PROFILE is a path where no file can be written.
    """
    global _default
    with _default_lock:
        if _default is None:
            runtime = Runtime()
            if path := os.environ.get("KT_MOE_PROFILE"):
                from kt_moe.profiler import profile_until_exit  # which needs this module

                profile_until_exit(path, runtime)
            _default = runtime
        return _default


def cpu_info() -> dict[str, Any]:
    """What this machine offers and what will run on it.

    Returns:
        model: name of the CPU.
        cpus: that this process may use: affinity mask and cgroup limit.
        cores: behind these CPUs; threads_per_core, packages, online_cpus: of the mask, of the mask, of all.
        caches: bytes of l1d, l2, l3; l2_domains, l3_domains: groups of CPUs that share one.
        cgroup_cpu_limit, cgroup_memory_limit: CPUs and bytes of the tightest control group; None: no limit.
        numa_nodes: how many there are; nodes: for each its id, cpus and cores (first CPUs) in the mask,
            memory_bytes, free_bytes, cache_bytes (files' pages), memory_allowed and distances to all.
        isa_features, kernel_sets (name -> "available", or why not) and selected (the kernel set a default
            runtime takes).
    """
    return _core.cpu_info()
