"""Streams and events of a device. On the CPU, where tests run the engine, every operation is done at once."""

from __future__ import annotations

import ctypes
import functools
import time
from collections import deque
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from kt_moe.gpu.products import Products, products_for

if TYPE_CHECKING:
    from kt_moe.gpu.spans import Mark, Recorder


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Let the calling thread wait, without the GIL, until the point is reached."""

    def query(self) -> bool:
        """Whether it is reached."""


class Streams:
    """What the engine asks of a device; this one is the CPU, where everything is done at once.

    Work for the `link` stream is copies of weights to the device; for `uplink`, of rows and LoRA matrices
    to the device; for `downlink`, of results to the host. The stream None is the caller's current one.

    Attributes:
        products: the code that computes on the device.
        recorder: of the profile that records the present pass, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.products: Products = products_for(device)
        self.recorder: Recorder | None = None

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the device."""
        return tensor.device == self.device

    def on(self, name: str) -> AbstractContextManager[object]:
        """Make the stream of that name current."""
        return nullcontext()

    def current(self) -> int:
        """Which one the caller's current stream is."""
        return 0

    def record(self, name: str | None = None) -> Event:
        """An event behind all work that the stream has so far."""
        if self.recorder is not None:
            self.recorder.close(name)
        return _Done()

    def wait(self, event: Event, name: str | None = None) -> None:
        """Let later work of the stream wait for the event."""
        if self.recorder is not None and not event.query():
            self.recorder.close(name)

    def note(self, lane: str, name: str, bytes: int, layer: Hashable = None, experts: int = 0) -> None:
        """Say, for a profile, what a stream gets next, until an event is recorded on it; see `spans`."""
        if self.recorder is not None:
            self.recorder.note(lane, name, bytes, layer, experts)

    def span(self, lane: str, name: str, bytes: int = 0) -> AbstractContextManager[None]:
        """Around what the caller's stream or a thread of the host does, for a profile."""
        return _NOTHING if self.recorder is None else self.recorder.span(lane, name, bytes=bytes)

    def mark(self, name: str | None = None) -> Mark:
        """The present point of a stream, for a profile."""
        return time.perf_counter_ns()

    def seconds(self, begin: Mark, end: Mark) -> float | None:
        """Between two points of a stream; None: they are not reached yet."""
        assert isinstance(begin, int)
        assert isinstance(end, int)
        return (end - begin) * 1e-9

    def used_by(self, tensor: Tensor, name: str | None = None) -> None:
        """Keep the tensor's memory, once it is dropped, until the stream has done its present work."""

    def copy(self, to: int, source: int, size: int, name: str) -> None:
        """Copy bytes between addresses, one of them on the device, as work of a stream.

        This leaves out what a tensor's `copy_` does besides: a pass makes hundreds of copies. Memory of the
        host must be page-locked, and both stay until the stream is done.
        """
        ctypes.memmove(to, source, size)

    def finish(self) -> None:
        """Let the calling thread wait until the link has brought what it was asked for."""

    def synchronize(self) -> None:
        """Let the calling thread wait for all work of the device."""

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in host memory that the device reads and writes without the CPU."""
        return torch.empty(shape, dtype=dtype, device="cpu")

    def reads(self, tensor: Tensor) -> bool:
        """Whether kernels of the device can read this tensor of the host where it lies, row after row."""
        return tensor.is_contiguous()

    def upload(self, values: NDArray[Any]) -> Tensor:
        """A small array on the device, for the current stream."""
        host = self.host_empty(values.shape, torch.from_numpy(values).dtype)
        host.numpy()[...] = values
        to = torch.empty_like(host, device=self.device)
        self.products.copy_from_host(to, host)
        self.keep(host)
        return to

    def keep(self, host: Tensor, name: str | None = None) -> None:
        """Keep memory of the host until the stream has done what it has been given up to its next event."""

    def end_pass(self) -> None:
        """The next pass may have another current stream: record an event for what this one keeps."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy that arrives with the downlink stream, which waits for the tensor already."""
        host = self.host_empty(tuple(tensor.shape), tensor.dtype)
        assert tensor.is_contiguous()  # a copy of it would be behind what the stream waits for
        self.note("downlink", "copy_out", tensor.nbytes)
        self.copy(host.data_ptr(), tensor.data_ptr(), tensor.nbytes, "downlink")
        self.keep(host, "downlink")
        self.used_by(tensor, "downlink")
        return host


class _Done:
    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class CudaStreams(Streams):
    """Streams of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # torch takes 30 us to find the index of a device, at every call.
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._streams = {
            name: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for name in ("link", "uplink", "downlink")
        }
        self._handles = {name: stream.cuda_stream for name, stream in self._streams.items()}
        # Memory of the host that streams use: behind their last events, and before an event.
        self._in_use: dict[str | None, list[Tensor]] = {name: [] for name in (None, *self._streams)}
        self._kept: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def _stream(self, name: str | None) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._index) if name is None else self._streams[name]

    def current(self) -> int:
        stream: int = self._stream(None).cuda_stream
        return stream

    def on(self, name: str) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[name])

    def record(self, name: str | None = None) -> Event:
        super().record(name)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream(name))
        if self._in_use[name]:
            self._kept.append((event, self._in_use[name]))
            self._in_use[name] = []
            while self._kept and self._kept[0][0].query():  # type: ignore[no-untyped-call]
                self._kept.popleft()
        return event

    def wait(self, event: Event, name: str | None = None) -> None:
        assert isinstance(event, torch.cuda.Event)
        super().wait(event, name)
        self._stream(name).wait_event(event)

    def used_by(self, tensor: Tensor, name: str | None = None) -> None:
        tensor.record_stream(self._stream(name))

    def copy(self, to: int, source: int, size: int, name: str) -> None:
        error = _driver().cuMemcpyAsync(to, source, size, self._handles[name])
        if error:
            raise RuntimeError(f"cuMemcpyAsync of {size} bytes failed with CUDA error {error}")

    def keep(self, host: Tensor, name: str | None = None) -> None:
        # Not the tensor itself: autograd copies a gradient that something else refers to.
        self._in_use[name].append(host.detach())

    def end_pass(self) -> None:
        if self._in_use[None]:
            self.record()

    def mark(self, name: str | None = None) -> Mark:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream(name))
        return event

    def seconds(self, begin: Mark, end: Mark) -> float | None:
        assert isinstance(begin, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) * 1e-3 if end.query() else None  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        self._streams["link"].synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def reads(self, tensor: Tensor) -> bool:
        return tensor.is_contiguous() and tensor.is_pinned()


@functools.cache
def _driver() -> ctypes.CDLL:
    """CUDA's driver, which torch has loaded."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    driver.cuMemcpyAsync.restype = ctypes.c_int
    return driver


_NOTHING = nullcontext()


def streams_of(device: torch.device) -> Streams:
    """The streams of a CUDA device, or of the CPU in its place."""
    return CudaStreams(device) if device.type == "cuda" else Streams(device)
