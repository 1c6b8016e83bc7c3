"""LoRA fine-tuning of very large Mixture-of-Experts models with the experts computed on the CPU."""

from kt_moe._core import __version__
from kt_moe.checkpoint import Checkpoint
from kt_moe.experts import Experts
from kt_moe.functional import Lora, MoEFunction, moe
from kt_moe.layer import MoELayer
from kt_moe.runtime import Runtime, cpu_info, default_runtime

__all__ = [
    "Checkpoint",
    "Experts",
    "Lora",
    "MoEFunction",
    "MoELayer",
    "Runtime",
    "__version__",
    "cpu_info",
    "default_runtime",
    "moe",
]
