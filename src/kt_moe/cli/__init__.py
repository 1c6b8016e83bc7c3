"""The `kt-moe` command.

What the user can set right ends in one line on stderr and exit status 2; a traceback is a bug of ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from kt_moe import __version__
from kt_moe.cli.terminal import OneLineErrors, UserError

__all__ = ["main"]

_TRAINING = {
    "finetune": "sft with defaults for a first run",
    "plan": "tell memory and speed of a run before it is started (finetune --dry_run)",
    "sft": "train on texts, conversations, or prompts and completions (TRL's SFT)",
    "dpo": "train on pairs of a chosen and a rejected answer (TRL's DPO)",
    "kto": "train on answers that are marked good or bad (TRL's KTO)",
    "reward": "train a reward model on pairs of answers (TRL's reward)",
    "grpo": "train by rewards of groups of the model's own answers (TRL's GRPO)",
    "rloo": "train by rewards of the model's own answers (TRL's RLOO)",
}
_OTHERS = {
    "pack": "write experts to a directory from which they are mapped",
    "inspect": "show what a checkpoint holds of experts",
    "merge": "write a checkpoint with an adapter merged in",
    "export": "write an adapter as vLLM, SGLang or llama.cpp reads it",
    "models": "list the families of models whose experts work",
    "doctor": "show this machine, what will run on it, and what costs speed, with its mend",
    "bench": "time a layer or training steps on this machine, and what it could do at most",
}
_MODULES = {"merge": "adapter", "export": "adapter"}  # of commands whose modules have other names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's); the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next(iter(words), "")
    # TRL and PEFT still use the older name of activation checkpointing, which means the same.
    known = r"`\w*gradient_checkpointing\w*` is deprecated"
    warnings.filterwarnings("ignore", message=known, category=FutureWarning)
    try:
        status = _run(command, words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:  # an OSError that got here is a full disk or a missing permission
        print(f"kt-moe {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run(command: str, words: list[str]) -> int:
    if command in _TRAINING:
        try:
            module = import_module("kt_moe.cli.train")
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is missing: pip install 'kt_moe[train]'") from error
        return int(module.run(command, words[1:]))
    parser = _Parser(prog="kt-moe", description="LoRA fine-tuning of MoE models, experts on CPU and GPU")
    parser.add_argument("--version", action="version", version=f"kt-moe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    subs = {name: commands.add_parser(name, help=what) for name, what in (_TRAINING | _OTHERS).items()}
    if command in _OTHERS:  # the only one that is imported
        module = import_module(f"kt_moe.cli.{_MODULES.get(command, command)}")
        module.add_arguments(subs[command])
    args = parser.parse_args(words)
    try:
        return int(module.run(args))
    except ValueError as error:  # the library's word for what is the user's
        raise UserError(str(error)) from error


class _Parser(OneLineErrors, argparse.ArgumentParser):
    pass
