"""Models whose experts are divided over ranks, in the hands of those who know nothing of it.

LoRA of a rank's experts is the rank's own. What others do with the parameters of a model is right for
parameters that all ranks have; `watch` has them do with these what is right for them:

- DistributedDataParallel leaves them out: it would overwrite them with rank 0's, and mix their gradients.
- fully_shard leaves them out (`keep_from_fully_shard`).
- Optimizers take them in one group with sharded parameters; ZeroRedundancyOptimizer refuses them.
- `torch.nn.utils.clip_grad_norm_`, which Trainer and accelerate call, counts those of all ranks.
- State dicts of optimizers have their states as DTensors, as those of models have the parameters, and take
  whole tensors as well.
- PEFT's `save_pretrained` writes on the first rank alone, and Trainer has all ranks take part when it saves
  whole tensors. accelerate's `save_state` and `save_model` refuse: they would write the first rank's part.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from kt_moe.job import meet_to_save
from kt_moe.lora_device import LoraParameters, divided_parameters
from kt_moe.rank_parameters import Division, norm_of_all_ranks, whole, whole_on_first

_optimizers: WeakSet[Optimizer] = WeakSet()  # whose state dicts have DTensors
_stepped: WeakSet[Optimizer] = WeakSet()  # those of them that have made a step
_steps: WeakKeyDictionary[Optimizer, _Step] = WeakKeyDictionary()


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Division]]:
    """The parameters of a model that each rank has for its own experts, by name."""
    for path, module in model.named_modules():
        if isinstance(module, LoraParameters) and module.division is not None:
            for name, parameter in module.named_parameters(path, recurse=False):
                yield name, parameter, module.division


def is_divided(model: nn.Module) -> bool:
    """Whether it has any."""
    return next(parameters_of(model), None) is not None


@functools.cache
def watch() -> None:
    """Put the functions of this module in their places, once."""
    from accelerate import Accelerator
    from transformers import Trainer  # which takes long, and much memory

    DistributedDataParallel.__init__ = _left_out(DistributedDataParallel.__init__)  # type: ignore[method-assign]
    of_all = _of_all_ranks(torch.nn.utils.get_total_norm)
    torch.nn.utils.get_total_norm = of_all
    clip_grad._get_total_norm = of_all
    apart = _sharded_apart(torch.nn.utils.clip_grads_with_norm_)
    torch.nn.utils.clip_grads_with_norm_ = apart
    clip_grad._clip_grads_with_norm_ = apart
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    PeftModel.save_pretrained = _by_the_first(PeftModel.save_pretrained)
    Accelerator.get_state_dict = _whole_or_refused(Accelerator.get_state_dict)
    Trainer.save_model = _with_whole_model(Trainer.save_model)
    Trainer._save_optimizer_and_scheduler = _with_whole_state(Trainer._save_optimizer_and_scheduler)
    Trainer._load_optimizer_and_scheduler = _with_parts_of_state(Trainer._load_optimizer_and_scheduler)


def _left_out(init: Callable[..., None]) -> Callable[..., None]:
    """DistributedDataParallel's `__init__`; where all that is trained is left out, there is nothing to do."""

    @functools.wraps(init)
    def made(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        own = {name for name, *_ in parameters_of(module)}
        if own:
            ignored = {*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *own}
            module._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]
            if not any(p.requires_grad for name, p in module.named_parameters() if name not in ignored):
                nn.Module.__init__(self)
                self.module, self.forward = module, module.__call__
                self.require_backward_grad_sync = True  # which no_sync changes
                return
        init(self, module, *args, **kwargs)

    return made


