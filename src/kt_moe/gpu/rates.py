"""Measures how fast this machine moves and computes a layer's experts, for `plan.cut`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kt_moe import _core
from kt_moe.gpu.plan import Rates, row_flops
from kt_moe.gpu.products import Groups, Matrices, Term
from kt_moe.gpu.streams import streams_of

if TYPE_CHECKING:
    from kt_moe.experts import Experts

_EXPERTS = 8
_FEW_ROWS, _MANY_ROWS = 2, 128
_COPY_BYTES = 64 << 20
_PRODUCTS = 20  # one after the other, so that launching them takes no part
_NO_LORA: _core.LoraTensors = (None,) * 6


def measure(experts: Experts, device: torch.device) -> Rates:
    """Rates for layers like this one; takes less than a second once kernels are compiled.

    They are rounded to the nearest power of 2^(1/4), so that most runs on a machine get the same. For the
    same cuts in every run, give `kt_moe.Gpu` the rates.
    """
    return Rates(**cpu_rates(experts), **gpu_rates(experts, device))


def cpu_rates(experts: Experts) -> dict[str, float]:
    """The CPU's part of `measure`: "cpu_flops" and "cpu_bytes"."""
    return _rounded(zip(("cpu_flops", "cpu_bytes"), _cpu(experts), strict=True))


def gpu_rates(experts: Experts, device: torch.device) -> dict[str, float]:
    """The GPU's part of `measure`: "gpu_flops", "gpu_bytes" and "link"."""
    return _rounded(zip(("gpu_flops", "gpu_bytes", "link"), _gpu(experts, device), strict=True))


def _rounded(rates: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {name: 2.0 ** (round(4 * math.log2(rate)) / 4) for name, rate in rates}


def _best(work: Callable[[int], object], finish: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest of three runs, after one."""
    seconds = []
    for run in range(4):
        begin = time.perf_counter()
        work(run)
        finish()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _cpu(experts: Experts) -> tuple[float, float]:
    """Floating-point operations and bytes of weights a second, of forward and backward together."""
    number = min(_EXPERTS, experts.num_experts)
    few, many = (_pass_seconds(experts, number, rows) for rows in (_FEW_ROWS, _MANY_ROWS))
    row = max(many - few, 0.1 * many) / (number * (_MANY_ROWS - _FEW_ROWS))
    width, hidden = experts.intermediate_size, experts.hidden_size
    flops = sum(row_flops(hidden, width, 0, backward, False, experts.gated) for backward in (False, True))
    return flops / row, 2 * experts.nbytes / experts.num_experts * number / few


def _pass_seconds(experts: Experts, number: int, rows: int) -> float:
    """Each run has other experts, as far as there are more, so that their weights come from memory."""
    x = _normal(torch.device("cpu"), number * rows, experts.hidden_size)
    first = (
        torch.arange(number, dtype=torch.int32, device="cpu").repeat_interleave(rows)[:, None].contiguous()
    )
    weights = torch.ones(len(x), 1, dtype=torch.float32, device="cpu")
    out, dx = torch.empty_like(x), torch.empty_like(x)
    saved = torch.empty(len(x), experts._saved_width, dtype=torch.bfloat16, device="cpu")
    scalings = (1.0, 1.0, 1.0)

    def work(run: int) -> None:
        ids = ((first + run * number) % experts.num_experts).contiguous()
        _core.forward(experts._core, x, ids, weights, _NO_LORA, scalings, 0.0, 0, saved, out)
        _core.backward(
            experts._core, x, ids, weights, _NO_LORA, scalings, 0.0, 0, saved, out, dx, None, _NO_LORA
        )

    before = experts.routed
    seconds = _best(work)
    experts._routed_elsewhere += (before - experts.routed).numpy()  # these were nobody's
    return seconds


def _gpu(experts: Experts, device: torch.device) -> tuple[float, float, float]:
    """Operations and bytes of memory a second on the device, and bytes a second over the link."""
    streams = streams_of(device)

    def finish() -> None:
        streams.record().synchronize()

    number = min(_EXPERTS, experts.num_experts)
    width, hidden = experts.intermediate_size, experts.hidden_size
    groups = Groups([512] * number, streams.upload)
    x = _normal(device, groups.rows, hidden)
    index = torch.arange(number, dtype=torch.int32, device=device)
    matrices = Matrices(_normal(device, number, width, hidden), index)
    out = torch.empty(groups.rows, width, dtype=torch.bfloat16, device=device)

    def multiply(_: int) -> None:
        for _ in range(_PRODUCTS):
            streams.products.grouped_gemm([Term(x, matrices, True)], groups, out)

    flops = _PRODUCTS * 2 * groups.rows * width * hidden / _best(multiply, finish)

    on_device, other = (torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    moved = 2 * _COPY_BYTES / _best(lambda _: _copy(other, on_device), finish)
    return flops, moved, link_rate(device)


def link_rate(device: torch.device) -> float:
    """Bytes a second from page-locked memory to the device."""
    streams = streams_of(device)
    host = streams.host_empty((_COPY_BYTES,), torch.uint8)
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    return _COPY_BYTES / _best(lambda _: _copy(there, host), lambda: streams.record().synchronize())


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source, non_blocking=True)


def _normal(device: torch.device, *shape: int) -> Tensor:
    """Random numbers in bf16 that leave torch's own generators as they are."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=device).bfloat16()
