"""The LoraConfig of an adapter on kt_moe experts: as the user wrote it in memory, for plain PEFT on disk."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from kt_moe.hf.initial import starts_from_weights
from kt_moe.hf.lora import KtLoraExperts, experts_architecture
from kt_moe.hf.portable import is_per_expert, renamed_by_peft
from kt_moe.hf.targets import (
    ExpertPairs,
    Targets,
    check_config_patterns,
    find_targets,
    free_modules,
    holds_kt_experts,
    names_of,
    shortest,
)
from kt_moe.patterns import first_match


class SharedOuterLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig whose LoRA on kt_moe experts shares its outer matrices: A of gate and up, B of down.

    They are one for all experts of a layer ("shared outer" of SGLang and Megatron Bridge), which takes about
    half the parameters, gradients and optimizer state. Files have them once for each expert, so that plain
    PEFT reads them; `export_adapter(..., target="sglang")` writes them once.
    """


class KtLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig in a model with kt_moe experts: what the user wrote, saved as what plain PEFT reads.

    kt_moe_targets: what it targets in that model.
    kt_moe_saved: the config that is saved; the file has no other.
    shared_outer: whether it was a `SharedOuterLoraConfig`.
    """

    shared_outer = False

    kt_moe_targets: Targets
    kt_moe_saved: LoraConfig

    @property
    def has_fixed(self) -> bool:
        """Whether the adapter has a fixed part beside the trained one; see `kt_moe.hf.initial`."""
        return bool(self.kt_moe_targets.experts) and starts_from_weights(self.init_lora_weights)

    @classmethod
    def of(cls, config: LoraConfig) -> KtLoraConfig:
        """A copy; the caller's config stays as it is."""
        result: Any = copy.deepcopy(config)
        result.__class__ = cls
        if isinstance(config, SharedOuterLoraConfig):
            result.shared_outer = True
        return result  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json for plain PEFT."""
        saved = copy.copy(self.kt_moe_saved)
        for field in ("base_model_name_or_path", "inference_mode", "revision", "task_type", "auto_mapping"):
            setattr(saved, field, getattr(self, field))
        if self.init_lora_weights is True:  # which PEFT makes it to convert an adapter to plain LoRA
            saved.init_lora_weights = True
        saved.save_pretrained(save_directory, **kwargs)


@dataclass(frozen=True)
class Names:
    """All that names in a config could mean in a model, in plain transformers.

    modules: paths. parameters: paths of tensors that are no layer's PEFT knows. projections: what routed
    experts' projections may be called, by the path of the experts.
    """

    modules: list[str]
    parameters: list[str]
    projections: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Those of a base model."""
        architecture = experts_architecture(model)
        names = cls([], [], {})
        for name, module in free_modules(model):
            names.modules.append(name)
            if architecture is not None and holds_kt_experts(module):
                fused = architecture.module_at(name).fused
                names.parameters.extend(f"{name}.{parameter}" for parameter in fused)
                names.projections[name] = [
                    alias for some in names_of(name, architecture).values() for alias in some
                ]
            else:
                base = module.get_base_layer() if isinstance(module, LoraLayer) else module
                own = (f"{name}.{parameter}" for parameter, _ in base.named_parameters(recurse=False))
                names.parameters.extend(own)
        return names

    def shortest_modules(self, wanted: Iterable[str], experts: Iterable[str] = ()) -> list[str]:
        """The shortest names for target_modules that mean no other module, and no experts but those given."""
        others = [
            alias for path in self.projections.keys() - set(experts) for alias in self.projections[path]
        ]
        return shortest(wanted, [*self.modules, *others])

    def shortest_parameters(self, wanted: Iterable[str]) -> list[str] | None:
        """The same for target_parameters; None if there are none."""
        return shortest(wanted, self.parameters) or None


def saved_config(model: nn.Module, config: KtLoraConfig, adapter_name: str) -> LoraConfig:
    """The config with which plain PEFT puts the same LoRA on the same model.

    It says what is there: names that end no other module's path, and patterns where ranks differ. Names that
    PEFT would take for routed experts are given as parameters, which it leaves alone.
    """
    saved: Any = copy.deepcopy(config)
    saved.__class__ = LoraConfig
    names = Names.of(model)
    wanted: dict[str, tuple[int, float]] = {}  # rank and alpha
    old_names = renamed_by_peft(model)
    experts: dict[str, KtLoraExperts] = {}
    for name, module in free_modules(model):
        if isinstance(module, KtLoraExperts) and adapter_name in module.pairs:
            experts[name] = module
        elif isinstance(module, LoraLayer) and adapter_name in module.r:
            rank = module.r[adapter_name]
            alpha = module.lora_alpha[adapter_name] * (rank**0.5 if module.use_rslora[adapter_name] else 1)
            if isinstance(module, ParamWrapper) or name.rpartition(".")[2] in old_names:
                name = f"{name}.{getattr(module, 'parameter_name', 'weight')}"
            wanted[name] = rank, alpha
    saved.lora_alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
    saved.use_rslora = False
    if config.has_fixed:
        saved.r, saved.lora_alpha = 2 * saved.r, 2 * saved.lora_alpha
    on_experts = _names_of_all_experts(model, experts, adapter_name, saved)
    for path, layer in {} if on_experts else experts.items():
        for fused, rank in layer.fused_ranks(adapter_name).items():
            wanted[f"{path}.{fused}"] = rank, rank * layer.fused_scaling(adapter_name, fused)
    as_parameters = wanted.keys() & set(names.parameters)
    collide = {n for n in on_experts if any(m.endswith(f".{n}") for m in names.modules)}
    of_experts = [f"experts.{n}" if n in collide else n for n in on_experts]
    saved.target_modules = sorted([*names.shortest_modules(wanted.keys() - as_parameters), *of_experts])
    saved.target_parameters = names.shortest_parameters(as_parameters)
    saved.rank_pattern = _pattern({name: rank for name, (rank, _) in wanted.items()}, saved.r)
    saved.alpha_pattern = _pattern({name: alpha for name, (_, alpha) in wanted.items()}, saved.lora_alpha)
    saved.layers_to_transform = saved.layers_pattern = saved.exclude_modules = None
    if experts or as_parameters:
        saved.lora_dropout, saved.init_lora_weights = 0.0, True  # PEFT has no dropout on parameters
    return saved