def _of_all_ranks(get_total_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's norm of gradients, of those of the experts on all ranks. All ranks call it."""

    @functools.wraps(get_total_norm)
    def norm(tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        known = {id(p.grad): division for p, division in divided_parameters() if p.grad is not None}
        groups: dict[dist.ProcessGroup, list[Tensor]] = {}
        shared = []
        for tensor in tensors:
            if id(tensor) in known:
                groups.setdefault(known[id(tensor)].group, []).append(tensor)
            else:
                shared.append(tensor)
        if not groups:
            return get_total_norm(tensors, norm_type, *args, **kwargs)
        found = [get_total_norm(shared, norm_type)] if shared else []
        for group, own in groups.items():
            found.append(norm_of_all_ranks(own, float(norm_type), group, own[0].device))
        return get_total_norm([whole(one).to(found[0].device) for one in found], norm_type, *args, **kwargs)

    return norm


def _sharded_apart(clip: Callable[..., None]) -> Callable[..., None]:
    """torch's multiplication of gradients, by a norm that is whole, of sharded ones and others together."""

    @functools.wraps(clip)
    def clipped(
        parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        own = {id(p) for p, _ in divided_parameters()}
        if not any(id(p) in own for p in parameters) or isinstance(total_norm, DTensor):
            clip(parameters, max_norm, total_norm, *args, **kwargs)
            return
        by_mesh: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            by_mesh.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
        for mesh, some in by_mesh.items():
            norm = total_norm if mesh is None else DTensor.from_local(total_norm, mesh)
            clip(some, max_norm, norm, *args, **kwargs)

    return clipped


_Step = list[tuple[dict[str, Any], list[dict[str, Any]]]]  # groups of parameters, and what stands for each


def _before_step(optimizer: Optimizer, *_: object) -> None:
    """Have a group of sharded parameters and others be two in this step: torch takes no mixtures."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer" and _has_divided(optimizer):
        raise ValueError(
            "ZeroRedundancyOptimizer has LoRA of experts that are divided over processes, which it would "
            "overwrite with another process's: give these an optimizer of their own"
        )
    _together(optimizer)  # after a step that failed
    step: _Step = []
    for group in optimizer.param_groups:
        sharded = [p for p in group["params"] if isinstance(p, DTensor)]
        others = [p for p in group["params"] if not isinstance(p, DTensor)]
        both = [{**group, "params": some} for some in (sharded, others)]
        step.append((group, both if sharded and others else [group]))
    if any(len(parts) > 1 for _, parts in step):
        _steps[optimizer] = step
        optimizer.param_groups = [part for _, parts in step for part in parts]


def _after_step(optimizer: Optimizer, *_: object) -> None:
    _together(optimizer)
    shard_state(optimizer)
    if optimizer in _optimizers and optimizer not in _stepped:
        _stepped.add(optimizer)
        optimizer.state_dict()  # refuses states that cannot be divided, before there is much to be saved


def _together(optimizer: Optimizer) -> None:
    step = _steps.pop(optimizer, None)
    if step is not None:
        optimizer.param_groups = [group for group, _ in step]
        for group, parts in step:  # some optimizers count in their groups
            group.update({**parts[0], "params": group["params"]})


def _has_divided(optimizer: Optimizer) -> bool:
    own = {id(p) for p, _ in divided_parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


def shard_state(optimizer: Optimizer) -> None:
    """Let an optimizer's state dicts have states of divided parameters as DTensors, and take whole ones."""
    if optimizer in _optimizers:
        return
    if not _has_divided(optimizer):
        return
    _optimizers.add(optimizer)
    optimizer.register_state_dict_post_hook(_to_sharded)
    optimizer.register_load_state_dict_pre_hook(_to_own)


def _to_sharded(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def sharded(name: str, value: Any, parameter: Tensor, division: Division) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape != parameter.shape:
            raise ValueError(
                f"the optimizer's {name} has shape {list(value.shape)} for LoRA of experts "
                f"{list(parameter.shape)}, wanted the same: other states cannot be divided by experts"
            )
        return division.sharded(value)

    return _mapped(optimizer, state_dict, sharded)


def _to_own(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def own(name: str, value: Any, parameter: Tensor, division: Division) -> Any:
        return division.own(value) if isinstance(value, Tensor) and value.dim() else value

    return _mapped(optimizer, state_dict, own)


def _mapped(
    optimizer: Optimizer, state_dict: dict[str, Any], function: Callable[[str, Any, Tensor, Division], Any]
) -> dict[str, Any]:
    """A state dict of the optimizer with what the function makes of the states of divided parameters."""
    known = {id(p): division for p, division in divided_parameters()}
    state = dict(state_dict["state"])
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, parameter in zip(saved["params"], group["params"], strict=True):
            if id(parameter) in known and key in state:
                division = known[id(parameter)]
                state[key] = {n: function(n, v, parameter, division) for n, v in state[key].items()}
    return {**state_dict, "state": state}


def _by_the_first(save: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `save_pretrained`, which all ranks call unless they give a state dict with whole tensors."""

    @functools.wraps(save)
    def saved(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        if not is_divided(self):
            return save(self, save_directory, *args, **kwargs)
        if kwargs.get("state_dict") is None:
            meet_to_save()
        given = inspect.signature(save).bind(self, save_directory, *args, **kwargs)
        given.arguments["is_main_process"] = (
            given.arguments.get("is_main_process", True) and dist.get_rank() == 0
        )
        return save(*given.args, **given.kwargs)

    return saved


def _whole_or_refused(get_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """What accelerate is about to write, the state dict of a model: whole by FSDP2 alone."""

    @functools.wraps(get_state_dict)
    def found(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.distributed_type != "FSDP" and is_divided(model):
            raise ValueError(
                "accelerate's save_state and save_model would write the first process's part of LoRA on "
                "experts that are divided over processes: use kt_moe.save_adapter or Trainer, or "
                "torch.distributed.checkpoint for the state of an optimizer"
            )
        return get_state_dict(self, model, *args, **kwargs)

    return found


def _with_whole_model(save: Callable[..., None]) -> Callable[..., None]:
    """Trainer's `save_model`, for which all ranks bring the adapter together before the first one writes."""

    @functools.wraps(save)
    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        if not is_divided(self.model):
            return save(self, *args, **kwargs)
        meet_to_save()
        if self.is_fsdp_enabled:  # which has all ranks take part anyway
            return save(self, *args, **kwargs)
        found = whole_on_first(self.accelerator.unwrap_model(self.model).state_dict())
        write = self._save

        def with_state(output_dir: str | None = None, state_dict: Any = None) -> None:
            if self.args.should_save:
                write(output_dir, found if state_dict is None else state_dict)

        self._save = with_state
        try:
            save(self, *args, **kwargs)
        finally:
            del self._save

    return saved


def _with_whole_state(save: Callable[..., None]) -> Callable[..., None]:
    """Trainer's saving of the optimizer, whose state all ranks bring together before the first one writes."""

    @functools.wraps(save)
    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        if not is_divided(self.model) or self.is_fsdp_enabled:
            return save(self, *args, **kwargs)
        found = self.optimizer.state_dict()
        for key, values in found["state"].items():
            found["state"][key] = whole_on_first(values) or {}
        self.optimizer.state_dict = lambda: found
        try:
            save(self, *args, **kwargs)
        finally:
            del self.optimizer.state_dict

    return saved


def _with_parts_of_state(load: Callable[..., None]) -> Callable[..., None]:
    """Trainer's loading of the optimizer, of whose whole state each rank takes its part."""

    @functools.wraps(load)
    def loaded(self: Any, *args: Any, **kwargs: Any) -> None:
        if is_divided(self.model) and self.optimizer is not None:
            shard_state(getattr(self.optimizer, "optimizer", self.optimizer))
        load(self, *args, **kwargs)

    return loaded
