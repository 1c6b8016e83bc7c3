"""The routes of a call: counted for the plan, then sorted by expert in the plan's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kt_moe import _core
from kt_moe.gpu.streams import Streams


class Counted(NamedTuple):
    """The routes of a call on the host.

    Attributes:
        ids: [T, K] int64 or int32.
        counts: [E] routes of each expert.
    """

    ids: Tensor
    counts: NDArray[np.int64]


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
    counts = _core.count_routes(host, num_experts)
    return Counted(host, np.array(counts[:num_experts], dtype=np.int64))


class Rows(NamedTuple):
    """The rows of a pass: the routes of some experts, by expert in their order, then by token and k.

    Attributes:
        counts: rows of each of these experts.
        permutation: [rows] int32 on the device, t * K + k of each row, which sorts the routes by expert.
        inverse: [T, K] int32 on the device, the row of each route; -1: not of these experts.
    """

    counts: tuple[int, ...]
    permutation: Tensor
    inverse: Tensor


def sort_routes(counted: Counted, experts: Sequence[int], streams: Streams) -> Rows:
    """Rows of the experts in the order given."""
    counts = tuple(counted.counts[list(experts)].tolist())
    entries = counted.ids.numel()
    host = streams.host_empty((entries + sum(counts),), torch.int32)
    _core.sort_routes(counted.ids, len(counted.counts), experts, host)
    both = torch.empty_like(host, device=streams.device)
    streams.products.copy_from_host(both, host)
    streams.keep(host)
    return Rows(counts, both[entries:], both[:entries].view(counted.ids.shape))
