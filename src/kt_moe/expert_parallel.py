"""Expert parallelism: the experts of a layer divided over the ranks of a process group, tokens exchanged.

Each rank has some of a layer's experts (`local_experts`) with their LoRA parameters, and some of the tokens.
A call sends each token once to every rank that has one of its experts, with the routes it has there
(`all_to_all_single` with splits). The rank computes its part, as `kt_moe.moe` does, and sends it back. The
token's own rank adds up the parts in the order of the ranks. Backward is the same exchange in reverse. Large
calls do so in chunks of their tokens, of which one is exchanged while another is computed.

For each token and each rank that has an expert of it, forward sends 2 * H + 8 * K bytes and gets 4 * H back;
backward sends 2 * H and gets 4 * (H + K) back. Parts of outputs and of gradients are fp32 while they are
exchanged, so that their sum is rounded once, as in one process. Hidden states and the gradient of the output
are sent as bf16, to which the experts round them anyhow.

Before the first rows and before the last results of forward, and of backward, the ranks tell each other, in a
few numbers, which call it is, how many rows come, and whether something failed. Ranks that do not agree all
raise, where they would wait for each other: if one recomputes a forward and another does not, if one does not
record gradients, if one refuses its arguments.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from kt_moe.experts import Experts
from kt_moe.functional import Lora, check_inputs, check_lora_names, moe, on_failure, uncompiled
from kt_moe.job import differences, tell_what_ends_this_process
from kt_moe.tensors import check_tensor, refuse_tracing
from kt_moe.token_exchange import (
    CHUNKS,
    PARTS,
    Exchange,
    Routes,
    Step,
    arrive,
    attempt,
    chunk_count,
    combine,
    exchanges_host_memory,
    leave,
    partition,
    sizes_of_chunks,
    start,
    telling_who_failed,
)

_STEPS: tuple[Step, ...] = get_args(Step)
# What a rank's call needs, as bits: a graph, gradients of its tokens, gradients of its LoRA tensors.
_RECORDS, _TOKENS, _LORA = 1, 2, 4


def local_experts(
    num_experts: int, group: dist.ProcessGroup | None = None, counts: Sequence[float] | Tensor | None = None
) -> range:
    """Which of a layer's E experts the calling rank has, as `Experts.from_checkpoint(experts=)` takes it.

    Parts are contiguous, and as large as the first, but for the last ranks, which may have fewer or none.

    counts: [E], how often each expert is routed to, in any unit, as `Experts.routed` and
        `kt_moe.routing_counts` tell; the same on all ranks. The busiest rank then has as few routes as
        possible, and no rank more than twice as many experts as without.

    Raises:
        ValueError: torch.distributed is not initialised, the rank is not in the group, num_experts is
            less than 1, or counts are not E finite numbers of 0 or more.
    """
    rank, size = _rank_and_size(group)
    return partition(num_experts, size, counts.tolist() if isinstance(counts, Tensor) else counts)[rank]


class ExpertParallel:
    """A layer whose experts are divided over the ranks of a process group.

    All ranks make their layers in the same order, and run them, forward and backward, in the same order.

    Args:
        experts: this rank's, those of `local_experts`; None where it has none.
        num_experts: E of the whole layer.
        group: None: all processes. Give experts a group of their own (`torch.distributed.new_group()`) where
            a wrapper such as DistributedDataParallel uses the same processes in backward: the operations of a
            group must begin in the same order on all ranks.
        average: divide gradients of LoRA tensors by the number of ranks. They are sums over the tokens of all
            ranks; divided, they are means over ranks, as DistributedDataParallel and fully_shard make of all
            other gradients. False leaves the sums.
        chunks: 1, 2 or 4, into which the tokens of each call are divided; None: by how many rows experts
            have (`kt_moe.token_exchange.chunk_count`). The same on all ranks.

    Raises:
        ValueError: torch.distributed is not initialised, or the rank is not in the group. On all ranks: one
            has not its part of the experts, or they disagree about the layer; names the ranks or their parts.
    """

    def __init__(
        self,
        experts: Experts | None,
        num_experts: int,
        group: dist.ProcessGroup | None = None,
        *,
        average: bool = True,
        chunks: int | None = None,
    ) -> None:
        self.rank, self.world_size = _rank_and_size(group)
        self.experts, self.num_experts, self.group, self.average = experts, num_experts, group, average
        self.chunks = chunks
        processes = group or dist.group.WORLD
        assert processes is not None
        self._counts = _counts.setdefault(processes, _Counts())
        self._number = self._counts.layers
        # What ranks tell each other goes by the CPU where it can: then no rank waits for its GPU's work.
        self._tells_by_cpu = exchanges_host_memory(group)
        # What is wrong with this rank's arguments is told, not raised: the others would wait.
        layers: list[Any] = [None] * self.world_size
        dist.all_gather_object(layers, _Layer.of(experts, num_experts, average, chunks, self._number), group)
        _check_layers(layers)
        self._counts.layers += 1
        tell_what_ends_this_process()
        firsts = [0, *itertools.accumulate(layer.local for layer in layers)]
        self.parts = [range(*both) for both in itertools.pairwise(firsts)]
        self.hidden_size: int = next(layer.sizes["hidden_size"] for layer in layers if layer.sizes)

    @property
    def local(self) -> range:
        """Numbers that this rank's experts have in the whole layer."""
        return self.parts[self.rank]

    @uncompiled
    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        lora_params: Mapping[str, Tensor | None] | None = None,
        *,
        scaling: float | Sequence[float] = 1.0,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> Tensor:
        """Route this rank's tokens through the experts of all ranks.

        All ranks call it, also those without tokens. Where one rank needs gradients, the results of all ranks
        require them, and all ranks have to run backward.

        Args:
            hidden_states: [T, H] bf16, fp16 or fp32, on a device that the group's backend exchanges. T may
                differ between ranks.
            topk_ids: [T, K] int64 or int32 in [0, E], E of the whole layer; E means "no route". K is the same
                on all ranks.
            topk_weights: [T, K] floating point.
            lora_params: as for `kt_moe.moe`, of this rank's experts; None or empty where it has none. A
                matrix [1, ...] would be shared by the experts of this rank alone, not by those of all ranks.
            scaling: as for `kt_moe.moe`.
            dropout, seed: as for `kt_moe.moe`. Masks go by where rows arrive, and so differ from those of one
                process. Without a seed each rank draws one for each chunk from its own default generator.

        Returns:
            [T, H] in the dtype and on the device of hidden_states. Gradients reach hidden_states,
            topk_weights and the LoRA tensors; those of the latter are complete, and need no reduction.

        Raises:
            ValueError, TypeError: as `kt_moe.moe`, on the rank whose arguments it is about.
            RuntimeError: another rank failed, or the ranks do not make the same call; names the ranks. Or, by
                torch: a rank is gone, or silent for longer than the group's timeout.
        """
        number, params = self._counts.calls, lora_params or {}
        self._counts.calls += 1

        def look() -> tuple[Routes, int, int]:
            refuse_tracing((hidden_states, topk_ids, topk_weights))
            check_inputs(hidden_states, topk_ids, topk_weights)
            self._check(hidden_states, topk_ids, topk_weights, params)
            Lora(scaling, dropout, seed)
            found = Routes.of(topk_ids, self.parts)
            on_gpu = self.experts is not None and self.experts.gpu.engine(hidden_states.device) is not None
            return found, _needs(hidden_states, topk_weights, params), -1 if on_gpu else topk_ids.numel()

        seen, error = attempt(look)
        routes, needs, rows = seen or (None, 0, 0)
        device = getattr(hidden_states, "device", torch.device("cpu"))
        call = _Call(self._number, number, topk_ids.shape[1] if routes else 0, needs)
        sizes = routes.part_sizes if routes else None
        heard, needs = self._agree(call, "forward", device, error, rows, sizes)
        assert routes is not None
        chunks = self.chunks or chunk_count([row[0] for row in heard], self.num_experts)
        of_chunks = routes.divided(len(topk_ids), chunks)
        received = [sizes_of_chunks(row[1:], chunks) for row in heard]

        def agree(step: Step, error: Exception | None = None) -> None:
            self._agree(call, step, device, error)

        width = self.hidden_size
        exchange = Exchange(
            self.group,
            agree,
            [chunk.sizes for chunk in of_chunks],
            [list(of_ranks) for of_ranks in zip(*received, strict=True)],
            (width, width + call.slots if needs & _TOKENS else 0),
            device,
        )
        # So that a rank that needs no gradient takes part in the backward of the others.
        anchor = torch.empty(0, device=device, requires_grad=True) if needs & (_TOKENS | _LORA) else None
        anchor_of_tokens = anchor if needs & _TOKENS else None
        lora = {name: self._scaled(tensor) for name, tensor in params.items()}
        begun = start(hidden_states, topk_weights, anchor_of_tokens, of_chunks, exchange)
        handles = []
        for chunk in range(chunks):
            arrived = arrive(begun, exchange, chunk, call.slots)
            own = seed if seed is None or chunk == 0 else (seed + chunk) % 2**63
            lora_options: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "seed": own}
            partial, error = attempt(functools.partial(self._compute, *arrived, lora, **lora_options))
            if error is not None:
                exchange.fail(chunk, error)
            assert partial is not None
            on_failure(partial, functools.partial(exchange.fail, chunk))
            handles.append(leave(partial, anchor, exchange, chunk))
        return combine(handles, of_chunks, hidden_states, exchange)

    def _compute(
        self, rows: Tensor, ids: Tensor, weights: Tensor, lora: Mapping[str, Tensor | None], **options: Any
    ) -> Tensor:
        """What this rank's experts make of rows; where it has none there are no rows."""
        return rows if self.experts is None else moe(rows, ids, weights, self.experts, lora, **options)

    def _scaled(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not self.average:
            return tensor
        scaled: Tensor = _ScaleGrad.apply(tensor, 1 / self.world_size)  # type: ignore[no-untyped-call]
        return scaled

    def _check(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, lora: Mapping[str, Tensor | None]
    ) -> None:
        """What has to be right before rows are sent, and what `kt_moe.moe` would say of other rows."""
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.hidden_size:
            raise ValueError(
                f"hidden_states has shape {list(hidden_states.shape)}, wanted [T, {self.hidden_size}]"
            )
        if topk_ids.dim() != 2 or len(topk_ids) != len(hidden_states) or topk_ids.shape[1] == 0:
            raise ValueError(f"topk_ids has shape {list(topk_ids.shape)}, wanted [{len(hidden_states)}, K]")
        if topk_weights.shape != topk_ids.shape:
            raise ValueError(
                f"topk_weights has shape {list(topk_weights.shape)}, wanted {list(topk_ids.shape)}, that of "
                "topk_ids"
            )
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"topk_ids is {topk_ids.dtype}, wanted int64 or int32")
        low, high = (int(n) for n in topk_ids.aminmax()) if len(topk_ids) else (0, 0)
        if low < 0 or high > self.num_experts:
            raise ValueError(f"topk_ids holds {low} to {high}, wanted [0, {self.num_experts}]")
        check_lora_names(lora)
        for name, tensor in lora.items():
            if tensor is not None:
                check_tensor(name, tensor)
            if tensor is not None and self.experts is not None and len(tensor) != self.experts.num_experts:
                raise ValueError(
                    f"{name} has {len(tensor)} matrices, wanted {self.experts.num_experts}, one for each "
                    "expert of this rank (shared outer matrices are not supported)"
                )
        if self.experts is None and any(tensor is not None for tensor in lora.values()):
            raise ValueError(f"lora_params is given, but rank {self.rank} has no experts: wanted None")

    def _agree(
        self,
        call: _Call,
        step: Step,
        device: torch.device,
        error: Exception | None,
        routes: int = 0,
        sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[list[int]], int]:
        """Tell all ranks what this one does, how many routes it has, and how many rows for each.

        Args:
            routes, sizes: see `chunk_count` and `Routes.part_sizes`.

        Returns:
            Of each rank its routes, and rows that come from it; and what any of them needs.

        Raises:
            Exception: `error`, if there is one.
            RuntimeError: another rank has one, or does something else.
        """
        mine = [_STEPS.index(step), call.layer, call.number, call.slots, call.needs, int(error is not None)]
        rows = [[*mine, routes, *parts] for parts in sizes or [[0] * PARTS] * self.world_size]
        told = torch.tensor(rows, dtype=torch.int64, device="cpu" if self._tells_by_cpu else device)
        heard = torch.empty_like(told)
        with telling_who_failed():
            dist.all_to_all_single(heard, told, group=self.group)
        ranks = heard.tolist()
        failed = any(row[5] for row in ranks)
        differ = any(row[:4] != mine[:4] or (row[4] ^ call.needs) & _RECORDS for row in ranks)
        if failed or differ:  # who goes on after the error counts alike again
            self._counts.calls = max(row[2] for row in ranks) + 1
        if failed:
            self._fail(error)
        if differ:
            said = [
                {"step": _STEPS[s], "layer": layer, "call": n, "K": k, "grad mode": bool(needs & _RECORDS)}
                for s, layer, n, k, needs, *_ in ranks
            ]
            raise RuntimeError(
                f"ranks call expert parallel layers differently: {differences(dict(enumerate(said)))}"
            )
        return [row[6:] for row in ranks], functools.reduce(operator.or_, (row[4] for row in ranks))

    def _fail(self, error: Exception | None) -> None:
        """On all ranks, where one has an error: raise it there, and tell it elsewhere."""
        texts: list[Any] = [None] * self.world_size
        mine = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(texts, mine, self.group)
        if error is not None:
            raise error
        said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)
        raise RuntimeError(f"expert parallel layer {self._number} failed on {said}")


