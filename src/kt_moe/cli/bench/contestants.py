"""Implementations of the routed experts: this library, plain PyTorch, and kt-kernel.

Each is one layer, or a stack of layers x = x + moe(x), on the CPU or with its hidden states on a GPU.
"""

from __future__ import annotations

import importlib.util
import runpy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

import kt_moe
from kt_moe.cli.bench.cases import SCALING, Case, Inputs, Weights, make_inputs
from kt_moe.functional import LORA_NAMES
from kt_moe.gpu import Gpu
from kt_moe.gpu.streams import Event, streams_of

Step = tuple[float, float]  # seconds of forward and of backward
Fused = tuple[Tensor, Tensor]  # gate above up [E, 2I, H], down [E, H, I]; bf16


class Contestant:
    """Layers as a differentiable function of tensors; everyone is timed through this.

    Args:
        device: of the hidden states; `lora_device` of the LoRA tensors.
        residual: whether a layer adds to its input.
    """

    dtype: torch.dtype | None = None  # of hidden states and routing weights; None: as the inputs have it
    lora_dtype: torch.dtype | None = None
    standing = 0  # bytes on the device between steps
    _taken = 0

    def __init__(self, device: str = "cpu", lora_device: str = "cpu", residual: bool = False) -> None:
        self.device, self._lora_device, self._residual = torch.device(device), lora_device, residual
        self._given: dict[str, Tensor] | None = None

    def layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]"""
        raise NotImplementedError

    def prepare(self, case: Case) -> list[int]:
        """Get ready for the steps of a case; the digest of its inputs. ValueError: it cannot be run."""
        inputs, device = make_inputs(case), self.device
        self._x = inputs.hidden_states.to(device, self.dtype).detach().requires_grad_()
        self._grad_out = inputs.grad_out.to(device, self.dtype)
        self._routes = [
            [(ids.to(device), w.to(device, self.dtype).detach().requires_grad_()) for ids, w in layers]
            for layers in inputs.routes
        ]
        if inputs.lora is not self._given:
            self._given, place = inputs.lora, self._lora_device
            self.lora = [
                {n: t.to(place, self.lora_dtype, copy=True).requires_grad_() for n, t in inputs.lora.items()}
                for _ in range(case.layers)
            ]
        return inputs.digest()

    def step(self, variant: int) -> Step:
        """One forward and backward, the device's work included."""
        routes = self._routes[variant]
        for leaf in (self._x, *(w for _, w in routes), *(t for pairs in self.lora for t in pairs.values())):
            leaf.grad = None
        x = self._out = self._x
        synchronize(self.device)
        begin = time.perf_counter()
        for index, (ids, weights) in enumerate(routes):
            y = self.layer(index, x, ids, weights, self.lora[index])
            x = x + y if self._residual else y
        synchronize(self.device)
        middle = time.perf_counter()
        torch.autograd.backward(x, self._grad_out)
        synchronize(self.device)
        end = time.perf_counter()
        self._out, self._variant = x.detach(), variant
        return middle - begin, end - middle

    def turn(self, variants: int, seconds: float) -> list[Step]:
        """Steps for about `seconds`, at least one; an untimed one wakes caches, clocks and threads first."""
        self.step(variants - 1)
        before = allocated(self.device, reset=True)
        steps: list[Step] = []
        end = time.perf_counter() + seconds
        while not steps or time.perf_counter() < end:
            steps.append(self.step(len(steps) % variants))
        self._taken = allocated(self.device, peak=True) - before
        return steps

    def outputs(self) -> dict[str, Tensor]:
        """Of the last step: "out", and the gradients of the first layer by the name of their tensor."""
        weights = self._routes[self._variant][0][1]
        leaves = {"hidden_states": self._x, "topk_weights": weights, **self.lora[0]}
        return {"out": self._out, **{n: t.grad for n, t in leaves.items() if t.grad is not None}}

    def figures(self) -> dict[str, Any]:
        """What is known of the last step: "link_bytes" that experts took, "cpu_rows" (a share), and so on."""
        return {"gpu_bytes": self.standing + self._taken} if self.device.type == "cuda" else {}


