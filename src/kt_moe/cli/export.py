"""`kt-moe export`: write an adapter as vLLM, SGLang or llama.cpp reads it."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_moe.cli.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from kt_moe.export import TARGETS

    parser.add_argument("base", type=Path, metavar="BASE", help="directory of the model")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory of the adapter")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to write")
    parser.add_argument("--target", choices=TARGETS, required=True, help="the program that is to read it")
    parser.epilog = "The experts' weights are not read."


def run(args: argparse.Namespace) -> int:
    """Export.

    Raises:
        OSError, ValueError: as `kt_moe.load_adapter` and `kt_moe.export_adapter` refuse it.
        UserError: the output exists, and is no empty directory.
    """
    output: Path = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"OUTPUT is {output}, which exists already")
    import kt_moe

    config = kt_moe.KtMoeConfig(lazy=True)
    model = kt_moe.load_model(args.base, config, device_map=None, dtype="bfloat16")
    kt_moe.export_adapter(kt_moe.load_adapter(model, args.adapter), args.output, target=args.target)
    print(f"exported for {args.target}: {args.output}")
    return 0
