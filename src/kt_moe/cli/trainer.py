"""What kt-moe adds to TRL's trainers: see `extended`."""

from __future__ import annotations

import copy
import re
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerState

from kt_moe.cli.errors import UserError
from kt_moe.cli.output import finished

if TYPE_CHECKING:
    from kt_moe.cli.job import Job

_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer$|\.default$")  # what PEFT adds to names


class StoppedError(Exception):
    """A signal ended training after a step, with a checkpoint."""


def extended(base: type, job: Job) -> type:
    """A TRL trainer class whose runs

    - write their adapter whole or not at all, after `Job.report`;
    - stop at a loss that is no number, and say at which step and in which layer it came up;
    - count documents that the length cuts or drops (SFT);
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
            if job.command != "sft" or not hasattr(dataset, "with_format") or len(more) != 3 or named:
                return super()._prepare_dataset(dataset, tokenizer, args, *more, **named)
            packing, formatting, name = more
            untruncated = copy.copy(args)
            untruncated.max_length, untruncated.shuffle_dataset = None, False
            whole = super()._prepare_dataset(dataset, tokenizer, untruncated, False, formatting, name)
            cuts = args.max_length is not None and (not packing or args.packing_strategy == "bfd")
            if cuts and (said := losses_by_length(whole, args.max_length, args.truncation_mode, packing)):
                job.say(f"{name:<9} {said}")
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
                raise StoppedError
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


class Clock(TrainerCallback):  # type: ignore[misc]
    """Adds peak memory to logs, and tokens a second of the training steps since the last log.

    Attributes:
        tokens, seconds: of all training steps of this process; evaluation and saving are not in it.
    """

    def __init__(self) -> None:
        self.tokens = self.seconds = self._began = 0.0
        self._before = (0.0, 0.0)

    @property
    def rate(self) -> float | None:
        """Tokens a second; None where nothing was trained or the trainer counts no tokens."""
        return self.tokens / self.seconds if self.seconds and self.tokens else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        more = {f"peak_{where}_gib": round(size / 2**30, 2) for where, size in peak_memory().items()}
        self.tokens = float(logs.get("num_tokens", 0.0))
        tokens, seconds = self.tokens - self._before[0], self.seconds - self._before[1]
        if tokens > 0 and seconds > 0:
            more["tokens_per_second"] = round(tokens / seconds, 1)
        self._before = self.tokens, self.seconds
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
        if _any_process(self.requested, args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def _any_process(number: int, device: torch.device) -> bool:
    """Whether a number is not 0 in some process: all have to stop after the same step."""
    if not torch.distributed.is_initialized():
        return number != 0
    found = torch.tensor(number, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def losses_by_length(rows: Any, length: int, mode: str, packing: bool = False) -> str:
    """What `length` takes away from rows with "input_ids" and "labels", for people; empty: nothing.

    mode: "keep_start" or "keep_end", as TRL's truncation_mode.
    """
    kept = slice(None, length) if mode == "keep_start" else slice(-length, None)
    longer = dropped = lost = tokens = 0
    for row in rows.select_columns(["input_ids", "labels"]):
        size = len(row["input_ids"])
        tokens += size
        if size > length:
            longer += 1
            lost += size - length
            dropped += all(label == -100 for label in row["labels"][kept])
    if not longer:
        return ""
    said = f"{longer:,} of {len(rows):,} documents are longer than {length} tokens and "
    said += f"lose {lost:,} of {tokens:,} tokens"
    if dropped and not packing:
        said += f"; of {dropped:,} nothing is left to learn, they are dropped"
    return said + " (--long_text cut, or --packing --packing_strategy bfd_split, keeps all of a text)"


def first_bad(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Where a loss that is no number comes from: parameters, or the first layer of a forward pass."""
    bad = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        return f"and {len(bad)} trained tensors are not finite, the first is {_WRAPPERS.sub('', bad[0])}"
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, out: Any) -> None:
        values = out if isinstance(out, (tuple, list)) else [out]
        floats = (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
        if not all(torch.isfinite(value).all() for value in floats):
            found.append(_WRAPPERS.sub("", name) or type(module).__name__)

    for name, module in model.named_modules():
        module.register_forward_hook(partial(look, name))  # the run ends here
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        model(**{name: inputs[name] for name in names if name in inputs})
    return (
        f"the first layer with such numbers is {found[0]}" if found else "but all layers' results are finite"
    )


def peak_memory() -> dict[str, int]:
    """Most bytes in use so far: "host" (resident set of this process), "gpu" (allocated) if there is one."""
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux gives KiB
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks
