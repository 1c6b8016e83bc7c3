"""`kt-moe finetune`, `sft`, `dpo`, `kto`, `reward`, `grpo`, `rloo` and `plan`: TRL's scripts on our models.

Options are TRL's (`TrlParser`: a YAML file by --config, and the command line), `ExpertsConfig`'s,
`RunConfig`'s and `PlanConfig`'s; some have short names. `finetune` and `plan` are `sft` with defaults for a
first run. `kt_moe.cli.job.Job` runs TRL's script with them, `kt_moe.cli.plan.dry_run` plans the run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import datasets
import torch
import transformers
import trl
from transformers.hf_argparser import HfArg

from kt_moe.cli.experts_config import ExpertsConfig
from kt_moe.cli.terminal import OneLineErrors, UserError
from kt_moe.gpu.predict import CARDS

# Where our defaults are not TRL's: experts are frozen, so LoRA it is; weights are bf16 already, and autocast
# would round LoRA's fp32 products besides; a loss that is no number is shown, not replaced by an average.
_DEFAULTS: dict[str, Any] = {
    "use_peft": True,
    "lora_target_modules": ["attention", "experts"],
    "dtype": "bfloat16",
    "bf16": False,
    "logging_nan_inf_filter": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "disable_tqdm": not sys.stderr.isatty(),  # bars are for terminals
}
_OF_A_FIRST_RUN = {
    "lora_dropout": 0.0,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of the run
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": None,  # that of training
    "gradient_checkpointing": False,
    "router_aux_loss_coef": 0.0,  # the router is frozen: the loss shown is the text's alone
    "seed": 0,
    "logging_steps": 1,  # a loss a step: a resumed run's log is the uninterrupted run's
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # of the run
    "eval_on_start": True,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "eval_fraction": 0.05,
    "long_text": "cut",
    "report": True,
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


# Short names of options; those of kt_moe's own go without their prefix.
_SHORT = {
    "model": "model_name_or_path",
    "data": "dataset_name",
    "output": "output_dir",
    "rank": "lora_r",
    "targets": "lora_target_modules",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch-size": "per_device_train_batch_size",
    "seq-len": "max_length",
    "resume": "resume_from_checkpoint=last",
    "rates": "experts_gpu_rates",
    "no-measure": "no_plan_measure",
}
for _name in (field.name for config in (PlanConfig, ExpertsConfig) for field in fields(config)):
    _SHORT[_name.removeprefix("plan_").removeprefix("experts_").replace("_", "-")] = _name


@dataclass
class Options:
    """What the command line and a YAML file gave. command: of TRL's script."""

    command: str
    script: Any
    training: Any
    model: Any
    mixture: Any
    experts: Any
    run: RunConfig
    plan: PlanConfig


class _Parser(OneLineErrors, trl.TrlParser):  # type: ignore[misc]
    pass


def run(command: str, argv: Sequence[str]) -> int:
    """Carry out a command; the exit status.

    Raises:
        UserError: bad input, named in one line.
    """
    options = parse(command, argv)
    if options.plan.dry_run:
        from kt_moe.cli.plan import dry_run

        return dry_run(options)
    from kt_moe.cli.job import Job

    return Job(options).run()


def parse(command: str, argv: Sequence[str]) -> Options:
    """Read the options of a command. Messages of other libraries that say nothing to the user are off then.

    Raises:
        UserError: unknown options or values, some that exclude each other, a YAML file that is not readable.
        SystemExit: --help.
    """
    for name in ("trainer_utils", "tokenization_utils_base"):  # checkpoints of one second, and long documents
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # bars are for terminals
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.disable_progress_bar()
    script = "sft" if command in ("finetune", "plan") else command
    theirs = import_module(f"trl.scripts.{script}").make_parser().dataclass_types
    names = "; ".join(f"--{short} --{long}" for short, long in _SHORT.items())
    parser = _Parser(
        [*theirs, ExpertsConfig, RunConfig, PlanConfig],
        prog=f"kt-moe {command}", allow_abbrev=False, epilog=f"Short names: {names}.",
    )  # fmt: skip
    parser.set_defaults_with_config(**_DEFAULTS, **(_OF_A_FIRST_RUN if script != command else {}))
    words = [_long(word) for word in argv]
    if command == "plan":
        words = [*(["--model_name_or_path"] if words and not words[0].startswith("-") else []), *words]
        words.append("--dry_run")
    try:
        options = Options(script, *parser.parse_args_and_config(words))
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{error} (see kt-moe {command} --help)") from error
    if (training := options.training).per_device_eval_batch_size is None:
        training.per_device_eval_batch_size = training.per_device_train_batch_size
    return options


def _long(word: str) -> str:
    """A word of the command line with the whole name of its option."""
    name, equals, value = word.partition("=")
    known = _SHORT.get(name[2:].replace("_", "-")) if name.startswith("--") else None
    return word if known is None else f"--{known}{equals}{value}"
