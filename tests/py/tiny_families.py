"""A tiny random model of any family of transformers whose experts others may compute."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kt_moe.computation import is_experts
from kt_moe.families import model_class, model_types

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
_LIMITS = {"limit", "swiglu_limit", "softcap"}  # as experts modules and their parts call them
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MOE = {"num_experts": 4, "top_k_experts": 4, "moe_intermediate_size": 24}
# Two linear ones amplify rounding, and transformers cannot generate with them alone.
_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}

# What looking cannot tell: which of a family's model types, and options that fit together.
_CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "aria": ("aria_text", {"intermediate_size": 24}),
    "bailing_hybrid": ("bailing_hybrid", _ATTENTION),
    "beam": ("beam", _SPARSE),
    "deepseek_v2": ("deepseek_v2", {"num_experts_per_tok": 4}),
    "dots1": ("dots1", {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 4}),
    "dots3_note": ("dots3_note_text", {}),
    "flint": ("flint", {"mlp_only_layers": []}),
    "gemma4": ("gemma4_text", {"enable_moe_block": True, **_MOE}),
    "deepseek_ocr2": ("deepseek_ocr2", {"text_config": _SPARSE | {"num_experts_per_tok": 4}}),
    "diffusion_gemma": ("diffusion_gemma", {"text_config": _MOE}),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe",
        {
            "text_config": {
                "moe_intermediate_size": [24, 16],
                "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
            }
        },
    ),
    "glm4v_moe": (
        "glm4v_moe",
        {
            "text_config": {
                "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
            }
        },
    ),
    "glm5_next": ("glm5_next_text", {"qk_rope_head_dim": 0, "head_dim": 0, **_SPARSE}),
    "granitemoehybrid": ("granitemoehybrid", {"mamba_n_heads": 8, "mamba_d_state": 16, **_ATTENTION}),
    "hy_v4_vl": (
        "hy_v4_vl_text",
        {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}, "qk_head_dim": 16, **_SPARSE},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 8}),
    "inkling": ("inkling_text", {}),
    "inkling2": ("inkling2_text", {}),
    "inkling2_loop": ("inkling2_loop_text", {}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "kimi_linear": ("kimi_linear", _ATTENTION),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
    "llama4": (
        "llama4_text",
        {
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "moe_layers": [0, 1],
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    # 4 of the 8 are experts that are the identity
    "longcat_flash": (
        "longcat_flash",
        {
            "num_layers": 2,
            "moe_topk": 8,
            "zero_expert_num": 4,
            "expert_ffn_hidden_size": 24,
            "ffn_hidden_size": 40,
            "qk_head_dim": 16,
        },
    ),
    "mimo_v2_flash": ("mimo_v2_flash", {"num_key_value_heads": 2}),
    "mistral4": ("mistral4", {"head_dim": 16, "qk_head_dim": 16}),
    "minimax_m3_vl": ("minimax_m3_vl_text", {}),
    "muse_spark": ("muse_spark_text", {}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["full_attention", "moe", "linear_attention", "moe"],
            "moe_latent_size": 28,
            **{"mamba_num_heads": 8, "n_groups": 2, "ssm_state_size": 8},
        },
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", _ATTENTION),
    "qwen3_next": ("qwen3_next", _ATTENTION),
    "qwen3_omni_moe": ("qwen3_omni_moe_thinker", {"audio_config": {"downsample_hidden_size": 8}}),
    "qwen4_exp": ("qwen4_exp_text", {}),
    "zaya": ("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
}


# Composite models whose text model alone is chosen above, where the Auto classes do not lead to them.
_WHOLE = {"qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration}


def tiny_family(family: str, model_type: str | None = None, *, seed: int = 0) -> Any:
    """A random fp32 model whose weights are exact in bf16, every expert chosen for every token.

    model_type: where the family has several, one that is not that of the text model.
    """
    config, made = _config_and_class(family, model_type)
    torch.manual_seed(seed)
    model = made(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "post_expert_norm" in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
        for module in model.modules():
            limited = is_experts(module) and any(_LIMITS & vars(part).keys() for part in module.modules())
            if limited:  # beyond the limits, in some places
                module.gate_up_proj *= 4
                module.down_proj /= 8
    return model.eval()


def _config_and_class(family: str, wanted: str | None) -> tuple[Any, Any]:
    own = model_types(family)
    chosen, changes = _CHOSEN.get(family, (family if family in own else own[0], {}))
    model_type = wanted or chosen
    if model_type != chosen:
        changes = {"text_config": changes}
    config_class = CONFIG_MAPPING[model_type]
    options = _merged(_shrunk(config_class()) | {"use_cache": False}, changes)
    config = config_class(**options)
    found = _WHOLE.get(model_type) or model_class(config)
    if found is None:
        raise LookupError(f"no class of models for {model_type}")
    return config, found


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
