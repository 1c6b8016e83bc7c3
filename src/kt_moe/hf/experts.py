"""The experts modules of transformers models: ours without parameters, and theirs computed by us."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from kt_moe.architectures import (
    Architecture,
    ExpertModule,
    computed_experts,
    refuse_unknown,
    refuse_unless_computed,
)
from kt_moe.computation import (
    Computation,
    bias_names,
    is_experts,
    is_gated,
    layout_of,
    output_norm,
    parameter_names,
    sizes_of,
    transformers_class,
)
from kt_moe.expert_parallel import ExpertParallel
from kt_moe.experts import Experts
from kt_moe.functional import Lora, MoEFunction
from kt_moe.rank_parameters import Division
from kt_moe.tensors import check_module

NAME = "kt_moe"

Load = Callable[["KtExperts", Callable[[int], object] | None], Experts | None]
_loading = threading.Lock()
os.register_at_fork(after_in_child=_loading._at_fork_reinit)  # type: ignore[attr-defined]


@dataclass
class _Held:
    """The weights of a module and of its copies, and before they are loaded what loads them.

    loaded: whether they are; this rank may have none.
    parallel: computes with the experts of all ranks, over which they are divided, if they are.
    """

    experts: Experts | None
    load: Load | None = None
    loaded: bool = False
    parallel: ExpertParallel | None = None


class KtExperts(nn.Module):
    """Routed experts of one layer, held by `kt_moe.Experts` and not by torch.

    It has no parameters for them and no state: `state_dict`, `parameters()`, `.to()` and
    `get_memory_footprint()` pass them by. Copies, as of deepcopy, share the weights, which are frozen; of
    lazy ones the first copy that needs them loads them for all.

    Args:
        architecture: of the model.
        module: the experts it stands for, one of the architecture's.
        experts: their weights; None: `load_with` says how they are loaded.
        norm: of each expert's output, which stays torch's; None where there is none.

    Attributes:
        layer: number of the decoder layer (see `ExpertModule.number`).
        num_experts, hidden_dim, intermediate_dim: E, H, I by the model's config.
        lora_device: where LoRA on them goes, "auto", "cpu" or "cuda"; see `KtMoeConfig`.
    """

    _is_hf_initialized = True
    lora_device = "auto"

    def __init__(
        self,
        architecture: Architecture,
        module: ExpertModule,
        experts: Experts | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if norm is not None:
            self.post_expert_norm = norm  # transformers' name
        self.architecture, self.expert_module, self.layer = architecture, module, module.number
        self.num_experts, self.hidden_dim = module.num_experts, module.hidden_size
        self.intermediate_dim = module.intermediate_size
        self._held = _Held(experts, loaded=experts is not None)

    def load_with(self, load: Load) -> None:
        """Have the weights loaded so, by `load` or when they are first used."""
        self._held.load = load

    def load(self, progress: Callable[[int], object] | None = None) -> None:
        """Load the weights if they are not. RuntimeError before from_pretrained has said where they are."""
        if self._held.loaded:
            return
        if self._held.load is None:
            raise RuntimeError(
                f"the experts of layer {self.layer} are not loaded: from_pretrained did not finish"
            )
        self._held.experts = self._held.load(self, progress)
        self._held.load, self._held.loaded = None, True  # and with it the checkpoint

    @property
    def experts(self) -> Experts:
        """The weights; loads them if they are not. RuntimeError as in `load`, ValueError if it has none."""
        if self._held.experts is None:
            with _loading:  # of several threads that come first, one loads
                if self._held.experts is None:
                    self.load()
        if self._held.experts is None:
            raise ValueError(f"of the experts of layer {self.layer} this rank has none")
        return self._held.experts

    @property
    def loaded(self) -> Experts | None:
        """The weights; None where they are not loaded, or this rank has none."""
        return self._held.experts

    def divide(self, group: dist.ProcessGroup) -> None:
        """Let loaded experts be this rank's part of the layer's. All ranks call it, for layers alike."""
        self._held.loaded = True
        self._held.parallel = ExpertParallel(self._held.experts, self.num_experts, group)

    @property
    def parallel(self) -> ExpertParallel | None:
        """What computes with the experts of all ranks; None where this process has them all."""
        return self._held.parallel

    @property
    def division(self) -> Division | None:
        """How the experts are divided over ranks; None where this process has them all."""
        group = None if self.parallel is None else self.parallel.group
        return None if group is None else Division(self.num_experts, group)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]; see `computed`."""
        return computed(self, hidden_states, top_k_index, top_k_weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> KtExperts:
        norm = copy.deepcopy(output_norm(self), memo)
        twin = KtExperts(self.architecture, self.expert_module, norm=norm)
        twin._held = self._held
        twin.training, twin.lora_device = self.training, self.lora_device
        return twin

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "torch.nn.DataParallel does not work with kt_moe experts; Trainer takes it where one process "
            "sees several GPUs. Start one process for each GPU (torchrun, accelerate launch), "
            "or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model with kt_moe experts cannot be pickled: its expert weights live outside torch. "
            "Save the adapter (kt_moe.save_adapter) and load the model again with KtMoeConfig"
        )

    def extra_repr(self) -> str:
        return f"layer={self.layer}, {self._held.experts!r}"


