"""The families of the installed transformers that have experts others may compute, and whether the core can.

Nothing is listed here: packages are searched for decorated experts, and for those in `computation.UNMARKED`,
and a model of each is made on the meta device, with its default config.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from kt_moe.architectures import computed_experts
from kt_moe.checkpoint import ExpertList
from kt_moe.computation import (
    UNMARKED,
    Computation,
    computation_of,
    is_experts,
    is_experts_name,
    parameter_names,
    sizes_of,
)
from kt_moe.conversion import saved_lists

_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)
_DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
# Options of default configs that have no value where a model must, and one that will do.
_UNSET = dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4)
_UNSET |= {"num_experts_per_tok": 2, "top_k_experts": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
_HEADS = ("CausalLM", "ImageTextToText", "MultimodalLM", "TokenClassification")  # by preference


@dataclass(frozen=True)
class Family:
    """A family's experts of one class.

    Attributes:
        name: of its package in transformers.
        experts: name of the class.
        computation: what a module of it computes, with the default config; None where none could be made.
        saved: what a checkpoint calls one module's tensors; None where the default config has no such module,
            or the core cannot read them.
        router: the end of the path of what has a row of weights for each expert; "" where none is beside it.
        marked: whether transformers, or we, say that others may compute the class.
    """

    name: str
    experts: str
    computation: Computation | None
    saved: ExpertList | None
    router: str = ""
    marked: bool = True

    @property
    def works(self) -> bool:
        """Whether a model of it loads through both doors."""
        return self.computation is not None and not self.computation.lacks

    @property
    def what(self) -> str:
        """The activation, or why it does not work."""
        if not self.marked:
            return f"transformers does not let others compute {self.experts}"
        if self.computation is None:
            return "no module of its default config"
        return self.computation.activation or "; ".join(self.computation.lacks)

    @property
    def on_disk(self) -> str:
        """`layers.N.mlp.experts.E.{gate_proj,up_proj,down_proj}`; "" where it is not known."""
        if self.saved is None:
            return ""
        words = dict.fromkeys(filter(None, self.saved.words))
        prefix = re.sub(r"(^|\.)\d+(?=\.)", r"\1N", self.saved.prefix)
        return f"{prefix}.{'' if self.saved.fused else 'E.'}{{{','.join(words)}}}"


def expert_classes() -> dict[str, list[str]]:
    """Names of the classes that transformers marks with `use_experts_implementation`, or we, by package."""
    found = {}
    for package, text in _sources():
        classes = _DECORATED.findall(text)
        classes += [c for of, c in UNMARKED if of == package and c not in classes and f"class {c}(" in text]
        if classes:
            found[package] = classes
    return found


def refused_classes() -> dict[str, list[str]]:
    """Names of the other classes of routed experts, which nobody says others may compute, by package."""
    known = expert_classes()
    found = {}
    for package, text in _sources():
        classes = [name for name in _CLASS.findall(text) if is_experts_name(name)]
        if others := [name for name in classes if name not in known.get(package, ())]:
            found[package] = others
    return found


def _sources() -> Iterator[tuple[str, str]]:
    """transformers' packages of models, with their code."""
    (root,) = (Path(path) for path in transformers.models.__path__)
    for package in pkgutil.iter_modules([str(root)]):
        file = root / package.name / f"modeling_{package.name}.py"
        if file.is_file():
            yield package.name, file.read_text(encoding="utf-8")


def families(names: Collection[str] = ()) -> Iterator[Family]:
    """One for each class of experts, in alphabetical order of the packages; of those named, or of all."""
    computed, refused = expert_classes(), refused_classes()
    for name in sorted(computed.keys() | refused.keys()):
        if names and name not in names:
            continue
        classes = computed.get(name, [])
        made: dict[str, Family] = {}
        for found in _from_models(name):
            made.setdefault(found.experts, found)
            if len(made) == len(classes):
                break
        for experts in classes:
            yield made.get(experts) or Family(name, experts, _alone(name, experts), None)
        for experts in refused.get(name, ()):
            yield Family(name, experts, None, None, marked=False)


def refuse_config(config: PretrainedConfig) -> None:
    """Refuse a model by its config: one of it is made without weights, if transformers knows a class for it.

    Raises:
        ValueError: as `architecture_of`.
    """
    made = model_class(config)
    try:
        with torch.device("meta"):
            model = None if made is None else made(copy.deepcopy(config))
    except Exception:  # what is wrong with it, from_pretrained says
        return
    if model is not None:
        computed_experts(model)


def model_types(family: str) -> list[str]:
    """Of a package, those first whose models have most parts."""
    return [t for t in CONFIG_MAPPING_NAMES if model_type_to_module_name(t) == family]


def model_class(config: PretrainedConfig) -> Any:
    """The class of models for a config, with a head if there is one; None if the Auto classes know none."""
    for auto in (*(f"AutoModelFor{head}" for head in _HEADS), "AutoModel"):
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def _from_models(family: str) -> Iterator[Family]:
    for model_type in model_types(family):
        model = _on_meta(model_type)
        modules = {} if model is None else {n: m for n, m in model.named_modules() if is_experts(m)}
        if model is None or not modules:
            continue
        lists = saved_lists(model, modules)
        for path, module in modules.items():
            experts = type(module).__name__
            yield Family(family, experts, computation_of(module), lists[path], _router(model, path, module))


def _router(model: Any, path: str, experts: Any) -> str:
    place, _, own = path.rpartition(".")
    rows = {sizes_of(experts)[0], len(getattr(experts, parameter_names(experts)[0]))}
    found = [
        name.removesuffix(".weight")
        for name, p in model.get_submodule(place).named_parameters()
        if name.endswith(".weight") and p.dim() == 2 and len(p) in rows and "shared" not in name
    ]
    return next(
        (f"{place.rpartition('.')[2]}.{name}" for name in found if not name.startswith(f"{own}.")), ""
    )


def _default_config(model_type: str) -> PretrainedConfig:
    config = CONFIG_MAPPING[model_type]()
    for name, value in _UNSET.items():
        if getattr(config, name, value) is None:
            setattr(config, name, value)
    return config


def _on_meta(model_type: str) -> Any:
    """A model with the default config; None if none can be made of it."""
    try:
        config = _default_config(model_type)
        made = model_class(config)
        with torch.device("meta"):
            return None if made is None else made(config)
    except Exception:  # a default config need not be one of a model
        return None


def _alone(family: str, experts: str) -> Computation | None:
    """What a module computes that is made without a model, of one of the package's default configs."""
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for model_type in model_types(family):
        try:
            config = _default_config(model_type)
            with torch.device("meta"):
                module: nn.Module = getattr(code, experts)(config)
            return computation_of(module)
        except Exception:  # the config of another part
            continue
    return None
