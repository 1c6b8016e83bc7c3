"""Adapters on disk: saved and loaded in the form that plain PEFT reads, which is in `kt_moe.hf.portable`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, distributed, nn

from kt_moe.adapter_files import read_adapter, write_adapter
from kt_moe.checkpoint import check_path
from kt_moe.hf.config import KtLoraConfig, SharedOuterLoraConfig, check_same
from kt_moe.hf.lora import experts_architecture, lora_layers
from kt_moe.hf.portable import PREFIX, expert_major
from kt_moe.hf.targets import check_config_patterns
from kt_moe.job import meet_to_save
from kt_moe.rank_parameters import gathered, whole_on_first
from kt_moe.tensors import check_module

StrPath = str | os.PathLike[str]
_LAYOUTS = ("peft", "expert-major")


def save_adapter(model: nn.Module, directory: StrPath, *, adapter_name: str = "default") -> None:
    """Write one adapter of a PEFT model.

    It is what `PeftModel.save_pretrained` writes; the files are replaced only when all of them are complete
    and on disk, so that a full disk leaves the adapter that was there, and readers can tell a pair whose
    second file is still to come.

    Of a model that fully_shard or DeepSpeed's ZeRO-3 shards, or whose experts are divided over ranks, every
    process has to call it; the first one of them writes, and all return when it has.

    Args:
        model: a PeftModel, or a transformers model with an adapter added.
        directory: made if it does not exist; other files in it stay.

    Raises:
        TypeError: model or directory is something else.
        RuntimeError: other processes, which have to call it, did not within five minutes; names their ranks.
        ValueError: the model has no adapter of this name.
        OSError: the files cannot be written; those of an older adapter are intact.
    """
    check_module("model", model)
    path = Path(check_path("directory", directory))
    config = copy.copy(check_adapter_name(model, adapter_name))
    config.inference_mode = True
    if config.task_type is None and isinstance(model, PeftModel):  # as PEFT writes it
        made = type(model.base_model.model)
        config.auto_mapping = {"base_model_class": made.__name__, "parent_library": made.__module__}
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None)
    with gathered(p for n, p in model.named_parameters() if f".{adapter_name}" in n) as partitioned:
        own = {n: t for n, t in model.state_dict().items() if f".{adapter_name}" in n or not _is_sharded(t)}
        sharded = any(map(_is_sharded, own.values()))
        if sharded:
            meet_to_save()
        whole = whole_on_first(own) if sharded or partitioned else own
        try:
            if whole is not None:
                state_dict = get_peft_model_state_dict(model, whole, adapter_name=adapter_name)
                tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state_dict.items()}
                write_adapter(path, config, tensors)
        finally:
            if sharded or partitioned:
                distributed.barrier()


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which a process has a part."""
    return hasattr(tensor, "full_tensor")


def check_adapter_name(model: Any, adapter_name: str) -> Any:
    """The config of an adapter. ValueError if the model has none of this name."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"adapter_name is {adapter_name!r}, the model's adapters are {sorted(configs)}")
    return configs[adapter_name]


def load_adapter(
    model: Any,
    directory: StrPath,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    layout: str = "peft",
    shared_outer: bool = False,
) -> PeftModel:
    """Put a saved adapter on a model, with kt_moe experts or without.

    Args:
        model: a transformers model, or a PeftModel, which gets one adapter more or new values for an old one.
        directory: as written by `save_adapter` or by PEFT, per expert or fused (`target_parameters`).
        is_trainable: False freezes the adapter. To train on with dropout, which files do not have, see
            docs/adapters.md.
        layout: of fused tensors: "peft", or "expert-major", as Unsloth writes lora_B, which nothing in the
            files tells.
        shared_outer: a new adapter shares A of gate and up and B of down, as a `SharedOuterLoraConfig` says;
            they have to be the same for all experts.

    Returns:
        the PeftModel; `model` itself if it was one. A further adapter is not made the active one.

    Raises:
        TypeError: model or directory is something else.
        FileNotFoundError: no adapter in the directory.
        ValueError: no adapter of this model, or one with numbers that no adapter has; the message names them.
            The model is as it was.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout is {layout!r}, wanted one of {list(_LAYOUTS)}")
    check_module("model", model)
    path = Path(check_path("directory", directory))
    config, tensors = read_adapter(path)
    config.inference_mode = not is_trainable
    if shared_outer:
        config.__class__ = SharedOuterLoraConfig
    undo: Callable[[], object]
    if not isinstance(model, PeftModel):
        model = with_adapter(model, config, adapter_name)
        undo = model.unload
    elif adapter_name not in model.peft_config:
        model.add_adapter(adapter_name, config)
        undo = partial(model.delete_adapter, adapter_name)
    else:
        if shared_outer and not getattr(model.peft_config[adapter_name], "shared_outer", False):
            raise ValueError(
                f"shared_outer is True, the model's adapter {adapter_name!r} has matrices of its own for "
                f"each expert: delete_adapter({adapter_name!r}), or use another name"
            )
        check_same(model.get_base_model(), config, adapter_name)
        undo = _remember(model, adapter_name)
    try:
        fill(model, tensors, adapter_name, path, layout)
    except BaseException:  # an interrupt too leaves no adapter without its values
        undo()
        raise
    model.set_requires_grad(adapter_name, is_trainable)
    if not is_trainable:
        model.eval()
    return model


