"""What checkpoints call the tensors of a model's experts, by transformers' own conversion mapping.

transformers names its modules' parameters in its own way, renames and rearranges tensors as it loads a
checkpoint, and does the opposite as it saves one. Here that machinery is asked, never repeated: what it would
write is found by having it convert marked tensors of a few elements, and where the tensors of a checkpoint
would go by having it rename them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kt_moe.checkpoint import ExpertList
from kt_moe.computation import is_gated, layout_of, parameter_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kt_moe.architectures import Architecture, ExpertModule

_E, _I, _H = 2, 2, 3  # of the marked tensors: 2I, I and H differ, so that shapes tell the dimensions
_PER_EXPERT_WORDS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Of the modules themselves, with a gate and without.
_OWN_WORDS = {
    True: ("gate_up_proj", "gate_up_proj", "down_proj"),
    False: ("", "up_proj", "down_proj"),
}
_LAST_NUMBER = re.compile(r"^(.*\.)?(\d+)(\..*|$)")


def saved_lists(model: PreTrainedModel, modules: Mapping[str, Any]) -> dict[str, ExpertList | None]:
    """How transformers stores the experts of each module, by path, when it saves the model.

    None where the core has no name for it: gate and up fused over all experts but apart, rows along the
    outputs in tensors of one expert, and the like.
    """
    marks = {path: _marks(number, is_gated(module)) for number, (path, module) in enumerate(modules.items())}
    state = {
        f"{path}.{name}": tensor
        for path, module in modules.items()
        for name, tensor in _as_parameters(marks[path], module).items()
    }
    with _from_scratch(model):
        from transformers.core_model_loading import revert_weight_conversion

        saved = revert_weight_conversion(model, dict(state))
    # a module's tensors are those with its marks, whatever they are called
    by_module: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in saved.items():
        by_module[int(tensor.flatten()[0]) // _MARKS][name] = tensor
    lists = {path: _recognise(by_module[number], marks[path]) for number, path in enumerate(modules)}
    sizes = {path: int(module.down_proj.shape[0]) for path, module in modules.items()}
    return {
        path: found
        and replace(found, num_experts=sizes[path], first_expert=_first_expert(path, lists, sizes))
        for path, found in lists.items()
    }


def _first_expert(path: str, lists: Mapping[str, ExpertList | None], sizes: Mapping[str, int]) -> int:
    """How many experts the lists that share its numbers have before it; `lists` count those of the marks."""
    own = lists[path]
    assert own is not None
    return sum(
        sizes[other]
        for other, one in lists.items()
        if one is not None and one.prefix == own.prefix and one.first_expert < own.first_expert
    )


_MARKS = 100  # numbers a module has for its marks


@dataclass(frozen=True)
class _Marked:
    gate: Tensor  # [E, I, H]
    up: Tensor
    down: Tensor  # [E, H, I]
    gated: bool  # whether there is a gate

    @property
    def matrices(self) -> list[tuple[int, Tensor]]:
        """Those that there are, with the numbers of their projections."""
        return list(enumerate((self.gate, self.up, self.down)))[not self.gated :]


def _marks(number: int, gated: bool) -> _Marked:
    """Weights of one module, no two elements alike in the whole model."""
    count = _E * _I * _H
    values = torch.arange(3 * count, device="cpu", dtype=torch.float64) + number * _MARKS
    gate, up, down = values.view(3, count)
    return _Marked(gate.view(_E, _I, _H), up.view(_E, _I, _H), down.view(_E, _H, _I), gated)


def _as_parameters(marks: _Marked, module: Any) -> dict[str, Tensor]:
    """Under the names and in the layout of the module's parameters."""
    layout = layout_of(module)
    inner = _fused(marks, interleaved=not layout.is_concatenated) if layout.has_gate else marks.up
    inner, down = (one.mT if layout.is_transposed else one for one in (inner, marks.down))
    return dict(zip(parameter_names(module), (inner.contiguous(), down.contiguous()), strict=True))


