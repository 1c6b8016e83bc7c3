"""Which routed experts of a call the GPU computes, and which the CPU: a pure function of numbers.

The cost of an expert on the GPU is its bytes on the link and hardly depends on its rows; on the CPU it grows
with the rows. So the experts with the most rows go to the GPU and the tail to the CPU, cut where both sides
are predicted to end together.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CPU_CALL = 1e-3  # seconds
# The CPU is left alone where it would save less than what predictions are wrong by.
_WORTH_DIVIDING = 0.9


@dataclass(frozen=True)
class Rates:
    """How fast the machine moves and computes experts. `kt-moe doctor` prints those of this machine.

    Args:
        link: bytes a second from host memory to the GPU.
        gpu_flops, gpu_bytes: floating-point operations and bytes of memory a second on the GPU.
        cpu_flops, cpu_bytes: the same of the CPU's kernels.
        rest_seconds: seconds that a model computes between the experts of one layer and those of the next
            (attention, router, norms), forward and backward together, with about as many tokens as a training
            step has. The link brings experts meanwhile. 0 counts nothing, as passes without a backward do.
    """

    link: float
    gpu_flops: float
    gpu_bytes: float
    cpu_flops: float
    cpu_bytes: float
    rest_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = math.nan
            if isinstance(value, Real) and not isinstance(value, bool):
                with suppress(OverflowError):
                    number = float(value)
            none = name == "rest_seconds" and number == 0
            if not none and not 1e-30 < number < 1e30:
                or_none = " or 0" if name == "rest_seconds" else ""
                raise ValueError(f"Rates: {name} is {value!r}, wanted a positive number{or_none}")
            object.__setattr__(self, name, number)  # other types of numbers overflow in costs


@dataclass(frozen=True)
class Costs:
    """Seconds of forward and backward together: of one routed expert, and of one of its rows, by place.

    `cpu_call` is what a call that leaves any expert to the CPU takes besides, as rows go there and come back;
    `rest_seconds` what the model computes before the next call, while only the link works.
    """

    link_expert: float
    gpu_expert: float
    gpu_row: float
    cpu_expert: float
    cpu_row: float
    cpu_call: float
    rest_seconds: float


@dataclass(frozen=True)
class Cut:
    """Routed experts by place, each with the most rows first (equal rows: by number).

    Attributes:
        gpu, cpu: numbers of experts.
        rows: of the GPU and the CPU.
        seconds: predicted time of the link, the GPU and the CPU; None where the CPU's share was given.
    """

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    rows: tuple[int, int]
    seconds: tuple[float, float, float] | None = None


def layer_costs(
    rates: Rates,
    hidden: int,
    intermediate: int,
    stored_bytes: int,
    rank: int,
    missing: float,
    train: bool,
    in_place: bool,
    gated: bool = True,
) -> Costs:
    """Costs of an expert of a layer.

    Args:
        hidden, intermediate: H and I.
        stored_bytes: of one expert's weights as they are stored.
        rank: all LoRA ranks together.
        missing: the part of experts, in [0, 1], that are not on the GPU when they are wanted.
        train: whether a backward follows.
        in_place: whether products read the stored weights, which are not decoded before.
        gated: whether experts have a gate.
    """
    decoded = 0 if in_place else bf16_bytes(hidden, intermediate, gated)
    passes = (False, True) if train else (False,)
    gpu_flops, cpu_flops = (
        sum(row_flops(hidden, intermediate, rank, backward, again, gated) for backward in passes)
        for again in (True, False)
    )
    # Of fp32 and bf16 rows that kernels write and read again.
    row_bytes = 12 * hidden + (14 if gated else 10) * intermediate
    return Costs(
        link_expert=len(passes) * stored_bytes * missing / rates.link,
        gpu_expert=len(passes) * (stored_bytes + 2 * decoded) / rates.gpu_bytes,
        gpu_row=gpu_flops / rates.gpu_flops + len(passes) * row_bytes / rates.gpu_bytes,
        cpu_expert=len(passes) * stored_bytes / rates.cpu_bytes,
        cpu_row=cpu_flops / rates.cpu_flops,
        cpu_call=len(passes) * _CPU_CALL,
        rest_seconds=rates.rest_seconds if train else 0.0,
    )


def bf16_bytes(hidden: int, intermediate: int, gated: bool = True) -> int:
    """Of the matrices of an expert: three, or without a gate two."""
    return 2 * (3 if gated else 2) * hidden * intermediate


def row_flops(
    hidden: int, intermediate: int, rank: int, backward: bool, again: bool, gated: bool = True
) -> int:
    """Floating-point operations of the products of one row of an expert.

    Args:
        rank: all LoRA ranks together.
        backward: of that, instead of the forward.
        again: whether backward computes G and U again, with the low-rank products that forward kept.
        gated: whether there is a gate.
    """
    product, low_rank = 2 * hidden * intermediate, 2 * rank * (hidden + intermediate)
    inner = 2 if gated else 1
    if not backward:
        return (inner + 1) * product + low_rank
    # dh and dX; Q and Q A, and the gradients of A and B.
    flops = (inner + 1) * product + 2 * low_rank
    return flops + (inner * product + 2 * rank * intermediate if again else 0)


def cut(counts: NDArray[np.integer], costs: Costs) -> Cut:
    """Divide the routed experts where all is predicted to end soonest.

    Args:
        counts: [E], the rows of each expert; those with none are in neither place.
        costs: see `layer_costs`.

    Returns:
        the same for the same arguments, on every machine.
    """
    experts, rows = _sorted(counts)
    n = np.arange(len(rows))
    ends = end(costs, *_seconds(costs, n, rows, n[-1] - n, rows[-1] - rows))
    at = int(np.argmin(ends))
    if ends[at] > _WORTH_DIVIDING * ends[-1]:
        at = len(ends) - 1
    plan = _cut_at(experts, rows, at)
    return replace(plan, seconds=seconds_of(plan, costs))


def cut_by_share(counts: NDArray[np.integer], cpu_share: float) -> Cut:
    """Leave the CPU a part of all rows, in [0, 1]: the nearest that whole experts of the tail have."""
    experts, rows = _sorted(counts)
    # Of equally near ones the last, so that 0 leaves nothing to the CPU; and 1 everything.
    distance = np.abs((rows[-1] - rows) - cpu_share * rows[-1])
    return _cut_at(experts, rows, int(len(rows) - 1 - np.argmin(distance[::-1])))


def end(costs: Costs, link: Any, gpu: Any, cpu: Any) -> Any:
    """When all three have ended, in seconds: only the link works in `rest_seconds`."""
    return np.maximum(link, costs.rest_seconds + np.maximum(gpu, cpu))


def seconds_of(plan: Cut, costs: Costs) -> tuple[float, float, float]:
    """What the link, the GPU and the CPU are predicted to take."""
    gpu_rows, cpu_rows = plan.rows
    return _seconds(costs, len(plan.gpu), gpu_rows, len(plan.cpu), cpu_rows)


def _seconds(
    costs: Costs, gpu_experts: Any, gpu_rows: Any, cpu_experts: Any, cpu_rows: Any
) -> tuple[Any, Any, Any]:
    """Of the link, the GPU and the CPU, for so many experts and rows: integers, or arrays of them."""
    return (
        gpu_experts * costs.link_expert,
        gpu_experts * costs.gpu_expert + gpu_rows * costs.gpu_row,
        cpu_experts * costs.cpu_expert + cpu_rows * costs.cpu_row + (cpu_experts > 0) * costs.cpu_call,
    )


def _sorted(counts: NDArray[np.integer]) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """The routed experts, most rows first, and the rows of the first n of them for every n."""
    order = np.argsort(-counts.astype(np.int64), kind="stable")
    order = order[counts[order] > 0]
    rows = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[order], dtype=np.int64)])
    return tuple(order.tolist()), rows


def _cut_at(experts: tuple[int, ...], rows: NDArray[np.int64], at: int) -> Cut:
    return Cut(experts[:at], experts[at:], (int(rows[at]), int(rows[-1] - rows[at])))
