"""`kt-moe doctor`: the machine, and what about it or its settings costs speed."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_moe.cli.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    recorded = "another machine: a directory that holds copies of its /proc and /sys"
    parser.add_argument("--sysfs", type=Path, metavar="DIR", help=recorded)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.epilog = "Exit status: 0, 1 if something costs speed, 2 for an error."


def run(args: argparse.Namespace) -> int:
    """Print the machine and the findings; 1 if one of them costs speed.

    Raises:
        UserError: no recorded machine there, or an override that does not hold on this one.
    """
    if args.sysfs is not None and not (args.sysfs / "proc").is_dir() and not (args.sysfs / "sys").is_dir():
        raise UserError(f"--sysfs {args.sysfs}: no recorded machine there, wanted directories proc and sys")
    from kt_moe.cli.doctor import findings, machine, report  # which import torch

    try:
        seen = machine.read_machine() if args.sysfs is None else machine.read_recorded(args.sysfs)
    except ValueError as error:  # KT_MOE_ISA and its kin
        raise UserError(str(error)) from error
    found = findings.find(seen)
    print(report.to_json(seen, found) if args.json else report.describe(seen, found))
    return 1 if any(finding.slow for finding in found) else 0
