"""What stands beside the table: ceilings, ratios, what LoRA costs, errors and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kt_moe.cli.bench.ceilings import Ceilings, Spread
from kt_moe.cli.bench.layer import MIB
from kt_moe.cli.bench.report import OURS, Result

_SHORT = {"out": "out", "hidden_states": "dX", "topk_weights": "dw"}  # the other outputs are LoRA gradients
_CEILINGS = (
    ("multiply-add on registers alone", "registers", 1e12, "TFLOP/s"),
    ("micro-kernel, operands in L1", "l1", 1e12, "TFLOP/s"),
    ("micro-kernel, A from L2", "l2", 1e12, "TFLOP/s"),
    ("memory read", "read", 1e9, "GB/s"),
)


def ceiling_lines(ceilings: Ceilings, threads: int) -> str:
    """One thread and all of them, each with its interquartile range, and what more threads give."""
    lines = []
    for label, name, scale, unit in _CEILINGS:
        one: Spread = getattr(ceilings, f"{name}_one")
        together: Spread = getattr(ceilings, f"{name}_all")
        line = f"  {label:<32} 1 thread {_rate(one, scale)}"
        if threads > 1:
            gain = f"({together.median / one.median:.2f}x)"
            line += f"   {threads} threads {_rate(together, scale)} {gain}"
        lines.append(f"{line}  {unit}")
    return "\n".join(lines)


def compare(ours: Result, others: Sequence[Result]) -> list[dict[str, Any]]:
    """Ours against each other's: their time over ours by pass, our error over theirs by output."""
    return [
        {
            "who": other.who,
            "experts": ours.case.shape.experts,
            "tokens": ours.case.tokens,
            "rank": ours.case.rank,
            "isa": ours.isa,
            "threads": ours.threads,
            "its_threads": other.threads,
            "its_time_over_ours": {
                name: spread.median / ours.seconds[name].median for name, spread in other.seconds.items()
            },
            "our_error_over_its": {
                name: ours.errors[name] / error for name, error in other.errors.items() if error > 0
            },
        }
        for other in others
    ]


def speed_lines(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The times of `compare`."""
    return "\n".join(
        f"  kt_moe has {', '.join(f'{x:.2f}x ({name})' for name, x in c['its_time_over_ours'].items())} "
        f"the speed of {c['who']} on {c['its_threads']} threads"
        for c in comparisons
    )


def lora_costs(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Time at each rank over the time at rank 0, where one runtime's results have both."""
    without = {(r.who, r.case.tokens): r for r in results if r.case.rank == 0}
    return [
        {
            "who": r.who,
            "experts": r.case.shape.experts,
            "tokens": r.case.tokens,
            "rank": r.case.rank,
            "isa": r.isa,
            "threads": r.threads,
            "time_over_rank_0": {
                name: spread.median / without[r.who, r.case.tokens].seconds[name].median
                for name, spread in r.seconds.items()
            },
        }
        for r in results
        if r.case.rank > 0 and (r.who, r.case.tokens) in without
    ]


def lora_lines(costs: Sequence[Mapping[str, Any]]) -> str:
    """`lora_costs` for people."""
    return "\n".join(
        f"  {cost['who']:<14} tokens {cost['tokens']:<5} rank {cost['rank']:<3} "
        + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in cost["time_over_rank_0"].items())
        for cost in costs
    )


def error_lines(results: Sequence[Result], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Everyone's largest relative errors, and the largest of ours over each other's; of LoRA, the largest."""
    lines = []
    for who in dict.fromkeys(result.who for result in results):
        lines.append(f"  {who:<14} {_worst([r.errors for r in results if r.who == who], '.1e')}")
    for who in dict.fromkeys(c["who"] for c in comparisons):
        ratios = _worst([c["our_error_over_its"] for c in comparisons if c["who"] == who], ".2f")
        lines.append(f"  {OURS} over {who}, in the case where it is worst: {ratios}")
    return "\n".join(lines)


def memory_line(memory: Mapping[str, Any]) -> str:
    """Weights over what the checkpoint has of them, scratch, and the process's peak."""
    line = f"memory: weights {memory['weight_bytes'] / MIB:.0f} MiB ({memory['weight_ratio']:.3f}x bf16)"
    if scratch := memory.get("scratch"):
        line += f", scratch up to {scratch['bytes'] / MIB:.1f} MiB (tokens {scratch['tokens']})"
        if (few := scratch["fewer_experts"]) is not None:
            line += (
                f", {few['bytes'] / MIB:.1f} with {few['experts']} experts instead of {scratch['experts']}"
            )
    return f"{line}; peak {memory['peak_resident_bytes'] / MIB:.0f} MiB resident"


def _rate(spread: Spread, scale: float) -> str:
    return f"{spread.median / scale:7.3f} (IQR {spread.iqr / scale:.3f})"


def _worst(found: Sequence[Mapping[str, float]], form: str) -> str:
    names = dict.fromkeys(_SHORT.get(name, "LoRA") for numbers in found for name in numbers)
    parts = []
    for short in names:
        largest = max(
            x for numbers in found for name, x in numbers.items() if _SHORT.get(name, "LoRA") == short
        )
        parts.append(f"{short} {largest:{form}}")
    return ", ".join(parts)
