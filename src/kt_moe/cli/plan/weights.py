"""The experts' weights of a plan: from the model's files, or from what its config says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kt_moe import Checkpoint
from kt_moe.cli.errors import UserError
from kt_moe.cli.plan.memory import Part, biases_bytes, weights_bytes
from kt_moe.cli.plan.outline import Outline

# Formats in memory, by what configs say of quantised weights: a method, ModelOpt's name of an algorithm, or
# type, bits and perhaps the size of groups.
_FORMATS: dict[Any, str] = {
    "fp8": "fp8", "mxfp4": "mxfp4", "FP8": "fp8", "NVFP4": "nvfp4",
    ("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8", ("float", 4): "mxfp4",
    ("float", 4, 16): "nvfp4",
}  # fmt: skip


def weights_part(path: Path, config: Any, model: Outline, format: str | None) -> tuple[Part, str]:
    """The experts' line of the plan, and the format of most layers.

    format: None means as the directory's files have them; where there are none, as the config says.

    Raises:
        UserError: files that cannot be read, or that lack a layer.
    """
    try:
        checkpoint = Checkpoint(path) if path.is_dir() and any(path.glob("*.safetensors")) else None
        stored = [] if checkpoint is None else [checkpoint.layer(x.number) for x in model.layers]
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if not stored:
        chosen, doubt = (format, "") if format else stored_format(config)
        note = f"{chosen}{doubt}, of the config's shapes: there are no weights here"
        return Part("expert weights", sum(weights_bytes(x, chosen) for x in model.layers), note=note), chosen
    size = 0
    for layer, info in zip(model.layers, stored, strict=True):
        as_stored = format in (None, info.format)
        size += sum(info.memory_bytes.values()) + biases_bytes(layer) if as_stored else 0
        size += 0 if as_stored else weights_bytes(layer, str(format))
    chosen = format or stored[0].format
    return Part("expert weights", size, note=chosen), chosen


def stored_format(config: Any) -> tuple[str, str]:
    """In which format a model's experts come by its quantization_config, and a remark if that is assumed."""
    said = getattr(config, "quantization_config", None) or {}
    method = said.get("quant_method")
    if method is None:
        return "bf16", ""
    kinds: list[list[Any]] = [[method, said.get("quant_algo"), ("int", said.get("bits", said.get("w_bit")))]]
    if groups := said.get("config_groups"):
        weights = [group.get("weights") or {} for group in groups.values()]
        whole = [(kind.get("type"), kind.get("num_bits"), kind.get("group_size")) for kind in weights]
        kinds = [[kind, kind[:2]] for kind in whole]
    found = {next((_FORMATS[way] for way in ways if way in _FORMATS), "") for ways in kinds}
    if len(found) == 1 and (format := found.pop()):
        return format, ""
    known = method in ("gptq", "awq", "compressed-tensors", "modelopt")
    return ("int4", f" (assumed of {method})") if known else ("bf16", f" (assumed: {method} is unknown)")