@dataclass(frozen=True)
class _Packed:
    """Experts made from a module's parameters, and what these were then."""

    sources: tuple[Tensor, ...]  # share the parameters' storage, so that no other tensor can take its address
    versions: tuple[int | None, ...]
    experts: Experts

    @classmethod
    def of(cls, module: nn.Module, tensors: tuple[Tensor, ...]) -> _Packed:
        return cls(tensors, tuple(map(_version, tensors)), pack(module))

    def made_from(self, tensors: tuple[Tensor, ...]) -> bool:
        return all(
            old.data_ptr() == new.data_ptr() and old.shape == new.shape and version == _version(new)
            for old, new, version in zip(self.sources, tensors, self.versions, strict=True)
        )


def _version(tensor: Tensor) -> int | None:
    """How often autograd saw it changed; None for tensors made in inference mode, which are not counted."""
    return None if tensor.is_inference() else tensor._version


_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def repack(model: nn.Module) -> int:
    """Have torch's experts packed again, after a change that torch does not count.

    Experts that stay torch parameters (`experts_implementation="kt_moe"`) are packed at the first call, and
    again when they were changed as autograd knows it: `parameter.mul_()`, `copy_`, `load_state_dict`, an
    optimizer, new tensors. Changes through `parameter.data`, or of parameters made in
    `torch.inference_mode()`, need this.

    Args:
        model: a model, or a module with experts.

    Returns:
        the number of modules that the next call will pack again.
    """
    check_module("model", model)
    return sum(_packed.pop(module, None) is not None for module in model.modules())


def is_kt_experts(module: nn.Module) -> bool:
    """Whether kt_moe computes this module: one of ours, or one of transformers' set to "kt_moe"."""
    if isinstance(module, KtExperts):
        return True
    config = getattr(module, "config", None)
    return is_experts(module) and getattr(config, "_experts_implementation", None) == NAME


def experts_of(module: nn.Module) -> Experts:
    """The packed weights of a module that `is_kt_experts`.

    Those of transformers' modules are packed at the first call, and again when their parameters have changed;
    see `repack`.

    Raises:
        ValueError: an unsupported architecture, or experts that are to be trained themselves.
    """
    if isinstance(module, KtExperts):
        return module.experts
    names, parameters = expert_parameters(module)
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        raise ValueError(
            f"one of {', '.join(names)} requires a gradient, kt_moe computes frozen experts only: call "
            'requires_grad_(False) on the experts, or use PEFT with target_modules=["experts"]'
        )
    tensors = tuple(p.detach() for p in parameters)
    packed = _packed.get(module)
    if packed is None or not packed.made_from(tensors):
        packed = _packed[module] = _Packed.of(module, tensors)
    return packed.experts


def loaded_experts(module: nn.Module) -> Experts | None:
    """Those that `experts_of` gave last; None if it was never asked."""
    if isinstance(module, KtExperts):
        return module.loaded
    packed = _packed.get(module)
    return None if packed is None else packed.experts


