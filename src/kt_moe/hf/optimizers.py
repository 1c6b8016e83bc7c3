"""Optimizers that look at whole matrices, for LoRA of experts, whose tensors are a matrix for each expert.

torch's Muon and PEFT's LoRA-FA know matrices only. These take both, and compute for matrices what those do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from kt_moe.hf.lora import KtLoraExperts

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
_STEPS = 5


class Muon(Optimizer):
    """Momentum whose every update is made orthogonal (https://kellerjordan.github.io/posts/muon/).

    It does what `torch.optim.Muon` (torch 2.9) does by its defaults, also to each matrix of [E, rows, cols].

    Args:
        params: tensors of two or three dimensions.
        lr: learning rate, of which a matrix with more rows than columns gets sqrt(rows / cols).
        weight_decay: decoupled, as AdamW's.
        momentum: of Nesterov's kind.

    Raises:
        ValueError: a tensor of other dimensions; says its shape.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    shape = list(parameter.shape)
                    raise ValueError(f"params has a tensor of shape {shape}, wanted two or three dimensions")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure, which computes gradients, returns."""
        loss = _loss(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal(parameter.grad.lerp(buffer, group["momentum"]))
                rows, cols = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))
        return loss


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrix of each, by Newton-Schulz iterations in bf16."""
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class LoraFA(Optimizer):
    """LoRA-FA (https://huggingface.co/papers/2308.03303): A stays as it is, B is trained by AdamW.

    The gradient of B is first made that which changes B A most as the full gradient would, as PEFT's
    `LoraFAOptimizer` does: G (A A')^-1 / s^2. Make it by `create_lorafa_optimizer`.

    Args:
        pairs: A [r, in] or [E, r, in], B [out, r] or [E, out, r], and scaling s of each LoRA.
        others: further parameters, trained by AdamW.
        lr, weight_decay, betas, eps: of AdamW; the decay is decoupled.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, nn.Parameter, float]],
        others: Iterable[nn.Parameter] = (),
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        pairs = list(pairs)
        self._pair_of = {b: (a, scaling) for a, b, scaling in pairs}
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__([*self._pair_of, *others], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure, which computes gradients, returns."""
        loss = _loss(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._adamw(parameter, self._projected(parameter), group)
        return loss

    def _projected(self, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if parameter not in self._pair_of:
            return gradient
        a, scaling = self._pair_of[parameter]
        a = a.to(gradient.device, torch.float32)
        gram = a @ a.mT + 1e-8 * torch.eye(a.shape[-2], device=a.device)
        projected: Tensor = gradient.float() @ torch.linalg.pinv(gram, hermitian=True) / scaling**2
        return projected.to(gradient.dtype)

    def _adamw(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {
                "step": 0,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = group["lr"] * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0) -> LoraFA:
    """Freeze the A of all LoRA that is trained, and make an optimizer of all else that is.

    It replaces `peft.optimizers.create_lorafa_optimizer`, which knows no LoRA on experts.

    Args:
        model: a PeftModel, or another with LoRA; its active adapters are what is trained.
        lr, weight_decay: of AdamW; the decay is decoupled.

    Raises:
        ValueError: an active adapter's scaling is 0: nothing could be trained; or B is shared by A's of
            several experts.
    """
    pairs: list[tuple[Tensor, nn.Parameter, float]] = []
    for path, layer in model.named_modules():
        for a, b, scaling in _trained_pairs(layer) if isinstance(layer, LoraLayer) else ():
            if scaling == 0:
                raise ValueError(f"the scaling of LoRA on {path} is 0: it has no gradient")
            if a.dim() == 3 and len(a) > len(b):
                raise ValueError(
                    f"LoRA-FA wants an A for each B, those of {path} share one (SharedOuterLoraConfig)"
                )
            a.requires_grad_(False)
            pairs.append((a, b, scaling))
    taken = {b for _, b, _ in pairs}
    others = [p for p in model.parameters() if p.requires_grad and p not in taken]
    return LoraFA(pairs, others, lr, weight_decay)


def _trained_pairs(layer: Any) -> Iterable[tuple[nn.Parameter, nn.Parameter, float]]:
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if isinstance(layer, KtLoraExperts):
            found = [
                (a, layer.lora_B[name][projection], layer.scaling_of(name, projection))
                for projection, a in layer.lora_A[name].items()
            ]
        else:
            found = [(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))]
        yield from ((a, b, scaling) for a, b, scaling in found if b.requires_grad)


def _loss(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
