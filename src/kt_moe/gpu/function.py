"""A layer call through the engine: arguments checked, tensors brought into its form, gradients given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_moe.experts import Experts
from kt_moe.gpu.engine import Engine, SavedCall
from kt_moe.gpu.lora import LoraCall, LoraOptions
from kt_moe.gpu.streams import Event

_PROJECTIONS = ("gate", "up", "down")


def forward(
    engine: Engine,
    experts: Experts,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora_tensors: Sequence[Tensor | None],
    options: LoraOptions,
    train: bool,
) -> tuple[Tensor, SavedCall]:
    """The layer's output, and what `save` puts by for backward."""
    check_call(experts, hidden_states, topk_ids, topk_weights, lora_tensors)
    out, saved = engine.forward(
        experts,
        _rows(hidden_states, torch.bfloat16, engine.device),
        topk_ids.detach().to(engine.device),
        _rows(topk_weights, torch.float32, engine.device),
        LoraCall(tuple(lora_tensors), *options),
        train,
    )
    return out.to(hidden_states.dtype), saved


class Arrival:
    """When the LoRA gradients of a call's backward are in host memory."""

    def __init__(self) -> None:
        self._event: Event | None = None

    def set(self, event: Event | None) -> None:
        """Say so, once all copies have begun."""
        self._event = event

    def wait(self) -> None:
        """Let the calling thread wait until they are."""
        if self._event is not None:
            self._event.synchronize()


class _Arriving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arrival: Arrival, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrival = arrival
        return tuple(None if t is None else t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrival.wait()
        return None, *grads


def arriving(tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], Arrival | None]:
    """LoRA tensors of the host through an autograd node that waits for their gradients.

    Autograd runs this node in its thread for tensors of the host, so that the thread for the device goes on
    with the next layer meanwhile. None instead of an `Arrival`: there is nothing to wait for.
    """
    on_host = [t if t is not None and t.is_cpu and t.requires_grad else None for t in tensors]
    if not torch.is_grad_enabled() or all(t is None for t in on_host):
        return tensors, None
    arrival = Arrival()
    through = _Arriving.apply(arrival, *on_host)  # type: ignore[no-untyped-call]
    return [t if mine is None else mine for t, mine in zip(tensors, through, strict=True)], arrival


def save(
    ctx: Any,
    saved: SavedCall,
    hidden_states: Tensor,
    topk_weights: Tensor,
    lora_tensors: Sequence[Tensor | None],
) -> None:
    """Give an autograd node what `backward` needs beside `engine`, `experts`, `arrival` and `versions`."""
    ctx.saved_call = replace(saved, tensors=())
    ctx.save_for_backward(hidden_states, topk_weights, *lora_tensors, *saved.tensors)


def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of the autograd function."""
    hidden_states, topk_weights, *rest = ctx.versions.saved_tensors(ctx)
    lora_tensors, tensors = rest[: 2 * len(_PROJECTIONS)], rest[2 * len(_PROJECTIONS) :]
    engine: Engine = ctx.engine
    needs_x, _, needs_weights, _, _, _, *needs_lora = ctx.needs_input_grad
    dx, dweights, lora_grads, arrived = engine.backward(
        ctx.experts,
        replace(ctx.saved_call, tensors=tuple(tensors)),
        _rows(hidden_states, torch.bfloat16, engine.device),
        _rows(topk_weights, torch.float32, engine.device),
        LoraCall(tuple(None if t is None else t.detach() for t in lora_tensors), *ctx.saved_call.options),
        _rows(grad_out, torch.bfloat16, engine.device),
        (needs_x, needs_weights, tuple(needs_lora)),
    )
    if ctx.arrival is not None:
        ctx.arrival.set(arrived)
    elif arrived is not None:
        arrived.synchronize()
    return (
        None if dx is None else dx.to(hidden_states.device, hidden_states.dtype),
        None,
        None if dweights is None else dweights.to(topk_weights.device, topk_weights.dtype),
        None,
        None,
        None,
        *(
            None if grad is None or tensor is None else grad.to(tensor.device, tensor.dtype)
            for grad, tensor in zip(lora_grads, lora_tensors, strict=True)
        ),
    )


def _rows(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.detach().to(device, dtype).resolve_neg().contiguous()


def check_call(
    experts: Experts, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor,
    lora_tensors: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """ValueError, naming the argument, for a shape or dtype that does not fit the experts."""
    e, h, i = experts.num_experts, experts.hidden_size, experts.intermediate_size
    _check(hidden_states.dim() == 2 and hidden_states.shape[1] == h, "hidden_states", hidden_states,
           f"[T, {h}]: the experts' hidden size")  # fmt: skip
    tokens = len(hidden_states)
    if topk_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_ids is {topk_ids.dtype}, wanted int64 or int32")
    _check(topk_ids.dim() == 2 and len(topk_ids) == tokens, "topk_ids", topk_ids,
           f"[{tokens}, K]: a row for every token")  # fmt: skip
    _check(topk_weights.shape == topk_ids.shape, "topk_weights", topk_weights,
           f"{list(topk_ids.shape)}: the shape of topk_ids")  # fmt: skip
    for name, a, b in zip(_PROJECTIONS, lora_tensors[::2], lora_tensors[1::2], strict=True):
        if name not in experts.projections and not (a is None and b is None):
            letter = "b" if a is None else "a"
            raise ValueError(f"{name}_lora_{letter} is given, but the experts have no {name}: wanted None")
        name += "_lora_"
        if a is None or b is None:
            if a is not None or b is not None:
                given, missing = ("b", "a") if a is None else ("a", "b")
                raise ValueError(f"{name}{given} is given without {name}{missing}")
            continue
        for letter, tensor in (("a", a), ("b", b)):
            if tensor.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name}{letter} is {tensor.dtype}, wanted float32 or bfloat16")
        into, out = (i, h) if name[0] == "d" else (h, i)
        _check(a.dim() == 3 and a.shape[0] == e and a.shape[2] == into and a.shape[1] > 0, f"{name}a", a,
               f"[{e}, r, {into}] with r of at least 1")  # fmt: skip
        _check(b.shape == (e, out, a.shape[1]), f"{name}b", b, f"{[e, out, a.shape[1]]}")


def _check(fits: bool, name: str, tensor: Tensor, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, wanted {wanted}")
