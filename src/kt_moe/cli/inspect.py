"""`kt-moe inspect`: what a checkpoint holds of experts, and what they would take in memory."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_moe.cli.formats import QUANTISED, bias_bytes, kept_as, projection_bytes
from kt_moe.cli.text import count_text, ranges_text, size_text, table

if TYPE_CHECKING:
    from kt_moe.checkpoint import LayerInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="model directory, or .safetensors file")
    quant = "load every layer quantised to it, and show the relative L2 error that causes"
    parser.add_argument("--quant", choices=[f for f in QUANTISED if f != "bf16"], help=quant)
    parser.epilog = "Exit status: 0, or 1 if a layer's experts cannot be read."


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint holds; 1 if some of its experts cannot be read.

    Raises:
        OSError, ValueError: no checkpoint there.
    """
    from kt_moe import Checkpoint, Experts

    checkpoint = Checkpoint(args.checkpoint)
    layers: dict[int, LayerInfo] = {}
    unreadable: dict[int, str] = {}  # why not
    errors: dict[int, dict[str, float] | None] = {}  # by projection; None where quantising changed nothing
    for layer in checkpoint.layers:
        try:
            info = checkpoint.layer(layer)
            if args.quant is not None:
                experts = Experts.from_checkpoint(checkpoint, layer, format=args.quant)
                errors[layer] = experts.quantization_error
            layers[layer] = info
        except ValueError as error:
            text = " ".join(str(error).split()).removeprefix(f'"{checkpoint.path}": ')
            unreadable[layer] = text.removeprefix(f"layer {layer}: ")
    files, sizes = len(checkpoint.files), [tensor.nbytes for tensor in checkpoint.tensors.values()]
    numbers = f"{count_text(files, 'file')}, {count_text(len(sizes), 'tensor')}, {size_text(sum(sizes))}"
    print(f"{checkpoint.path}: {numbers}")
    print("\n".join(_layer_lines(layers, unreadable) or ["no layer has experts"]))
    if layers:
        memory = {n: sum(_bytes(info, n) for info in layers.values()) for n in ("as stored", *QUANTISED)}
        rows = _indented([[name, size_text(size)] for name, size in memory.items()])
        print("\n".join(["", f"these experts in memory ({count_text(len(layers), 'layer')}):", *rows]))
    if errors:
        said = f"relative L2 error of {args.quant} against the stored weights:"
        print("\n".join(["", said, *_error_lines(errors)]))
    return 1 if unreadable else 0


def _bytes(info: LayerInfo, format: str) -> int:
    """Of a layer's experts in memory, with biases."""
    shape = info.num_experts, info.hidden_size, info.intermediate_size, info.gated
    sizes = info.memory_bytes if format == "as stored" else projection_bytes(QUANTISED[format], *shape)
    return sum(sizes.values()) + (bias_bytes(*shape) if info.biases else 0)


def _layer_lines(infos: dict[int, LayerInfo], unreadable: dict[int, str]) -> list[str]:
    """Equal layers in one paragraph."""
    lines = []
    for layers in _equal(infos):
        info = infos[layers[0]]
        parts = dict(info.memory_bytes)
        if info.biases:
            parts["biases"] = _bytes(info, "as stored") - sum(parts.values())
        used = "used where it lies in the file" if info.mappable else "copied into memory"
        lines += [
            "",
            f"{_heading(layers)}: {count_text(info.num_experts, 'expert')}, hidden {info.hidden_size}, "
            f"intermediate {info.intermediate_size}{'' if info.gated else ', no gate'}",
            f"  stored as  {info.dtype}, {info.layout}, {'with' if info.biases else 'no'} biases; "
            f"{size_text(info.nbytes)} a layer",
            f"  kept as    {kept_as(info)}; {used}",
            f"  a layer    {', '.join(f'{name} {size_text(size)}' for name, size in parts.items())}",
        ]
    # The same fault in several layers is one line: all that differs is what the messages quote.
    for layers in _equal({n: why.split('"')[::2] for n, why in unreadable.items()}):
        example = f"; layer {layers[0]}" if len(layers) > 1 else ""
        lines.append(f"{_heading(layers)}: cannot be read{example}: {unreadable[layers[0]]}")
    return lines


def _error_lines(errors: dict[int, dict[str, float] | None]) -> list[str]:
    lines: list[str] = []
    if measured := {n: by_name for n, by_name in errors.items() if by_name is not None}:
        rows = [[str(n), *map("{:.2e}".format, by_name.values())] for n, by_name in measured.items()]
        columns = zip(*(by_name.values() for by_name in measured.values()), strict=True)
        largest = ["largest", *(f"{max(column):.2e}" for column in columns)]
        lines += _indented([["layer", *next(iter(measured.values()))], *rows, largest])
    if exact := sorted(errors.keys() - measured):
        lines.append(f"  {_heading(exact)}: kept as stored, nothing was quantised")
    return lines


def _indented(rows: list[list[str]]) -> list[str]:
    return [f"  {line}" for line in table(rows, right=range(1, len(rows[0]))).splitlines()]


def _equal(by_layer: dict[int, Any]) -> list[list[int]]:
    """Numbers of layers with equal values together, in the order of their first."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for layer, value in by_layer.items():
        groups[str(value)].append(layer)
    return list(groups.values())


def _heading(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {ranges_text(layers)} ({len(layers)})"
