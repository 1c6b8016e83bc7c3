"""Other libraries as contestants of `kt-moe bench --peers docs/rivals.py:NAME`, each in a process of its own.

kt_kernel: https://github.com/kvcache-ai/ktransformers, bf16 fine-tuning; pip install kt-kernel==0.7.2
roundpipe: https://github.com/ITcarrot/RoundPipe, of --step; pip install roundpipe==0.1.1

The process is stopped between calls: its threads cannot spin on the cores of others.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import importlib.util
import os
import runpy
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import kt_moe
from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.layers import SCALING, OneLayer, Step, make_inputs, make_weights
from kt_moe.cli.bench.training import (
    LEARNING_RATE,
    Trainer,
    lora_config,
    next_token_loss,
    put_grouped,
    skeleton,
)
from kt_moe.functional import LORA_NAMES

_PATIENCE = 600.0  # seconds for one call; threads that hang end here
_PR_SET_PDEATHSIG = 1


def kt_kernel(settings: argparse.Namespace) -> Remote:
    """kt-kernel's layer by all threads."""
    return Remote(KtKernel, kt_moe.default_runtime().threads, settings)


def kt_kernel_fewer(settings: argparse.Namespace) -> Remote:
    """The same by one thread less: its caller spins beside its pool."""
    return Remote(KtKernel, max(1, kt_moe.default_runtime().threads - 1), settings)


def roundpipe(settings: argparse.Namespace) -> Remote:
    """RoundPipe's training steps."""
    return Remote(round_pipe, settings)


class RemoteError(Exception):
    """The object could not do what was asked; the message says why."""


class Remote:
    """What `make(*args)` gives in a new process, where its methods run.

    Arguments and results are pickled; tensors must not be among them, because their memory would have to be
    handed over by a process that is stopped.

    Making it and calls raise RemoteError where the object does or its process ends.
    """

    def __init__(self, make: Callable[..., object], *args: object) -> None:
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        atexit.register(self._process.kill)  # before multiprocessing waits there for one that is stopped
        self._ask(None, make, *args)

    def __del__(self) -> None:
        self._process.kill()  # reaches a stopped process too

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self._ask(method, *args)

    def _ask(self, method: str | None, *args: object) -> Any:
        assert self._process.pid is not None
        try:
            os.kill(self._process.pid, signal.SIGCONT)
            self._here.send((method, args))
            if not self._here.poll(_PATIENCE):
                raise TimeoutError(f"no answer for {_PATIENCE:g} s")
            failed, answer = self._here.recv()
            os.kill(self._process.pid, signal.SIGSTOP)
        except (EOFError, OSError) as error:
            raise RemoteError(f"its process ended or hangs: {error}") from None
        if failed:
            raise RemoteError(answer)
        return answer


