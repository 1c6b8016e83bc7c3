"""Tokens sent to the ranks of their experts, and the experts' parts of the results sent back.

`dispatch` and `combine` are differentiable; the backward of each is an exchange in the other direction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_moe import job

_T = TypeVar("_T")
Step = Literal["forward", "forward's results", "backward", "backward's results"]


def partition(num_experts: int, world_size: int, counts: Sequence[float] | None = None) -> list[range]:
    """The experts of each rank: contiguous, as `torch.chunk` and DTensor's `Shard(0)` divide a tensor.

    Every rank has as many as the first, but the last one with any, which may have fewer; ranks behind it have
    an empty range.

    counts: routes of each expert, [E]. The busiest rank then has as few of them as contiguous parts allow
        that have at most twice as many experts as equal ones; the last ranks may have none.

    Raises:
        ValueError: a number below 1, or counts that are not E finite numbers of 0 or more.
    """
    if num_experts < 1 or world_size < 1:
        raise ValueError(
            f"num_experts is {num_experts} and world_size {world_size}, wanted at least 1 of each"
        )
    each = -(-num_experts // world_size)
    firsts = [min(rank * each, num_experts) for rank in range(world_size + 1)]
    if counts is not None:
        loads = [float(count) for count in counts]
        if len(loads) != num_experts or not all(math.isfinite(load) and load >= 0 for load in loads):
            raise ValueError(f"counts is {loads}, wanted {num_experts} finite numbers of 0 or more")
        if any(loads):
            firsts = _balanced(loads, world_size, 2 * each)
    return [range(*both) for both in itertools.pairwise(firsts)]


def _balanced(loads: Sequence[float], parts: int, most: int) -> list[int]:
    """Where contiguous parts of at most `most` loads begin whose largest sum is least, and where they end."""

    def cut(limit: float) -> list[int]:
        firsts, total = [0], 0.0
        for number, load in enumerate(loads):
            if number - firsts[-1] == most or (total + load > limit and number > firsts[-1]):
                firsts.append(number)
                total = 0.0
            total += load
        return firsts + [len(loads)] * max(1, parts + 1 - len(firsts))

    least, enough = max(loads), sum(loads)
    for _ in range(64):
        middle = (least + enough) / 2
        least, enough = (least, middle) if len(cut(middle)) == parts + 1 else (middle, enough)
    return cut(enough)


def exchange_bytes(hidden_size: int, topk: int, recompute: bool = False) -> tuple[int, int]:
    """What a training step exchanges for a token and a rank it goes to: bytes there, and bytes back.

    Forward sends bf16 rows with ids and weights, backward bf16 gradients; fp32 results come back, and fp32
    gradients of rows and weights.

    recompute: gradient checkpointing runs the exchanges of forward twice.
    """
    times = 2 if recompute else 1
    there = times * (2 * hidden_size + 8 * topk) + 2 * hidden_size
    return there, times * 4 * hidden_size + 4 * (hidden_size + topk)


@dataclass(frozen=True)
class Routes:
    """The rows that a rank sends, those for rank 0 first, tokens ascending.

    Attributes:
        tokens: [S] int64, which token each row is.
        ids: [S, K] int32 numbers of experts among those of the rank that gets the row; their count means "no
            route".
        sizes: rows for each rank.
    """

    tokens: Tensor
    ids: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, ids: Tensor, parts: Sequence[range]) -> Routes:
        """Of [T, K] ids in [0, E], E meaning "no route", and the `partition` of the experts."""
        ids, world = ids.long(), len(parts)
        firsts, stops = (
            torch.tensor([getattr(part, end) for part in parts], device=ids.device)
            for end in ("start", "stop")
        )
        owners = torch.bucketize(ids, stops, right=True)  # `world` of slots without a route
        wanted = torch.zeros(world + 1, len(ids), dtype=torch.bool, device=ids.device)
        wanted[owners.T, torch.arange(len(ids), device=ids.device)] = True
        to, tokens = wanted[:world].nonzero(as_tuple=True)
        there = owners[tokens] == to[:, None]
        local = torch.where(there, ids[tokens] - firsts[to, None], (stops - firsts)[to, None])
        return cls(tokens, local.int(), torch.bincount(to, minlength=world).tolist())


@dataclass(frozen=True)
class Exchange:
    """One call's exchanges between the ranks of a group.

    Attributes:
        agree: called on all ranks before each exchange of backward, with the name of its step and what the
            rank failed with, if it did.
        sent, received: rows to and from each rank.
    """

    group: dist.ProcessGroup | None
    agree: Callable[[Step, Exception | None], object]
    sent: list[int]
    received: list[int]

    def send(self, rows: Tensor) -> Tensor:
        """[S, ...] in the order of `Routes` to the ranks of the experts: [R, ...], those of rank 0 first."""
        return self._swap(rows, self.sent, self.received)

    def send_back(self, rows: Tensor, tokens: Tensor, count: int) -> Tensor:
        """[R, N] fp32 to the ranks of the tokens, where those of a token are added in the order of ranks."""
        parts = self._swap(rows, self.received, self.sent)
        total = parts.new_zeros(count, parts.shape[1])
        for at, part in zip(*(t.split_with_sizes(self.sent) for t in (tokens, parts)), strict=True):
            total.index_add_(0, at, part)  # a token is once in a part, so that the order of sums is fixed
        return total

    def _swap(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        got = rows.new_empty(sum(received), *rows.shape[1:])
        exchanged(got, rows.contiguous(), received, sent, self.group)
        return got


def exchanges_host_memory(group: dist.ProcessGroup | None) -> bool:
    """Whether the group has a backend for tensors in host memory, perhaps beside one for those of GPUs."""
    return "cpu:" in dist.get_backend_config(group)


def exchanged(
    got: Tensor,
    rows: Tensor,
    received: list[int] | None,
    sent: list[int] | None,
    group: dist.ProcessGroup | None,
) -> None:
    """`all_to_all_single`.

    Raises:
        RuntimeError: torch's, as another rank is gone or silent; where that one could tell what ended it, it
            says so.
    """
    try:
        dist.all_to_all_single(got, rows, received, sent, group=group)
    except RuntimeError as error:
        if told := job.failure():
            raise RuntimeError(f"{told} (seen by an expert parallel layer's exchange of tokens)") from error
        raise


def attempt(function: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """What the function returns, or raises: the other ranks are told before it is."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def dispatch(
    hidden_states: Tensor, topk_weights: Tensor, anchor: Tensor | None, routes: Routes, exchange: Exchange
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens to the ranks of their experts.

    Args:
        hidden_states: [T, H], sent as bf16.
        topk_weights: [T, K], sent as fp32.
        anchor: something that requires a gradient, so that what is returned does on this rank too.

    Returns:
        Rows that came [R, H] in fp32, as their gradients will be; ids [R, K] int32; weights [R, K] fp32.
    """
    got = _Dispatch.apply(hidden_states, topk_weights, anchor, routes, exchange)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor, Tensor]", got)


def combine(
    partial: Tensor, anchor: Tensor | None, routes: Routes, like: Tensor, exchange: Exchange
) -> Tensor:
    """The experts' parts of the results back to the tokens, and added up.

    Args:
        partial: [R, H] fp32.
        anchor: as of `dispatch`.
        like: [T, H], the shape and dtype of the result.
    """
    out: Tensor = _Combine.apply(partial, anchor, routes.tokens, len(like), like.dtype, exchange)  # type: ignore[no-untyped-call]
    return out


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        topk_weights: Tensor,
        anchor: Tensor | None,
        routes: Routes,
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = routes.tokens
        ctx.exchange, ctx.count = exchange, len(hidden_states)
        ctx.dtypes = hidden_states.dtype, topk_weights.dtype
        ctx.save_for_backward(tokens)
        fields = hidden_states[tokens].bfloat16(), routes.ids, topk_weights[tokens].float()
        got = exchange.send(torch.cat([_as_bytes(field) for field in fields], dim=1))
        each = got.split_with_sizes([field.shape[1] * field.itemsize for field in fields], dim=1)
        rows, ids, weights = (
            # Copied by itself: a view of other elements wants them aligned.
            part.contiguous().view(field.dtype)
            for part, field in zip(each, fields, strict=True)
        )
        ctx.mark_non_differentiable(ids)
        return rows.float(), ids, weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows: Tensor, _: object, grad_weights: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (tokens,) = ctx.saved_tensors
        both, error = attempt(lambda: torch.cat([grad_rows, grad_weights], dim=1))
        ctx.exchange.agree("backward's results", error)
        x, weights = ctx.exchange.send_back(both, tokens, ctx.count).tensor_split([grad_rows.shape[1]], dim=1)
        x_dtype, weights_dtype = ctx.dtypes
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        return (
            x.to(x_dtype).contiguous() if needs_x else None,
            weights.to(weights_dtype).contiguous() if needs_weights else None,
            None,
            None,
            None,
        )


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        partial: Tensor,
        anchor: Tensor | None,
        tokens: Tensor,
        count: int,
        dtype: torch.dtype,
        exchange: Exchange,
    ) -> Tensor:
        ctx.exchange = exchange
        # On all ranks this is the last tensor that a call saves: a checkpointed region is recomputed as far
        # as its last saved tensor, so that all ranks recompute all exchanges of a call, or none.
        ctx.save_for_backward(tokens)
        return exchange.send_back(partial, tokens, count).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (tokens,) = ctx.saved_tensors
        sent, error = attempt(lambda: _as_bytes(grad_out[tokens].bfloat16()))
        ctx.exchange.agree("backward", error)
        rows = ctx.exchange.send(sent)
        return rows.view(torch.bfloat16).float(), None, None, None, None, None


def _as_bytes(rows: Tensor) -> Tensor:
    """[N, bytes] of [N, M]: all backends exchange bytes."""
    return rows.contiguous().view(torch.uint8)
