"""`kt-moe doctor`: what will run on this machine, and what about it or its settings costs speed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.epilog = "Exit status: 0, 1 if something costs speed, 2 for an error."


def run(args: argparse.Namespace) -> int:
    """Print the machine and the findings; 1 if there are any.

    Raises:
        ValueError: an override that does not hold on this machine.
    """
    from kt_moe.cli.doctor import findings, machine  # which import torch

    seen = machine.read_machine()
    found = findings.find(seen)
    if args.json:
        print(json.dumps({"machine": seen, "findings": [*map(asdict, found)]}, indent=2))
    else:
        print(machine.describe(seen), findings.describe(found), sep="\n\n")
    return 1 if found else 0