def _fused(marks: _Marked, *, interleaved: bool) -> Tensor:
    """[E, 2I, H]"""
    if interleaved:
        return torch.stack([marks.gate, marks.up], dim=2).flatten(1, 2)
    return torch.cat([marks.gate, marks.up], dim=1)


@contextmanager
def _from_scratch(model: PreTrainedModel) -> Iterator[None]:
    """A loaded model remembers the conversions that its files needed; here the family's are wanted."""
    kept = model.__dict__.pop("_weight_conversions", None)
    try:
        yield
    finally:
        if kept is not None:
            model._weight_conversions = kept


def _recognise(saved: dict[str, Tensor], marks: _Marked) -> ExpertList | None:
    """The names of a module's tensors by what is in them."""
    per_expert = len(saved) == len(marks.matrices) * _E
    return _recognise_per_expert(saved, marks) if per_expert else _recognise_fused(saved, marks)


def _recognise_per_expert(saved: dict[str, Tensor], marks: _Marked) -> ExpertList | None:
    names = {
        (p, e): name
        for p, stack in marks.matrices
        for e in range(_E)
        for name, tensor in saved.items()
        if tensor.shape == stack[e].shape and torch.equal(tensor, stack[e])
    }
    parts = {key: re.fullmatch(r"(.+)\.(\d+)\.([^.]+)\.weight", name) for key, name in names.items()}
    first = parts.get((1, 0))
    if first is None or len(parts) != len(marks.matrices) * _E:
        return None
    prefix, begin = first[1], int(first[2])
    gate, up, down = (part[3] if (part := parts.get((p, 0))) else "" for p in range(3))
    words = (gate, up, down)
    for (p, e), part in parts.items():
        if part is None or part[0] != f"{prefix}.{begin + e}.{words[p]}.weight":
            return None
    return ExpertList(prefix, False, words, begin, _E)


def _recognise_fused(saved: dict[str, Tensor], marks: _Marked) -> ExpertList | None:
    def name_of(wanted: Tensor) -> str | None:
        """Of the tensor with these elements, whether its rows run along the inputs or along the outputs."""
        for name, tensor in saved.items():
            if any(tensor.shape == way.shape and torch.equal(tensor, way) for way in (wanted, wanted.mT)):
                return name
        return None

    down = name_of(marks.down)
    if down is None:
        return None
    if not marks.gated:
        up = name_of(marks.up)
        return None if up is None else _fused_names("", up, down)
    for interleaved in (False, True):
        both = name_of(_fused(marks, interleaved=interleaved))
        if both is not None:
            return replace(_fused_names(both, both, down), interleaved=interleaved)
    return None


def _fused_names(gate: str, up: str, down: str) -> ExpertList:
    """What the names share, up to a dot, and what each has beyond."""
    firsts, seconds = up.split("."), down.split(".")
    shared = next(i for i, (a, b) in enumerate(zip(firsts, seconds, strict=False)) if a != b)
    gate, up, down = (".".join(name.split(".")[shared:]) for name in (gate, up, down))
    return ExpertList(".".join(firsts[:shared]), True, (gate, up, down), 0, _E)


def stored_lists(
    model: PreTrainedModel, architecture: Architecture, names: Iterable[str]
) -> dict[int, ExpertList]:
    """Where a checkpoint has the experts of each module, by the modules' numbers.

    Args:
        model: as it is before it is loaded, with its experts.
        names: of all tensors of the checkpoint.

    Returns:
        a list for each module with parameters of its own; nothing if transformers knows none of the names, as
        those of kt-kernel's files.

    Raises:
        ValueError: the experts of a module are not there, are there twice, or are stored in a way that the
            core does not read; names the module.
    """
    renamer = _Renamer(model, architecture)
    found: dict[str, set[ExpertList]] = defaultdict(set)  # by the module's path
    for head, numbers, tail in _by_last_number(names):
        first = f"{head}{numbers[0]}{tail}" if numbers else head
        for module, rest, converted in renamer.targets(first):
            one_each = rest[:1].isdigit() or (
                converted and module.saved is not None and not module.saved.fused
            )
            if one_each:
                found[module.path].add(_per_expert(module, head[:-1], tail))
                continue
            for name in (f"{head}{n}{tail}" for n in numbers) if numbers else (first,):
                for owner, _, _ in renamer.targets(name):
                    if one := _fused_list(owner, name, converted):
                        found[owner.path].add(one)
    if not found:
        return {}
    for module in architecture.modules:  # a checkpoint may have those of either
        if module.same_as is not None and not found[module.same_as]:
            found[module.same_as] = found[module.path]
    own = [module for module in architecture.modules if module.same_as is None]
    return {module.number: _the_only(module, found[module.path]) for module in own}