class KtMoe(Contestant):
    """This library, called as a user calls it; `gpu` is what its experts were made with."""

    def __init__(self, experts: list[kt_moe.Experts], gpu: Gpu | str = "off", **place: Any) -> None:
        super().__init__(**place)
        self.experts, self._gpu = experts, gpu

    def layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        return kt_moe.moe(x, ids, weights, self.experts[index], lora, scaling=SCALING)

    def figures(self) -> dict[str, Any]:
        engine = None if isinstance(self._gpu, str) else self._gpu.engine(self.device)
        if engine is None:
            return {**super().figures(), "scratch_bytes": self.experts[0].runtime.scratch_bytes}
        passes = engine.log.last.values()  # the last forward and backward of every layer
        moved, cpu, gpu = (
            sum(getattr(one, n) for one in passes) for n in ("bytes_moved", "cpu_rows", "gpu_rows")
        )
        return {**super().figures(), "link_bytes": moved, "cpu_rows": cpu / (cpu + gpu)}


class TorchLoop(Contestant):
    """Experts one after the other, as transformers' eager code does, LoRA beside each product."""

    lora_dtype = torch.bfloat16

    def __init__(self, weights: Weights, **place: Any) -> None:
        super().__init__(**place)
        self._base = weights

    def layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        out = torch.zeros_like(x)
        for expert in sorted(set(ids.flatten().tolist())):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            y = self.expert(expert, x[token], lora)
            out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
        return out

    def expert(self, expert: int, x: Tensor, lora: dict[str, Tensor]) -> Tensor:
        """[m, H] -> [m, H]"""

        def project(z: Tensor, index: int, name: str) -> Tensor:
            y = linear(z, self._base[index][expert].to(z.dtype))
            if not lora:
                return y
            return y + SCALING * linear(
                linear(z, lora[f"{name}_lora_a"][expert]), lora[f"{name}_lora_b"][expert]
            )

        return project(silu(project(x, 0, "gate")) * project(x, 1, "up"), 2, "down")


class Truth(TorchLoop):
    """The same in float64; backward converts an expert's weights again, so that few are held in float64."""

    dtype = lora_dtype = torch.float64

    def expert(self, expert: int, x: Tensor, lora: dict[str, Tensor]) -> Tensor:
        found: Tensor = checkpoint(super().expert, expert, x, lora, use_reentrant=False)
        return found


class Grouped(Contestant):
    """torch's grouped_mm over rows sorted by expert, as transformers' "grouped_mm" experts do.

    Args:
        base: weights of each layer on the device.
        recompute: backward computes a layer again, as gradient checkpointing would.
    """

    def __init__(self, base: Sequence[Fused] | Streamed, recompute: bool, **place: Any) -> None:
        super().__init__(**place)
        self._base, self._recompute = base, recompute

    def layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        def compute(x: Tensor, weights: Tensor) -> Tensor:
            return grouped_experts(x, ids, weights, self._base[index], lora)

        if not self._recompute:
            return compute(x, weights)
        found: Tensor = checkpoint(compute, x, weights, use_reentrant=False, preserve_rng_state=False)
        return found

    def step(self, variant: int) -> Step:
        if isinstance(self._base, Streamed):
            self._base.moved = 0
        return super().step(variant)

    def figures(self) -> dict[str, Any]:
        return {**super().figures(), "link_bytes": getattr(self._base, "moved", 0)}


