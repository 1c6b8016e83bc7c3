"""How long the experts of a training step take on CPU, link and GPU together, from shapes and rates alone.

What `plan.cut` predicts of one layer, for all of them. Attention and all else of a step come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from kt_moe.gpu.plan import Costs, Rates, bf16_bytes, cut, cut_by_share, end, layer_costs, seconds_of

ROUTINGS = ("even", "skewed")
_SKEW = 1.5  # popularity is rank ** -1.5

# One H200 on PCIe 5 x16 beside 16 vCPUs of Emerald Rapids with AMX, as `rates.measure` finds it for layers of
# Qwen3-30B-A3B in bf16. The link's rate is that of long copies, the GPU's that of passes of 16,384 tokens
# (docs/performance.md).
REFERENCE = Rates(link=55e9, gpu_flops=330e12, gpu_bytes=2.6e12, cpu_flops=6.2e12, cpu_bytes=69e9)
_REFERENCE_CPUS = 16
_SOCKET_BYTES = 250e9  # a second from the memory of one socket: eight channels of DDR5
LINKS = {"PCIe 3 x16": 12.5e9, "PCIe 4 x16": 25e9, "PCIe 5 x16": 55e9}  # bytes a second, page-locked
# GPUs by their data sheets: GiB of memory, less what driver and context take; a second, operations of dense
# bf16 products with fp32 sums, and bytes of memory; PCI Express.
CARDS = {
    "rtx3090": (23, 71e12, 0.936e12, "PCIe 4 x16"),
    "rtx4090": (23, 165e12, 1.008e12, "PCIe 4 x16"),
    "rtx5090": (31, 210e12, 1.792e12, "PCIe 5 x16"),
    "rtx6000ada": (47, 364e12, 0.960e12, "PCIe 4 x16"),
    "l40s": (47, 362e12, 0.864e12, "PCIe 4 x16"),
    "a100-40": (39, 312e12, 1.555e12, "PCIe 4 x16"),
    "a100-80": (79, 312e12, 1.935e12, "PCIe 4 x16"),
    "h100": (79, 989e12, 3.350e12, "PCIe 5 x16"),
    "h200": (139, 989e12, 4.800e12, "PCIe 5 x16"),
}


@dataclass(frozen=True)
class Workload:
    """The routed experts of a model in a training step.

    Attributes:
        layers: how many have experts.
        hidden, intermediate, experts, topk: H, I, E and K of each.
        stored_bytes: of one expert's weights as they are stored.
        rank: the LoRA ranks of gate, up and down together.
        tokens: of a pass.
        recompute: gradient checkpointing computes the forward of experts twice.
        gated: whether experts have a gate.
    """

    layers: int
    hidden: int
    intermediate: int
    experts: int
    topk: int
    stored_bytes: int
    rank: int
    tokens: int
    recompute: bool = False
    gated: bool = True


@dataclass(frozen=True)
class Prediction:
    """The experts of a step: forward and backward of all layers, one after the other.

    Attributes:
        seconds: of the step.
        link, gpu, cpu: seconds that each of them works in it.
        gpu_experts, cpu_experts, gpu_rows, cpu_rows: of a layer, by place.
        bytes_moved: over the link.
        tokens_per_second: at most, as all else takes time too.
    """

    routing: str
    seconds: float
    link: float
    gpu: float
    cpu: float
    gpu_experts: int
    cpu_experts: int
    gpu_rows: int
    cpu_rows: int
    bytes_moved: float
    tokens_per_second: float

    @property
    def bound(self) -> str:
        """Of "link", "GPU" and "CPU" the one that works longest."""
        by_place = {"link": self.link, "GPU": self.gpu, "CPU": self.cpu}
        return max(by_place, key=lambda place: by_place[place])


def predict(
    work: Workload, rates: Rates, gpu_memory: int, routing: str = "even", cpu_share: float | None = None
) -> Prediction:
    """Predict a step.

    Args:
        gpu_memory: bytes for experts on the GPU.
        routing: "even": all experts are equally popular. "skewed": by Zipf's law.
        cpu_share: see `plan.cut_by_share`; None: what ends soonest.

    Raises:
        ValueError: the memory does not hold one expert.
    """
    all_experts = work.layers * work.experts
    slots = min(all_experts, gpu_memory // work.stored_bytes)
    if slots < 1 and cpu_share != 1.0:
        raise ValueError(
            f"the GPU memory for experts is {gpu_memory} bytes, wanted at least {work.stored_bytes}, which "
            "one expert takes"
        )
    missing = 1.0 - slots / all_experts
    costs = _costs(work, rates, missing, train=True)
    if work.recompute:
        costs = _sum(costs, _costs(work, rates, missing, train=False))
    routes = expected_routes(work, routing)
    plan = cut(routes, costs) if cpu_share is None else cut_by_share(routes, cpu_share)
    of_layer = seconds_of(plan, costs)
    seconds = work.layers * float(end(costs, *of_layer))
    link, gpu, cpu = (work.layers * seconds for seconds in of_layer)
    return Prediction(
        routing, seconds, link, gpu, cpu, len(plan.gpu), len(plan.cpu), *plan.rows, link * rates.link,
        work.tokens / seconds,
    )  # fmt: skip


def expected_routes(work: Workload, routing: str) -> NDArray[np.int64]:
    """[E] rows of each expert, tokens * K together: K different ones for each token.

    An expert is among a token's K with probability 1 - exp(-t * popularity), where t is such that there are K
    of them: about how likely it is to be among the K first of exponential clocks, one an expert.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing is {routing!r}, wanted one of {ROUTINGS}")
    popularity = np.arange(1, work.experts + 1, dtype=np.float64) ** (-_SKEW if routing == "skewed" else 0.0)
    least, most = 0.0, 1.0
    while work.topk < work.experts and (1.0 - np.exp(-most * popularity)).sum() < work.topk:
        most *= 2.0
    for _ in range(100):
        middle = (least + most) / 2.0
        enough = (1.0 - np.exp(-middle * popularity)).sum() >= work.topk
        least, most = (least, middle) if enough else (middle, most)
    among = 1.0 - np.exp(-most * popularity) if work.topk < work.experts else np.ones(work.experts)
    rows = work.tokens * among * (work.topk / among.sum())
    whole: NDArray[np.int64] = np.floor(rows + 1e-9).astype(np.int64)
    left = work.tokens * work.topk - int(whole.sum())
    whole[np.argsort(whole - rows, kind="stable")[:left]] += 1
    return whole


