"""LoRA on kt_moe experts as a PEFT tuner layer, and the tuner that dispatches to it.

In memory the adapter of a layer is one tensor a projection for all experts ([E, r, in] and [E, out, r]). In
PEFT's adapter files it has one key an expert, `...experts.{e}.gate_proj.lora_A.weight`: the form that servers
read, and that plain PEFT fuses on loading.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from kt_moe.architectures import Architecture, architecture_of
from kt_moe.functional import PROJECTIONS, Lora, MoEFunction
from kt_moe.hf.experts import KtExperts, dims_of, experts_of, is_kt_experts
from kt_moe.hf.portable import fused_to_stacked, per_expert_to_stacked, split_by_expert
from kt_moe.lora_device import LoraParameters, LoraPlace

_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # what PEFT rewrites target_modules to


class KtLoraExperts(nn.Module, LoraLayer):  # type: ignore[misc]
    """Experts with LoRA: PEFT's tuner layer for `KtExperts` and for experts computed by "kt_moe".

    Parameters, fp32: `lora_A.{adapter}.{gate,up,down}` [E, r, in] and `lora_B.{adapter}.{gate,up,down}`
    [E, out, r]. `place` says whether they go where the model goes.
    """

    # What LoraLayer has; the dictionaries go from adapter name to parameters, dropout module or number.
    base_layer: Any
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Any
    lora_A: Any  # noqa: N815 (PEFT's name)
    lora_B: Any  # noqa: N815
    lora_dropout: Any
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        place: LoraPlace,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.place = place
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        _, hidden, _ = dims_of(module)
        return hidden, hidden

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter; PEFT calls this.

        Raises:
            ValueError: an option of LoraConfig that does not work on experts; names it.
        """
        _refuse_options(config, r, lora_alpha)
        base = self.base_layer
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.use_rslora[adapter_name] = self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        a, b = LoraParameters(self.place), LoraParameters(self.place)
        for projection in config._kt_moe_projections:
            num_experts, into, out = dims_of(base)
            if projection == "down":
                into, out = out, into
            a[projection] = nn.Parameter(torch.empty(num_experts, r, into, dtype=torch.float32))
            b[projection] = nn.Parameter(torch.empty(num_experts, out, r, dtype=torch.float32))
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a, b
        self.place.numbers += sum(p.numel() for p in (*a.parameters(), *b.parameters()))
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialise as PEFT does each expert's pair: True, False or "gaussian"."""
        for a in self.lora_A[adapter_name].values():
            if init_lora_weights == "gaussian":
                a.normal_(std=1 / self.r[adapter_name])
            else:
                a.uniform_(-(a.shape[2] ** -0.5), a.shape[2] ** -0.5)  # Kaiming with a = sqrt(5)
        for b in self.lora_B[adapter_name].values():
            if init_lora_weights:
                b.zero_()
            else:
                b.uniform_(-(b.shape[2] ** -0.5), b.shape[2] ** -0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]; see `kt_moe.MoEFunction.apply`."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        lora, tensors = self._combined(active)
        experts = experts_of(self.base_layer)
        out: Tensor = MoEFunction.apply(hidden_states, top_k_index, top_k_weights, experts, lora, **tensors)
        return out

    def _combined(self, active: list[str]) -> tuple[Lora, dict[str, Tensor]]:
        """One LoRA that is the sum of the active adapters: their ranks side by side."""
        dropouts = {self._dropout(name) for name in active}
        if len(dropouts) > 1:
            raise ValueError(f"active adapters {active} have different lora_dropout {sorted(dropouts)}")
        dropout = dropouts.pop()
        tensors: dict[str, Tensor] = {}
        if len(active) == 1:
            (name,) = active
            for projection in self.lora_A[name]:
                tensors[f"{projection}_lora_a"] = self.lora_A[name][projection]
                tensors[f"{projection}_lora_b"] = self.lora_B[name][projection]
            return Lora(float(self.scaling[name]), dropout), tensors
        for projection in PROJECTIONS:
            names = [name for name in active if projection in self.lora_A[name]]
            if names:
                a = [self.lora_A[name][projection] for name in names]
                b = [self.lora_B[name][projection] * self.scaling[name] for name in names]
                tensors[f"{projection}_lora_a"] = torch.cat(a, dim=1)
                tensors[f"{projection}_lora_b"] = torch.cat(b, dim=2)
        return Lora(1.0, dropout), tensors

    def _dropout(self, adapter_name: str) -> float:
        return float(getattr(self.lora_dropout[adapter_name], "p", 0.0)) if self.training else 0.0

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """NotImplementedError: the experts are frozen in packed form."""
        raise NotImplementedError(_NO_MERGE)

    def unmerge(self) -> None:
        """NotImplementedError: nothing was merged."""
        raise NotImplementedError(_NO_MERGE)


_NO_MERGE = (
    "kt_moe experts cannot take an adapter in: they are frozen in packed form. Save the adapter and use "
    "kt_moe.merge_adapter(base_dir, adapter_dir, output_dir), which writes a merged checkpoint"
)


