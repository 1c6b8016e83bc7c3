"""`kt-moe finetune`: `kt-moe sft` with short names and defaults for a first run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kt_moe.cli import train

# Short names, and TRL's and ours that they stand for.
ALIASES = {
    "model": "model_name_or_path",
    "data": "dataset_name",
    "output": "output_dir",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target_modules",
    "shared-outer": "lora_shared_outer",
    "lr": "learning_rate",
    "warmup": "warmup_steps",
    "epochs": "num_train_epochs",
    "batch-size": "per_device_train_batch_size",
    "grad-accum": "gradient_accumulation_steps",
    "seq-len": "max_length",
    "eval-every": "eval_steps",
    "save-every": "save_steps",
    "resume": "resume_from_checkpoint",
    **{
        name.replace("_", "-"): f"experts_{name}"
        for name in (
            "format", "placement", "cache_dir", "gpu", "gpu_memory", "cpu_share", "lora_device",
            "checkpoint_experts", "threads",
        )
    },
}  # fmt: skip
DEFAULTS = {
    "lora_dropout": 0.0,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of the run
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
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


def run(command: str, argv: Sequence[str]) -> int:
    """Carry out the command; the exit status.

    Raises:
        UserError: bad input, named in one line.
    """
    with train.short_names(ALIASES, argv):
        return train.start(parse(argv, command))


def parse(
    argv: Sequence[str], name: str, more: Mapping[str, str] | None = None, about: str = ""
) -> train.Options:
    """The options of a command line, short names and others.

    Args:
        name: the command's.
        more: short names of that command beside `ALIASES`.
        about: sentences of its --help.
    """
    short = {**ALIASES, **(more or {})}
    names = "; ".join(f"--{word} --{long}" for word, long in short.items())
    about = f"{about} The options are those of kt-moe sft; short names: {names}."
    options = train.parse("sft", argv, name=name, defaults=DEFAULTS, short=short, about=about)
    training, given = options.training, options.given
    if "per_device_eval_batch_size" not in given:
        training.per_device_eval_batch_size = training.per_device_train_batch_size
    if not options.run.eval_fraction and "eval_strategy" not in given:
        training.eval_strategy = "no"
    return options
