"""What an experts module of transformers computes, asked of the module itself.

transformers marks experts that others may compute with `use_experts_implementation`. The flags it leaves on
the module say how the weights are laid out, and `_apply_gate` what happens between the two products.
These are functions of numbers alone, so they are tried on a grid and compared with what the core computes.
Of a few classes without that mark it is known here how they are laid out (`UNMARKED`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kt_moe.activations import ACTIVATIONS

Gating = Callable[[Tensor | None, Tensor], Tensor]  # h of G and U; without a gate of None and U

_EXPERTS = re.compile(r"(?!Kt)(?!.*Shared).*Experts")  # as all such classes are called

# Known well enough to be named in a refusal.
_NAMED: dict[str, Gating] = {
    "ReLU": lambda g, u: functional.relu(u) if g is None else functional.relu(g) * u,
}


@dataclass(frozen=True)
class Layout:
    """How a module of experts has its parameters; the words are transformers'.

    Attributes:
        is_transposed: whether they are [E, in, out], not [E, out, in].
        is_concatenated: whether gate precedes up in gate_up_proj; else their rows alternate.
        has_gate, has_bias: whether there are such.
        marked: whether transformers says so.
    """

    is_transposed: bool = False
    is_concatenated: bool = True
    has_gate: bool = True
    has_bias: bool = False
    marked: bool = True


# Experts that transformers does not let others compute, by package and class; `hf.unmarked` has what the
# blocks around them do beside.
UNMARKED = {
    ("llama4", "Llama4TextExperts"): Layout(is_transposed=True, marked=False),
    ("longcat_flash", "LongcatFlashExperts"): Layout(marked=False),
}


@dataclass(frozen=True)
class Computation:
    """What a module computes, and how its parameters are laid out.

    Attributes:
        num_experts, hidden_size, intermediate_size: E, H, I by its parameters' shapes.
        gated: whether there is a gate.
        activation: as `kt_moe.Experts` takes it; "" where the core lacks something.
        lacks: what the core lacks, in words; empty if it can compute the module.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    activation: str
    lacks: tuple[str, ...] = ()


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of experts that transformers lets others compute, or one in `UNMARKED`."""
    return _layout(module) is not None


def layout_of(module: nn.Module) -> Layout:
    """The layout of a module that `is_experts`."""
    found = _layout(module)
    assert found is not None
    return found


def _layout(module: Any) -> Layout | None:
    if hasattr(module, "is_concatenated") and hasattr(module, "is_transposed"):
        flags = module.is_transposed, module.is_concatenated
        return Layout(*flags, getattr(module, "has_gate", True), getattr(module, "has_bias", False))
    return UNMARKED.get(transformers_class(module))


def transformers_class(module: nn.Module) -> tuple[str, str]:
    """Package and name of a class of transformers' models; two empty names for another."""
    parts = type(module).__module__.split(".")
    of_model = parts[:2] == ["transformers", "models"] and len(parts) == 4
    return (parts[2], type(module).__name__) if of_model else ("", "")


def unknown_experts(model: nn.Module) -> list[str]:
    """Names of the classes of routed experts of which is not known what they compute."""
    names = {type(module).__name__ for module in model.modules() if not is_experts(module)}
    return sorted(filter(is_experts_name, names))


def is_experts_name(name: str) -> bool:
    """Whether a class of this name is one of routed experts."""
    return _EXPERTS.fullmatch(name) is not None


def computation_of(module: Any) -> Computation:
    """Ask a module that `is_experts`, with parameters on any device, meta included."""
    lacks = []
    activation = next((name for name, known in ACTIVATIONS.items() if _computes(module, known)), "")
    if not activation:
        lacks.append(f"the activation {_describe(module)}")
    layout = layout_of(module)
    if not layout.has_gate and layout.is_transposed:  # their shapes do not tell which way rows run
        lacks.append("experts without a gate whose rows run along the outputs")
    if _overrides_forward(type(module)):
        lacks.append(f"what {type(module).__name__}.forward computes")
    known_names = {*parameter_names(module), *(bias_names(module) if layout.has_bias else ())}
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if others := sorted({name for name, _ in own} - known_names):
        lacks.append(f"the parameters {', '.join(others)}")
    return Computation(*sizes_of(module), is_gated(module), "" if lacks else activation, tuple(lacks))


def output_norm(module: Any) -> nn.Module | None:
    """What is applied to each expert's output before the routing weight; None where nothing is."""
    found: nn.Module | None = getattr(module, "post_expert_norm", None)
    return found


