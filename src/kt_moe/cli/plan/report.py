"""A plan for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kt_moe.cli.plan.memory import Part, shape_of
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
from kt_moe.cli.plan.speed import Speed
from kt_moe.cli.text import ranges_text, size_text, table

# A rate's text, and how many of it are one of its units.
_RATES = {
    "link": ("link {:.3g} GB/s", 1e9),
    "gpu_flops": ("GPU {:.3g} TFLOP/s", 1e12),
    "gpu_bytes": ("GPU memory {:.4g} GB/s", 1e9),
    "cpu_flops": ("CPU {:.3g} TFLOP/s", 1e12),
    "cpu_bytes": ("CPU memory {:.3g} GB/s", 1e9),
    "rest_seconds": ("{:.3g} ms a layer for all but experts", 1e-3),
}


def add_up(parts: list[Part], available: int) -> dict[str, Any]:
    """What of the run lies in one memory, beside the bytes that it may take there.

    "spare" is what is left over, negative if the parts do not fit.
    """
    nbytes = sum(part.nbytes for part in parts)
    return {
        "parts": [*map(asdict, parts)], "nbytes": nbytes, "available": available, "spare": available - nbytes,
    }  # fmt: skip


def describe(model: Outline, run: Run, memories: dict[str, dict[str, Any]], speed: Speed) -> str:
    """Model, memory by part, whether it fits, speed."""
    experts, hidden, intermediate, _ = shape_of(model.layers[0])
    checkpointing = ", gradient checkpointing" if run.checkpointing else ""
    checkpointing += ", experts retained" if run.retain else ""
    lines = [
        f"model  {model.model_type}: layers {ranges_text(layer.number for layer in model.layers)} with "
        f"{experts} experts each, hidden {hidden}, intermediate {intermediate}, "
        f"{model.topk} experts a token",
        f"run    {run.batch} x {run.sequence} tokens, LoRA rank {run.rank} in fp32 on "
        f"{', '.join((*run.projections, *run.modules))}, {run.optimizer}{checkpointing}",
    ]
    for title, memory in memories.items():
        rows = [
            [part["name"], size_text(part["nbytes"]), part["source"], part["note"]]
            for part in memory["parts"]
        ]
        rows += [["together", size_text(memory["nbytes"]), "", ""]]
        rows += [["available", size_text(memory["available"]), "", ""]]
        verdict = "it fits, with {} to spare" if memory["spare"] >= 0 else "IT DOES NOT FIT, by {}"
        shown = [*table(rows, right=[1]).splitlines(), verdict.format(size_text(abs(memory["spare"])))]
        lines += ["", title, *(f"  {line}" for line in shown)]
    return "\n".join([*lines, "", *_speed_lines(speed)])


def _speed_lines(speed: Speed) -> list[str]:
    by_source: dict[str, list[str]] = {}
    for name, source in speed.sources.items():
        text, unit = _RATES[name]
        rate = getattr(speed.rates, name)
        if rate and (speed.memory or name.startswith("cpu")):
            by_source.setdefault(source, []).append(text.format(rate / unit))
    known = [f"  {source}: {', '.join(texts)}" for source, texts in by_source.items()]
    rest = "loss and optimizer" if speed.rates.rest_seconds else "attention and all else"
    if not speed.memory:
        rate = speed.predictions[0].tokens_per_second
        most = f"at most {rate:,.{0 if rate >= 10 else 2}f} tokens/s, predicted"
        return [f"speed  {most}: experts on the CPU alone, {rest} come on top", *known]
    rows = [["routing", "GPU", "CPU", "link", "GPU", "CPU", "step", "bound by", "at most"]]
    for p in speed.predictions:
        places = [
            f"{p.gpu_experts} experts, {p.gpu_rows:,} rows",
            f"{p.cpu_experts} experts, {p.cpu_rows:,} rows",
        ]
        times = [f"{seconds:.3f} s" for seconds in (p.link, p.gpu, p.cpu, p.seconds)]
        rows.append([p.routing, *places, *times, p.bound, f"{p.tokens_per_second:,.0f} tokens/s"])
    return [
        f"speed of the experts, predicted, with {size_text(speed.memory)} of them on the GPU",
        *known,
        *(f"  {line}" for line in table(rows, right=range(3, 9)).splitlines()),
        f"  experts and rows of a layer; times of a step's experts; {rest} come on top",
    ]
