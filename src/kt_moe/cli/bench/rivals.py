"""Other implementations of the routed experts: plain PyTorch, and kt-kernel."""

from __future__ import annotations

import importlib.util
import runpy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.contestants import SCALING, Layer, Stack, Step
from kt_moe.cli.bench.inputs import Weights, make_inputs
from kt_moe.functional import LORA_NAMES
from kt_moe.gpu.streams import Event, streams_of

Fused = tuple[Tensor, Tensor]  # gate above up [E, 2I, H], down [E, H, I]; bf16

_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def loop_layer(base: Weights) -> Layer:
    """Experts one after the other, as transformers' eager code does, LoRA beside each product.

    In float64 backward converts an expert's weights again, so that few are held.
    """

    def expert(number: int, x: Tensor, lora: dict[str, Tensor]) -> Tensor:
        def project(z: Tensor, weights: Tensor, name: str) -> Tensor:
            y = linear(z, weights[number].to(z.dtype))
            if not lora:
                return y
            low = linear(z, lora[f"{name}_lora_a"][number])
            return y + SCALING * linear(low, lora[f"{name}_lora_b"][number])

        gate, up, down = base
        return project(silu(project(x, gate, "gate")) * project(x, up, "up"), down, "down")

    def layer(x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        out = torch.zeros_like(x)
        for number in torch.unique(ids).tolist():
            token, slot = (ids == number).nonzero(as_tuple=True)
            again = x.dtype == torch.float64
            rows = (number, x[token], lora)
            y = checkpoint(expert, *rows, use_reentrant=False) if again else expert(*rows)
            out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
        return out

    return layer


def grouped_layer(base: Sequence[Fused] | Streamed, index: int, recompute: bool = False) -> Layer:
    """torch's grouped_mm over rows sorted by expert, as transformers' "grouped_mm" experts do.

    recompute: backward computes the layer again, as gradient checkpointing would.
    """

    def layer(x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        return grouped_experts(x, ids, weights, base[index], lora)

    def again(*args: Any) -> Tensor:
        found: Tensor = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
        return found

    return again if recompute else layer


class Streamed:
    """Layers in page-locked memory and two slots on the device, one of which is filled while one is used.

    A layer that is still in its slot is not copied again: the last two when backward begins, and the first
    two when the next step does.
    """

    def __init__(self, weights: Weights, layers: int, device: str) -> None:
        self._host = [fuse(weights, pin_memory=device == "cuda") for _ in range(layers)]
        self._slots = [[torch.empty_like(t, device=device) for t in self._host[0]] for _ in range(2)]
        self._holds, self._last = [-1, -1], -1
        self._streams = streams_of(torch.device(device))
        self._filled: list[Event] = [self._streams.record() for _ in range(2)]

    @property
    def link_bytes(self) -> int:
        """That a step copies."""
        return 2 * max(0, len(self._host) - 2) * sum(tensor.nbytes for tensor in self._host[0])

    def __getitem__(self, index: int) -> Fused:
        """A layer on the device. All work on the one before has been launched, so its slot gets the next."""
        for wanted in (index, index + (1 if index > self._last else -1)):
            if 0 <= wanted < len(self._host) and self._holds[wanted % 2] != wanted:
                self.fetch(wanted)
        self._last = index
        self._streams.wait(self._filled[index % 2])
        gate_up, down = self._slots[index % 2]
        return gate_up, down

    def fetch(self, index: int) -> None:
        """Copy a layer into its slot, behind what the device still does with it."""
        self._streams.wait(self._streams.record(), "link")
        with self._streams.on("link"):
            for there, here in zip(self._slots[index % 2], self._host[index], strict=True):
                there.copy_(here, non_blocking=True)
        self._filled[index % 2], self._holds[index % 2] = self._streams.record("link"), index


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


def fuse(weights: Weights, **place: Any) -> Fused:
    """A copy of the weights with gate above up, in new memory where `torch.empty` puts it."""
    gate, up, down = weights
    e, i, h = gate.shape
    gate_up = torch.empty(e, 2 * i, h, dtype=gate.dtype, **place)
    gate_up[:, :i], gate_up[:, i:] = gate, up
    return gate_up, torch.empty(down.shape, dtype=down.dtype, **place).copy_(down)


class KtKernel(Stack):
    """kt-kernel 0.7's bf16 fine-tuning layer, with the variant that it picks for this CPU."""

    def __init__(self, weights: Weights, threads: int, max_tokens: int) -> None:
        super().__init__([])
        self._base, self._max_tokens = weights, max_tokens
        # Only its extension is loaded: what the package around it imports is not needed for one layer.
        spec = importlib.util.find_spec("kt_kernel")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'kt_kernel'")
        self._ext, _ = runpy.run_path(str(Path(spec.origin).parent / "_cpu_detect.py"))["initialize"]()
        pool = self._ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._pool = self._ext.CPUInfer(pool)
        self._layer: Any = None
        self._rank = 0

    def prepare(self, case: Case) -> None:
        self._inputs = inputs = make_inputs(case)
        if not inputs.lora:
            raise ValueError("no LoRA rank 0")
        if case.rank != self._rank:
            self._layer = None  # before the next one takes its memory
            self._pairs = {name: tensor.bfloat16().contiguous() for name, tensor in inputs.lora.items()}
            self._layer, self._rank = self._build(case), case.rank
        self._tokens = torch.tensor([case.tokens], dtype=torch.int32)
        leaves = {"out": inputs.hidden_states, "hidden_states": inputs.hidden_states}
        leaves |= {"topk_weights": inputs.routes[0][0][1], **self._pairs}
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
        (ids, weights), inputs = self._inputs.routes[variant][0], self._inputs
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
