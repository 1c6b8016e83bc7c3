"""The differentiable layer: routed experts with LoRA fused in, on the CPU and, if there is one, the GPU.

For expert e with routed tokens X (Hu et al. 2021 for LoRA, Shazeer 2020 for the gated unit)::

    G = X Wg' + s (X Ag') Bg'      U = X Wu' + s (X Au') Bu'      h = act(G, U), without a gate act(U)
    Y = h Wd' + s (h Ad') Bd'      out[t] = sum over k of topk_weights[t, k] * Y[route (t, k)]
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_moe import _core, checkpointing
from kt_moe.experts import PROJECTIONS, Experts
from kt_moe.tensors import Versions, check_tensor, empty, on_cpu, refuse_tracing

if TYPE_CHECKING:
    from kt_moe.gpu.function import Arrival
    from kt_moe.gpu.lora import LoraOptions

LORA_NAMES = tuple(f"{p}_lora_{m}" for p in PROJECTIONS for m in "ab")
_INPUT_NAMES = ("hidden_states", "topk_ids", "topk_weights")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Lora:
    """How the LoRA products enter the layer.

    Args:
        scaling: alpha / r (alpha / sqrt(r) for rsLoRA); one number, or one for each of gate, up and down.
        dropout: probability in [0, 1) of dropping an element of a LoRA A product's input.
        seed: of the dropout masks; None draws one from torch's default generator at each forward.
    """

    scaling: float | Sequence[float] = 1.0
    dropout: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        try:
            if isinstance(self.scaling, str):
                raise TypeError
            count = len(self.scalings)
        except (TypeError, ValueError):
            raise TypeError(f"scaling is {self.scaling!r}, wanted a number, or three") from None
        if not hasattr(self.dropout, "__float__"):
            raise TypeError(f"dropout is {self.dropout!r}, wanted a number")
        if self.seed is not None and not hasattr(self.seed, "__index__"):
            raise TypeError(f"seed is {self.seed!r}, wanted an integer or None")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, wanted a probability in [0, 1)")
        if count != len(PROJECTIONS):
            raise ValueError(f"scaling has {count} numbers, wanted one, or one each for {PROJECTIONS}")
        if not all(map(math.isfinite, self.scalings)):
            raise ValueError(f"scaling is {self.scaling!r}, wanted finite numbers")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, wanted an integer in [0, 2**63)")

    @cached_property
    def scalings(self) -> tuple[float, float, float]:
        """Scaling of gate, up and down."""
        one_each = self.scaling if isinstance(self.scaling, Sequence) else (self.scaling,) * 3
        return cast("tuple[float, float, float]", tuple(float(s) for s in one_each))


def _in_torch_profile(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make calls of a function ranges of that name where a torch profiler is active."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
                return function(*args, **kwargs)
            with torch.profiler.record_function(name):
                return function(*args, **kwargs)

        return call

    return decorate


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.compiler.disable` without its import of torch._dynamo, which is left to those who compile."""
    disabled: list[Callable[_P, _R]] = []

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            # Dynamo traces this frame, and would warn of a list's method that waits for its argument.
            made = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            disabled.append(made)
        return disabled[0](*args, **kwargs)

    # What Dynamo looks for where it meets a call: it breaks the graph there.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "experts are computed outside of torch"  # type: ignore[attr-defined]
    return call


@dataclass(frozen=True)
class _Call:
    """What a call's autograd node has beside tensors.

    train: whether gradients are recorded where the call is. arrival: see `kt_moe.gpu.function.arriving`.
    """

    train: bool
    versions: Versions
    arrival: Arrival | None


