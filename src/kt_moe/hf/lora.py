"""LoRA on kt_moe experts as a PEFT tuner layer.

The adapter of a layer is one tensor a projection for all experts, [E, r, in] and [E, out, r]; `portable` has
its form on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from kt_moe.architectures import Architecture, architecture_of, fused_parameters
from kt_moe.experts import PROJECTIONS
from kt_moe.functional import Lora, of_all
from kt_moe.hf.experts import (
    computed,
    dims_of,
    division_of,
    experts_of,
    is_gated_module,
    is_kt_experts,
)
from kt_moe.hf.initial import joined, starting_pair, starts_from_weights
from kt_moe.hf.portable import ExpertsForm, Matrices
from kt_moe.hf.targets import ExpertPairs, Pair
from kt_moe.layer import outer_sizes
from kt_moe.lora_device import LoraParameters, LoraPlace

INITIAL_VALUES = (True, False, "gaussian", "orthogonal")  # of init_lora_weights that leave the base as it is
_INPUTS = "looks at the inputs of every projection, of which those of down_proj are not kept"
_NO_INITIAL_VALUES = {
    "loftq": "corrects how this process quantised the weights, while files are for the checkpoint's own",
    "lora_ga": "looks at gradients of the experts' weights, which are frozen and have none",
    "corda": _INPUTS,
    "eva": _INPUTS,
}
_BASE = "__base__"  # PEFT's name, in adapter_names, for no adapter
NO_MERGE = (
    "kt_moe experts cannot take an adapter in: they are frozen in packed form. Save the adapter and use "
    "kt_moe.merge_checkpoint(base_dir, adapter_dir, output_dir), which writes a merged checkpoint"
)


class KtLoraExperts(nn.Module, LoraLayer):  # type: ignore[misc]
    """Experts with LoRA: PEFT's tuner layer for `KtExperts` and for experts computed by "kt_moe".

    Parameters, fp32: `lora_A.{adapter}.{gate,up,down}` [E, r, in] and `lora_B.{adapter}.{gate,up,down}`
    [E, out, r]; of adapters in `shared_outer`, one A of gate and of up, and one B of down, [1, ...]. `place`
    says whether they go where the model goes. Adapters that start with a part of the base weights (`initial`)
    also have `lora_fixed_A` and `lora_fixed_B` of the same shapes, which are not trained; their ranks in `r`
    and `pairs` are of both together. Where experts are divided over ranks, E counts this rank's own.
    """

    other_param_names = (*LoraLayer.other_param_names, "lora_fixed_A", "lora_fixed_B")

    # What LoraLayer has; the dictionaries go from adapter name to parameters, dropout module or number.
    base_layer: Any
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Any
    lora_A: Any  # noqa: N815 (PEFT's name)
    lora_B: Any  # noqa: N815
    lora_dropout: Any
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        pairs: ExpertPairs,
        architecture: Architecture,
        place: LoraPlace,
        path: str = "",
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.architecture, self.place = architecture, place
        self.pairs: dict[str, ExpertPairs] = {}
        self.shared_outer: set[str] = set()
        self.lora_fixed_A, self.lora_fixed_B = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter = adapter_name
        self.add_pairs(adapter_name, config, pairs, path)

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """See `ExpertModule.fused`."""
        return fused_parameters(is_gated_module(self.base_layer))

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        _, hidden, _ = dims_of(module)
        return hidden, hidden

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: Any, target_name: str = "", **kwargs: Any
    ) -> None:
        """Add a further adapter, with the pairs that the tuner found for `target_name`; PEFT calls this."""
        self.add_pairs(adapter_name, config, config.kt_moe_targets.experts[target_name], target_name)

    def add_pairs(self, adapter_name: str, config: LoraConfig, pairs: ExpertPairs, path: str) -> None:
        """Add an adapter; `path` is the layer's, for messages.

        Raises:
            ValueError: an option of LoraConfig that does not work on experts, weights that no LoRA can start
                with; names it.
        """
        refuse_options(config, pairs)
        if getattr(config, "shared_outer", False) and division_of(self.base_layer) is not None:
            raise ValueError('SharedOuterLoraConfig does not work with expert_parallel="global"')
        self.scaling[adapter_name] = _first_scaling(pairs.pairs)
        fixed = starts_from_weights(config.init_lora_weights)
        self._set_pairs(adapter_name, _doubled(pairs) if fixed else pairs)
        if getattr(config, "shared_outer", False):
            self.shared_outer.add(adapter_name)
        self.use_rslora[adapter_name] = self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        self.lora_A[adapter_name] = self._no_parameters()
        self.lora_B[adapter_name] = self._no_parameters()
        for projection, pair in pairs.pairs.items():
            self._new_pair(adapter_name, projection, pair.rank)
        if fixed:
            self._start(adapter_name, pairs.pairs, str(config.init_lora_weights), path)
        else:
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _no_parameters(self) -> LoraParameters:
        return LoraParameters(self.place, division_of(self.base_layer))

    @property
    def _own_experts(self) -> int:
        """How many experts this process has."""
        division = division_of(self.base_layer)
        return dims_of(self.base_layer)[0] if division is None else len(division.part)

    def _set_pairs(self, adapter_name: str, pairs: ExpertPairs) -> None:
        """Note what an adapter consists of; PEFT's one rank and alpha of it are the largest rank's."""
        self.pairs[adapter_name] = pairs
        self.r[adapter_name] = max(pair.rank for pair in pairs.pairs.values())
        first = next(iter(pairs.pairs.values()))
        self.lora_alpha[adapter_name] = first.scaling * self.r[adapter_name]

    def _new_pair(self, adapter_name: str, projection: str, rank: int) -> None:
        """Parameters without values; PEFT makes new modules on the meta device where it is to load them."""
        _, into, out = dims_of(self.base_layer)
        num_experts = self._own_experts
        if projection == "down":
            into, out = out, into
        sizes = (num_experts, num_experts)
        if adapter_name in self.shared_outer:
            sizes = outer_sizes(num_experts, projection)
        shapes = (sizes[0], rank, into), (sizes[1], out, rank)
        for matrices, shape in zip((self.lora_A, self.lora_B), shapes, strict=True):
            old = matrices[adapter_name].get(projection)
            device, trained = (None, True) if old is None else (old.device, old.requires_grad)
            new = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device), requires_grad=trained)
            matrices[adapter_name][projection] = new
            self.place.numbers += new.numel() - (0 if old is None else old.numel())

    def fit(self, adapter_name: str, ranks: dict[str, int]) -> None:
        """Give an adapter the projections and ranks of tensors that are about to be loaded into it.

        Only gate and up of a fused tensor can have others than the config says: how they share its rank is
        in the tensor.
        """
        pairs = dict(self.pairs[adapter_name].pairs)
        for projection in self.fused.get("gate_up_proj", ()):
            if projection not in pairs or not {"gate", "up"} & ranks.keys():
                continue
            if projection not in ranks:
                del pairs[projection]
                for matrices in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
                    self.place.numbers -= matrices.pop(projection).numel()
            elif ranks[projection] != pairs[projection].rank:
                if adapter_name in self.lora_fixed_A:
                    raise ValueError(
                        f"the adapter's rank of {projection}_proj is {ranks[projection]}, wanted "
                        f"{pairs[projection].rank}, as the model's adapter {adapter_name!r} has it"
                    )
                pairs[projection] = Pair(ranks[projection], pairs[projection].scaling)
                self._new_pair(adapter_name, projection, ranks[projection])
        self._set_pairs(adapter_name, ExpertPairs(pairs, self.pairs[adapter_name].fused))

    def remember(self, adapter_name: str) -> Callable[[], None]:
        """A function that takes back what `fit` changes from now on; values are not copied."""
        pairs = self.pairs[adapter_name]
        kept = [(m[adapter_name], dict(m[adapter_name].items())) for m in (self.lora_A, self.lora_B)]

        def take_back() -> None:
            for parameters, old in kept:
                self.place.numbers += sum(p.numel() for p in old.values())
                self.place.numbers -= sum(p.numel() for p in parameters.values())
                parameters.clear()
                parameters.update(old)
            self._set_pairs(adapter_name, pairs)

        return take_back

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.place.numbers -= _numel(adapter_name, self.lora_A, self.lora_B)
        self.place.fixed -= _numel(adapter_name, self.lora_fixed_A, self.lora_fixed_B)
        super().delete_adapter(adapter_name)
        self.pairs.pop(adapter_name, None)
        self.shared_outer.discard(adapter_name)

    def matrices(self, adapter_name: str, projection: str) -> tuple[Tensor, Tensor]:
        """A [E, r, in] and B [E, out, r] of a projection; views of those that are shared."""
        experts = self._own_experts
        a, b = self._pair(adapter_name, projection)
        return of_all(a, experts), of_all(b, experts)

    def _pair(self, adapter_name: str, projection: str) -> tuple[Tensor, Tensor]:
        """The same, with those that are shared as they are."""
        a, b = self.lora_A[adapter_name][projection], self.lora_B[adapter_name][projection]
        if adapter_name not in self.lora_fixed_A:
            return a, b
        fixed: Any = self.lora_fixed_A[adapter_name], self.lora_fixed_B[adapter_name]
        return joined(a, fixed[0][projection], 1), joined(b, fixed[1][projection], 2)

    def held(self, adapter_name: str, projection: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Those of a projection as the parameters have them, of A [E, r, in] and B [E, out, r].

        Raises:
            ValueError: the adapter shares one of them, which is not the same for all experts; names it.
        """
        if adapter_name not in self.shared_outer:
            return pair
        one = int(projection == "down")
        if bool((pair[one] != pair[one][:1]).any()):
            raise ValueError(
                f"the adapter's {'AB'[one]} of {projection}_proj differs between experts, the model's "
                f"adapter {adapter_name!r} shares it (SharedOuterLoraConfig)"
            )
        return (pair[0], pair[1][:1].clone()) if one else (pair[0][:1].clone(), pair[1])

    @torch.no_grad()
    def _start(self, adapter_name: str, pairs: Mapping[str, Pair], how: str, path: str) -> None:
        """Let an adapter start with a part of the base weights, which a fixed one takes away."""
        weights: dict[str, Any] = dict.fromkeys(PROJECTIONS, ())
        if self._own_experts:
            weights = dict(zip(PROJECTIONS, experts_of(self.base_layer).dequantize(), strict=True))
        division = division_of(self.base_layer)
        first = 0 if division is None else division.part.start
        fixed_a, fixed_b = self._no_parameters(), self._no_parameters()
        for projection, pair in pairs.items():
            a, b = self.lora_A[adapter_name][projection], self.lora_B[adapter_name][projection]
            seed = int(torch.randint(2**62, (), device="cpu"))
            for e, weight in enumerate(weights[projection]):
                name = f"{projection}_proj of expert {first + e} at {path}"
                # What "pissa_niter_N" draws for an expert is the same on whatever rank it is.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed + first + e)
                    a[e], b[e] = starting_pair(weight, pair.rank, pair.scaling, how, name)
            fixed_a[projection] = nn.Parameter(a.detach().clone(), requires_grad=False)
            fixed_b[projection] = nn.Parameter(-b.detach(), requires_grad=False)
            self.place.fixed += a.numel() + b.numel()
        self.lora_fixed_A[adapter_name], self.lora_fixed_B[adapter_name] = fixed_a, fixed_b

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialise as PEFT does each expert's pair, by one of `INITIAL_VALUES`."""
        if init_lora_weights == "orthogonal":
            for projection, own in self.lora_A[adapter_name].items():
                with self._whole(own) as a, self._whole(self.lora_B[adapter_name][projection]) as b:
                    _orthogonal(a, b)
            return
        for own in self.lora_A[adapter_name].values():
            with self._whole(own) as a:
                if init_lora_weights == "gaussian":
                    a.normal_(std=1 / a.shape[1])
                else:
                    a.uniform_(-(a.shape[2] ** -0.5), a.shape[2] ** -0.5)  # Kaiming with a = sqrt(5)
        for own in self.lora_B[adapter_name].values():
            with self._whole(own) as b:
                if init_lora_weights:
                    b.zero_()
                else:
                    b.uniform_(-(b.shape[2] ** -0.5), b.shape[2] ** -0.5)

    @contextmanager
    def _whole(self, own: Tensor) -> Iterator[Tensor]:
        """A parameter to be filled; of all experts, so that all ranks draw what one process draws."""
        division = division_of(self.base_layer)
        if division is None:
            yield own
        else:
            whole = own.new_empty(division.num_experts, *own.shape[1:])
            yield whole
            own.copy_(division.own(whole))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapter_names: Sequence[str] | None = None,
    ) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]; see `computed`.

        Args:
            adapter_names: one for each sample of the batch, whose tokens follow one another; "__base__" for
                none. None: the active adapters.
        """
        inputs = hidden_states, top_k_index, top_k_weights
        if adapter_names is not None and not self.disable_adapters:
            if division_of(self.base_layer) is not None:
                raise ValueError('adapter_names does not work with expert_parallel="global"')
            return self._mixed(adapter_names, *inputs)
        return self._adapted([] if self.disable_adapters else self.active_adapters, *inputs)

    def _adapted(self, adapters: Sequence[str], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        active = [name for name in adapters if name in self.lora_A]
        if not active:
            return self.base_layer(x, ids, weights)  # type: ignore[no-any-return]
        lora, tensors = self._combined(active)
        return computed(self.base_layer, x, ids, weights, lora, **tensors)

    def _mixed(self, adapter_names: Sequence[str], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, samples = len(x), len(adapter_names)
        if not samples or tokens % samples:
            raise ValueError(
                f"adapter_names has {samples} names for {tokens} tokens, wanted one for each sample"
            )
        out = torch.empty_like(x)
        for name in dict.fromkeys(adapter_names):
            chosen = torch.tensor([n == name for n in adapter_names], device=out.device)
            rows = chosen.repeat_interleave(tokens // samples)
            adapters = [] if name == _BASE else [name]
            out[rows] = self._adapted(adapters, x[rows], ids[rows], weights[rows])
        return out

    def _combined(self, active: list[str]) -> tuple[Lora, dict[str, Tensor]]:
        """One LoRA that is the sum of the active adapters: their ranks side by side."""
        dropouts = {self._dropout(name) for name in active}
        if len(dropouts) > 1:
            raise ValueError(f"active adapters {active} have different lora_dropout {sorted(dropouts)}")
        dropout = dropouts.pop()
        tensors: dict[str, Tensor] = {}
        if len(active) == 1:
            (name,) = active
            for projection in self.lora_A[name]:
                pair = self._pair(name, projection)
                tensors[f"{projection}_lora_a"], tensors[f"{projection}_lora_b"] = pair
            scalings = [self.scaling_of(name, p) if p in self.lora_A[name] else 1.0 for p in PROJECTIONS]
            return Lora(scalings, dropout), tensors
        for projection in PROJECTIONS:
            names = [name for name in active if projection in self.lora_A[name]]
            if names:
                pairs = [self.matrices(name, projection) for name in names]
                a = [pair[0] for pair in pairs]
                b = [
                    pair[1] * self.scaling_of(name, projection)
                    for name, pair in zip(names, pairs, strict=True)
                ]
                # adapters may lie on different devices, and have different dtypes
                tensors[f"{projection}_lora_a"] = torch.cat([t.to(a[0]) for t in a], dim=1)
                tensors[f"{projection}_lora_b"] = torch.cat([t.to(b[0]) for t in b], dim=2)
        return Lora(1.0, dropout), tensors

    def scaling_of(self, adapter_name: str, projection: str) -> float:
        """That of a projection: the adapter's, which PEFT may change, times what it has above the first."""
        pairs = self.pairs[adapter_name].pairs
        first, own = _first_scaling(pairs), pairs[projection].scaling
        scaling = float(self.scaling[adapter_name])
        return scaling if own == first or not first else scaling * own / first

    def _dropout(self, adapter_name: str) -> float:
        return float(getattr(self.lora_dropout[adapter_name], "p", 0.0)) if self.training else 0.0

    def form(self, path: str) -> ExpertsForm:
        """The form on disk of this layer's tensors; `path` is the layer's."""
        module = getattr(self.base_layer, "expert_module", None)
        return ExpertsForm(path, module or self.architecture.module_at(path))

    def fused_ranks(self, adapter_name: str) -> dict[str, int]:
        """Rank of an adapter's LoRA of each fused parameter as it is written."""
        own = self.pairs[adapter_name].pairs
        ranks = {name: sum(own[p].rank for p in parts if p in own) for name, parts in self.fused.items()}
        return {name: rank for name, rank in ranks.items() if rank}

    def fused_scaling(self, adapter_name: str, fused: str) -> float:
        """Scaling of LoRA of a fused parameter as it is written: for gate_up gate's, if that is not 0."""
        own = self.pairs[adapter_name].pairs
        found = [own[p].scaling for p in self.fused[fused] if p in own]
        return next((scaling for scaling in found if scaling), found[0])

    def tensors(
        self, adapter_name: str, path: str, matrices: Matrices, per_expert: bool
    ) -> dict[str, Tensor]:
        """An adapter's tensors in the form on disk, keys without ".weight"; see `is_per_expert`."""
        form = self.form(path)
        if per_expert:
            return form.split(matrices)
        factors = self.fused_factors(adapter_name)
        return form.fuse({p: (a, b if factors[p] == 1 else b * factors[p]) for p, (a, b) in matrices.items()})

    def fused_factors(self, adapter_name: str) -> dict[str, float]:
        """What each projection's B is multiplied by in fused tensors, which have one scaling."""
        factors = {}
        for fused, parts in self.fused.items():
            for projection in self.pairs[adapter_name].pairs.keys() & parts:
                own = self.pairs[adapter_name].pairs[projection].scaling
                written = self.fused_scaling(adapter_name, fused)
                factors[projection] = 1.0 if own == written else own / written
        return factors

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """NotImplementedError: the experts are frozen in packed form."""
        raise NotImplementedError(NO_MERGE)

    def unmerge(self) -> None:
        """NotImplementedError: nothing was merged."""
        raise NotImplementedError(NO_MERGE)