def card_rates(name: str) -> dict[str, float]:
    """What to expect of one of `CARDS`: as much of its data sheet as was measured of an H200's."""
    (_, flops, nbytes, link), (_, h200_flops, h200_bytes, _) = CARDS[name], CARDS["h200"]
    return {
        "link": LINKS[link],
        "gpu_flops": flops / h200_flops * REFERENCE.gpu_flops,
        "gpu_bytes": nbytes / h200_bytes * REFERENCE.gpu_bytes,
    }


def reference_machine(link: str = "PCIe 5 x16", cpus: int = _REFERENCE_CPUS) -> Rates:
    """Rates of a machine like `REFERENCE` with another link and number of CPUs, for rough comparisons.

    Args:
        link: one of `LINKS`.
        cpus: with AMX, of one socket.
    """
    part = cpus / _REFERENCE_CPUS
    return replace(
        REFERENCE,
        link=LINKS[link],
        cpu_flops=REFERENCE.cpu_flops * part,
        cpu_bytes=min(REFERENCE.cpu_bytes * part, _SOCKET_BYTES),
    )


def _costs(work: Workload, rates: Rates, missing: float, train: bool) -> Costs:
    in_place = work.stored_bytes == bf16_bytes(work.hidden, work.intermediate, work.gated)
    return layer_costs(
        rates,
        work.hidden,
        work.intermediate,
        work.stored_bytes,
        work.rank,
        missing,
        train,
        in_place,
        work.gated,
    )


def _sum(a: Costs, b: Costs) -> Costs:
    return Costs(*(getattr(a, field.name) + getattr(b, field.name) for field in fields(Costs)))
