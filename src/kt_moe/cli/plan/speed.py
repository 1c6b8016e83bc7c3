"""How long the experts of a step take on CPU, link and GPU together, from rates of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kt_moe import Experts, Runtime
from kt_moe.architectures import ExpertModule
from kt_moe.cli.errors import UserError
from kt_moe.cli.plan.memory import ranks, weights_bytes, weights_on_gpu
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
from kt_moe.gpu.plan import Rates
from kt_moe.gpu.predict import CARDS, REFERENCE, ROUTINGS, Prediction, Workload, card_rates, predict
from kt_moe.gpu.rates import cpu_rates, gpu_rates

_EXPERTS = 8  # that are made for a measurement


@dataclass(frozen=True)
class Speed:
    """What is predicted, and from what.

    Attributes:
        memory: bytes for experts on the GPU; 0: the CPU computes all of them.
        sources: for each rate where it is from.
        predictions: one for each of `ROUTINGS`.
    """

    memory: int
    rates: Rates
    sources: dict[str, str]
    predictions: list[Prediction]


def speed_of(
    options: Any, model: Outline, run: Run, format: str, weights: int, runtime: Runtime, free: int | None
) -> Speed:
    """Of the run that `kt_moe.cli.train.Options` describe.

    Rates are given, or of a card that is named, or measured here, or `REFERENCE`'s.

    Args:
        format: of the experts in memory; `weights` bytes together.
        free: bytes of the GPU; None: there is none.

    Raises:
        UserError: --experts_gpu_memory does not hold one expert.
    """
    layer, plan, share = model.layers[0], options.plan, options.experts.experts_cpu_share
    memory = 0 if free is None else weights_on_gpu(weights, run.gpu_memory, free - model.rest_bytes)
    work = workload(model, run, format)
    known = {"assumed, an H200 on PCIe 5 and 16 vCPUs with AMX": {**vars(REFERENCE)}}
    if plan.plan_measure:
        known["measured"] = measured_rates(layer, format, runtime)
    if plan.plan_gpu in CARDS:
        known[f"expected of an {plan.plan_gpu} by its data sheet"] = card_rates(plan.plan_gpu)
    known["given"] = options.experts.rates() or {}
    rates = {name: rate for some in known.values() for name, rate in some.items()}
    sources = {name: source for source, some in known.items() for name in some}
    of_cpu = cpu_share(share, run, memory)
    try:
        found = [predict(work, Rates(**rates), memory, routing, of_cpu) for routing in ROUTINGS]
    except ValueError as error:
        raise UserError(f"--experts_gpu_memory: {error}") from error
    return Speed(memory, Rates(**rates), sources, found)


def cpu_share(share: str, run: Run, memory: int) -> float | None:
    """As `predict` takes it, of --experts_cpu_share and the memory for experts on the GPU."""
    if not memory and run.gpu_memory in ("auto", 0):
        return 1.0
    return None if share == "auto" else float(share)


def workload(model: Outline, run: Run, format: str) -> Workload:
    """The experts of a step."""
    layer = model.layers[0]
    return Workload(
        len(model.layers), layer.hidden_size, layer.intermediate_size, layer.num_experts, model.topk,
        weights_bytes(layer, format) // layer.num_experts, ranks(layer, run), run.tokens, run.one_layer,
        layer.gated,
    )  # fmt: skip


def measured_rates(layer: ExpertModule, format: str, runtime: Runtime) -> dict[str, float]:
    """Of a few experts of the model's shape on this machine."""
    shape = min(_EXPERTS, layer.num_experts), layer.intermediate_size, layer.hidden_size
    gate, up, down = (torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.05) for _ in range(3))
    weights = gate if layer.gated else None, up, down.mT.contiguous()
    experts = Experts(*weights, activation=layer.activation, format=format, runtime=runtime)
    rates = cpu_rates(experts)
    return rates | (gpu_rates(experts, torch.device("cuda")) if torch.cuda.is_available() else {})
