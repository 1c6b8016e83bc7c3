"""A plan for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kt_moe.cli.plan import gpu_speed
from kt_moe.cli.plan.gpu_speed import GpuSpeed
from kt_moe.cli.plan.measure import Speed
from kt_moe.cli.plan.memory import Part
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.shapes import Outline
from kt_moe.cli.text import count_text, ranges_text, size_text, table


@dataclass(frozen=True)
class Memory:
    """What of the run lies in one memory, and the bytes of it that the run may take."""

    title: str
    parts: tuple[Part, ...]
    available: int

    @property
    def nbytes(self) -> int:
        """Sum of the parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def spare(self) -> int:
        """Bytes left over, negative if the parts do not fit."""
        return self.available - self.nbytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        parts = [asdict(part) for part in self.parts]
        return {"parts": parts, "nbytes": self.nbytes, "available": self.available, "spare": self.spare}

    def describe(self) -> list[str]:
        """A line for each part, and whether they fit."""
        rows = [[part.name, size_text(part.nbytes), part.source, part.note] for part in self.parts]
        rows += [[name, size_text(getattr(self, key)), "", ""] for name, key in _SUMS]
        verdict = "it fits, with {} to spare" if self.spare >= 0 else "IT DOES NOT FIT, by {}"
        table_lines = table(rows, right=[1]).splitlines()
        return [self.title, *(f"  {x}" for x in (*table_lines, verdict.format(size_text(abs(self.spare)))))]


_SUMS = (("together", "nbytes"), ("available", "available"))


@dataclass(frozen=True)
class Answer:
    """A plan beside the machine it is for.

    Attributes:
        gpu: None where there is none.
        speed: None where nothing was measured.
        gpu_speed: predicted; None without a GPU.
    """

    model: Outline
    run: Run
    host: Memory
    gpu: Memory | None
    speed: Speed | None
    gpu_speed: GpuSpeed | None = None

    @property
    def memories(self) -> list[Memory]:
        """Of the host, and of the GPU if there is one."""
        return [self.host] if self.gpu is None else [self.host, self.gpu]

    @property
    def fits(self) -> bool:
        """Whether every memory holds its parts."""
        return all(memory.spare >= 0 for memory in self.memories)

    @property
    def tokens_per_second(self) -> float | None:
        """Upper bound: the experts' share of a step alone."""
        if self.speed is None:
            return None
        twice = self.run.checkpointing and not self.run.retain
        return self.speed.tokens_per_second(len(self.model.layers), self.run.tokens, twice)


def to_dict(answer: Answer) -> dict[str, Any]:
    """As JSON takes it."""
    model, speed = answer.model, answer.speed
    return {
        "model": {
            "model_type": model.model_type,
            "layers": [asdict(layer) for layer in model.layers],
            "rest_bytes": model.rest_bytes,
        },
        "run": {**asdict(answer.run), "tokens": answer.run.tokens},
        "host": answer.host.to_dict(),
        "gpu": answer.gpu and answer.gpu.to_dict(),
        "speed": speed and {**asdict(speed), "tokens_per_second_at_most": answer.tokens_per_second},
        "gpu_speed": None if answer.gpu_speed is None else gpu_speed.to_dict(answer.gpu_speed),
        "fits": answer.fits,
    }


def describe(answer: Answer) -> str:
    """Model, memory by part, whether it fits, speed."""
    run = answer.run
    checkpointing = ", gradient checkpointing" if run.checkpointing else ""
    checkpointing += ", experts retained" if run.retain else ""
    targets = ", ".join((*run.projections, *run.modules))
    lines = [
        f"model  {_model_text(answer.model)}",
        f"run    {run.batch} x {run.sequence} tokens, LoRA rank {run.rank} in fp32 on {targets}, "
        f"{run.optimizer}{checkpointing}",
    ]
    for memory in answer.memories:
        lines += ["", *memory.describe()]
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
