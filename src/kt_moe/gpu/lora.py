"""LoRA matrices and their gradients between the place where the user keeps them and where they are used.

What the GPU needs of matrices on the host, and the CPU of matrices on the GPU, crosses the link once a pass,
in bf16. A gradient comes back once, to the device and in the dtype of its matrix; each expert's rows of it
are written where the expert was computed.

On the device the matrices of gate and up lie in one tensor, as two jobs of every product, where they are of
one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from kt_moe import _core
from kt_moe.gpu.products import DOWN
from kt_moe.gpu.streams import Event, Streams
from kt_moe.tensors import on_cpu

LoraOptions = tuple[tuple[float, float, float], float, int]  # scalings, dropout and its seed
Crossed = tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]


@dataclass(frozen=True)
class LoraCall:
    """The LoRA arguments of one call: A and B of gate, up and down, scalings, dropout and its seed."""

    tensors: tuple[Tensor | None, ...]
    scalings: tuple[float, float, float]
    dropout: float
    seed: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of gate, up and down; 0 where there is none."""
        return tuple(0 if a is None else a.shape[1] for a in self.tensors[::2])

    @property
    def together(self) -> list[tuple[int, ...]]:
        """The projections that have LoRA, by the tensor that they lie in on the device."""
        gate, up, down = ((i,) if rank else () for i, rank in enumerate(self.ranks))
        kinds = [None if t is None else (t.shape, t.dtype, t.device) for t in self.tensors]
        # Dropout has other masks for gate and up.
        as_one = gate and up and kinds[:2] == kinds[2:4] and self.dropout == 0
        return [stack for stack in ((gate + up, down) if as_one else (gate, up, down)) if stack]


class LoraStack(NamedTuple):
    """LoRA of one projection or of two on the device, or the gradients of it.

    Attributes:
        projections: of GATE, UP and DOWN.
        a: [jobs, E, r, in], a job for each projection; None: it is on the host alone, or not wanted.
        b: [jobs, E, out, r], likewise.
        crossed: what has crossed for a and for b, in memory of the host that the device reads: the matrices
            themselves, or one copy of all in bf16. None: nothing has.
    """

    projections: tuple[int, ...]
    a: Tensor | None
    b: Tensor | None
    crossed: Crossed = (None, None)


def split_down(stacks: Sequence[LoraStack]) -> tuple[Sequence[LoraStack], LoraStack | None]:
    """Those of gate and up, and that of down, which is the last one."""
    if stacks and stacks[-1].projections == (DOWN,):
        return stacks[:-1], stacks[-1]
    return stacks, None


def each_tensor(stacks: Sequence[LoraStack]) -> list[Tensor | None]:
    """A and B of gate, up and down."""
    found: list[Tensor | None] = [None] * 6
    for stack in stacks:
        for side, of_all in enumerate((stack.a, stack.b)):
            for job, projection in enumerate(stack.projections):
                found[2 * projection + side] = None if of_all is None else of_all[job]
    return found


def to_device(lora: LoraCall, wanted: bool, streams: Streams) -> tuple[list[LoraStack], Event | None]:
    """The matrices in bf16 on the device, for a forward; the current stream waits for those that cross.

    Every forward copies them anew: fused optimizers change parameters without counting up their versions.
    The event, if there is one, is when the device has read what crosses, which may not change until then.

    Args:
        wanted: False leaves out those that lie on the host.
    """
    stacks = []
    to: list[Tensor] = []
    source: list[Tensor] = []
    for projections in lora.together:
        sides: list[Tensor | None] = []
        crossed: list[Sequence[Tensor] | None] = []
        for side in range(2):
            tensors = [cast(Tensor, lora.tensors[2 * i + side]).detach() for i in projections]
            stack = crossing = None
            if streams.has(tensors[0]):
                shape = len(tensors), *tensors[0].shape
                stack = torch.empty(shape, dtype=torch.bfloat16, device=streams.device)
                to += stack.unbind()
                source += tensors
            elif wanted:
                crossing = _for_device(tensors, streams)
                stack = _cross(crossing, len(tensors), streams)
            sides.append(stack)
            crossed.append(crossing)
        stacks.append(LoraStack(projections, sides[0], sides[1], (crossed[0], crossed[1])))
    if to:
        torch._foreach_copy_(to, source)
    return stacks, _behind_uplink([stack.crossed for stack in stacks], streams)


def to_device_again(
    lora: LoraCall, crossed: Sequence[Crossed], streams: Streams
) -> tuple[list[LoraStack], Event | None]:
    """The matrices for the backward of a forward whose stacks had this `crossed`; see `to_device`.

    What crossed for the forward does so again as it was: the CPU, which may be computing, converts nothing,
    unless the memory is locked no more, as that of a model which is gone.
    """
    stacks = []
    for stack, both in zip(to_device(lora, False, streams)[0], crossed, strict=True):
        a, b = (
            on_device
            if sources is None
            else _cross(_for_device(sources, streams), len(stack.projections), streams)
            for on_device, sources in zip((stack.a, stack.b), both, strict=True)
        )
        stacks.append(stack._replace(a=a, b=b))
    return stacks, _behind_uplink(crossed, streams)


