"""Host memory as Linux tells it: of this process, and what is still to be had. Bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = "sys/fs/cgroup"


def resident(kind: str = "VmRSS") -> int:
    """A line of /proc/self/status: "VmRSS" (all resident pages), "RssAnon", "VmHWM" (the most so far)."""
    return _kib(read_text(Path("/proc/self/status")), kind)


def free_memory(root: Path = Path("/")) -> int:
    """What this process may still take: MemAvailable, or what the tightest of its cgroups leaves.

    A cgroup's page cache counts as free where the kernel may drop it.

    root: a directory with copies of another machine's /proc and /sys.
    """
    free = _kib(read_text(root / "proc/meminfo"), "MemAvailable")
    free = free or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder, limit, usage, cache in _limits(root):
        most, now = read_text(folder / limit).strip(), read_text(folder / usage).strip()
        if most.isdecimal() and now.isdecimal():
            stat = dict(line.split() for line in read_text(folder / "memory.stat").splitlines())
            free = min(free, max(0, int(most) - int(now) + int(stat.get(cache, 0))))
    return free


def _limits(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's memory cgroups with the names of their files, innermost first."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top, names = root / _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / _CGROUPS / "memory"
        else:
            continue
        inner = top / path.lstrip("/")
        # In a container the path may be the host's: then only the root is there, and is the container's own.
        for folder in (inner, *inner.parents):
            yield (folder, *names)
            if folder == top:
                break


def _kib(text: str, name: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), 0)


def read_text(path: Path) -> str:
    """Of a file of the kernel's; "" where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
