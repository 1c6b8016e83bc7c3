"""Tokens sent to the ranks of their experts, and the experts' parts of the results sent back, in chunks.

While a chunk is computed, the next one is on its way to the experts, and the results of the one before go
back. Four differentiable functions make a call: `start`, then for each chunk `arrive` and `leave`, before and
behind its computation, and `combine`. Handles, which are scalars, tell autograd in which order; the rows are
in the call's `Exchange`. Backward is the mirror image: the last chunk comes first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_moe import job

_T = TypeVar("_T")
Step = Literal["forward", "forward's results", "backward", "backward's results"]
CHUNKS = (1, 2, 4)  # into which a rank's tokens are divided
PARTS = CHUNKS[-1]
# Rows that an expert has in each of several chunks on the average; with fewer, weights are read too often.
ROWS = 512


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
        part_sizes: of each rank, rows for it in each of some equal runs of a call's tokens.
    """

    tokens: Tensor
    ids: Tensor
    part_sizes: list[list[int]]

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
        keys = to * PARTS + _runs(tokens, len(ids), PARTS)
        return cls(
            tokens, local.int(), torch.bincount(keys, minlength=world * PARTS).view(world, PARTS).tolist()
        )

    @property
    def sizes(self) -> list[int]:
        """Rows for each rank."""
        return [sum(parts) for parts in self.part_sizes]

    def divided(self, count: int, chunks: int) -> list[Routes]:
        """Those of each of so many equal runs of a call's `count` tokens."""
        if chunks == 1:
            return [self]
        runs, found = _runs(self.tokens, count, chunks), []
        sizes = [sizes_of_chunks(parts, chunks) for parts in self.part_sizes]
        for chunk in range(chunks):
            rows = (runs == chunk).nonzero()[:, 0]
            found.append(Routes(self.tokens[rows], self.ids[rows], [[of_rank[chunk]] for of_rank in sizes]))
        return found