def _remember(model: PeftModel, adapter_name: str) -> Callable[[], None]:
    """What brings back of an adapter what `fill` changes where it fails."""
    config = model.peft_config[adapter_name]
    saved = config.kt_moe_saved if isinstance(config, KtLoraConfig) else None
    layers = [layer.remember(adapter_name) for _, layer in lora_layers(model, adapter_name)]

    def undo() -> None:
        for restore in layers:
            restore()
        if isinstance(config, KtLoraConfig) and saved is not None:
            config.kt_moe_saved = saved

    return undo


def with_adapter(model: Any, config: LoraConfig, adapter_name: str) -> PeftModel:
    """PEFT's model with an adapter by a config from a file. ValueError if that does not fit the model."""
    if experts_architecture(model) is None:  # else the tuner does it
        check_config_patterns(config, [name for name, _ in model.named_modules()])
    return get_peft_model(model, config, adapter_name=adapter_name)


def fill(model: Any, tensors: dict[str, Tensor], adapter_name: str, path: Path, layout: str) -> None:
    """Give an adapter of the model its values.

    Raises:
        ValueError: tensors that the model lacks or that it does not get, or of other shapes; names some. All
            values are as they were; ranks of experts may have changed.
    """
    forms = []
    for name, layer in lora_layers(model, adapter_name):
        forms.append(layer.form(name.removeprefix(PREFIX)))
        forms[-1].check_keys(tensors, layer.pairs[adapter_name].pairs)
    if layout == "expert-major":
        tensors = expert_major(tensors, forms)

    def check(_: nn.Module, state_dict: dict[str, Tensor], *__: Any) -> None:
        _check_fits(model, state_dict, adapter_name, path)

    hook = model.register_load_state_dict_pre_hook(check)  # torch's own checks come after the copies
    try:
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    except RuntimeError as error:  # of tensors of other shapes that PEFT was to make one of
        raise ValueError(f"the adapter in {path} does not fit this model: {error}") from error
    except KeyError as error:  # PEFT's, of a module in modules_to_save
        raise ValueError(f"the adapter in {path} lacks {error} for this model") from error
    finally:
        hook.remove()


def _check_fits(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, path: Path) -> None:
    """ValueError unless the tensors, by the model's names, are those of one of its adapters."""
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    missing = [
        key for key in own.keys() - state_dict.keys() if "lora_" in key and f".{adapter_name}." in f"{key}."
    ]
    for what, keys in (("lacks", missing), ("has unknown", state_dict.keys() - own.keys())):
        if keys:
            named = sorted(key.removeprefix(PREFIX).replace(f".{adapter_name}", "") for key in keys)
            raise ValueError(
                f"the adapter in {path} {what} {len(keys)} keys for this model: {named[:3]} ... It may be of "
                "another model"
            )
    for key, tensor in state_dict.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"the adapter in {path} does not fit this model: {key} is {list(tensor.shape)}, wanted "
                f"{list(own[key].shape)}"
            )
