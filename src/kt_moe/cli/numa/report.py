"""The table for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kt_moe.cli.bench.layer import Shape
from kt_moe.cli.numa.predict import Machine, Pass, Row, Run
from kt_moe.cli.text import count_text, table

_HEADER = [
    "tokens", "nodes", "placement",
    "fwd local", "remote", "ms", "limit", "bwd local", "remote", "ms", "limit", "tokens/s",
]  # fmt: skip


def to_dict(shape: Shape, run: Run, machine: Machine, rows: Sequence[Row]) -> dict[str, Any]:
    """As JSON takes it."""
    return {
        "shape": asdict(shape),
        "run": asdict(run),
        "machine": asdict(machine),
        "rows": [{**asdict(row), "tokens_per_second": row.tokens_per_second(run.layers)} for row in rows],
    }


def describe(shape: Shape, run: Run, machine: Machine, rows: Sequence[Row]) -> str:
    """What was assumed, a line for each of `rows`, what the columns are."""
    skew = f", popularity n^-{run.skew:g}" if run.skew else ""
    recompute = ", G and U computed again" if run.recompute else ""
    cells = [
        [
            str(row.tokens), str(row.nodes), row.placement,
            *_cells(row.forward, row.placement), *_cells(row.backward, row.placement),
            _number(row.tokens_per_second(run.layers)),
        ]
        for row in rows
    ]  # fmt: skip
    numeric = [i for i, name in enumerate(_HEADER) if name not in ("placement", "limit")]
    flops = machine.cores * machine.flops_per_core
    lines = [
        f"layer    {shape.name}: hidden {shape.hidden}, intermediate {shape.intermediate}, "
        f"{shape.experts} experts, {shape.topk} a token",
        f"run      {run.format}, LoRA rank {run.rank}{recompute}{skew}",
        f"a node   {count_text(machine.cores, 'core')}, {machine.local / 1e9:.4g} GB/s local, "
        f"{machine.remote / 1e9:.4g} GB/s remote, {flops / 1e12:.3g} TFLOP/s, "
        f"{machine.cache / 1e6:.4g} MB of cache",
        *(f"         {note}" for note in machine.notes),
        "",
        table([_HEADER, *cells], right=numeric),
        "",
        "local, remote: MB a token that a node reads and writes in its own memory and in others'.",
        f"ms: of a layer. tokens/s: forward and backward of {count_text(run.layers, 'layer')}.",
    ]
    return "\n".join(lines)


def _cells(p: Pass, placement: str) -> list[str]:
    limit = f"{p.limit} ({'expert' if p.whole else 'tensor'})" if placement == "auto" else p.limit
    return [_number(p.local / 1e6), _number(p.remote / 1e6), _number(p.seconds * 1e3), limit]


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}"
