"""What `kt-moe bench --gpu` times: a stack of layers x = x + moe(x), with the hidden states on the GPU.

kt_moe is called as a user calls it. The others are plain torch: the experts of all layers on the GPU, or in
page-locked host memory and copied layer by layer into two slots, the next layer while one is computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import kt_moe
from kt_moe.cli.bench.data import DTYPES, Weights
from kt_moe.cli.bench.gpu_options import GpuSettings
from kt_moe.cli.bench.layer import SCALING
from kt_moe.gpu import Gpu
from kt_moe.gpu.streams import Event, streams_of

Fused = tuple[Tensor, Tensor]  # gate and up [E, 2I, H], down [E, H, I]; bf16

_grouped_mm: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@dataclass(frozen=True)
class StackInputs:
    """Of one step: x and its result's gradient [T, H], and by layer ids and weights [T, K], on the device."""

    x: Tensor
    ids: Sequence[Tensor]
    weights: Sequence[Tensor]
    grad_out: Tensor


class Stack:
    """Layers with LoRA whose steps are timed.

    Args:
        lora: for each layer, tensors that require a gradient.

    Attributes:
        out: of the last step.
        cpu_rows: the part of the routed rows that the CPU computed in it, where kt_moe divided them.
    """

    def __init__(self, name: str, lora: list[dict[str, Tensor]], device: torch.device) -> None:
        self.name, self.lora, self.device = name, lora, device
        self.out: Tensor | None = None
        self.cpu_rows: float | None = None

    @property
    def moved(self) -> int | None:
        """Bytes of experts that went over the link so far; None where that is not known."""
        return None

    def layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]"""
        raise NotImplementedError

    def step(self, inputs: StackInputs) -> tuple[float, float]:
        """Seconds of a forward and of a backward through all layers, the GPU's work included."""
        for leaf in (inputs.x, *inputs.weights, *(t for pairs in self.lora for t in pairs.values())):
            leaf.grad = None
        self.out = None
        synchronize(self.device)
        begin = time.perf_counter()
        x = inputs.x
        for index in range(len(self.lora)):
            x = x + self.layer(index, x, inputs.ids[index], inputs.weights[index])
        synchronize(self.device)
        middle = time.perf_counter()
        x.backward(inputs.grad_out)  # type: ignore[no-untyped-call]
        synchronize(self.device)
        end = time.perf_counter()
        self.out = x.detach()
        return middle - begin, end - middle


class KtStack(Stack):
    """This library; `gpu` is a `kt_moe.Gpu`, or "off" for the CPU alone."""

    def __init__(
        self,
        name: str,
        weights: Weights,
        lora: dict[str, Tensor],
        settings: GpuSettings,
        format: str,
        gpu: Gpu | str,
    ) -> None:
        device = torch.device(settings.device)
        place = torch.device("cpu") if gpu == "off" else torch.device(settings.lora_device)
        super().__init__(name, _leaves(lora, settings, place), device)
        self._gpu, runtime = gpu, settings.runtime()
        self._experts = [
            kt_moe.Experts(*weights, format=format, runtime=runtime, gpu=gpu) for _ in range(settings.layers)
        ]
        for experts in self._experts:
            experts.recompute = settings.recompute

        self._moved = 0

    @property
    def moved(self) -> int | None:
        return None if isinstance(self._gpu, str) else self._moved

    def step(self, inputs: StackInputs) -> tuple[float, float]:
        seconds = super().step(inputs)
        engine = None if isinstance(self._gpu, str) else self._gpu.engine(inputs.x.device)
        if engine is not None:
            passes = engine.log.last.values()  # the last forward and backward of every layer
            self._moved += sum(one.bytes_moved for one in passes)
            cpu, gpu = (sum(getattr(one, name) for one in passes) for name in ("cpu_rows", "gpu_rows"))
            self.cpu_rows = cpu / (cpu + gpu)
        return seconds

    def layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return kt_moe.moe(x, ids, weights, self._experts[index], self.lora[index], scaling=SCALING)


class TorchStack(Stack):
    """Plain torch; backward computes a layer again, as gradient checkpointing would."""

    def __init__(
        self, name: str, base: Resident | Streamed, lora: dict[str, Tensor], settings: GpuSettings
    ) -> None:
        device = torch.device(settings.device)
        super().__init__(name, _leaves(fuse_lora(lora), settings, device), device)
        self._base = base

    @property
    def moved(self) -> int | None:
        return self._base.moved

    def layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = _Recomputed.apply(x, ids, weights, self._base, index, *self.lora[index].values())  # type: ignore[no-untyped-call]
        return out


class Resident:
    """The frozen weights of all layers on the device."""

    moved = 0

    def __init__(self, weights: Weights, layers: int, device: torch.device) -> None:
        self._layers = [fuse(weights, device=device) for _ in range(layers)]

    def take(self, index: int) -> Fused:
        """A layer's weights on the device."""
        return self._layers[index]

    def done(self, index: int, step: int) -> None:
        """The work that reads them has been launched; the next layer is `index + step`."""


