"""Several processes on several hosts: memory, exchange and time of the two ways to share experts out.

"host": each host has all experts once, and its ranks share them. "global": each rank has its part of every
layer's experts (`kt_moe.token_exchange.partition`), and tokens travel. All ranks have as many tokens as the
run, and routing is even.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kt_moe.cli.plan.memory import LORA_BYTES, Part, lora_numbers
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
from kt_moe.cli.plan.speed import step_of
from kt_moe.gpu.plan import Rates
from kt_moe.token_exchange import exchange_bytes, partition

MakePlan = Callable[[Outline, Part], tuple[list[Part], list[Part]]]


def modes_of(
    job: dict[str, Any], model: Outline, run: Run, format: str, weights: Part, rates: Rates, plan: MakePlan,
    host_free: int, gpu_free: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Both modes of a job, each with its name and these numbers, and whether it fits.

    host, gpu: bytes of a host's memory, and of a rank's GPU. network: bytes of a step that a host sends to
    others, and gets from them. experts, exchange: seconds of a step, one after the other. tokens_per_second:
    of all ranks, at most.

    Args:
        job: "hosts"; "ranks" on each; "network": bytes a second that a host sends, and receives meanwhile.
        plan: parts in host memory and in the GPU's of a rank with a model and its experts' weights.
        rates: of a host and a GPU of it.
        host_free, gpu_free: bytes of a host and of a rank's GPU; None: there is none.
    """
    hosts, ranks = job["hosts"], job["ranks"]
    size = hosts * ranks
    # A rank has its part of the host's cores, and a link of its own.
    rates = replace(rates, cpu_flops=rates.cpu_flops / ranks, cpu_bytes=rates.cpu_bytes / ranks)
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
            away = (size - ranks) * to_rank * layers * of_pair
            rows = size * to_rank * (1 if run.one_layer else layers) * 4 * model.layers[0].hidden_size
        reduced = 2 * (size - 1) / size * numbers * LORA_BYTES  # by a ring
        host, gpu = (sum(p.nbytes for p in parts) for parts in plan(own, part))
        host = ranks * (host + int(rows)) - (part.nbytes * (ranks - 1) if name == "host" else 0)
        network = (ranks * away + reduced) * (hosts > 1)
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