@dataclass(frozen=True)
class _Call:
    """A call of a layer.

    layer, number: of the group's layers and of all their calls. slots: K. needs: see above.
    """

    layer: int
    number: int
    slots: int
    needs: int


def _needs(hidden_states: Tensor, topk_weights: Tensor, lora: Mapping[str, Tensor | None]) -> int:
    if not torch.is_grad_enabled():
        return 0
    tokens = hidden_states.requires_grad or topk_weights.requires_grad
    of_lora = any(tensor is not None and tensor.requires_grad for tensor in lora.values())
    return _RECORDS | tokens * _TOKENS | of_lora * _LORA


class _ScaleGrad(torch.autograd.Function):
    """The tensor itself, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@dataclass
class _Counts:
    """Layers of a group and their calls, alike on all ranks."""

    layers: int = 0
    calls: int = 0


_counts: WeakKeyDictionary[dist.ProcessGroup, _Counts] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Layer:
    """What a rank has of a layer, to be compared.

    number: layers of the group before it. local: its experts. sizes: empty without experts. error: what is
    wrong with the rank's arguments by themselves, or empty.
    """

    number: int
    num_experts: int
    average: bool
    chunks: int | None
    local: int
    sizes: dict[str, Any]
    error: str

    @classmethod
    def of(cls, experts: object, num_experts: int, average: bool, chunks: int | None, number: int) -> _Layer:
        error, local, sizes = "", 0, {}
        if not isinstance(num_experts, int) or num_experts < 1:
            error = f"num_experts is {num_experts!r}, wanted an integer of 1 or more"
        if chunks is not None and (type(chunks) is not int or chunks not in CHUNKS):
            error = f"chunks is {chunks!r}, wanted 1, 2, 4 or None"
        if isinstance(experts, Experts):
            names = ("hidden_size", "intermediate_size", "gated", "activation", "format")
            local, sizes = experts.num_experts, {name: getattr(experts, name) for name in names}
        elif experts is not None:
            error = f"experts is a {type(experts).__name__}, wanted kt_moe.Experts or None"
        return cls(number, num_experts, average, chunks, local, sizes, error)


def _check_layers(layers: Sequence[_Layer]) -> None:
    for rank, layer in enumerate(layers):
        if layer.error:
            raise ValueError(f"on rank {rank} {layer.error}")
    said: dict[int, dict[str, Any]] = {
        rank: {
            "num_experts": a.num_experts,
            "average": a.average,
            "chunks": a.chunks,
            "layers before": a.number,
        }
        | a.sizes
        for rank, a in enumerate(layers)
    }
    if differing := differences(said):
        raise ValueError(f"ranks disagree about an expert parallel layer: {differing}")
    if sum(layer.local for layer in layers) != layers[0].num_experts:
        raise ValueError(
            f"ranks have {', '.join(str(layer.local) for layer in layers)} experts, wanted "
            f"{layers[0].num_experts} together, one part after the other: see kt_moe.local_experts"
        )


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised, wanted init_process_group() before")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"process {dist.get_rank()} is not in the group, wanted one of its members")
    return rank, dist.get_world_size(group)
