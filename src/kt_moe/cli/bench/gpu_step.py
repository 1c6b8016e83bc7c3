"""Whole training steps of `kt-moe bench --gpu --step`, each contestant in a process of its own.

One after the other, because most would not fit into memory beside another.
"""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from kt_moe.cli.bench.data import DTYPES, make_weights
from kt_moe.cli.bench.gpu_options import GpuSettings
from kt_moe.cli.bench.gpu_stack import synchronize
from kt_moe.cli.bench.peer_process import PeerError
from kt_moe.cli.bench.report import OURS
from kt_moe.host_memory import resident

LEARNING_RATE = 1e-4
_WARM_UP = 4  # steps that are not timed: RoundPipe's plan follows from the first three
_PATIENCE = 540.0  # seconds for all cases of a contestant


@dataclass(frozen=True)
class StepJob:
    """A contestant, and the format of kt_moe's experts."""

    who: str
    format: str
    settings: GpuSettings

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.who} {self.format}" if self.who == OURS else self.who


def make_trainer(job: StepJob) -> Any:
    """What the job names; its `step` is a training step on tokens [B, S] of the CPU, and gives the loss."""
    if job.who == "roundpipe":
        from kt_moe.cli.bench.gpu_roundpipe import RoundPipeTrainer  # needs a package that few have

        return RoundPipeTrainer(job.settings)
    return _TorchTrainer(job)


class _TorchTrainer:
    """kt_moe, or everything on the GPU in plain torch: gradient checkpointing, AdamW where parameters lie."""

    def __init__(self, job: StepJob) -> None:
        from kt_moe.cli.bench import gpu_model  # transformers and PEFT, which take seconds to import

        settings, self._loss = job.settings, gpu_model.next_token_loss
        self._device = torch.device(settings.device)
        weights = make_weights(settings.shape, settings.seed)
        if job.who == "resident":
            model = gpu_model.torch_model(weights, settings, self._device, DTYPES[settings.lora_dtype])
        else:
            gpu = settings.gpu() if job.who == OURS else "off"
            model = gpu_model.kt_model(weights, settings, job.format, gpu)
        self._model = gpu_model.with_checkpoints(model)
        if settings.compile:
            gpu_model.with_compiled_attention(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        on_device = [p for p in trained if p.device.type == self._device.type]
        self._optimizer = torch.optim.AdamW(on_device, lr=LEARNING_RATE, fused=True)
        for parameter in trained:
            if parameter.device.type != self._device.type:
                _update_in_backward(parameter)

    def step(self, ids: Tensor) -> float:
        ids = ids.to(self._device)
        hidden = self._model.model(input_ids=ids).last_hidden_state
        loss = self._loss(hidden, self._model.lm_head.weight, ids)
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()
        synchronize(self._device)
        return float(loss.detach())


def _update_in_backward(parameter: Tensor) -> None:
    """Let backward update a parameter of the host as soon as its gradient is there.

    The GPU goes on with the layers before it meanwhile. Backward reads the parameter no more.
    """
    optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, fused=True)

    def update(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]


def run_job(job: StepJob) -> list[dict[str, Any]]:
    """A result for each number of tokens, as JSON takes it."""
    begin, settings = time.perf_counter(), job.settings
    trainer = make_trainer(job)
    build_seconds = time.perf_counter() - begin
    device = torch.device(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    found = []
    for tokens in settings.tokens:
        size = (max(1, tokens // settings.sequence), min(tokens, settings.sequence))
        seconds, losses = [], []
        for number in range(_WARM_UP + settings.reps):
            if number == _WARM_UP and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            ids = torch.randint(settings.vocabulary, size, generator=generator)
            begin = time.perf_counter()
            losses.append(trainer.step(ids))
            seconds.append(time.perf_counter() - begin)
        found.append({
            "who": job.name,
            "tokens": size[0] * size[1],
            "seconds": seconds[_WARM_UP:],
            "losses": losses,
            "gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            "host_bytes": resident("VmHWM"),
            "build_seconds": build_seconds,
        })  # fmt: skip
    return found


def run_in_child(job: StepJob) -> list[dict[str, Any]]:
    """`run_job` in a new process, which leaves no memory behind.

    Raises:
        PeerError: it failed, or gave no answer; the message says why.
    """
    # Torch's threads that spin behind their loops take the cores of those that launch kernels.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_PATIENCE):
            raise PeerError(f"gave no answer in {_PATIENCE:.0f} s")
        ok, answer = ours.recv()
    except EOFError:
        process.join()
        raise PeerError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if not ok:
        raise PeerError(answer)
    found: list[dict[str, Any]] = answer
    return found


def _serve(pipe: Connection, job: StepJob) -> None:
    try:
        pipe.send((True, run_job(job)))
    except Exception as error:  # whatever a contestant raises is its result
        traceback.print_exc()
        pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
