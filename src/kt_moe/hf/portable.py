"""Adapter tensors of experts between memory and disk, in the form that plain transformers and PEFT read.

In memory each projection has A [E, r, in] and B [E, out, r]. On disk there are two forms:

- per expert: `{experts}.{e}.gate_proj.lora_A.weight` [r, in], by the names of the family's checkpoints.
  PEFT's table of conversions (`peft.utils.transformers_weight_conversion`) fuses them on loading, for the
  families that it has, where down has LoRA and gate and up have it both or neither. Servers read this form.
- fused: the LoRA of the parameters `gate_up_proj` [E, 2I, H] (without a gate `up_proj` [E, I, H]) and
  `down_proj` [E, H, I] as PEFT's
  `target_parameters` has it: A [E * r, in], expert-major, and B [out, r * E], expert fastest. That of gate_up
  has the ranks of gate and up one after the other, and a B that is zero where they would mix. The last of the
  parameters is at `{experts}`, the one before at `{experts}.base_layer`. Of parameters [E, in, out] that do
  not tell PEFT so (Llama 4's), A and B are in each other's roles: the LoRA of the transposed matrices.

A family outside that table gets the fused form. Both forms of every family are read, and SGLang's form of
shared outer matrices: `{experts}.gate_proj.lora_A.weight` [E, r, in], or [1, r, in] of one for all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.transformers_weight_conversion import (
    _MODEL_TO_CONVERSION_PATTERN,
    _MOE_FUSED_TARGETS,
    _MOE_TARGET_MODULE_MAPPING,
)
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from kt_moe.architectures import ExpertModule
from kt_moe.hf.targets import Pair

PREFIX = "base_model.model."
Matrices = dict[str, tuple[Tensor, Tensor]]  # A [E, r, in] and B [E, out, r] by projection


def renamed_by_peft(model: Any) -> set[str]:
    """Last parts of names that PEFT takes for routed experts or routers in this model, whatever has them."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    family = _MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return set(_MOE_TARGET_MODULE_MAPPING.get(family, ())) if family in _MOE_FUSED_TARGETS else set()


def is_per_expert(model: Any, module: ExpertModule, pairs: Mapping[str, Pair]) -> bool:
    """Whether LoRA on these projections is written per expert: whether PEFT converts it then.

    PEFT makes one tensor of gate and up, which has one scaling, of as many experts as have keys.
    """
    scalings = {pair.scaling for projection, pair in pairs.items() if projection != "down"}
    both_or_neither = ("gate" in pairs) == ("up" in pairs)
    converted = bool(renamed_by_peft(model)) and not module.padding
    return converted and "down" in pairs and both_or_neither and len(scalings) < 2


def path_to_save(renamed: Callable[[str], str], path: str, module: ExpertModule) -> str:
    """What an adapter has to call experts at a path, so that PEFT finds them again.

    On loading, PEFT renames the keys of LoRA as transformers renames those of the model's checkpoints, for
    some families the module's own path as well, to one that there is not. Those need the checkpoint's path.

    Args:
        renamed: see `renaming_of`.
    """
    prefix = PREFIX if path.startswith(PREFIX) else ""
    own = path.removeprefix(prefix)
    return prefix + next((name for name in (own, module.disk_path(own)) if renamed(name) == own), own)