class Streamed:
    """Layers in page-locked memory and two slots on the device, one of which is filled while one is used.

    A layer that is still in its slot is not copied again: the last two when backward begins, and the first
    two when the next step does.
    """

    def __init__(self, weights: Weights, layers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = [fuse(weights, pin_memory=pinned) for _ in range(layers)]
        self._slots = [[torch.empty_like(t, device=device) for t in self._host[0]] for _ in range(2)]
        self._holds: list[int | None] = [None, None]
        self._streams = streams_of(device)
        self._filled: list[Event] = [self._streams.record() for _ in range(2)]
        self._read: list[Event] = [self._streams.record() for _ in range(2)]
        self.moved = 0

    def take(self, index: int) -> Fused:
        self._fetch(index)
        self._streams.wait(self._filled[index % 2])
        gate_up, down = self._slots[index % 2]
        return gate_up, down

    def done(self, index: int, step: int) -> None:
        self._read[index % 2] = self._streams.record()
        if 0 <= index + 2 * step < len(self._host):
            self._fetch(index + 2 * step)

    def _fetch(self, index: int) -> None:
        slot = index % 2
        if self._holds[slot] == index:
            return
        self._streams.wait(self._read[slot], "link")
        with self._streams.on("link"):
            for there, here in zip(self._slots[slot], self._host[index], strict=True):
                there.copy_(here, non_blocking=True)
                self.moved += here.nbytes
        self._filled[slot] = self._streams.record("link")
        self._holds[slot] = index


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        base: Resident | Streamed,
        index: int,
        *lora: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, ids, weights, *lora)
        ctx.base, ctx.index = base, index
        out = grouped_experts(x, ids, weights, base.take(index), lora)
        base.done(index, 1)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, *lora = ctx.saved_tensors
        x, weights, *lora = (t.detach().requires_grad_() for t in (x, weights, *lora))
        with torch.enable_grad():
            out = grouped_experts(x, ids, weights, ctx.base.take(ctx.index), lora)
        grad_x, grad_weights, *grads = torch.autograd.grad(out, [x, weights, *lora], grad_out)
        ctx.base.done(ctx.index, -1)
        return grad_x, None, grad_weights, None, None, *grads


def grouped_experts(x: Tensor, ids: Tensor, weights: Tensor, base: Fused, lora: Sequence[Tensor]) -> Tensor:
    """A layer's experts by torch's grouped_mm, without waiting for the device.

    Args:
        x: [T, H] bf16.
        ids, weights: [T, K].
        lora: those of `fuse_lora`, computed in bf16.
    """
    gate_up, down = base
    a_gate_up, b_gate, b_up, a_down, b_down = (t.bfloat16() for t in lora)
    tokens, topk = ids.shape
    of_row, order = ids.flatten().sort(stable=True)
    every = torch.arange(len(down), device=ids.device)
    ends = torch.searchsorted(of_row, every, right=True, out_int32=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))

    def multiply(rows: Tensor, matrices: Tensor) -> Tensor:
        product: Tensor = _grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
        return product

    rows = x.index_select(0, order // topk)
    low_gate, low_up = (multiply(rows, a_gate_up) * SCALING).chunk(2, -1)
    gate, up = multiply(rows, gate_up).chunk(2, -1)
    h = functional.silu(gate + multiply(low_gate, b_gate)) * (up + multiply(low_up, b_up))
    y = multiply(h, down) + multiply(multiply(h, a_down) * SCALING, b_down)
    y = y.index_select(0, place).view(tokens, topk, -1)
    return torch.bmm(weights.to(y.dtype).unsqueeze(1), y).squeeze(1)


def fuse(weights: Weights, **place: Any) -> Fused:
    """A copy of the weights with gate above up, in new memory where `torch.empty` puts it."""
    gate, up, down = weights
    e, i, h = gate.shape
    gate_up = torch.empty(e, 2 * i, h, dtype=gate.dtype, **place)
    gate_up[:, :i], gate_up[:, i:] = gate, up
    return gate_up, torch.empty(down.shape, dtype=down.dtype, **place).copy_(down)


def fuse_lora(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """kt_moe's six LoRA tensors as `grouped_experts` has them: the A of gate above that of up, [E, 2r, H]."""
    return {
        "a_gate_up": torch.cat([lora["gate_lora_a"], lora["up_lora_a"]], 1),
        "b_gate": lora["gate_lora_b"],
        "b_up": lora["up_lora_b"],
        "a_down": lora["down_lora_a"],
        "b_down": lora["down_lora_b"],
    }


def _leaves(lora: dict[str, Tensor], settings: GpuSettings, device: torch.device) -> list[dict[str, Tensor]]:
    dtype = DTYPES[settings.lora_dtype]
    return [
        {name: tensor.to(device, dtype, copy=True).requires_grad_() for name, tensor in lora.items()}
        for _ in range(settings.layers)
    ]


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