class _MoE(torch.autograd.Function):
    @staticmethod
    @_in_torch_profile("kt_moe.forward")
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: Experts,
        lora: Lora,
        made: _Call,
        *lora_tensors: Tensor | None,
    ) -> Tensor:
        call = checkpointing.call(experts) if experts.checkpoint_experts == "retain" else None
        ctx.experts, ctx.engine = experts, experts.gpu.engine(hidden_states.device)
        # Also where kept results are taken: torch's generator moves on as it did in the first run.
        dropout, seed = _dropout_and_seed(lora, lora_tensors)
        options = lora.scalings, dropout, seed
        train = made.train and any(ctx.needs_input_grad)
        kept = None
        if call is not None:
            train = train or call.hides_grad
            where = options[:2], ctx.engine
            inputs = checkpointing.Inputs.of(hidden_states, topk_ids, where, lora_tensors)
            kept = call.take(inputs)
        ctx.arrival, ctx.versions = made.arrival, made.versions
        if ctx.engine is None:
            out, state = kept or _compute(
                experts, hidden_states, topk_ids, topk_weights, lora_tensors, options,
                train and not experts.recompute,
            )  # fmt: skip
            saved, ctx.lora_options = state
            ctx.save_for_backward(hidden_states, topk_ids, topk_weights, saved, *lora_tensors)
        else:
            from kt_moe.gpu import function as on_device

            # Detached: what is kept must not hold the graph that LoRA tensors may come from.
            held = [None if t is None else t.detach() for t in lora_tensors]
            out, state = kept or on_device.forward(
                ctx.engine, experts, hidden_states, topk_ids, topk_weights, held, options, train
            )
            on_device.save(ctx, state, hidden_states, topk_weights, lora_tensors)
        if call is not None:
            call.keep(inputs, out, state)
        return out

    @staticmethod
    @once_differentiable
    @_in_torch_profile("kt_moe.backward")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        try:
            return _MoE._backward(ctx, grad_out)
        except Exception as error:
            if failed := getattr(ctx, "failed", None):
                failed(error)
            raise

    @staticmethod
    def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.engine is not None:
            from kt_moe.gpu import function as on_device

            return on_device.backward(ctx, grad_out)
        hidden_states, topk_ids, topk_weights, saved, *lora_tensors = ctx.versions.saved_tensors(ctx)
        x, ids, weights, pairs = _for_core(hidden_states, topk_ids, topk_weights, lora_tensors)
        scalings, dropout, seed = ctx.lora_options
        needs_x, _, needs_weights, _, _, _, *needs_lora = ctx.needs_input_grad
        runtime = ctx.experts.runtime._core

        grad_x = empty(x.shape, _result_dtype(hidden_states), runtime) if needs_x else None
        grad_weights = empty(weights.shape, torch.float32, runtime) if needs_weights else None
        grads = tuple(
            empty(t.shape, t.dtype, runtime) if t is not None and needed else None
            for t, needed in zip(pairs, needs_lora, strict=True)
        )
        _core.backward(
            ctx.experts._core, x, ids, weights, pairs, scalings, dropout, seed,
            saved, on_cpu(grad_out, torch.bfloat16),
            grad_x, grad_weights, cast("_core.LoraTensors", grads),
        )  # fmt: skip
        return (
            None if grad_x is None else _like(grad_x, hidden_states),
            None,
            None if grad_weights is None else _like(grad_weights, topk_weights),
            None,
            None,
            None,
            *(None if g is None else _like(g, t) for g, t in zip(grads, lora_tensors, strict=True)),
        )


