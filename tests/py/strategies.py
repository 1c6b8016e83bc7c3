"""What Hypothesis draws: layer problems of every awkward shape, and the kernel sets to run them on."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from reference import ACTIVATIONS, PROJECTIONS, Problem
from torch import Tensor

import kt_moe

ISAS = [name for name, state in kt_moe.cpu_info()["kernel_sets"].items() if state == "available"]

# Sizes around the tiles' (4, 6, 12, 16, 32) and none of their multiples.
_SIZES = st.sampled_from([1, 2, 3, 5, 8, 12, 13, 16, 17, 31, 32, 33, 40, 64, 65, 100])


def make_problem(
    T: int,
    H: int,
    inner: int,
    E: int,
    K: int,
    ranks: dict[str, int],
    *,
    routing: str = "random",
    seed: int = 0,
    lora_dtype: torch.dtype = torch.float32,
    scaling: tuple[float, float, float] = (2.0, 1.5, 0.5),
    biased: tuple[str, ...] = (),
    activation: str = "silu",
    gated: bool = True,
) -> Problem:
    """A layer problem with values of ordinary size.

    ranks: projection -> LoRA rank; a projection that is missing has none.
    routing: "random" (distinct experts a token), "one" (all on expert 0), "repeat" (an expert in several
        slots), "sparse" (a third of the slots has no route), "none".
    biased: the projections with a bias, of a size that reaches the limits of "gpt_oss".
    gated: False leaves out the gate, with its LoRA and bias.
    """
    call = (
        f"make_problem({T}, {H}, {inner}, {E}, {K}, {ranks}, {routing=}, {seed=}, {lora_dtype=}, "
        f"{scaling=}, {biased=}, {activation=}, {gated=})"
    )
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random) * scale

    lora = {}
    for p, r in ranks.items():
        if p == "gate" and not gated:
            continue
        into, out = (inner, H) if p == "down" else (H, inner)
        lora[f"{p}_lora_a"] = normal(E, r, into, scale=into**-0.5).to(lora_dtype)
        lora[f"{p}_lora_b"] = normal(E, out, r, scale=r**-0.5).to(lora_dtype)
    problem = Problem(
        weights=(
            normal(E, inner, H, scale=H**-0.5).bfloat16() if gated else None,
            normal(E, inner, H, scale=H**-0.5).bfloat16(),
            normal(E, H, inner, scale=inner**-0.5).bfloat16(),
        ),
        hidden_states=normal(T, H).bfloat16(),
        topk_ids=_route(routing, T, E, K, random),
        topk_weights=torch.rand(T, K, generator=random) + 0.1,
        lora=lora,
        scaling=scaling,
        grad_out=normal(T, H).bfloat16(),
        made_by=call,
        activation=activation,
    )
    problem.biases = tuple(
        normal(*w.shape[:2], scale=5.0).bfloat16() if p in biased and w is not None else None
        for p, w in zip(PROJECTIONS, problem.weights, strict=True)
    )
    return problem


def make_experts(problem: Problem, runtime: kt_moe.Runtime) -> kt_moe.Experts:
    """The experts of a problem."""
    biases = {f"{p}_bias": b for p, b in zip(PROJECTIONS, problem.biases, strict=True)}
    return kt_moe.Experts(*problem.weights, **biases, activation=problem.activation, runtime=runtime)


def _route(routing: str, T: int, E: int, K: int, random: torch.Generator) -> Tensor:
    if routing == "one":
        return torch.zeros(T, K, dtype=torch.int64)
    if routing == "none":
        return torch.full((T, K), E)
    if routing == "repeat":
        return torch.randint(E, (T, K), generator=random)
    ids = torch.rand(T, E, generator=random).argsort(-1)[:, :K]
    return torch.where(torch.rand(T, K, generator=random) < 1 / 3, E, ids) if routing == "sparse" else ids


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any shape, any LoRA subset with its own ranks, any routing."""
    E = draw(st.integers(1, 9))
    targets = draw(st.lists(st.sampled_from(PROJECTIONS), unique=True))
    return make_problem(
        T=draw(st.sampled_from([0, 1, 2, 3, 7, 16, 33, 70])),
        H=draw(_SIZES),
        inner=draw(_SIZES),
        E=E,
        K=draw(st.integers(1, E)),
        ranks={p: draw(st.sampled_from([1, 2, 3, 4, 8, 15, 16, 33])) for p in targets},
        routing=draw(st.sampled_from(["random", "random", "one", "repeat", "sparse", "none"])),
        seed=draw(st.integers(0, 2**31)),
        lora_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        biased=tuple(draw(st.sampled_from([(), PROJECTIONS, ("up",), ("down",)]))),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        gated=draw(st.sampled_from([True, True, False])),
    )


def run_ours(
    problem: Problem,
    runtime: kt_moe.Runtime,
    *,
    experts: kt_moe.Experts | None = None,
    recompute: bool = False,
    dropout: float = 0.0,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """`out` and the gradient of every leaf, by kt_moe."""
    experts = experts or make_experts(problem, runtime)
    experts.recompute = recompute
    leaves = {k: v.detach().clone().requires_grad_() for k, v in problem.leaves().items()}
    lora = {k: leaves[k] for k in problem.lora}
    out = kt_moe.moe(
        leaves["hidden_states"],
        problem.topk_ids,
        leaves["topk_weights"],
        experts,
        lora,
        scaling=problem.scaling,
        dropout=dropout,
        seed=seed,
    )
    out.backward(problem.grad_out)
    return {"out": out.detach(), **{k: v.grad for k, v in leaves.items()}}
