"""Results as lines of a table; as JSON they are what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kt_moe.cli.bench.cases import GIB, MIB
from kt_moe.cli.bench.yardsticks import Ceilings
from kt_moe.cli.text import table

_CEILINGS = {
    "registers": ("multiply-add on registers alone, TFLOP/s", 1e12),
    "l1": ("micro-kernel, operands in L1, TFLOP/s", 1e12),
    "l2": ("micro-kernel, A from L2, TFLOP/s", 1e12),
    "read": ("memory read, GB/s", 1e9),
}
# Where a result has it, its unit, and its form.
_COLUMNS: dict[str, tuple[str, float, str]] = {
    "tokens": ("tokens", 1, ".0f"),
    "rank": ("rank", 1, ".0f"),
    "who": ("who", 0, ""),
    "fwd ms": ("seconds.forward.median", 1e-3, ".2f"),
    "bwd ms": ("seconds.backward.median", 1e-3, ".2f"),
    "ms": ("seconds.both.median", 1e-3, ".2f"),
    "q1": ("seconds.both.q1", 1e-3, ".2f"),
    "q3": ("seconds.both.q3", 1e-3, ".2f"),
    "tokens/s": ("tokens_per_second", 1, ".0f"),
    "over first": ("time_over_first", 1, ".2f"),
    "over rank 0": ("time_over_rank_0", 1, ".2f"),
    "TFLOP/s": ("flops_per_second", 1e12, ".3f"),
    "GB/s": ("bytes_per_second", 1e9, ".1f"),
    "CPU rows": ("cpu_rows", 1, ".0%"),
    "link GB/s": ("link_bytes_per_second", 1e9, ".1f"),
    "bound": ("bound", 0, ""),
    "fwd share": ("share_of_limit.forward", 1, ".0%"),
    "bwd share": ("share_of_limit.backward", 1, ".0%"),
    "share": ("share_of_limit.both", 1, ".0%"),
    "scratch MiB": ("scratch_bytes", MIB, ".1f"),
    "GPU GiB": ("gpu_bytes", GIB, ".2f"),
    "host GiB": ("host_bytes", GIB, ".1f"),
    "made in s": ("build_seconds", 1, ".0f"),
    "first loss": ("losses.0", 1, ".3f"),
    "error": ("worst_error", 1, ".1e"),
}


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each result; columns that none of them has are left out."""
    columns = {name: [_cell(result, *column) for result in results] for name, column in _COLUMNS.items()}
    shown = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    rows = zip(*([name, *cells] for name, cells in shown.items()), strict=True)
    return table(list(rows), right=[i for i, name in enumerate(shown) if _COLUMNS[name][1]])


def _cell(result: dict[str, Any], path: str, unit: float, form: str) -> str:
    value: Any = result
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else (value or {}).get(key)
    return "-" if value is None else format(value / unit if unit else value, form)


def ceilings_table(found: Ceilings, threads: int) -> str:
    """On one thread and on all of them, and what more threads give."""
    rows = [["ceilings", "1 thread", f"{threads} threads", "all over one"]]
    for name, (label, unit) in _CEILINGS.items():
        one, every = (found[f"{name}_{many}"]["median"] for many in ("one", "all"))
        rows.append([label, f"{one / unit:.3f}", f"{every / unit:.3f}", f"{every / one:.2f}x"])
    return table(rows, right=(1, 2, 3))
