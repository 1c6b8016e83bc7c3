"""A plan for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kt_moe.cli.plan import gpu_speed
from kt_moe.cli.plan.gpu_speed import GpuSpeed
from kt_moe.cli.plan.measure import Speed
from kt_moe.cli.plan.memory import Part, Plan, total
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.shapes import Outline
from kt_moe.cli.text import count_text, ranges_text, size_text, table


@dataclass(frozen=True)
class Answer:
    """A plan beside the machine it is for.

    Attributes:
        host_available, gpu_available: bytes that the run may take; None: no GPU.
        speed: None where nothing was measured.
        gpu_speed: predicted; None without a GPU.
    """

    model: Outline
    run: Run
    plan: Plan
    host_available: int
    gpu_available: int | None
    speed: Speed | None
    gpu_speed: GpuSpeed | None = None

    @property
    def fits(self) -> bool:
        """Whether every memory holds its parts."""
        return self.host_spare >= 0 and (self.gpu_spare is None or self.gpu_spare >= 0)

    @property
    def host_spare(self) -> int:
        """Bytes left over, negative if the plan does not fit."""
        return self.host_available - self.plan.host_bytes

    @property
    def gpu_spare(self) -> int | None:
        """The same of the GPU; None where there is none."""
        return None if self.gpu_available is None else self.gpu_available - self.plan.gpu_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Upper bound: the experts' share of a step alone."""
        if self.speed is None:
            return None
        twice = self.run.checkpointing and not self.run.retain
        return self.speed.tokens_per_second(len(self.model.layers), self.run.tokens, twice)


def to_dict(answer: Answer) -> dict[str, Any]:
    """As JSON takes it."""
    model, plan, speed = answer.model, answer.plan, answer.speed
    return {
        "model": {
            "model_type": model.model_type,
            "layers": [asdict(layer) for layer in model.layers],
            "rest_bytes": model.rest_bytes,
        },
        "run": {**asdict(answer.run), "tokens": answer.run.tokens},
        "host": _memory_dict(plan.host, answer.host_available, answer.host_spare),
        "gpu": plan.gpu and _memory_dict(plan.gpu, answer.gpu_available, answer.gpu_spare),
        "speed": speed and {**asdict(speed), "tokens_per_second_at_most": answer.tokens_per_second},
        "gpu_speed": None if answer.gpu_speed is None else gpu_speed.to_dict(answer.gpu_speed),
        "fits": answer.fits,
    }


def describe(answer: Answer) -> str:
    """Model, memory by part, whether it fits, speed."""
    run, plan = answer.run, answer.plan
    checkpointing = ", gradient checkpointing" if run.checkpointing else ""
    checkpointing += ", experts retained" if run.retain else ""
    targets = ", ".join((*run.projections, *run.modules))
    lines = [
        f"model  {_model_text(answer.model)}",
        f"run    {run.batch} x {run.sequence} tokens, LoRA rank {run.rank} in fp32 on {targets}, "
        f"{run.optimizer}{checkpointing}",
        "",
        *_memory_lines("host memory", plan.host, answer.host_available, answer.host_spare),
    ]
    if plan.gpu is not None and answer.gpu_available is not None and answer.gpu_spare is not None:
        lines += ["", *_memory_lines("GPU memory", plan.gpu, answer.gpu_available, answer.gpu_spare)]
    lines += ["", *_speed_lines(answer)]
    if answer.gpu_speed is not None:
        lines += ["", *gpu_speed.describe(answer.gpu_speed)]
    return "\n".join(lines)


def _model_text(model: Outline) -> str:
    first = model.layers[0]
    numbers = [layer.number for layer in model.layers]
    return (
        f"{model.model_type}: layers {ranges_text(numbers)} with {first.experts} experts each, "
        f"hidden {first.hidden}, intermediate {first.intermediate}, {first.topk} experts a token"
    )


def _memory_lines(title: str, parts: Sequence[Part], available: int, spare: int) -> list[str]:
    rows = [[part.name, size_text(part.nbytes), part.source, part.note] for part in parts]
    rows += [["together", size_text(total(parts)), "", ""], ["available", size_text(available), "", ""]]
    verdict = "it fits, with" if spare >= 0 else "IT DOES NOT FIT, by"
    left = " to spare" if spare >= 0 else ""
    indented = [f"  {line}" for line in table(rows, right=[1]).splitlines()]
    return [title, *indented, f"  {verdict} {size_text(abs(spare))}{left}"]


def _speed_lines(answer: Answer) -> list[str]:
    speed, rate = answer.speed, answer.tokens_per_second
    if speed is None or rate is None:
        return ["speed  not measured"]
    layer = answer.model.layers[0]
    return [
        f"speed  at most {rate:,.{0 if rate >= 10 else 2}f} tokens/s: the experts' share of a step alone, "
        "attention and all else would have to take no time",
        f"       measured: a layer takes {speed.forward:.3f} s forward, {speed.backward:.3f} s backward "
        f"({speed.isa}, {count_text(speed.threads, 'thread')}), "
        f"scaled from {count_text(speed.tokens, 'token')} through {speed.experts} of {layer.experts} experts",
    ]


def _memory_dict(parts: Sequence[Part], available: int | None, spare: int | None) -> dict[str, Any]:
    return {
        "parts": [asdict(part) for part in parts],
        "nbytes": total(parts),
        "available": available,
        "spare": spare,
    }
