"""Tiny random models and checkpoints of the supported families, and what tests do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from kt_moe.hf import KtLoraExperts, KtMoeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DEEPSEEK = {
    "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
_SHARED = {
    "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip

# What PEFT itself sets off where LoRA goes on experts.
PEFT_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # PEFT says this of its own fused rank, whenever experts are all it targets.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

# With every expert chosen no rounding can change the routing, so errors are those of the arithmetic.
ALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 40, "head_dim": 8,
                  "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 40,
                  "shared_expert_intermediate_size": 40},
    "olmoe": {"num_experts": 8, "intermediate_size": 24},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _SHARED,
    "dots1": _SHARED,
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8},
}  # fmt: skip


def tiny_config(model_type: str = "qwen3_moe", **changes: Any) -> Any:
    """A config with every dimension small, and H, I, r different from each other."""
    return transformers.AutoConfig.for_model(model_type, **{**SIZES, **CONFIGS[model_type], **changes})


def tiny_model(
    model_type: str = "qwen3_moe", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A random model whose weights are exact in bf16, so that packing them loses nothing."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
            assert parameter.isfinite().all(), name
    return model.to(dtype).eval()


def save_tiny_checkpoint(
    directory: Path, model_type: str = "qwen3_moe", *, shards: int = 1, **kwargs: Any
) -> Path:
    """Write a tiny model as transformers does (one key an expert), in one file or in several."""
    model = tiny_model(model_type, **kwargs)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=size + 4096 if shards == 1 else size // shards + 1)
    return directory


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """[batch, length] token ids."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def load(path: Path, *, kt: bool = True, dtype: Any = torch.float32, **kwargs: Any) -> Any:
    """A model by `from_pretrained`, with kt_moe experts or plain."""
    if kt:
        kwargs.setdefault("quantization_config", KtMoeConfig())
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)


def with_lora(
    path: Path, targets: Any = ("experts",), *, seed: int = 0, base: Any = None, **options: Any
) -> Any:
    """A model with kt_moe experts and LoRA whose B is not zero."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    targets = targets if isinstance(targets, str) else list(targets)
    return peft.get_peft_model(base or load(path), peft.LoraConfig(target_modules=targets, **options))


def plain_peft(path: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The plain model with a saved adapter, its LoRA trainable."""
    return peft.PeftModel.from_pretrained(load(path, kt=False, dtype=dtype), adapter, is_trainable=True)


def lora_layers(model: Any) -> list[KtLoraExperts]:
    return [m for m in model.modules() if isinstance(m, KtLoraExperts)]


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the trainable parameters, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative L2."""
    difference = ours.detach().double() - reference.detach().double()
    return float(difference.norm() / reference.detach().double().norm())
