"""The routed experts in plain PyTorch: those that kt_moe is compared with, and the float64 truth."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from kt_moe.cli.bench.layers import SCALING, Layer, Weights

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


def grouped_layer(base: Fused) -> Layer:
    """Experts in bf16 by torch's grouped_mm over rows sorted by expert, without waiting for the device."""
    return partial(_grouped, base)


def _grouped(base: Fused, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
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