def expert_parameters(module: Any) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of a module that transformers lets others compute: weights, and biases if it has any.

    Raises:
        ValueError: they are parametrized.
    """
    if parametrize.is_parametrized(module):
        raise ValueError(
            "the experts' parameters are parametrized (PEFT target_parameters), which kt_moe cannot compute: "
            'put LoRA on them with LoraConfig(target_modules=["experts"])'
        )
    names = [*parameter_names(module), *(bias_names(module) if layout_of(module).has_bias else ())]
    return names, [getattr(module, name) for name in names]


def pack(module: nn.Module, part: range | None = None, **options: Any) -> Experts:
    """From weights [E, out, in] or [E, in, out], gate first, alternating with up, or not there.

    Args:
        part: of the experts; None: all.
        options: of `Experts`, beside its weights and activation.
    """
    inner, down, *biases = (p.detach() for p in expert_parameters(module)[1])
    options["activation"] = _computation(module).activation
    inner = inner[: len(down)]  # LongCat-Flash has more, for experts that are the identity
    if part is not None:
        inner, down, *biases = (p[part.start : part.stop] for p in (inner, down, *biases))
    if layout_of(module).is_transposed:
        inner, down = inner.mT, down.mT
    gate, up = _split(module, inner)
    if biases:
        options["gate_bias"], options["up_bias"] = _split(module, biases[0])
        options["down_bias"] = biases[1]
    return Experts(gate, up, down, **options)


def _split(module: nn.Module, gate_up: Tensor) -> tuple[Tensor | None, Tensor]:
    """[E, 2I, ...] to gate and up; without a gate [E, I, ...] is up."""
    if not is_gated(module):
        return None, gate_up
    if layout_of(module).is_concatenated:
        gate, up = gate_up.chunk(2, dim=1)
        return gate, up
    return gate_up[:, ::2], gate_up[:, 1::2]


def dims_of(module: Any) -> tuple[int, int, int]:
    """E, H and I of a module that `is_kt_experts`."""
    if isinstance(module, KtExperts):
        return module.num_experts, module.hidden_dim, module.intermediate_dim
    return sizes_of(module)


def is_gated_module(module: Any) -> bool:
    """Whether a module that `is_kt_experts` has a gate."""
    return module.expert_module.gated if isinstance(module, KtExperts) else is_gated(module)


def refuse_at_construction(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """A hook on the registration of every module: experts set to "kt_moe" that the core lacks something for,
    and models set to it that have none.

    So from_pretrained refuses them while it builds the model, before it reads a weight.

    Raises:
        ValueError: as `refuse_unless_computed`, `refuse_unknown` and `computed_experts`.
    """
    if module is None:
        return
    if is_kt_experts(module) and not isinstance(module, KtExperts):
        _computation(module)
    if isinstance(parent, PreTrainedModel):
        config: Any = getattr(parent, "config", None)
        if getattr(config, "_experts_implementation", None) == NAME:
            refuse_unknown(module, config.model_type)
            # The model without its head, and so with all its layers; towers have configs of their own.
            if isinstance(module, PreTrainedModel) and module.config is config:
                computed_experts(module)


def _computation(module: Any) -> Computation:
    model_type = getattr(getattr(module, "config", None), "model_type", transformers_class(module)[0])
    return refuse_unless_computed(module, model_type)


def computed(
    module: nn.Module,
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    lora: Lora | None = None,
    **tensors: Tensor,
) -> Tensor:
    """[T, H], [T, K], [T, K] -> [T, H]: what a module that `is_kt_experts` computes, with LoRA.

    A norm of each expert's output comes between the experts and the sum over them: then the core gets every
    routed token as a token of its own, with a routing weight of 1, and the norm, the weights and the sum are
    torch's, in fp32.
    """
    norm = output_norm(module)
    if norm is None:
        return _summed(module, hidden_states, ids, weights, lora, tensors)
    of_routes = hidden_states.float().repeat_interleave(ids.shape[1], 0)
    ones = torch.ones(ids.numel(), 1, device=weights.device)
    rows = norm(_summed(module, of_routes, ids.reshape(-1, 1), ones, lora, tensors)).view(*ids.shape, -1)
    routed = weights.float().masked_fill(ids == dims_of(module)[0], 0.0)
    out: Tensor = (rows * routed[..., None]).sum(1).to(hidden_states.dtype)
    return out


def _summed(
    module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, lora: Lora | None, tensors: dict[str, Tensor]
) -> Tensor:
    """What `MoEFunction` computes, with the experts of all ranks where they are divided."""
    parallel = parallel_of(module)
    if parallel is None:
        alone: Tensor = MoEFunction.apply(x, ids, weights, experts_of(module), lora, **tensors)
        return alone
    lora = lora or Lora()
    own = tensors if parallel.experts is not None else {}
    out: Tensor = parallel(x, ids, weights, own, scaling=lora.scaling, dropout=lora.dropout, seed=lora.seed)
    # A rank without experts has empty tensors. They get their empty gradients, as others get theirs.
    for tensor in () if own else tensors.values():
        out = out + tensor.sum()
    return out


def parallel_of(module: nn.Module) -> ExpertParallel | None:
    """See `KtExperts.parallel`; None for other modules."""
    return module.parallel if isinstance(module, KtExperts) else None


def division_of(module: nn.Module) -> Division | None:
    """See `KtExperts.division`; None for other modules."""
    return module.division if isinstance(module, KtExperts) else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def kt_moe_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for `experts_implementation="kt_moe"`: [T, H], [T, K], [T, K] -> [T, H]."""
    return computed(self, hidden_states, top_k_index, top_k_weights)
