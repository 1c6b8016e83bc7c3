"""How long the experts of a step take on CPU, link and GPU together, from rates of the machine."""

from __future__ import annotations

from typing import Any

import torch

from kt_moe import Experts, Runtime
from kt_moe.architectures import ExpertModule
from kt_moe.cli.plan.memory import Part, ranks, weights_bytes, weights_on_gpu
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
from kt_moe.gpu.plan import Rates
from kt_moe.gpu.predict import CARDS, REFERENCE, Prediction, Workload, card_rates, predict
from kt_moe.gpu.rates import cpu_rates, gpu_rates

_EXPERTS = 8  # that are made for a measurement


def rates_of(
    options: Any, layer: ExpertModule, format: str, runtime: Runtime
) -> tuple[Rates, dict[str, str]]:
    """Given, or of a card that is named, or measured here, or `REFERENCE`'s; and where each is from.

    options: `kt_moe.cli.train.Options`.
    """
    card = options.plan.plan_gpu
    known = {"assumed, an H200 on PCIe 5 and 16 vCPUs with AMX": {**vars(REFERENCE)}}
    if options.plan.plan_measure:
        known["measured"] = measured_rates(layer, format, runtime)
    if card in CARDS:
        known[f"expected of an {card} by its data sheet"] = card_rates(card)
    known["given"] = options.experts.rates() or {}
    rates = {name: rate for some in known.values() for name, rate in some.items()}
    return Rates(**rates), {name: source for source, some in known.items() for name in some}


def step_of(
    model: Outline, run: Run, format: str, weights: Part, rates: Rates, gpu: int | None, routing: str = "even"
) -> Prediction:
    """The experts of a step.

    Args:
        weights, format: of all experts, and what they are in.
        gpu: free bytes of the GPU; None: there is none.

    Raises:
        ValueError: the memory for experts does not hold one.
    """
    layer, memory = model.layers[0], weights_on_gpu(model, run, weights.nbytes, gpu)
    work = Workload(
        len(model.layers), layer.hidden_size, layer.intermediate_size, layer.num_experts, model.topk,
        weights_bytes(layer, format) // layer.num_experts, ranks(layer, run), run.tokens, run.one_layer,
        layer.gated,
    )  # fmt: skip
    alone = not memory and run.gpu_memory in ("auto", 0)
    return predict(work, rates, memory, routing, 1.0 if alone else run.cpu_share)


def measured_rates(layer: ExpertModule, format: str, runtime: Runtime) -> dict[str, float]:
    """Of a few experts of the model's shape on this machine."""
    shape = min(_EXPERTS, layer.num_experts), layer.intermediate_size, layer.hidden_size
    gate, up, down = (torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.05) for _ in range(3))
    weights = gate if layer.gated else None, up, down.mT.contiguous()
    experts = Experts(*weights, activation=layer.activation, format=format, runtime=runtime)
    rates = cpu_rates(experts)
    return rates | (gpu_rates(experts, torch.device("cuda")) if torch.cuda.is_available() else {})
