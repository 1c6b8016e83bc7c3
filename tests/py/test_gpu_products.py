"""The products of a chunk of experts against float64: in plain PyTorch, and by the Triton kernels.

The kernels run on the GPU if there is one, otherwise in Triton's interpreter, in a process of its own, and
not at all without Triton.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ACTIVATIONS, LIMITS, dropout_masks
from torch import Tensor

import kt_moe
from kt_moe.experts import FORMATS
from kt_moe.gpu import products, torch_products
from kt_moe.gpu.products import Groups, Matrices, Term
from kt_moe.gpu.stored import StoredExperts, StoredPart

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which Triton reads when it is imported
FUNCTIONS = ("grouped_gemm", "gate_up", "activation_grad", "combine", "grouped_outer", "drop", "dequantize",
             "copy_from_host", "add_from_host")  # fmt: skip

few = settings(max_examples=15 if INTERPRETED else 25)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's exp

# Around the tiles' 16, 32, 64 and none of their multiples; a rank, and two blocks of a sum.
_SIZES = st.sampled_from([1, 3, 8, 16, 17, 32, 40, 66, 130])
_COUNTS = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40, 70]), min_size=1, max_size=4)


class Code:
    """Who computes, and where."""

    def __init__(self, module: Any, device: str) -> None:
        self.module, self.device = module, torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def upload(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def locked(self, tensor: Tensor) -> Tensor:
        """In memory of the host that the device can read."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


@pytest.fixture(params=["torch", "triton"], scope="module")
def code(request: pytest.FixtureRequest) -> Code:
    if request.param == "torch":
        return Code(torch_products, "cpu")
    pytest.importorskip("triton")
    if not CUDA:
        if not INTERPRETED:
            pytest.skip("a test below runs this in Triton's interpreter")
        _mend_interpreter()
    return Code(importlib.import_module("kt_moe.gpu.triton_products"), "cuda" if CUDA else "cpu")


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter multiplies bf16 as integers, cuts fp32 off to bf16, needs NumPy before 2.4."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def converted(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            return rounded(np.ascontiguousarray(data).view(np.float32), nan=0x7FFF)  # as a GPU does
        return convert(data, source, target, mode)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        wide = [converted(x.data, tl.bfloat16, tl.float32, None).view(np.float32) for x in (a, b)]
        return interpreter.TensorHandle(np.matmul(*wide) + d.data, d.dtype.scalar)

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float, interpreter._patch_lang_tensor = converted, patch
    interpreter.InterpreterBuilder.create_dot = dot


