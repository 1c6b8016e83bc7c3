"""What a LoraConfig targets in a model with kt_moe experts: one rule for every family.

A name matches as in PEFT: the end of a module's path. The projections of routed experts have paths too,
`...mlp.experts.gate_proj`, though in memory all experts' are one tensor, and perhaps under another name:

- "experts", or a longer end of that path, is all projections of the routed experts;
- "gate_proj", "up_proj", "down_proj", or the names that the family's checkpoints have for them, are every
  projection so called: of routed experts, shared experts and dense layers; "experts.down_proj" is that of the
  routed ones alone;
- "all-linear" is every nn.Linear but the output layer, and the routed experts;
- `target_parameters` may name `gate_up_proj` (without a gate `up_proj`) and `down_proj` of the fused experts,
  as PEFT's adapters do.

A name that matches nothing is an error, and so is one of some of the experts, as "experts.3.gate_proj": they
share one LoRA tensor a projection. A pattern may match the numbers of all, as in `experts.\\d+.gate_proj`.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from kt_moe.architectures import Architecture
from kt_moe.experts import PROJECTIONS
from kt_moe.hf.experts import is_kt_experts
from kt_moe.lora_options import check_names, check_numbers
from kt_moe.patterns import check_patterns, first_match

_ALL_LINEAR = "all-linear"
_NAME = re.compile(r"(?:\.\*\\?\.)?([\w.-]+)")  # perhaps after `.*\.`
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)


@dataclass(frozen=True)
class Pair:
    """Rank and scaling (alpha / r) of the LoRA of one projection."""

    rank: int
    scaling: float


@dataclass(frozen=True)
class ExpertPairs:
    """The LoRA of one layer's experts.

    pairs: by projection. fused: ranks that the config gives to fused tensors, by their name.
    """

    pairs: Mapping[str, Pair]
    fused: Mapping[str, int]


@dataclass(frozen=True)
class Targets:
    """Full paths of what gets LoRA: modules, other modules' weights (as parameters), layers of experts."""

    modules: frozenset[str]
    parameters: frozenset[str]
    experts: Mapping[str, ExpertPairs]

    def names(self) -> set[str]:
        """The same as a list in target_modules says it, parameters apart."""
        return {
            *self.modules,
            *(f"{path}.{p}_proj" for path, pairs in self.experts.items() for p in pairs.pairs),
        }

    def __str__(self) -> str:
        names = {path.rpartition(".")[2] for path in self.modules}
        names |= {path.rpartition(".")[0].rpartition(".")[2] for path in self.parameters}
        names |= {f"experts.{p}_proj" for pairs in self.experts.values() for p in pairs.pairs}
        return ", ".join(sorted(names))


def find_targets(model: nn.Module, config: LoraConfig, architecture: Architecture) -> Targets:
    """All that `config` targets.

    Raises:
        ValueError: an option of another type or out of range; a target that matches nothing, or some experts
            of a layer; a layer that there is not; experts in modules_to_save; a pattern that takes too long;
            names it.
    """
    check_numbers("LoraConfig", vars(config))
    check_names("LoraConfig", vars(config))
    modules = {name: module for name, module in free_modules(model) if name}
    paths = [name for name, module in modules.items() if holds_kt_experts(module)]
    _refuse_saved_experts(config, modules, paths)
    _refuse_unknown_layers(config, modules)
    names = {path: names_of(path, architecture) for path in paths}
    known = [*modules, *(name for found in names.values() for keys in found.values() for name in keys)]
    check_config_patterns(config, known)
    matchers = list(_matchers(model, config, paths))
    _refuse_some_experts(config, matchers, paths, architecture)
    _warn_of_patterns(config, known)
    matched: set[str] = set()
    whole: dict[str, set[str]] = {path: set() for path in paths}
    missing = []
    for target, matches in matchers:
        found = {name for name in modules if matches(name)}
        hits = {(path, p) for path in paths for p in PROJECTIONS if any(map(matches, names[path].get(p, ())))}
        for path, projection in hits:
            whole[path].add(projection)
        matched |= found
        if not found and not hits:
            missing.append(target)
    parts = {path: architecture.module_at(path).fused for path in paths}
    fused, parameters = _parameters(config, modules, parts, matched, missing)
    if missing:
        have = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, (*_LAYERS, BaseTunerLayer))}
        have |= {n.rpartition(".")[2] for n, m in modules.items() if _only_a_weight(m)}
        have |= {f"experts.{p}_proj" for found in names.values() for p in found if p}
        raise ValueError(
            f"LoraConfig targets {sorted(missing)}, which match nothing in this model; it has "
            f"{sorted(have)}{_hint_of_string(config, known)}"
        )
    for path in paths:
        if path in matched:
            whole[path] |= names[path].keys() - {""}
        whole[path] = {p for p in whole[path] if not any(_excludes(config, name) for name in names[path][p])}
    excluded = {name for name in modules if _excludes(config, name)}
    matched -= set(paths) | excluded
    weights = {name for name in matched if _only_a_weight(modules[name])}
    experts = {
        path: _pairs(config, names[path], whole[path], {name: parts[path][name] for name in fused[path]})
        for path in paths
        if path not in excluded and (whole[path] or fused[path])
    }
    return Targets(
        frozenset(matched - weights), frozenset(parameters | {f"{name}.weight" for name in weights}), experts
    )


