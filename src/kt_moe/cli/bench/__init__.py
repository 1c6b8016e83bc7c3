"""`kt-moe bench`: time a layer, forward and backward, against the machine's ceilings and other libraries."""

import argparse

from kt_moe.cli.bench import gpu_options, options, session

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_arguments(parser)
    gpu_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Time a layer, or with --gpu layers and training steps on CPU and GPU; the exit status."""
    if not args.gpu:
        gpu_options.refuse_gpu_options(args)
        return session.run(args)
    from kt_moe.cli.bench import gpu  # imports what only it needs

    return gpu.run(args)
