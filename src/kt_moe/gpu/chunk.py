"""The layer's formulas on the device, for some experts at a time: forward, and backward beside it.

Notation of src/cpp/README.md: P = s X A', G = X Wg' + Pg Bg', h = act(G, U), Q = s dY B, and so on. Operands
are bf16, sums fp32, and every named result is rounded once. `x` and `dy` are read where they lie, by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kt_moe.gpu.lora import LoraStack
from kt_moe.gpu.products import DOWN, GATE, UP, Groups, Matrices, Products, Term


@dataclass(frozen=True)
class Layer:
    """What is the same for all chunks of a pass.

    Attributes:
        products: the code that multiplies.
        hidden, intermediate: H and I.
        gated: whether there is a gate.
        activation: of `kt_moe.Experts`.
        biases: of gate, up [E, I] and down [E, H] in bf16, or None.
        lora_in: of gate and up.
        lora_down: of down, or None.
        scalings: of gate, up and down.
        dropout, seed: of the LoRA inputs.
    """

    products: Products
    hidden: int
    intermediate: int
    gated: bool
    activation: str
    biases: Sequence[Tensor | None]
    lora_in: Sequence[LoraStack]
    lora_down: LoraStack | None
    scalings: tuple[float, float, float]
    dropout: float
    seed: int

    def scales(self, stack: LoraStack) -> list[float]:
        """What P and Q of each projection are multiplied by."""
        return [self.scalings[projection] / (1.0 - self.dropout) for projection in stack.projections]

    @property
    def inner(self) -> tuple[int, ...]:
        """The projections that read the hidden states."""
        return (GATE, UP) if self.gated else (UP,)

    def row_bytes(self, backward: bool) -> int:
        """Temporary memory for a row."""
        dropped = 6 * self.hidden if self.dropout else 0  # X, and a product that is added
        if not backward:
            return 2 * self.intermediate + 4 * self.hidden + dropped
        inner = 2 * len(self.inner) * self.intermediate  # G and U; or dG and dU
        of_down, of_inner = 2 * inner + 6 * self.intermediate, inner + 2 * self.intermediate + 4 * self.hidden
        return max(of_down, of_inner) + dropped


@dataclass(frozen=True)
class Chunk:
    """Some experts of a pass with their rows.

    Attributes:
        first: number of the first row in the pass.
        experts: [n] int32, the experts' numbers.
        groups: rows by expert.
        permutation: [m] int32, t * K + k of each row.
        tokens: [m] int32, t of each row.
        row_weights: [m] fp32, the routing weight of each row.
        inverse: [T, K] int32, the row of each route in the pass.
        weight: the experts' matrices of a projection; quantised ones are decoded in every call, into memory
            that lives as long as the result.
        low_rank_in: P of gate and up, [jobs, m, r] bf16 for each stack: written by forward, read by backward.
        low_rank_down: w P of down, [1, m, r] bf16, likewise; None where it has no LoRA.
    """

    first: int
    experts: Tensor
    groups: Groups
    permutation: Tensor
    tokens: Tensor
    row_weights: Tensor
    inverse: Tensor
    weight: Callable[[int], Matrices]
    low_rank_in: Sequence[Tensor]
    low_rank_down: Tensor | None

    def empty(self, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[m, columns] for a result."""
        return torch.empty(self.groups.rows, columns, dtype=dtype, device=self.tokens.device)

    def empty_jobs(self, jobs: int, columns: int) -> Tensor:
        """[jobs, m, columns] bf16 for a result."""
        return empty_jobs(jobs, self.groups.rows, columns, self.tokens)

    def lora(self, matrices: Tensor | None) -> Matrices:
        """LoRA matrices of this chunk's experts."""
        return Matrices(cast(Tensor, matrices), self.experts)


