"""`kt-moe merge`: write a checkpoint with an adapter merged in."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_moe.cli.text import size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("base", type=Path, metavar="BASE", help="directory of the model")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory of the adapter")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to write, new or empty")
    parser.epilog = "What is written is read again and compared; OUTPUT appears when all of it is right."


def run(args: argparse.Namespace) -> int:
    """Merge, and say how much was written, and lost where weights are quantised.

    Raises:
        OSError, ValueError: as `kt_moe.merge_checkpoint` refuses it.
    """
    from kt_moe.merge import merge_checkpoint  # which imports transformers and PEFT

    for format, one in merge_checkpoint(args.base, args.adapter, args.output).items():
        print(
            f"{format}: {one.matrices:,} matrices quantised again, relative error {one.error:.3g} of the "
            f"weights, {one.of_change:.3g} of what the adapter adds"
        )
    size = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    print(f"merged, {size_text(size)} in {args.output}")
    return 0