def _hint_of_string(config: LoraConfig, names: Iterable[str]) -> str:
    """What to write where target_modules is a string, a pattern for whole names, and was meant as a name."""
    text = config.target_modules
    if not isinstance(text, str) or not any(name.endswith(f".{text}") for name in names):
        return ""
    return f". A string is a pattern for whole names: for a name write target_modules=[{text!r}]"


def _refuse_saved_experts(config: LoraConfig, modules: Iterable[str], experts: Sequence[str]) -> None:
    """ValueError where modules_to_save, by PEFT's rule ends of paths, has experts or a module around them."""
    for word in config.modules_to_save or ():
        for name in modules:
            if name.endswith(word) and any(f"{path}.".startswith(f"{name}.") for path in experts):
                raise ValueError(
                    f"modules_to_save has {word!r}, and {name} has routed experts, which are frozen: name "
                    "the modules beside them (the router, shared experts), and put LoRA on experts with "
                    'target_modules=["experts"]'
                )


def _refuse_unknown_layers(config: LoraConfig, modules: Iterable[str]) -> None:
    """ValueError where layers_to_transform has a layer that there is not."""
    layers = config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    if not wanted:
        return
    firsts = (re.search(r"[^.]\.(\d+)(?=\.|$)", name) for name in modules)
    found = {int(first[1]) for first in firsts if first is not None}
    if found and (beyond := sorted(wanted - found)):
        raise ValueError(
            f"layers_to_transform has {beyond}, the layers of this model are {min(found)} to {max(found)}"
        )


def _refuse_some_experts(
    config: LoraConfig,
    matchers: Iterable[tuple[str, Callable[[str], bool]]],
    paths: Iterable[str],
    architecture: Architecture,
) -> None:
    """ValueError where an entry matches the numbers of some experts of a layer, and not those of all."""
    entries = [("target_modules", text, matches) for text, matches in matchers]
    excluded = config.exclude_modules or ()
    for text in [excluded] if isinstance(excluded, str) else excluded:
        one = LoraConfig(exclude_modules=text if isinstance(excluded, str) else [text])
        entries.append(("exclude_modules", text, lambda name, one=one: _excludes(one, name)))  # type: ignore[misc]
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option) or ():
            pattern = re.compile(rf"(.*\.)?({key})$")
            entries.append((option, key, lambda name, pattern=pattern: bool(pattern.match(name))))  # type: ignore[misc]
    entries = [entry for entry in entries if _has_numbers(entry[1])]
    for path in paths if entries else ():
        module = architecture.module_at(path)
        first = 0 if module.keyed is None else module.keyed.first_expert
        places = {path: 0, module.disk_path(path): first}
        for (place, start), (projection, on_disk) in itertools.product(places.items(), module.words.items()):
            numbers = range(start, start + module.num_experts)
            for word, (option, text, matches) in itertools.product(
                dict.fromkeys((f"{projection}_proj", on_disk)), entries
            ):
                found = [n for n in numbers if matches(f"{place}.{n}.{word}")]
                if found and len(found) < module.num_experts:
                    some = ", ".join([*map(str, found[:3]), *(["..."] if len(found) > 3 else [])])
                    raise ValueError(
                        f"{option}: {text!r} names {len(found)} of the {module.num_experts} experts at "
                        f"{place} ({some}), which share one LoRA tensor a projection: write "
                        f'"experts.{word}" for that of all of them'
                    )


def _has_numbers(text: str) -> bool:
    """Whether a name or pattern can tell experts apart, in names such as `...experts.3.up_proj`."""
    name = _NAME.fullmatch(text)
    return name is None or any(part.isdigit() for part in name[1].split(".")[-2:-1])


def check_config_patterns(config: LoraConfig, names: Sequence[str]) -> None:
    """ValueError for a pattern that is none, or takes too long on these names; see `check_patterns`."""
    words = (config.target_modules, config.exclude_modules, config.layers_pattern)
    patterns = [word for word in words if isinstance(word, str)]
    for some in (config.rank_pattern, config.alpha_pattern, config.modules_to_save):
        patterns += some or ()
    if not isinstance(config.layers_pattern, str):
        patterns += config.layers_pattern or ()
    check_patterns(patterns, names)


def _warn_of_patterns(config: LoraConfig, names: list[str]) -> None:
    """As PEFT does, of patterns that match no module or weight of one.

    Projections have no pattern by the fused tensor's name, which has a rank of its own.
    """
    if not config.target_parameters:
        names = [name for name in names if not name.endswith(".gate_up_proj")]
    names = [*names, *(f"{name}.weight" for name in names)]
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option) or {}
        missing = [key for key in patterns if first_match({key: True}, names) is None]
        if missing:
            warnings.warn(
                f"{option} has {missing}, which match nothing in this model", RuntimeWarning, stacklevel=4
            )


