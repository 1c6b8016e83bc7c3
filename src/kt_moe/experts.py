"""The frozen routed experts of one layer, in host memory."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor

from kt_moe import _core
from kt_moe.checkpoint import Checkpoint
from kt_moe.runtime import Runtime, default_runtime
from kt_moe.tensors import check_tensor, on_cpu

FORMATS = ("bf16",)  # of weights in memory
CHECKPOINT_FORMATS = ("as-stored", *FORMATS)


class Experts:
    """Expert weights packed once for this machine.

    Args:
        gate, up: [E, I, H], bf16, fp16 or fp32 (rounded to bf16), CPU or CUDA.
        down: [E, H, I].
        activation: "silu".
        format: how the weights are kept in memory: "bf16".
        runtime: None means `default_runtime()`.

    Raises:
        ValueError: shapes that do not agree, a dtype that is not a float, an unknown activation or format.
    """

    recompute: bool
    """False: forward saves G and U (4 * I bytes a route). True: backward computes them again."""

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        activation: str = "silu",
        format: str = "bf16",
        runtime: Runtime | None = None,
    ) -> None:
        _check_format(format, FORMATS)
        runtime = runtime or default_runtime()
        for name, tensor in (("gate", gate), ("up", up), ("down", down)):
            check_tensor(name, tensor)
        gate, up, down = (on_cpu(t) for t in (gate, up, down))
        self._adopt(_core.Experts.from_tensors(gate, up, down, activation, runtime._core), runtime)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str] | Checkpoint,
        layer: int,
        *,
        activation: str = "silu",
        format: str = "as-stored",
        runtime: Runtime | None = None,
    ) -> Experts:
        """Load one layer's experts straight from safetensors files.

        Args:
            path: a .safetensors file, a directory of them, or an open `Checkpoint`.
            layer: the layer's number in the tensor names.
            format: "as-stored" (bf16; fp16 and fp32 files are rounded to bf16) or "bf16".

        Raises:
            FileNotFoundError: no such file, or one that the index names is missing.
            ValueError: a malformed file, no such layer, or an expert that is missing; names the key.
        """
        _check_format(format, CHECKPOINT_FORMATS)
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
        runtime = runtime or default_runtime()
        self = cls.__new__(cls)
        core = _core.Experts.from_checkpoint(checkpoint._core, layer, activation, runtime._core)
        self._adopt(core, runtime)
        return self

    def _adopt(self, core: _core.Experts, runtime: Runtime) -> None:
        self._core, self.runtime, self.recompute = core, runtime, False

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
    def activation(self) -> str:
        """Name of the activation."""
        return self._core.activation

    @property
    def format(self) -> str:
        """How the weights are kept in memory."""
        return self._core.format

    @property
    def nbytes(self) -> int:
        """Bytes the weights take."""
        return self._core.nbytes

    @property
    def shards(self) -> int:
        """Slices of the intermediate dimension."""
        return self._core.shards

    @property
    def quantization_error(self) -> dict[str, float] | None:
        """Relative L2 error."""
        return None

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up [E, I, H] and down [E, H, I] in bf16: exactly what the kernels multiply by."""
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        gate, up, down = (
            torch.empty(s, dtype=torch.bfloat16, device="cpu") for s in ((e, i, h), (e, i, h), (e, h, i))
        )
        self._core.dequantize(gate, up, down)
        return gate, up, down

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        return copy.copy(self)  # the weights are frozen, so copies share them

    def __repr__(self) -> str:
        return (
            f"Experts(num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, format={self.format!r})"
        )


def _check_format(format: str, known: tuple[str, ...]) -> None:
    if format not in known:
        raise ValueError(f"format is {format!r}, wanted one of {list(known)}")
