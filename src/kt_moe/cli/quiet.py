"""Silences what the libraries below say without need, and nothing else; each entry says why."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import datasets
from transformers.utils import logging as transformers_logging

# TRL 1.x still reads and sets the older name of activation checkpointing, which means the same.
_DEPRECATED_BY_TRL = r"`(is_)?gradient_checkpointing` is deprecated"

# Checkpoints less than a second apart are told apart by their step numbers instead, which is as good.
_CLOSE_CHECKPOINTS = "mtime may not be reliable"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within `with`: no bars but ours, and none of the messages above."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_CLOSE_CHECKPOINTS)

    bars = transformers_logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    rotation = logging.getLogger("transformers.trainer_utils")
    rotation.addFilter(keep)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_DEPRECATED_BY_TRL, category=FutureWarning)
            yield
    finally:
        rotation.removeFilter(keep)
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()
