"""`kt-moe inspect`: what a checkpoint holds of experts, and what they would take in memory."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED, bias_bytes, kept_as, projection_bytes
from kt_moe.cli.options import integer
from kt_moe.cli.text import count_text, ranges_text, size_text, table

if TYPE_CHECKING:
    from kt_moe import Checkpoint
    from kt_moe.checkpoint import LayerInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_checkpoint(parser)
    quant = "load every layer quantised to it, and show the relative L2 error that causes"
    parser.add_argument("--quant", choices=[f for f in QUANTISED if f != "bf16"], help=quant)
    parser.add_argument("--json", action="store_true", help="the same as JSON, a record for each layer")
    parser.epilog = "Exit status: 0, or 1 if a layer's experts cannot be read."


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Declare a checkpoint, and a layer of it."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="model directory, or .safetensors file")
    parser.add_argument("--layer", type=integer(0), metavar="N", help="this layer alone")


def chosen_layers(checkpoint: Checkpoint, layer: int | None) -> list[int]:
    """All layers with experts, or the one that is wanted.

    Raises:
        UserError: that one has no experts.
    """
    if layer is not None and layer not in checkpoint.layers:
        there = ranges_text(checkpoint.layers) or "none"
        raise UserError(f"--layer {layer}: no experts in that layer; layers with experts: {there}")
    return checkpoint.layers if layer is None else [layer]


@dataclass
class Findings:
    """What is in a checkpoint.

    Attributes:
        layers: those that can be read.
        unreadable: why not, by layer.
        memory: bytes of all experts by format, "as stored" among them, with biases; of the layers that can be
            read.
        errors: relative L2 by projection and layer; None where quantising changed nothing.
    """

    path: str
    files: int
    tensors: int
    nbytes: int
    layers: dict[int, LayerInfo] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    errors: dict[int, dict[str, float] | None] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint holds; 1 if some of its experts cannot be read.

    Raises:
        UserError, OSError, ValueError: no checkpoint there, or it has no such layer.
    """
    from kt_moe import Checkpoint, Experts

    checkpoint = Checkpoint(args.checkpoint)
    sizes = [tensor.nbytes for tensor in checkpoint.tensors.values()]
    found = Findings(str(checkpoint.path), len(checkpoint.files), len(sizes), sum(sizes))
    for layer in chosen_layers(checkpoint, args.layer):
        try:
            info = checkpoint.layer(layer)
            if args.quant is not None:
                experts = Experts.from_checkpoint(checkpoint, layer, format=args.quant)
                found.errors[layer] = experts.quantization_error
            found.layers[layer] = info
        except ValueError as error:
            text = " ".join(str(error).split()).removeprefix(f'"{checkpoint.path}": ')
            found.unreadable[layer] = text.removeprefix(f"layer {layer}: ")
    found.memory = {name: sum(_bytes(info, name) for info in found.layers.values()) for name in _FORMATS}
    print(json.dumps(asdict(found), indent=2) if args.json else describe(found, args.quant))
    return 1 if found.unreadable else 0


_FORMATS = ("as stored", *QUANTISED)


def _bytes(info: LayerInfo, format: str) -> int:
    shape = info.num_experts, info.hidden_size, info.intermediate_size, info.gated
    sizes = info.memory_bytes if format == "as stored" else projection_bytes(QUANTISED[format], *shape)
    return sum(sizes.values()) + (bias_bytes(*shape) if info.biases else 0)


def describe(found: Findings, quant: str | None = None) -> str:
    """For people: equal layers in one paragraph."""
    lines = [
        f"{found.path}: {count_text(found.files, 'file')}, {count_text(found.tensors, 'tensor')}, "
        f"{size_text(found.nbytes)}",
        "",
    ]
    for layers in _equal(found.layers):
        info = found.layers[layers[0]]
        parts = dict(info.memory_bytes)
        if info.biases:
            parts["biases"] = _bytes(info, "as stored") - sum(parts.values())
        used = "used where it lies in the file" if info.mappable else "copied into memory"
        lines += [
            f"{_heading(layers)}: {count_text(info.num_experts, 'expert')}, hidden {info.hidden_size}, "
            f"intermediate {info.intermediate_size}{'' if info.gated else ', no gate'}",
            f"  stored as  {info.dtype}, {info.layout}, {'with' if info.biases else 'no'} biases; "
            f"{size_text(info.nbytes)} a layer",
            f"  kept as    {kept_as(info)}; {used}",
            f"  a layer    {', '.join(f'{name} {size_text(size)}' for name, size in parts.items())}",
        ]
    # The same fault in several layers is one line: all that differs is what the messages quote.
    for layers in _equal({n: why.split('"')[::2] for n, why in found.unreadable.items()}):
        example = f"; layer {layers[0]}" if len(layers) > 1 else ""
        lines.append(f"{_heading(layers)}: cannot be read{example}: {found.unreadable[layers[0]]}")
    if not found.layers:
        return "\n".join(lines if found.unreadable else [lines[0], "no layer has experts"])
    lines += ["", f"these experts in memory ({count_text(len(found.layers), 'layer')}):"]
    lines += _indented([[name, size_text(size)] for name, size in found.memory.items()])
    measured = {n: errors for n, errors in found.errors.items() if errors is not None}
    if found.errors:
        lines += ["", f"relative L2 error of {quant} against the stored weights:"]
    if measured:
        rows = [[str(n), *map("{:.2e}".format, errors.values())] for n, errors in measured.items()]
        columns = zip(*(errors.values() for errors in measured.values()), strict=True)
        largest = ["largest", *(f"{max(column):.2e}" for column in columns)]
        lines += _indented([["layer", *next(iter(measured.values()))], *rows, largest])
    if exact := sorted(found.errors.keys() - measured):
        lines.append(f"  {_heading(exact)}: kept as stored, nothing was quantised")
    return "\n".join(lines)


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
