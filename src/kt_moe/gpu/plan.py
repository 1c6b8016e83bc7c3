"""Which routed experts of a call the GPU computes, and which the CPU: a pure function of numbers.

The cost of an expert on the GPU is its bytes on the link and hardly depends on its rows; on the CPU it grows
with the rows. So the experts with the most rows go to the GPU and the tail to the CPU, cut where both sides
are predicted to end together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CPU_CALL = 1e-3  # seconds
# The CPU is left alone where it would save less than what predictions are wrong by.
_WORTH_DIVIDING = 0.9


@dataclass(frozen=True)
class Rates:
    """How fast the machine moves and computes experts.

    Args:
        link: bytes a second from host memory to the GPU.
        gpu_flops, gpu_bytes: floating-point operations and bytes of memory a second on the GPU.
        cpu_flops, cpu_bytes: the same of the CPU's kernels.
    """

    link: float
    gpu_flops: float
    gpu_bytes: float
    cpu_flops: float
    cpu_bytes: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ValueError(f"Rates: {name} is {value!r}, wanted a positive number")


@dataclass(frozen=True)
class Costs:
    """Seconds of forward and backward together: of one routed expert, and of one of its rows, by place.

    `cpu_call` is what a call that leaves any expert to the CPU takes besides, as rows go there and come back.
    """

    link_expert: float
    gpu_expert: float
    gpu_row: float
    cpu_expert: float
    cpu_row: float
    cpu_call: float


@dataclass(frozen=True)
class Cut:
    """Routed experts by place, each with the most rows first (equal rows: by number).

    Attributes:
        gpu, cpu: numbers of experts.
        seconds: predicted time of the link, the GPU and the CPU.
        rows: of the GPU and the CPU.
    """

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    seconds: tuple[float, float, float]
    rows: tuple[int, int] = (0, 0)


def layer_costs(
    rates: Rates, hidden: int, intermediate: int, stored_bytes: int, rank: int, missing: float, train: bool
) -> Costs:
    """Costs of an expert of a layer.

    Args:
        hidden, intermediate: H and I.
        stored_bytes: of one expert's weights as they are stored.
        rank: the three LoRA ranks together.
        missing: the part of experts, in [0, 1], that are not on the GPU when they are wanted.
        train: whether a backward follows.
    """
    product = 2 * hidden * intermediate
    low_rank = 2 * rank * (hidden + intermediate)
    decoded = 6 * hidden * intermediate
    # Products with a weight a row: 3 in forward; backward has 3 more and on the GPU 2 of G and U again.
    cpu_products, gpu_products, low_ranks, passes = (6, 8, 4, 2) if train else (3, 3, 1, 1)
    row_bytes = 12 * hidden + 14 * intermediate  # of fp32 and bf16 rows that kernels write and read again
    return Costs(
        link_expert=passes * stored_bytes * missing / rates.link,
        gpu_expert=passes * (stored_bytes + 2 * decoded) / rates.gpu_bytes,
        gpu_row=(gpu_products * product + low_ranks * low_rank) / rates.gpu_flops
        + passes * row_bytes / rates.gpu_bytes,
        cpu_expert=passes * stored_bytes / rates.cpu_bytes,
        cpu_row=(cpu_products * product + low_ranks * low_rank) / rates.cpu_flops,
        cpu_call=passes * _CPU_CALL,
    )


def cut(counts: NDArray[np.integer], costs: Costs, cpu_share: float | None = None) -> Cut:
    """Divide the routed experts.

    Args:
        counts: [E], the rows of each expert; those with none are in neither place.
        costs: see `layer_costs`.
        cpu_share: part of all rows that the CPU is to compute, in [0, 1]; the nearest that whole experts
            from the tail give. None: what ends soonest.

    Returns:
        the same for the same arguments, on every machine.
    """
    order = np.argsort(-counts.astype(np.int64), kind="stable")
    order = order[counts[order] > 0]
    rows = np.concatenate([[0], np.cumsum(counts[order], dtype=np.int64)])  # of the first n experts
    n = np.arange(len(rows))
    link = n * costs.link_expert
    gpu = n * costs.gpu_expert + rows * costs.gpu_row
    cpu = (n[-1] - n) * costs.cpu_expert + (rows[-1] - rows) * costs.cpu_row + (n < n[-1]) * costs.cpu_call
    if cpu_share is None:
        ends = np.maximum(np.maximum(link, gpu), cpu)
        at = int(np.argmin(ends))
        if ends[at] > _WORTH_DIVIDING * ends[-1]:
            at = len(ends) - 1
    else:
        # Of equally near ones the last, so that 0 leaves nothing to the CPU; and 1 everything.
        distance = np.abs((rows[-1] - rows) - cpu_share * rows[-1])
        at = int(len(n) - 1 - np.argmin(distance[::-1]))
    experts = tuple(int(e) for e in order)
    seconds = float(link[at]), float(gpu[at]), float(cpu[at])
    return Cut(experts[:at], experts[at:], seconds, (int(rows[at]), int(rows[-1] - rows[at])))
