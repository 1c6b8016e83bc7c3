"""`kt-moe bench`: time layers and training steps against the machine's ceilings and other libraries."""

from __future__ import annotations

import argparse

from kt_moe.cli.bench.options import add_arguments, read

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Time what the options ask for; exit status 1 if an output of ours was wrong."""
    settings = read(args)
    from kt_moe.cli.bench.session import Session  # which imports torch

    return Session(settings, args.command_line).run()
