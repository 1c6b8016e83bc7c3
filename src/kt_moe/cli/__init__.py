"""The `kt-moe` command.

What the user can set right ends in one line on stderr and exit status 2; a traceback is a bug of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from kt_moe import __version__
from kt_moe.cli import bench, doctor, finetune, info, inspect, merge, models, options, pack, plan, trace_view
from kt_moe.cli.errors import UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's); the exit status."""
    command_line = list(sys.argv[1:] if argv is None else argv)
    args, unknown = _parser().parse_known_args(command_line)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # names the command's own --help
    args.command_line = command_line
    try:
        status: int = args.run(args)
    except (UserError, OSError) as error:  # an OSError that got here is a full disk or a missing permission
        print(f"kt-moe {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return finetune.INTERRUPTED
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # without argparse's usage, a screen of it, in front
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kt-moe", description="LoRA fine-tuning of MoE models, experts on CPU and GPU")
    parser.add_argument("--version", action="version", version=f"kt-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, declare, module, what in (
        ("finetune", options.add_arguments, finetune, "fine-tune a model with LoRA"),
        ("info", info.add_arguments, info, "show what this machine offers and what will run on it"),
        (
            "doctor",
            doctor.add_arguments,
            doctor,
            "find what about this machine costs speed, and what mends it",
        ),
        ("inspect", inspect.add_arguments, inspect, "show what a checkpoint holds of experts"),
        ("merge", merge.add_arguments, merge, "write a checkpoint with an adapter merged in"),
        ("models", models.add_arguments, models, "list the families of models whose experts work"),
        ("pack", pack.add_arguments, pack, "write experts to a directory from which they are mapped"),
        ("plan", plan.add_arguments, plan, "tell the memory and speed of a run before it is started"),
        ("trace-view", trace_view.add_arguments, trace_view, "draw a profile's trace as a timeline"),
        ("bench", bench.add_arguments, bench, "time a layer against this machine's ceilings and its rivals"),
    ):
        command = commands.add_parser(name, help=what)
        declare(command)
        command.set_defaults(run=module.run, parser=command)
    return parser
