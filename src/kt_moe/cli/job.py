"""One run of a training command: checks before it, TRL's own script with our parts, what is said after it.

TRL's `main` reads the data, loads the model, trains and saves; `Job` hands it our quantisation config, data
files and an extended trainer.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import transformers
import trl
from jinja2 import TemplateError
from safetensors import SafetensorError

from kt_moe.cli import data
from kt_moe.cli.described import described, read_config, resolve_targets
from kt_moe.cli.errors import UserError
from kt_moe.cli.output import RunDirectory, finished
from kt_moe.cli.report import RoutingWatch, show_samples, write_report
from kt_moe.cli.train import Options, check_experts
from kt_moe.cli.trainer import Clock, StopOnSignal, StoppedError, extended, peak_memory
from kt_moe.hf import SharedOuterLoraConfig
from kt_moe.models import model_experts

_TRAINERS = {
    "sft": "SFTTrainer", "dpo": "DPOTrainer", "kto": "KTOTrainer", "reward": "RewardTrainer",
    "grpo": "GRPOTrainer", "rloo": "RLOOTrainer",
}  # fmt: skip
# How options begin that a resumed run may have otherwise: they change no loss.
_FREE = re.compile(
    "output_dir|logging|log_|report_to|run_name|project|trackio|save_|push_|hub_|disable_tqdm|resume|restore|"
    "activation_checkpointing|gradient_checkpointing|local_rank|dataloader_(?!drop_last|in_order)|debug|do_|"
    "torch_empty_cache_steps|skip_memory_metrics|use_cpu|ddp|include_|accelerator_config|model_init_kwargs"
)
_OF_EXPERTS = ("experts_format", "experts_placement", "experts_shards", "experts_isa", "experts_nodes")
_OF_RUN = ("eval_fraction", "long_text", "lora_shared_outer")
_REFUSALS = (SafetensorError, RuntimeError, OSError, ValueError, KeyError, ImportError, TemplateError)

_groups: list[Any] = []  # kept until the process ends


class Job:
    """One run of a command.

    Attributes:
        directory: its output.
        stop, clock, routing: what its trainer calls.
        constructed: whether the trainer is made; until then, what fails is the user's to mend.
        chat: whether the data are conversations.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.command = options, options.command
        rows, output = options.script.dataset_name or options.mixture.datasets, options.training.output_dir
        for given, name, what in (
            (options.model.model_name_or_path, "model_name_or_path", "a directory, or a name on the hub"),
            (rows, "dataset_name", "a file, a directory of files, or a name on the hub"),
            (output not in (None, "trainer_output"), "output_dir", "where the adapter and checkpoints go"),
        ):
            if not given:
                raise UserError(f"--{name} is missing: {what}")
        self.directory = RunDirectory(Path(output))
        self.stop, self.clock = StopOnSignal(), Clock()
        self.routing: RoutingWatch | None = None
        self.constructed = self.chat = False

    def run(self) -> int:
        """Check, train, save; the exit status. Cheap checks come first."""
        wanted, overwrite = self.options.training.resume_from_checkpoint, self.options.run.overwrite
        self.directory.check(resume=wanted is not None, overwrite=overwrite)
        first = self.options.training.process_index == 0
        try:
            self._check()
            with self.directory.locked() if first else contextlib.nullcontext():
                if not self._complete(wanted):
                    self._train()
        except (StoppedError, KeyboardInterrupt):
            return self._stopped(self.stop.requested or 2)
        except _REFUSALS as error:
            if (said := self._explained(error)) is None:
                raise
            raise UserError(said) from error
        return 0

    def _check(self) -> None:
        """What can be refused before anything is loaded."""
        options, training, script = self.options, self.options.training, self.options.script
        self.config = options.experts.to_config(trl.get_quantization_config(options.model))
        check_experts(options)
        fraction = options.run.eval_fraction
        if not 0.0 <= fraction < 1.0:
            raise UserError(f"--eval_fraction is {fraction}, wanted 0 to below 1")
        if fraction and script.dataset_streaming:
            raise UserError(
                f"--eval_fraction is {fraction}, and --dataset_streaming holds out no rows: pass "
                "--eval_fraction 0; --eval_strategy steps then wants data with a split "
                f"{script.dataset_test_split!r}"
            )
        if options.mixture.datasets and "eval_fraction" in options.given:
            raise UserError("--eval_fraction is for --dataset_name; --datasets have --test_split_size")
        if training.eval_on_start and training.eval_strategy == "no":
            if "eval_on_start" in options.given:
                raise UserError("--eval_on_start wants --eval_strategy steps or epoch")
            training.eval_on_start = False
        data.check_exists(script.dataset_name or "")
        model, trusted = options.model, {"trust_remote_code": training.trust_remote_code}
        config = read_config(model.model_name_or_path, revision=model.model_revision, **trusted)
        text = config.get_text_config()
        most, length = getattr(text, "max_position_embeddings", None), getattr(training, "max_length", None)
        if most and length and length > most:
            raise UserError(f"--max_length is {length}, the model's longest sequence is {most}")
        self.config.runtime()  # KT_MOE_ISA and its kin
        self.lora = lora_of(options)
        if self.lora is not None:
            self.lora.target_modules = resolve_targets(*described(config, **trusted), self.lora)
        self.tokenizer = _tokenizer(model, getattr(text, "vocab_size", 0), trusted)
        if options.experts.experts_threads:
            torch.set_num_threads(options.experts.experts_threads)

    def _complete(self, wanted: str | None) -> bool:
        """Whether the run that is to be resumed is complete; else what is to be done is made ready.

        wanted: a checkpoint's directory, "last", or None, which begins anew.
        """
        training, record, checkpoint = self.options.training, self._record(), None
        if wanted is not None:
            checkpoint = self.directory.resume("last" if str(wanted).lower() == "true" else wanted, record)
            if finished(checkpoint) and self.directory.adapter.exists():
                self.say(f"the run is complete: {self.directory.adapter}")
                return True
            self.say(f"resuming  from {checkpoint}")
            training.resume_from_checkpoint, training.eval_on_start = str(checkpoint), False
        self._new = record if checkpoint is None and training.process_index == 0 else None
        self.routing = RoutingWatch(checkpoint) if self.options.run.report else None
        return False

    def _record(self) -> dict[str, Any]:
        """What decides the losses."""
        options, training = self.options, self.options.training.to_dict().items()
        names = [options.script.dataset_name] if options.script.dataset_name else []
        names += [f"{dataset.path} {dataset.data_files}" for dataset in options.mixture.datasets]
        return {
            "command": options.command,
            **asdict(options.model), **asdict(options.script),
            **{name: value for name, value in training if not _FREE.match(name)},
            **{name: getattr(options.experts, name) for name in _OF_EXPERTS},
            **{name: getattr(options.run, name) for name in _OF_RUN},
            "model_name_or_path": _absolute(options.model.model_name_or_path),
            "dataset_name": [_absolute(name) for name in names],
            "data_sha256": [data.digest(name) for name in names],
        }  # fmt: skip

    def _train(self) -> None:
        """TRL's main."""
        options, trainer = self.options, _TRAINERS[self.command]
        patches: dict[str, Any] = {
            trainer: extended(getattr(trl, trainer), self),
            "get_quantization_config": lambda model: self.config,
            "get_peft_config": lambda model: self.lora,
        }
        theirs = datasets.load_dataset

        def load(path: str, name: str | None = None, streaming: bool = False, **more: Any) -> Any:
            if more or path != options.script.dataset_name:
                return theirs(path, name=name, streaming=streaming, **more)
            with mock.patch("datasets.load_dataset", theirs):
                return self.load_data(path, name, streaming)

        if torch.distributed.is_initialized():
            # The last user of the group ends it, and waits, with the GIL, for a thread of gloo's that may
            # want the GIL. That must not be the trainer, right behind its last exchange.
            _groups.append(torch.distributed.group.WORLD)
        module = importlib.import_module(f"trl.scripts.{self.command}")
        with mock.patch.multiple(trl, **patches), mock.patch("datasets.load_dataset", load):
            module.main(options.script, options.training, options.model, options.mixture)

    def _explained(self, error: Exception) -> str | None:
        """What to tell the user of an error; None: it is a bug."""
        said = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            advice = "--per_device_train_batch_size, --max_length or --experts_gpu_memory"
            return f"out of GPU memory: lower {advice}, or pass --gradient_checkpointing"
        if getattr(error, "errno", None) == 28 or "No space left" in said or "PytorchStreamWriter" in said:
            return f"the disk of --output_dir {self.directory.root} is full: {said[:200]}"
        if self.constructed and not isinstance(error, OSError):
            return None
        if isinstance(error, TemplateError):
            name = self.options.script.dataset_name
            return f"a conversation in {name} does not fit the chat template: {said}"
        return f"KeyError {said}" if isinstance(error, KeyError) else said

    def load_data(self, name: str, config: str | None, streaming: bool) -> Any:
        """The data of the command line, its held-out rows and rows of long texts."""
        options, training, script = self.options, self.options.training, self.options.script
        found = data.load_data(name, config, streaming)
        train, test = script.dataset_train_split, script.dataset_test_split
        fraction = options.run.eval_fraction
        if train not in found:
            raise UserError(
                f"{name} has no split {train!r}, but {', '.join(found)}: see --dataset_train_split"
            )
        text = getattr(training, "dataset_text_field", "text")
        data.check_columns(self.command, found[train], name, text)
        columns = set(found[train].column_names or [])
        self.chat = bool({"messages", "conversations"} & columns)
        if fraction and test not in found:
            found[train], found[test] = data.hold_out(found[train], fraction, training.seed, text)
        elif fraction and "eval_fraction" in options.given:
            raise UserError(
                f"--eval_fraction is {fraction}, but {name} has a split {test!r}: leave it out to evaluate "
                "with that split, or name another --dataset_test_split for the rows held out"
            )
        if training.eval_strategy != "no" and test not in found:
            wanted = "--eval_strategy no" if streaming else "--eval_fraction, or --eval_strategy no"
            raise UserError(f"{name} has no split {test!r} to evaluate with: pass {wanted}")
        if options.run.long_text == "cut" and self.command == "sft" and text in columns:
            for split in {train, test} & set(found):
                found[split] = data.cut_texts(found[split], self.tokenizer, training.max_length, text)
        return found

    def built(self, trainer: Any) -> None:
        """The trainer is made, nothing is trained yet."""
        for what, rows in (("train", trainer.train_dataset), ("held out", trainer.eval_dataset)):
            if rows is not None and hasattr(rows, "__len__"):
                self.say(f"{what:<9} {len(rows):,} rows")
                if what == "train" and not len(rows):
                    raise UserError("no row is left to train on")
        model, experts = trainer.model, next(iter(model_experts(trainer.model).values()), None)
        by = f"by {experts.runtime.isa}, {experts.runtime.threads} threads" if experts else "not loaded"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        where = f"{model.config.model_type} on {model.device}"
        self.say(f"model     {where}, experts {by}, {trained:,} parameters trained")
        if self._new is not None:
            self.directory.start(self._new)
        self.constructed = True

    def report(self, trainer: Any) -> None:
        """Pictures and numbers; the adapter comes after them."""
        if self.options.run.report:
            write_report(self, trainer)

    def saved(self, trainer: Any) -> None:
        """The adapter lies there."""
        if self.options.run.sample is not None:
            show_samples(self, trainer)
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if losses:
            self.say(f"held-out loss  {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
        if self.clock.rate is not None:
            peaks = ", ".join(f"{size / 2**30:.2f} GiB {where}" for where, size in peak_memory().items())
            self.say(f"speed          {self.clock.rate:.0f} tokens/s, peak {peaks}")
        self.say(f"adapter        {self.directory.adapter}")

    def _stopped(self, number: int) -> int:
        checkpoint = self.directory.last_checkpoint()
        if checkpoint is None:
            self.say("stopped before the first checkpoint: start again with --overwrite")
        else:
            # Where an option is given twice, the later one counts.
            words = [*self.options.command_line, "--resume_from_checkpoint", "last"]
            words += ["--overwrite", "false"] if self.options.run.overwrite else []
            self.say(f"stopped; the last checkpoint is {checkpoint}")
            self.say(f"resume with: kt-moe {shlex.join(words)}")
        return 128 + number

    def say(self, text: str) -> None:
        """Print a line of the run, from its first process alone."""
        if self.options.training.process_index == 0:
            print(text, flush=True)


def lora_of(options: Options) -> Any:
    """The PEFT config of a run; None without PEFT."""
    found = trl.get_peft_config(options.model)
    if found is not None and options.run.lora_shared_outer:
        found.__class__ = SharedOuterLoraConfig
    return found


def _tokenizer(model: Any, words: int, trusted: dict[str, bool]) -> Any:
    name = model.model_name_or_path
    try:
        found = transformers.AutoTokenizer.from_pretrained(name, revision=model.model_revision, **trusted)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} has no tokenizer that loads: {error}") from error
    # Of a model without a tokenizer's files transformers makes one that knows no words.
    if 10 * len(found) < words:
        raise UserError(f"{name} has no tokenizer: its directory lacks tokenizer.json or the like")
    return found


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name
