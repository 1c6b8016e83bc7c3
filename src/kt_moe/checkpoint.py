"""Checkpoint: what a safetensors model holds, read from its headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from kt_moe import _core


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as it is stored."""

    dtype: str
    """As the file names it, e.g. "BF16" (https://github.com/huggingface/safetensors#format)."""
    shape: tuple[int, ...]
    nbytes: int
    """Bytes in the file."""
    file: Path


@dataclass(frozen=True)
class LayerInfo:
    """The routed experts of one layer as they are stored."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: str
    """Of the weights, as the file names it: "BF16", "F8_E4M3", "I32", ..."""
    layout: str
    """"per-expert" (tensors of its own for each), "fused" (of all experts), "fused, transposed", "gptq", ...:
    the first column of the table in docs/formats.md."""
    nbytes: int
    """Bytes of all experts in the files."""
    format: str
    """How they are kept in memory as stored: one of `kt_moe.experts.FORMATS`."""
    scale_type: str
    """Of the scales in memory: "none", "f32", "bf16", "e8m0" or "e4m3"."""
    scale_rows: int
    """Rows of gate and up that share a scale."""
    scale_cols: int
    """Columns of gate and up that share a scale; 0: all of a row."""
    zero_points: bool
    """Whether int4 codes have zero points of their own."""
    global_scale: bool
    """Whether an fp32 number scales the scales of each matrix."""
    gated: bool
    """Whether there is a gate."""
    biases: bool
    """Whether the projections have biases."""
    mappable: bool
    """Whether the files' layout is the one in memory, as `paged` wants it."""
    memory_bytes: Mapping[str, int]
    """Bytes in memory as stored, of all experts' "gate" if there is one, "up" and "down"."""


@dataclass(frozen=True)
class ExpertList:
    """What checkpoints call the tensors of one module's experts.

    Attributes:
        prefix: what all names begin with, up to a dot: "model.layers.3.mlp.experts".
        fused: `{prefix}.{word}` holds all experts, gate and up together; else each matrix has a tensor
            `{prefix}.{expert}.{word}.weight`. Quantised weights have other tails.
        words: of gate, up and down; those of gate and up are the same where fused, and gate's is "" where
            there is none.
        first_expert, num_experts: which numbers are those of the module, where there are numbers.
        interleaved: whether gate and up alternate, where fused; None: as the files tell.
    """

    prefix: str
    fused: bool
    words: tuple[str, str, str]
    first_expert: int
    num_experts: int
    interleaved: bool | None = None


class Checkpoint:
    """Index of a safetensors model: tensors, and layers of experts.

    Headers are read and checked when it is made, the tensors' data when it is used; a file that was changed,
    replaced or shortened in between is a ValueError then. Safe to use from several threads.

    Args:
        path: a .safetensors file, or a directory. Of a directory it reads what model.safetensors.index.json
            names, else what the only *.safetensors.index.json names, else every *.safetensors.

    Raises:
        FileNotFoundError: no such path, no safetensors file in the directory, or a file that the index names
            is missing.
        ValueError: a header or an index that breaks the format, a tensor that the index names and the file
            lacks, a path in the index that leaves the directory, or two files without an index that hold a
            tensor of the same name. The message names the file and the tensor.
        OSError: the operating system refused to list, open or read a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._core = _core.Checkpoint(check_path("path", path))

    @property
    def path(self) -> Path:
        """As it was given."""
        return self._core.path

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        return self._core.files

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order of the names."""
        return MappingProxyType({name: TensorInfo(*info) for name, info in self._core.tensors().items()})

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that hold experts, ascending, supported format or not."""
        return self._core.layers

    def layer(self, layer: int) -> LayerInfo:
        """Check all experts of a layer and describe them.

        The headers say all of it, except of GPTQ and AWQ: whether all zero points are 8, and the columns in
        order, is in the data, of which `qzeros` and the first expert's `g_idx` are read.

        Args:
            layer: the layer's number in the tensor names; one of `layers`.

        Raises:
            ValueError: no experts in that layer, an expert's tensor that is missing, tensors whose shapes or
                dtypes disagree, or a format that is not supported. The message names the tensor.
        """
        check_layer(layer)
        return LayerInfo(**self._core.layer(layer))

    def with_lists(self, lists: Mapping[int, ExpertList]) -> Checkpoint:
        """The same checkpoint, whose layers are these lists of experts and no others.

        Raises:
            ValueError: a list of whose tensors the checkpoint has none; names it.
        """
        twin = Checkpoint.__new__(Checkpoint)
        twin._core = self._core.with_lists({number: astuple(one) for number, one in lists.items()})
        return twin

    def __repr__(self) -> str:
        parts = [
            _count(len(self.files), "file"),
            _count(len(self.tensors), "tensor"),
            f"{sum(t.nbytes for t in self.tensors.values()) / 1e6:,.1f} MB",
            f"experts in {_count(len(self.layers), 'layer')}",
        ]
        return f"Checkpoint({str(self.path)!r}: {', '.join(parts)})"


def check_path(name: str, path: str | os.PathLike[str]) -> str:
    """A path as text.

    Raises:
        TypeError: not a str and not a path.
        ValueError: empty, or with a NUL character or half a surrogate pair in it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} is a {type(path).__name__}, wanted a str or a path")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, wanted a str or a path")
    if not text or "\0" in text:
        raise ValueError(f"{name} is {text!r}, wanted at least a character, and no NUL among them")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {text!r}, which no file system can hold") from None
    return text


def check_layer(layer: int) -> None:
    """TypeError unless it is a whole number; ValueError for one that no layer has."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer is {layer!r}, wanted an int")
    if not 0 <= layer < 2**31:
        raise ValueError(f"layer is {layer}, wanted a number from 0 to {2**31 - 1}")


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
