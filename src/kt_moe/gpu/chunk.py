"""The layer's formulas on the device, for some experts at a time: forward, and backward beside it.

Notation of src/cpp/README.md: P = s X A', G = X Wg' + Pg Bg', h = act(G, U), Q = s dY B, and so on. Operands
are bf16, sums fp32, and every named result is rounded once. `x` and `dy` are read where they lie, by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_moe.gpu.products import (
    Groups,
    Matrices,
    Term,
    activation_grad,
    combine,
    drop,
    gate_up,
    grouped_gemm,
    grouped_outer,
)

GATE, UP, DOWN = range(3)


@dataclass(frozen=True)
class LoraMatrices:
    """LoRA of one projection on the device: a [E, r, in] and b [E, out, r] in bf16, and s."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Layer:
    """What is the same for all chunks of a pass.

    Attributes:
        hidden, intermediate: H and I.
        activation: of `kt_moe.Experts`.
        biases: of gate, up [E, I] and down [E, H] in bf16, or None.
        lora: of gate, up and down, or None.
        dropout, seed: of the LoRA inputs.
    """

    hidden: int
    intermediate: int
    activation: str
    biases: Sequence[Tensor | None]
    lora: Sequence[LoraMatrices | None]
    dropout: float
    seed: int


@dataclass(frozen=True)
class Chunk:
    """Some experts of a pass with their rows.

    Attributes:
        first: number of the first row in the pass.
        experts: [n] int32, the experts' numbers.
        groups: rows by expert.
        places: [m] int32, t * K + k of each row.
        tokens: [m] int32, t of each row.
        row_weights: [m] fp32, the routing weight of each row.
        position: [T, K] int32, the row of each route in the pass.
        weights: gate, up and down.
        low_rank: P of gate and up, and of down w P, [m, r] bf16: written by forward, read by backward. None
            where there is no LoRA.
    """

    first: int
    experts: Tensor
    groups: Groups
    places: Tensor
    tokens: Tensor
    row_weights: Tensor
    position: Tensor
    weights: tuple[Matrices, Matrices, Matrices]
    low_rank: Sequence[Tensor | None]

    def empty(self, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[m, columns] for a result."""
        return torch.empty(self.groups.rows, columns, dtype=dtype, device=self.tokens.device)

    def lora(self, stack: Tensor) -> Matrices:
        """LoRA matrices of this chunk's experts."""
        return Matrices(stack, self.experts)


def forward_chunk(layer: Layer, chunk: Chunk, x: Tensor, out: Tensor) -> None:
    """out[t] += the weighted outputs of the chunk's experts; x [T, H] bf16, out [T, H] fp32."""
    for projection in (GATE, UP):
        lora, p = layer.lora[projection], chunk.low_rank[projection]
        if lora is not None and p is not None:
            if layer.dropout > 0:
                term = Term(_dropped_x(layer, chunk, x, projection), chunk.lora(lora.a), True)
            else:
                term = Term(x, chunk.lora(lora.a), True, chunk.tokens)
            grouped_gemm([term], chunk.groups, p, scale=lora.scaling)
    h = chunk.empty(layer.intermediate)
    _gate_up(layer, chunk, x, h=h)
    terms = [Term(h, chunk.weights[DOWN], True)]
    down, weighted = layer.lora[DOWN], chunk.low_rank[DOWN]
    if down is not None and weighted is not None:
        p = chunk.empty(down.a.shape[1], torch.float32)
        term = Term(_dropped(layer, chunk, h, DOWN), chunk.lora(down.a), True)
        grouped_gemm([term], chunk.groups, p, scale=down.scaling)
        terms.append(Term(p.bfloat16(), chunk.lora(down.b), True))
        torch.mul(p, chunk.row_weights[:, None], out=p)
        weighted.copy_(p)
    y = chunk.empty(layer.hidden, torch.float32)
    grouped_gemm(terms, chunk.groups, y, row_scale=chunk.row_weights, bias=layer.biases[DOWN],
                 bias_index=chunk.experts)  # fmt: skip
    combine(y, chunk.position, chunk.first, out)


@dataclass(frozen=True)
class Gradients:
    """Where a backward adds or writes what it finds; None is not wanted.

    Attributes:
        hidden_states: [T, H] fp32, added to.
        row_weights: [rows of the pass] fp32.
        lora: A and B of gate, up and down: [E, r, in], [E, out, r], fp32 or bf16; experts of other chunks are
            left as they are.
    """

    hidden_states: Tensor | None
    row_weights: Tensor | None
    lora: Sequence[Tensor | None]


def backward_chunk(layer: Layer, chunk: Chunk, x: Tensor, dy: Tensor, grads: Gradients) -> None:
    """The gradients of the chunk's experts; x [T, H] and dy, the gradient of out, [T, H] in bf16."""
    groups, tokens, w = chunk.groups, chunk.tokens, chunk.row_weights
    width, down = layer.intermediate, layer.lora[DOWN]
    g, u = chunk.empty(width), chunk.empty(width)
    _gate_up(layer, chunk, x, saved=(g, u))

    dh = chunk.empty(width, torch.float32)
    terms = [Term(dy, chunk.weights[DOWN], False, tokens)]
    q_down = None
    if down is not None:
        q_down = chunk.empty(down.b.shape[2], torch.float32)
        grouped_gemm([Term(dy, chunk.lora(down.b), False, tokens)], groups, q_down, scale=down.scaling)
        low = Term(q_down.bfloat16(), chunk.lora(down.a), False)
        _low_rank_first(layer, chunk, terms, [(low, DOWN)], dh)
    grouped_gemm(terms, groups, dh, accumulate=layer.dropout > 0 and down is not None)

    dg, du, h = chunk.empty(width), chunk.empty(width), chunk.empty(width)
    dw = torch.empty_like(w)
    activation_grad(dh, g, u, w, layer.activation, dg, du, h, dw)
    if grads.row_weights is not None:
        if (bias := layer.biases[DOWN]) is not None:
            of_row = torch.repeat_interleave(chunk.experts, _counts(groups), output_size=groups.rows)
            dw += (dy[tokens].float() * bias[of_row].float()).sum(1)
        grads.row_weights[chunk.first : chunk.first + groups.rows] = dw
    if down is not None and q_down is not None:
        if (grad := grads.lora[4]) is not None:
            weighted = (q_down * w[:, None]).bfloat16()
            grouped_outer(weighted, _dropped(layer, chunk, h, DOWN), groups, grad, chunk.experts)
        if (grad := grads.lora[5]) is not None and (p := chunk.low_rank[DOWN]) is not None:
            grouped_outer(dy, p, groups, grad, chunk.experts, a_rows=tokens)
    del h, dh, g, u

    terms, low_terms = [], []
    for projection, d in ((GATE, dg), (UP, du)):
        terms.append(Term(d, chunk.weights[projection], False))
        if (lora := layer.lora[projection]) is None:
            continue
        q = chunk.empty(lora.b.shape[2])
        grouped_gemm([Term(d, chunk.lora(lora.b), False)], groups, q, scale=lora.scaling)
        low_terms.append((Term(q, chunk.lora(lora.a), False), projection))
        if (grad := grads.lora[2 * projection]) is not None:
            if layer.dropout > 0:
                grouped_outer(q, _dropped_x(layer, chunk, x, projection), groups, grad, chunk.experts)
            else:
                grouped_outer(q, x, groups, grad, chunk.experts, b_rows=tokens)
        if (grad := grads.lora[2 * projection + 1]) is not None and (
            p := chunk.low_rank[projection]
        ) is not None:
            grouped_outer(d, p, groups, grad, chunk.experts)
    if grads.hidden_states is not None:
        dx = chunk.empty(layer.hidden, torch.float32)
        if low_terms:
            _low_rank_first(layer, chunk, terms, low_terms, dx)
        grouped_gemm(terms, groups, dx, accumulate=layer.dropout > 0 and bool(low_terms))
        combine(dx, chunk.position, chunk.first, grads.hidden_states)


def _counts(groups: Groups) -> Tensor:
    return groups.offsets[1:] - groups.offsets[:-1]


def _gate_up(
    layer: Layer,
    chunk: Chunk,
    x: Tensor,
    *,
    h: Tensor | None = None,
    saved: tuple[Tensor, Tensor] | None = None,
) -> None:
    terms = []
    for projection in (GATE, UP):
        own = [Term(x, chunk.weights[projection], True, chunk.tokens)]
        lora, p = layer.lora[projection], chunk.low_rank[projection]
        if lora is not None and p is not None:
            own.append(Term(p, chunk.lora(lora.b), True))
        terms.append(own)
    gate_up(terms[0], terms[1], chunk.groups, layer.activation, bias_gate=layer.biases[GATE],
            bias_up=layer.biases[UP], bias_index=chunk.experts, h=h, saved=saved)  # fmt: skip


def _low_rank_first(
    layer: Layer, chunk: Chunk, terms: list[Term], low: Sequence[tuple[Term, int]], into: Tensor
) -> None:
    """Put Q A among the terms, or with dropout, whose mask is of their product alone, into the result."""
    if layer.dropout == 0:
        terms += [term for term, _ in low]
        return
    for i, (term, projection) in enumerate(low):
        product = into if i == 0 else torch.empty_like(into)
        grouped_gemm([term], chunk.groups, product)
        drop(product, chunk.places, projection, layer.dropout, layer.seed)
        if i > 0:
            into += product


def _dropped(layer: Layer, chunk: Chunk, rows: Tensor, projection: int) -> Tensor:
    if layer.dropout == 0:
        return rows
    rows = rows.clone()
    drop(rows, chunk.places, projection, layer.dropout, layer.seed)
    return rows


def _dropped_x(layer: Layer, chunk: Chunk, x: Tensor, projection: int) -> Tensor:
    rows = x.index_select(0, chunk.tokens)
    drop(rows, chunk.places, projection, layer.dropout, layer.seed)
    return rows
