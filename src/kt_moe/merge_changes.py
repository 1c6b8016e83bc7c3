"""What an adapter does to the tensors of a checkpoint, by their names: W + s B A, or another value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from kt_moe.adapter_files import read_adapter
from kt_moe.adapters import fill, with_adapter
from kt_moe.architectures import Architecture, architecture_of
from kt_moe.checkpoint import Checkpoint, ExpertList
from kt_moe.conversion import stored_lists
from kt_moe.experts import PROJECTIONS
from kt_moe.hf.lora import INITIAL_VALUES, KtLoraExperts, lora_layers
from kt_moe.hf.portable import PREFIX, ExpertsForm
from kt_moe.hf.quantizer import put_experts
from kt_moe.requantise import Stored, stored_as

_NAME = "merged"  # of the adapter in the model without weights
_REFUSED = ("use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "trainable_token_indices")
_NVFP4 = ("nvfp4, compressed-tensors", "nvfp4, modelopt")
_PER_EXPERT = ("per-expert", "compressed-tensors", "gptq", "awq", *_NVFP4)  # layouts


@dataclass(frozen=True)
class _Pair:
    """s B A, of a matrix: A [r, in], B [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float

    def delta(self) -> Tensor:
        return self.scaling * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class _Matrix:
    """W + s B A for one matrix [out, in], or [in, out] if `transposed`."""

    pair: _Pair
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.pair.b.shape[0], self.pair.a.shape[1]
        return shape[::-1] if self.transposed else shape

    def apply(self, weight: Tensor) -> Tensor:
        delta = self.pair.delta()
        return (weight.float() + (delta.T if self.transposed else delta)).to(weight.dtype)


@dataclass(frozen=True)
class Fused:
    """The same for all experts in one tensor: pairs by projection, each on its rows."""

    pairs: dict[str, list[_Pair]]
    form: ExpertsForm
    name: str
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        into, out = self.form.size(self.name)
        return (self.form.num_experts, *((into, out) if self.transposed else (out, into)))

    def apply(self, weight: Tensor) -> Tensor:
        return torch.stack([self.of_expert(one, e) for e, one in enumerate(weight)])

    def of_expert(self, weight: Tensor, e: int) -> Tensor:
        """The same for the matrix of one expert."""
        result = weight.clone()
        view = result.mT if self.transposed else result
        for projection, pairs in self.pairs.items():
            own = self.form.rows(view[None], projection)[0]
            own.copy_(own.float() + pairs[e].delta())
        return result


@dataclass(frozen=True)
class _Replaced:
    """Another tensor in its place, of modules_to_save."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def apply(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.dtype)


Change = _Matrix | Fused | _Replaced


@dataclass(frozen=True)
class Changes:
    """What an adapter does to a checkpoint.

    Attributes:
        of: change by name of the matrix, which is that of its tensor where it is stored as floats.
        stored: how matrices are stored that are quantised, by name.
        owner: name of the matrix to which each tensor of a quantised one belongs.
    """

    of: dict[str, Change]
    stored: dict[str, Stored]
    owner: dict[str, str]


def changes_of(base: Path, adapter: Path, checkpoint: Checkpoint) -> Changes:
    """What the adapter does to the checkpoint's tensors, by their names.

    Every part of it must find its tensor, or the merge would silently leave it out.

    Raises:
        ValueError: as `kt_moe.merge_checkpoint`.
    """
    model, replaced, gptq = _hollow(base, adapter)
    core = model.get_base_model()
    changes: dict[str, Change] = {_on_disk(core, name): _Replaced(t) for name, t in replaced.items()}
    layers = lora_layers(model, _NAME)
    changes |= _of_experts(core, {path.removeprefix(PREFIX): layer for path, layer in layers}, checkpoint)
    for path, module in model.named_modules():
        path = path.removeprefix(PREFIX)
        if isinstance(module, KtLoraExperts):
            continue
        if isinstance(module, LoraLayer) and _NAME in module.r:
            name = f"{path.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
            changes[_on_disk(core, name)] = _of_layer(path, module)
        elif isinstance(module, ModulesToSaveWrapper) and _NAME in module.modules_to_save:
            for name, value in module.modules_to_save[_NAME].state_dict().items():
                changes[_on_disk(core, f"{path}.{name}")] = _Replaced(value)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"the adapter has {type(module).__name__} at {path}, which cannot be merged")
    for name, other in (getattr(core, "all_tied_weights_keys", None) or {}).items():
        if _on_disk(core, other) in changes and _on_disk(core, name) not in changes:
            raise ValueError(
                f"the adapter changes {other} alone, to which the model ties {name}: a merge would change "
                "both. Give the base model untied weights (tie_word_embeddings=False)"
            )
    stored: dict[str, Stored] = {}
    missing = []
    for name, change in changes.items():
        try:
            found = stored_as(name, checkpoint.tensors, change.shape, gptq)
        except KeyError:
            missing.append(name)
            continue
        if found is not None:
            stored[name] = found
        elif (shape := checkpoint.tensors[name].shape) != change.shape:
            raise ValueError(f"{name} is {list(shape)}, the adapter is for {list(change.shape)}")
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} weights that the adapter changes: {sorted(missing)[:3]}"
        )
    owner = {own: name for name, one in stored.items() for own in one.names.values()}
    return Changes(changes, stored, owner)


def _hollow(base: Path, adapter: Path) -> tuple[PeftModel, dict[str, Tensor], str]:
    """The base model without weights, with the adapter's; base weights that the adapter's file has; and which
    of GPTQ's formats the config says.
    """
    config, tensors = read_adapter(adapter)
    for option in _REFUSED:
        if getattr(config, option, None):
            raise ValueError(f"the adapter in {adapter} has {option}, which merge_checkpoint does not know")
    if config.init_lora_weights not in INITIAL_VALUES:
        raise ValueError(
            f"the adapter in {adapter} has init_lora_weights {config.init_lora_weights!r}, which "
            "merge_checkpoint does not know: it may have changed the base model's weights"
        )
    if config.bias != "none":
        raise ValueError(
            f"the adapter in {adapter} has bias {config.bias!r}, which merge_checkpoint does not know"
        )
    try:
        model_config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"config.json in {base} is of no model of transformers: {error}") from error
    gptq = "gptq"
    if hasattr(model_config, "quantization_config"):  # the tensors tell the rest; the model here has none
        quantised = model_config.quantization_config
        if isinstance(quantised, dict) and quantised.get("checkpoint_format") == "gptq_v2":
            gptq = "gptq_v2"
        del model_config.quantization_config
    class_name = next(iter(model_config.architectures or ()), "")
    cls = getattr(transformers, class_name, transformers.AutoModelForCausalLM)
    make = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
    with torch.device("meta"):
        model = make(model_config)
    try:
        architecture: Architecture | None = architecture_of(model)
    except ValueError:  # a model without experts, or with others than ours; LoRA on those is refused below
        architecture = None
    if architecture is not None:
        put_experts(model, architecture)
    config.lora_dropout, config.inference_mode, config.base_model_name_or_path = 0.0, True, None
    wrapped = with_adapter(model, config, _NAME)
    for path, module in wrapped.named_modules():  # PEFT has put the adapter where the model is
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and f".{_NAME}." in f"{path}.{name}.":
                module.register_parameter(name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))
    # PEFT saves embeddings whole where their size was changed, and those that have LoRA.
    hollow = {name for name, parameter in wrapped.named_parameters() if parameter.is_meta}
    whole = {name: tensors.pop(name) for name in hollow & tensors.keys()}
    fill(wrapped, tensors, _NAME, adapter, "peft")
    return wrapped, {n.removeprefix(PREFIX): t for n, t in whole.items() if ".base_layer." not in n}, gptq


def _on_disk(model: Any, name: str) -> str:
    """A parameter's name as transformers' conversion writes it."""
    found = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return str(next(iter(found), name)) if len(found) == 1 else name


def _of_layer(path: str, module: Any) -> Change:
    scaling = float(module.scaling[_NAME])
    if isinstance(module, Embedding):
        pair = _Pair(module.lora_embedding_A[_NAME], module.lora_embedding_B[_NAME], scaling)
        return _Matrix(pair, transposed=True)
    if not isinstance(module, Linear | ParamWrapper) or getattr(module, "num_experts", 1) != 1:
        raise ValueError(f"the adapter has LoRA on {path}, a {type(module).__name__}, which cannot be merged")
    return _Matrix(_Pair(module.lora_A[_NAME].weight, module.lora_B[_NAME].weight, scaling))


def _of_experts(model: Any, layers: dict[str, KtLoraExperts], checkpoint: Checkpoint) -> dict[str, Change]:
    """What it does to the layers of routed experts, given by path, as the checkpoint stores them."""
    if not layers:
        return {}
    architecture = next(iter(layers.values())).architecture
    lists = stored_lists(model, architecture, checkpoint.tensors)
    stored = checkpoint.with_lists(lists)
    changes: dict[str, Change] = {}
    for path, layer in layers.items():
        form = layer.form(path)
        together = [m.path for m in architecture.modules if form.module.path in (m.path, m.same_as)]
        together += [form.module.same_as] if form.module.same_as else []
        if len(together) > 1:
            raise ValueError(
                f"the adapter has LoRA on {path}, which cannot be merged: {sorted(together)} share one set "
                "of weights"
            )
        pairs = {
            projection: [
                _Pair(a, b, pair.scaling)
                for a, b in zip(layer.lora_A[_NAME][projection], layer.lora_B[_NAME][projection], strict=True)
            ]
            for projection, pair in layer.pairs[_NAME].pairs.items()
        }
        own = lists[form.module.number]
        first = f"{own.prefix}.{own.first_expert}.{own.words[2]}.qweight"
        # of GPTQ's second format, which has the same names, the core reads no experts
        layout = "gptq" if first in checkpoint.tensors else stored.layer(form.module.number).layout
        changes |= _of_list(own, layout, form, pairs)
    return changes


def _of_list(
    stored: ExpertList, layout: str, form: ExpertsForm, pairs: dict[str, list[_Pair]]
) -> dict[str, Change]:
    words = dict(zip(PROJECTIONS, stored.words, strict=True))
    if layout in _PER_EXPERT:
        return {
            f"{stored.prefix}.{e}.{words[projection]}.weight": _Matrix(pair)
            for projection, of_experts in pairs.items()
            for e, pair in enumerate(of_experts, stored.first_expert)
        }
    if layout != "mxfp4" and not layout.startswith("fused"):
        raise ValueError(f"{stored.prefix} is stored as {layout}, which merge_checkpoint does not know")
    on_disk = replace(
        form, module=replace(form.module, interleaved=layout == "mxfp4" or "interleaved" in layout)
    )
    changes: dict[str, Change] = {}
    for fused, parts in form.module.fused.items():
        own = {p: pairs[p] for p in parts if p in pairs}
        if own:
            name = f"{stored.prefix}.{words[parts[0]]}"
            changes[name] = Fused(own, on_disk, fused, "transposed" in layout)
    return changes
