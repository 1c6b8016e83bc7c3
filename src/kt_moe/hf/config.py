"""The LoraConfig of an adapter on kt_moe experts: as the user wrote it in memory, for plain PEFT on disk."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from kt_moe.functional import PROJECTIONS
from kt_moe.hf.lora import KtLoraExperts, experts_architecture
from kt_moe.hf.portable import is_per_expert, renamed_by_peft
from kt_moe.hf.targets import FUSED, Targets, free_modules, holds_kt_experts, names_of, shortest


class KtLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig in a model with kt_moe experts: what the user wrote, saved as what plain PEFT reads.

    kt_moe_targets: what it targets in that model.
    kt_moe_saved: the config that is saved; the file has no other.
    """

    kt_moe_targets: Targets
    kt_moe_saved: LoraConfig

    @classmethod
    def of(cls, config: LoraConfig) -> KtLoraConfig:
        """A copy; the caller's config stays as it is."""
        result: Any = copy.deepcopy(config)
        result.__class__ = cls
        return result  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json for plain PEFT."""
        saved = copy.copy(self.kt_moe_saved)
        for field in ("base_model_name_or_path", "inference_mode", "revision", "task_type", "auto_mapping"):
            setattr(saved, field, getattr(self, field))
        saved.save_pretrained(save_directory, **kwargs)


def saved_config(model: nn.Module, config: KtLoraConfig, adapter_name: str) -> LoraConfig:
    """The config with which plain PEFT puts the same LoRA on the same model.

    It says what is there: names that end no other module's path, and patterns where ranks differ. Names that
    PEFT would take for routed experts are given as parameters, which it leaves alone.
    """
    saved: Any = copy.deepcopy(config)
    saved.__class__ = LoraConfig
    architecture = experts_architecture(model)
    assert architecture is not None
    modules, parameters = [], []  # all there are, in plain transformers
    projections: list[str] = []  # names of experts' projections, which no other name may be read as
    wanted: dict[str, tuple[int, float]] = {}  # rank and alpha
    old_names = renamed_by_peft(model)
    experts: dict[str, KtLoraExperts] = {}
    for name, module in free_modules(model):
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        modules.append(name)
        if holds_kt_experts(module):
            parameters += [f"{name}.{fused}" for fused in FUSED]
            projections += [alias for some in names_of(name, architecture).values() for alias in some]
        else:
            parameters += [f"{name}.{parameter}" for parameter, _ in base.named_parameters(recurse=False)]
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
    names = _names_of_all_experts(model, experts, adapter_name, saved)
    for path, layer in {} if names else experts.items():
        for fused, rank in layer.fused_ranks(adapter_name).items():
            wanted[f"{path}.{fused}"] = rank, rank * layer.fused_scaling(adapter_name, fused)
    as_parameters = wanted.keys() & set(parameters)
    of_experts = [n if not any(m.endswith(f".{n}") for m in modules) else f"experts.{n}" for n in names]
    by_name = shortest(wanted.keys() - as_parameters, [*modules, *projections])
    saved.target_modules = sorted([*by_name, *of_experts])
    saved.target_parameters = shortest(as_parameters, parameters) or None
    saved.rank_pattern = _pattern({name: rank for name, (rank, _) in wanted.items()}, saved.r)
    saved.alpha_pattern = _pattern({name: alpha for name, (_, alpha) in wanted.items()}, saved.lora_alpha)
    saved.layers_to_transform = saved.layers_pattern = saved.exclude_modules = None
    if experts or as_parameters:
        saved.lora_dropout, saved.init_lora_weights = 0.0, True  # PEFT has no dropout on parameters
    return saved


def _names_of_all_experts(
    model: nn.Module, experts: dict[str, KtLoraExperts], adapter_name: str, saved: LoraConfig
) -> list[str]:
    """The names of projections on disk, if they say all: the same LoRA, of r and alpha, in every layer."""
    layers = [name for name, module in free_modules(model) if holds_kt_experts(module)]
    pairs = [layer.pairs[adapter_name].pairs for layer in experts.values()]
    if not experts or len(experts) != len(layers) or not is_per_expert(model, pairs[0]):
        return []
    uniform = all(
        p.rank == saved.r and p.scaling == saved.lora_alpha / saved.r for x in pairs for p in x.values()
    )
    if not uniform or any(other.keys() != pairs[0].keys() for other in pairs):
        return []
    on_disk = [
        dict(zip(PROJECTIONS, layer.form(path).module.projections, strict=True))
        for path, layer in experts.items()
    ]
    return list(dict.fromkeys(names[p] for names in on_disk for p in pairs[0]))


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Shortest patterns for the names whose value is not the default."""
    result: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            same = [name for name, own in values.items() if own == value]
            result |= dict.fromkeys(shortest(same, values), value)
    return result
