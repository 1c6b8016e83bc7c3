"""`kt-moe sft | dpo | kto | reward | grpo | rloo`: TRL's own scripts on models whose experts kt_moe computes.

Options are TRL's (`TrlParser`: a YAML file by --config, and the command line), `ExpertsConfig`'s and
`RunConfig`'s. `kt_moe.cli.job.Job` runs TRL's script with them.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn

import datasets
import torch
import transformers
import trl
from transformers.hf_argparser import HfArg

from kt_moe.cli.errors import UserError
from kt_moe.cli.experts_config import ExpertsConfig
from kt_moe.gpu.predict import CARDS

# Where our defaults are not TRL's: experts are frozen, so LoRA it is; weights are bf16 already, and autocast
# would round LoRA's fp32 products besides; a loss that is no number is shown, not replaced by an average.
DEFAULTS: dict[str, Any] = {
    "use_peft": True,
    "lora_target_modules": ["attention", "experts"],
    "dtype": "bfloat16",
    "bf16": False,
    "logging_nan_inf_filter": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "disable_tqdm": not sys.stderr.isatty(),  # bars are for terminals
}


@dataclass
class RunConfig:
    """What kt-moe adds to a run, beside the experts."""

    _argument_group_name = "run (kt_moe)"

    overwrite: bool = HfArg(default=False, help="Start anew where an adapter or a run is in --output_dir.")
    eval_fraction: float = HfArg(
        default=0.0,
        help="Part of the training data to hold out as --dataset_test_split, if the data has no such split: "
        "by contents, so the same rows whatever their order; copies stay on one side.",
    )
    long_text: str = HfArg(
        default="truncate",
        help="What becomes of texts longer than --max_length (sft): they lose their end, as in TRL, or are "
        "cut into rows of nearly equal length.",
        metadata={"choices": ["truncate", "cut"]},
    )
    report: bool = HfArg(default=False, help="Leave loss.png, metrics.json and routing.* in --output_dir.")
    sample: str | None = HfArg(default=None, help="A prompt to continue, before and after training.")
    lora_shared_outer: bool = HfArg(
        default=False, help="One A of gate and up, and one B of down, for all experts of a layer."
    )


@dataclass
class PlanConfig:
    """What is to be told before a run, instead of it."""

    _argument_group_name = "plan (kt_moe)"

    dry_run: bool = HfArg(default=False, help="Plan alone; the exit status is 0 if the run fits, else 1.")
    plan_host_memory: str | None = HfArg(
        default=None, help="Free host memory, such as 256GiB; default: here."
    )
    plan_gpu: str | None = HfArg(
        default=None,
        help=f"Free GPU memory, such as 24GiB, or one of {', '.join(CARDS)}; default: the GPU here.",
    )
    plan_measure: bool = HfArg(default=True, help="Time some experts here; otherwise arithmetic alone.")
    plan_hosts: int = HfArg(default=1, help="Hosts of the job; others are as this one.")
    plan_ranks: int = HfArg(default=1, help="Processes on each host, one for each of its GPUs.")
    plan_network: float = HfArg(
        default=12.5, help="What a host's network carries in each direction, GB/s; 12.5 is 100 Gbit/s."
    )
    plan_json: bool = HfArg(default=False, help="Print the plan as JSON.")


@dataclass
class Options:
    """What the command line and a YAML file gave.

    given: names of the options that one of them has; the others have their defaults.
    """

    command: str
    script: Any
    training: Any
    model: Any
    mixture: Any
    experts: Any
    run: RunConfig
    plan: PlanConfig
    command_line: list[str] = field(default_factory=list)
    given: frozenset[str] = frozenset()


def run(command: str, argv: Sequence[str]) -> int:
    """Carry out a command; the exit status.

    Raises:
        UserError: bad input, named in one line.
    """
    return start(parse(command, argv))


def start(options: Options) -> int:
    """Carry out what the options say: a run, or its plan."""
    if options.plan.dry_run:
        from kt_moe.cli.plan import dry_run

        return dry_run(options)
    from kt_moe.cli.job import Job

    return Job(options).run()


def parse(
    command: str,
    argv: Sequence[str],
    *,
    name: str = "",
    defaults: Mapping[str, Any] | None = None,
    short: Mapping[str, str] | None = None,
    about: str = "",
) -> Options:
    """Read the options of a command. Messages of other libraries that say nothing to the user are off then.

    Args:
        name: the command as the user typed it.
        defaults: those that differ, beside `DEFAULTS`.
        short: other names of options, without the hyphens in front.
        about: sentences of its --help.

    Raises:
        UserError: unknown options or values, some that exclude each other, a YAML file that is not readable.
        SystemExit: --help.
    """
    _quieten()
    theirs = importlib.import_module(f"trl.scripts.{command}").make_parser().dataclass_types
    changed = {**DEFAULTS, **(defaults or {})}
    said = "; ".join(f"{key} {_shown(value)}" for key, value in changed.items())
    prog = f"kt-moe {name or command}"
    parser = _Parser([*theirs, ExpertsConfig, RunConfig, PlanConfig], prog=prog, allow_abbrev=False)
    parser.epilog = f"{about} Defaults that differ from TRL's: {said}.".strip()
    parser.set_defaults_with_config(**changed)
    parser.in_file = set()  # those were ours
    parser.add_names(short or {})
    try:
        *parts, in_file, in_line = parser.parse_args_and_config(
            list(argv), return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    if unknown := [*in_line, *in_file]:
        where = "the command line" if in_line else "the file of --config"
        known = parser._option_string_actions
        near = [match for word in unknown for match in get_close_matches(word, known, 1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise UserError(f"{where} has {unknown}, which are no options{hint}: see {prog} --help")
    options = Options(command, *parts)
    options.command_line, options.given = [name or command, *argv], parser.given(argv)
    return options


class _Parser(trl.TrlParser):  # type: ignore[misc]
    """TRL's parser, which also knows what was given.

    in_file: names of the options that the YAML file has.
    """

    def add_names(self, short: Mapping[str, str]) -> None:
        """Let options be called otherwise, too; and --resume_from_checkpoint alone means the last one."""
        actions = self._option_string_actions
        for name, long in short.items():
            action = actions[f"--{long}"]
            for spelling in dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")):
                actions[spelling] = action
            action.option_strings.insert(0, f"--{name}")  # for --help and errors
        resume = actions["--resume_from_checkpoint"]
        resume.nargs, resume.const = "?", "last"

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        self.in_file = set(values)
        return super().set_defaults_with_config(**values)  # type: ignore[no-any-return]

    def given(self, argv: Sequence[str]) -> frozenset[str]:
        """Names of the options that the YAML file or the command line has."""
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in argv)
        return frozenset(self.in_file | {action.dest for action in actions if action is not None})

    def error(self, message: str) -> NoReturn:
        # without argparse's usage, screens of it, in front
        raise UserError(f"{message} (see {self.prog} --help)")


@contextmanager
def short_names(short: Mapping[str, str], argv: Sequence[str]) -> Iterator[None]:
    """Within `with`: errors call options by their short names, unless `argv` or a hint has the long one."""
    used = {word.partition("=")[0] for word in argv}
    back = {f"--{long}": f"--{name}" for name, long in short.items() if f"--{long}" not in used}
    try:
        yield
    except UserError as error:
        said = re.sub(r"(?<!mean )--\w+(?!\S*/--)", lambda found: back.get(found[0], found[0]), str(error))
        raise UserError(said) from error


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def check_experts(options: Options) -> None:
    """UserError where options of the experts do not go together, or need a GPU that is not there.

    options: whose `experts.to_config` raised nothing.
    """
    experts = options.experts
    if experts.experts_checkpoint_experts == "retain" and not options.training.gradient_checkpointing:
        raise UserError("--experts_checkpoint_experts retain is for --gradient_checkpointing")
    if options.plan.plan_gpu is not None:
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named, _, number = experts.experts_gpu.partition(":")
    given = [name for name in ("gpu_memory", "cpu_share") if getattr(experts, f"experts_{name}") != "auto"]
    given += ["lora_device"] if experts.experts_lora_device == "cuda" else []
    given += ["gpu"] if named == "cuda" else []
    if given and not gpus:
        raise UserError(
            f"--experts_{given[0]} is for a GPU, and PyTorch {torch.__version__} finds none (a plan is made "
            "for one by --plan_gpu)"
        )
    if named == "cuda" and int(number or 0) >= gpus:
        raise UserError(f"--experts_gpu {experts.experts_gpu}: there are {gpus} GPUs")


def _quieten() -> None:
    """No messages of other libraries that say nothing to the user, and bars on terminals alone."""
    # Checkpoints less than a second apart are told apart by their step numbers instead, which is as good.
    logging.getLogger("transformers.trainer_utils").addFilter(_is_news)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.disable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("mtime may not be reliable")
