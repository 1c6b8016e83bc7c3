"""How long the experts of a step take on CPU, link and GPU together, and on several hosts, from rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kt_moe import Experts, Runtime
from kt_moe.architectures import ExpertModule
from kt_moe.cli.plan.memory import LORA_BYTES, Part, lora_numbers, ranks, weights_bytes, weights_on_gpu
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
from kt_moe.gpu.plan import Rates
from kt_moe.gpu.predict import CARDS, REFERENCE, Prediction, Workload, card_rates, predict
from kt_moe.gpu.rates import cpu_rates, gpu_rates
from kt_moe.token_exchange import exchange_bytes, partition

MakePlan = Callable[[Outline, Part], tuple[list[Part], list[Part]]]
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


def modes_of(
    job: dict[str, Any], model: Outline, run: Run, format: str, weights: Part, rates: Rates, plan: MakePlan,
    host_free: int, gpu_free: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The two ways to share experts out over processes, each with these numbers, and whether it fits.

    "host": each host has all experts once, and its ranks share them. "global": each rank has its part of
    every layer's experts (`kt_moe.token_exchange.partition`), and tokens travel. All ranks have as many
    tokens as the run, and routing is even.

    host, gpu: bytes of a host's memory, and of a rank's GPU. network: bytes of a step that a host sends to
    others, and gets from them. experts, exchange: seconds of a step, one after the other. tokens_per_second:
    of all ranks, at most.

    Args:
        job: "hosts"; "ranks" on each; "network": bytes a second that a host sends, and receives meanwhile.
        plan: parts in host memory and in the GPU's of a rank with a model and its experts' weights.
        rates: of a host and a GPU of it.
        host_free, gpu_free: bytes of a host and of a rank's GPU; None: there is none.
    """
    hosts, on_each = job["hosts"], job["ranks"]
    size = hosts * on_each
    # A rank has its part of the host's cores, and a link of its own.
    rates = replace(rates, cpu_flops=rates.cpu_flops / on_each, cpu_bytes=rates.cpu_bytes / on_each)
    found, layers = [], len(model.layers)
    for name in ("host", "global"):
        own, routed, part, rows, away, numbers = model, run, weights, 0.0, 0.0, model.rest_lora
        if name == "host":
            numbers += sum(lora_numbers(x, run) for x in model.layers)
        else:
            own, part = _part_of(model, weights, size)
            to_rank = _pairs(model, size) * run.tokens  # of a layer
            # What comes back to one rank another sends, so that in the mean a rank sends both.
            of_pair = sum(exchange_bytes(model.layers[0].hidden_size, model.topk, run.checkpointing))
            away = (size - on_each) * to_rank * layers * of_pair
            rows = size * to_rank * (1 if run.one_layer else layers) * 4 * model.layers[0].hidden_size
        reduced = 2 * (size - 1) / size * numbers * LORA_BYTES  # by a ring
        host, gpu = (sum(p.nbytes for p in parts) for parts in plan(own, part))
        host = on_each * (host + int(rows)) - (part.nbytes * (on_each - 1) if name == "host" else 0)
        network = (on_each * away + reduced) * (hosts > 1)
        if name == "global":  # as many routes, to fewer experts
            own, routed = replace(own, topk=1), replace(run, batch=run.batch * model.topk)
        experts = step_of(own, routed, format, part, rates, gpu_free).seconds
        exchange = network / job["network"]
        rate = size * run.tokens / (experts + exchange)
        fits = host <= host_free and gpu <= (gpu_free or 0)
        found.append(
            {"name": name, "host": host, "gpu": gpu, "network": network, "experts": experts}
            | {"exchange": exchange, "tokens_per_second": rate, "fits": fits}
        )
    return found


def _part_of(model: Outline, weights: Part, size: int) -> tuple[Outline, Part]:
    """What the first rank has, which no other has more of."""
    layers = [replace(x, num_experts=len(partition(x.num_experts, size)[0])) for x in model.layers]
    share = sum(x.num_experts for x in layers) / sum(x.num_experts for x in model.layers)
    return replace(model, layers=tuple(layers)), replace(weights, nbytes=math.ceil(weights.nbytes * share))


def _pairs(model: Outline, size: int) -> float:
    """How many tokens of one have an expert on a rank: the mean over ranks, K of E experts drawn evenly."""
    experts, topk = model.layers[0].num_experts, model.topk
    without = [math.comb(experts - len(part), topk) for part in partition(experts, size)]
    return 1 - sum(without) / size / math.comb(experts, topk)