class MoEFunction:
    """`MoEFunction.apply(...)`: the layer as an autograd function.

    It runs eagerly inside a `torch.compile`d model (a graph break), and cannot be differentiated twice,
    traced, or transformed by torch.func.
    """

    @staticmethod
    @uncompiled
    def apply(
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: Experts,
        lora: Lora | None = None,
        gate_lora_a: Tensor | None = None,
        gate_lora_b: Tensor | None = None,
        up_lora_a: Tensor | None = None,
        up_lora_b: Tensor | None = None,
        down_lora_a: Tensor | None = None,
        down_lora_b: Tensor | None = None,
    ) -> Tensor:
        """Route every token through its experts.

        Args:
            hidden_states: [T, H] bf16, fp16 or fp32, CPU or CUDA; fp16 and fp32 are rounded to bf16.
            topk_ids: [T, K] int64 or int32 in [0, E]; E means "no route".
            topk_weights: [T, K] floating point.
            experts: the frozen weights.
            lora: scaling and dropout; None means scaling 1 and no dropout.
            gate_lora_a, up_lora_a: [E, r, H] fp32 or bf16, or None, as of a gate that there is not. Of these
                and the next, [1, ...] is a matrix that all experts share.
            gate_lora_b, up_lora_b: [E, I, r], given exactly when the A is.
            down_lora_a, down_lora_b: [E, r, I] and [E, H, r].

        Returns:
            [T, H] in the dtype and on the device of hidden_states. Gradients reach hidden_states,
            topk_weights and every LoRA tensor; those of the LoRA tensors are accumulated in fp32 and have the
            tensor's dtype. Results of 1 MiB and more lie in memory that later ones use again when they are
            gone; their storage cannot be resized.

        Raises:
            ValueError: an argument has the wrong shape, dtype or range; the message names it.
            NotImplementedError: torch.func, make_fx, torch.export or torch.jit.trace records the call.
        """
        if not isinstance(experts, Experts):
            raise TypeError(f"experts is a {type(experts).__name__}, wanted kt_moe.Experts")
        if lora is not None and not isinstance(lora, Lora):
            raise TypeError(f"lora is a {type(lora).__name__}, wanted kt_moe.Lora or None")
        tensors: Sequence[Tensor | None] = (
            gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b
        )  # fmt: skip
        refuse_tracing((hidden_states, topk_ids, topk_weights, *tensors))
        check_inputs(hidden_states, topk_ids, topk_weights)
        for name, lora_tensor in zip(LORA_NAMES, tensors, strict=True):
            if lora_tensor is not None:
                check_tensor(name, lora_tensor)
        versions = Versions((*_INPUT_NAMES, *LORA_NAMES), (hidden_states, topk_ids, topk_weights, *tensors))
        _check_shared(experts, tensors)
        tensors = [None if t is None else of_all(t, experts.num_experts) for t in tensors]
        train = torch.is_grad_enabled()
        with checkpointing.unseen():
            arrival = None
            if experts.gpu.engine(hidden_states.device) is not None:
                from kt_moe.gpu.function import arriving

                tensors, arrival = arriving(tensors)
            made = _Call(train, versions, arrival)
            out: Tensor = _MoE.apply(  # type: ignore[no-untyped-call]
                hidden_states, topk_ids, topk_weights, experts, lora or Lora(), made, *tensors
            )
        return out


def check_inputs(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Whether they are tensors with data, and their dtypes; shapes and ids are left to the core."""
    for name, tensor in zip(_INPUT_NAMES, (hidden_states, topk_ids, topk_weights), strict=True):
        check_tensor(name, tensor)
    if hidden_states.dtype not in _FLOATS:
        raise ValueError(f"hidden_states is {hidden_states.dtype}, wanted bfloat16, float16 or float32")
    if hidden_states.dim() != 2:
        shape = list(hidden_states.shape)
        raise ValueError(f"hidden_states has shape {shape}, wanted 2 dimensions: [T, H], a row a token")
    if not topk_weights.is_floating_point():
        raise ValueError(f"topk_weights is {topk_weights.dtype}, wanted a floating-point dtype")


def check_lora_names(lora_params: Mapping[str, Tensor | None]) -> None:
    """TypeError for what is no mapping, ValueError for keys that are no LoRA tensor's name."""
    if not isinstance(lora_params, Mapping):
        raise TypeError(f"lora_params is a {type(lora_params).__name__}, wanted tensors by name")
    if unknown := lora_params.keys() - set(LORA_NAMES):
        names = list(LORA_NAMES)
        raise ValueError(f"lora_params has the unknown keys {sorted(unknown)}, wanted some of {names}")


def _check_shared(experts: Experts, tensors: Sequence[Tensor | None]) -> None:
    """Shapes of matrices that all experts share: the core gets them as one for each, and would name those."""
    if experts.num_experts == 1:
        return
    h, i = experts.hidden_size, experts.intermediate_size
    for name, tensor, a in zip(LORA_NAMES, tensors, (tensors[n - n % 2] for n in range(6)), strict=True):
        if tensor is None or a is None or tensor.dim() != 3 or a.dim() != 3 or len(tensor) != 1:
            continue
        into, out = (i, h) if name.startswith("down") else (h, i)
        wanted = [1, a.shape[1], into] if tensor is a else [1, out, a.shape[1]]
        if list(tensor.shape) != wanted:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, wanted {wanted} of a matrix that all experts share"
            )


