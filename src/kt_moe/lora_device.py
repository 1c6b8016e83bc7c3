"""Where the LoRA of kt_moe's experts lies when its model is on a GPU: there too, or in host memory."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kt_moe.gpu.page_lock import PageLock, PageLockError, lock
from kt_moe.rank_parameters import Division, keep_from_fully_shard

CHOICES = ("auto", "cpu", "cuda")
_STATE_BYTES = 16  # of an fp32 parameter, its gradient and AdamW's two moments
_FIXED_BYTES = 4  # of one that is not trained
_NOT_ACCELERATORS = ("cpu", "meta")


@dataclass
class LoraPlace:
    """The choice for all layers of a model.

    Args:
        choice: "cpu": in host memory, wherever the model goes. "cuda": on the model's device. "auto": on the
            model's device where the parameters of all layers, with gradients and two moments of an optimizer,
            take up to a quarter of the memory that is free there; else in host memory. This is decided when
            the first layer goes to a device, and stays so.

    Attributes:
        numbers: of LoRA parameters in all layers.
        fixed: of those beside them that are not trained.
    """

    choice: str = "auto"
    numbers: int = 0
    fixed: int = 0
    _stays: dict[torch.device, bool] = field(default_factory=dict)

    def stays(self, device: torch.device) -> bool:
        """Whether LoRA is in host memory where its model is on this device."""
        if device.type in _NOT_ACCELERATORS or self.choice == "cuda":
            return False
        if self.choice == "cpu":
            return True
        if device not in self._stays:
            self._stays[device] = not auto_moves(self.numbers, free_bytes(device), self.fixed)
        return self._stays[device]


def auto_moves(numbers: int, free: float, fixed: int = 0) -> bool:
    """Whether "auto" takes so many LoRA parameters, and fixed ones, to a device with so many bytes free."""
    return _STATE_BYTES * numbers + _FIXED_BYTES * fixed <= free / 4


def free_bytes(device: torch.device) -> float:
    """Free memory of a device, in bytes; infinite where torch cannot tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


class LoraParameters(nn.ParameterDict):
    """LoRA parameters that stay in host memory where `place` says so.

    `.to()`, `.cuda()`, Trainer and accelerate then convert their dtype, and do not move them; their gradients
    alike. They get page-locked memory, so that a GPU reads it without work of the CPU; where that is refused,
    the CPU copies them for the GPU in every pass.

    Args:
        division: how the matrices are divided over ranks, of which this one has its own; None: they are not.
            State dicts then have them as DTensors, and may have them whole when they are loaded.
    """

    def __init__(self, place: LoraPlace, division: Division | None = None) -> None:
        super().__init__()
        self.place, self.division = place, division
        if division is not None:
            _divided.add(self)
            keep_from_fully_shard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.division is not None:  # a copy
            _divided.add(self)

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """DeepSpeed asks all modules that have this, before its processes exchange any parameter.

        Raises:
            ValueError: the matrices are divided over ranks, of which DeepSpeed would make a mean.
        """
        if self.division is not None:
            raise ValueError(
                'DeepSpeed does not work with LoRA on experts and KtMoeConfig(expert_parallel="global"), as '
                "it takes each process's part for a copy of the same: use DistributedDataParallel, "
                'or FSDP2 (fully_shard) to shard the rest; DeepSpeed works with expert_parallel="host"'
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.division is not None:
            for name in self.keys():
                destination[prefix + name] = self.division.sharded(destination[prefix + name])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.division is not None:
            found = [prefix + name for name in self.keys() if prefix + name in state_dict]
            state_dict = {**state_dict, **{name: self.division.own(state_dict[name]) for name in found}}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        stay = False

        def held(tensor: Tensor) -> Tensor:
            nonlocal stay
            # What the function does, be it `.to()`, `.half()` or `.to_empty()`, is seen on an empty tensor.
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            stay = self.place.stays(probe.device)
            if not stay:
                return fn(tensor)
            if tensor.is_meta:
                return torch.empty_like(tensor, dtype=probe.dtype, device="cpu")
            return tensor.to("cpu", probe.dtype)

        applied = super()._apply(held, recurse)  # type: ignore[no-untyped-call]
        _lock_pages(self, [p for p in self.values() if stay and p.is_cpu])
        return applied


_divided: weakref.WeakSet[LoraParameters] = weakref.WeakSet()


def divided_parameters() -> Iterator[tuple[Tensor, Division]]:
    """All parameters of this process that are its part of those of all ranks."""
    for module in list(_divided):
        if module.division is not None:
            yield from ((parameter, module.division) for parameter in module.parameters())


# By the address of a parameter's memory. A lock keeps that memory, which so belongs to nobody else meanwhile.
_locks: weakref.WeakKeyDictionary[LoraParameters, dict[int, PageLock]] = weakref.WeakKeyDictionary()


def _lock_pages(of: LoraParameters, parameters: list[Tensor]) -> None:
    """Let just these parameters be page-locked, until `of` is gone."""
    if of not in _locks:
        _locks[of] = {}
        weakref.finalize(of, _unlock, _locks[of], ()).atexit = False
    locks = _locks[of]
    _unlock(locks, [p.data_ptr() for p in parameters])
    for parameter in parameters:
        if not parameter.nbytes or parameter.data_ptr() in locks:
            continue
        # In pages of its own: CUDA refuses every copy of memory that is locked in part, whosever it is.
        memory = mmap.mmap(-1, parameter.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        own = torch.frombuffer(memory, dtype=parameter.dtype).view(parameter.shape)
        with contextlib.suppress(PageLockError):
            locks[own.data_ptr()] = lock([(own.data_ptr(), own.nbytes)], memory)
            parameter.data = own.copy_(parameter.detach())


def _unlock(locks: dict[int, PageLock], keep: Sequence[int]) -> None:
    for at in locks.keys() - set(keep):
        locks.pop(at).release()
