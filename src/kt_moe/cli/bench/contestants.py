"""What runs a case: the layer itself, and plain PyTorch."""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

import kt_moe
from kt_moe.cli.bench.data import Inputs, Weights
from kt_moe.cli.bench.layer import SCALING

Step = tuple[float, float | None]  # seconds of forward and of backward; None where there is no backward


class Contestant(Protocol):
    """Runs a case again and again; every implementation of the layer is timed through this."""

    def prepare(self, inputs: Inputs) -> None:
        """Get ready for `step`; ValueError says why this case cannot be run."""

    def step(self, variant: int) -> Step:
        """One forward and backward on a variant of the inputs."""

    def outputs(self) -> dict[str, Tensor]:
        """Of the last step: "out", and gradients by the name of their tensor."""


def take_turn(contestant: Contestant, variants: int, seconds: float) -> list[Step]:
    """Times of steps for about `seconds`, at least one; an untimed one wakes caches and threads first."""
    contestant.step(variants - 1)
    return time_steps(contestant, variants, seconds)


def time_steps(contestant: Contestant, variants: int, seconds: float, least: int = 1) -> list[Step]:
    """Times of steps for about `seconds`, at least `least` of them."""
    steps: list[Step] = []
    end = time.perf_counter() + seconds
    while len(steps) < least or time.perf_counter() < end:
        steps.append(contestant.step(len(steps) % variants))
    return steps


class Autograd:
    """A layer that is one differentiable function of tensors."""

    lora_dtype: torch.dtype | None = None  # None: as the inputs have it

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]"""
        raise NotImplementedError

    def prepare(self, inputs: Inputs) -> None:
        self._ids, self._grad_out = inputs.topk_ids, inputs.grad_out
        self._x = inputs.hidden_states.clone().requires_grad_()
        self._weights = [w.clone().requires_grad_() for w in inputs.topk_weights]
        self._lora = {
            n: t.detach().to(self.lora_dtype or t.dtype, copy=True).requires_grad_()
            for n, t in inputs.lora.items()
        }
        self._out, self._variant = self._x, 0

    def step(self, variant: int) -> Step:
        weights = self._weights[variant]
        for leaf in (self._x, weights, *self._lora.values()):
            leaf.grad = None
        begin = time.perf_counter()
        out = self.compute(self._x, self._ids[variant], weights, self._lora)
        middle = time.perf_counter()
        torch.autograd.backward(out, self._grad_out)
        end = time.perf_counter()
        self._out, self._variant = out.detach(), variant
        return middle - begin, end - middle

    def outputs(self) -> dict[str, Tensor]:
        leaves = {"hidden_states": self._x, "topk_weights": self._weights[self._variant], **self._lora}
        return {"out": self._out, **{n: t.grad for n, t in leaves.items() if t.grad is not None}}


class KtMoe(Autograd):
    """This library, called as a user calls it."""

    def __init__(
        self, weights: Weights, runtime: kt_moe.Runtime, recompute: bool = False, format: str = "bf16"
    ) -> None:
        self.experts = kt_moe.Experts(*weights, format=format, runtime=runtime)
        self.experts.recompute = recompute

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        return kt_moe.moe(x, ids, weights, self.experts, lora, scaling=SCALING)

    def scratch(self) -> dict[str, int]:
        """Bytes of scratch memory that a step of the first variant needs, by pass."""
        runtime = self.experts.runtime
        leaves = (self._x, self._weights[0], *self._lora.values())
        out = self.compute(self._x, self._ids[0], self._weights[0], self._lora)
        forward = runtime.scratch_bytes
        torch.autograd.grad(out, leaves, self._grad_out)
        return {"forward": forward, "backward": runtime.scratch_bytes}


class TorchLoop(Autograd):
    """Experts one after the other in bf16, as transformers' eager code does, LoRA beside each product."""

    lora_dtype = torch.bfloat16

    def __init__(self, weights: Weights) -> None:
        self._base = weights

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        out = torch.zeros_like(x)
        for expert in sorted(set(ids.flatten().tolist())):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            y = expert_output(
                x[token], [w[expert] for w in self._base], {n: t[expert] for n, t in lora.items()}
            )
            out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
        return out


class GroupedMm(Autograd):
    """torch._grouped_mm over tokens sorted by expert, as transformers' "grouped_mm" experts do."""

    lora_dtype = torch.bfloat16

    def __init__(self, weights: Weights) -> None:
        if not hasattr(torch, "_grouped_mm"):
            raise ValueError(f"torch {torch.__version__} has no torch._grouped_mm")
        self._base = weights

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        routes = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=len(self._base[0])).cumsum(0).to(torch.int32)

        def multiply(z: Tensor, w: Tensor) -> Tensor:
            return torch._grouped_mm(z, w.transpose(1, 2), offs=ends)  # type: ignore[no-any-return,attr-defined,unused-ignore]

        def project(z: Tensor, index: int, name: str) -> Tensor:
            y = multiply(z, self._base[index])
            if not lora:
                return y
            return y + SCALING * multiply(multiply(z, lora[f"{name}_lora_a"]), lora[f"{name}_lora_b"])

        token = routes // ids.shape[1]
        gathered = x[token]
        y = project(silu(project(gathered, 0, "gate")) * project(gathered, 1, "up"), 2, "down")
        return torch.zeros_like(x).index_add(0, token, y * weights.flatten()[routes, None].to(y.dtype))


def expert_output(x: Tensor, base: list[Tensor], lora: dict[str, Tensor]) -> Tensor:
    """One expert in plain PyTorch: x [m, H]; base gate, up, down; lora by name, or empty."""

    def project(z: Tensor, index: int, name: str) -> Tensor:
        y = linear(z, base[index])
        if not lora:
            return y
        return y + SCALING * linear(linear(z, lora[f"{name}_lora_a"]), lora[f"{name}_lora_b"])

    return project(silu(project(x, 0, "gate")) * project(x, 1, "up"), 2, "down")
