"""The layers that are not experts: how a checkpoint has them quantised, or a config wants them.

transformers asks one quantizer about a model. Ours takes the experts out and leaves every other question to
the quantizer of the other layers, if they have one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_moe.checkpoint import Checkpoint, ExpertList

_PLAIN = ("BF16", "F16", "F32", "F64", "I64", "BOOL")
# What a quantizer may answer differently from one that does nothing.
_LEFT_TO_IT = (
    "update_dtype", "update_attn_implementation", "param_needs_quantization", "param_element_size",
    "quantized_element_size", "get_new_dtype", "update_parallel_plan", "update_tp_plan", "update_ep_plan",
    "get_quantize_ops", "serialized_names", "get_load_operations", "get_weight_conversions", "get_param_name",
)  # fmt: skip


class NoQuantizer(HfQuantizer):  # type: ignore[misc]
    """Of layers that are not quantised."""

    def is_serializable(self) -> bool:
        """As they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """As they are."""
        return True


class RestQuantizer(HfQuantizer):  # type: ignore[misc]
    """Leaves to `rest`, the quantizer of the other layers, what transformers asks about them."""

    rest: HfQuantizer

    def __init__(self, quantization_config: Any, pre_quantized: bool = False) -> None:
        super().__init__(quantization_config, pre_quantized=False)
        self.rest = NoQuantizer(quantization_config, pre_quantized=False)
        if quantization_config.rest is not None and not _same_method(quantization_config):
            self.rest = AutoHfQuantizer.from_config(quantization_config.rest, pre_quantized=False)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """As `rest` does; of a checkpoint's own quantizer when its files are known."""
        self.rest.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        """As `rest` does."""
        return self.rest.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[int | str, Any]) -> dict[int | str, Any]:
        """As `rest` does."""
        adjusted: dict[int | str, Any] = self.rest.adjust_max_memory(max_memory)
        return adjusted

    def update_weight_conversions(self, *args: Any, **kwargs: Any) -> list[Any]:
        """As `rest` does, but FP8 is decoded by the config's block size."""
        conversions: list[Any] = self.rest.update_weight_conversions(*args, **kwargs)
        for conversion in conversions:
            operations: list[Any] = getattr(conversion, "operations", [])
            for at, operation in enumerate(operations):
                if type(operation) is Fp8Dequantize:
                    operations[at] = _DecodeBlocks(operation.hf_quantizer)
        return conversions

    def read_stored(
        self, checkpoint: Checkpoint, lists: Mapping[int, ExpertList], dtype: Any, device_map: Any
    ) -> None:
        """Now that the files are known, decide what is quantised in them.

        Raises:
            ValueError: something beside the experts is, and the config has nothing about it, or asks for
                another quantizer; or that quantizer wants another dtype or device_map.
        """
        found, config = _quantised(checkpoint, lists), self.quantization_config
        if found is None:
            return
        if config.stored is None:
            raise ValueError(
                f"{found} in the checkpoint, and the model's config has no quantization_config to say how. "
                "Leave it there: kt_moe takes the experts out by itself"
            )
        if config.rest is not None and not _same_method(config):
            raise ValueError(
                f"{found} in the checkpoint, whose layers beside the experts are quantised already "
                f"({_method(config.stored)}): rest is {type(config.rest).__name__}, wanted None"
            )
        stored = AutoHfQuantizer.merge_quantization_configs(copy.deepcopy(config.stored), config.rest)
        self.rest, self.pre_quantized = AutoHfQuantizer.from_config(stored, pre_quantized=True), True
        self.rest.validate_environment(device_map=device_map, weights_only=True)
        for name, given, wanted in (
            ("dtype", dtype, self.rest.update_dtype(dtype)),
            ("device_map", device_map, self.rest.update_device_map(device_map)),
        ):
            if wanted != given:
                raise ValueError(f"{name} is {given!r}, {type(stored).__name__} wants {wanted!r}")


class _DecodeBlocks(Fp8Dequantize):  # type: ignore[misc]
    """transformers' own takes the number of blocks for their size, so that all would have to be whole.

    It refuses DeepSeek-V3's kv_a_proj_with_mqa, 576 rows with 5 scales, and would take 160 rows with 2 for
    blocks of 80.
    """

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        rows, cols = quantized.shape[-2:]
        if block is None or scales.shape[-2:] != (-(-rows // block[0]), -(-cols // block[1])):
            decoded: Tensor = super()._dequantize_one(quantized, scales, *args, **kwargs)
            return decoded
        whole = functional.pad(quantized.float(), (0, -cols % block[1], 0, -rows % block[0]))
        decoded = super()._dequantize_one(whole, scales, *args, **kwargs)
        return decoded[..., :rows, :cols].contiguous()


def merge_with_stored(stored: Any, given: Any, merge: Callable[[Any, Any], Any]) -> Any:
    """What `AutoHfQuantizer.merge_quantization_configs` is to make of a checkpoint's and a given config.

    With ours given the checkpoint's is kept beside it: it is about the experts, which we take out, or about
    the other layers too. `merge` is transformers' own, for all others.
    """
    if not hasattr(given, "stored"):
        return merge(stored, given)
    merged = copy.copy(given)
    merged.stored = getattr(stored, "stored", stored)  # a config that was loaded with ours has ours
    return merged


def _method(config: Any) -> str | None:
    method = config.get("quant_method") if isinstance(config, Mapping) else config.quant_method
    return getattr(method, "value", method)


def _same_method(config: Any) -> bool:
    """Whether what is asked for is how the checkpoint is quantised already."""
    return config.stored is not None and _method(config.rest) == _method(config.stored)


def _left(name: str) -> Any:
    if not callable(getattr(HfQuantizer, name)):
        return property(lambda self: getattr(self.rest, name))

    def ask(self: RestQuantizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.rest, name)(*args, **kwargs)

    return ask


for _name in _LEFT_TO_IT:
    if hasattr(HfQuantizer, _name):  # not every version asks all of it
        setattr(RestQuantizer, _name, _left(_name))


def as_config(rest: Any) -> QuantizationConfigMixin | None:
    """A quantization config of transformers from itself or from what `to_dict` gave.

    Raises:
        ValueError: it is something else, or kt_moe's own.
    """
    if isinstance(rest, Mapping):
        rest = AutoQuantizationConfig.from_dict(dict(rest))
    if rest is not None and (not isinstance(rest, QuantizationConfigMixin) or hasattr(rest, "stored")):
        raise ValueError(f"KtMoeConfig: rest is {rest!r}, wanted one of transformers' quantization configs")
    return rest


def _quantised(checkpoint: Checkpoint, lists: Mapping[int, ExpertList]) -> str | None:
    """A tensor beside the experts whose dtype is none of plain weights, and that dtype."""
    prefixes = {one.prefix for one in lists.values()}
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in _PLAIN or ".experts." in name:
            continue
        parts = name.split(".")
        if not any(".".join(parts[:end]) in prefixes for end in range(1, len(parts))):
            return f"{name} is {tensor.dtype}"
    return None
