"""LoRA that starts with a part of the base weights, PiSSA and OLoRA, on weights that stay as they are.

PEFT takes what such LoRA starts with out of the base weights, W' = W - s B0 A0. Experts are frozen, and
stored once, so here a fixed LoRA beside the trained one does it:

    y = W x + s (B A - B0 A0) x

Together they are plain LoRA of twice the rank, A [A; A0] and B [B, -B0], and so they are saved: files are
what PEFT makes of such adapters with `path_initial_model_for_weight_conversion`. Other layers of the adapter
do the same, so that its files are plain LoRA as a whole.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from torch.nn.functional import linear

_PISSA = re.compile(r"pissa(?:_niter_(\d{1,3}))?")
_OLORA = "olora"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def starts_from_weights(init_lora_weights: Any) -> bool:
    """Whether this `init_lora_weights` is done so: "pissa", "pissa_niter_N" with N below 1000, "olora"."""
    words = init_lora_weights if isinstance(init_lora_weights, str) else ""
    return words.lower() == _OLORA or _PISSA.fullmatch(words) is not None


def starting_pair(weight: Tensor, rank: int, scaling: float, how: str, name: str) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and B0 [out, rank], fp32, of a weight [out, in] of this name.

    PiSSA (https://arxiv.org/abs/2404.02948): s B0 A0 is the best approximation of the weight of this rank; of
    "pissa_niter_N" nearly, by so many iterations on random vectors. OLoRA (https://arxiv.org/abs/2406.01775):
    the first columns of Q and rows of R of its decomposition.

    Raises:
        ValueError: a rank larger than the weight's, weights that are not finite, a scaling of PiSSA that is
            not positive; names it.
    """
    if rank > min(weight.shape):
        raise ValueError(
            f"LoraConfig: init_lora_weights={how!r} has rank {rank} on {name}, a weight {list(weight.shape)}"
        )
    weight = weight.float()
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"LoraConfig: init_lora_weights={how!r} starts with the weights, and {name} has some that are "
            "NaN or infinite"
        )
    if how.lower() == _OLORA:
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if not scaling > 0:
        raise ValueError(f"LoraConfig: init_lora_weights={how!r} has scaling {scaling:g}, wanted more than 0")
    found = _PISSA.fullmatch(how)
    if found is not None and found[1] is not None:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(found[1]))
        vh = v.mT
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


class _Both:
    """A linear layer of PEFT whose adapters may have fixed parts: what they add to its weight is both."""

    lora_A: Any  # noqa: N815 (PEFT's name)
    lora_B: Any  # noqa: N815
    scaling: Any
    fan_in_fan_out: bool

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s (B A - B0 A0), of the weight's shape."""
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        if not isinstance(a, _A):
            return delta
        fixed = (b.fixed.float() @ a.fixed.float()) * self.scaling[adapter]
        both: Tensor = delta + (fixed.T if self.fan_in_fan_out else fixed).to(delta)
        return both


@cache
def _with_both(cls: Any) -> Any:
    names = {"__doc__": cls.__doc__, "__module__": cls.__module__}
    return cls if issubclass(cls, _Both) else type(cls.__name__, (_Both, cls), names)


class _A(nn.Linear):
    """PEFT's lora_A with a fixed part below the trained one: [..., in] -> [..., 2 rank]."""

    fixed: Tensor  # [rank, in]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, joined(self.weight, self.fixed, 0))


class _B(nn.Linear):
    """PEFT's lora_B with a fixed part beside the trained one: [..., 2 rank] -> [..., out]."""

    fixed: Tensor  # [out, rank]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, joined(self.weight, self.fixed, 1))


@torch.no_grad()
def start_layer(layer: Any, adapter_name: str, how: str, name: str) -> None:
    """Let the adapter of a linear layer of PEFT, of this name, start so; nothing for its other layers, which
    start as plain LoRA does. Its rank is that of both parts from then on.
    """
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper) or not isinstance(base, nn.Linear):
        return
    a, b, rank = layer.lora_A[adapter_name], layer.lora_B[adapter_name], layer.r[adapter_name]
    scaling = float(layer.scaling[adapter_name])
    with gather_params_ctx(base.weight):
        weight = dequantize_module_weight(base)
        if weight.dtype not in _FLOATS:
            raise ValueError(f"LoraConfig: init_lora_weights={how!r} has {name}, a weight of {weight.dtype}")
        start = starting_pair(weight, rank, scaling, how, name)
    for module, both, value in zip((a, b), (_A, _B), start, strict=True):
        module.weight.copy_(value)
        module.__class__ = both
    cls: Any = type(layer)
    layer.__class__ = _with_both(cls)
    a.register_buffer("fixed", a.weight.detach().clone())
    b.register_buffer("fixed", -b.weight.detach())
    layer.r[adapter_name] = 2 * rank
    layer.lora_alpha[adapter_name] = scaling * (
        (2 * rank) ** 0.5 if layer.use_rslora[adapter_name] else 2 * rank
    )


def pair_of(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a linear layer of PEFT, with the fixed parts."""
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    return joined(a.weight, getattr(a, "fixed", None), 0), joined(b.weight, getattr(b, "fixed", None), 1)


def joined(trained: Tensor, fixed: Tensor | None, dim: int) -> Tensor:
    """Both parts of A or B, whose rank is dimension `dim`, as one; the trained one where it is alone."""
    return trained if fixed is None else torch.cat([trained, fixed.to(trained)], dim=dim)


def join_fixed(state_dict: dict[str, Tensor]) -> None:
    """Make one tensor of each trained and fixed part of linear layers, as they are saved."""
    for key in [key for key in state_dict if ".lora_" in key and key.endswith(".fixed")]:
        own = key.removesuffix("fixed") + "weight"
        state_dict[own] = joined(state_dict[own], state_dict.pop(key), _dim(own))


def part_fixed(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Take such tensors apart again where the model has both parts."""
    for path, module in model.named_modules():
        key = f"{path}.weight"
        if isinstance(module, _A | _B) and key in state_dict:
            state_dict[key], state_dict[f"{path}.fixed"] = halves(state_dict[key], _dim(key), key)


def halves(tensor: Tensor, dim: int, name: str) -> tuple[Tensor, Tensor]:
    """The trained and the fixed part of a tensor. ValueError if its rank is odd."""
    if tensor.shape[dim] % 2:
        raise ValueError(
            f"{name} has rank {tensor.shape[dim]}, wanted twice that of the model's adapter, whose "
            "init_lora_weights is PiSSA's or OLoRA's"
        )
    first, second = tensor.chunk(2, dim=dim)
    return first.contiguous(), second.contiguous()


def _dim(key: str) -> int:
    """Along which a matrix has its rank."""
    return 0 if ".lora_A." in key else 1