class KtLoraModel(LoraModel):  # type: ignore[misc]
    """PEFT's LoRA tuner, which also knows kt_moe experts. On a model without them it is PEFT's, unchanged."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model, which may have kt_moe experts."""
        architecture = self._kt_architecture = _architecture(model)
        config = self.peft_config[adapter_name]
        if architecture is not None:
            _refuse_fused(config)
            self._kt_place = _place_of(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _move_to_their_models(model, adapter_name)
        if architecture is not None and config._kt_moe_projections:
            # From here on the config says what plain PEFT is to read beside the per-expert keys.
            names = dict(zip(PROJECTIONS, architecture.projections, strict=True))
            others = {t for t in config.target_modules if not _is_experts(t)}
            config.target_modules = others | {names[p] for p in config._kt_moe_projections}

    def _prepare_adapter_config(self, peft_config: LoraConfig, model_config: dict[str, Any]) -> LoraConfig:
        config = super()._prepare_adapter_config(peft_config, model_config)
        if self._kt_architecture is not None:
            _target_experts(config, self._kt_architecture)
        return config

    def _create_new_module(
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if is_kt_experts(target):
            r, alpha = kwargs["r"], kwargs["lora_alpha"]
            return KtLoraExperts(target, adapter_name, lora_config, r, alpha, self._kt_place)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)  # type: ignore[no-any-return]

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, KtLoraExperts):
            setattr(parent, child_name, new_module)  # no base weight has the dtype or device it should have
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(isinstance(module, KtLoraExperts) for module in self.model.modules()):
            raise NotImplementedError(_NO_MERGE)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> Any:
        found = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, **kwargs
        )
        architecture = _architecture(model)
        return found if architecture is None else split_by_expert(found, architecture, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        architecture = _architecture(model)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, KtLoraExperts)}
        stacked: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if adapter_name in layer.r:
                experts, _, inner = dims_of(layer.base_layer)
                rank = layer.r[adapter_name]
                stacked |= fused_to_stacked(state_dict, name, experts, inner, rank, adapter_name)
                if architecture is not None and architecture.fused_on_disk:
                    stacked |= per_expert_to_stacked(state_dict, name, architecture, experts, adapter_name)
        # Tensors may become parameters as they are; those that stay in host memory are not to be elsewhere.
        place = next((layer.place for layer in layers.values()), None)
        if place is not None:
            stacked = {key: t.cpu() if place.stays(t.device) else t for key, t in stacked.items()}
        rest = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return {**rest, **stacked}


def _architecture(model: nn.Module) -> Architecture | None:
    """The architecture of a model with kt_moe experts; None for other models."""
    experts = next((module for module in model.modules() if is_kt_experts(module)), None)
    if experts is None:
        return None
    row = getattr(experts, "architecture", None)
    return row if isinstance(row, Architecture) else architecture_of(model)


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


def _is_experts(target: str) -> bool:
    return target == "experts" or target.endswith(".experts")


def _refuse_fused(config: LoraConfig) -> None:
    fused = [t for t in config.target_parameters or () if t.rpartition(".")[2] in _FUSED]
    if fused:
        raise ValueError(
            f"target_parameters has {sorted(fused)}, which kt_moe experts do not have as parameters: "
            'use target_modules=["experts"]'
        )


def _target_experts(config: LoraConfig, architecture: Architecture) -> None:
    """Aim a config at the experts modules, after PEFT has rewritten gate_proj and so on to fused names."""
    config._kt_moe_projections = ()
    if isinstance(config.target_modules, str):
        return  # a pattern that PEFT could not resolve to names; it will say that nothing matches
    modules, parameters = set(config.target_modules or ()), set(config.target_parameters or ())
    named: tuple[str, ...] = PROJECTIONS if any(_is_experts(t) for t in modules) else ()
    if architecture.fused_on_disk and not named:  # names that PEFT does not rewrite
        names = dict(zip(architecture.projections, PROJECTIONS, strict=True))
        named = tuple(names[t] for t in names if t in modules)
        modules = modules - set(names) | ({"experts"} if named else set())
    fused = [p for name, parts in _FUSED.items() if name in parameters for p in parts]
    projections = tuple(p for p in PROJECTIONS if p in named or p in fused)
    config._kt_moe_projections = projections
    if not projections:
        return
    for name in _FUSED:
        for pattern in (config.rank_pattern, config.alpha_pattern):
            pattern.pop(rf".*\.{re.escape(name)}", None)
    config.target_modules = modules if named else modules | {"experts"}
    config.target_parameters = parameters - set(_FUSED) or None
    if config.use_rslora:
        _linear_scaling(config)


def _linear_scaling(config: LoraConfig) -> None:
    """Write alpha / sqrt(r) as alpha' / r.

    Plain PEFT doubles r and alpha when it fuses gate and up, which keeps alpha / r but not alpha / sqrt(r).
    """
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("use_rslora with rank_pattern or alpha_pattern is not supported on kt_moe experts")
    config.lora_alpha, config.use_rslora = config.lora_alpha * math.sqrt(config.r), False


def _refuse_options(config: LoraConfig, r: int, lora_alpha: float) -> None:
    if r < 1:
        raise ValueError(f"LoraConfig: r is {r}, wanted at least 1")
    if r != config.r or lora_alpha != config.lora_alpha:
        raise ValueError(
            "LoraConfig: rank_pattern or alpha_pattern matches kt_moe experts, which all take r and "
            "lora_alpha, so that other programs can read the adapter"
        )
    variants = [
        f for f, field in config.__dataclass_fields__.items() if field.metadata.get("is_lora_variant")
    ]
    for option in (*variants, "use_dora", "lora_bias", "fan_in_fan_out"):
        if getattr(config, option, None):
            raise ValueError(f"LoraConfig: {option} does not work on kt_moe experts")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"LoraConfig: init_lora_weights={config.init_lora_weights!r} does not work on kt_moe experts, "
            'only True, False and "gaussian"'
        )
