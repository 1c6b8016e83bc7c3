"""How long the experts of a step take on CPU, link and GPU together: what a plan says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kt_moe import Runtime
from kt_moe.cli.bench.cases import Shape
from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED, projection_bytes
from kt_moe.cli.plan.measure import make_experts
from kt_moe.cli.plan.memory import weights_on_gpu
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.shapes import ExpertLayer, Outline
from kt_moe.cli.text import size_text, table
from kt_moe.cli.train import Options
from kt_moe.gpu.plan import Rates
from kt_moe.gpu.predict import REFERENCE, ROUTINGS, Prediction, Workload, predict
from kt_moe.gpu.rates import measure

_EXPERTS = 8  # that are made for a measurement


@dataclass(frozen=True)
class GpuSpeed:
    """What is predicted, and from what.

    Attributes:
        memory: bytes for experts on the GPU.
        sources: for each rate "given", "measured" or "assumed".
        predictions: one for each of `ROUTINGS`.
    """

    memory: int
    rates: Rates
    sources: dict[str, str]
    predictions: tuple[Prediction, ...]


def speed_of(
    options: Options,
    model: Outline,
    run: Run,
    format: str,
    weights: int,
    runtime: Runtime,
    free: int | None,
) -> GpuSpeed | None:
    """Of the run that options describe; None without a GPU, here or by memory or rates that are given.

    Rates are given, or measured on a GPU that is here, or `REFERENCE`'s.

    Args:
        format: of the experts in memory; `weights` bytes together.
        free: bytes of the GPU; None: there is none.

    Raises:
        UserError: --experts_gpu_memory does not hold one expert.
    """
    given, share, layer = options.experts.rates(), options.experts.experts_cpu_share, model.layers[0]
    if run.gpu_memory == 0 or (free is None and run.gpu_memory == "auto" and given is None):
        return None
    sizes = projection_bytes(QUANTISED[format], 1, layer.hidden, layer.intermediate, layer.gated)
    stored, memory, measured = sum(sizes.values()), run.gpu_memory, {}
    if free is not None:
        memory = weights_on_gpu(weights, memory, free - model.rest_bytes)
        if options.plan.plan_measure and torch.cuda.is_available():
            measured = measured_rates(layer, format, runtime, torch.device("cuda"))
    elif memory == "auto":
        memory = 2 * layer.experts * stored  # of two layers, so that nothing stays there
    work = Workload(
        len(model.layers), layer.hidden, layer.intermediate, layer.experts, layer.topk, stored,
        sum(p in run.projections for p in layer.projections) * run.rank, run.tokens,
        run.checkpointing and not run.retain, layer.gated,
    )  # fmt: skip
    known: dict[str, float] = {}
    sources: dict[str, str] = {}
    for source, rates in (("assumed", vars(REFERENCE)), ("measured", measured), ("given", given or {})):
        known |= rates
        sources |= dict.fromkeys(rates, source)
    cpu_share = None if share == "auto" else float(share)
    try:
        found = [predict(work, Rates(**known), int(memory), routing, cpu_share) for routing in ROUTINGS]
    except ValueError as error:
        raise UserError(f"--experts_gpu_memory: {error}") from error
    return GpuSpeed(int(memory), Rates(**known), sources, tuple(found))


def measured_rates(
    layer: ExpertLayer, format: str, runtime: Runtime, device: torch.device
) -> dict[str, float]:
    """Of a few experts of the model's shape on this machine."""
    experts = min(_EXPERTS, layer.experts)
    shape = Shape("planned", layer.hidden, layer.intermediate, experts, min(layer.topk, experts))
    rates = asdict(measure(make_experts(shape, layer, format, runtime), device))
    del rates["rest_seconds"]  # that needs the whole model
    return rates


def to_dict(speed: GpuSpeed) -> dict[str, Any]:
    """As JSON takes it."""
    return {
        "memory": speed.memory,
        "rates": asdict(speed.rates),
        "sources": speed.sources,
        "predictions": [{**asdict(p), "bound": p.bound} for p in speed.predictions],
    }


def describe(speed: GpuSpeed) -> list[str]:
    """Rates, then a line for each routing."""
    rows = [["routing", "GPU", "CPU", "moved", "link", "GPU", "CPU", "step", "bound by", "tokens/s"]]
    for p in speed.predictions:
        rows.append([
            p.routing,
            f"{p.gpu_experts} experts, {p.gpu_rows:,} rows",
            f"{p.cpu_experts} experts, {p.cpu_rows:,} rows",
            f"{p.bytes_moved / 1e9:.1f} GB",
            *(f"{seconds:.3f} s" for seconds in (p.link, p.gpu, p.cpu, p.seconds)),
            p.bound,
            f"{p.tokens_per_second:,.0f}",
        ])  # fmt: skip
    indented = [f"  {line}" for line in table(rows, right=range(3, 10)).splitlines()]
    return [
        f"speed with a GPU, predicted, with {size_text(speed.memory)} of its memory for experts",
        *(f"  {line}" for line in _rates_lines(speed)),
        *indented,
        "  experts and rows of a layer; all else of a forward and backward pass; at most so many tokens/s: "
        f"{'loss and optimizer' if speed.rates.rest_seconds else 'attention and the rest'} come on top",
    ]


def _rates_lines(speed: GpuSpeed) -> list[str]:
    r = speed.rates
    texts = {
        "link": f"link {r.link / 1e9:.3g} GB/s",
        "gpu_flops": f"GPU {r.gpu_flops / 1e12:.3g} TFLOP/s",
        "gpu_bytes": f"GPU memory {r.gpu_bytes / 1e9:.4g} GB/s",
        "cpu_flops": f"CPU {r.cpu_flops / 1e12:.3g} TFLOP/s",
        "cpu_bytes": f"CPU memory {r.cpu_bytes / 1e9:.3g} GB/s",
    }
    if r.rest_seconds:
        texts["rest_seconds"] = f"{1e3 * r.rest_seconds:.3g} ms a layer for all but experts"
    lines = []
    for source in ("given", "measured", "assumed"):
        if of_source := [texts[name] for name in texts if speed.sources[name] == source]:
            where = " (an H200 on PCIe 5, 16 vCPUs with AMX)" if source == "assumed" else ""
            lines.append(f"{source}{where}: {', '.join(of_source)}")
    return lines
