"""LoRA parameters of experts that are divided over ranks: clipped by one norm, and brought together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from kt_moe.job import meet_to_save
from kt_moe.token_exchange import exchanges_host_memory, partition


@dataclass(frozen=True)
class Division:
    """How tensors [E, ...] of a layer's experts are divided over the ranks of a group.

    In memory a rank has the matrices of its own experts, as an ordinary tensor. In state dicts they are
    DTensors, `Shard(0)`, so that torch.distributed.checkpoint and others know them as parts of one tensor.
    """

    num_experts: int
    group: dist.ProcessGroup

    def __deepcopy__(self, memo: object) -> Division:
        return self  # a group has no copies

    @cached_property
    def part(self) -> range:
        """The calling rank's experts."""
        return partition(self.num_experts, self.group.size())[self.group.rank()]

    def own(self, tensor: Any) -> Tensor:
        """The rank's part [N, ...] of a tensor [E, ...], of a DTensor made by `sharded`, or of itself."""
        if hasattr(tensor, "to_local"):
            local: Tensor = tensor.to_local()
            return local
        is_whole = len(tensor) == self.num_experts
        part: Tensor = tensor[self.part.start : self.part.stop] if is_whole else tensor
        return part

    def sharded(self, own: Tensor) -> Any:
        """The rank's part [N, ...] as a DTensor [E, ...]; no rank waits for another."""
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((self.num_experts, *own.shape[1:]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            own.detach(), _mesh(self.group), [Shard(0)], run_check=False, shape=shape, stride=strides
        )


def keep_from_fully_shard(module: nn.Module) -> None:
    """Have fully_shard pass by a module, as one whose parameters something else replicates."""
    from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

    module.__dict__[REGISTRY_KEY] = {"replicate": RegistryItem()}


_meshes: WeakKeyDictionary[dist.ProcessGroup, Any] = WeakKeyDictionary()


def _mesh(group: dist.ProcessGroup) -> Any:
    """The group as a mesh of what it exchanges tensors of: host memory if it can."""
    from torch.distributed.device_mesh import DeviceMesh

    if group not in _meshes:
        kind = "cpu" if exchanges_host_memory(group) else "cuda"
        _meshes[group] = DeviceMesh.from_group(group, kind)
    return _meshes[group]


def whole(tensor: Any) -> Any:
    """Of a DTensor, which all its ranks ask for, the whole tensor; else the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[bool]:
    """Parameters that DeepSpeed's ZeRO-3 partitions are whole meanwhile, to be saved.

    All ranks call it. Yields whether there are any.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield False
        return
    meet_to_save()
    import deepspeed  # which is there, as it has partitioned them

    with deepspeed.zero.GatheredParameters(partitioned):
        yield True


def whole_on_first(tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """A state dict with whole tensors in the place of DTensors, in host memory.

    All ranks call it. Returns None on all ranks but the first one of all.
    """
    first = dist.get_rank() == 0
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            of_all = tensor.full_tensor()
            tensor = of_all.cpu() if first else None
        found[name] = tensor
    dist.barrier()  # a rank that ends while others still receive breaks their connections
    return found if first else None


def norm_of_all_ranks(
    grads: Iterable[Tensor], norm_type: float, group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """The norm of gradients of which each rank of the group has its own, or none. All ranks call it.

    device: of the result; one that the group exchanges.

    Raises:
        ValueError: norm_type is not above 0.
    """
    if not norm_type > 0:
        raise ValueError(
            f"norm_type is {norm_type}, wanted a number above 0 where experts are divided over processes"
        )
    norm = get_total_norm([grad for grad in grads if grad.numel()], norm_type).to(device)
    norms = [norm.new_empty((), dtype=torch.float64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(norms, norm.double(), group)  # a reduction to the largest may lose a NaN
    of_all: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return of_all.to(norm.dtype)


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
    norms = whole(get_total_norm(grads[0])).to(device), norm_of_all_ranks(grads[1], 2.0, group, device)
    norm = get_total_norm(norms).float()
    factor = float((max_norm / (norm + 1e-6)).clamp(max=1.0))  # NaN if the norm is, as torch's
    for grad in (g for some in grads for g in some):
        grad.mul_(factor)
    return norm


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
