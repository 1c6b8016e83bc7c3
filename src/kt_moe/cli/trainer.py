"""What kt-moe adds to TRL's trainers: see `extended`."""

from __future__ import annotations

import copy
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerState

from kt_moe.cli.data import cut_rows, losses_by_length
from kt_moe.cli.terminal import UserError

if TYPE_CHECKING:
    from kt_moe.cli.job import Job


def extended(base: type, job: Job) -> type:
    """A TRL trainer class whose runs

    - write their adapter whole or not at all, after `Job.report`;
    - stop at a loss that is no number, and say at which step and in which layer it came up;
    - cut long texts into rows, or count documents that the length cuts or drops (SFT);
    - log tokens a second and peak memory;
    - end after a step, with a checkpoint, when a signal says so.
    """

    class Trainer(base):  # type: ignore[misc]
        def __init__(self, *args: Any, callbacks: Any = None, **options: Any) -> None:
            ours = [job.stop] if job.routing is None else [job.stop, job.routing]
            super().__init__(*args, callbacks=[*(callbacks or []), *ours], **options)
            self.callback_handler.callbacks.insert(0, job.clock)  # before those that write logs
            job.built(self)

        def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, *more: Any, **named: Any) -> Any:
            if job.options.command != "sft" or len(more) != 3 or named or args.max_length is None:
                return super()._prepare_dataset(dataset, tokenizer, args, *more, **named)
            packing, formatting, name = more
            long, untruncated = job.options.run.long_text, copy.copy(args)
            untruncated.max_length, untruncated.shuffle_dataset = None, False
            whole = super()._prepare_dataset(dataset, tokenizer, untruncated, False, formatting, name)
            if long == "cut" and args.dataset_text_field in (dataset.column_names or next(iter(dataset))):
                whole = cut_rows(whole, args.max_length)
            elif isinstance(whole, Dataset) and (not packing or args.packing_strategy == "bfd"):
                said = losses_by_length(whole, args.max_length, args.truncation_mode)
                job.say(f"{name:<9} {len(dataset):,} documents{said}")
            return super()._prepare_dataset(whole, tokenizer, args, packing, None, name)

        def train(self, *args: Any, resume_from_checkpoint: Any = None, **options: Any) -> Any:
            if resume_from_checkpoint is not None and finished(Path(resume_from_checkpoint)):
                # Training was complete, but not what follows it.
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = TrainerState.load_from_json(f"{resume_from_checkpoint}/trainer_state.json")
                return None
            with job.stop:
                done = super().train(*args, resume_from_checkpoint=resume_from_checkpoint, **options)
            if job.stop.requested and self.state.global_step < self.state.max_steps:
                raise KeyboardInterrupt  # after a step, with a checkpoint
            return done

        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
            given = dict(inputs) if isinstance(inputs, dict) else {}
            loss: Tensor = super().training_step(model, inputs, *args, **options)
            if not torch.isfinite(loss).all():
                where = first_bad(self.model, self._prepare_inputs(given) if given else {})
                raise UserError(f"step {self.state.global_step + 1}: the loss is {loss.item()}, {where}")
            return loss

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if _internal_call or not self.args.should_save:
                super().save_model(output_dir, _internal_call)
                return
            job.report(self)
            with job.directory.whole() as folder:
                super().save_model(str(folder), _internal_call=True)
            job.saved(self)

    Trainer.__name__ = Trainer.__qualname__ = base.__name__  # as TRL's model cards name it
    return Trainer


def finished(checkpoint: Path) -> bool:
    """Whether a checkpoint is a run's last step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return bool(state.global_step >= state.max_steps)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Adds peak memory to logs, and tokens a second of the training steps since the last log.

    Attributes:
        rate: tokens a second of all training steps of this process; None before the first log with tokens.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        self._seconds = self._began = 0.0
        self._before = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        more = {f"peak_{where}_gib": round(size / 2**30, 2) for where, size in peak_memory().items()}
        tokens, before = float(logs.get("num_tokens", 0.0)), self._before
        if tokens > before[0] and self._seconds > before[1]:
            more["tokens_per_second"] = round((tokens - before[0]) / (self._seconds - before[1]), 1)
            self.rate, self._before = tokens / self._seconds, (tokens, self._seconds)
        for entry in (logs, state.log_history[-1]):
            entry.update(more)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Within `with`: the first SIGINT, SIGTERM or SIGHUP ends training after the step, with a checkpoint.

    A second one raises KeyboardInterrupt. Signals that are ignored, as SIGHUP is under nohup, stay so.

    Attributes:
        requested: the signal's number; 0: none came.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number
        tqdm.write("stopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = torch.tensor(self.requested)
        if torch.distributed.is_initialized():  # all processes have to stop after the same step
            stop = stop.to(args.device)
            torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
        if stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def first_bad(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Where a loss that is no number comes from: parameters, or the first layer of a forward pass."""
    bad = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        return f"and {len(bad)} trained tensors are not finite, the first is {bad[0]}"
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, out: Any) -> None:
        values = out if isinstance(out, (tuple, list)) else [out]
        floats = (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
        if not all(torch.isfinite(value).all() for value in floats):
            found.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(partial(look, name))  # the run ends here
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    if given:
        with torch.no_grad():
            model(**given)
    return f"the first layer with such numbers is {found[0]}" if found else "but no layer has such results"


def peak_memory() -> dict[str, int]:
    """Most bytes in use so far: "host" (resident set of this process), "gpu" (allocated) if there is one."""
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux gives KiB
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks
