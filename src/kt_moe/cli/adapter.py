"""`kt-moe merge` and `kt-moe export`: an adapter merged into its model, or as other programs read it."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_moe.cli.terminal import UserError, size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command whose name the parser has."""
    parser.add_argument("base", type=Path, metavar="BASE", help="directory of the model")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory of the adapter")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to write, new or empty")
    if parser.prog.endswith("merge"):
        parser.epilog = "What is written is read again and compared; OUTPUT appears when all of it is right."
        parser.set_defaults(run=_merge)
        return
    from kt_moe.export import TARGETS

    parser.add_argument("--target", choices=TARGETS, required=True, help="the program that is to read it")
    parser.epilog = "The experts' weights are not read."
    parser.set_defaults(run=_export)


def run(args: argparse.Namespace) -> int:
    """Merge or export.

    Raises:
        OSError, ValueError: as `kt_moe.merge_checkpoint`, `load_adapter` and `export_adapter` refuse it.
        UserError: the output of an export exists, and is no empty directory.
    """
    args.run(args)
    return 0


def _merge(args: argparse.Namespace) -> None:
    """Says how much was written, and lost where weights are quantised."""
    from kt_moe.merge import merge_checkpoint  # which imports transformers and PEFT

    for format, one in merge_checkpoint(args.base, args.adapter, args.output).items():
        print(
            f"{format}: {one.matrices:,} matrices quantised again, relative error {one.error:.3g} of the "
            f"weights, {one.of_change:.3g} of what the adapter adds"
        )
    size = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    print(f"merged, {size_text(size)} in {args.output}")


def _export(args: argparse.Namespace) -> None:
    output: Path = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"OUTPUT is {output}, which exists already")
    import kt_moe

    config = kt_moe.KtMoeConfig(lazy=True)
    model = kt_moe.load_model(args.base, config, device_map=None, dtype="bfloat16")
    kt_moe.export_adapter(kt_moe.load_adapter(model, args.adapter), args.output, target=args.target)
    print(f"exported for {args.target}: {args.output}")