def rounded(values: np.ndarray, nan: int = 0x7FC0) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), nan, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class Chunk:
    """Random operands on a device."""

    def __init__(self, code: Code, seed: int, counts: list[int], block_rows: int | None = None) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.device = code.device
        self.groups = Groups(counts, code.upload, block_rows)
        self.n, self.m = len(counts), self.groups.rows
        self.of_row = torch.repeat_interleave(torch.arange(self.n), torch.tensor(counts))

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A view of something larger, with NaN beside: no row follows the one before."""
        *before, last = shape
        wide = torch.full((*before, last + 3), torch.nan)
        wide[..., 2 : last + 2] = torch.randn(shape, generator=self.random)
        return wide.to(self.device, dtype)[..., 2 : last + 2]

    def below(self, end: int, count: int) -> Tensor:
        return torch.randint(end, (count,), generator=self.random).int().to(self.device)

    def matrices(self, rows: int, cols: int) -> Matrices:
        return Matrices(self.normal(self.n + 2, rows, cols), self.below(self.n + 2, self.n))

    def term(self, K: int, N: int, transposed: bool, gathered: bool) -> Term:
        b = self.matrices(N, K) if transposed else self.matrices(K, N)
        if gathered:
            return Term(self.normal(9, K), b, transposed, self.below(9, self.m))
        return Term(self.normal(self.m, K), b, transposed)

    def sums(self, terms: list[Term]) -> tuple[Tensor, Tensor]:
        """The products of each row in float64, and their size: what fp32 sums are exact to."""
        total, size = 0.0, 0.0
        for a, b, transposed, rows in terms:
            left = a.cpu().double() if rows is None else a.cpu().double()[rows.cpu().long()]
            right = b.data.cpu().double()[b.index.cpu().long()[self.of_row]]
            right = right.mT if transposed else right
            total = total + torch.einsum("mk,mkn->mn", left, right)
            size = size + torch.einsum("mk,mkn->mn", left.abs(), right.abs())
        return total, size * 2.0**-20


def check(result: Tensor, truth: Tensor, slack: Tensor | float, name: str = "") -> None:
    """Rounded once from a sum that is off by `slack` at most."""
    result = result.cpu()
    places = 2.0**-8 if result.dtype is torch.bfloat16 else 2.0**-24
    error = (result.double() - truth).abs()
    allowed = slack + (truth.abs() + slack) * places * 1.01 + 1e-37
    assert bool((error <= allowed).all()), f"{name} {(error / allowed).max().item()} times what is allowed"


@few
@given(data=st.data())
def test_grouped_gemm_is_the_sum_of_its_terms(code: Code, data: st.DataObject) -> None:
    chunk = Chunk(code, data.draw(st.integers(0, 999)), data.draw(_COUNTS))
    N, dtype = data.draw(_SIZES), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    kinds = data.draw(st.lists(st.tuples(_SIZES, st.booleans(), st.booleans()), min_size=1, max_size=4))
    terms = [chunk.term(K, N, transposed, gathered) for K, transposed, gathered in kinds]
    weight = torch.rand(chunk.m, generator=chunk.random).to(code.device) if data.draw(st.booleans()) else None
    bias, bias_index = None, None
    if data.draw(st.booleans()):
        bias, bias_index = chunk.normal(5, N).contiguous(), chunk.below(5, chunk.n)
    scale, accumulate = data.draw(st.sampled_from([1.0, 0.75])), data.draw(st.booleans())
    out = chunk.normal(chunk.m, N, dtype=dtype)
    before = out.clone().cpu().double()
    weighted = None
    if data.draw(st.booleans()):
        weighted = torch.rand(chunk.m, generator=chunk.random).to(code.device), chunk.normal(chunk.m, N)

    code.grouped_gemm(
        terms, chunk.groups, out, scale=scale, row_scale=weight, bias=bias, bias_index=bias_index,
        accumulate=accumulate, weighted=weighted,
    )  # fmt: skip

    truth, slack = chunk.sums(terms)
    truth = scale * truth
    if bias is not None and bias_index is not None:
        truth = truth + bias.cpu().double()[bias_index.cpu().long()[chunk.of_row]]
    slack = slack + truth.abs() * 2.0**-22
    if weight is not None:
        truth = truth * weight.cpu().double()[:, None]
    if accumulate:
        truth = truth + before
        slack = slack + truth.abs() * 2.0**-22
    check(out, truth, slack)
    assert out._base[:, [0, 1, -1]].isnan().all(), "wrote beside the result"
    if weighted is not None:
        factors = weighted[0].cpu().double()[:, None]
        check(weighted[1], factors * truth, factors * slack + (factors * truth).abs() * 2.0**-22, "weighted")


@few
@given(data=st.data())
def test_two_jobs_are_two_calls(code: Code, data: st.DataObject) -> None:
    chunk = Chunk(code, data.draw(st.integers(0, 999)), data.draw(_COUNTS))
    K, N, jobs = data.draw(_SIZES), data.draw(_SIZES), data.draw(st.sampled_from([1, 2]))
    transposed, shared = data.draw(st.booleans()), data.draw(st.booleans())
    shape = (N, K) if transposed else (K, N)
    b = Matrices(chunk.normal(jobs, chunk.n + 2, *shape), chunk.below(chunk.n + 2, chunk.n))
    wide = chunk.normal(chunk.m, jobs * K)
    a = wide[:, :K] if shared else wide.unflatten(1, (jobs, K)).transpose(0, 1)
    weights = torch.rand(chunk.m, generator=chunk.random).to(code.device)
    outs = torch.empty(2, jobs, chunk.m, N, dtype=torch.bfloat16, device=code.device)
    weighted = torch.empty_like(outs)
    scale = [0.5, 3.0][:jobs]

    code.grouped_gemm(
        [Term(a, b, transposed)], chunk.groups, outs[0], scale=scale, weighted=(weights, weighted[0])
    )
    for job in range(jobs):
        term = Term(a if shared else a[job], Matrices(b.data[job], b.index), transposed)
        code.grouped_gemm(
            [term], chunk.groups, outs[1, job], scale=scale[job], weighted=(weights, weighted[1, job])
        )
    assert torch.equal(*outs)
    assert torch.equal(*weighted)

    index = torch.randperm(chunk.n, generator=chunk.random).int().to(code.device)
    left = chunk.normal(chunk.m, jobs * N).unflatten(1, (jobs, N)).transpose(0, 1)
    sums = torch.zeros(2, jobs, chunk.n, N, K, device=code.device)
    code.grouped_outer(left, a, chunk.groups, sums[0], index)
    for job in range(jobs):
        code.grouped_outer(left[job], a if shared else a[job], chunk.groups, sums[1, job], index)
    assert torch.equal(*sums)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@few
@given(data=st.data())
def test_gate_up_activates_the_sums_before_they_are_rounded(
    code: Code, activation: str, data: st.DataObject
) -> None:
    chunk = Chunk(code, data.draw(st.integers(0, 999)), data.draw(_COUNTS))
    H, N, m = data.draw(_SIZES), data.draw(_SIZES), chunk.m
    main = chunk.term(H, N, data.draw(st.booleans()), data.draw(st.booleans()))
    other = chunk.matrices(*main.b.data.shape[1:])
    terms = [[main], [Term(main.a, other, main.transposed, main.rows)]]
    for of in terms:
        if data.draw(st.booleans()):
            of.append(chunk.term(data.draw(_SIZES), N, data.draw(st.booleans()), data.draw(st.booleans())))
    biases = [chunk.normal(5, N).contiguous() if data.draw(st.booleans()) else None for _ in range(2)]
    index = chunk.below(5, chunk.n)
    h, g, u = (chunk.normal(m, N) for _ in range(3))
    saves = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    gated = data.draw(st.sampled_from([True, True, False]))

    code.gate_up(
        terms[0] if gated else [],
        terms[1],
        chunk.groups,
        activation,
        h=h if saves[0] else None,
        saved=(g if gated else None, u) if saves[1] else None,
        bias_gate=biases[0] if gated else None,
        bias_up=biases[1],
        bias_index=index,
    )

    (G, slack_g), (U, slack_u) = (chunk.sums(of) for of in terms)
    rows = index.cpu().long()[chunk.of_row]
    G, U = (x if b is None else x + b.cpu().double()[rows] for x, b in zip((G, U), biases, strict=True))
    if saves[0]:
        truth = ACTIVATIONS[activation](G if gated else None, U)
        slack = 1.2 * (U.abs() + 1) * slack_g + (G.abs() + 1) * slack_u if gated else 1.2 * slack_u
        if activation == "relu2":
            slack = slack * 2 * (1 + (G if gated else U).abs())
        check(h, truth, slack + truth.abs() * 2.0**-20, "h")
    for name, result, x, slack in (("g", g, G, slack_g), ("u", u, U, slack_u)):
        if not saves[1] or (name == "g" and not gated):
            continue
        slack = slack + x.abs() * 2.0**-22
        if limit := LIMITS.get(activation):
            above = name == "g" or not gated  # what the activation is of
            beyond = x > limit if above else x.abs() > limit
            clear = (x.abs() - limit).abs() > slack  # on which side of the limit it is
            saved = result.cpu().double()
            found = saved > limit if above else saved.abs() > limit
            assert torch.equal(found[clear], beyond[clear])
            x = torch.where(beyond, x * (1 + 2.0**-8), x)
            slack = torch.where(clear, slack, 0.1)
        check(result, x, slack, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "N"), [(5, 17), (3, 1030), (0, 8)])
@pytest.mark.parametrize("gated", [True, False])
def test_activation_grad_is_autograds(code: Code, activation: str, gated: bool, m: int, N: int) -> None:
    chunk = Chunk(code, N, [m])
    dh = chunk.normal(m, N, dtype=torch.float32)
    g, u = chunk.normal(m, N) * 6, chunk.normal(m, N) * 6
    if m > 0:
        limits = torch.tensor([7.0, -7.0, 7.03125, -7.03125, 10.0, -10.0, 10.0625, -10.0625])
        large = 1e9 if activation == "relu2" else 1e30
        edges = torch.cat([limits, torch.tensor([0.0, 80.0, -80.0, -1000.0, large])])
        g[0, :13], u[1, :13] = edges, edges
    weights = torch.randn(m, generator=chunk.random).to(code.device)
    dg, du, h = (chunk.normal(m, N) for _ in range(3))
    dweights = torch.empty(m, device=code.device)

    before = dg.clone()
    code.activation_grad(
        dh, g if gated else None, u, weights, activation, dg if gated else None, du, h, dweights
    )

    G, U = (x.cpu().double().requires_grad_() for x in (g, u))
    d, w = dh.cpu().double(), weights.cpu().double()[:, None]
    act = ACTIVATIONS[activation](G if gated else None, U)
    if gated:
        dG, dU = torch.autograd.grad(act, (G, U), w * d)
    else:  # U is what G is with a gate, and a factor of 1 takes its place
        dG, dU = *torch.autograd.grad(act, (U,), w * d), torch.zeros_like(d)
        assert torch.equal(dg, before)
        dg, du, G, U = du, dU, U, torch.ones_like(U)
    act, G, U = act.detach(), G.detach(), U.detach()
    tiny = 2.0**-20 * (w * d).abs() * (1 + U.abs())  # what silu' loses where it is about 0
    part, least = 2.0**-18, torch.zeros_like(act)
    # Far out sigmoid(z) has z's error, and PyTorch's 1 + tanh(z), 1 + erf(G) and 1 - tanh(z)^2 are nothing.
    if activation.startswith("gelu"):
        part, least = 2.0**-14, 2.0**-50 * G.clamp(-16, 16).abs()
    elif activation == "softcapped_silu":
        least = torch.full_like(act, 2.0**-50)
    check(dg, dG, tiny + dG.abs() * part, "dg")
    check(du, dU, (w * d).abs() * least + dU.abs() * part, "du")
    check(h, act, U.abs() * least + act.abs() * part, "h")
    check(dweights, (d * act).sum(1), (d.abs() * (act.abs() * part + U.abs() * least)).sum(1), "dweights")


@few
@given(data=st.data())
def test_combine_adds_the_rows_of_each_token_in_order(code: Code, data: st.DataObject) -> None:
    T, K, H = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 8])), data.draw(_SIZES)
    chunk = Chunk(code, data.draw(st.integers(0, 999)), [data.draw(st.integers(0, 20))])
    y, out = (chunk.normal(rows, H, dtype=torch.float32) for rows in (chunk.m, T))
    first = data.draw(st.sampled_from([0, 7]))
    rows = torch.randperm(max(T * K, first + chunk.m + 4), generator=chunk.random)[: T * K]
    inverse = torch.where(torch.rand(T * K, generator=chunk.random) < 0.1, -1, rows).view(T, K).int()
    truth = out.clone().cpu()
    for t in range(T):
        for row in sorted(inverse[t].tolist()):
            if 0 <= row - first < chunk.m:
                truth[t] += y.cpu()[row - first]

    code.combine(y, inverse.to(code.device), first, out)

    assert torch.equal(out.cpu(), truth)


@few
@given(data=st.data())
def test_grouped_outer_adds_up_the_rows_of_each_group(code: Code, data: st.DataObject) -> None:
    chunk = Chunk(code, data.draw(st.integers(0, 999)), data.draw(_COUNTS))
    M, N, dtype = (
        data.draw(_SIZES),
        data.draw(_SIZES),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    operands = []
    for cols in (M, N):
        gathered = data.draw(st.booleans())
        rows = chunk.below(9, chunk.m) if gathered else None
        operands.append((chunk.normal(9 if gathered else chunk.m, cols), rows))
    (a, a_rows), (b, b_rows) = operands
    index = torch.randperm(chunk.n + 1, generator=chunk.random)[: chunk.n].int().to(code.device)
    out = chunk.normal(chunk.n + 1, M, N, dtype=dtype)
    kept = out.clone()

    code.grouped_outer(a, b, chunk.groups, out, index, a_rows=a_rows, b_rows=b_rows)

    A, B = ((x if rows is None else x[rows.long()]).cpu().double() for x, rows in operands)
    used = index.tolist()
    for group, matrix in enumerate(used):
        mine = chunk.of_row == group
        check(out[matrix], A[mine].mT @ B[mine], 2.0**-20 * (A[mine].abs().mT @ B[mine].abs()))
    rest = [matrix for matrix in range(chunk.n + 1) if matrix not in used]
    assert torch.equal(out[rest], kept[rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**63 - 1])
@pytest.mark.parametrize("projection", range(3))
def test_drop_is_the_cores(code: Code, projection: int, seed: int, dtype: torch.dtype) -> None:
    T, K, n, p = 3, 2, 70, 0.3
    problem = SimpleNamespace(
        topk_ids=torch.zeros(T, K), hidden_states=torch.zeros(T, n), weights=[None, torch.zeros(1, n, n)]
    )
    mask = list(dropout_masks(problem, p, seed).values())[projection].reshape(T * K, n) > 0
    chunk = Chunk(code, 0, [5])
    rows = chunk.normal(5, n, dtype=dtype)
    permutation = torch.tensor([5, 0, 3, 1, 4])
    truth = torch.where(mask[permutation], rows.cpu(), 0.0)

    code.drop(rows, permutation.to(code.device, torch.int32 if seed else torch.int64), projection, p, seed)

    assert torch.equal(rows.cpu(), truth)
    assert 0.55 < mask.double().mean() < 0.85


@few
@given(data=st.data())
def test_copies_and_sums_from_the_host(code: Code, data: st.DataObject) -> None:
    E, M, N = data.draw(st.integers(1, 5)), data.draw(_SIZES), data.draw(_SIZES)
    chunk = Chunk(code, data.draw(st.integers(0, 999)), [1])
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    host = code.locked((100 * torch.randn(E, M, N, generator=chunk.random)).to(dtype))
    rounded = dtype is torch.float32 and data.draw(st.booleans())
    to = torch.zeros(E, M, N, dtype=torch.bfloat16 if rounded else dtype, device=code.device)

    chosen = data.draw(st.lists(st.integers(0, E - 1), unique=True))
    code.copy_from_host(to, host, torch.tensor(chosen, dtype=torch.int32, device=code.device))
    truth = torch.zeros_like(host)
    truth[chosen] = host[chosen]
    assert torch.equal(to.cpu(), truth.to(to.dtype))
    code.copy_from_host(to, host, None)
    assert torch.equal(to.cpu(), host.to(to.dtype))

    rows = torch.randperm(M, generator=chunk.random)[: data.draw(st.integers(0, M))]
    source = code.locked(torch.randn(len(rows), N, generator=chunk.random))
    total = torch.randn(M, N, generator=chunk.random)
    to = total.clone().to(code.device)
    code.add_from_host(to, source, rows.to(code.device))
    total[rows] += source
    assert torch.equal(to.cpu(), total)
    code.add_from_host(to, code.locked(total), None)
    assert torch.equal(to.cpu(), 2 * total)


def test_results_of_a_group_do_not_depend_on_its_neighbours(code: Code) -> None:
    counts, N, K = [20, 5, 40], 33, 70
    together = Chunk(code, 1, counts, block_rows=32)
    term = together.term(K, N, True, False)
    out = torch.empty(together.m, N, device=code.device)
    again = torch.empty_like(out)
    code.grouped_gemm([term], together.groups, out)
    code.grouped_gemm([term], together.groups, again)
    assert torch.equal(out, again)
    for group, (begin, end) in enumerate([(0, 20), (20, 25), (25, 65)]):
        alone = Groups(counts[group : group + 1], code.upload, 32)
        matrices = Matrices(term.b.data, term.b.index[group : group + 1])
        code.grouped_gemm([Term(term.a[begin:end], matrices, True)], alone, again[begin:end])
    assert torch.equal(out, again)


@given(counts=st.lists(st.integers(0, 300), max_size=6), block=st.sampled_from([None, 16, 32, 64, 128]))
def test_tiles_cover_each_row_once(counts: list[int], block: int | None) -> None:
    groups = Groups(counts, block_rows=block)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(int)
    rows = [row for _, first, count, _ in groups.tiles.tolist() for row in range(first, first + count)]
    assert rows == list(range(groups.rows))
    assert groups.offsets.tolist() == offsets.tolist()
    for group, first, count, _ in groups.tiles.tolist():
        assert offsets[group] <= first <= first + count <= offsets[group + 1]
        assert 0 < count <= groups.block_rows
    assert groups.tiles.data_ptr() % 16 == 0 or groups.rows == 0


@pytest.mark.parametrize(
    ("counts", "block"), [([8] * 16, 16), ([20] * 16, 32), ([64] * 4, 64), ([512] * 4, 128), ([0, 0], 16)]
)
def test_tiles_are_as_large_as_groups(counts: list[int], block: int) -> None:
    assert Groups(counts).block_rows == block


# Codes with their scales: rows and columns that share one, bytes of zero points, what a global scale does.
_STORED = [
    ("bf16", "none", 1, 1, False, ""),
    ("int8", "f32", 1, 32, False, ""),
    ("int8", "f32", 1, 1000, False, ""),
    ("int4", "bf16", 1, 32, False, ""),
    ("int4", "f32", 1, 64, True, ""),
    ("int4", "bf16", 1, 1000, True, ""),
    ("e4m3", "f32", 128, 128, False, ""),
    ("e4m3", "bf16", 3, 16, False, ""),
    ("e4m3", "f32", 1000, 1000, False, ""),
    ("e2m1", "e8m0", 1, 32, False, ""),
    ("e2m1", "e8m0", 1, 4, False, ""),
    ("e2m1", "e4m3", 1, 16, False, "multiplies"),
    ("e2m1", "e4m3", 1, 16, False, "divides"),
    ("int4", "f32", 2, 3, True, ""),  # a byte has codes of two scales
]
# Results that are subnormal, overflow, or are not numbers.
_SCALES = np.array([1.0, -0.37, 3e-3, 1e-38, 3e-39, 1e-45, 2e38, np.inf, np.nan], np.float32)


@pytest.mark.parametrize(("kind", "scale", "scale_rows", "scale_cols", "zeros", "whole"), _STORED)
@pytest.mark.parametrize(("rows", "cols"), [(5, 96), (131, 45)])
def test_dequantize_is_one_rounded_product(
    code: Code, rows: int, cols: int, kind: str, scale: str, scale_rows: int, scale_cols: int, zeros: bool,
    whole: str,
) -> None:  # fmt: skip
    scale_rows, scale_cols = min(scale_rows, rows), min(scale_cols, cols)
    random = np.random.default_rng(rows)
    packed = kind in ("int4", "e2m1")
    row_bytes = (cols + 1) // 2 if packed else cols * (2 if kind == "bf16" else 1)
    blocks = -(-rows // scale_rows) * -(-cols // scale_cols) if scale != "none" else 0
    scale_bytes = blocks * {"none": 0, "f32": 4, "bf16": 2, "e8m0": 1, "e4m3": 1}[scale]
    sizes = [rows * row_bytes, scale_bytes, blocks * zeros, 4 if whole else 0]
    offsets = np.cumsum([64, *(-(-size // 64) * 64 for size in sizes)])
    part = StoredPart(0, 0, rows, cols, int(offsets[0]), int(offsets[1]) if sizes[1] else -1,
                      int(offsets[2]) if zeros else -1, int(offsets[3]) if whole else -1, kind, scale,
                      scale_rows, scale_cols, whole == "divides")  # fmt: skip
    raw = random.integers(0, 256, (3, int(offsets[4])), dtype=np.uint8)
    for slot in raw:
        if scale in ("f32", "bf16"):
            of_block = random.choice(_SCALES, blocks)
            of_block = (rounded(of_block) if scale == "bf16" else of_block).view(np.uint8)
            slot[offsets[1] : offsets[1] + sizes[1]] = of_block
        elif scale == "e8m0":
            slot[offsets[1] : offsets[1] + 2] = 0, 255
        if whole:
            slot[offsets[3] : offsets[3] + 4] = random.random(1, np.float32).view(np.uint8)
        if zeros:
            slot[offsets[2] : offsets[2] + sizes[2]] = random.integers(0, 16, sizes[2])
    index = [2, 0]
    margins = torch.zeros(2, rows + 2, cols + 5, dtype=torch.bfloat16, device=code.device)
    out = margins[:, 1:-1, 3:-2]

    slots = torch.from_numpy(raw).to(code.device)
    code.dequantize(slots, torch.tensor(index, dtype=torch.int32, device=code.device), part, out)

    truth = np.stack([decoded(raw[slot], part) for slot in index])
    bits = out.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bits, truth)
    margins[:, 1:-1, 3:-2] = 0
    assert not margins.any(), "wrote beside the result"


def decoded(slot: np.ndarray, part: StoredPart) -> np.ndarray:
    """The bits of bf16, from docs/formats.md, element by element."""
    rows, cols = part.rows, part.cols
    if part.code == "bf16":
        return slot[part.codes :][: 2 * rows * cols].view(np.uint16).reshape(rows, cols)
    i, j = np.indices((rows, cols))
    place = i // part.scale_rows * -(-cols // part.scale_cols) + j // part.scale_cols
    if part.code in ("int4", "e2m1"):
        code = slot[part.codes + i * ((cols + 1) // 2) + j // 2] >> 4 * (j % 2) & 15
    else:
        code = slot[part.codes + i * cols + j]
    code = code.astype(np.int64)
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    if part.code == "int8":
        value = np.where(code < 128, code, code - 256).astype(np.float32)
    elif part.code == "int4":
        value = (code - (slot[part.zeros + place] if part.zeros >= 0 else 8)).astype(np.float32)
    elif part.code == "e4m3":
        value = e4m3[code]
    else:
        numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        value = np.concatenate((numbers, -numbers))[code]
    if part.scale == "e8m0":
        exponent = slot[part.scales + place].astype(np.float64)
        factor = np.where(exponent == 255, np.nan, 2.0 ** (exponent - 127)).astype(np.float32)
    elif part.scale == "e4m3":
        factor, whole = e4m3[slot[part.scales + place]], slot[part.global_scale :][:4].view(np.float32)
        factor = factor / whole if part.divides else factor * whole
    elif part.scale == "bf16":
        bits = slot[part.scales :][: 2 * (int(place.max()) + 1)].view(np.uint16)[place]
        factor = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        factor = slot[part.scales :][: 4 * (int(place.max()) + 1)].view(np.float32)[place]
    with np.errstate(all="ignore"):
        return rounded(value * factor)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_is_what_experts_multiply_by(code: Code, format: str) -> None:
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, *s, generator=random).bfloat16() for s in ((96, 160), (96, 160), (160, 96))]
    experts = kt_moe.Experts(*weights, format=format)
    stored = StoredExperts(experts)
    slots = torch.zeros(2, stored.slot_bytes, dtype=torch.uint8)
    for expert in range(2):
        stored.copy_expert(expert, slots[expert])
    truth = experts.dequantize()
    for part in stored.parts:
        along = 2 if part.projection == 2 else 1
        whole = truth[part.projection].narrow(along, part.first, part.cols if along == 2 else part.rows)
        out = torch.empty(whole.shape, dtype=torch.bfloat16, device=code.device)
        index = torch.tensor([0, 1], dtype=torch.int32, device=code.device)
        code.dequantize(slots.to(code.device), index, part, out)
        assert torch.equal(out.cpu().view(torch.int16), whole.contiguous().view(torch.int16))


def test_both_codes_have_the_functions_of_products(code: Code) -> None:
    for name in FUNCTIONS:
        public = inspect.signature(getattr(products.Products, name)).parameters
        assert {*inspect.signature(getattr(code, name)).parameters, "self"} == set(public), name


def test_tensors_of_the_host_are_computed_by_pytorch() -> None:
    assert products.products_for(torch.device("cpu")) is torch_products


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
