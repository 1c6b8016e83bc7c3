"""A plan for people; as JSON it is `Answer` itself."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Memory:
    """What of the run lies in one memory, and the bytes of it that the run may take.

    spare: bytes left over, negative if the parts do not fit.
    """

    title: str
    parts: list[Part]
    nbytes: int
    available: int
    spare: int

    @classmethod
    def of(cls, title: str, parts: list[Part], available: int) -> Memory:
        """Add up."""
        nbytes = sum(part.nbytes for part in parts)
        return cls(title, parts, nbytes, available, available - nbytes)


@dataclass(frozen=True)
class Answer:
    """A plan beside the machine it is for. gpu: None where there is none."""

    model: Outline
    run: Run
    host: Memory
    gpu: Memory | None
    speed: Speed
    fits: bool


def describe(answer: Answer) -> str:
    """Model, memory by part, whether it fits, speed."""
    model, run = answer.model, answer.run
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
    for memory in filter(None, (answer.host, answer.gpu)):
        rows = [[part.name, size_text(part.nbytes), part.source, part.note] for part in memory.parts]
        rows += [
            ["together", size_text(memory.nbytes), "", ""],
            ["available", size_text(memory.available), "", ""],
        ]
        verdict = "it fits, with {} to spare" if memory.spare >= 0 else "IT DOES NOT FIT, by {}"
        shown = [*table(rows, right=[1]).splitlines(), verdict.format(size_text(abs(memory.spare)))]
        lines += ["", memory.title, *(f"  {line}" for line in shown)]
    return "\n".join([*lines, "", *_speed_lines(answer.speed)])


def _speed_lines(speed: Speed) -> list[str]:
    rates = {
        name: _RATES[name][0].format(getattr(speed.rates, name) / _RATES[name][1]) for name in speed.sources
    }
    shown = [name for name in rates if speed.memory or name.startswith("cpu")]
    known = []
    for source in dict.fromkeys(speed.sources.values()):
        if of_source := [rates[name] for name in shown if speed.sources[name] == source]:
            known.append(f"  {source}: {', '.join(of_source)}")
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
