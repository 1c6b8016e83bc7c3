"""PEFT's LoRA tuner for models with kt_moe experts.

PEFT has one tuner class for LoRA. `KtLoraModel` stands in its registry and leaves every model without kt_moe
experts to the class that stood there. It overrides what PEFT calls to add an adapter (`inject_adapter`, and
`_create_new_module` for one module), and to name the tensors of one (`_get_adapter_state_dict`,
`_remap_adapter_state_dict_for_load`).
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from kt_moe.functional import of_all
from kt_moe.hf.config import KtLoraConfig, SharedOuterLoraConfig, saved_config, with_ranks_doubled
from kt_moe.hf.divided import parameters_of
from kt_moe.hf.experts import KtExperts, division_of, is_kt_experts
from kt_moe.hf.initial import halves, join_fixed, joined, part_fixed, start_layer
from kt_moe.hf.lora import NO_MERGE, KtLoraExperts, experts_architecture, lora_layers, refuse_options
from kt_moe.hf.portable import PREFIX, Matrices, is_per_expert, path_to_save, renaming_of
from kt_moe.hf.targets import Targets, find_targets, free_modules, holds_kt_experts
from kt_moe.hf.weighted import check_weighted, combine
from kt_moe.job import check_alike
from kt_moe.lora_device import LoraPlace
from kt_moe.patterns import first_match
from kt_moe.rank_parameters import whole

_logger = logging.getLogger(__name__)
# Of a config, what says where its files are from.
_OF_FILES = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "runtime_config")
_NOTHING = "(?!)"  # a pattern without matches: PEFT's conversion of names of older models leaves it alone


class KtLoraModel(LoraModel):  # type: ignore[misc]
    """PEFT's LoRA tuner for models with kt_moe experts. For another model it makes PEFT's own."""

    _kt_held: dict[KtLoraExperts, tuple[Any, Any]] | None = None  # new LoRA that PEFT is not to see

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module) and experts_architecture(model) is None:
            _refuse_shared_outer(args[0] if args else kwargs.get("config"))
            return LoraModel(model, *args, **kwargs)
        return super().__new__(cls)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: a target that matches nothing, an option that does not work on experts; names it. The
                model is as it was.
        """
        architecture = experts_architecture(model)
        assert architecture is not None
        config = self.peft_config[adapter_name] = KtLoraConfig.of(self.peft_config[adapter_name])
        tuned = {module for module in model.modules() if isinstance(module, BaseTunerLayer)}
        self._kt_architecture, self._kt_place = architecture, _place_of(model)
        try:
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            config.kt_moe_targets = targets = find_targets(model, config, architecture)
            _refuse(config)
            _logger.info("LoRA %r is on %s", adapter_name, targets)
            _check_alike(model, adapter_name, config)
            self._inject(model, adapter_name, config, *args, **kwargs)
            _move_to_their_models(model, adapter_name)
            config.kt_moe_saved = saved_config(model, config, adapter_name)
        except BaseException:  # an interrupt too leaves no half of an adapter
            del self.peft_config[adapter_name]
            _take_out(model, adapter_name, tuned)
            raise
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
        for name in _PATTERNS:
            setattr(config, name, _by_name(words[name] or {}, targets))
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
            ValueError: a combination that does not work on experts, an adapter that there is not, or numbers
                that are none for it; names it, and nothing is added.
        """
        if adapter_name in self.peft_config:
            return
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters has {unknown}, the model's adapters are {sorted(self.peft_config)}")
        kind = "linear" if len(adapters) == 1 else combination_type  # as PEFT has it
        check_weighted(adapters, weights, kind, density, majority_sign_method)
        fixed = [name for name in adapters if self.peft_config[name].has_fixed]
        if fixed:
            raise ValueError(
                f"adapters {fixed} started with a part of the base weights (PiSSA, OLoRA): save and load "
                "them, which makes plain LoRA of them"
            )
        if svd_clamp is not None:
            raise ValueError(f"svd_clamp is {svd_clamp}, which does not work on kt_moe experts")
        shared = {"density": density, "majority_sign_method": majority_sign_method}
        self._kt_held = held = dict[KtLoraExperts, tuple[Any, Any]]()
        try:
            try:
                super().add_weighted_adapter(
                    adapters, weights, adapter_name, combination_type=combination_type, **shared, **options
                )
            finally:
                del self._kt_held
                for layer, (a, b) in held.items():
                    layer.lora_A[adapter_name], layer.lora_B[adapter_name] = a, b
            for layer in held:
                self._combine(layer, adapters, weights, adapter_name, kind, shared)
        except BaseException:
            if adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

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
                (*layer.matrices(n, projection), weight * layer.scaling_of(n, projection))
                for n, weight in zip(adapters, weights, strict=True)
                if n in layer.pairs and projection in layer.pairs[n].pairs
            ]
            names = [str(number) for number in range(len(parts))]

            def of_matrices(one: Any, names: list[str] = names) -> Any:
                return self._generalized_task_arithmetic_weighted_adapter(
                    kind, names, [1.0] * len(names), one, **shared
                )

            b.zero_()
            if parts and len(b):  # a rank may have no experts
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

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: Any,
        **kwargs: Any,
    ) -> None:
        how = lora_config.init_lora_weights
        fixed = lora_config.has_fixed and not holds_kt_experts(target)
        if fixed:
            lora_config = copy.copy(lora_config)
            lora_config.init_lora_weights = True  # PEFT's would change the base weights
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, **kwargs)
        if fixed:
            name = kwargs.get("current_key", target_name)
            start_layer(getattr(parent, target_name), adapter_name, how, name)

    def _create_new_module(
        self, lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if is_kt_experts(target):
            pairs = lora_config.kt_moe_targets.experts[kwargs["target_name"]]
            return KtLoraExperts(
                target,
                adapter_name,
                lora_config,
                pairs,
                self._kt_architecture,
                self._kt_place,
                kwargs["target_name"],
            )
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
        join_fixed(found)
        layers = list(lora_layers(model, adapter_name))
        renamed = renaming_of(model) if layers else str
        for path, layer in layers:
            pairs = layer.pairs[adapter_name].pairs
            matrices: Matrices = {}
            for projection in pairs:
                tail = f"{adapter_name}.{projection}"
                if f"{path}.lora_A.{tail}" in found:
                    experts = layer.form(path).num_experts
                    own = [whole(found.pop(f"{path}.lora_{matrix}.{tail}")) for matrix in "AB"]
                    if own[0].dim() != 3:
                        raise ValueError(
                            f"LoRA of {path} is partitioned by DeepSpeed's ZeRO-3: call kt_moe.save_adapter "
                            "in every process, or give a state_dict with whole tensors (accelerate's "
                            "get_state_dict)"
                        )
                    fixed = [whole(found.pop(f"{path}.lora_fixed_{matrix}.{tail}", None)) for matrix in "AB"]
                    matrices[projection] = (
                        of_all(joined(own[0], fixed[0], 1), experts),
                        of_all(joined(own[1], fixed[1], 2), experts),
                    )
            module = layer.form(path).module
            per_expert = is_per_expert(model, module, pairs)
            place = path if per_expert else path_to_save(renamed, path, module)
            tensors = layer.tensors(adapter_name, place, matrices, per_expert)
            found |= {f"{k}.{adapter_name}.weight": t for k, t in tensors.items()}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        state_dict = dict(state_dict)
        layers = list(lora_layers(model, adapter_name))
        renamed = renaming_of(model) if layers else str
        for path, layer in layers:
            form = layer.form(path.removeprefix(PREFIX))
            pairs, ranks = layer.pairs[adapter_name], layer.fused_ranks(adapter_name)
            allowed = {name: {rank, pairs.fused.get(name, rank)} for name, rank in ranks.items()}
            own = {projection: pair.rank for projection, pair in pairs.pairs.items()}
            matrices = form.take(state_dict, allowed, own, renamed, layer.fused_factors(adapter_name))
            layer.fit(adapter_name, {p: a.shape[1] for p, (a, _) in matrices.items()})
            for projection, pair in matrices.items():
                division = division_of(layer.base_layer)
                for dim, tensor in enumerate(layer.held(adapter_name, projection, pair), 1):
                    tensor = tensor if division is None else division.own(tensor).clone()
                    # Tensors may become parameters as they are; those of host memory are not to be elsewhere.
                    held = tensor.cpu() if layer.place.stays(tensor.device) else tensor
                    tail = f"{'AB'[dim - 1]}.{adapter_name}.{projection}"
                    if adapter_name in layer.lora_fixed_A:
                        held, result[f"{path}.lora_fixed_{tail}"] = halves(
                            held, dim, f"{path}, {projection}_proj"
                        )
                    result[f"{path}.lora_{tail}"] = held
        if result:  # ranks may have changed
            base: Any = model
            base = base.get_base_model() if hasattr(model, "get_base_model") else model
            config.kt_moe_saved = saved_config(base, config, adapter_name)
        rest = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        part_fixed(model, rest)
        return {**rest, **result}

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, output_state_dict: dict[str, Tensor], kwargs: Any
    ) -> dict[str, Tensor]:
        """For `save_pretrained(path_initial_model_for_weight_conversion=...)`, as PEFT does.

        Raises:
            ValueError: the adapter is on experts, and is saved as plain LoRA without it.
        """
        if isinstance(peft_config, KtLoraConfig) and peft_config.kt_moe_targets.experts:
            raise ValueError(
                "path_initial_model_for_weight_conversion is not for adapters on kt_moe experts, which are "
                "saved as plain LoRA, whatever they started with"
            )
        converted: dict[str, Tensor] = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path, output_state_dict, kwargs
        )
        if isinstance(peft_config, KtLoraConfig):
            peft_config.kt_moe_saved = with_ranks_doubled(peft_config.kt_moe_saved)
        return converted


def take_over(model: nn.Module) -> None:
    """Let adapters be put on experts that became kt_moe's in a model that has PEFT's LoRA elsewhere."""
    tuners: list[Any] = [module for module in model.modules() if type(module) is LoraModel]
    for tuner in tuners:
        tuner.__class__ = KtLoraModel
        for name, config in tuner.peft_config.items():
            own = KtLoraConfig.of(config)
            layers = {
                path: m for path, m in free_modules(tuner.model) if isinstance(m, LoraLayer) and name in m.r
            }
            of_parameters = {path for path, m in layers.items() if isinstance(m, ParamWrapper)}
            parameters = frozenset(f"{path}.{layers[path].parameter_name}" for path in of_parameters)
            own.kt_moe_targets = Targets(frozenset(layers.keys() - of_parameters), parameters, {})
            own.kt_moe_saved = saved_config(tuner.model, own, name)
            tuner.peft_config[name] = own


def _refuse(config: KtLoraConfig) -> None:
    """ValueError for options that do not work, before a layer is changed."""
    if config.layer_replication:
        raise ValueError(
            "LoraConfig: layer_replication does not work with kt_moe experts, which a copied layer lacks"
        )
    for pairs in config.kt_moe_targets.experts.values():
        refuse_options(config, pairs)


def _take_out(model: nn.Module, adapter_name: str, tuned: Collection[Any]) -> None:
    """Take an adapter that was put in by half out of a model that had these layers with adapters."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            left = child
            while isinstance(left, BaseTunerLayer) and left not in tuned:
                left = left.base_layer
            if left is not child:
                setattr(parent, name, left)
    for layer in tuned:
        layer.delete_adapter(adapter_name)