def _numel(adapter_name: str, *matrices: nn.ModuleDict) -> int:
    """Numbers in an adapter's parameters."""
    own = (m[adapter_name] for m in matrices if adapter_name in m)
    return sum(p.numel() for parameters in own for p in parameters.parameters())


def _orthogonal(a: Tensor, b: Tensor) -> None:
    """A [E, r, in] and B [E, out, r] whose product is zero, as neither is: each has half of a random basis.

    PEFT's `orthogonal_init` (https://datta0.github.io/posts/rethink-lora-init/).
    """
    rank = a.shape[1]
    basis = torch.linalg.qr(a.new_empty(min(len(a), len(b)), rank, rank).normal_()).Q
    into = a.new_empty(len(a), a.shape[2], rank // 2).normal_()
    out = b.new_empty(len(b), b.shape[1], rank // 2).normal_()
    a.copy_((into @ basis[:, 0::2]).mT / 10)
    b.copy_(out @ basis[:, 1::2] / 10)


def _doubled(pairs: ExpertPairs) -> ExpertPairs:
    """The same with twice the ranks."""
    return ExpertPairs(
        {projection: Pair(2 * pair.rank, pair.scaling) for projection, pair in pairs.pairs.items()},
        {name: 2 * rank for name, rank in pairs.fused.items()},
    )


def _first_scaling(pairs: Mapping[str, Pair]) -> float:
    """That of a layer's first projection whose LoRA has an effect; 0 if none has."""
    return next((pair.scaling for pair in pairs.values() if pair.scaling), 0.0)


def experts_architecture(model: nn.Module) -> Architecture | None:
    """The architecture of a model with kt_moe experts; None for other models."""
    experts = next((module for module in model.modules() if is_kt_experts(module)), None)
    if experts is None:
        return None
    row = getattr(experts, "architecture", None)
    return row if isinstance(row, Architecture) else architecture_of(model)


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, KtLoraExperts]]:
    """The layers of experts that have this adapter, by path."""
    for path, module in model.named_modules():
        if isinstance(module, KtLoraExperts) and adapter_name in module.pairs:
            yield path.removeprefix("_fsdp_wrapped_module."), module


