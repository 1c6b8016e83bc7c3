"""Page-locks memory where it lies, so that a GPU's copy engine can read it.

`cudaHostRegister` takes whole pages, and none twice. Layers that are mapped from one file may share a page,
so the regions of the process are kept in one table, each with the number of its users.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

_READ_ONLY = 8  # cudaHostRegisterReadOnly
_OF_LIMITS = (2, 304)  # cudaErrorMemoryAllocation, cudaErrorOperatingSystem


class PageLockError(Exception):
    """Memory cannot be page-locked; the message is a sentence that says why."""


@dataclass
class _Region:
    begin: int
    end: int
    users: int = 1


class PageLock:
    """Page-locked memory of one owner; see `lock`.

    Attributes:
        begins: addresses at which registered regions begin, ascending. CUDA refuses a copy that reads from
            two regions, so copies have to be cut there.
    """

    def __init__(self, regions: list[_Region], owner: object, before_release: Callable[[], object] | None):
        self.begins = sorted(region.begin for region in regions)
        self._regions = regions
        self._owner = owner
        self._before_release = before_release
        self._process = os.getpid()

    def release(self) -> None:
        """Unlock the memory that nobody else uses. Does nothing in a forked child, whose CUDA is unusable."""
        if os.getpid() != self._process:
            return
        try:
            if self._before_release is not None:
                self._before_release()
        finally:
            _released.append(self)
            _unregister_released()


_regions: list[_Region] = []  # in order of addresses, disjoint
_table = threading.Lock()
# Locks to be given back. A finaliser may run at any allocation, even in a thread that holds the table, so it
# must not wait: who holds the table looks here afterwards.
_released: deque[PageLock] = deque()


def _after_fork() -> None:
    """In the child nothing is registered, and another thread may have held the table."""
    global _table
    _table = threading.Lock()
    _regions.clear()
    _released.clear()


os.register_at_fork(after_in_child=_after_fork)


def lock(
    pieces: Iterable[tuple[int, int]],
    owner: object,
    *,
    read_only: bool = False,
    before_release: Callable[[], object] | None = None,
) -> PageLock:
    """Page-lock the pages of some pieces of memory.

    Args:
        pieces: address and size in bytes of each.
        owner: kept alive until the memory is unlocked.
        read_only: this process may not write the memory (a file that is mapped for reading).
        before_release: called before memory is unlocked; it waits for the copies that read it.

    Raises:
        PageLockError: there is no CUDA device, or it or the operating system refuses. Nothing stays locked.
    """
    try:
        if not torch.cuda.is_available():
            raise PageLockError("there is no CUDA device")
        cudart = _cudart()
    except (AssertionError, RuntimeError) as error:  # no CUDA in this torch, or not in a forked process
        raise PageLockError(f"CUDA cannot be used: {error}") from None
    mine: list[_Region] = []
    try:
        with _table:
            for begin, end in whole_pages(pieces):
                _lock_range(cudart, begin, end, read_only, mine)
    except BaseException:
        PageLock(mine, owner, None).release()
        raise
    finally:
        _unregister_released()
    return PageLock(mine, owner, before_release)


def whole_pages(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """[begin, end) of the pages with some of the pieces (address, bytes), neighbours as one, ascending."""
    page = mmap.PAGESIZE
    ranges: list[tuple[int, int]] = []
    for address, size in sorted(pieces):
        begin, end = address // page * page, -(-(address + size) // page) * page
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges


def _lock_range(cudart: Any, begin: int, end: int, read_only: bool, mine: list[_Region]) -> None:
    """Add a user to the regions in [begin, end), and make regions of what lies between them."""
    at = bisect_right(_regions, begin, key=lambda region: region.begin)
    at -= at > 0 and _regions[at - 1].end > begin
    while begin < end:
        known = _regions[at] if at < len(_regions) and _regions[at].begin < end else None
        if known is None or begin < known.begin:
            region = _Region(begin, end if known is None else known.begin)
            _register(cudart, region, read_only)
            _regions.insert(at, region)
        else:
            region = known
            region.users += 1
        mine.append(region)
        begin = region.end
        at += 1


def _register(cudart: Any, region: _Region, read_only: bool) -> None:
    size = region.end - region.begin
    error = cudart.cudaHostRegister(region.begin, size, _READ_ONLY if read_only else 0)
    if int(error) == 0:
        return
    _forget_last_error()
    memory = f"{size} bytes of {'a mapped file' if read_only else 'memory'}"
    says = f'cudaHostRegister of {memory}: "{cudart.cudaGetErrorString(error)}" (error {int(error)})'
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if int(error) in _OF_LIMITS and limit != resource.RLIM_INFINITY and limit < size:
        says += f"; RLIMIT_MEMLOCK is {limit} bytes (ulimit -l)"
    raise PageLockError(says)


def _unregister_released() -> None:
    while _released:
        if not _table.acquire(blocking=False):
            return  # who holds it calls this function next
        try:
            while _released:
                released = _released.popleft()  # whose owner has to live until the memory is unlocked
                for region in released._regions:
                    region.users -= 1
                    if region.users == 0:
                        del _regions[bisect_left(_regions, region.begin, key=lambda r: r.begin)]
                        if int(_cudart().cudaHostUnregister(region.begin)) != 0:
                            _forget_last_error()
        finally:
            _table.release()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_last_error() -> None:
    """CUDA keeps the last error, and torch would report it for the next kernel: this is that kernel."""
    with contextlib.suppress(RuntimeError):
        torch.ones((), device="cuda")