def _refuse_shared_outer(configs: Any) -> None:
    configs = configs.values() if isinstance(configs, dict) else [configs]
    if any(isinstance(config, SharedOuterLoraConfig) for config in configs):
        raise ValueError("SharedOuterLoraConfig is for models with kt_moe experts, this model has none")


_PATTERNS = ("rank_pattern", "alpha_pattern")


def register() -> None:
    """Put the tuner into PEFT's registry, and experts into its count of parameters."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = KtLoraModel
    PeftModel.get_nb_trainable_parameters = _with_experts(PeftModel.get_nb_trainable_parameters)


def _with_experts(count: Callable[[PeftModel], tuple[int, int]]) -> Callable[[PeftModel], tuple[int, int]]:
    """PEFT's count of trainable and of all parameters, with experts, whose weights are not torch's, and with
    LoRA of those that other ranks have.
    """

    @functools.wraps(count)
    def counted(model: PeftModel) -> tuple[int, int]:
        trainable, everything = count(model)
        for _, parameter, division in parameters_of(model):
            elsewhere = (division.num_experts - len(parameter)) * parameter.shape[1:].numel()
            trainable, everything = trainable + elsewhere * parameter.requires_grad, everything + elsewhere
        held = sum(module.expert_module.numel for module in model.modules() if isinstance(module, KtExperts))
        return trainable, everything + held

    return counted


def _by_name(patterns: dict[str, Any], targets: Targets) -> dict[str, Any]:
    """Values by full name, for PEFT to match; those of experts are not."""
    names = {name: [name, f"{name}.weight"] for name in targets.modules}
    names |= {name: [name] for name in targets.parameters}
    found = {re.escape(name): first_match(patterns, both) for name, both in names.items() if patterns}
    return {name: value for name, value in found.items() if value is not None}


def _check_alike(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """ValueError where the processes of a job give their models different adapters."""
    of_model = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(of_model, "expert_parallel", "off") != "off":
        settings = {name: value for name, value in config.to_dict().items() if name not in _OF_FILES}
        own = {"adapter_name": adapter_name, "shared_outer": getattr(config, "shared_outer", False)}
        check_alike("LoRA", own | settings)


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
            held = layer.lora_A, layer.lora_B, layer.lora_fixed_A, layer.lora_fixed_B
            for pairs in (one[adapter_name] for one in held if adapter_name in one):
                if not any(p.is_meta for p in (router, *pairs.parameters())):
                    pairs.to(router.device)
