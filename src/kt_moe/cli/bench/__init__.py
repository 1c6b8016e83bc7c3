"""`kt-moe bench`: time a layer or training steps, against the machine's ceilings and other libraries."""

from __future__ import annotations

import argparse
import os

from kt_moe.cli.bench.options import add_arguments, check

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Time what the options ask for; exit status 1 if an output of ours was wrong."""
    check(args)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or torch's threads take cores of those that compute
    from kt_moe.cli.bench.session import Session  # which imports torch

    return Session(args).run()
