"""Several processes on several hosts: memory, exchange and time of the two ways to share experts out.

"host": each host has all experts once, and its ranks share them. "global": each rank has its part of every
layer's experts (`kt_moe.token_exchange.partition`), and tokens travel. All ranks have as many tokens as the
run, and routing is even.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kt_moe.cli.plan.memory import LORA_BYTES, Part, lora_numbers, weights_on_gpu
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline
from kt_moe.cli.plan.speed import cpu_share, workload
from kt_moe.cli.text import size_text, table
from kt_moe.gpu.plan import Rates
from kt_moe.gpu.predict import predict
from kt_moe.token_exchange import exchange_bytes, partition

MakePlan = Callable[[Outline, Part], tuple[list[Part], list[Part]]]


@dataclass(frozen=True)
class Job:
    """hosts; ranks on each; network: bytes a second that a host sends, and receives at the same time.

    Raises:
        ValueError: one that is not positive.
    """

    hosts: int
    ranks: int
    network: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"--plan_{name} is {value:g}, wanted a positive number")

    @property
    def size(self) -> int:
        """Ranks of all hosts."""
        return self.hosts * self.ranks


@dataclass(frozen=True)
class Mode:
    """One way to share the experts out.

    Attributes:
        host, gpu: bytes of a host's memory, and of a rank's GPU.
        link: bytes over a rank's link to its GPU in a step.
        exchanged: bytes that a rank sends to others in a step, and gets from them.
        network: of these what all ranks of a host send to other hosts.
        experts, exchange: seconds of a step, one after the other.
        tokens_per_second: of all ranks, at most.
    """

    name: str
    host: int
    gpu: int
    link: float
    exchanged: float
    network: float
    experts: float
    exchange: float
    tokens_per_second: float
    fits: bool = True


def modes_of(
    job: Job, model: Outline, run: Run, format: str, weights: Part, rates: Rates, plan: MakePlan,
    share: str, host_free: int, gpu_free: int | None,
) -> list[Mode]:  # fmt: skip
    """Both modes of a job.

    Args:
        plan: parts in host memory and in the GPU's of a rank with a model and its experts' weights.
        rates: of a host and a GPU of it.
        share: --experts_cpu_share.
        host_free, gpu_free: bytes of a host and of a rank's GPU; None: there is none.
    """
    # A rank has its part of the host's cores, and a link of its own.
    rates = replace(rates, cpu_flops=rates.cpu_flops / job.ranks, cpu_bytes=rates.cpu_bytes / job.ranks)
    found = []
    for name in ("host", "global"):
        own, part, rows, sent, away = model, weights, 0.0, 0.0, 0.0
        if name == "global":
            own, part = _part_of(model, weights, job.size)
            # What comes back to one rank another sends, so that in the mean a rank sends both.
            of_pair = sum(exchange_bytes(model.layers[0].hidden_size, model.topk, run.checkpointing))
            to_rank = _pairs(model, job.size) * len(model.layers) * run.tokens  # of all its layers and tokens
            sent, away = (n * to_rank * of_pair for n in (job.size - 1, job.size - job.ranks))
            kept = 1 if run.one_layer else len(model.layers)
            rows = job.size * to_rank / len(model.layers) * kept * 4 * model.layers[0].hidden_size
        numbers = model.rest_lora
        numbers += sum(lora_numbers(x, run) for x in model.layers) if name == "host" else 0
        reduced = 2 * (job.size - 1) / job.size * numbers * LORA_BYTES  # by a ring
        host, gpu = (sum(p.nbytes for p in parts) for parts in plan(own, part))
        once = part.nbytes * (job.ranks - 1) if name == "host" else 0
        host = job.ranks * (host + int(rows)) - once
        network = (job.ranks * away + reduced) * (job.hosts > 1)
        memory = 0
        if gpu_free is not None:
            memory = weights_on_gpu(part.nbytes, run.gpu_memory, gpu_free - model.rest_bytes)
        work = workload(own, run, format)
        if name == "global":  # as many routes, to fewer experts
            work = replace(work, topk=1, tokens=run.tokens * model.topk)
        prediction = predict(work, rates, memory, cpu_share=cpu_share(share, run, memory))
        seconds = prediction.seconds, network / job.network
        tokens, fits = job.size * run.tokens / sum(seconds), host <= host_free and gpu <= (gpu_free or 0)
        moved = prediction.bytes_moved, sent + reduced, network
        found.append(Mode(name, host, gpu, *moved, *seconds, tokens, fits))
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


def describe_modes(job: Job, modes: list[Mode]) -> str:
    """A table of them."""
    head = "a host has", "a GPU has", "link", "rank sends", "host sends", "experts", "network", "at most"
    rows = [["expert_parallel", *head]]
    for mode in modes:
        sizes = [size_text(int(x)) for x in (mode.host, mode.gpu, mode.link, mode.exchanged, mode.network)]
        times = [f"{mode.experts:.3g} s", f"{mode.exchange:.3g} s", f"{mode.tokens_per_second:,.0f} tokens/s"]
        rows.append([f'"{mode.name}"' + ("" if mode.fits else ": DOES NOT FIT"), *sizes, *times])
    network = f"{job.network / 1e9:g} GB/s"
    return "\n".join(
        [
            f"{job.hosts} x {job.ranks} ranks of such a run, whose hosts send and receive {network} each",
            *(f"  {line}" for line in table(rows, right=range(1, 9)).splitlines()),
            "  memory; bytes of a step over a rank's link, to other ranks and to other hosts; seconds of a",
            "  step's experts, then of the network; routing is even; attention and all else come on top",
        ]
    )