def empty_jobs(jobs: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """[jobs, rows, columns] bf16 where `like` is; strides, for which kernels are compiled, know no rows."""
    return torch.empty(rows, jobs, columns, dtype=torch.bfloat16, device=like.device).transpose(0, 1)


def forward_chunk(layer: Layer, chunk: Chunk, x: Tensor, out: Tensor) -> None:
    """out[t] += the weighted outputs of the chunk's experts; x [T, H] bf16, out [T, H] fp32."""
    products, groups = layer.products, chunk.groups
    for stack, p in zip(layer.lora_in, chunk.low_rank_in, strict=True):
        rows, tokens = _lora_input(layer, chunk, stack, x, chunk.tokens)
        products.grouped_gemm(
            [Term(rows, chunk.lora(stack.a), True, tokens)], groups, p, scale=layer.scales(stack)
        )
    h = chunk.empty(layer.intermediate)
    _gate_up(layer, chunk, x, [chunk.weight(p) for p in layer.inner], h=h)
    terms = [Term(h, chunk.weight(DOWN), True)]
    if (down := layer.lora_down) is not None and (weighted := chunk.low_rank_down) is not None:
        p = torch.empty_like(weighted)
        rows, _ = _lora_input(layer, chunk, down, h, None)
        products.grouped_gemm(
            [Term(rows, chunk.lora(down.a), True)], groups, p, scale=layer.scales(down),
            weighted=(chunk.row_weights, weighted),
        )  # fmt: skip
        terms += _by_job(chunk, p, down.b, True)
    y = chunk.empty(layer.hidden, torch.float32)
    products.grouped_gemm(terms, groups, y, row_scale=chunk.row_weights, bias=layer.biases[DOWN],
                          bias_index=chunk.experts)  # fmt: skip
    products.combine(y, chunk.inverse, chunk.first, out)


@dataclass(frozen=True)
class Gradients:
    """Where a backward adds or writes what it finds; None is not wanted.

    Attributes:
        hidden_states: [T, H] fp32, added to.
        row_weights: [rows of the pass] fp32.
        lora_in, lora_down: of the layer's stacks, fp32 or bf16; experts of other chunks are left as they are.
    """

    hidden_states: Tensor | None
    row_weights: Tensor | None
    lora_in: Sequence[LoraStack]
    lora_down: LoraStack | None


def backward_chunk(layer: Layer, chunk: Chunk, x: Tensor, dy: Tensor, grads: Gradients) -> None:
    """The gradients of the chunk's experts; x [T, H] and dy, the gradient of out, [T, H] in bf16.

    What needs down comes first: it is gone when gate and up are decoded.
    """
    products, groups, tokens, w = layer.products, chunk.groups, chunk.tokens, chunk.row_weights
    width, down = layer.intermediate, layer.lora_down
    dh = chunk.empty(width, torch.float32)
    low_terms: list[tuple[Term, int]] = []
    weighted_q = None
    if down is not None:
        q = chunk.empty_jobs(1, _rank(down))
        weighted_q = torch.empty_like(q)
        products.grouped_gemm(
            [Term(dy, chunk.lora(down.b), False, tokens)], groups, q, scale=layer.scales(down),
            weighted=(w, weighted_q),
        )  # fmt: skip
        low_terms = [(term, DOWN) for term in _by_job(chunk, q, down.a, False)]
    _add_low_rank(layer, chunk, [Term(dy, chunk.weight(DOWN), False, tokens)], low_terms, dh)

    inner = layer.inner
    weights = [chunk.weight(p) for p in inner]
    g, u = chunk.empty(width) if layer.gated else None, chunk.empty(width)
    _gate_up(layer, chunk, x, weights, saved=(g, u))
    d = chunk.empty_jobs(len(inner), width)  # dG and dU
    h = chunk.empty(width)
    dw = torch.empty_like(w)
    dg = d[inner.index(GATE)] if layer.gated else None
    products.activation_grad(dh, g, u, w, layer.activation, dg, d[inner.index(UP)], h, dw)
    del g, u, dh
    if grads.row_weights is not None:
        if (bias := layer.biases[DOWN]) is not None:
            of_bias = chunk.empty(1, torch.float32)
            as_row = Matrices(bias.unsqueeze(1), chunk.experts)
            products.grouped_gemm([Term(dy, as_row, True, tokens)], groups, of_bias)
            dw += of_bias.squeeze(1)
        grads.row_weights[chunk.first : chunk.first + groups.rows] = dw

    if down is not None and (grad := grads.lora_down) is not None:
        if grad.a is not None and weighted_q is not None:
            rows, _ = _lora_input(layer, chunk, down, h, None)
            products.grouped_outer(weighted_q, rows, groups, grad.a, chunk.experts)
        if grad.b is not None and chunk.low_rank_down is not None:
            products.grouped_outer(dy, chunk.low_rank_down, groups, grad.b, chunk.experts, a_rows=tokens)
    low_terms = []
    for stack, grad, p in zip(layer.lora_in, grads.lora_in, chunk.low_rank_in, strict=True):
        first, jobs = inner.index(stack.projections[0]), len(stack.projections)
        of_stack = d[first : first + jobs]
        q = chunk.empty_jobs(jobs, _rank(stack))
        products.grouped_gemm(
            [Term(of_stack, chunk.lora(stack.b), False)], groups, q, scale=layer.scales(stack)
        )
        low_terms += zip(_by_job(chunk, q, stack.a, False), stack.projections, strict=True)
        if grad.a is not None:
            rows, of_rows = _lora_input(layer, chunk, stack, x, tokens)
            products.grouped_outer(q, rows, groups, grad.a, chunk.experts, b_rows=of_rows)
        if grad.b is not None:
            products.grouped_outer(of_stack, p, groups, grad.b, chunk.experts)
    if grads.hidden_states is not None:
        dx = chunk.empty(layer.hidden, torch.float32)
        terms = [Term(of_one, of_all, False) for of_one, of_all in zip(d.unbind(), weights, strict=True)]
        _add_low_rank(layer, chunk, terms, low_terms, dx)
        products.combine(dx, chunk.inverse, chunk.first, grads.hidden_states)


def _gate_up(
    layer: Layer,
    chunk: Chunk,
    x: Tensor,
    weights: Sequence[Matrices],
    *,
    h: Tensor | None = None,
    saved: tuple[Tensor | None, Tensor] | None = None,
) -> None:
    terms: dict[int, list[Term]] = {GATE: []}
    terms |= {
        p: [Term(x, of_all, True, chunk.tokens)] for p, of_all in zip(layer.inner, weights, strict=True)
    }
    for stack, p in zip(layer.lora_in, chunk.low_rank_in, strict=True):
        for projection, term in zip(stack.projections, _by_job(chunk, p, stack.b, True), strict=True):
            terms[projection].append(term)
    layer.products.gate_up(
        terms[GATE], terms[UP], chunk.groups, layer.activation, bias_gate=layer.biases[GATE],
        bias_up=layer.biases[UP], bias_index=chunk.experts, h=h, saved=saved,
    )  # fmt: skip


def _rank(stack: LoraStack) -> int:
    return cast(Tensor, stack.b).shape[-1]


def _by_job(chunk: Chunk, low_rank: Tensor, matrices: Tensor | None, transposed: bool) -> list[Term]:
    """P B or Q A of each projection of a stack."""
    of_jobs = zip(low_rank.unbind(), cast(Tensor, matrices).unbind(), strict=True)
    return [Term(rows, chunk.lora(of_job), transposed) for rows, of_job in of_jobs]


def _add_low_rank(
    layer: Layer, chunk: Chunk, terms: Sequence[Term], low: Sequence[tuple[Term, int]], into: Tensor
) -> None:
    """The sum of the terms and of Q A, of which dropout drops what it dropped of A's input."""
    products = layer.products
    if layer.dropout == 0:
        products.grouped_gemm([*terms, *(term for term, _ in low)], chunk.groups, into)
        return
    for i, (term, projection) in enumerate(low):
        product = into if i == 0 else torch.empty_like(into)
        products.grouped_gemm([term], chunk.groups, product)
        products.drop(product, chunk.permutation, projection, layer.dropout, layer.seed)
        if i > 0:
            into += product
    products.grouped_gemm(terms, chunk.groups, into, accumulate=bool(low))


def _lora_input(
    layer: Layer, chunk: Chunk, stack: LoraStack, rows: Tensor, tokens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows that A of a stack is multiplied with, and which of them in what order, after dropout."""
    if layer.dropout == 0:
        return rows, tokens
    rows = rows.clone() if tokens is None else rows.index_select(0, tokens)
    layer.products.drop(rows, chunk.permutation, stack.projections[0], layer.dropout, layer.seed)
    return rows, None
