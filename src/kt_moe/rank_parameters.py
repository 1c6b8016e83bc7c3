"""LoRA parameters of experts that are divided over ranks: clipped by one norm, and brought together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm


def clip_grad_norm_(
    shared: Iterable[Tensor], local: Iterable[Tensor], max_norm: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Clip gradients by the norm of those on all ranks, as `torch.nn.utils.clip_grad_norm_` in one process.

    All ranks of the group call it, after backward.

    Args:
        shared: parameters that all ranks have, with the same gradients: counted once.
        local: parameters that only this rank has, as LoRA of its experts; none on a rank without experts.
        max_norm: the largest 2-norm that gradients of all parameters have afterwards.
        group: of `ExpertParallel`.

    Returns:
        The 2-norm before clipping, a fp32 scalar, the same on all ranks.

    Raises:
        ValueError: torch.distributed is not initialised (by torch).
    """
    grads = [[p.grad for p in parameters if p.grad is not None] for parameters in (shared, local)]
    device = next((g.device for some in grads for g in some), torch.device("cpu"))
    squares = [_whole(get_total_norm(some)).to(device).double().square() for some in grads]
    dist.all_reduce(squares[1], group=group)
    norm = (squares[0] + squares[1]).sqrt().float()
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    for grad in (g for some in grads for g in some):
        grad.mul_(factor)
    return norm


def _whole(norm: Any) -> Tensor:
    """Of gradients that fully_shard shards, the norm of all of them."""
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def gather_lora(
    lora_params: Mapping[str, Tensor | None] | None, group: dist.ProcessGroup | None = None
) -> dict[str, Tensor] | None:
    """The LoRA tensors of a layer whose experts are divided over the ranks, to be saved.

    All ranks of the group call it. What `local_experts` says of such a tensor is a rank's part when it is
    loaded, on as many ranks as there are then.

    Args:
        lora_params: this rank's, a matrix for each of its experts, under the names that `ExpertParallel`
            takes, alike on all ranks with experts; None or empty where it has no experts.
        group: of `ExpertParallel`.

    Returns:
        On the group's first rank the tensors [E, ...] on the CPU in their dtypes, else None.

    Raises:
        ValueError: torch.distributed is not initialised (by torch); ranks with experts give other names than
            each other.
    """
    mine = {name: t.detach().cpu() for name, t in (lora_params or {}).items() if t is not None}
    first = dist.get_process_group_ranks(group)[0]
    parts: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == first else None
    dist.gather_object(mine, parts, first, group)
    if parts is None:
        return None
    given = {rank: part for rank, part in enumerate(parts) if part}
    names: set[str] = set().union(*given.values())
    for rank, part in given.items():
        if names - part.keys():
            raise ValueError(
                f"lora_params of rank {rank} has no {sorted(names - part.keys())}, wanted all alike"
            )
    return {name: torch.cat([part[name] for part in given.values()]) for name in sorted(names)}
