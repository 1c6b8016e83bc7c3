"""The frozen routed experts of one layer, in host memory."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kt_moe import _core, checkpointing
from kt_moe.checkpoint import Checkpoint, check_layer, check_path
from kt_moe.distributed import shared_directory
from kt_moe.gpu import Gpu, as_gpu
from kt_moe.gpu.layers import Identity
from kt_moe.runtime import Runtime, default_runtime
from kt_moe.tensors import check_tensor, numbers, on_cpu

FORMATS = tuple(_core.quantized_types())  # of weights in memory
CHECKPOINT_FORMATS = ("as-stored", *FORMATS)
PROJECTIONS = ("gate", "up", "down")
PLACEMENTS = ("tensor", "expert")  # of experts on shards


_in_thread = threading.local()  # .loading: layers this thread loads while others wait for them


@contextlib.contextmanager
def _alone(checkpoint: Checkpoint, layer: int, directory: str | None) -> Iterator[None]:
    """Around a load. RuntimeError where this thread loads the same layer, and would wait for itself."""
    loading = vars(_in_thread).setdefault("loading", set())
    key = checkpoint.path.resolve(), layer, directory
    if directory is not None and key in loading:
        raise RuntimeError(
            f"progress of layer {layer}, which this thread is loading from {checkpoint.path}, loads it again"
        )
    loading.add(key)
    try:
        yield
    finally:
        loading.discard(key)


class Experts:
    """Expert weights packed once for this machine.

    Args:
        gate, up: [E, I, H], bf16, fp16 or fp32 (rounded to bf16), CPU or CUDA. A gate of None: the experts
            have none.
        down: [E, H, I].
        gate_bias, up_bias, down_bias: [E, I], [E, I] and [E, H], like the weights; None where there is none.
        activation: a name of `kt_moe.activations.ACTIVATIONS`, which has the formulas: "silu",
            h = silu(G) * U, or that of another family. Without a gate it is of U alone: h = silu(U).
        format: how the weights are kept in memory: "bf16", or quantised to another one of `FORMATS`, such as
            "int8" or "int4"; docs/formats.md has their groups, bytes and errors.
        runtime: None means `default_runtime()`.
        placement: how experts are spread over the runtime's shards. "tensor": each has a slice of every
            expert. "expert": each has whole experts, computed there.
        popularity: [E], how often each expert is routed to, in any unit, for "expert" to share out the work;
            None, or nothing but zeros: neighbours lie together.
        gpu: how calls with hidden states on a GPU use it: a `kt_moe.Gpu` that layers of a model share, "auto"
            for the default one, "off": the CPU computes all experts, or a device, "cuda:0". Hidden states on
            the CPU are computed there.

    Raises:
        ValueError: shapes that do not agree, a dtype that is not a float, an unknown activation, format or
            placement, a weight to be quantised that is not finite, popularity that is not E finite numbers of
            0 or more, or any with "tensor".
    """

    recompute: bool
    """False: forward saves G and U (4 * I bytes a route, 2 * I without a gate). True: backward computes them
    again."""

    def __init__(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "silu",
        format: str = "bf16",
        runtime: Runtime | None = None,
        placement: str = "tensor",
        popularity: Iterable[float] | Tensor | None = None,
        gpu: Gpu | str = "auto",
    ) -> None:
        _check_known("format", format, FORMATS)
        _check_known("placement", placement, PLACEMENTS)
        gpu = as_gpu(gpu)
        runtime = runtime or default_runtime()
        for name, tensor in (("up", up), ("down", down)) if gate is None else (
            ("gate", gate), ("up", up), ("down", down)
        ):  # fmt: skip
            check_tensor(name, tensor)
        for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias), ("down_bias", down_bias)):
            if bias is not None:
                check_tensor(name, bias)
        gate, up, down = None if gate is None else on_cpu(gate), on_cpu(up), on_cpu(down)
        gate_bias, up_bias, down_bias = (
            None if b is None else on_cpu(b) for b in (gate_bias, up_bias, down_bias)
        )
        core = _core.Experts.from_tensors(
            gate,
            up,
            down,
            gate_bias,
            up_bias,
            down_bias,
            activation,
            format,
            runtime._core,
            placement,
            numbers("popularity", "E", popularity),
        )
        self._adopt(core, runtime, gpu)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str] | Checkpoint,
        layer: int,
        *,
        activation: str = "silu",
        format: str = "as-stored",
        runtime: Runtime | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        paged: bool = False,
        shared: bool = False,
        progress: Callable[[int], object] | None = None,
        placement: str = "tensor",
        popularity: Iterable[float] | Tensor | None = None,
        gpu: Gpu | str = "auto",
        experts: range | None = None,
    ) -> Experts:
        """Load one layer's experts straight from safetensors files; Ctrl-C leaves nothing behind.

        Args:
            path: a .safetensors file, a directory of them, or an open `Checkpoint`.
            layer: the layer's number in the tensor names.
            activation: as for `Experts`. No file says it, and it may be any: "silu" of most families,
                "relu2" of most layers without a gate.
            format: "as-stored" (fp16 and fp32 files are rounded to bf16), or one of the formats of `Experts`,
                to which the weights are converted one by one.
            cache_dir: a directory of packed layers. A layer that is there is mapped read-only: shared between
                processes, paged in by access, nothing decoded or copied. One that is not, or that was made
                from other files (a warning says so), is made first, of the layer's size in that format.
            paged: True leaves the weights in the checkpoint's files and pages them in by access. For layouts
                that are the one in memory (`LayerInfo.mappable`); the files must not change meanwhile.
            shared: True keeps the weights in memory that is shared by all processes of this user on this
                machine that load the same layer so: one of them loads it, the others wait and map it. It
                lasts as long as one of them has it. With several NUMA nodes its pages lie on all in turn.
            progress: called now and then with the number of bytes loaded since the last call. It must not use
                the runtime, which is at work (RuntimeError).
            gpu: as for `Experts`.
            placement, popularity: as for `Experts`. Weights that stay in files lie where the page cache has
                them: the shards share the work, not the memory.
            experts: which of the layer's experts to load, numbered from 0 from then on; nothing else of the
                layer is read. None: all of them. A packed layer of a part has a file of its own.

        Raises:
            FileNotFoundError: no such file, or one that the index names is missing.
            ValueError: a malformed file, no such layer, a missing expert, a scale that is zero or not
                finite; names file and tensor. `paged` with another format or layout; two of `paged`,
                `cache_dir` and `shared`. A placement or popularity as for `Experts`. `experts` that is empty,
                has a step, or goes beyond the layer's.
            OSError: a file cannot be read, a packed layer not be written, or there is no such shared memory.
            RuntimeError: `progress` of this layer, shared or packed, calls for it again.
        """
        _check_known("format", format, CHECKPOINT_FORMATS)
        _check_known("placement", placement, PLACEMENTS)
        gpu = as_gpu(gpu)
        check_layer(layer)
        for name, flag in (("paged", paged), ("shared", shared)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is {flag!r}, wanted True or False")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress is {progress!r}, wanted a function of a number of bytes")
        if experts is not None and not isinstance(experts, range):
            raise TypeError(f"experts is {experts!r}, wanted a range or None")
        if experts is not None and experts.step != 1:
            raise ValueError(f"experts is {experts!r}, wanted a range without a step")
        directory = None if cache_dir is None else check_path("cache_dir", cache_dir)
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
        runtime = runtime or default_runtime()
        self = cls.__new__(cls)
        shared_in = shared_directory() if shared else None
        with _alone(checkpoint, layer, shared_in or directory):
            core = _core.Experts.from_checkpoint(
                checkpoint._core,
                layer,
                activation,
                format,
                runtime._core,
                directory,
                paged,
                shared_in,
                progress,
                placement,
                numbers("popularity", "E", popularity),
                None if experts is None else (experts.start, experts.stop),
            )
        self._adopt(core, runtime, gpu)
        return self

    def _adopt(self, core: _core.Experts, runtime: Runtime, gpu: Gpu) -> None:
        self._core, self.runtime, self.recompute = core, runtime, False
        self._checkpoint_experts = "recompute"
        self._identity = Identity()
        self._gpu: Gpu | None = None
        self._routed_elsewhere = np.zeros(core.num_experts, dtype=np.int64)  # not counted by the core
        self.gpu = gpu
        if core.refused:
            _warn_refused()

    @property
    def gpu(self) -> Gpu:
        """How calls with hidden states on a GPU use it; another `kt_moe.Gpu`, or a name, may be set."""
        assert self._gpu is not None
        return self._gpu

    @gpu.setter
    def gpu(self, gpu: Gpu | str) -> None:
        gpu = as_gpu(gpu)
        if self._gpu is not None:
            self._gpu._remove(self)
        self._gpu = gpu
        gpu._layers.add(self)

    @property
    def checkpoint_experts(self) -> str:
        """What a region of `torch.utils.checkpoint` does with the experts in backward; may be set.

        "recompute" computes them again, as all else in it. "retain" takes back the result and what forward
        saves (see `recompute`), kept from the first run: experts are computed once, for 2 * H bytes a token
        (4 * H of fp32 hidden states) beside what a layer outside of checkpointed regions keeps.
        """
        return self._checkpoint_experts

    @checkpoint_experts.setter
    def checkpoint_experts(self, choice: str) -> None:
        _check_known("checkpoint_experts", choice, checkpointing.CHOICES)
        if choice == "retain":
            checkpointing.watch()
        self._checkpoint_experts = choice

    @property
    def num_experts(self) -> int:
        """E."""
        return self._core.num_experts

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._core.hidden_size

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self._core.intermediate_size

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self._core.gated

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections that there are, of "gate", "up" and "down"."""
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    @property
    def _saved_width(self) -> int:
        """Numbers of G and U that forward saves for a routed token."""
        return (len(self.projections) - 1) * self.intermediate_size

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self._core.activation

    @property
    def format(self) -> str:
        """How the weights are kept in memory."""
        return self._core.format

    @property
    def nbytes(self) -> int:
        """Bytes the weights take, scales included, biases not."""
        return self._core.nbytes

    @property
    def mapped(self) -> bool:
        """Whether they lie in a mapped file, paged in by access, and not in memory of their own."""
        return self._core.mapped

    @property
    def shared(self) -> bool:
        """Whether they lie in memory that other processes of this machine may use too."""
        return self._core.shared

    def verify(self) -> bool:
        """Read all of a packed or shared layer: whether its weights are those that were written.

        True for others.
        """
        return self._core.verify()

    @property
    def quantization_error(self) -> dict[str, float] | None:
        """Relative L2 error of "gate", "up" and "down", if they were quantised when they were loaded."""
        return self._core.quantization_error

    @property
    def shards(self) -> int:
        """Parts the work is cut into, one a NUMA node or a few; see `Runtime`."""
        return self._core.shards

    @property
    def placement(self) -> str:
        """How experts are spread over the shards."""
        return self._core.placement

    @property
    def homes(self) -> list[int] | None:
        """The shard each expert lives in, [E]; None for placement "tensor". Waits for a call in progress."""
        return None if self.placement == "tensor" else self._core.homes()

    def rebalance(self, popularity: Iterable[float] | Tensor | None = None) -> None:
        """Give experts new homes, and move their memory there if it is the layer's own.

        Waits for a call in progress; others wait for this one.

        Args:
            popularity: as for `Experts`; None: the routes so far (`routed`).

        Raises:
            ValueError: placement "tensor", or popularity that is not E finite numbers of 0 or more.
        """
        if popularity is None:
            popularity = self.routed
        with self.gpu._paused(self):
            moved = self._core.rebalance(numbers("popularity", "E", popularity))
        if not moved:
            _warn_refused()

    @property
    def routed(self) -> Tensor:
        """[E] int64: the routes that every forward so far had for each expert. Waits for one in progress."""
        counts = torch.empty(self.num_experts, dtype=torch.int64, device="cpu")
        self._core.routed(counts)
        return counts + torch.from_numpy(self._routed_elsewhere)

    def reset_routed(self) -> None:
        """Count routes from zero again."""
        self._core.reset_routed()
        self._routed_elsewhere[:] = 0

    def page_nodes(self) -> list[dict[str, int]]:
        """Where the weights of each shard lie, by a sample of at most a few thousand pages.

        Returns:
            For each shard how many pages lie on the NUMA nodes it "wanted" (any, where there is but one),
            "elsewhere", or "unknown": not in memory, or the kernel does not tell.
        """
        names = ("wanted", "elsewhere", "unknown")
        return [dict(zip(names, counts, strict=True)) for counts in self._core.page_nodes()]

    def dequantize(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate, up [E, I, H] and down [E, H, I] in bf16: exactly what the kernels multiply by.

        None stands for a gate that there is not.
        """
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        up, down = (torch.empty(s, dtype=torch.bfloat16, device="cpu") for s in ((e, i, h), (e, h, i)))
        gate = torch.empty_like(up) if self.gated else None
        self._core.dequantize(gate, up, down)
        return gate, up, down

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        return copy.copy(self)  # the weights are frozen, so copies share them

    def __repr__(self) -> str:
        return (
            f"Experts(num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, format={self.format!r}, "
            f"placement={self.placement!r}, shards={self.shards})"
        )


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, wanted one of {list(known)}")


_refused_before = False


def _warn_refused() -> None:
    """Once a process: every layer of a model would say the same."""
    global _refused_before
    if not _refused_before:
        _refused_before = True
        warnings.warn(
            "the kernel refused to place expert weights on NUMA nodes (mbind is forbidden here, a node is "
            "not this process's to use, or there is no memory for a move): they lie where they were, or "
            "where threads touched them first",
            stacklevel=4,
        )
