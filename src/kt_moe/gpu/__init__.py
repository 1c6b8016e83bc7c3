"""Experts on a GPU beside the CPU: from weights in host memory that cross the link when they are needed.

`plan` divides the experts of a call, `slots` and `prefetch` bring those of the GPU over, `chunk` has the
layer's formulas and `products` what they are made of; `engine` puts it together. docs/gpu.md tells how.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from kt_moe.gpu.layers import Layers
from kt_moe.gpu.plan import Rates

if TYPE_CHECKING:
    from kt_moe.experts import Experts
    from kt_moe.gpu.engine import Engine

__all__ = ["Gpu", "Rates"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


class Gpu:
    """How layers with hidden states on a GPU use it beside the CPU. Layers of a model share one.

    Args:
        device: "auto": that of a call's hidden states. "cuda:0" and so on: that GPU; hidden states on another
            are refused. "cpu": runs the engine on the CPU, for tests.
        memory: of each GPU for expert weights: bytes, "6GiB", or "auto": what the layers that share this
            object take, up to half of what is free at the first call.
        cpu_share: the part of the routed rows that the CPU computes, 0.0 to 1.0, or "auto": what ends
            soonest. 1.0 leaves all experts to the CPU, and no weights are brought to the GPU.
        rates: how fast the machine is, for "auto"; None: measured at the first call.

    Raises:
        ValueError: an option out of range; names it.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        memory: int | str = "auto",
        cpu_share: float | str = "auto",
        rates: Rates | None = None,
    ) -> None:
        self.device = _device(device)
        if rates is not None and not isinstance(rates, Rates):
            raise TypeError(f"rates is a {type(rates).__name__}, wanted kt_moe.Rates or None")
        self._layers = Layers(rates=rates)
        self._lock = threading.Lock()
        self._engines: dict[torch.device, Engine] = {}
        self.memory = memory
        self.cpu_share = cpu_share

    @property
    def memory(self) -> int | str:
        """Of each GPU for expert weights: bytes, or "auto". A change gives the memory held back first."""
        return self._layers.memory

    @memory.setter
    def memory(self, value: int | str) -> None:
        auto = isinstance(value, str) and value == "auto"
        self._layers.memory = "auto" if auto else parse_bytes("memory", value)
        for engine in list(self._engines.values()):
            engine.drop_slots()

    @property
    def cpu_share(self) -> float | str:
        """The part of the rows that the CPU computes, or "auto"."""
        return self._layers.cpu_share

    @cpu_share.setter
    def cpu_share(self, value: float | str) -> None:
        self._layers.cpu_share = _share(value)

    @property
    def rates(self) -> Rates | None:
        """What "auto" cuts by; None before the first call. `rest_seconds` is known from the third step on."""
        return self._layers.rates

    def __repr__(self) -> str:
        device = "auto" if self.device is None else str(self.device)
        return f"Gpu(device={device!r}, memory={self.memory!r}, cpu_share={self.cpu_share!r})"

    def __copy__(self) -> Gpu:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Gpu:
        return self  # layers that were copied share it, as they share their weights

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle a kt_moe.Gpu: its layers are in this process; make one of its options")

    def engine(self, device: torch.device) -> Engine | None:
        """The engine for hidden states on that device; None: the CPU computes them where they are.

        Raises:
            ValueError: the hidden states are on another GPU than the options say.
        """
        if self.device is None:
            if device.type != "cuda":
                return None
        elif device.type == "cuda" and device != self.device:
            raise ValueError(
                f"hidden_states is on {device}, the experts are for {self.device}: give them "
                f'gpu=kt_moe.Gpu("{device}"), or "auto" for the GPU of the hidden states'
            )
        elif device != self.device:
            return None
        if device not in self._engines:
            from kt_moe.gpu.engine import Engine

            with self._lock:  # another thread may have made it
                if device not in self._engines:
                    self._engines[device] = Engine(self._layers, device)
        return self._engines[device]

    def report(self) -> str:
        """What the last forward and backward of every layer had where, a line each, in the order of calls."""
        for engine in list(self._engines.values()):
            engine.forget_gone()
        lines = [
            f"{device} {report.line()}"
            for device, engine in list(self._engines.items())
            for report in list(engine.log.last.values())
        ]
        return "\n".join(lines) or "no layer was computed with it yet: no hidden states were on its device"

    def _remove(self, experts: Experts) -> None:
        """A layer is given another one. A pass that still comes, of a copy or backward, adds it again."""
        with self._between_passes() as engines:
            for engine in engines:
                engine.forget(experts)
            self._layers.remove(experts)

    @contextmanager
    def _paused(self, experts: Experts) -> Iterator[None]:
        """Nothing reads or locks a layer's weights meanwhile: the core moves them."""
        with self._between_passes():
            self._layers.unlock(experts)
            yield

    @contextmanager
    def _between_passes(self) -> Iterator[list[Engine]]:
        """No engine is in a pass meanwhile; yields all of them."""
        with ExitStack() as locks:
            engines = list(self._engines.values())
            for engine in engines:
                locks.enter_context(engine.lock)
            yield engines


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes from itself or from text with a unit, such as "6GiB" or "500 MB".

    Raises:
        ValueError: it is neither, or not positive; names it.
    """
    number: float = -1
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?i?B)\s*", value, re.IGNORECASE)
        unit = None if found is None else found[2].upper()
        if found is not None and unit in _UNITS:
            number = float(found[1]) * _UNITS[unit]
    elif isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not 1 <= number < 2**63:
        raise ValueError(
            f'{name} is {value!r}, wanted a positive number of bytes, such as "6GiB", "500 MB" or 6442450944'
        )
    return int(number)


def _device(device: str | torch.device) -> torch.device | None:
    if isinstance(device, str) and device == "auto":
        return None
    try:
        found = torch.device(device)
        # torch takes bytes too, and numbers that it has no room for as others.
        known = isinstance(device, torch.device) or device in (found.type, str(found))
    except (RuntimeError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f'device is {device!r}, wanted "auto", "cuda:0" or the like')
    if found.type not in ("cuda", "cpu"):
        raise ValueError(f'device is {device!r}, wanted a CUDA device or "auto"')
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else torch.device("cpu")


def _share(value: float | str) -> float | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, (bool, str)) or not isinstance(value, Real) or not 0.0 <= value <= 1.0:
        raise ValueError(f'cpu_share is {value!r}, wanted "auto" or a number from 0.0 to 1.0')
    return float(value)


_shared: dict[str, Gpu] = {}
_shared_lock = threading.Lock()


def as_gpu(gpu: Gpu | str) -> Gpu:
    """A `Gpu` as it is; "auto" and "off": one for all layers that are given this; or a new one for a device.

    Raises:
        TypeError: it is something else.
        ValueError: no such device.
    """
    if isinstance(gpu, Gpu):
        return gpu
    if not isinstance(gpu, str):
        raise TypeError(f'gpu is a {type(gpu).__name__}, wanted kt_moe.Gpu, "auto", "off" or a device')
    if gpu not in ("auto", "off"):
        return Gpu(gpu)
    with _shared_lock:
        if gpu not in _shared:
            _shared[gpu] = Gpu() if gpu == "auto" else Gpu(cpu_share=1.0)
        return _shared[gpu]
