"""`kt_moe.load_model` and `kt_moe.device_map`: experts on kt_moe, other layers on GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations.accelerate import _get_device_map
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils.generic import ContextManagers

from kt_moe.checkpoint import Checkpoint, check_path
from kt_moe.families import model_class
from kt_moe.hf.kt_config import checked_config
from kt_moe.hf.quantizer import KtMoeConfig

_OF_FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
             "trust_remote_code")  # fmt: skip


def load_model(
    path: str | os.PathLike[str],
    config: KtMoeConfig | None = None,
    *,
    device_map: Any = "auto",
    **options: Any,
) -> Any:
    """A model of any family with its experts on kt_moe, its other layers on the GPUs; on the CPU without one.

        model = kt_moe.load_model("DeepSeek-V3", kt_moe.KtMoeConfig(gpu_memory="8GiB"))

    It is `from_pretrained(path, quantization_config=config, device_map="auto")` of the model's own class, be
    it a language model or one that also sees or hears.

    Args:
        path: a directory, or a name on the hub.
        config: how experts are held and computed.
        device_map: as transformers takes it. "auto" spreads the other layers evenly over the GPUs, beside
            `gpu_memory` where that is a number; `kt_moe.device_map` shows how.
        options: others of `from_pretrained`, as dtype, max_memory, attn_implementation or revision.

    Raises:
        TypeError: path or config is something else.
        ValueError: transformers has no class for the model's config; the other layers do not fit the GPUs; or
            as `from_pretrained` with `KtMoeConfig`.
        OSError: files are missing.
    """
    path, config = check_path("path", path), checked_config(config)
    of_files = {name: options[name] for name in _OF_FILES if name in options}
    model_config = AutoConfig.from_pretrained(path, **of_files)
    return _class_of(model_config).from_pretrained(
        path, config=model_config, quantization_config=config, device_map=device_map, **options
    )


def device_map(
    path: str | os.PathLike[str],
    config: KtMoeConfig | None = None,
    *,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, int | str | torch.device]:
    """Where `load_model` puts the layers beside the experts: devices by modules' names. Loads no weights.

    Args:
        path: a model's directory.
        config: as for `load_model`; `gpu_memory` and `rest` count.
        max_memory: for the layers beside the experts by device, {0: "20GiB", 1: "20GiB"}; None: what is free.
        dtype: of the layers that are not quantised.

    Returns:
        what `from_pretrained(device_map=...)` takes: {"": device} where one device has it all.

    Raises:
        TypeError, ValueError, OSError: as `load_model`.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, wanted a torch.dtype")
    path, config = check_path("path", path), checked_config(config)
    model_config = AutoConfig.from_pretrained(path)
    made = _class_of(model_config)
    quantizer, model_config, how = get_hf_quantizer(model_config, config, "auto", True, {})
    with ContextManagers(made.get_init_context(dtype, True, False, None)):
        model = made(model_config)
        files = [os.fspath(file) for file in Checkpoint(path).files]
        quantizer.preprocess_model(model, dtype=dtype, device_map=how, checkpoint_files=files)
    limits = None if max_memory is None else dict(max_memory)
    found: dict[str, int | str | torch.device] = _get_device_map(model, how, limits, quantizer)
    return found


def _class_of(config: PretrainedConfig) -> Any:
    found = model_class(config)
    if found is None:
        raise ValueError(
            f"transformers has no class of models for {type(config).__name__} that writes or sees: call "
            "from_pretrained of the model's own class, with quantization_config=kt_moe.KtMoeConfig()"
        )
    return found