def with_ranks_doubled(saved: LoraConfig) -> LoraConfig:
    """The config of plain LoRA with twice the ranks and the same scalings; of one without rsLoRA."""
    result = copy.deepcopy(saved)
    result.init_lora_weights, result.r, result.lora_alpha = True, 2 * saved.r, 2 * saved.lora_alpha
    for name in ("rank_pattern", "alpha_pattern"):
        setattr(result, name, {key: 2 * value for key, value in (getattr(saved, name) or {}).items()})
    return result


def _names_of_all_experts(
    model: nn.Module, experts: dict[str, KtLoraExperts], adapter_name: str, saved: LoraConfig
) -> list[str]:
    """The names of projections on disk, if they say all: the same LoRA, of r and alpha, in every layer."""
    layers = [name for name, module in free_modules(model) if holds_kt_experts(module)]
    pairs = [layer.pairs[adapter_name].pairs for layer in experts.values()]
    modules = [layer.form(path).module for path, layer in experts.items()]
    if not experts or len(experts) != len(layers) or not is_per_expert(model, modules[0], pairs[0]):
        return []
    uniform = all(
        p.rank == saved.r and p.scaling == saved.lora_alpha / saved.r for x in pairs for p in x.values()
    )
    if not uniform or any(other.keys() != pairs[0].keys() for other in pairs):
        return []
    return list(dict.fromkeys(module.words[p] for module in modules for p in pairs[0]))


def check_same(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """Check that a config, in whatever words, gives an adapter the ranks and scalings that it has.

    Ranks of fused experts are left to the tensors, which say how gate and up share theirs.

    Args:
        model: the base model, with the adapter.

    Raises:
        ValueError: they differ on a layer, or the config is none for this model; names it.
    """
    architecture = experts_architecture(model)
    experts: dict[str, ExpertPairs] = {}
    if architecture is None:
        config = copy.deepcopy(config)
        check_config_patterns(config, [name for name, _ in model.named_modules()])
        convert_peft_config_for_transformers(config, model, None)
    else:
        experts = dict(find_targets(model, config, architecture).experts)
    for name, module in free_modules(model):
        if isinstance(module, KtLoraExperts):
            found = _of_experts(module, experts.get(name), adapter_name)
        else:
            found = _of_layers(name, module, config, adapter_name)
        for what, (rank, scaling), (new_rank, new_scaling) in found:
            if rank != new_rank or not math.isclose(scaling, new_scaling, rel_tol=1e-6):
                raise ValueError(
                    f"the model's adapter {adapter_name!r} has rank {rank} and scaling {scaling:g} on "
                    f"{name}{what}, the one to be loaded {new_rank} and {new_scaling:g}: "
                    f"delete_adapter({adapter_name!r}), or use another name"
                )


_Numbers = tuple[int, float]  # rank and scaling


def _of_experts(
    layer: KtLoraExperts, new: ExpertPairs | None, adapter_name: str
) -> Iterator[tuple[str, _Numbers, _Numbers]]:
    """Each projection that an adapter and a config have, with the numbers of both."""
    own = layer.pairs[adapter_name].pairs if adapter_name in layer.pairs else {}
    fused = {p: name for name in (() if new is None else new.fused) for p in layer.fused[name]}
    for projection, pair in {} if new is None else new.pairs.items():
        if projection not in own:
            continue
        rank, scaling = own[projection].rank, own[projection].scaling
        if projection in fused:
            rank, scaling = pair.rank, layer.fused_scaling(adapter_name, fused[projection])
        yield f".{projection}_proj", (rank, scaling), (pair.rank, pair.scaling)


def _of_layers(
    name: str, module: nn.Module, config: LoraConfig, adapter_name: str
) -> Iterator[tuple[str, _Numbers, _Numbers]]:
    """The same of one of PEFT's layers; of several for parameters, one in the other."""
    layer: Any = module
    while isinstance(layer, LoraLayer):
        is_parameter = isinstance(layer, ParamWrapper)
        end = f".{layer.parameter_name}" if is_parameter else ""
        if adapter_name in layer.r:
            keys = [f"{name}{end}"] if is_parameter else [name, f"{name}.weight"]
            of_pattern = first_match(config.rank_pattern or {}, keys)
            rank = config.r if of_pattern is None else of_pattern
            of_pattern = first_match(config.alpha_pattern or {}, keys)
            alpha = config.lora_alpha if of_pattern is None else of_pattern
            own = layer.r[adapter_name], layer.lora_alpha[adapter_name]
            yield (
                end,
                (own[0], _scaling(*own, layer.use_rslora[adapter_name])),
                (rank, _scaling(rank, alpha, config.use_rslora)),
            )
        layer = layer.base_layer if is_parameter else None


def _scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    return float(alpha / (math.sqrt(rank) if use_rslora else rank))


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Shortest patterns for the names whose value is not the default; no other layer's weight has them."""
    result: dict[str, Any] = {}
    known = [*values, *(f"{name}.weight" for name in values)]
    for value in dict.fromkeys(values.values()):
        if value != default:
            same = [name for name, own in values.items() if own == value]
            result |= dict.fromkeys(shortest(same, known), value)
    return result