def refuse_options(config: LoraConfig, pairs: ExpertPairs) -> None:
    """ValueError for an option of LoraConfig that does not work on experts, with these ranks; names it."""
    if config.use_dora:
        raise ValueError(
            "LoraConfig: use_dora does not work on kt_moe experts: it scales every row of W + s B A by its "
            "norm, for which each step would decode all experts"
        )
    variants = [
        f for f, field in config.__dataclass_fields__.items() if field.metadata.get("is_lora_variant")
    ]
    for option in (*variants, "lora_bias", "fan_in_fan_out"):
        if getattr(config, option, None):
            raise ValueError(f"LoraConfig: {option} does not work on kt_moe experts")
    initial = config.init_lora_weights
    if starts_from_weights(initial):
        if config.lora_dropout:
            raise ValueError(
                f"LoraConfig: init_lora_weights={initial!r} does not work with lora_dropout on kt_moe "
                "experts: it would drop a part of the base weights"
            )
        if getattr(config, "shared_outer", False):
            raise ValueError(f"SharedOuterLoraConfig does not work with init_lora_weights={initial!r}")
    elif not isinstance(initial, bool | str) or initial not in INITIAL_VALUES:
        reasons = (why for word, why in _NO_INITIAL_VALUES.items() if str(initial).lower().startswith(word))
        why = next(reasons, "is not known")
        raise ValueError(
            f"LoraConfig: init_lora_weights={initial!r} does not work on kt_moe experts: it {why}; wanted "
            f"one of {[*INITIAL_VALUES, 'pissa', 'pissa_niter_N (N below 1000)', 'olora']}"
        )
    odd = [f"{p}_proj has {pair.rank}" for p, pair in pairs.pairs.items() if pair.rank % 2]
    if config.init_lora_weights == "orthogonal" and odd:
        raise ValueError(f"LoraConfig: init_lora_weights='orthogonal' needs even ranks, {', '.join(odd)}")
