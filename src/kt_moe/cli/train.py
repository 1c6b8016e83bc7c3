"""`kt-moe sft | dpo | kto | reward | grpo | rloo`: TRL's own scripts on models whose experts kt_moe computes.

Options are TRL's (`TrlParser`: a YAML file by --config, and the command line), `ExpertsConfig`'s and
`RunConfig`'s. TRL's `main` reads the data, loads the model, trains and saves; `Job` hands it our quantisation
config, data files and an extended trainer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import datasets
import torch
import transformers
import trl
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers.hf_argparser import HfArg

from kt_moe.cli import data
from kt_moe.cli.described import described, read_config, resolve_targets
from kt_moe.cli.errors import UserError
from kt_moe.cli.experts_config import ExpertsConfig
from kt_moe.cli.output import RunDirectory, finished
from kt_moe.cli.routing import RoutingWatch, read_popularity, share_out
from kt_moe.cli.trainer import Clock, StopOnSignal, StoppedError, extended, memory_text
from kt_moe.hf import SharedOuterLoraConfig
from kt_moe.models import model_experts

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
_TRAINERS = {
    "sft": "SFTTrainer", "dpo": "DPOTrainer", "kto": "KTOTrainer", "reward": "RewardTrainer",
    "grpo": "GRPOTrainer", "rloo": "RLOOTrainer",
}  # fmt: skip
# Options that a resumed run may have otherwise: they change no loss.
_FREE = (
    "output_dir", "logging", "log_", "report_to", "run_name", "project", "trackio", "save_", "push_", "hub_",
    "disable_tqdm", "resume", "restore", "activation_checkpointing", "gradient_checkpointing", "local_rank",
    "dataloader_num_workers", "dataloader_multiprocessing_context", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "torch_empty_cache_steps", "skip_memory_metrics",
    "debug", "do_", "use_cpu", "ddp", "include_", "accelerator_config", "model_init_kwargs",
)  # fmt: skip
_DESCRIBE_EXPERTS = ("experts_format", "experts_placement", "experts_shards", "experts_isa", "experts_nodes")


@dataclass
class RunConfig:
    """What kt-moe adds to a run, beside the experts."""

    _argument_group_name = "run (kt_moe)"

    overwrite: bool = HfArg(
        default=False, help="Start anew where an adapter or a run already is in --output_dir."
    )
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
    report: bool = HfArg(
        default=False,
        help="Leave loss.png, metrics.json, and how often experts were chosen, in --output_dir.",
    )
    sample: str | None = HfArg(
        default=None, help="A prompt: show what the model writes after it, before and after training."
    )
    sample_tokens: int = HfArg(default=80, help="Number of tokens that --sample shows after the prompt.")
    popularity: str | None = HfArg(
        default=None,
        help="routing.safetensors of an earlier run: with --experts_placement expert, whole experts are "
        "shared out by it.",
    )
    lora_shared_outer: bool = HfArg(
        default=False, help="One A of gate and up, and one B of down, for all experts of a layer."
    )


@dataclass
class PlanConfig:
    """What is to be told before a run, instead of it."""

    _argument_group_name = "plan (kt_moe)"

    dry_run: bool = HfArg(
        default=False, help="Tell memory and time of the run and stop: status 0 if it fits, 1 if not."
    )
    plan_host_memory: str | None = HfArg(
        default=None, help="Free host memory of another machine, such as 256GiB; default: what is free here."
    )
    plan_gpu: str | None = HfArg(
        default=None, help="Free GPU memory of another machine, such as 24GiB; default: what is free here."
    )
    plan_measure: bool = HfArg(default=True, help="Time one layer here; otherwise arithmetic alone.")
    plan_json: bool = HfArg(default=False, help="Print the plan as JSON.")


@dataclass
class Options:
    """What the command line and a YAML file gave.

    given: names of the options that one of them has; the others have their defaults.
    """

    command: str
    command_line: list[str]
    script: Any
    training: Any
    model: Any
    mixture: Any
    experts: Any
    run: RunConfig
    plan: PlanConfig
    given: frozenset[str] = frozenset()


def parse(
    command: str,
    argv: Sequence[str],
    *,
    name: str = "",
    defaults: Mapping[str, Any] | None = None,
    epilog: str = "",
) -> Options:
    """Read the options of a command.

    Args:
        name: the command as the user typed it.
        defaults: those that differ, beside `DEFAULTS`.

    Raises:
        UserError: options that exclude each other, a YAML file that is not readable.
        SystemExit: unknown options or values, and --help.
    """
    module = importlib.import_module(f"trl.scripts.{command}")
    theirs = module.make_parser().dataclass_types
    changed = {**DEFAULTS, **(defaults or {})}
    said = "; ".join(f"{key} {_shown(value)}" for key, value in changed.items())
    prog = f"kt-moe {name or command}"
    parser = _Parser([*theirs, ExpertsConfig, RunConfig, PlanConfig], prog=prog, allow_abbrev=False)
    parser.epilog = f"{epilog} Defaults that differ from TRL's: {said}.".strip()
    unknown = parser.set_defaults_with_config(**changed)
    assert not set(unknown[::2]) - {f"--{key}" for key in defaults or {}}, unknown
    parser.in_file = set()  # those were ours
    try:
        *parts, in_file, in_line = parser.parse_args_and_config(
            list(argv), return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    if unknown := [*in_line, *in_file]:
        where = "the command line" if in_line else "the file of --config"
        known = [option for action in parser._actions for option in action.option_strings]
        near = [match for word in unknown for match in get_close_matches(word, known, 1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise UserError(f"{where} has {unknown}, which are no options{hint}: see {prog} --help")
    options = Options(command, [name or command, *argv], *parts)
    options.given = parser.given(argv)
    return options


class _Parser(trl.TrlParser):  # type: ignore[misc]
    """TRL's parser, which also knows what was given.

    in_file: names of the options that the YAML file has.
    """

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        self.in_file = set(values)
        return super().set_defaults_with_config(**values)  # type: ignore[no-any-return]

    def given(self, argv: Sequence[str]) -> frozenset[str]:
        """Names of the options that the YAML file or the command line has."""
        actions = (self._option_string_actions.get(word.partition("=")[0]) for word in argv)
        return frozenset(self.in_file | {action.dest for action in actions if action is not None})

    def error(self, message: str) -> NoReturn:
        # without argparse's usage, screens of it, in front
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def run(command: str, argv: Sequence[str]) -> int:
    """Carry out a command; the exit status.

    Raises:
        UserError: bad input, named in one line.
    """
    with quiet():
        return start(parse(command, argv))


def start(options: Options) -> int:
    """Carry out what the options say: a run, or its plan."""
    if options.plan.dry_run:
        from kt_moe.cli.plan import dry_run

        return dry_run(options)
    return Job(options).run()


class Job:
    """One run of a command.

    Attributes:
        directory: its output.
        stop, clock, callbacks: what its trainer gets.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.command = options, options.command
        if not options.model.model_name_or_path:
            raise UserError("--model_name_or_path is missing: a model's directory, or its name on the hub")
        if not (options.script.dataset_name or options.mixture.datasets):
            raise UserError("--dataset_name is missing: a file, a directory of files, or a name on the hub")
        if options.training.output_dir in (None, "trainer_output"):
            raise UserError("--output_dir is missing: where the adapter and checkpoints go")
        self.directory = RunDirectory(Path(options.training.output_dir))
        self.stop, self.clock = StopOnSignal(), Clock()
        self.routing: RoutingWatch | None = None
        self.constructed = self.chat = False
        self.targets: Any = None

    @property
    def callbacks(self) -> list[Any]:
        """What the trainer calls, beside `stop` and `clock`."""
        return [] if self.routing is None else [self.routing]

    def run(self) -> int:
        """Check, train, save; the exit status. Cheap checks come first."""
        options, wanted = self.options, self.options.training.resume_from_checkpoint
        self.directory.check(resume=wanted is not None, overwrite=options.run.overwrite)
        self._check()
        with self._locked():
            checkpoint = None
            record = self._record()
            if wanted is not None:
                checkpoint = self.directory.resume(
                    "last" if str(wanted).lower() == "true" else wanted, record
                )
                if finished(checkpoint) and self.directory.adapter.exists():
                    self.say(f"the run is complete: {self.directory.adapter}")
                    return 0
                self.say(f"resuming  from {checkpoint}")
                options.training.resume_from_checkpoint = str(checkpoint)
                options.training.eval_on_start = False
            if options.run.report:
                self.routing = RoutingWatch(checkpoint)
            try:
                self._train(None if checkpoint is not None else record)
            except StoppedError as stopped:
                return self._stopped(stopped.number)
            except KeyboardInterrupt:
                return self._stopped(self.stop.requested or 2)
        return 0

    def _check(self) -> None:
        """What can be refused before anything is loaded."""
        options, training = self.options, self.options.training
        try:
            self.config = options.experts.to_config(trl.get_quantization_config(options.model))
        except ValueError as error:
            raise UserError(str(error)) from error
        check_experts(options)
        if popularity := options.run.popularity:
            if options.experts.experts_placement == "tensor":
                raise UserError("--popularity is for --experts_placement expert")
            if self.directory.root.resolve() in Path(popularity).resolve().parents:
                raise UserError(
                    f"--popularity {popularity} lies in --output_dir, which this run replaces: copy it"
                )
            read_popularity(Path(popularity))
        if not 0.0 <= options.run.eval_fraction < 1.0:
            raise UserError(f"--eval_fraction is {options.run.eval_fraction}, wanted 0 to below 1")
        if options.run.eval_fraction and options.script.dataset_streaming:
            raise UserError(
                f"--eval_fraction is {options.run.eval_fraction}, and --dataset_streaming holds out no rows: "
                "pass --eval_fraction 0; --eval_strategy steps then wants data with a split "
                f"{options.script.dataset_test_split!r}"
            )
        if options.mixture.datasets and "eval_fraction" in options.given:
            raise UserError("--eval_fraction is for --dataset_name; --datasets have --test_split_size")
        if training.eval_on_start and training.eval_strategy == "no":
            raise UserError("--eval_on_start is for --eval_strategy steps or epoch")
        data.check_exists(options.script.dataset_name or "")
        model, revision = options.model.model_name_or_path, options.model.model_revision
        config = read_config(model, revision=revision, trust_remote_code=training.trust_remote_code)
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        length = getattr(training, "max_length", None)
        if most and length and length > most:
            raise UserError(f"--max_length is {length}, the model's longest sequence is {most}")
        try:
            self.config.runtime()  # KT_MOE_ISA and its kin
            refuse_without_gpu(options.experts)
            self.lora = lora_of(options)
            if self.lora is not None:
                self.lora.target_modules = resolve_targets(
                    *described(config, trust_remote_code=training.trust_remote_code), self.lora
                )
        except ValueError as error:
            raise UserError(str(error)) from error
        self.tokenizer = self._tokenizer(config)
        if options.experts.experts_threads:
            torch.set_num_threads(options.experts.experts_threads)

    def _record(self) -> dict[str, Any]:
        """What decides the losses."""
        options = self.options
        training = {k: v for k, v in options.training.to_dict().items() if not k.startswith(_FREE)}
        experts = {name: getattr(options.experts, name) for name in _DESCRIBE_EXPERTS}
        mine = {
            k: v
            for k, v in asdict(options.run).items()
            if k in ("eval_fraction", "long_text", "lora_shared_outer")
        }
        names = [options.script.dataset_name] if options.script.dataset_name else []
        names += [f"{dataset.path} {dataset.data_files}" for dataset in options.mixture.datasets]
        popularity = options.run.popularity
        return {
            "command": options.command,
            **asdict(options.model), **asdict(options.script), **training, **experts, **mine,
            "model_name_or_path": _absolute(options.model.model_name_or_path),
            "dataset_name": [_absolute(name) for name in names],
            "data_sha256": [data.digest(name) for name in names],
            "popularity_sha256": data.digest(popularity) if popularity else None,
        }  # fmt: skip

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        first = self.options.training.process_index == 0
        with self.directory.locked() if first else contextlib.nullcontext():
            yield

    def _train(self, record: dict[str, Any] | None) -> None:
        """TRL's main. record: of a new run."""
        options = self.options
        base = getattr(trl, _TRAINERS[options.command])
        self._new = record
        patches = {
            _TRAINERS[options.command]: extended(base, self),
            "get_quantization_config": lambda model: self.config,
            "get_peft_config": lambda model: self.lora,
        }
        module = importlib.import_module(f"trl.scripts.{options.command}")
        with contextlib.ExitStack() as stack:
            for name, ours in patches.items():
                stack.enter_context(mock.patch.object(trl, name, ours))
            stack.enter_context(mock.patch("datasets.load_dataset", _Loader(self)))
            try:
                module.main(options.script, options.training, options.model, options.mixture)
            except torch.OutOfMemoryError as error:
                advice = "--per_device_train_batch_size, --max_length or --experts_gpu_memory"
                raise UserError(
                    f"out of GPU memory: lower {advice}, or pass --gradient_checkpointing"
                ) from error
            except (SafetensorError, RuntimeError, OSError) as error:
                if disk := _disk_full(error, self.directory.root):
                    raise UserError(disk) from error
                if self.constructed and not isinstance(error, OSError):
                    raise
                raise UserError(str(error)) from error
            except (ValueError, KeyError, ImportError, TemplateError) as error:
                if self.constructed:
                    raise
                raise UserError(self._explained(error)) from error

    def _explained(self, error: Exception) -> str:
        """What the making of a trainer raised."""
        if isinstance(error, TemplateError):
            name = self.options.script.dataset_name
            return f"a conversation in {name} does not fit the chat template: {error}"
        return f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)

    def load_data(self, name: str, config: str | None, streaming: bool) -> Any:
        """The data of the command line, its held-out rows and rows of long texts."""
        options, training = self.options, self.options.training
        found = data.load_data(name, config, streaming)
        train, test = options.script.dataset_train_split, options.script.dataset_test_split
        if train not in found:
            raise UserError(
                f"{name} has no split {train!r}, but {', '.join(found)}: see --dataset_train_split"
            )
        text = getattr(training, "dataset_text_field", "text")
        data.check_columns(self.command, found[train], name, text)
        self.chat = bool({"messages", "conversations"} & set(found[train].column_names or []))
        if fraction := options.run.eval_fraction:
            if test not in found:
                found[train], found[test] = data.hold_out(found[train], fraction, training.seed, text)
            elif "eval_fraction" in options.given:
                raise UserError(
                    f"--eval_fraction is {fraction}, but {name} has a split {test!r}: leave it out to "
                    "evaluate with that split, or name another --dataset_test_split for the rows held out"
                )
        if training.eval_strategy != "no" and test not in found:
            wanted = "--eval_strategy no" if streaming else "--eval_fraction, or --eval_strategy no"
            raise UserError(f"{name} has no split {test!r} to evaluate with: pass {wanted}")
        if (
            options.run.long_text == "cut"
            and self.command == "sft"
            and text in (found[train].column_names or [])
        ):
            for split in {train, test} & set(found):
                found[split] = data.cut_texts(found[split], self.tokenizer, training.max_length, text)
        return found

    def _tokenizer(self, config: Any) -> Any:
        name = self.options.model.model_name_or_path
        options = {"trust_remote_code": self.options.training.trust_remote_code}
        try:
            found = transformers.AutoTokenizer.from_pretrained(
                name, revision=self.options.model.model_revision, **options
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{name} has no tokenizer that loads: {error}") from error
        # Of a model without a tokenizer's files transformers makes one that knows no words.
        if 10 * len(found) < getattr(config.get_text_config(), "vocab_size", 0):
            raise UserError(f"{name} has no tokenizer: its directory lacks tokenizer.json or the like")
        return found

    def built(self, trainer: Any) -> None:
        """The trainer is made, nothing is trained yet."""
        if self.options.run.popularity is not None:
            share_out(trainer.model, read_popularity(Path(self.options.run.popularity)))
        for what, rows in (("train", trainer.train_dataset), ("held out", trainer.eval_dataset)):
            if rows is not None and hasattr(rows, "__len__"):
                self.say(f"{what:<9} {len(rows):,} rows")
                if what == "train" and not len(rows):
                    raise UserError("no row is left to train on")
        self.say(f"model     {_describe(trainer.model)}")
        if self._new is not None and trainer.args.process_index == 0:
            self.directory.start(self._new)
        self.constructed = True

    def report(self, trainer: Any) -> None:
        """Pictures and numbers; the adapter comes after them."""
        if self.options.run.report:
            from kt_moe.cli.report import write_report

            write_report(self, trainer)

    def saved(self, trainer: Any) -> None:
        """The adapter lies there."""
        if self.options.run.sample is not None:
            from kt_moe.cli.report import show_samples

            show_samples(self, trainer)
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if losses:
            self.say(f"held-out loss  {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
        if self.clock.rate is not None:
            self.say(f"speed          {self.clock.rate:.0f} tokens/s, {memory_text()}")
        self.say(f"adapter        {self.directory.adapter}")

    def _stopped(self, number: int) -> int:
        checkpoint = self.directory.last_checkpoint()
        if checkpoint is None:
            self.say(
                "stopped before the first checkpoint; nothing to resume from, start again with --overwrite"
            )
        else:
            words = self.options.command_line
            given = without(words, "--overwrite", "--resume", "--resume_from_checkpoint")
            again = "--resume" if given[0] == "finetune" else "--resume_from_checkpoint last"
            if self.options.run.overwrite and not any(word.startswith("--overwrite") for word in words):
                again = f"--overwrite false {again}"  # the YAML file has it
            self.say(f"stopped; the last checkpoint is {checkpoint}")
            self.say(f"resume with: kt-moe {shlex.join(given)} {again}")
        return 128 + number

    def say(self, text: str) -> None:
        """Print a line of the run, from its first process alone."""
        if self.options.training.process_index == 0:
            print(text, flush=True)


def without(words: Sequence[str], *names: str) -> list[str]:
    """A command line without these options and their values, of which each has at most one."""
    kept: list[str] = []
    dropped = False  # whether the word before was such an option that has its value, if any, in the next
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") in {known.replace("-", "_") for known in names}:
            dropped = not equals
            continue
        if not dropped or word.startswith("-"):
            kept.append(word)
        dropped = False
    return kept


class _Loader:
    """Stands for `datasets.load_dataset` while TRL's main runs: its first call is that for --dataset_name."""

    def __init__(self, job: Job) -> None:
        self._job, self._theirs = job, datasets.load_dataset

    def __call__(self, path: str, name: str | None = None, streaming: bool = False, **more: Any) -> Any:
        if more or path != self._job.options.script.dataset_name:
            return self._theirs(path, name=name, streaming=streaming, **more)
        with mock.patch("datasets.load_dataset", self._theirs):
            return self._job.load_data(path, name, streaming)


def lora_of(options: Options) -> Any:
    """The PEFT config of a run; None without PEFT."""
    found = trl.get_peft_config(options.model)
    if found is not None and options.run.lora_shared_outer:
        found.__class__ = SharedOuterLoraConfig
    return found


def check_experts(options: Options) -> None:
    """UserError where options of the experts do not go together, or need a GPU that is not there.

    options: whose `experts.to_config` raised nothing.
    """
    experts = options.experts
    if experts.experts_checkpoint_experts == "retain" and not options.training.gradient_checkpointing:
        raise UserError("--experts_checkpoint_experts retain is for --gradient_checkpointing")
    if experts.experts_gpu.startswith("cuda") and torch.cuda.is_available():
        number = experts.experts_gpu.partition(":")[2]
        if int(number or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--experts_gpu {experts.experts_gpu}: there are {torch.cuda.device_count()} GPUs"
            )


def refuse_without_gpu(experts: Any) -> None:
    """Refuse options that only a GPU has a use for, where PyTorch finds none: training would be on the CPU.

    Raises:
        UserError: names the option.
    """
    given = [name for name in ("gpu_memory", "cpu_share") if getattr(experts, f"experts_{name}") != "auto"]
    given += ["lora_device"] if experts.experts_lora_device == "cuda" else []
    given += ["gpu"] if experts.experts_gpu.startswith("cuda") else []
    if given and not torch.cuda.is_available():
        raise UserError(f"--experts_{given[0]} is for a GPU, and PyTorch {torch.__version__} finds none")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within `with`: no messages that say nothing to the user, and bars on terminals alone."""

    def keep(record: logging.LogRecord) -> bool:
        # Checkpoints less than a second apart are told apart by their step numbers instead, which is as good.
        return not record.getMessage().startswith("mtime may not be reliable")

    rotation = logging.getLogger("transformers.trainer_utils")
    rotation.addFilter(keep)
    theirs = (transformers.utils.logging, datasets.utils.logging)
    hidden = [] if sys.stderr.isatty() else [bars for bars in theirs if bars.is_progress_bar_enabled()]
    for bars in hidden:
        bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # TRL still reads and sets the older name of activation checkpointing, which means the same.
            known = r"`(is_)?gradient_checkpointing` is deprecated"
            warnings.filterwarnings("ignore", message=known, category=FutureWarning)
            yield
    finally:
        rotation.removeFilter(keep)
        for bars in hidden:
            bars.enable_progress_bar()


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _disk_full(error: Exception, root: Path) -> str | None:
    said = str(error)
    if getattr(error, "errno", None) == 28 or "No space left" in said or "PytorchStreamWriter" in said:
        return f"the disk of --output_dir {root} is full: {' '.join(said.split())[:200]}"
    return None


def _describe(model: Any) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = list(model_experts(model).values())
    runtime = found[0].runtime if found else None
    experts = (
        "no experts loaded" if runtime is None else f"experts by {runtime.isa}, {runtime.threads} threads"
    )
    return f"{model.config.model_type} on {model.device}, {experts}, {trained:,} parameters trained"
