"""One run of a training command: checks before it, TRL's own script with our parts, what is said after it.

TRL's `main` reads the data, loads the model, trains and saves; `Job` hands it our quantisation config, data
files and an extended trainer.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import trl
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from kt_moe.cli import data
from kt_moe.cli.described import described, read_config, resolve_targets
from kt_moe.cli.output import RunDirectory
from kt_moe.cli.report import RoutingWatch, show_samples, write_report
from kt_moe.cli.terminal import UserError
from kt_moe.cli.train import Options
from kt_moe.cli.trainer import Clock, StopOnSignal, extended, finished
from kt_moe.models import model_experts

# How options begin that a resumed run may have otherwise: they change no loss.
_FREE = re.compile(
    "output_dir|logging|log_|report|run_name|project|trackio|save_|push_|hub_|disable_tqdm|resume|restore|"
    "activation_checkpointing|gradient_checkpointing|local_rank|dataloader_(?!drop_last|in_order)|debug|do_|"
    "torch_empty_cache_steps|skip_memory_metrics|use_cpu|ddp|include_|accelerator_config|model_init_kwargs|"
    "experts_(?!format|placement|shards|isa|nodes)|overwrite|sample"
)
_REFUSALS = (SafetensorError, RuntimeError, OSError, ValueError, ImportError, TemplateError)

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
        self.options, self.directory = options, RunDirectory(Path(options.training.output_dir))
        self.stop, self.clock = StopOnSignal(), Clock()
        self.routing: RoutingWatch | None = None
        self.constructed = self.chat = False

    def run(self) -> int:
        """Check, train, save; the exit status. Cheap checks come first."""
        first = self.options.training.process_index == 0
        try:
            self._check()
            with self.directory.locked() if first else contextlib.nullcontext():
                if not self._complete():
                    self._train()
        except KeyboardInterrupt:
            if last := self.directory.last_checkpoint():
                self.say(f"stopped; the last checkpoint is {last}")
                self.say("the same command with --resume goes on from it, with --overwrite it starts anew")
            else:
                self.say("stopped before the first checkpoint; the same command with --overwrite starts anew")
            return 128 + (self.stop.requested or signal.SIGINT)
        except _REFUSALS as error:
            said = str(error)
            if isinstance(error, torch.OutOfMemoryError):
                advice = "--per_device_train_batch_size, --max_length or --experts_gpu_memory"
                said = f"out of GPU memory: lower {advice}, or pass --gradient_checkpointing"
            elif "No space left" in said or "PytorchStreamWriter" in said:
                said = f"the disk of --output_dir {self.directory.root} is full: {said}"
            elif self.constructed and not isinstance(error, OSError):
                raise
            elif isinstance(error, TemplateError):
                said = f"the chat template refuses a conversation: {said}"
            raise UserError(said) from error
        return 0

    def _check(self) -> None:
        """What can be refused before anything is loaded."""
        options, training, model = self.options, self.options.training, self.options.model
        if not (training.resume_from_checkpoint or options.run.overwrite):
            self.directory.check_free()
        self.config = options.experts.to_config(trl.get_quantization_config(model))
        training.eval_on_start &= training.eval_strategy != "no"
        trusted = {"trust_remote_code": training.trust_remote_code}
        config = read_config(model.model_name_or_path, revision=model.model_revision, **trusted)
        text = config.get_text_config()
        most, length = getattr(text, "max_position_embeddings", None), getattr(training, "max_length", None)
        if most and length and length > most:
            raise UserError(f"--max_length is {length}, the model's longest sequence is {most}")
        self.lora = trl.get_peft_config(model)
        if self.lora is not None:
            self.lora.target_modules = resolve_targets(*described(config, **trusted), self.lora)
        tokenizer = AutoTokenizer.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, **trusted
        )
        # Of a model without a tokenizer's files transformers makes one that knows no words.
        if 10 * len(tokenizer) < getattr(text, "vocab_size", 0):
            raise UserError(
                f"{model.model_name_or_path} has no tokenizer: tokenizer.json or the like is missing"
            )
        if options.experts.experts_threads:
            torch.set_num_threads(options.experts.experts_threads)

    def _complete(self) -> bool:
        """Whether the run that is to be resumed is complete; else what is to be done is made ready."""
        training, record, checkpoint = self.options.training, self._record(), None
        if training.resume_from_checkpoint:
            checkpoint = self.directory.resume(training.resume_from_checkpoint, record)
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
        options = self.options
        parts = (asdict(part) for part in (options.model, options.script, options.experts, options.run))
        every = {name: value for part in (*parts, options.training.to_dict()) for name, value in part.items()}
        name = options.script.dataset_name
        found = {name: value for name, value in every.items() if not _FREE.match(name)}
        data_of_it = data.digest(name) if name else asdict(options.mixture)
        return {"command": options.command, **found, "dataset_name": data_of_it}

    def _train(self) -> None:
        """TRL's main."""
        options, command, theirs = self.options, self.options.command, datasets.load_dataset
        trainer = f"{'Reward' if command == 'reward' else command.upper()}Trainer"
        patches: dict[str, Any] = {
            trainer: extended(getattr(trl, trainer), self),
            "get_quantization_config": lambda model: self.config,
            "get_peft_config": lambda model: self.lora,
        }

        def load(path: str, *args: Any, **more: Any) -> Any:
            ours = path == options.script.dataset_name and not args
            return self.load_data(path, **more) if ours else theirs(path, *args, **more)

        if torch.distributed.is_initialized():
            # The last user of the group ends it, and waits, with the GIL, for a thread of gloo's that may
            # want the GIL. That must not be the trainer, right behind its last exchange.
            _groups.append(torch.distributed.group.WORLD)
        module = importlib.import_module(f"trl.scripts.{command}")
        with mock.patch.multiple(trl, **patches), mock.patch("datasets.load_dataset", load):
            module.main(options.script, options.training, options.model, options.mixture)

    def load_data(self, path: str, **more: Any) -> Any:
        """The data of the command line, with held-out rows where they are wanted and there are none.

        more: options of `datasets.load_dataset`.
        """
        options, training, script = self.options, self.options.training, self.options.script
        found = data.load_data(path, **more)
        train, test = script.dataset_train_split, script.dataset_test_split
        text = getattr(training, "dataset_text_field", "text")
        if train not in found:
            raise UserError(f"{path} has no split {train!r}, but {', '.join(found)}")
        data.check_columns(options.command, found[train], path, text)
        self.chat = bool({"messages", "conversations"} & {*(found[train].column_names or [])})
        if training.eval_strategy != "no" and test not in found:
            if not options.run.eval_fraction or script.dataset_streaming:
                raise UserError(
                    f"{path} has no split {test!r} to evaluate with: pass --eval_strategy no, or let "
                    "--eval_fraction hold out rows (not of --dataset_streaming)"
                )
            held_out = data.hold_out(found[train], options.run.eval_fraction, training.seed, text)
            found[train], found[test] = held_out
        return found

    def built(self, trainer: Any) -> None:
        """The trainer is made, nothing is trained yet."""
        for what, rows in (("train", trainer.train_dataset), ("held out", trainer.eval_dataset)):
            if isinstance(rows, datasets.Dataset):
                self.say(f"{what:<9} {len(rows):,} rows")
                if not len(rows):
                    raise UserError("no row is left to train on or to evaluate with")
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
        self.say(f"adapter        {self.directory.adapter}")

    def say(self, text: str) -> None:
        """Print a line of the run, from its first process alone."""
        if self.options.training.process_index == 0:
            print(text, flush=True)
