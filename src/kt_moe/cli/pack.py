"""`kt-moe pack`: write the experts of a checkpoint to a cache directory, from where they are mapped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.terminal import UserError, count_text, size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="model directory, or .safetensors file")
    add, formats = parser.add_argument, ["as-stored", *QUANTISED]
    add("--cache-dir", type=Path, required=True, metavar="CACHE", help="where packed layers are kept")
    add("--format", choices=formats, default="as-stored", help="of the weights (as-stored)")
    parser.epilog = "Layers that are packed already are left as they are."


def run(args: argparse.Namespace) -> int:
    """Pack what is not packed.

    Raises:
        UserError, OSError, ValueError: no checkpoint there, or a layer that cannot be read.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from kt_moe import Checkpoint, Experts

    packed, checkpoint = 0, Checkpoint(args.checkpoint)
    if not (layers := checkpoint.layers):
        raise UserError(f"{checkpoint.path}: no experts in it")
    total = sum(checkpoint.layer(layer).nbytes for layer in layers)
    with tqdm(total=total, desc="Packing", unit="B", unit_scale=True, disable=sys.stderr is None) as bar:
        for layer in layers:
            experts = Experts.from_checkpoint(
                checkpoint, layer, format=args.format, cache_dir=args.cache_dir, progress=bar.update
            )
            packed += experts.nbytes
    print(f"{count_text(len(layers), 'layer')}, {size_text(packed)} in {args.cache_dir}")
    return 0