def of_all(matrices: Tensor, num_experts: int) -> Tensor:
    """[E, ...] of a matrix for each expert, or a view of the one [1, ...] that all share.

    The gradient of the one is the sum of all experts', in their order.
    """
    if matrices.dim() != 3 or len(matrices) != 1 or num_experts == 1:
        return matrices
    return matrices.expand(num_experts, -1, -1)


def on_failure(result: Tensor, failed: Callable[[Exception], object]) -> None:
    """Have `failed` called with what backward raises, if a call's result requires a gradient."""
    if result.grad_fn is not None:
        result.grad_fn.failed = failed  # type: ignore[attr-defined]


@uncompiled
def moe(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: Experts,
    lora_params: Mapping[str, Tensor | None] | None = None,
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """`MoEFunction.apply` with keywords.

    Args:
        lora_params: any of gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b.
        scaling, dropout, seed: see `Lora`.

    The other arguments, the result and the errors are those of `MoEFunction.apply`.
    """
    params = {} if lora_params is None else lora_params
    check_lora_names(params)
    lora = Lora(scaling, dropout, seed)
    out: Tensor = MoEFunction.apply(hidden_states, topk_ids, topk_weights, experts, lora, **params)
    return out


def _compute(
    experts: Experts,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora_tensors: Sequence[Tensor | None],
    options: LoraOptions,
    save: bool,
) -> tuple[Tensor, tuple[Tensor | None, LoraOptions]]:
    """The result; and for backward what the core saves if `save`, and the options."""
    x, ids, weights, pairs = _for_core(hidden_states, topk_ids, topk_weights, lora_tensors)
    runtime = experts.runtime._core
    saved = None
    if save:
        routes = ids.numel() - _core.count_routes(ids, experts.num_experts)[-1]
        ranks = sum(a.shape[1] for a in pairs[::2] if a is not None and a.ndim == 3)
        saved = empty((routes, experts._saved_width + ranks), torch.bfloat16, runtime)
    out = empty(x.shape, _result_dtype(hidden_states), runtime)
    _core.forward(experts._core, x, ids, weights, pairs, *options, saved, out)
    return _like(out, hidden_states), (saved, options)


def _for_core(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, lora_tensors: Iterable[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, _core.LoraTensors]:
    x, weights = on_cpu(hidden_states, torch.bfloat16), on_cpu(topk_weights, torch.float32)
    pairs = tuple(None if t is None else on_cpu(t) for t in lora_tensors)
    return x, on_cpu(topk_ids), weights, cast("_core.LoraTensors", pairs)


def _dropout_and_seed(lora: Lora, pairs: Sequence[Tensor | None]) -> tuple[float, int]:
    if lora.dropout == 0.0 or all(t is None for t in pairs):
        return 0.0, 0
    if lora.seed is not None:
        return lora.dropout, lora.seed
    return lora.dropout, int(torch.randint(2**63 - 1, (), device="cpu").item())


def _result_dtype(hidden_states: Tensor) -> torch.dtype:
    return torch.bfloat16 if hidden_states.dtype is torch.bfloat16 else torch.float32


def _like(result: Tensor, tensor: Tensor) -> Tensor:
    if tensor.is_cpu and result.dtype is tensor.dtype:
        return result
    return result.to(tensor.device, tensor.dtype)