def _by_last_number(names: Iterable[str]) -> Iterator[tuple[str, list[int], str]]:
    """Names that differ in their last number alone: what precedes it, the numbers, what follows."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name in names:
        match = _LAST_NUMBER.match(name)
        if match is None:
            yield name, [], ""
        else:
            groups[match[1] or "", match[3]].append(int(match[2]))
    for (head, tail), numbers in groups.items():
        yield head, sorted(numbers), tail


class _Renamer:
    """Tells for a tensor's name in a checkpoint into which experts transformers would load it."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._base = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        self._by_path = {module.path: module for module in architecture.modules}
        # Modules that share a list of experts on disk; transformers names one of them.
        self._together: dict[str, list[ExpertModule]] = defaultdict(list)
        for module in architecture.modules:
            if module.saved is not None:
                self._together[module.saved.prefix].append(module)

    def targets(self, name: str) -> list[tuple[ExpertModule, str, bool]]:
        """The modules with experts in this tensor, what follows their path, and whether it is converted."""
        renamed, converted = name, False
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                converted = True
                break
        # As transformers does: a head's checkpoint loads into the bare model, and the other way round.
        for candidate in (renamed, renamed.removeprefix(self._base), self._base + renamed, name):
            for path, module in self._owners(candidate):
                rest = candidate[len(path) + 1 :]
                others = self._together[module.saved.prefix] if module.saved is not None else [module]
                if converted and len(others) > 1:
                    return [(other, rest, True) for other in others]
                return [(module, rest, converted)]
        return []

    def _owners(self, name: str) -> Iterator[tuple[str, ExpertModule]]:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:end])
            if path in self._by_path:
                yield path, self._by_path[path]


def _per_expert(module: ExpertModule, prefix: str, tail: str) -> ExpertList:
    """A list with numbers, one of whose tensors ends so."""
    word = tail.split(".")[1] if "." in tail else ""
    saved = module.saved
    if saved is not None and not saved.fused and word in saved.words:
        return replace(saved, prefix=prefix)
    gate, up, down = next((words for words in _PER_EXPERT_WORDS if word in words), _PER_EXPERT_WORDS[0])
    words = (gate if module.gated else "", up, down)
    return ExpertList(prefix, False, words, 0, module.num_experts)


def _fused_list(module: ExpertModule, name: str, converted: bool) -> ExpertList | None:
    """The list to which a tensor without an expert's number belongs; None if it is none of experts."""
    saved = module.saved
    if saved is not None and saved.fused:
        for word in filter(None, saved.words):
            at = name.rfind(f".{word}")
            if at >= 0:
                return replace(saved, prefix=name[:at])
    words = _OWN_WORDS[module.gated]
    for word in () if converted else filter(None, words):
        at = name.rfind(f".{word}")
        if at >= 0:
            interleaved = module.interleaved if module.gated else None
            return ExpertList(name[:at], True, words, 0, module.num_experts, interleaved)
    return None


def _the_only(module: ExpertModule, lists: set[ExpertList]) -> ExpertList:
    if not lists:
        raise ValueError(f"the checkpoint has no tensors for the experts at {module.path}")
    if len(lists) > 1:
        first, second, *_ = sorted(lists, key=repr)
        raise ValueError(
            f"the checkpoint has the experts at {module.path} twice: {first.prefix} with {first.words} and "
            f"{second.prefix} with {second.words}"
        )
    (only,) = lists
    return only