def _runs(tokens: Tensor, count: int, runs: int) -> Tensor:
    """In which of so many equal runs of `count` tokens each of some tokens is."""
    stops = [count * (run + 1) // runs for run in range(runs)]
    return torch.bucketize(tokens, torch.tensor(stops, device=tokens.device), right=True)


def chunk_count(routes: Sequence[int], num_experts: int) -> int:
    """Into how many chunks a call's tokens are divided, the same on all ranks.

    routes: of each rank's tokens; below 0 where experts are computed on a GPU: each chunk would bring their
        weights there.
    """
    if min(routes) < 0:
        return 1
    return max(chunks for chunks in CHUNKS if chunks == 1 or sum(routes) >= chunks * ROWS * num_experts)


def sizes_of_chunks(of_parts: Sequence[int], chunks: int) -> list[int]:
    """Rows of each chunk, of those of `PARTS` runs of tokens."""
    each = PARTS // chunks
    return [sum(of_parts[chunk * each : (chunk + 1) * each]) for chunk in range(chunks)]


class Exchange:
    """One call's exchanges between the ranks of a group.

    Args:
        agree: called on all ranks before the first exchange of backward, and before the last results of each
            direction, with the name of its step and what the rank failed with, if it did.
        sent, received: of each chunk, rows to and from each rank.
        widths: of results, in forward and in backward; 0: there are none.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        agree: Callable[[Step, Exception | None], object],
        sent: Sequence[list[int]],
        received: Sequence[list[int]],
        widths: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.group, self.agree, self.sent, self.received = group, agree, sent, received
        self.widths, self.device = widths, device
        self._coming: dict[int, _Coming] = {}
        self._results: dict[int, _Coming] = {}

    def begin(self, rows: Callable[[int], Tensor], forward: bool) -> None:
        """Send the direction's first chunk to the ranks of the experts.

        rows: of a chunk, [S, bytes] in the order of its `Routes`.
        """
        order = list(range(len(self.sent)))
        self._order = order if forward else order[::-1]
        self._step: Step = "forward's results" if forward else "backward's results"
        self._width = self.widths[0 if forward else 1]
        self._rows: Callable[[int], Tensor] | None = rows
        self._send(self._order[0])

    def _send(self, chunk: int) -> None:
        assert self._rows is not None
        rows = self._rows(chunk)
        if chunk == self._order[-1]:
            self._rows = None  # and with it the tokens, which a checkpointed region must not keep
        self._coming[chunk] = _Coming.of(rows, self.sent[chunk], self.received[chunk], self.group)

    def arrived(self, chunk: int) -> Tensor:
        """[R, bytes] of a chunk, those of rank 0 first. The next one is sent."""
        got = self._coming.pop(chunk).wait()
        if chunk != self._order[-1]:
            self._send(self._order[self._order.index(chunk) + 1])
        return got

    def send_back(self, chunk: int, rows: Tensor) -> None:
        """[R, width] fp32 of a chunk to the ranks of the tokens. RuntimeError: another rank has failed."""
        if chunk == self._order[-1]:
            self.agree(self._step, None)
        self._return(chunk, rows)

    def _return(self, chunk: int, rows: Tensor) -> None:
        if self._width:
            sent, received = self.received[chunk], self.sent[chunk]
            self._results[chunk] = _Coming.of(rows, sent, received, self.group)

    def fail(self, chunk: int, error: Exception) -> NoReturn:
        """Raise an error of a chunk's computation, on all ranks, after the exchanges that they begin."""
        for at in self._order[self._order.index(chunk) :]:
            if at != chunk:
                self.arrived(at)
            if at == self._order[-1]:
                self.agree(self._step, error)
            self._return(at, torch.zeros(sum(self.received[at]), self._width, device=self.device))
        raise error

    def sums(self, tokens: Sequence[Tensor], count: int) -> Tensor:
        """[T, width] fp32 of what comes back: the rows of a token are added in the order of ranks."""
        total = torch.zeros(count, self._width, device=self.device)
        for chunk in self._order:
            parts = self._results.pop(chunk).wait()
            each = (t.split_with_sizes(self.sent[chunk]) for t in (tokens[chunk], parts))
            for at, part in zip(*each, strict=True):
                total.index_add_(0, at, part)  # a token is once in a part, so that the order of sums is fixed
        return total


@dataclass(frozen=True)
class _Coming:
    """Rows on their way from all ranks; `sent` are those to them, which have to last until then."""

    work: Any
    got: Tensor
    sent: Tensor

    @classmethod
    def of(
        cls, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> _Coming:
        got, rows = rows.new_empty(sum(received), *rows.shape[1:]), rows.contiguous()
        with telling_who_failed():
            work = dist.all_to_all_single(got, rows, received, sent, group=group, async_op=True)
        return cls(work, got, rows)

    def wait(self) -> Tensor:
        with telling_who_failed():
            self.work.wait()
        return self.got


def exchanges_host_memory(group: dist.ProcessGroup | None) -> bool:
    """Whether the group has a backend for tensors in host memory, perhaps beside one for those of GPUs."""
    return "cpu:" in dist.get_backend_config(group)


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long operations of a group may take; None where torch does not tell."""
    processes: Any = group or dist.group.WORLD
    device = torch.device("cpu" if exchanges_host_memory(group) else "cuda")
    options = getattr(processes._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


@contextmanager
def telling_who_failed() -> Iterator[None]:
    """Around an exchange.

    Raises:
        RuntimeError: torch's, as another rank is gone or silent; where that one could tell what ended it, it
            says so.
    """
    try:
        yield
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


def start(
    hidden_states: Tensor,
    topk_weights: Tensor,
    anchor: Tensor | None,
    routes: Sequence[Routes],
    exchange: Exchange,
) -> Tensor:
    """Send the first chunk of tokens to the ranks of their experts.

    Args:
        hidden_states: [T, H], sent as bf16.
        topk_weights: [T, K], sent as fp32.
        anchor: something that requires a gradient, so that what arrives does on this rank too.
        routes: of each chunk.

    Returns:
        A handle for `arrive`.
    """
    handle: Tensor = _Start.apply(hidden_states, topk_weights, anchor, routes, exchange)  # type: ignore[no-untyped-call]
    return handle


def arrive(handle: Tensor, exchange: Exchange, chunk: int, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Wait for a chunk, and send the next one.

    Returns:
        Rows that came [R, H] in fp32, as their gradients will be; ids [R, K] int32; weights [R, K] fp32.
    """
    got = _Arrive.apply(handle, exchange, chunk, topk)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor, Tensor]", got)


def leave(partial: Tensor, anchor: Tensor | None, exchange: Exchange, chunk: int) -> Tensor:
    """Send the experts' parts of a chunk's results back, [R, H] fp32.

    anchor: as of `start`.

    Returns:
        A handle for `combine`.
    """
    handle: Tensor = _Leave.apply(partial, anchor, exchange, chunk)  # type: ignore[no-untyped-call]
    return handle


def combine(handles: Sequence[Tensor], routes: Sequence[Routes], like: Tensor, exchange: Exchange) -> Tensor:
    """Add up the parts of results: [T, H] as `like`."""
    tokens = [of_chunk.tokens for of_chunk in routes]
    out: Tensor = _Combine.apply(tokens, len(like), like.dtype, exchange, *handles)  # type: ignore[no-untyped-call]
    return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        topk_weights: Tensor,
        anchor: Tensor | None,
        routes: Sequence[Routes],
        exchange: Exchange,
    ) -> Tensor:
        ctx.exchange, ctx.sizes = exchange, hidden_states.shape
        ctx.dtypes = hidden_states.dtype, topk_weights.dtype
        ctx.save_for_backward(*(of_chunk.tokens for of_chunk in routes))

        def rows(chunk: int) -> Tensor:
            tokens, ids = routes[chunk].tokens, routes[chunk].ids
            fields = hidden_states[tokens].bfloat16(), ids, topk_weights[tokens].float()
            return torch.cat([_as_bytes(field) for field in fields], dim=1)

        exchange.begin(rows, forward=True)
        return hidden_states.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: object) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        count, hidden_size = ctx.sizes
        both = ctx.exchange.sums(ctx.saved_tensors, count)
        x, weights = both.tensor_split([hidden_size], dim=1)
        x_dtype, weights_dtype = ctx.dtypes
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        return (
            x.to(x_dtype).contiguous() if needs_x else None,
            weights.to(weights_dtype).contiguous() if needs_weights else None,
            None,
            None,
            None,
        )


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, exchange: Exchange, chunk: int, topk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange, ctx.chunk = exchange, chunk
        ctx.dtype = handle.dtype
        got = exchange.arrived(chunk)
        sizes = [got.shape[1] - 8 * topk, 4 * topk, 4 * topk]
        rows, ids, weights = (
            # Copied by itself: a view of other elements wants them aligned.
            part.contiguous().view(dtype)
            for part, dtype in zip(
                got.split_with_sizes(sizes, dim=1), (torch.bfloat16, torch.int32, torch.float32), strict=True
            )
        )
        ctx.mark_non_differentiable(ids)
        return rows.float(), ids, weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows: Tensor, _: object, grad_weights: Tensor
    ) -> tuple[Tensor, None, None, None]:
        both, error = attempt(lambda: torch.cat([grad_rows, grad_weights], dim=1))
        if error is not None:
            ctx.exchange.fail(ctx.chunk, error)
        ctx.exchange.send_back(ctx.chunk, both)
        return grad_rows.new_zeros((), dtype=ctx.dtype), None, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, anchor: Tensor | None, exchange: Exchange, chunk: int) -> Tensor:
        ctx.exchange, ctx.chunk = exchange, chunk
        exchange.send_back(chunk, partial)
        return partial.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: object) -> tuple[Tensor, None, None, None]:
        return ctx.exchange.arrived(ctx.chunk).view(torch.bfloat16).float(), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Sequence[Tensor],
        count: int,
        dtype: torch.dtype,
        exchange: Exchange,
        *handles: Tensor,
    ) -> Tensor:
        ctx.exchange = exchange
        # On all ranks these are the last tensors that a call saves: a checkpointed region is recomputed as
        # far as its last saved tensor, so that all ranks recompute all exchanges of a call, or none.
        ctx.save_for_backward(*tokens)
        return exchange.sums(tokens, count).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens = ctx.saved_tensors
        rows, error = attempt(lambda: [_as_bytes(grad_out[t].bfloat16()) for t in tokens])
        ctx.exchange.agree("backward", error)
        assert rows is not None
        ctx.exchange.begin(rows.__getitem__, forward=False)
        return None, None, None, None, *(grad_out.new_zeros((), dtype=torch.float32) for _ in rows)


def _as_bytes(rows: Tensor) -> Tensor:
    """[N, bytes] of [N, M]: all backends exchange bytes."""
    return rows.contiguous().view(torch.uint8)
