"""The experts of a call that the CPU computes, by the core, in a thread of their own while the GPU works."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kt_moe import _core
from kt_moe.gpu import lora as lora_transfer
from kt_moe.gpu.lora import LoraCall
from kt_moe.gpu.streams import Event, Streams
from kt_moe.tensors import empty, on_cpu

if TYPE_CHECKING:
    from kt_moe.experts import Experts


class Job:
    """Work for a `Worker`."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._running = threading.Lock()
        self._running.acquire()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do it; its exception is `wait`'s."""
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._running.release()

    def wait(self) -> None:
        """Let the calling thread wait until it is done."""
        with self._running:
            pass
        if self._error is not None:
            raise self._error


class Worker:
    """One thread that does jobs in order. A forked child starts its own.

    Locks and a queue in C: an interrupt inside of Python's own executors can leave their locks held.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = 0

    def submit(self, work: Callable[[], None]) -> Job:
        """Do it behind what was submitted before."""
        if self._thread is None or self._process != os.getpid():
            jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
            thread = threading.Thread(target=_serve, args=(jobs,), name="kt_moe_cpu", daemon=True)
            weakref.finalize(self, jobs.put, None).atexit = False
            _workers.add(self)
            thread.start()  # an interrupt may come here; then the next job has another thread
            self._jobs, self._process, self._thread = jobs, os.getpid(), thread
        job = Job(work)
        self._jobs.put(job)
        return job

    def wait(self) -> None:
        """Let the calling thread wait for the jobs so far; their exceptions are for who waits for them."""
        if self._thread is not None and self._process == os.getpid():
            self.submit(lambda: None).wait()

    def finish(self) -> None:
        """End the thread behind its jobs."""
        thread, self._thread = self._thread, None
        if thread is not None and self._process == os.getpid():
            self._jobs.put(None)
            thread.join()


def _serve(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # and with it the tensors of its call


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _finish_workers() -> None:
    """The core must not write into tensors that the interpreter has freed."""
    for worker in list(_workers):
        worker.finish()


@dataclass
class CpuPart:
    """Inputs of the core for the CPU's experts of a call, on the host, and what backward needs again.

    Attributes:
        tokens: [T'] int64 on the device, those that have such an expert; None: all T.
        x: [T', H] bf16.
        ids: [T', K] int32, E for routes of the GPU.
        weights: [T', K] fp32.
        matrices: LoRA A and B.
        arrived: behind the copies of x, weights and matrices; None once a forward has used them.
        saved: what the core's forward keeps for its backward.
    """

    tokens: Tensor | None
    x: Tensor
    ids: Tensor
    weights: Tensor
    lora: LoraCall
    matrices: _core.LoraTensors
    arrived: Event | None
    saved: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the user's own LoRA matrices, for `from_tensors`."""
        copies = (
            None if mine is None or mine is theirs else mine
            for mine, theirs in zip(self.matrices, self.lora.tensors, strict=True)
        )
        return self.tokens, self.x, self.ids, self.weights, self.saved, *copies

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor | None], lora: LoraCall) -> CpuPart:
        """A part for backward."""
        tokens, x, ids, weights, saved, *copies = tensors
        matrices = tuple(
            None if theirs is None else on_cpu(theirs) if copy is None else copy
            for copy, theirs in zip(copies, lora.tensors, strict=True)
        )
        return cls(
            tokens, cast(Tensor, x), cast(Tensor, ids), cast(Tensor, weights), lora,
            cast("_core.LoraTensors", matrices), None, saved,
        )  # fmt: skip


def send(
    experts: Experts,
    on_cpu: Sequence[int],
    ids: NDArray[np.integer],
    x: Tensor,
    weights: Tensor,
    lora: LoraCall,
    matrices: Sequence[Tensor | None],
    save: bool,
    streams: Streams,
) -> CpuPart:
    """Gather the tokens that have an expert of the CPU on the device, and send them to the host.

    Args:
        on_cpu: the CPU's experts, at least one.
        ids: [T, K] on the host.
        x, weights: [T, H] bf16 and [T, K] fp32 on the device.
        matrices: LoRA's on the device, as `lora.each_tensor` has them.
        save: whether a backward will follow.
    """
    here = np.zeros(experts.num_experts + 1, dtype=bool)
    here[list(on_cpu)] = True
    chosen = here[ids]
    of_cpu = np.flatnonzero(chosen.any(axis=1))
    tokens = None
    # The dropout mask is a function of the place in topk_ids, which other rows would change.
    if lora.dropout == 0.0 and len(of_cpu) < len(ids):
        ids, chosen = ids[of_cpu], chosen[of_cpu]
        tokens = streams.upload(of_cpu.astype(np.int64))
        x, weights = x.index_select(0, tokens), weights.index_select(0, tokens)
    core_ids = np.where(chosen, ids, experts.num_experts).astype(np.int32)
    saved = None
    if save and not experts.recompute:
        width = experts._saved_width + sum(lora.ranks)
        saved = empty((int(chosen.sum()), width), torch.bfloat16, experts.runtime._core)
    streams.wait(streams.record(), "downlink")
    return CpuPart(
        tokens,
        streams.to_host(x),
        torch.from_numpy(core_ids),
        streams.to_host(weights),
        lora,
        lora_transfer.to_host(lora, matrices, streams),
        streams.record("downlink"),
        saved,
    )


class Pending:
    """A forward or backward of the core that is under way in the worker.

    Args:
        job: which it is.
        results: rows in host memory that it writes, or None.
    """

    def __init__(self, job: Job, part: CpuPart, results: Sequence[Tensor | None], streams: Streams) -> None:
        self._job, self._part, self._results, self._streams = job, part, results, streams

    def add_to(self, *totals: Tensor | None) -> None:
        """Wait for it and add its rows to fp32 tensors of all T tokens on the device, one for each result."""
        with self._streams.span("host", "wait_cpu"):
            self._job.wait()
        for total, rows in zip(totals, self._results, strict=True):
            if total is not None and rows is not None:
                with self._streams.span("uplink", "copy_in", rows.nbytes):
                    self._streams.products.add_from_host(total, rows, self._part.tokens)
                self._streams.keep(rows)


def submit_forward(experts: Experts, part: CpuPart, worker: Worker, streams: Streams) -> Pending:
    """Start the forward, whose result is out [T, H]."""
    out = streams.host_empty(tuple(part.x.shape), torch.float32)

    def compute() -> None:
        if part.arrived is not None:
            with streams.span("CPU part", "wait_rows"):
                part.arrived.synchronize()
        with streams.span("CPU part", "cpu_forward"):
            _core.forward(
                experts._core, part.x, part.ids, part.weights, part.matrices, part.lora.scalings,
                part.lora.dropout, part.lora.seed, part.saved, out,
            )  # fmt: skip

    return Pending(worker.submit(compute), part, [out], streams)


def submit_backward(
    experts: Experts,
    part: CpuPart,
    dout: Tensor,
    needs_x: bool,
    needs_weights: bool,
    lora_grads: Sequence[Tensor | None],
    clear_idle: bool,
    worker: Worker,
    streams: Streams,
) -> Pending:
    """Start the backward, whose results are dX [T, H] and dw [T, K].

    Args:
        dout: [T, H] bf16 on the device.
        lora_grads: on the host, written for the CPU's experts, and with zeros for others if `clear_idle`.
    """
    if part.tokens is not None:
        dout = dout.index_select(0, part.tokens)
    streams.wait(streams.record(), "downlink")
    dout_host = streams.to_host(dout)
    arrived = streams.record("downlink")
    dx = streams.host_empty(tuple(part.x.shape), torch.float32) if needs_x else None
    dw = streams.host_empty(tuple(part.weights.shape), torch.float32) if needs_weights else None

    def compute() -> None:
        with streams.span("CPU part", "wait_rows"):
            arrived.synchronize()
        with streams.span("CPU part", "cpu_backward"):
            _core.backward(
                experts._core, part.x, part.ids, part.weights, part.matrices, part.lora.scalings,
                part.lora.dropout, part.lora.seed, part.saved, dout_host, dx, dw,
                cast("_core.LoraTensors", tuple(lora_grads)), clear_idle=clear_idle,
            )  # fmt: skip

    return Pending(worker.submit(compute), part, [dx, dw], streams)
