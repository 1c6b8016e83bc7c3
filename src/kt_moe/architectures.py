"""Which experts a model has, what they compute and what checkpoints call them: derived, not listed.

A module itself tells what it computes (`computation`); what its tensors are called on disk is in
transformers' own conversion mapping (`conversion`). A family that transformers adds works without a line here
if its experts compute something that the core knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from kt_moe.checkpoint import ExpertList
from kt_moe.computation import (
    Computation,
    computation_of,
    is_experts,
    layout_of,
    parameter_names,
    unknown_experts,
)
from kt_moe.conversion import saved_lists
from kt_moe.experts import PROJECTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORDS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class ExpertModule:
    """The routed experts of one layer, or of one of several lists in a layer.

    Attributes:
        path: of the module in its model.
        number: of the decoder layer; of the second list of a layer, a number beyond those of all layers.
        num_experts, hidden_size, intermediate_size: E, H, I.
        gated: whether there is a gate.
        activation: as `kt_moe.Experts` takes it.
        interleaved: whether gate and up alternate in the module's own parameters.
        saved: what transformers calls its tensors when it saves the model; None where it stores them in a way
            that the core does not read, or does not store them.
        same_as: path of the module whose parameters it shares; None where it has its own.
        has_bias: whether the projections have biases.
        swapped: whether PEFT takes a fused parameter's inputs for its outputs: it is [E, in, out], which
            nothing tells PEFT.
        padding: how many experts more gate_up_proj has in the module, of which nothing is computed.
    """

    path: str
    number: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    activation: str
    interleaved: bool
    saved: ExpertList | None
    same_as: str | None
    has_bias: bool
    swapped: bool = False
    padding: int = 0

    @property
    def numel(self) -> int:
        """Numbers in its own parameters in plain transformers, biases included."""
        if self.same_as is not None:
            return 0
        inner = len(self.words) - 1
        biases = inner * self.intermediate_size + self.hidden_size if self.has_bias else 0
        one = self.intermediate_size * self.hidden_size
        return self.num_experts * ((inner + 1) * one + biases) + self.padding * inner * one

    @property
    def keyed(self) -> ExpertList | None:
        """What transformers calls its tensors where each expert has keys of its own."""
        return None if self.saved is None or self.saved.fused else self.saved

    @property
    def words(self) -> dict[str, str]:
        """What checkpoints call an expert's projections; the usual names where no key is an expert's."""
        words = _WORDS if self.keyed is None else dict(zip(PROJECTIONS, self.keyed.words, strict=True))
        return {p: word for p, word in words.items() if self.gated or p != "gate"}

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """The parameters of all experts in the module, in PEFT's order, and the projections in each."""
        return fused_parameters(self.gated)

    def disk_path(self, path: str) -> str:
        """What checkpoints with a key an expert call this module at `path`, the end of which is its own."""
        return path if self.keyed is None else path.removesuffix(self.path) + self.keyed.prefix


def fused_parameters(gated: bool) -> dict[str, tuple[str, ...]]:
    """See `ExpertModule.fused`."""
    first = {"gate_up_proj": ("gate", "up")} if gated else {"up_proj": ("up",)}
    return {**first, "down_proj": ("down",)}


@dataclass(frozen=True)
class Architecture:
    """The routed experts of one model.

    Attributes:
        model_type: as in config.json.
        modules: in the model's order; at least one.
    """

    model_type: str
    modules: tuple[ExpertModule, ...]

    def module_at(self, path: str) -> ExpertModule:
        """The module of this path, before which there may be a wrapper's. ValueError when none has it."""
        for module in self.modules:
            if path == module.path or path.endswith(f".{module.path}"):
                return module
        raise ValueError(f"{self.model_type} has no routed experts at {path}")


_known: WeakKeyDictionary[nn.Module, Architecture] = WeakKeyDictionary()


def architecture_of(model: nn.Module) -> Architecture:
    """The experts of a transformers model, or of one inside wrappers such as PEFT's. Reads no weights.

    Raises:
        ValueError: the model has no routed experts that transformers lets others compute, or some that the
            core cannot; the message names the model type and what is missing.
    """
    inner = _transformers_model(model)
    if inner not in _known:
        _known[inner] = _derive(inner)
    return _known[inner]


def refuse_unless_computed(module: nn.Module, model_type: str) -> Computation:
    """What a module that `is_experts` computes.

    Raises:
        ValueError: something that the core lacks; names it, and the model type.
    """
    found = computation_of(module)
    if found.lacks:
        raise ValueError(
            f"kt_moe cannot compute the experts of model type {model_type!r} ({type(module).__name__}): "
            f"it lacks {' and '.join(found.lacks)}"
        )
    return found


def refuse_unknown(module: nn.Module, model_type: str) -> None:
    """ValueError where there are experts in it that nobody says others may compute."""
    if unknown := unknown_experts(module):
        raise ValueError(
            f"model type {model_type!r} is not supported by kt_moe: transformers does not let others compute "
            f"{', '.join(unknown)}, which lacks use_experts_implementation"
        )


def computed_experts(model: PreTrainedModel) -> tuple[str, dict[str, Any], dict[str, Computation]]:
    """A model's type, its modules of experts and what these compute, by path.

    Raises:
        ValueError: as `architecture_of`.
    """
    model_type = getattr(model.config.get_text_config(), "model_type", None) or model.config.model_type
    experts = dict(_experts_in(model))
    if not experts:
        if getattr(type(model), "_can_set_experts_implementation", lambda: False)():
            raise ValueError(f"model type {model_type!r} with this config has no layer with routed experts")
        refuse_unknown(model, model_type)
        raise ValueError(
            f"model type {model_type!r} is not supported by kt_moe: {type(model).__name__} has no experts "
            "that transformers lets others compute (use_experts_implementation)"
        )
    computed = {path: refuse_unless_computed(module, model_type) for path, module in experts.items()}
    return model_type, experts, computed


def _derive(model: PreTrainedModel) -> Architecture:
    model_type, experts, computed = computed_experts(model)
    lists = saved_lists(model, experts)
    numbers = _numbers(list(experts))
    modules = []
    for path, c in computed.items():
        layout = layout_of(experts[path])
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        same_as = tied.get(f"{path}.down_proj", "").removesuffix(".down_proj") or None
        saved = None if same_as else lists[path]
        first = getattr(experts[path], parameter_names(experts[path])[0])
        module = ExpertModule(
            path=path,
            number=numbers[path],
            num_experts=c.num_experts,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            gated=c.gated,
            activation=c.activation,
            interleaved=not layout.is_concatenated,
            saved=saved,
            same_as=same_as,
            has_bias=layout.has_bias,
            swapped=layout.is_transposed and not layout.marked,
            padding=len(first) - c.num_experts,
        )
        modules.append(module)
    return Architecture(model_type, tuple(modules))


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    from transformers import PreTrainedModel

    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} is no transformers model, nor has one inside")
    return found


def _experts_in(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and modules, in the model's order; LoRA layers around them are looked through."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield name.removesuffix(".base_layer"), module


def _numbers(paths: list[str]) -> dict[str, int]:
    """For each path the last number in it, or where another has that, one beyond all."""
    own = {path: int(([0, *re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)])[-1]) for path in paths}
    beyond = max(own.values()) + 1
    numbers: dict[str, int] = {}
    taken: set[int] = set()
    for path in paths:
        number = own[path]
        if number in taken:
            number, beyond = beyond, beyond + 1
        numbers[path] = number
        taken.add(number)
    return numbers
