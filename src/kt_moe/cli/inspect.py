"""`kt-moe inspect`: what a checkpoint holds of experts, what they would take in memory, and what is odd."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED, WeightType, bias_bytes, projection_bytes
from kt_moe.cli.options import integer
from kt_moe.cli.text import count_text, ranges_text, size_text, table

if TYPE_CHECKING:
    from kt_moe import Checkpoint
    from kt_moe.checkpoint import LayerInfo

_LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.(.+)")  # the second as GGUF and KT call it
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_QUOTED = re.compile(r'"[^"]*"')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    quant = "load every layer quantised to it, and show the relative L2 error that causes"
    parser.add_argument(
        "checkpoint", type=Path, metavar="DIR", help="model directory, or a .safetensors file"
    )
    parser.add_argument("--layer", type=integer(0), metavar="N", help="this layer alone")
    parser.add_argument("--quant", choices=[f for f in QUANTISED if f != "bf16"], help=quant)
    parser.add_argument("--json", action="store_true", help="the same as JSON, a record for each layer")
    parser.epilog = "Exit status: 0, or 1 if a layer's experts cannot be read."


@dataclass
class Findings:
    """What is in a checkpoint.

    Attributes:
        layers: those that can be read.
        unreadable: why not, by layer.
        gaps: numbers without experts between layers that have some.
        odd: tensors among the experts such as few layers have: how many of each name, by layer; numbers in
            the name are "*".
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
    gaps: list[int] = field(default_factory=list)
    odd: dict[int, dict[str, int]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    quantised_to: str | None = None
    errors: dict[int, dict[str, float] | None] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint holds; 1 if some of its experts cannot be read.

    Raises:
        UserError: no checkpoint there, or it has no such layer.
    """
    from kt_moe import Checkpoint

    try:
        checkpoint = Checkpoint(args.checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if args.layer is not None and args.layer not in checkpoint.layers:
        there = ranges_text(checkpoint.layers) or "none"
        raise UserError(f"--layer {args.layer}: no experts in that layer; layers with experts: {there}")
    findings = examine(checkpoint, checkpoint.layers if args.layer is None else [args.layer])
    if args.quant is not None:
        quantise(findings, checkpoint, args.quant)
    findings.memory = memory_by_format(findings.layers.values())
    print(json.dumps(asdict(findings), indent=2) if args.json else describe(findings))
    return 1 if findings.unreadable else 0


def examine(checkpoint: Checkpoint, layers: list[int]) -> Findings:
    """Read the descriptions of these layers, and no more of their data than `Checkpoint.layer` has to."""
    tensors = checkpoint.tensors
    found = Findings(
        str(checkpoint.path), len(checkpoint.files), len(tensors), sum(t.nbytes for t in tensors.values())
    )
    for layer in layers:
        try:
            found.layers[layer] = checkpoint.layer(layer)
        except ValueError as error:
            found.unreadable[layer] = _reason(checkpoint, layer, error)
    if layers:
        found.gaps = sorted(set(range(layers[0], layers[-1])) - set(layers))
    found.odd = {n: names for n, names in odd_tensors(tensors).items() if n in layers}
    return found


def quantise(findings: Findings, checkpoint: Checkpoint, format: str) -> None:
    """Fill in `errors`: load one layer after the other in `format`. A layer that fails becomes unreadable."""
    from kt_moe import Experts

    findings.quantised_to = format
    for layer in list(findings.layers):
        try:
            experts = Experts.from_checkpoint(checkpoint, layer, format=format)
        except ValueError as error:
            del findings.layers[layer]
            findings.unreadable[layer] = _reason(checkpoint, layer, error)
            continue
        findings.errors[layer] = experts.quantization_error


def memory_by_format(layers: Iterable[LayerInfo]) -> dict[str, int]:
    """Bytes of all these layers' experts together, as stored and in each format."""
    memory = dict.fromkeys(("as stored", *QUANTISED), 0)
    for info in layers:
        shape = info.num_experts, info.hidden_size, info.intermediate_size, info.gated
        biases = bias_bytes(*shape) if info.biases else 0
        memory["as stored"] += sum(info.memory_bytes.values()) + biases
        for name, kind in QUANTISED.items():
            memory[name] += sum(projection_bytes(kind, *shape).values()) + biases
    return memory


def odd_tensors(names: Iterable[str]) -> dict[int, dict[str, int]]:
    """Tensors among the experts whose like (numbers aside) at most half of the layers with experts have."""
    layers: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for name in names:
        place = _LAYER.search(name)
        if place and any(part == "experts" or part.endswith("_exps") for part in place[2].split(".")):
            layers[int(place[1])][_NUMBER.sub("*", place[2])] += 1
    spread = Counter(kind for kinds in layers.values() for kind in kinds)
    odd = {n: {k: c for k, c in kinds.items() if 2 * spread[k] <= len(layers)} for n, kinds in layers.items()}
    return {n: kinds for n, kinds in sorted(odd.items()) if kinds}


def describe(found: Findings) -> str:
    """For people: equal layers in one paragraph."""
    lines = [
        f"{found.path}: {count_text(found.files, 'file')}, {count_text(found.tensors, 'tensor')}, "
        f"{size_text(found.nbytes)}",
        "",
    ]
    for info, layers in _equal(found.layers):
        lines += _paragraph(info, layers)
    # The same fault in several layers is one line: all that differs is the tensors that it names.
    for _, layers in _equal({n: _QUOTED.sub("", why) for n, why in found.unreadable.items()}):
        example = f"; layer {layers[0]}" if len(layers) > 1 else ""
        lines.append(f"{_heading(layers)}: cannot be read{example}: {found.unreadable[layers[0]]}")
    for names, layers in _equal({n: sorted(kinds.items()) for n, kinds in found.odd.items()}):
        odd = ", ".join(f"{name} ({count_text(count, 'tensor')})" for name, count in names)
        lines.append(f"{_heading(layers)}: tensors that most layers lack: {odd}")
    if found.gaps:
        lines.append(f"{_heading(found.gaps)}: no experts")
    if not found.layers and not found.unreadable:
        return "\n".join([lines[0], "no layer has experts"])
    if found.layers:
        rows = [[name, size_text(size)] for name, size in found.memory.items()]
        lines += ["", f"these experts in memory ({count_text(len(found.layers), 'layer')}):"]
        lines += [f"  {line}" for line in table(rows, right=[1]).splitlines()]
    if found.errors:
        lines += ["", *_error_lines(found)]
    return "\n".join(lines)


def _paragraph(info: LayerInfo, layers: list[int]) -> list[str]:
    kind = WeightType(
        info.format, info.scale_type, info.scale_rows, info.scale_cols, info.zero_points, info.global_scale
    )
    sizes = dict(info.memory_bytes)
    if info.biases:
        sizes["biases"] = bias_bytes(info.num_experts, info.hidden_size, info.intermediate_size, info.gated)
    memory = ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())
    total, count = sum(sizes.values()), len(layers)
    used = "used where it lies in the file" if info.mappable else "copied into memory"
    return [
        f"{_heading(layers)}: {count_text(info.num_experts, 'expert')}, hidden {info.hidden_size}, "
        f"intermediate {info.intermediate_size}{'' if info.gated else ', no gate'}",
        f"  stored as  {info.dtype}, {info.layout}, {'with' if info.biases else 'no'} biases",
        f"  kept as    {kind}; {used}",
        f"  a layer    {memory}; {size_text(total)} ({size_text(info.nbytes)} in the files)",
        f"  together   {size_text(count * total)} ({size_text(count * info.nbytes)} in the files)",
    ]


