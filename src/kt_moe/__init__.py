"""LoRA fine-tuning of very large Mixture-of-Experts models with the experts on CPU and GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kt_moe._core import __version__
from kt_moe.checkpoint import Checkpoint
from kt_moe.runtime import Runtime, cpu_info, default_runtime

if TYPE_CHECKING:  # the lazy names below, for type checkers
    from kt_moe import hf
    from kt_moe.adapters import load_adapter, save_adapter
    from kt_moe.expert_parallel import ExpertParallel, local_experts
    from kt_moe.experts import Experts
    from kt_moe.export import export_adapter
    from kt_moe.functional import Lora, MoEFunction, moe
    from kt_moe.gpu import Gpu, Rates
    from kt_moe.hf import KTConfig, KtMoeConfig, SharedOuterLoraConfig, device_map, load_model, repack, wrap
    from kt_moe.layer import MoELayer
    from kt_moe.merge import merge_checkpoint
    from kt_moe.merge import merge_checkpoint as merge_adapter
    from kt_moe.models import model_experts
    from kt_moe.profiler import Profile, profile
    from kt_moe.rank_parameters import clip_grad_norm_, gather_lora
    from kt_moe.routing_stats import RoutingHistory, plot_routing, routing_counts

__all__ = [
    "Checkpoint",
    "ExpertParallel",
    "Experts",
    "Gpu",
    "KTConfig",
    "KtMoeConfig",
    "Lora",
    "MoEFunction",
    "MoELayer",
    "Profile",
    "Rates",
    "RoutingHistory",
    "Runtime",
    "SharedOuterLoraConfig",
    "__version__",
    "clip_grad_norm_",
    "cpu_info",
    "default_runtime",
    "device_map",
    "export_adapter",
    "gather_lora",
    "hf",
    "load_adapter",
    "load_model",
    "local_experts",
    "merge_adapter",
    "merge_checkpoint",
    "model_experts",
    "moe",
    "plot_routing",
    "profile",
    "repack",
    "routing_counts",
    "save_adapter",
    "wrap",
]

# Fetched when first asked for: torch, transformers and PEFT take seconds to import, and not every program or
# command needs them.
_LAZY = {
    "Experts": "kt_moe.experts",
    "Lora": "kt_moe.functional",
    "MoEFunction": "kt_moe.functional",
    "moe": "kt_moe.functional",
    "Gpu": "kt_moe.gpu",
    "Rates": "kt_moe.gpu",
    "MoELayer": "kt_moe.layer",
    "ExpertParallel": "kt_moe.expert_parallel",
    "local_experts": "kt_moe.expert_parallel",
    "clip_grad_norm_": "kt_moe.rank_parameters",
    "gather_lora": "kt_moe.rank_parameters",
    "Profile": "kt_moe.profiler",
    "profile": "kt_moe.profiler",
    "hf": "kt_moe.hf",
    "KTConfig": "kt_moe.hf",
    "KtMoeConfig": "kt_moe.hf",
    "SharedOuterLoraConfig": "kt_moe.hf",
    "device_map": "kt_moe.hf",
    "load_model": "kt_moe.hf",
    "repack": "kt_moe.hf",
    "wrap": "kt_moe.hf",
    "save_adapter": "kt_moe.adapters",
    "export_adapter": "kt_moe.export",
    "load_adapter": "kt_moe.adapters",
    "merge_adapter": "kt_moe.merge",
    "merge_checkpoint": "kt_moe.merge",
    "model_experts": "kt_moe.models",
    "RoutingHistory": "kt_moe.routing_stats",
    "plot_routing": "kt_moe.routing_stats",
    "routing_counts": "kt_moe.routing_stats",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kt_moe' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    found = globals()[name] = module if name == "hf" else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