class Streamed:
    """Layers in page-locked memory and two slots on the device, one of which is filled while one is used.

    A layer that is still in its slot is not copied again: the last two when backward begins, and the first
    two when the next step does.
    """

    def __init__(self, weights: Weights, layers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = [fuse(weights, pin_memory=pinned) for _ in range(layers)]
        self._slots = [[torch.empty_like(t, device=device) for t in self._host[0]] for _ in range(2)]
        self._holds, self._last, self.moved = [-1, -1], -1, 0
        self._streams = streams_of(device)
        self._filled: list[Event] = [self._streams.record() for _ in range(2)]

    def __getitem__(self, index: int) -> Fused:
        """A layer on the device. All work on the one before has been launched, so its slot gets the next."""
        self._fetch(index)
        self._fetch(index + (1 if index > self._last else -1))
        self._last = index
        self._streams.wait(self._filled[index % 2])
        gate_up, down = self._slots[index % 2]
        return gate_up, down

    def _fetch(self, index: int) -> None:
        slot = index % 2
        if not 0 <= index < len(self._host) or self._holds[slot] == index:
            return
        self._streams.wait(self._streams.record(), "link")
        with self._streams.on("link"):
            for there, here in zip(self._slots[slot], self._host[index], strict=True):
                there.copy_(here, non_blocking=True)
                self.moved += here.nbytes
        self._filled[slot], self._holds[slot] = self._streams.record("link"), index


def grouped_experts(x: Tensor, ids: Tensor, weights: Tensor, base: Fused, lora: dict[str, Tensor]) -> Tensor:
    """A layer's experts in bf16 by torch's grouped_mm, without waiting for the device.

    Args:
        x: [T, H] bf16.
        ids, weights: [T, K].
        lora: by the names of `kt_moe.moe`, or empty.
    """
    gate_up, down = base
    lora = {name: tensor.bfloat16() for name, tensor in lora.items()}
    tokens, topk = ids.shape
    of_row, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(of_row, torch.arange(len(down), device=ids.device), right=True, out_int32=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))

    def multiply(rows: Tensor, matrices: Tensor) -> Tensor:
        product: Tensor = _grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
        return product

    rows = x.index_select(0, order // topk)
    gate, up = multiply(rows, gate_up).chunk(2, -1)
    if lora:
        both = torch.cat([lora["gate_lora_a"], lora["up_lora_a"]], 1)
        low_gate, low_up = (multiply(rows, both) * SCALING).chunk(2, -1)
        gate, up = gate + multiply(low_gate, lora["gate_lora_b"]), up + multiply(low_up, lora["up_lora_b"])
    h = silu(gate) * up
    y = multiply(h, down)
    if lora:
        y = y + multiply(multiply(h, lora["down_lora_a"]) * SCALING, lora["down_lora_b"])
    y = y.index_select(0, inverse).view(tokens, topk, -1)
    return torch.bmm(weights.to(y.dtype).unsqueeze(1), y).squeeze(1)


_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def fuse(weights: Weights, **place: Any) -> Fused:
    """A copy of the weights with gate above up, in new memory where `torch.empty` puts it."""
    gate, up, down = weights
    e, i, h = gate.shape
    gate_up = torch.empty(e, 2 * i, h, dtype=gate.dtype, **place)
    gate_up[:, :i], gate_up[:, i:] = gate, up
    return gate_up, torch.empty(down.shape, dtype=down.dtype, **place).copy_(down)


class KtKernel(Contestant):
    """kt-kernel 0.7's bf16 fine-tuning layer, with the variant that it picks for this CPU."""

    def __init__(self, weights: Weights, threads: int, max_tokens: int) -> None:
        super().__init__()
        self._base, self._max_tokens = weights, max_tokens
        # Only its extension is loaded: what the package around it imports is not needed for one layer.
        spec = importlib.util.find_spec("kt_kernel")
        folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
        self._ext, _ = runpy.run_path(str(folder / "_cpu_detect.py"))["initialize"]()
        pool = self._ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._pool = self._ext.CPUInfer(pool)
        self._layer: Any = None
        self._rank = 0

    def prepare(self, case: Case) -> list[int]:
        inputs = make_inputs(case)
        if not inputs.lora:
            raise ValueError("no LoRA rank 0")
        if case.rank != self._rank:
            self._layer = None  # before the next one takes its memory
            self._pairs = {name: tensor.bfloat16().contiguous() for name, tensor in inputs.lora.items()}
            self._layer, self._rank = self._build(case), case.rank
        self._inputs: Inputs = inputs
        self._tokens = torch.tensor([case.tokens], dtype=torch.int32)
        leaves = {"out": inputs.hidden_states, "hidden_states": inputs.hidden_states}
        leaves |= {"topk_weights": inputs.routes[0][0][1], **self._pairs}
        self._outputs = {name: torch.full_like(tensor, torch.nan) for name, tensor in leaves.items()}
        return inputs.digest()

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
        (ids, weights), inputs = self._inputs.routes[variant][0], self._inputs
        at = {name: tensor.data_ptr() for name, tensor in self._outputs.items()}
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

    def outputs(self) -> dict[str, Tensor]:
        return self._outputs


def allocated(device: torch.device, peak: bool = False, reset: bool = False) -> int:
    """Bytes of tensors on the device now, or the most since the peak was reset; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    read: Callable[[torch.device], int] = (
        torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
    )
    return read(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