def free_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without those inside tuner layers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (f"{name}.",)  # a module's children follow it at once
        yield name, module


def holds_kt_experts(module: nn.Module) -> bool:
    """Whether these are kt_moe experts, with or without LoRA."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return is_kt_experts(base)


def _matchers(
    model: nn.Module, config: LoraConfig, experts: list[str]
) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """Each entry of target_modules, and whether a name is meant by it."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        linear = _maybe_include_all_linear_layers(copy.copy(config), model).target_modules
        yield targets, {*linear, *experts}.__contains__
        return
    entries = [targets] if isinstance(targets, str) else [{target} for target in sorted(targets or ())]
    for entry in entries:
        one = SimpleNamespace(
            target_modules=entry,
            target_parameters=None,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
        )
        text = entry if isinstance(entry, str) else next(iter(entry))
        yield text, lambda name, one=one: bool(check_target_module_exists(one, name))  # type: ignore[misc]


def _excludes(config: LoraConfig, name: str) -> bool:
    """Whether exclude_modules or modules_to_save keep LoRA off a module."""
    one = SimpleNamespace(
        target_modules=(), exclude_modules=config.exclude_modules, modules_to_save=config.modules_to_save
    )
    return isinstance(check_target_module_exists(one, name), _ExcludedModule)


def names_of(path: str, architecture: Architecture) -> dict[str, list[str]]:
    """What one may call each projection of the experts at `path`, and "" for all of them."""
    module = architecture.module_at(path)
    places = dict.fromkeys((path, module.disk_path(path)))
    names: dict[str, list[str]] = {"": list(places)}
    for projection, on_disk in module.words.items():
        fused = next(name for name, parts in module.fused.items() if projection in parts)
        aliases = dict.fromkeys((f"{projection}_proj", on_disk, fused))
        names[projection] = [f"{place}{of}.{a}" for place in places for a in aliases for of in ("", ".0")]
        names[projection] += [place for place in places if place != path]
    return names


def _parameters(
    config: LoraConfig,
    modules: dict[str, nn.Module],
    experts: Mapping[str, Iterable[str]],
    matched: set[str],
    missing: list[str],
) -> tuple[dict[str, set[str]], set[str]]:
    """target_parameters: fused tensors of each layer of experts, and others; adds to `matched`, `missing`.

    The weight of a layer that PEFT knows is the layer: its LoRA has the same keys and values.
    """
    fused: dict[str, set[str]] = {path: set() for path in experts}
    others: set[str] = set()
    for target in sorted(config.target_parameters or ()):
        found = False
        for path, own in experts.items():
            hits = {n for n in own if f"{path}.{n}" == target or f"{path}.{n}".endswith(f".{target}")}
            fused[path] |= hits
            found |= bool(hits)
        for name, module in modules.items():
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for parameter, _ in base.named_parameters(recurse=False):
                full = f"{name}.{parameter}"
                if holds_kt_experts(module) or not (full == target or full.endswith(f".{target}")):
                    continue
                found = True
                if parameter == "weight" and not _only_a_weight(module):
                    matched.add(name)
                else:
                    others.add(full)
        if not found:
            missing.append(target)
    return fused, others


def _only_a_weight(module: nn.Module) -> bool:
    """Whether PEFT can adapt this module only by its parameter, as transformers' routers."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = base._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(base, _LAYERS)


def _pairs(
    config: LoraConfig,
    names: dict[str, list[str]],
    by_name: set[str],
    fused: Mapping[str, tuple[str, ...]],
) -> ExpertPairs:
    """Ranks and scalings of the projections of one layer, by name or by fused tensor (with what is in it)."""
    pairs: dict[str, Pair] = {}
    ranks = {}
    for name, parts in fused.items():
        key = [f"{names[''][0]}.{name}"]
        of_pattern = first_match(config.rank_pattern, key)
        rank = config.r if of_pattern is None else of_pattern
        ranks[name] = rank
        scaling = _scaling(config, rank, first_match(config.alpha_pattern, key))
        # What PEFT makes of separate gate and up has twice the rank; what the file has decides later.
        halved = len(parts) == 2 and rank == 2 * config.r
        pairs |= {p: Pair(rank // 2 if halved else rank, scaling) for p in parts}
    for projection in sorted(by_name - pairs.keys()):
        key = [n for n in names[projection] if not n.endswith(".gate_up_proj")] + names[""]
        of_pattern = first_match(config.rank_pattern, key)
        rank = config.r if of_pattern is None else of_pattern
        pairs[projection] = Pair(rank, _scaling(config, rank, first_match(config.alpha_pattern, key)))
    ordered = {p: pairs[p] for p in PROJECTIONS if p in pairs}
    return ExpertPairs(ordered, ranks)


def _scaling(config: LoraConfig, rank: int, alpha: float | None) -> float:
    alpha = config.lora_alpha if alpha is None else alpha
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def shortest(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest ends of the dotted names `wanted` that are the end of no other name in `others`."""
    wanted = set(wanted)
    taken = {end for name in others if name not in wanted for end in _ends(name)}
    return sorted({next(end for end in (*_ends(name), name) if end not in taken) for name in wanted})


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
