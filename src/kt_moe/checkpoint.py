"""Checkpoint: the C++ index of a safetensors model."""

from __future__ import annotations

import os

from kt_moe import _core


class Checkpoint:
    """Safetensors index of a file or a directory; see the C++ core."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._core = _core.Checkpoint(os.fspath(path))
