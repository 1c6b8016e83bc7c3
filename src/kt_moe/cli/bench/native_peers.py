"""Libraries with experts of their own, called through their extensions: kt-kernel and vLLM's CPU backend.

Only the extension modules are loaded: what the packages around them import is not needed for one layer.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kt_moe.cli.bench.contestants import Step
from kt_moe.cli.bench.data import Inputs, Weights
from kt_moe.cli.bench.layer import SCALING
from kt_moe.functional import LORA_NAMES


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it.

    Raises:
        ValueError: it is not.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the package {name} is not installed")
    return Path(next(iter(found.submodule_search_locations)))


class KtKernel:
    """kt-kernel's bf16 fine-tuning layer, with the variant that it picks for this CPU."""

    def __init__(self, weights: Weights, threads: int, max_tokens: int) -> None:
        self._weights, self._max_tokens = weights, max_tokens
        self._ext = _load_kt_kernel()
        pool = self._ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._pool = self._ext.CPUInfer(pool)
        self._layer: Any = None
        self._rank = 0

    def prepare(self, inputs: Inputs) -> None:
        if not inputs.lora:
            raise ValueError("no LoRA rank 0")
        rank = inputs.lora["gate_lora_a"].shape[1]
        if rank != self._rank:
            self._layer = None  # before the next one takes its memory
            self._lora = {name: tensor.bfloat16().contiguous() for name, tensor in inputs.lora.items()}
            self._layer, self._rank = self._build(inputs.topk_ids[0].shape[1], rank), rank
            self._grads = {name: torch.empty_like(tensor) for name, tensor in self._lora.items()}
        self._inputs = inputs
        self._tokens = torch.tensor([len(inputs.hidden_states)], dtype=torch.int32)
        self._out, self._grad_x = (torch.empty_like(inputs.hidden_states) for _ in range(2))
        self._grad_weights = torch.empty_like(inputs.topk_weights[0])
        for tensor in self.outputs().values():
            tensor.fill_(torch.nan)

    def _build(self, topk: int, rank: int) -> Any:
        experts, intermediate, hidden = self._weights[0].shape
        config = self._ext.moe.MOESFTConfig(experts, topk, hidden, intermediate)
        config.max_len, config.max_cache_depth, config.layer_idx = self._max_tokens, 1, 0
        config.lora_rank, config.lora_alpha = rank, SCALING * rank
        config.authoritative_optimizer_grads = True
        self._expert_map = torch.arange(experts)
        config.physical_to_logical_map = self._expert_map.data_ptr()
        for name, tensor in zip(("gate_proj", "up_proj", "down_proj"), self._weights, strict=True):
            setattr(config, name, tensor.data_ptr())
        for name, tensor in self._lora.items():
            setattr(config, name, tensor.data_ptr())
        config.pool = self._pool.backend_
        layer = self._ext.moe.AMXBF16_SFT_MOE(config)  # the name for every x86 variant, AMX or not
        layer.load_weights()
        return layer

    def step(self, variant: int) -> Step:
        inputs = self._inputs
        ids, weights = inputs.topk_ids[variant], inputs.topk_weights[variant]
        grads = [self._grads[name].data_ptr() for name in LORA_NAMES]
        begin = time.perf_counter()
        self._layer.forward_sft(
            self._tokens.data_ptr(), ids.shape[1], ids.data_ptr(), weights.data_ptr(),
            inputs.hidden_states.data_ptr(), self._out.data_ptr(), True,
        )  # fmt: skip
        middle = time.perf_counter()
        self._layer.backward(
            inputs.grad_out.data_ptr(), self._grad_x.data_ptr(), *grads, self._grad_weights.data_ptr(),
            0, 0, 0, False, 1.0,
        )  # fmt: skip
        return middle - begin, time.perf_counter() - middle

    def outputs(self) -> dict[str, Tensor]:
        return {
            "out": self._out,
            "hidden_states": self._grad_x,
            "topk_weights": self._grad_weights,
            **self._grads,
        }


class VllmCpu:
    """vLLM's fused experts: forward only, no LoRA."""

    def __init__(self, weights: Weights, isa: str) -> None:
        folder, self._isa = package_folder("vllm"), "amx" if isa == "amx" else "vec"
        build = "_C" if isa == "amx" else "_C_AVX512" if isa.startswith("avx512") else "_C_AVX2"
        torch.ops.load_library(  # type: ignore[no-untyped-call]
            folder / f"{build}.abi3.so"
        )
        gate, up, down = weights
        self._gate_up, self._down = self._pack(torch.cat([gate, up], dim=1)), self._pack(down)

    def _pack(self, weight: Tensor) -> Tensor:
        packed = torch.empty_like(weight)
        torch.ops._C.prepack_moe_weight(weight, packed, self._isa)
        return packed

    def prepare(self, inputs: Inputs) -> None:
        if inputs.lora:
            raise ValueError("no LoRA, so rank 0 only")
        self._inputs = inputs
        self._ids = [ids.to(torch.int32) for ids in inputs.topk_ids]
        self._out = torch.full_like(inputs.hidden_states, torch.nan)

    def step(self, variant: int) -> Step:
        begin = time.perf_counter()
        torch.ops._C.cpu_fused_moe(
            self._out, self._inputs.hidden_states, self._gate_up, self._down, None, None,
            self._inputs.topk_weights[variant], self._ids[variant], False, "silu", self._isa,
        )  # fmt: skip
        return time.perf_counter() - begin, None

    def outputs(self) -> dict[str, Tensor]:
        return {"out": self._out}


def _load_kt_kernel() -> Any:
    path = package_folder("kt_kernel") / "_cpu_detect.py"
    spec = importlib.util.spec_from_file_location("kt_kernel_cpu_detect", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError(f"{path} is missing: another kt-kernel than 0.7?")
    detect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(detect)
    extension, _ = detect.initialize()
    return extension