def _serve(pipe: Connection) -> None:
    """In its process: make the object, then call its methods."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process too ends with its parent
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what it prints would stand in our table
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that waits for us
    torch.set_num_threads(kt_moe.default_runtime().threads)
    made: Any = None
    while True:
        method, args = pipe.recv()
        try:
            if method is None:
                made, answer = args[0](*args[1:]), None
            else:
                answer = getattr(made, method)(*args)
            pipe.send((False, answer))
        except Exception as error:  # whatever it raises is its answer
            pipe.send((True, f"{type(error).__name__}: {error}"))


class KtKernel(OneLayer):
    """kt-kernel 0.7's bf16 fine-tuning layer, with the variant that it picks for this CPU."""

    def __init__(self, threads: int, settings: argparse.Namespace) -> None:
        super().__init__(lambda *_: torch.empty(0))
        self._base, self._max_tokens = make_weights(settings.shape), max(settings.tokens)
        # Only its extension is loaded: what the package around it imports is not needed for one layer.
        spec = importlib.util.find_spec("kt_kernel")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'kt_kernel'")
        self._ext, _ = runpy.run_path(str(Path(spec.origin).parent / "_cpu_detect.py"))["initialize"]()
        pool = self._ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._pool = self._ext.CPUInfer(pool)
        self._layer: Any = None

    def prepare(self, case: Case) -> None:
        self._variants, self._inputs = case.variants, (inputs := make_inputs(case))
        if not inputs.lora:
            raise ValueError("no LoRA rank 0")
        if self._layer is None:
            self._pairs = {name: tensor.bfloat16().contiguous() for name, tensor in inputs.lora.items()}
            self._layer = self._build(case)
        self._tokens = torch.tensor([case.tokens], dtype=torch.int32)
        leaves = {"out": inputs.hidden_states, "hidden_states": inputs.hidden_states}
        leaves |= {"topk_weights": inputs.routes[0][1], **self._pairs}
        self._results = {name: torch.full_like(tensor, torch.nan) for name, tensor in leaves.items()}

    def _build(self, case: Case) -> Any:
        shape = case.shape
        config = self._ext.moe.MOESFTConfig(shape.experts, shape.topk, shape.hidden, shape.intermediate)
        config.max_len, config.max_cache_depth, config.layer_idx = self._max_tokens, 1, 0
        config.lora_rank, config.lora_alpha = case.rank, SCALING * case.rank
        config.authoritative_optimizer_grads = True
        self._expert_map = torch.arange(shape.experts)
        config.physical_to_logical_map = self._expert_map.data_ptr()
        names = ("gate_proj", "up_proj", "down_proj")
        for name, tensor in {**dict(zip(names, self._base, strict=True)), **self._pairs}.items():
            setattr(config, name, tensor.data_ptr())
        config.pool = self._pool.backend_
        layer = self._ext.moe.AMXBF16_SFT_MOE(config)  # the name for every x86 variant, AMX or not
        layer.load_weights()
        return layer

    def step(self, variant: int) -> Step:
        (ids, weights), inputs = self._inputs.routes[variant], self._inputs
        at = {name: tensor.data_ptr() for name, tensor in self._results.items()}
        begin = time.perf_counter()
        self._layer.forward_sft(
            self._tokens.data_ptr(), ids.shape[1], ids.data_ptr(), weights.data_ptr(),
            inputs.hidden_states.data_ptr(), at["out"], True,
        )  # fmt: skip
        middle = time.perf_counter()
        self._layer.backward(
            inputs.grad_out.data_ptr(), at["hidden_states"], *(at[name] for name in LORA_NAMES),
            at["topk_weights"], 0, 0, 0, False, 1.0,
        )  # fmt: skip
        return middle - begin, time.perf_counter() - middle


def round_pipe(settings: argparse.Namespace) -> Trainer:
    """Training steps by RoundPipe 0.1.1, as its documentation has it.

    It keeps all weights in page-locked memory, copies layer after layer to the GPU, keeps hidden states of
    the layers on the host, computes a layer again in backward, and updates on the CPU. What differs from
    kt_moe here: LoRA is bf16 on the GPU with fp32 copies for its optimizer; that runs while the next step
    does, which so uses parameters one update older; a step is two microbatches where there are two rows. Its
    ready-made wrapper of Qwen3-MoE calls transformers by arguments that transformers 5 has dropped, so the
    layers are listed here.
    """
    import roundpipe  # before a model is made

    model = skeleton(settings).to("cpu")
    peft.get_peft_model(model, lora_config(settings), autocast_adapter_dtype=False)
    put_grouped(model, settings, pin_memory=settings.device == "cuda")
    for layer in model.model.layers:
        layer.mlp.experts.bfloat16()
    layers = [_First(model.model), *map(_Middle, model.model.layers), _Last(model)]
    pipe = roundpipe.RoundPipe(nn.Sequential(*layers), optim_dtype=torch.float32, name="qwen3_moe")
    decay = {"weight_decay": 0.01, "decoupled_weight_decay": True}
    adam = roundpipe.optim.Adam(list(pipe.optim_parameters()), lr=LEARNING_RATE, **decay)

    def update() -> None:
        adam.step()
        adam.zero_grad()

    def step(ids: Tensor) -> float:
        parts = min(2, len(ids))
        config = roundpipe.RoundPipeRunConfig(num_microbatch=parts)
        loss = pipe.forward_backward(input_args=(ids,), run_config=config)
        pipe.step(update)  # at once: the update runs beside the next step
        return float(loss) / parts  # it is the sum of theirs

    return Trainer(step, settings)


class _First(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens, self.rotary_emb = model.embed_tokens, model.rotary_emb

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        hidden = self.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return hidden, *self.rotary_emb(hidden, positions), ids


class _Middle(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, cosines, sines, ids = state
        return self.layer(hidden, position_embeddings=(cosines, sines)), cosines, sines, ids


class _Last(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, state: tuple[Tensor, ...]) -> Tensor:
        return next_token_loss(self.norm(state[0]), self.lm_head.weight, state[-1])
