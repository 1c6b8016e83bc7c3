"""`kt-moe pack`: write the experts of a checkpoint to a cache directory, from where they are mapped."""

from __future__ import annotations

import argparse
import sys
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.options import integer
from kt_moe.cli.text import count_text, ranges_text, size_text

if TYPE_CHECKING:
    from kt_moe import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="DIR", help="model directory, or a .safetensors file"
    )
    parser.add_argument(
        "--cache-dir", type=Path, required=True, metavar="CACHE", help="where packed layers are kept"
    )
    parser.add_argument(
        "--format", choices=["as-stored", *QUANTISED], default="as-stored", help="of the weights (as-stored)"
    )
    parser.add_argument("--layer", type=integer(0), metavar="N", help="this layer alone")
    parser.add_argument(
        "--verify", action="store_true", help="afterwards read all of it, and compare checksums"
    )
    parser.epilog = (
        "Layers that are packed already are left as they are. Exit status: 0, or 1 if one is damaged."
    )


def run(args: argparse.Namespace) -> int:
    """Pack what is not packed; 1 if `--verify` finds a layer damaged.

    Raises:
        UserError: no checkpoint there, no such layer, or a layer that cannot be read.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from kt_moe import Checkpoint, Experts

    damaged: list[str] = []
    packed = 0
    try:
        checkpoint = Checkpoint(args.checkpoint)
        layers = _layers(checkpoint, args.layer)
        total = sum(checkpoint.layer(layer).nbytes for layer in layers)
        with tqdm(total=total, desc="Packing", unit="B", unit_scale=True, disable=sys.stderr is None) as bar:
            for layer in layers:
                experts = Experts.from_checkpoint(
                    checkpoint, layer, format=args.format, cache_dir=args.cache_dir, progress=bar.update
                )
                packed += experts.nbytes
                if args.verify and not experts.verify():
                    damaged.append(f"layer-{layer}.{experts.format}.ktmoe")
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    print(f"{count_text(len(layers), 'layer')}, {size_text(packed)} in {args.cache_dir}")
    if damaged:
        files = [file for name in damaged for file in _packed_files(args.cache_dir, checkpoint, name)]
        print("\n".join(["damaged, delete to have it packed again:", *map(str, files)]))
    elif args.verify:
        print("all checksums agree")
    return int(bool(damaged))


def _packed_files(cache: Path, checkpoint: Checkpoint, name: str) -> list[Path]:
    """Where a layer is packed: folders are named after the checkpoint and a hash of its path.

    Checkpoints of one name in one cache cannot be told apart here; their files are all in the list.
    """
    return sorted(cache.glob(f"{escape(checkpoint.path.resolve().name)}-*/{name}"))


def _layers(checkpoint: Checkpoint, layer: int | None) -> list[int]:
    if not checkpoint.layers:
        raise UserError(f"{checkpoint.path}: no experts in it")
    if layer is not None and layer not in checkpoint.layers:
        raise UserError(
            f"--layer {layer}: no experts in it; layers with experts: {ranges_text(checkpoint.layers)}"
        )
    return checkpoint.layers if layer is None else [layer]