def is_gated(module: Any) -> bool:
    """Whether a module that `is_experts` has a gate."""
    return layout_of(module).has_gate


def parameter_names(module: Any) -> tuple[str, str]:
    """What a module that `is_experts` calls the parameters of gate and up, and of down."""
    return "gate_up_proj" if is_gated(module) else "up_proj", "down_proj"


def bias_names(module: Any) -> tuple[str, str]:
    """Their biases."""
    first, down = parameter_names(module)
    return f"{first}_bias", f"{down}_bias"


def _overrides_forward(experts: type) -> bool:
    """Whether a class of experts is one that transformers marks, with another forward."""
    own, *inherited = (base.__dict__["forward"] for base in experts.__mro__ if "forward" in base.__dict__)
    codes = [getattr(forward, "__code__", None) for forward in (own, *inherited)]
    return codes[0] is not _dispatch() and _dispatch() in codes


@cache
def _dispatch() -> Any:
    """The code of every forward that `use_experts_implementation` makes."""
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation  # type: ignore[untyped-decorator,unused-ignore]
    class Decorated(nn.Module):
        def forward(self) -> None: ...

    return Decorated.forward.__code__


def sizes_of(module: Any) -> tuple[int, int, int]:
    """E, H and I of a module that `is_experts`."""
    experts, rows, columns = (int(n) for n in module.down_proj.shape)
    return (experts, columns, rows) if layout_of(module).is_transposed else (experts, rows, columns)


def _grid() -> tuple[Tensor, Tensor]:
    """Values of gate and up, [N, 1] each, that tell activations and their limits apart."""
    gates = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-1e4, -60.0, 60.0, 1e4])])
    ups = torch.tensor([-1e4, -60.0, -12, -7.5, -7, -3, -1, -0.25, 0, 0.25, 1, 3, 7, 7.5, 12, 60.0, 1e4])
    gate, up = torch.meshgrid(gates.double(), ups.double(), indexing="ij")
    return gate.reshape(-1, 1), up.reshape(-1, 1)


def _computes(module: Any, known: Gating) -> bool:
    """Whether the module's gating is this activation, on the grid."""
    with torch.no_grad(), torch.device("cpu"):  # a model may be under construction on meta
        gate, up = _grid()
        if not is_gated(module):
            return _agree(lambda: module.act_fn(gate), known(None, gate))
        # Two columns, so that gate and up alternate differently from standing side by side.
        gates, ups = torch.cat([gate, up], dim=1), torch.cat([up, gate], dim=1)
        both = torch.cat([gates, ups], dim=1)
        if not layout_of(module).is_concatenated:
            both = torch.stack([gates, ups], dim=2).flatten(1)
        return _agree(lambda: _apply_gate(module, both), known(gates, ups))


def _apply_gate(module: Any, both: Tensor) -> Tensor:
    """h of G and U beside each other; a module without a function of its own has the usual one."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(both)  # type: ignore[no-any-return]
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]


def _agree(compute: Callable[[], Tensor], wanted: Tensor) -> bool:
    try:
        found = compute()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return found.shape == wanted.shape and torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


def _describe(module: Any) -> str:
    """The activation of a module, for a message."""
    for name, known in _NAMED.items():
        if _computes(module, known):
            return name
    limit = next((getattr(module, n) for n in ("swiglu_limit", "limit") if hasattr(module, n)), None)
    if limit is not None:
        for name, known in ACTIVATIONS.items():
            if _computes(module, _clamped(known, float(limit))):
                return f"{name} with gate and up clamped to {limit:g}"
    act = getattr(module, "act_fn", None)
    gating = getattr(type(module), "_apply_gate", None) if is_gated(module) else None
    own = getattr(gating, "__module__", None) == type(module).__module__
    options = {n: v for n, v in vars(module).items() if n.removeprefix("swiglu_") in ("alpha", "limit")}
    text = f"of {type(module).__name__}._apply_gate" if own else _name_of(act)
    details = [f"{name} {value:g}" for name, value in options.items()]
    details += [f"act_fn {_name_of(act)}"] if own and act is not None else []
    return f"{text} ({', '.join(details)})" if details else text


def _clamped(known: Gating, limit: float) -> Gating:
    def clamped(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return known(None, up.clamp(max=limit))
        return known(gate.clamp(max=limit), up.clamp(-limit, limit))

    return clamped


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__
