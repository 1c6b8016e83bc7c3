"""`kt-moe inspect`: what a checkpoint holds of experts, and what a layer takes in memory as it is stored."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_moe.cli.formats import bias_bytes
from kt_moe.cli.terminal import count_text, ranges_text, size_text, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="model directory, or .safetensors file")
    parser.epilog = "Exit status: 0, or 1 if a layer's experts cannot be read."


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint holds; 1 if some of its experts cannot be read.

    Raises:
        OSError, ValueError: no checkpoint there.
    """
    from kt_moe import Checkpoint

    checkpoint = Checkpoint(args.checkpoint)
    equal: dict[tuple[str, ...], list[int]] = {}  # numbers of layers, by what is the same of them
    unreadable: list[str] = []
    for layer in checkpoint.layers:
        try:
            info = checkpoint.layer(layer)
        except ValueError as error:
            unreadable.append(f"layer {layer} cannot be read: {' '.join(str(error).split())}")
            continue
        shape = info.num_experts, info.hidden_size, info.intermediate_size, info.gated
        stored = sum(info.memory_bytes.values()) + (bias_bytes(*shape) if info.biases else 0)
        row = *map(str, shape[:3]), f"{info.dtype}, {info.layout}", info.format
        equal.setdefault((*row, size_text(stored), "yes" if info.mappable else "no"), []).append(layer)
    sizes = [tensor.nbytes for tensor in checkpoint.tensors.values()]
    files = count_text(len(checkpoint.files), "file")
    print(f"{checkpoint.path}: {files}, {count_text(len(sizes), 'tensor')}, {size_text(sum(sizes))}\n")
    head = "layers", "experts", "hidden", "intermediate", "in the file", "in memory", "a layer", "mapped"
    rows = [(ranges_text(numbers), *row) for row, numbers in equal.items()]
    print(table([head, *rows], right=[1, 2, 3, 6]) if rows else "no layer has experts", *unreadable, sep="\n")
    return 1 if unreadable else 0
