"""What outputs are held against: a float64 reference, and memory that shows what was never written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kt_moe.cli.bench.contestants import expert_output
from kt_moe.cli.bench.data import Inputs, Weights


def reference(weights: Weights, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs in float64 on the first variant, an expert at a time to hold one expert in float64."""
    ids, route_weights = inputs.topk_ids[0], inputs.topk_weights[0]
    x, grad_out = inputs.hidden_states.double(), inputs.grad_out.double()
    found = {"out": torch.zeros_like(x), "hidden_states": torch.zeros_like(x)}
    found["topk_weights"] = torch.zeros_like(route_weights, dtype=torch.float64)
    found |= {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in inputs.lora.items()}
    for expert in sorted(set(ids.flatten().tolist())):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        leaf = x[token].requires_grad_()
        weight = route_weights[token, slot].double().requires_grad_()
        lora = {n: t[expert].detach().double().clone().requires_grad_() for n, t in inputs.lora.items()}
        y = expert_output(leaf, [w[expert].double() for w in weights], lora) * weight[:, None]
        torch.autograd.backward(y, grad_out[token])
        found["out"].index_add_(0, token, y.detach())
        found["hidden_states"].index_add_(0, token, _grad(leaf))
        found["topk_weights"][token, slot] = _grad(weight)
        for name, tensor in lora.items():
            found[name][expert] = _grad(tensor)
    return found


def relative_errors(outputs: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each output there is; not a number where an output is not finite."""
    return {
        name: float((tensor.double() - truth[name]).norm() / truth[name].norm().clamp(min=1e-30))
        for name, tensor in outputs.items()
    }


@contextmanager
def poisoned() -> Iterator[None]:
    """Within `with`, fresh tensors hold NaN until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what makes torch fill memory it has just taken
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
