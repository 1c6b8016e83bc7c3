"""transformers and PEFT on kt_moe. Importing this module registers the hooks:

- `from_pretrained(..., quantization_config=kt_moe.KtMoeConfig())`: the experts go from the checkpoint
  straight to `kt_moe.Experts` and never become torch parameters;
- `kt_moe.load_model(path)`: the same with the model's own class, its other layers spread over the GPUs;
- `kt_moe.wrap(model)`: the experts of a model in memory go there, and torch's are freed;
- `from_pretrained(..., experts_implementation="kt_moe")`: an ordinarily loaded model whose frozen experts are
  computed by kt_moe (they are then in memory twice);
- `peft.LoraConfig(target_modules=[..., "experts"])` on either puts LoRA on the experts.

What PEFT's own `save_pretrained` writes for such a model loads into plain transformers and PEFT;
`kt_moe.save_adapter` writes the same atomically. Load adapters with PEFT or with
`kt_moe.load_adapter`, not with transformers' own `model.load_adapter`, which only knows fused experts.
"""

from __future__ import annotations

import functools
import inspect

from torch.nn.modules.module import register_module_module_registration_hook
from transformers.integrations import moe as _moe
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer

from kt_moe.hf import tuner, unmarked
from kt_moe.hf.config import SharedOuterLoraConfig
from kt_moe.hf.experts import NAME, KtExperts, kt_moe_experts_forward, refuse_at_construction, repack
from kt_moe.hf.kt_config import KTConfig
from kt_moe.hf.loaded import wrap
from kt_moe.hf.loading import device_map, load_model
from kt_moe.hf.lora import KtLoraExperts
from kt_moe.hf.optimizers import LoraFA, Muon, create_lorafa_optimizer
from kt_moe.hf.quantizer import KtMoeConfig, KtMoeQuantizer
from kt_moe.hf.rest import merge_with_stored
from kt_moe.hf.tuner import KtLoraModel

__all__ = [
    "KTConfig",
    "KtExperts",
    "KtLoraExperts",
    "KtLoraModel",
    "KtMoeConfig",
    "KtMoeQuantizer",
    "LoraFA",
    "Muon",
    "SharedOuterLoraConfig",
    "create_lorafa_optimizer",
    "device_map",
    "load_model",
    "repack",
    "wrap",
]


def _register() -> None:
    register_quantization_config(NAME)(KtMoeConfig)
    register_quantizer(NAME)(KtMoeQuantizer)
    # It would refuse any but the checkpoint's own config, and has no extension point.
    merge = functools.partial(merge_with_stored, merge=AutoHfQuantizer.merge_quantization_configs)
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge)
    # transformers' lazy imports can leave two registries; models look into the decorator's default.
    used = inspect.signature(_moe.use_experts_implementation).parameters["experts_interface"].default
    for interface in (_moe.ExpertsInterface, type(used)):
        interface.register(NAME, kt_moe_experts_forward)
    register_module_module_registration_hook(unmarked.mark_at_construction)
    register_module_module_registration_hook(refuse_at_construction)
    tuner.register()


_register()
