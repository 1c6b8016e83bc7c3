"""The routes of a call: counted for the plan, then sorted by expert in the plan's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kt_moe.gpu.streams import Streams


class Counted(NamedTuple):
    """Routes on both sides.

    Attributes:
        counts: [E] routes of each expert, on the host.
        host_ids: [T, K] on the host.
        ids: [T, K] on the device.
    """

    counts: NDArray[np.int64]
    host_ids: NDArray[np.integer]
    ids: Tensor


def count_routes(ids: Tensor, num_experts: int, streams: Streams) -> Counted:
    """Bring ids to the host and count them; waits for the current stream.

    Args:
        ids: [T, K] int64 or int32 on the device, in [0, E]; E is no route.

    Raises:
        ValueError: another id; names it and its place.
    """
    host = streams.host_empty(tuple(ids.shape), ids.dtype)
    host.copy_(ids, non_blocking=True)
    with streams.span("host", "wait_routes"):
        streams.record().synchronize()
    found = host.numpy()
    if found.size and not (found.min() >= 0 and found.max() <= num_experts):
        token, k = (int(i) for i in np.argwhere((found < 0) | (found > num_experts))[0])
        raise ValueError(
            f"topk_ids[{token}, {k}] is {int(found[token, k])}, wanted an expert in [0, {num_experts}) "
            f"or {num_experts} for no route"
        )
    counts = np.bincount(found.reshape(-1), minlength=num_experts + 1)
    return Counted(counts[:num_experts], found, ids)


class Rows(NamedTuple):
    """The rows of a pass: the routes of some experts, by expert in their order, then by token and k.

    Attributes:
        counts: rows of each of these experts.
        permutation: [rows] int32, t * K + k of each row, which sorts the routes by expert.
        inverse: [T, K] int32, the row of each route; beyond the last row: not of these experts.
    """

    counts: tuple[int, ...]
    permutation: Tensor
    inverse: Tensor


def sort_routes(counted: Counted, experts: Sequence[int], streams: Streams) -> Rows:
    """Rows of the experts in the order given."""
    num_experts = len(counted.counts)
    order = np.full(num_experts + 1, len(experts), dtype=np.int32)
    order[list(experts)] = np.arange(len(experts), dtype=np.int32)
    flat = counted.ids.reshape(-1)
    keys = streams.upload(order).index_select(0, flat)
    permutation = keys.to(torch.int16 if len(experts) < 2**15 else torch.int32).sort(stable=True).indices
    inverse = torch.empty(len(flat), dtype=torch.int32, device=flat.device)
    inverse.scatter_(0, permutation, torch.arange(len(flat), dtype=torch.int32, device=flat.device))
    inverse = inverse.view(counted.ids.shape)
    counts = tuple(counted.counts[list(experts)].tolist())
    return Rows(counts, permutation[: sum(counts)].to(torch.int32), inverse)