def _error_lines(found: Findings) -> list[str]:
    lines = [f"relative L2 error of {found.quantised_to} against the stored weights:"]
    measured = {n: errors for n, errors in found.errors.items() if errors is not None}
    if measured:
        names = list(next(iter(measured.values())))
        rows = [["layer", *names]]
        rows += [[str(n), *(f"{errors[name]:.2e}" for name in names)] for n, errors in measured.items()]
        if len(measured) > 1:
            rows.append(["largest", *(f"{max(e[name] for e in measured.values()):.2e}" for name in names)])
        lines += [f"  {line}" for line in table(rows, right=range(1, len(names) + 1)).splitlines()]
    if exact := [n for n, errors in found.errors.items() if errors is None]:
        lines.append(f"  {_heading(exact)}: kept as stored, nothing was quantised")
    return lines


def _equal(by_layer: dict[int, Any]) -> list[tuple[Any, list[int]]]:
    """Layers with equal values together, in the order of their first."""
    groups: list[tuple[Any, list[int]]] = []
    for layer in sorted(by_layer):
        value = by_layer[layer]
        for other, layers in groups:
            if other == value:
                layers.append(layer)
                break
        else:
            groups.append((value, [layer]))
    return groups


def _reason(checkpoint: Checkpoint, layer: int, error: ValueError) -> str:
    """One line, without the checkpoint and the layer at its start: those are said beside it."""
    text = " ".join(str(error).split())
    return text.removeprefix(f'"{checkpoint.path}": ').removeprefix(f"layer {layer}: ")


def _heading(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {ranges_text(layers)} ({len(layers)})"
