"""LoRA matrices and their gradients between the place where the user keeps them and where they are used.

What the GPU needs of matrices on the host, and the CPU of matrices on the GPU, crosses the link once a pass,
in bf16. A gradient comes back once, to the device and in the dtype of its matrix; each expert's rows of it
are written where the expert was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kt_moe import _core
from kt_moe.gpu.products import copy_from_host
from kt_moe.gpu.streams import Streams
from kt_moe.tensors import on_cpu

LoraOptions = tuple[tuple[float, float, float], float, int]  # scalings, dropout and its seed


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


def to_device(lora: LoraCall, wanted: bool, streams: Streams) -> list[Tensor | None]:
    """The matrices in bf16 on the device; the current stream waits for those that have to cross.

    Every pass copies them anew: fused optimizers change parameters without counting up their versions.

    Args:
        wanted: False leaves out those that lie on the host.
    """
    found: list[Tensor | None] = []
    crossed = False
    for tensor in lora.tensors:
        if tensor is not None and tensor.device == streams.device:
            found.append(tensor.detach().to(torch.bfloat16).contiguous())
        elif tensor is None or not wanted:
            found.append(None)
        else:
            host = streams.host_empty(tuple(tensor.shape), torch.bfloat16)
            host.copy_(tensor.detach())
            streams.note("uplink", "copy_lora", host.nbytes)
            with streams.on("uplink"):  # whose memory needs no wait for work of the current stream
                matrix = torch.empty_like(host, device=streams.device)
                copy_from_host(matrix, host)
            streams.keep(host, "uplink")
            streams.used_by(matrix)
            found.append(matrix)
            crossed = True
    if crossed:
        streams.wait(streams.record("uplink"))
    return found


def to_host(lora: LoraCall, on_device: Sequence[Tensor | None], streams: Streams) -> _core.LoraTensors:
    """The matrices for the core; copies of those on the device, from `to_device`, arrive with downlink."""
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


def device_gradients(lora: LoraCall, needed: Sequence[bool], streams: Streams) -> list[Tensor | None]:
    """Zeros on the device, for the gradients that are wanted."""
    return [
        torch.zeros(tensor.shape, dtype=tensor.dtype, device=streams.device)
        if tensor is not None and wanted
        else None
        for tensor, wanted in zip(lora.tensors, needed, strict=True)
    ]


def join_gradients(
    lora: LoraCall,
    on_cpu: Sequence[int],
    of_gpu: Sequence[Tensor | None],
    of_host: Sequence[Tensor | None],
    streams: Streams,
) -> list[Tensor | None]:
    """One gradient for each matrix, where the matrix is.

    Args:
        on_cpu: experts whose rows the core has written in `of_host`; it has written no other rows.
        of_gpu, of_host: as `device_gradients` and `host_gradients` made them; None: nothing was computed
            there.
    """
    joined: list[Tensor | None] = []
    streams.wait(streams.record(), "downlink")
    index: Tensor | None = None
    sent = False
    for tensor, gpu, host in zip(lora.tensors, of_gpu, of_host, strict=True):
        if gpu is None or host is None:
            joined.append(host if gpu is None else gpu)
        elif tensor is not None and tensor.is_cpu:
            streams.note("downlink", "copy_lora", (len(host) - len(on_cpu)) * (host.nbytes // len(host)))
            for rows in others(on_cpu, len(host)):
                streams.copy_tensor(host[rows], gpu[rows], "downlink")
            streams.used_by(gpu, "downlink")
            sent = True
            joined.append(host)
        else:
            if index is None:
                index = streams.upload(np.array(on_cpu, dtype=np.int32))
            with streams.span("uplink", "copy_lora", len(on_cpu) * (host.nbytes // len(host))):
                copy_from_host(gpu, host, index)
            streams.keep(host)
            joined.append(gpu)
    if sent:
        with streams.span("host", "wait_lora"):
            streams.record("downlink").synchronize()
    return joined


def others(experts: Sequence[int], count: int) -> list[slice]:
    """The numbers in [0, count) that are not among `experts`, neighbours as one slice."""
    chosen = np.ones(count, dtype=bool)
    chosen[list(experts)] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
