"""What a training step's experts cost on 1 to 1,024 ranks: the tables of distributed.md.

Parts of experts and the ranks that tokens go to are those of the code (`kt_moe.token_exchange`), for routes
that are drawn; bytes are divided by the network's rate, and `kt_moe.gpu.predict` has the time of a rank's
experts. All ranks are like one H200 on PCIe 5 beside 16 vCPUs with AMX.

    python docs/parallel_model.py --preset qwen3-235b-a22b --layers 94 --tokens 8192

With --overlap: what chunks gain where hosts without GPUs divide experts, by their rates and the network's.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kt_moe.cli.bench.cases import PRESETS, Shape
from kt_moe.cli.formats import QUANTISED, projection_bytes
from kt_moe.cli.terminal import integer, list_of, table
from kt_moe.gpu.predict import REFERENCE, Workload, predict
from kt_moe.routing_stats import RoutingHistory
from kt_moe.token_exchange import Routes, exchange_bytes, partition

RECORDED = Path(__file__).with_name("routing.safetensors")  # of examples/tiny-qwen3-moe, on prose
DRAWN = 4096  # tokens whose routes are drawn
LORA_BYTES = 4  # of a number
CHUNK_COSTS = {1: 1.0, 2: 1.03, 4: 1.05}  # of the experts' time, at 512 rows an expert and chunk
HOST_RATES = (
    5_000,
    10_000,
    20_000,
    40_000,
)  # tokens/s of a layer's experts on one host, forward and backward
NETWORKS = (1.25e9, 3.125e9, 12.5e9)  # bytes/s


@dataclass(frozen=True)
class Cost:
    """Of a step: experts and network in seconds, one after the other; tokens of a rank.

    there: ranks that a token goes to. busiest: rows of the busiest rank over the mean. sent: bytes that a
    host sends to others for each token of its ranks.
    """

    there: float
    busiest: float
    sent: float
    experts: float
    network: float


def popularity(experts: int, routing: str) -> Tensor:
    """[E], even or with the spread of the recorded counts, the popular ones anywhere."""
    if routing == "even":
        return torch.ones(experts)
    of_layers = RoutingHistory.load(RECORDED).total().values()
    shares = torch.cat([counts / counts.double().mean() for counts in of_layers]).sort().values
    stretched = shares[torch.linspace(0, len(shares) - 1, experts).round().long()]
    return stretched[torch.randperm(experts, generator=torch.Generator().manual_seed(0))]


def drawn(popular: Tensor, topk: int, seed: int) -> Tensor:
    """[DRAWN, K] different experts of each token."""
    random = torch.Generator().manual_seed(seed)
    clocks = torch.empty(DRAWN, len(popular)).exponential_(generator=random) / popular
    return clocks.topk(topk, largest=False).indices


def workload(args: argparse.Namespace, shape: Shape) -> Workload:
    stored = sum(projection_bytes(QUANTISED[args.format], 1, shape.hidden, shape.intermediate).values())
    sizes = shape.hidden, shape.intermediate, shape.experts, shape.topk
    return Workload(args.layers, *sizes, stored, 3 * args.rank, args.tokens)


def reduced(args: argparse.Namespace, shape: Shape, replicas: int, parts: int) -> float:
    """Bytes that a host sends to average gradients of LoRA, which so many ranks divide, over its replicas."""
    numbers = 3 * args.layers * args.rank * shape.experts * (shape.hidden + shape.intermediate)
    return 2 * (replicas - 1) / replicas * numbers * LORA_BYTES / parts * min(parts, args.per_host)


def on_each_host(args: argparse.Namespace, shape: Shape, size: int) -> Cost:
    """expert_parallel="host"."""
    hosts = -(-size // args.per_host)
    sent = reduced(args, shape, size, 1) if hosts > 1 else 0.0
    seconds = predict(workload(args, shape), REFERENCE, args.gpu_bytes).seconds
    return Cost(0, 1, sent / args.tokens / args.per_host, seconds, sent / args.network)


def divided(args: argparse.Namespace, shape: Shape, size: int, routing: str, by_load: bool) -> Cost:
    """Experts divided over ranks, or over those of each group where there are more."""
    group = min(size, args.group, shape.experts)
    popular, host = popularity(shape.experts, routing), min(args.per_host, group)
    measured = drawn(popular, shape.topk, 1).flatten().bincount(minlength=shape.experts)
    parts = partition(shape.experts, group, measured.tolist() if by_load else None)
    ids = drawn(popular, shape.topk, 2)
    to_ranks = torch.tensor(Routes.of(ids, parts).sizes) / DRAWN  # a token's part that goes to each
    counts = ids.flatten().bincount(minlength=shape.experts)
    rows = torch.tensor([int(counts[part.start : part.stop].sum()) for part in parts]) / DRAWN
    most = int(rows.argmax())
    work = workload(args, shape)
    busiest = float(rows[most]) * group * args.tokens  # of the tokens of all ranks
    work = replace(work, experts=len(parts[most]), topk=1, tokens=round(busiest))
    there, back = exchange_bytes(shape.hidden, shape.topk)
    away = []  # bytes of a host's exchange, in the direction that has more
    for first in range(0, group, host):
        to_host = float(to_ranks[first : first + host].sum())
        ours, theirs = host * (float(to_ranks.sum()) - to_host), (group - host) * to_host
        away.append(max(ours * there + theirs * back, ours * back + theirs * there))
    exchanged = max(away) * args.tokens * args.layers
    exchanged += reduced(args, shape, size // group, group) if size > group else 0
    experts = predict(work, REFERENCE, args.gpu_bytes).seconds
    sent = exchanged / args.tokens / host
    return Cost(
        float(to_ranks.sum()), float(rows[most] / rows.mean()), sent, experts, exchanged / args.network
    )


def in_chunks(experts: float, network: float, chunks: int) -> float:
    """Seconds of a layer's forward and backward with tokens in chunks, of those of experts and of network.

    A third of the experts' time is forward's. Each direction has half of the bytes: a third goes there
    and two thirds come back. All rows go before results, one chunk after another.
    """
    seconds = 0.0
    for share in (1 / 3, 2 / 3):
        arrived = computed = 0.0
        sent = network / 6
        for _ in range(chunks):
            arrived += network / 6 / chunks
            computed = max(computed, arrived) + share * experts * CHUNK_COSTS[chunks] / chunks
            sent = max(sent, computed) + network / 3 / chunks
        seconds += sent
    return seconds


def overlap(shape: Shape) -> list[list[str]]:
    """Microseconds a token and layer, a host being one rank, and how much shorter chunks make their sum."""
    lines = [["hosts", "Gbit/s", "tokens/s", "experts us", "network us", "2 chunks", "4 chunks"]]
    for hosts in (2, 8):
        ids = drawn(popularity(shape.experts, "even"), shape.topk, 2)
        to = sum(Routes.of(ids, partition(shape.experts, hosts)).sizes) / DRAWN
        sent = to * (hosts - 1) / hosts * sum(exchange_bytes(shape.hidden, shape.topk))
        for rate in NETWORKS:
            for tokens in HOST_RATES:
                both = 1e6 / tokens, sent / rate * 1e6
                gains = (sum(both) / in_chunks(*both, chunks) for chunks in (2, 4))
                numbers = (*(f"{x:.0f}" for x in both), *(f"{gain:.2f}x" for gain in gains))
                lines.append([str(hosts), f"{rate * 8e-9:.0f}", f"{tokens:,}", *numbers])
    return lines


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="qwen3-235b-a22b", help="shape of a model")
    add("--layers", type=integer(1), default=94, help="with experts; default: 94")
    add("--format", choices=list(QUANTISED), default="bf16", help="of the weights; default: bf16")
    add("--tokens", type=integer(1), default=8192, help="of a rank's step; default: 8192")
    add("--rank", type=integer(0), default=16, help="of LoRA on all three; default: 16")
    add("--ranks", type=list_of(integer(1)), default=[1, 8, 16, 64, 256, 1024])
    add("--per-host", type=integer(1), default=8, help="ranks of a host; default: 8")
    add("--group", type=integer(1), default=64, help="most ranks that divide experts; default: 64")
    add("--network-gb-s", type=float, default=50, help="10^9 bytes/s of a host in each direction")
    add("--gpu-gb", type=float, default=24, help="of a GPU for experts, 10^9 bytes; default: 24")
    add("--overlap", action="store_true", help="what exchanging tokens in chunks gains")
    args = parser.parse_args(given)
    args.network, args.gpu_bytes = args.network_gb_s * 1e9, int(args.gpu_gb * 1e9)
    return args


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    shape = PRESETS[args.preset]
    if args.overlap:
        print(table(lines := overlap(shape), right=range(len(lines[0]))))
        return
    header = [
        "ranks",
        "experts",
        "routing",
        "to",
        "busiest",
        "MB/token",
        "experts s",
        "network s",
        "tokens/s",
    ]
    lines = [header]
    for size in args.ranks:
        costs = {("host", "any"): on_each_host(args, shape, size)}
        if size > 1:
            for routing, by_load in (("even", False), ("recorded", False), ("recorded", True)):
                name = "divided, by load" if by_load else "divided"
                costs[name, routing] = divided(args, shape, size, routing, by_load)
        for (name, routing), cost in costs.items():
            every = size * args.tokens / (cost.experts + cost.network)
            numbers = (cost.there, cost.busiest, cost.sent / 1e6, cost.experts, cost.network)
            lines.append([str(size), name, routing, *(f"{x:.2f}" for x in numbers), f"{every:,.0f}"])
    print(table(lines, right=[0, *range(3, len(header))]))


if __name__ == "__main__":
    main()
