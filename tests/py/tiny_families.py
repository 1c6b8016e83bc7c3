"""Tiny random models of every family of transformers whose experts others may compute, found by looking."""

from __future__ import annotations

import inspect
import pkgutil
import re
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from kt_moe.computation import is_experts

# Sizes by the options' names; H, I of experts, I of others and head sizes all differ.
_SIZES: list[tuple[str, Any]] = [
    (r".*vocab_size.*", 64),
    (r"hidden_size|d_model|embed_dim|width|hidden_dim|out_hidden_size|adapter_in_dim", 32),
    (r"(num_|encoder_)?(hidden_)?layers|depth", 2),
    (r"(\w+_)?num_attention_heads|num_heads|n_heads|encoder_attention_heads|(\w+_)?num_key_value_heads", 4),
    (r"num_global_key_value_heads", 4),
    (r"(\w+_)?head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|kv_lora_rank|q_lora_rank", 8),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts", 4),
    (r"moe_intermediate_size", 24),
    (r"(\w+_)?intermediate_size|(encoder_)?ffn_dim|mlp_dim", 40),
    (r"moe_latent_size|moe_hidden_size", 28),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"max_position_embeddings", 64),
    (r"first_k_dense_replace|num_dense_layers|decoder_sparse_step_offset", 0),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
]
_LIMITS = {"limit", "swiglu_limit"}  # of a clamp, as experts modules call them
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MOE = {"num_experts": 4, "top_k_experts": 4, "moe_intermediate_size": 24}
_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}  # two linear ones amplify rounding
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}

# What looking cannot tell: which of a family's model types, and options that fit together.
_CHOSEN: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "aria": ("aria_text", None, {"intermediate_size": 24}),
    "beam": ("beam", None, _SPARSE),
    "deepseek_v2": ("deepseek_v2", None, {"num_experts_per_tok": 4}),
    "dots1": ("dots1", None, {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 4}),
    "dots3_note": ("dots3_note_text", None, {}),
    "flint": ("flint", None, {"mlp_only_layers": []}),
    "gemma4": ("gemma4_text", None, {"enable_moe_block": True, **_MOE}),
    "deepseek_ocr2": ("deepseek_ocr2", None, {"text_config": _SPARSE | {"num_experts_per_tok": 4}}),
    "diffusion_gemma": ("diffusion_gemma", None, {"text_config": _MOE}),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe",
        None,
        {
            "text_config": {
                "moe_intermediate_size": [24, 16],
                "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
            }
        },
    ),
    "glm4v_moe": (
        "glm4v_moe",
        None,
        {
            "text_config": {
                "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
            }
        },
    ),
    "glm5_next": ("glm5_next_text", None, {"qk_rope_head_dim": 0, "head_dim": 0, **_SPARSE}),
    "granitemoehybrid": ("granitemoehybrid", None, {"mamba_n_heads": 8, "mamba_d_state": 16}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", None, {"head_dim": 8}),
    "inkling": ("inkling_text", None, {}),
    "inkling2": ("inkling2_text", None, {}),
    "lfm2_moe": ("lfm2_moe", None, {"layer_types": ["conv", "full_attention"]}),
    "mimo_v2_flash": ("mimo_v2_flash", None, {"num_key_value_heads": 2}),
    "mistral4": ("mistral4", None, {"head_dim": 16, "qk_head_dim": 16}),
    "minimax_m3_vl": ("minimax_m3_vl_text", None, {}),
    "muse_spark": ("muse_spark_text", None, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", None, _ATTENTION),
    "qwen3_next": ("qwen3_next", None, _ATTENTION),
    "qwen3_omni_moe": ("qwen3_omni_moe_thinker", None, {"audio_config": {"downsample_hidden_size": 8}}),
    "qwen4_exp": ("qwen4_exp_text", None, {}),
    "zaya": ("zaya", None, {"num_experts_per_tok": 1, "router_hidden_size": 16}),
}


@cache
def families() -> tuple[str, ...]:
    """Names of the installed transformers' packages with a decorated experts module."""
    found = []
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = f"{transformers.models.__path__[0]}/{package.name}/modeling_{package.name}.py"
        try:
            with open(folder) as file:
                if re.search(r"^@use_experts_implementation", file.read(), re.MULTILINE):
                    found.append(package.name)
        except FileNotFoundError:
            continue
    return tuple(found)


def tiny_family(family: str, *, seed: int = 0) -> Any:
    """A random fp32 model whose weights are exact in bf16, every expert chosen for every token."""
    config, model_class = _config_and_class(family)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
        for module in model.modules():
            if is_experts(module) and _LIMITS & vars(module).keys():  # beyond the limits, in some places
                module.gate_up_proj *= 4
                module.down_proj /= 8
    return model.eval()


def _config_and_class(family: str) -> tuple[Any, Any]:
    own = [t for t in CONFIG_MAPPING_NAMES if model_type_to_module_name(t) == family]
    model_type, class_name, changes = _CHOSEN.get(family, (family if family in own else own[0], None, {}))
    config_class = CONFIG_MAPPING[model_type]
    options = _merged(_shrunk(config_class()) | {"use_cache": False}, changes)
    config = config_class(**options)
    if class_name is not None:
        module = inspect.getmodule(config_class)
        return config, getattr(transformers, class_name, None) or getattr(module, class_name)
    for auto in ("CausalLM", "ImageTextToText", "MultimodalLM", "TokenClassification", ""):
        mapping = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel")._model_mapping
        if config_class in mapping:
            found = mapping[config_class]
            return config, found[0] if isinstance(found, tuple) else found
    raise LookupError(f"no class of models for {model_type}")


def _merged(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    parts = {
        name: _merged(options[name], change) for name, change in changes.items() if name.endswith("_config")
    }
    return {**options, **changes, **parts}


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name.endswith("config") and isinstance(getattr(config, name, None), PretrainedConfig):
            part = getattr(config, name)
            options[name] = _shrunk(part) | {"model_type": part.model_type}
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for rule, size in _SIZES if re.fullmatch(rule, name)), None)
            if size is not None:
                options[name] = size
    return options