def _for_device(tensors: Sequence[Tensor], streams: Streams) -> Sequence[Tensor]:
    """What the device reads: the matrices where they lie, or if it cannot, one copy of them in bf16."""
    if all(streams.reads(tensor) for tensor in tensors):
        return tensors
    host = streams.host_empty((len(tensors), *tensors[0].shape), torch.bfloat16)
    for row, tensor in zip(host, tensors, strict=True):
        row.copy_(tensor)
    return (host,)


def _cross(sources: Sequence[Tensor], jobs: int, streams: Streams) -> Tensor:
    """A copy in bf16 on the device, as uplink's work, of so many matrices an expert."""
    streams.note("uplink", "copy_lora", sum(source.nbytes for source in sources))
    with streams.on("uplink"):  # whose memory needs no wait for work of the current stream
        shape = jobs, *sources[0].shape[-3:]
        stack = torch.empty(shape, dtype=torch.bfloat16, device=streams.device)
        for to, source in zip(stack.chunk(len(sources)), sources, strict=True):
            streams.products.copy_from_host(to, source)
    for source in sources:
        streams.keep(source, "uplink")
    streams.used_by(stack)
    return stack


def _behind_uplink(crossed: Sequence[Crossed], streams: Streams) -> Event | None:
    """Let the current stream wait for what crosses; the event, or None if nothing does."""
    if all(sources is None for both in crossed for sources in both):
        return None
    arrived = streams.record("uplink")
    streams.wait(arrived)
    return arrived


def to_host(lora: LoraCall, on_device: Sequence[Tensor | None], streams: Streams) -> _core.LoraTensors:
    """The matrices for the core. Copies of those on the device arrive with downlink.

    Args:
        on_device: as `each_tensor` gives them.
    """
    found: list[Tensor | None] = []
    for tensor, bf16 in zip(lora.tensors, on_device, strict=True):
        if tensor is None or bf16 is None or tensor.is_cpu:
            found.append(None if tensor is None else on_cpu(tensor))
        else:
            found.append(streams.to_host(bf16))
    return cast("_core.LoraTensors", tuple(found))


def host_gradients(
    lora: LoraCall, needed: Sequence[bool], some_on_cpu: bool, streams: Streams
) -> list[Tensor | None]:
    """Where gradients are written on the host: of matrices there, and if the CPU computes, of others too."""
    return [
        streams.host_empty(tuple(tensor.shape), tensor.dtype)
        if tensor is not None and wanted and (some_on_cpu or tensor.is_cpu)
        else None
        for tensor, wanted in zip(lora.tensors, needed, strict=True)
    ]


def device_gradients(
    lora: LoraCall, needed: Sequence[bool], every_expert: bool, streams: Streams
) -> list[LoraStack]:
    """Tensors on the device for the gradients that are wanted, each like its matrix.

    Args:
        every_expert: all experts' rows will be written; otherwise they are zeros now.
    """
    make = torch.empty if every_expert else torch.zeros
    stacks = []
    for projections in lora.together:
        sides: list[Tensor | None] = []
        for side in range(2):
            tensor = cast(Tensor, lora.tensors[2 * projections[0] + side])
            shape = len(projections), *tensor.shape
            wanted = any(needed[2 * i + side] for i in projections)
            sides.append(make(shape, dtype=tensor.dtype, device=streams.device) if wanted else None)
        stacks.append(LoraStack(projections, sides[0], sides[1]))
    return stacks


def join_gradients(
    lora: LoraCall,
    on_cpu: Sequence[int],
    needed: Sequence[bool],
    of_gpu: Sequence[Tensor | None],
    of_host: Sequence[Tensor | None],
    streams: Streams,
) -> tuple[list[Tensor | None], Event | None]:
    """One gradient for each matrix, where the matrix is; an event behind the last copy to the host.

    Args:
        on_cpu: experts whose rows the core has written in `of_host`; it has written no other rows.
        needed: which gradients are wanted; one of two that lie together may not be.
        of_gpu, of_host: as `device_gradients` and `host_gradients` made them; None: nothing was computed
            there.
    """
    joined: list[Tensor | None] = []
    streams.wait(streams.record(), "downlink")
    index: Tensor | None = None
    rest: Sequence[tuple[int, int]] = ()
    sent = False
    for tensor, wanted, gpu, host in zip(lora.tensors, needed, of_gpu, of_host, strict=True):
        if not wanted:
            joined.append(None)
        elif gpu is None or host is None:
            joined.append(host if gpu is None else gpu)
        elif tensor is not None and tensor.is_cpu:
            rest = rest or others(on_cpu, len(host))
            size = host.nbytes // len(host)
            streams.note("downlink", "copy_lora", (len(host) - len(on_cpu)) * size)
            for first, end in rest:
                at = first * size
                streams.copy(host.data_ptr() + at, gpu.data_ptr() + at, (end - first) * size, "downlink")
            streams.used_by(gpu, "downlink")
            streams.keep(host, "downlink")
            sent = True
            joined.append(host)
        else:
            if index is None:
                index = streams.upload(np.array(on_cpu, dtype=np.int32))
            with streams.span("uplink", "copy_lora", len(on_cpu) * (host.nbytes // len(host))):
                streams.products.copy_from_host(gpu, host, index)
            streams.keep(host)
            joined.append(gpu)
    return joined, streams.record("downlink") if sent else None


def others(experts: Sequence[int], count: int) -> list[tuple[int, int]]:
    """The numbers in [0, count) that are not among `experts`: first and end of every run of neighbours."""
    chosen = np.ones(count, dtype=bool)
    chosen[list(experts)] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