def renaming_of(model: Any) -> Callable[[str], str]:
    """What PEFT makes of a path in the keys of LoRA on loading; paths without its prefix."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if get_checkpoint_conversion_mapping(getattr(base.config, "model_type", None)) is None:
        return str
    renamings = [one for one in get_model_conversion_mapping(base) if isinstance(one, WeightRenaming)]
    tail = ".lora_A.weight"
    return lambda path: str(rename_source_key(path + tail, renamings, [])[0]).removesuffix(tail)


@dataclass(frozen=True)
class ExpertsForm:
    """What the tensors of one layer's experts look like.

    Args:
        path: of the experts in the model, as in the keys of the state dict.
        module: sizes, names on disk, and whether rows of gate and up alternate in gate_up_proj.
    """

    path: str
    module: ExpertModule

    @property
    def num_experts(self) -> int:
        return self.module.num_experts

    def size(self, projection: str) -> tuple[int, int]:
        """Input and output dimension of a projection or fused parameter."""
        hidden, intermediate = self.module.hidden_size, self.module.intermediate_size
        if projection in ("down", "down_proj"):
            return intermediate, hidden
        return hidden, intermediate * (2 if projection == "gate_up_proj" else 1)

    def split(self, matrices: Matrices) -> dict[str, Tensor]:
        """Per-expert tensors, keys without ".weight"."""
        names = self.module.words
        place = self.module.disk_path(self.path)
        first = self.module.keyed.first_expert if self.module.keyed is not None else 0
        return {
            f"{place}.{e}.{names[projection]}.lora_{matrix}": one.clone()
            for projection, pair in matrices.items()
            for matrix, tensor in zip("AB", pair, strict=True)
            for e, one in enumerate(tensor, first)
        }

    def fuse(self, matrices: Matrices) -> dict[str, Tensor]:
        """Fused tensors, keys without ".weight"."""
        parts = {name: [p for p in found if p in matrices] for name, found in self.module.fused.items()}
        places = self.places([name for name, found in parts.items() if found])
        result = {}
        for name, place in places.items():
            a = torch.cat([matrices[p][0] for p in parts[name]], dim=1)
            b = a.new_zeros(self.num_experts, self.size(name)[1], a.shape[1])
            column = 0
            for projection in parts[name]:
                own = matrices[projection][1]
                self.rows(b, projection)[:, :, column : column + own.shape[2]] = own
                column += own.shape[2]
            if self.module.swapped:
                a, b = b.mT, a.mT
            if name != "down_proj" and (padding := self.module.padding):
                a, b = (torch.cat([one, one.new_zeros(padding, *one.shape[1:])]) for one in (a, b))
            result[f"{place}.lora_A"] = a.flatten(0, 1)
            result[f"{place}.lora_B"] = b.permute(1, 2, 0).flatten(1, 2)
        return result

    def places(self, fused: list[str]) -> dict[str, str]:
        """Where PEFT nests the LoRA of each of these parameters."""
        return {n: self.path + ".base_layer" * (len(fused) - 1 - i) for i, n in enumerate(fused)}

    def rows(self, gate_up: Tensor, projection: str) -> Tensor:
        """A view of the rows [E, I, r] of gate or up in B [E, 2I, r]; of one with its own tensor all."""
        if projection == "down" or not self.module.gated:
            return gate_up
        odd, half = projection == "up", self.module.intermediate_size
        if self.module.interleaved:
            return gate_up[:, odd::2]
        return gate_up[:, half:] if odd else gate_up[:, :half]

    def take(
        self,
        state_dict: dict[str, Tensor],
        fused: Mapping[str, set[int]],
        own: Mapping[str, int],
        renamed: Callable[[str], str],
        written: Mapping[str, float],
    ) -> Matrices:
        """Take the tensors of these experts, in either form, out of `state_dict`.

        Args:
            state_dict: keys end in ".lora_A.weight" and so on, with or without PEFT's prefix.
            fused: ranks that each fused tensor with LoRA may have, by the config and by what is in memory.
            own: rank in memory of each projection with LoRA.
            renamed: what the paths that checkpoints have were renamed to, where they were.
            written: what the B of each projection was multiplied by when fused tensors were written.

        Raises:
            ValueError: tensors of another rank or number of experts, or only some of them; names them.
        """
        matrices: Matrices = {}
        on_disk = self.module.disk_path(self.path)
        stored = dict.fromkeys((on_disk, renamed(on_disk)))
        for name, place in self.places([n for n in self.module.fused if n in fused]).items():
            places = [place, *(one + place.removeprefix(self.path) for one in stored)]
            if name == "gate_up_proj":  # where PEFT's conversion puts it, down or not
                places += [f"{one}.base_layer" for one in (self.path, *stored)]
            for there in dict.fromkeys(places):
                if (pair := _pop_pair(state_dict, there)) is not None:
                    found = self._unfuse(name, there, *pair, ranks=fused[name], own=own)
                    matrices |= {
                        p: (a, b if written[p] in (0, 1) else b / written[p]) for p, (a, b) in found.items()
                    }
                    break
        for projection, word in self.module.words.items():
            if (shared := self._pop_shared(state_dict, stored, word)) is not None:
                matrices[projection] = shared
            elif pairs := self._pop_experts(state_dict, stored, word):
                a, b = zip(*pairs, strict=True)
                matrices[projection] = torch.stack(a), torch.stack(b)
        self._check_complete(matrices, own)
        return matrices

    def check_keys(self, keys: Iterable[str], own: Iterable[str]) -> None:
        """ValueError where an adapter's keys are of some of a layer's projections with LoRA, not of all.

        PEFT makes one tensor of those of gate and up, and fails where there is one of them only.
        """
        first = 0 if self.module.keyed is None else self.module.keyed.first_expert
        place = f"{self.module.disk_path(self.path)}.{first}"
        known = {key.removeprefix(PREFIX) for key in keys}
        found = {p for p, word in self.module.words.items() if f"{place}.{word}.lora_A.weight" in known}
        self._refuse_missing(set(own) - found, found)

    def _check_complete(self, matrices: Matrices, own: Mapping[str, int]) -> None:
        """The same of tensors; of fused ones gate may be without up, and up without gate."""
        parts = [set(own) & set(parts) for parts in self.module.fused.values()]
        missing = {p for one in parts if not one & matrices.keys() for p in one}
        self._refuse_missing(missing, matrices.keys())

    def _refuse_missing(self, missing: Collection[str], found: Collection[str]) -> None:
        if missing and found:
            named = [", ".join(self.module.words[p] for p in sorted(some)) for some in (missing, found)]
            raise ValueError(
                f"the adapter has no LoRA of {named[0]} of the experts at {self.path}, which its config "
                f"targets, only of {named[1]}"
            )

    def _pop_shared(
        self, state_dict: dict[str, Tensor], stored: Iterable[str], name: str
    ) -> tuple[Tensor, Tensor] | None:
        """A projection in the form of SGLang, a tensor [E, ...] or [1, ...] for all experts."""
        for place in dict.fromkeys((self.path, *stored)):
            found = _pop_pair(state_dict, f"{place}.{name}", dim=3)
            if found is not None:
                wanted = (1, self.num_experts)
                if any(len(one) not in wanted for one in found):
                    raise ValueError(
                        f"the adapter's {name} at {place} is of {[len(one) for one in found]} experts, "
                        f"wanted {self.num_experts}, or 1 that all share"
                    )
                a, b = (one.expand(self.num_experts, -1, -1).contiguous() for one in found)
                return a, b
        return None

    def _pop_experts(
        self, state_dict: dict[str, Tensor], stored: Iterable[str], name: str
    ) -> list[tuple[Tensor, Tensor]]:
        keyed = self.module.keyed
        numbers = {self.path: 0}  # of the first expert; on disk another list may come before
        numbers |= {} if keyed is None else dict.fromkeys(stored, keyed.first_expert)
        for place, first in numbers.items():
            keys = [f"{place}.{e}.{name}" for e in range(first, first + self.num_experts)]
            found = [pair for key in keys if (pair := _pop_pair(state_dict, key)) is not None]
            if found and len(found) != self.num_experts:
                raise ValueError(
                    f"the adapter has {name} of {len(found)} experts at {place}, wanted {self.num_experts}"
                )
            if len({(a.shape, b.shape) for a, b in found}) > 1:
                raise ValueError(
                    f"the adapter's {name} at {place} has different shapes for different experts"
                )
            if found:
                return found
        return []

    def _unfuse(
        self, name: str, place: str, a: Tensor, b: Tensor, *, ranks: set[int], own: Mapping[str, int]
    ) -> Matrices:
        into, out = self.size(name)
        experts = self.num_experts + (0 if name == "down_proj" else self.module.padding)
        if ranks == {len(a) / self.num_experts}:  # made by PEFT of keys of experts, which name no padding
            experts = self.num_experts
        rank = len(a) // experts
        total = rank * experts
        # PEFT before 0.19 took inputs for outputs everywhere
        may_be_swapped = self.module.swapped or into != out
        if may_be_swapped and (a.shape, b.shape) == ((total, out), (into, total)):
            a, b = b.view(into, -1, experts).permute(2, 1, 0), a.view(experts, -1, out).mT
            a, b = a.reshape(-1, into), b.permute(1, 2, 0).reshape(out, -1)
        if rank not in ranks or a.shape != (total, into) or b.shape != (out, total):
            shapes = [(r * experts, into, out) for r in sorted(ranks)]
            raise ValueError(
                f"the adapter's {name} at {place} has another rank or number of experts than its config and "
                f"the model: A {list(a.shape)} and B {list(b.shape)}, wanted "
                f"{' or '.join(f'A {[n, i]} and B {[o, n]}' for n, i, o in shapes)}"
            )
        a = a.view(experts, rank, into)[: self.num_experts]
        b = b.view(out, rank, experts).permute(2, 0, 1)[: self.num_experts]
        if name != "gate_up_proj":
            (projection,) = self.module.fused[name]
            return {projection: (a.contiguous(), b.contiguous())}
        gate, up = self.rows(b, "gate"), self.rows(b, "up")
        cut = _first_of_up(gate, up, own)
        if cut is None:  # trained fused: gate and up share one A, and each gets its own
            pairs = {"gate": (a, gate), "up": (a.clone(), up)}
        else:
            pairs = {"gate": (a[:, :cut], gate[..., :cut]), "up": (a[:, cut:], up[..., cut:])}
        pairs = {p: (x.contiguous(), y.contiguous()) for p, (x, y) in pairs.items() if x.shape[1]}
        for projection in pairs.keys() - own.keys():
            raise ValueError(f"the adapter's {name} at {place} has LoRA on {projection}, the model has none")
        return pairs


def _first_of_up(gate: Tensor, up: Tensor, own: Mapping[str, int]) -> int | None:
    """Where in the rank the columns of up begin, if those of gate are before them; None: they mix.

    Zeros in B leave a choice: what is in memory already, or half.
    """
    of_gate, of_up = (torch.nonzero(rows.any(dim=0).any(dim=0)).flatten().tolist() for rows in (gate, up))
    rank = gate.shape[2]
    first, last = (max(of_gate) + 1 if of_gate else 0), (min(of_up) if of_up else rank)
    if first > last:
        return None
    of_own = own.get("gate", 0)
    cuts = [of_own] if of_own + own.get("up", 0) == rank else []
    cuts += [rank // 2] if rank % 2 == 0 else []
    cuts += [first] if of_gate or of_up else []
    return next((cut for cut in cuts if first <= cut <= last), None)


def expert_major(state_dict: dict[str, Tensor], forms: list[ExpertsForm]) -> dict[str, Tensor]:
    """The same tensors with fused B's that had their columns by expert first, as Unsloth writes them."""
    result = dict(state_dict)
    for form in forms:
        for place in (form.path, f"{form.path}.base_layer"):
            for key in (f"{place}.lora_B.weight", f"{PREFIX}{place}.lora_B.weight"):
                b = result.get(key)
                if b is not None and b.shape[1] % form.num_experts == 0:
                    result[key] = b.view(len(b), form.num_experts, -1).mT.reshape(b.shape)
    return result


def _pop_pair(state_dict: dict[str, Tensor], place: str, *, dim: int = 2) -> tuple[Tensor, Tensor] | None:
    for prefix in ("", PREFIX):
        keys = [f"{prefix}{place}.lora_{matrix}.weight" for matrix in "AB"]
        found = [state_dict.pop(key) for key in keys if key in state_dict]
        if len(found) == 1:
            raise ValueError(f"the adapter has one of {keys}, wanted both")
        if found:
            for key, tensor in zip(keys, found, strict=True):
                if tensor.dim() != dim:
                    raise ValueError(
                        f"the adapter's {key} has shape {list(tensor.shape)}, wanted {dim} dimensions"
                    )
            return found[0], found[1]
    return None
