"""Where the experts are computed: threads, shards and the kernel set."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kt_moe import _core
from kt_moe.distributed import cores_of_rank, local_ranks

if TYPE_CHECKING:
    from kt_moe.profiler import Profile

_CHOICES = {"KT_MOE_THREADS", "KT_MOE_NODES"}  # of the user, for the core


class Runtime:
    """A pool of worker threads and the kernels chosen for this CPU.

    Args:
        threads: number of threads, the calling one included. None: KT_MOE_THREADS (or KT_NUM_THREADS, as
            kt-kernel calls it), or the cores this process may use (affinity mask and cgroup limit). Several
            processes of a job on this machine (LOCAL_WORLD_SIZE, which torchrun sets) then divide the cores
            and NUMA nodes among them, each beside its GPU, unless nodes are chosen or a launcher has bound
            them; see `kt_moe.distributed.cores_of_rank`.
        shards: slices of the intermediate dimension, at most 64, each with memory on NUMA nodes of its own
            while there are enough. None: KT_MOE_SHARDS, or the number of nodes, at most that of threads.
        isa: a kernel set, such as "avx2"; `kt-moe doctor` lists them. None: KT_MOE_ISA, or the best one here.
        nodes: NUMA nodes, by the kernel's numbers, to whose CPUs and memory threads and weights are bound.
            One that is named more than once counts as several nodes, which share its CPUs.
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
        threads, shards = _whole_number("threads", threads), _whole_number("shards", shards)
        if isa is not None and not isinstance(isa, str):
            raise TypeError(f"isa is {isa!r}, wanted a name or None")
        threads = _threads_for_kt_kernel() if threads is None else threads
        chosen = _node_list(nodes)
        by_user = any(os.environ.get(name, "").strip() for name in _CHOICES)
        if threads is None and chosen is None and not by_user and local_ranks()[1] > 1:
            threads, chosen = cores_of_rank(_core.read_topology("/"))
        self._core = _core.Runtime(threads, shards, isa, chosen)
        self._profile: Profile | None = None  # that records what it does
        _live.add(self)
        if path := os.environ.get("KT_MOE_PROFILE"):
            from kt_moe.profile_at_exit import profile_until_exit  # which needs this module

            profile_until_exit(path, self)

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

    @property
    def nodes(self) -> list[int]:
        """NUMA nodes whose CPUs compute, by the kernel's numbers, as often as each is named."""
        return self._core.nodes

    def __repr__(self) -> str:
        return f"Runtime(threads={self.threads}, shards={self.shards}, isa={self.isa!r}, nodes={self.nodes})"

    def __copy__(self) -> Runtime:
        return self


def _whole_number(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, wanted a whole number or None") from None


def _threads_for_kt_kernel() -> int | None:
    """KT_NUM_THREADS where KT_MOE_THREADS is not set; ValueError if they differ or it is no number."""
    theirs, ours = (os.environ.get(name, "").strip() for name in ("KT_NUM_THREADS", "KT_MOE_THREADS"))
    if theirs and not (theirs.isdecimal() and len(theirs) < 10):
        raise ValueError(f"KT_NUM_THREADS is {theirs!r}, wanted a whole number")
    if theirs and ours and theirs != ours:
        raise ValueError(f"KT_NUM_THREADS is {theirs} and KT_MOE_THREADS is {ours}, wanted one of them")
    return int(theirs) if theirs and not ours else None


def _node_list(nodes: Sequence[int] | None) -> list[int] | None:
    if nodes is None:
        return None
    try:
        if isinstance(nodes, (str, bytes)):
            raise TypeError
        return [operator.index(node) for node in nodes]
    except TypeError:
        raise TypeError(f"nodes is {nodes!r}, wanted a list of whole numbers or None") from None


_live: weakref.WeakSet[Runtime] = weakref.WeakSet()
_default: Runtime | None = None
_default_lock = threading.Lock()


def live_runtimes() -> list[Runtime]:
    """Every runtime there is."""
    return list(_live)


def _after_fork() -> None:
    global _default_lock
    _default_lock = threading.Lock()
    for runtime in _live:
        runtime._profile = None  # it stays the parent's


os.register_at_fork(after_in_child=_after_fork)


def default_runtime() -> Runtime:
    """The runtime used where none is given; made once, at first use.

    Raises:
        OSError: KT_MOE_PROFILE is a path where no file can be written.
    """
    global _default
    with _default_lock:
        if _default is None:
            _default = Runtime()
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
