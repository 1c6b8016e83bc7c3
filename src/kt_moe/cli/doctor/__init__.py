"""`kt-moe doctor`: the machine, and what about it or its settings costs speed."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.epilog = "Exit status: 0, 1 if something costs speed, 2 for an error."


def run(args: argparse.Namespace) -> int:
    """Print the machine and the findings; 1 if one of them costs speed.

    Raises:
        ValueError: an override that does not hold on this machine.
    """
    from kt_moe.cli.doctor import findings, machine, report  # which import torch

    seen = machine.read_machine()
    found = findings.find(seen)
    print(report.to_json(seen, found) if args.json else report.describe(seen, found))
    return 1 if any(finding.slow for finding in found) else 0
