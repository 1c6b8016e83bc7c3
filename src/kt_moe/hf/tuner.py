"""PEFT's LoRA tuner for models with kt_moe experts, and the config of their adapters.

PEFT has one tuner class for LoRA. `KtLoraModel` stands in its registry and leaves every model without kt_moe
experts to the class that stood there. It overrides what PEFT calls to add an adapter (`inject_adapter`, and
`_create_new_module` for one module), and to name the tensors of one (`_get_adapter_state_dict`,
`_remap_adapter_state_dict_for_load`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from kt_moe.architectures import Architecture, architecture_of
from kt_moe.hf.experts import KtExperts, dims_of, is_kt_experts
from kt_moe.hf.lora import NO_MERGE, KtLoraExperts
from kt_moe.hf.portable import PREFIX, ExpertsForm, Matrices, is_per_expert, renamed_by_peft, stacked
from kt_moe.hf.targets import FUSED, Targets, find_targets, free_modules, is_experts, shortest
from kt_moe.hf.weighted import KINDS, combine
from kt_moe.lora_device import LoraPlace
from kt_moe.patterns import first_match

_logger = logging.getLogger(__name__)
_NOTHING = "(?!)"  # a pattern without matches: PEFT's conversion of names of older models leaves it alone


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


class KtLoraModel(LoraModel):  # type: ignore[misc]
    """PEFT's LoRA tuner for models with kt_moe experts. For another model it makes PEFT's own."""

    _kt_held: dict[KtLoraExperts, tuple[Any, Any]] | None = None  # new LoRA that PEFT is not to see

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module) and _architecture(model) is None:
            return LoraModel(model, *args, **kwargs)
        return super().__new__(cls)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: a target that matches nothing, an option that does not work on experts; names it.
        """
        architecture = _architecture(model)
        assert architecture is not None
        config = self.peft_config[adapter_name] = KtLoraConfig.of(self.peft_config[adapter_name])
        self._kt_place = _place_of(model)
        try:
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            config.kt_moe_targets = targets = find_targets(model, config, architecture)
            _logger.info("LoRA %r is on %s", adapter_name, targets)
            self._inject(model, adapter_name, config, *args, **kwargs)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        _move_to_their_models(model, adapter_name)
        config.kt_moe_saved = saved_config(model, config, adapter_name)
        if config.target_parameters:  # PEFT's functions for several adapters want names of modules
            config.target_modules, config.target_parameters = (
                targets.names(),
                sorted(targets.parameters) or None,
            )
        if self._kt_held is not None:
            for _, layer in list(lora_layers(model, adapter_name)):
                self._kt_held[layer] = layer.lora_A.pop(adapter_name), layer.lora_B.pop(adapter_name)

    def _inject(
        self, model: nn.Module, adapter_name: str, config: KtLoraConfig, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's injection at the targets that were found; afterwards the config has the user's words."""
        targets = config.kt_moe_targets
        words = {name: getattr(config, name) for name in ("target_modules", "target_parameters", *_PATTERNS)}
        config.target_modules, config.target_parameters = _NOTHING, None
        for name in _PATTERNS:  # those of experts are not PEFT's to match
            setattr(config, name, _matching(words[name] or {}, [*targets.modules, *targets.parameters]))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            for name, value in words.items():
                setattr(config, name, value)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_clamp: float | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **options: Any,
    ) -> None:
        """Add the weighted sum of adapters as a further one; see `peft.LoraModel.add_weighted_adapter`.

        Raises:
            ValueError: a combination that does not work on experts; names it.
        """
        if adapter_name in self.peft_config:
            return
        kind = "linear" if len(adapters) == 1 else combination_type  # as PEFT has it
        if kind not in KINDS:
            raise ValueError(f"combination_type is {kind!r}, kt_moe experts know {list(KINDS)}")
        if svd_clamp is not None:
            raise ValueError(f"svd_clamp is {svd_clamp}, which does not work on kt_moe experts")
        shared = {"density": density, "majority_sign_method": majority_sign_method}
        self._kt_held = held = dict[KtLoraExperts, tuple[Any, Any]]()
        try:
            super().add_weighted_adapter(
                adapters, weights, adapter_name, combination_type=combination_type, **shared, **options
            )
        finally:
            del self._kt_held
        for layer, (layer.lora_A[adapter_name], layer.lora_B[adapter_name]) in held.items():
            self._combine(layer, adapters, weights, adapter_name, kind, shared)

    @torch.no_grad()
    def _combine(
        self,
        layer: KtLoraExperts,
        adapters: list[str],
        weights: list[float],
        new: str,
        kind: str,
        shared: Any,
    ) -> None:
        """Give a layer's new adapter the values of the sum."""
        for projection, pair in layer.pairs[new].pairs.items():
            a, b = layer.lora_A[new][projection], layer.lora_B[new][projection]
            parts = [
                (
                    layer.lora_A[n][projection],
                    layer.lora_B[n][projection],
                    weight * layer.scaling_of(n, projection),
                )
                for n, weight in zip(adapters, weights, strict=True)
                if n in layer.pairs and projection in layer.pairs[n].pairs
            ]
            names = [str(number) for number in range(len(parts))]

            def of_matrices(one: Any, names: list[str] = names) -> Any:
                return self._generalized_task_arithmetic_weighted_adapter(
                    kind, names, [1.0] * len(names), one, **shared
                )

            b.zero_()
            if parts:
                values = combine(parts, pair.rank, kind, of_matrices)
                a.copy_(values[0])
                b.copy_(values[1] / pair.scaling)
            for parameter in (a, b):
                parameter.requires_grad_(False)

    def _check_new_adapter_config(self, config: KtLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        if config.target_modules == _NOTHING:  # PEFT has done with old names
            targets = config.kt_moe_targets
            config.target_modules = {*targets.modules, *targets.experts}
            config.target_parameters = sorted(targets.parameters) or None

    def _create_new_module(
        self, lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if is_kt_experts(target):
            pairs = lora_config.kt_moe_targets.experts[kwargs["target_name"]]
            return KtLoraExperts(target, adapter_name, lora_config, pairs, self._kt_place)
        if kwargs.get("parameter_name") is not None and lora_config.lora_dropout:
            lora_config = copy.copy(lora_config)
            lora_config.lora_dropout = 0.0  # PEFT has none for parameters, such as a router's
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)  # type: ignore[no-any-return]

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if is_kt_experts(child) or isinstance(new_module, KtLoraExperts) or is_kt_experts(new_module):
            setattr(parent, child_name, new_module)  # no base weight has the dtype or device it should have
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(isinstance(module, KtLoraExperts) for module in self.model.modules()):
            raise NotImplementedError(NO_MERGE)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        for path, layer in lora_layers(model, adapter_name):
            key = stacked(path, adapter_name)
            own = {m.groups(): found.pop(m[0]) for m in filter(None, map(key.match, list(found)))}
            matrices = {p: (own["A", p], own["B", p]) for m, p in own if m == "A"}
            form = form_of(path, layer)
            if is_per_expert(model, layer.pairs[adapter_name].pairs) and _one_scaling(layer, adapter_name):
                tensors = form.split(matrices)
            else:
                tensors = form.fuse(_scaled_alike(matrices, layer, adapter_name))
            found |= {f"{k}.{adapter_name}.weight": t for k, t in tensors.items()}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        state_dict = dict(state_dict)
        for path, layer in lora_layers(model, adapter_name):
            form = form_of(path.removeprefix(PREFIX), layer)
            pairs, ranks = layer.pairs[adapter_name], fused_ranks(layer, adapter_name)
            allowed = {name: {rank, pairs.fused.get(name, rank)} for name, rank in ranks.items()}
            own = {projection: pair.rank for projection, pair in pairs.pairs.items()}
            matrices = form.take(state_dict, allowed, own)
            layer.fit(adapter_name, {p: a.shape[1] for p, (a, _) in matrices.items()})
            for projection, pair in matrices.items():
                for matrix, tensor in zip("AB", pair, strict=True):
                    # Tensors may become parameters as they are; those of host memory are not to be elsewhere.
                    held = tensor.cpu() if layer.place.stays(tensor.device) else tensor
                    result[f"{path}.lora_{matrix}.{adapter_name}.{projection}"] = held
        if result:  # ranks may have changed
            base: Any = model
            base = base.get_base_model() if hasattr(model, "get_base_model") else model
            config.kt_moe_saved = saved_config(base, config, adapter_name)
        rest = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return {**rest, **result}


_PATTERNS = ("rank_pattern", "alpha_pattern")


def register() -> None:
    """Put the tuner into PEFT's registry."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = KtLoraModel


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, KtLoraExperts]]:
    """The layers of experts that have this adapter, by path."""
    for path, module in model.named_modules():
        if isinstance(module, KtLoraExperts) and adapter_name in module.pairs:
            yield path.removeprefix("_fsdp_wrapped_module."), module


def form_of(path: str, layer: KtLoraExperts) -> ExpertsForm:
    """The form on disk of a layer's tensors."""
    base = layer.base_layer
    architecture = _architecture(base)
    assert architecture is not None
    return ExpertsForm(path, architecture, *dims_of(base), is_concatenated=base.is_concatenated)


def fused_ranks(layer: KtLoraExperts, adapter_name: str) -> dict[str, int]:
    """Rank of the LoRA of each fused parameter as it is written."""
    own = layer.pairs[adapter_name].pairs
    ranks = {name: sum(own[p].rank for p in parts if p in own) for name, parts in FUSED.items()}
    return {name: rank for name, rank in ranks.items() if rank}


def saved_config(model: nn.Module, config: KtLoraConfig, adapter_name: str) -> LoraConfig:
    """The config with which plain PEFT puts the same LoRA on the same model.

    It says what is there: names that end no other module's path, and patterns where ranks differ. Names that
    PEFT would take for routed experts are given as parameters, which it leaves alone.
    """
    saved: Any = copy.deepcopy(config)
    saved.__class__ = LoraConfig
    modules, parameters = [], []  # all there are, in plain transformers
    wanted: dict[str, tuple[int, float]] = {}  # rank and alpha
    old_names = renamed_by_peft(model)
    experts: dict[str, KtLoraExperts] = {}
    for name, module in free_modules(model):
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        modules.append(name)
        if is_experts(module):
            parameters += [f"{name}.{fused}" for fused in FUSED]
        else:
            parameters += [f"{name}.{parameter}" for parameter, _ in base.named_parameters(recurse=False)]
        if isinstance(module, KtLoraExperts) and adapter_name in module.pairs:
            experts[name] = module
        elif isinstance(module, LoraLayer) and adapter_name in module.r:
            rank = module.r[adapter_name]
            alpha = module.lora_alpha[adapter_name] * (rank**0.5 if module.use_rslora[adapter_name] else 1)
            as_parameter = isinstance(module, ParamWrapper) or name.rpartition(".")[2] in old_names
            wanted[f"{name}.{getattr(module, 'parameter_name', 'weight')}" if as_parameter else name] = (
                rank,
                alpha,
            )
    saved.lora_alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
    saved.use_rslora = False
    names = _names_of_all_experts(model, experts, adapter_name, saved)
    for path, layer in {} if names else experts.items():
        for fused, rank in fused_ranks(layer, adapter_name).items():
            wanted[f"{path}.{fused}"] = rank, rank * _scaling_of(layer, adapter_name, fused)
    as_parameters = [name for name in wanted if name in set(parameters)]
    of_experts = [n if not any(m.endswith(f".{n}") for m in modules) else f"experts.{n}" for n in names]
    saved.target_modules = sorted([*shortest(wanted.keys() - set(as_parameters), modules), *of_experts])
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
    layers = [name for name, module in free_modules(model) if is_experts(module)]
    pairs = [layer.pairs[adapter_name].pairs for layer in experts.values()]
    if not experts or len(experts) != len(layers) or not is_per_expert(model, pairs[0]):
        return []
    uniform = all(
        p.rank == saved.r and p.scaling == saved.lora_alpha / saved.r for x in pairs for p in x.values()
    )
    if not uniform or any(other.keys() != pairs[0].keys() for other in pairs):
        return []
    form = form_of("", next(iter(experts.values())))
    on_disk = dict(
        zip(FUSED["gate_up_proj"] + FUSED["down_proj"], form.architecture.projections, strict=True)
    )
    return [on_disk[p] for p in pairs[0]]


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Shortest patterns for the names whose value is not the default."""
    result: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            same = [name for name, own in values.items() if own == value]
            result |= dict.fromkeys(shortest(same, values), value)
    return result


def _one_scaling(layer: KtLoraExperts, adapter_name: str) -> bool:
    pairs = layer.pairs[adapter_name].pairs
    return len({pair.scaling for p, pair in pairs.items() if p != "down"}) < 2


def _scaled_alike(matrices: Matrices, layer: KtLoraExperts, adapter_name: str) -> Matrices:
    """With the scaling of gate in the B of up: a fused tensor has one."""
    if _one_scaling(layer, adapter_name):
        return matrices
    a, b = matrices["up"]
    own = layer.pairs[adapter_name].pairs["up"].scaling
    return {**matrices, "up": (a, b * (own / _scaling_of(layer, adapter_name, "gate_up_proj")))}


def _scaling_of(layer: KtLoraExperts, adapter_name: str, fused: str) -> float:
    pairs = layer.pairs[adapter_name].pairs
    return next(pairs[p].scaling for p in FUSED[fused] if p in pairs)


def _matching(patterns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {k: v for k, v in patterns.items() if first_match({k: v}, names) is not None}


def _architecture(model: nn.Module) -> Architecture | None:
    """The architecture of a model with kt_moe experts; None for other models."""
    experts = next((module for module in model.modules() if is_kt_experts(module)), None)
    if experts is None:
        return None
    row = getattr(experts, "architecture", None)
    return row if isinstance(row, Architecture) else architecture_of(experts.config)


def _place_of(model: nn.Module) -> LoraPlace:
    """That of the layers which have LoRA; else a new one, with the choice of the model's `KtMoeConfig`."""
    modules = list(model.modules())
    found = next((m.place for m in modules if isinstance(m, KtLoraExperts)), None)
    if found is not None:
        return found
    return LoraPlace(next((m.lora_device for m in modules if isinstance(m, KtExperts)), "auto"))


def _move_to_their_models(model: nn.Module, adapter_name: str) -> None:
    """Move new LoRA of experts to the device of the layer, which is that of the router beside them."""
    for block in list(model.modules()):
        for layer in [m for m in block.children() if isinstance(m, KtLoraExperts)]:
            own = {id(p) for p in layer.parameters()}
            router = next((p for p in block.parameters() if id(p) not in own), None)
            if router is None or adapter_name not in layer.lora_A:
                continue
            for pairs in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
                if not any(p.is_meta for p in (router, *pairs.parameters())):
                    pairs.to(router.device)
