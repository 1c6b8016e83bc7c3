"""The experts' weights of a plan: from the model's files, or from what its config says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kt_moe import Checkpoint
from kt_moe.cli.errors import UserError
from kt_moe.cli.plan import memory
from kt_moe.cli.plan.shapes import Outline

# Formats in memory, by a quantised weight's type and bits as configs have them, and by ModelOpt's names.
_BY_TYPE: dict[Any, str] = {
    ("int", 4): "int4",
    ("int", 8): "int8",
    ("float", 8): "fp8",
    ("float", 4): "mxfp4",
    ("float", 4, 16): "nvfp4",  # in groups of 16
    "NVFP4": "nvfp4",
    "FP8": "fp8",
}


def weights_part(path: Path, config: Any, model: Outline, format: str | None) -> tuple[memory.Part, str]:
    """The experts' line of the plan, and the format of most layers.

    format: None means as the directory's files have them; where there are none, as the config says.

    Raises:
        UserError: files that cannot be read, or that lack a layer.
    """
    try:
        checkpoint = Checkpoint(path) if path.is_dir() and any(path.glob("*.safetensors")) else None
        stored = {} if checkpoint is None else {x.number: checkpoint.layer(x.number) for x in model.layers}
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if not stored:
        chosen, doubt = (format, "") if format else stored_format(config)
        note = f"{chosen}{doubt}, of the config's shapes: there are no weights here"
        size = memory.weights_bytes(model.layers, chosen)
        return memory.Part("expert weights", size, "computed", note), chosen
    size = 0
    for layer in model.layers:
        info = stored[layer.number]
        if format in (None, info.format):
            size += sum(info.memory_bytes.values()) + memory.biases_bytes(layer)
        else:
            size += memory.weights_bytes([layer], format or "")
    chosen = format or stored[model.layers[0].number].format
    return memory.Part("expert weights", size, "computed", chosen), chosen


def stored_format(config: Any) -> tuple[str, str]:
    """In which format a model's experts come by its quantization_config, and a remark if that is assumed."""
    quantised = getattr(config, "quantization_config", None) or {}
    method = quantised.get("quant_method")
    if method is None:
        return "bf16", ""
    if method in ("fp8", "mxfp4"):
        return method, ""
    kinds: set[Any]
    if method in ("gptq", "awq"):
        kinds = {("int", quantised.get("bits", quantised.get("w_bit")))}
    elif method == "compressed-tensors":
        groups = (quantised.get("config_groups") or {}).values()
        weights = [group.get("weights") or {} for group in groups]
        whole = {(kind.get("type"), kind.get("num_bits"), kind.get("group_size")) for kind in weights}
        kinds = {kind if kind in _BY_TYPE else kind[:2] for kind in whole}
    elif method == "modelopt":
        kinds = {quantised.get("quant_algo")}
    else:
        return "bf16", f" (assumed: {method} is unknown)"
    if len(kinds) == 1 and (format := _BY_TYPE.get(next(iter(kinds)))):
        return format, ""
    return "int4", f" (assumed of {method})"
