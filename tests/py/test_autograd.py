"""How the layer behaves inside PyTorch: repetition, call order, checkpointing, compile, threads, forks."""

from __future__ import annotations

import copy
import os
import threading
import warnings

import pytest
import torch
from reference import Problem, relative_error
from strategies import ISAS, make_problem, run_ours
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kt_moe
from kt_moe import _core

ALL = {"gate": 8, "up": 8, "down": 8}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(70, 96, 64, 6, 3, ALL)


@pytest.fixture(scope="module")
def experts(problem) -> kt_moe.Experts:
    return kt_moe.Experts(*problem.weights, runtime=kt_moe.Runtime(threads=2))


def fresh_leaves(problem: Problem) -> dict[str, Tensor]:
    return {k: v.detach().clone().requires_grad_() for k, v in problem.leaves().items()}


def call(
    problem: Problem, experts: kt_moe.Experts, leaves: dict[str, Tensor], rows: slice = slice(None)
) -> Tensor:
    x, w = leaves["hidden_states"][rows], leaves["topk_weights"][rows]
    lora = {k: leaves[k] for k in problem.lora}
    return kt_moe.moe(x, problem.topk_ids[rows], w, experts, lora, scaling=problem.scaling)


def grads(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.grad for k, v in leaves.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("isa", ISAS)
def test_bitwise_the_same_run_after_run_whatever_the_threads(problem, isa):
    first = run_ours(problem, kt_moe.Runtime(threads=2, isa=isa))
    for threads in (2, 2, 1, 3, 8):
        assert_equal(run_ours(problem, kt_moe.Runtime(threads=threads, isa=isa)), first)


def test_recompute_gives_the_same_gradients(problem, experts):
    assert_equal(run_ours(problem, experts.runtime, recompute=True), run_ours(problem, experts.runtime))


def test_recompute_keeps_less_between_forward_and_backward(problem, experts):
    def saved_bytes(recompute: bool) -> int:
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.nbytes
            return t

        experts.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call(problem, experts, fresh_leaves(problem))
        experts.recompute = False
        return total

    routes = problem.topk_ids.numel()
    ranks = sum(a.shape[1] for name, a in problem.lora.items() if name.endswith("_a"))
    assert saved_bytes(False) - saved_bytes(True) == routes * (2 * experts.intermediate_size + ranks) * 2


def test_without_gradients_nothing_is_saved(problem, experts, monkeypatch):
    """Evaluation, generation, and the first forward of reentrant checkpointing: parameters want gradients."""
    saved = []
    forward = _core.forward
    monkeypatch.setattr(_core, "forward", lambda *args: (saved.append(args[-2]), forward(*args))[1])
    leaves = fresh_leaves(problem)
    with torch.no_grad():
        call(problem, experts, leaves)
    call(problem, experts, problem.leaves())
    assert saved == [None, None]
    call(problem, experts, leaves)
    assert saved[2] is not None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_two_backwards(problem, experts, order):
    other = make_problem(31, 96, 64, 6, 2, {"gate": 3, "down": 5}, seed=9)
    other.weights = problem.weights
    calls = [(p, fresh_leaves(p)) for p in (problem, other)]
    outs = [call(p, experts, leaves) for p, leaves in calls]
    for i in order:
        outs[i].backward(calls[i][0].grad_out)
    for (p, leaves), out in zip(calls, outs, strict=True):
        assert_equal({"out": out.detach(), **grads(leaves)}, run_ours(p, experts.runtime, experts=experts))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(problem, experts, use_reentrant, dropout):
    def layer(x: Tensor, w: Tensor, *lora: Tensor) -> Tensor:
        params = dict(zip(problem.lora, lora, strict=True))
        return kt_moe.moe(x, problem.topk_ids, w, experts, params, scaling=problem.scaling, dropout=dropout)

    results = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        leaves = fresh_leaves(problem)
        out = run(*leaves.values())
        torch.manual_seed(99)  # the mask must come from the state at the forward
        out.backward(problem.grad_out)
        results.append({"out": out.detach(), **grads(leaves)})
    assert_equal(*results)


def test_gradient_accumulation_equals_one_large_batch(problem, experts):
    whole, pieces = fresh_leaves(problem), fresh_leaves(problem)
    call(problem, experts, whole).backward(problem.grad_out)
    for rows in (slice(0, 20), slice(20, 21), slice(21, 70)):
        call(problem, experts, pieces, rows).backward(problem.grad_out[rows])
    for name, grad in grads(pieces).items():
        assert relative_error(grad, whole[name].grad) < 1e-6, name


def test_retain_graph_gives_the_same_gradient_twice(problem, experts):
    leaves = fresh_leaves(problem)
    out = call(problem, experts, leaves)
    first = torch.autograd.grad(out, list(leaves.values()), problem.grad_out, retain_graph=True)
    second = torch.autograd.grad(out, list(leaves.values()), problem.grad_out)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_double_backward_raises(problem, experts):
    leaves = fresh_leaves(problem)
    (grad,) = torch.autograd.grad(
        call(problem, experts, leaves).float().pow(2).sum(), leaves["hidden_states"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("gpu", [None, kt_moe.Gpu("cpu")], ids=["core", "engine"])
@pytest.mark.parametrize("name", ["gate_lora_a", "down_lora_b", "hidden_states", "topk_weights"])
def test_changing_an_input_before_backward_raises(name, gpu, problem, experts):
    if gpu is not None:
        experts = kt_moe.Experts(*problem.weights, gpu=gpu)
    leaves = fresh_leaves(problem)
    out = call(problem, experts, leaves)
    with torch.no_grad():
        leaves[name].add_(1.0)
    text = f"^{name} changed in place between forward and backward, which needs .* modified"
    with pytest.raises(RuntimeError, match=text):
        out.backward(problem.grad_out)


def traced_by_make_fx(call, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(call)(x)


def exported(call, x):
    class Module(torch.nn.Module):
        def forward(self, x):
            return call(x)

    torch.export.export(Module(), (x,), strict=False)


def on_fake_tensors(call, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call(mode.from_tensor(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("trace", "what"),
    [
        (lambda call, x: torch.func.grad(lambda x: call(x).sum())(x), "torch.func"),
        (lambda call, x: torch.func.vmap(call)(x[None]), "torch.func"),
        (traced_by_make_fx, "make_fx or torch.export"),
        (exported, "make_fx or torch.export"),
        (on_fake_tensors, "a FakeTensorMode"),
        (lambda call, x: torch.jit.trace(call, x), "torch.jit.trace"),
    ],
    ids=["grad", "vmap", "make_fx", "export", "fake", "jit"],
)
def test_what_cannot_trace_it_is_refused(trace, what, problem, experts):
    leaves = {**fresh_leaves(problem), "topk_weights": problem.topk_weights}

    def run(x: Tensor) -> Tensor:
        return call(problem, experts, {**leaves, "hidden_states": x})

    with pytest.raises(NotImplementedError, match=f"outside of torch, so {what} cannot record or transform"):
        trace(run, problem.hidden_states.detach())
    assert run(problem.hidden_states).isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("function", [kt_moe.moe, kt_moe.MoEFunction.apply])
def test_compiling_without_a_graph_break_says_why_it_cannot(function, problem, experts):
    def layer(x: Tensor) -> Tensor:
        return function(x * 2, problem.topk_ids, problem.topk_weights, experts) + 1

    from torch._dynamo.exc import Unsupported

    with pytest.raises(Unsupported, match="reason: experts are computed outside of torch"):
        torch.compile(layer, backend="eager", fullgraph=True)(problem.hidden_states)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look at a graph break
def test_inside_a_compiled_function(problem, experts):
    def layer(x: Tensor, w: Tensor, *lora: Tensor) -> Tensor:
        params = dict(zip(problem.lora, lora, strict=True))
        return kt_moe.moe(x * 2, problem.topk_ids, w, experts, params, scaling=problem.scaling) + 1

    results = []
    for run in (layer, torch.compile(layer, backend="eager")):
        leaves = fresh_leaves(problem)
        out = run(*leaves.values())
        out.backward(problem.grad_out)
        results.append({"out": out.detach(), **grads(leaves)})
    assert_equal(*results)


def test_autocast(problem, experts):
    leaves = fresh_leaves(problem)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(problem, experts, leaves)
    out.backward(problem.grad_out)
    assert_equal({"out": out.detach(), **grads(leaves)}, run_ours(problem, experts.runtime))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_users_default_dtype_and_device_do_not_matter(problem, experts, dtype):
    expected = run_ours(problem, experts.runtime, experts=experts, dropout=0.3, seed=1)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert_equal(run_ours(problem, experts.runtime, experts=experts, dropout=0.3, seed=1), expected)
            run_ours(problem, experts.runtime, experts=experts, dropout=0.3)
            assert experts.dequantize()[0].device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_view_with_the_negative_bit(problem, experts):
    negated = {k: torch._neg_view(-v) for k, v in problem.leaves().items()}
    assert torch.equal(call(problem, experts, negated), call(problem, experts, problem.leaves()))
    weights = [torch._neg_view(-w) for w in problem.weights]
    assert torch.equal(kt_moe.Experts(*weights).dequantize()[0], problem.weights[0])


def test_dropout_just_below_one_is_finite(problem, experts):
    out = run_ours(problem, experts.runtime, experts=experts, dropout=1 - 1e-9, seed=0)
    assert all(value.isfinite().all() for value in out.values())


def test_several_python_threads(problem, experts):
    expected = run_ours(problem, experts.runtime, experts=experts)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                assert_equal(run_ours(problem, experts.runtime, experts=experts), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_ids_that_another_thread_rewrites_harm_nothing():
    x, topk_weights = torch.zeros(20_000, 1, dtype=torch.bfloat16), torch.ones(20_000, 8)
    layer = kt_moe.Experts(*(torch.zeros(64, 1, 1, dtype=torch.bfloat16) for _ in range(3)))
    ids = torch.randint(0, 64, topk_weights.shape)
    others, stop = (ids.clone(), torch.randint(0, 64, ids.shape)), threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for other in others:
                ids.copy_(other)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(60):
            assert kt_moe.moe(x, ids, topk_weights, layer).count_nonzero() == 0
    finally:
        stop.set()
        thread.join()


def test_the_callers_floating_point_mode_decides_nothing():
    problem = make_problem(300, 64, 96, 4, 2, {})
    gate, up, down = problem.weights
    problem.weights = (gate * 1e-19, up * 1e-20, down * 1e20)  # h is denormal
    runtime = kt_moe.Runtime(threads=3)
    usual = run_ours(problem, runtime)
    torch.set_flush_denormal(True)
    try:
        flushing = run_ours(problem, runtime)
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(usual[name], flushing[name]) for name in usual)


def test_works_in_a_forked_child(problem, experts):
    before = call(problem, experts, problem.leaves())
    read, write = os.pipe()
    with (
        warnings.catch_warnings()
    ):  # Python 3.12 warns because this process has threads: that is the point here
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        same = False
        try:
            same = torch.equal(call(problem, experts, problem.leaves()), before)
        finally:
            os.write(write, b"same" if same else b"different")
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert os.read(read, 9) == b"same"
    os.close(read)
    assert torch.equal(call(problem, experts, problem.leaves()), before)


class TestMoELayer:
    def test_parameters_and_training_step(self, problem, experts):
        torch.manual_seed(0)
        layer = kt_moe.MoELayer(experts, rank=4, alpha=8, targets=("gate", "down"))
        assert {k: tuple(v.shape) for k, v in layer.named_parameters()} == {
            "gate_lora_a": (6, 4, 96),
            "gate_lora_b": (6, 64, 4),
            "down_lora_a": (6, 4, 64),
            "down_lora_b": (6, 96, 4),
        }
        assert set(layer.state_dict()) == set(dict(layer.named_parameters()))
        args = problem.hidden_states, problem.topk_ids, problem.topk_weights
        plain = kt_moe.moe(*args, experts)
        assert torch.equal(layer(*args), plain)  # B starts at zero
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            loss = (layer(*args).float() - problem.grad_out.float()).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_shared_and_further_parameters(self, problem, experts):
        layer = kt_moe.MoELayer(experts, rank=4)
        args = problem.hidden_states, problem.topk_ids, problem.topk_weights
        layer.up_lora_a = layer.gate_lora_a
        layer.bias = torch.nn.Parameter(torch.zeros(1))
        torch.nn.init.normal_(layer.up_lora_b)
        layer(*args).float().sum().backward()
        assert layer.gate_lora_a.grad.any()

    def test_a_deep_copy_shares_the_experts_weights(self, problem, experts):
        layer = kt_moe.MoELayer(experts, rank=4)
        other = copy.deepcopy(layer)
        assert other.experts._core is experts._core
        assert other.gate_lora_a is not layer.gate_lora_a
        args = problem.hidden_states, problem.topk_ids, problem.topk_weights
        assert torch.equal(other(*args), layer(*args))

    def test_scaling(self, experts):
        assert kt_moe.MoELayer(experts, rank=16, alpha=32).lora.scaling == 2.0
        assert kt_moe.MoELayer(experts, rank=16, alpha=32, use_rslora=True).lora.scaling == 8.0

    def test_bad_arguments(self, experts):
        with pytest.raises(ValueError, match=r"targets is \('gate', 'router'\)"):
            kt_moe.MoELayer(experts, targets=("gate", "router"))
        with pytest.raises(ValueError, match="targets is 'gate'"):
            kt_moe.MoELayer(experts, targets="gate")
        with pytest.raises(ValueError, match="rank is 0"):
            kt_moe.MoELayer(experts, rank=0)
        with pytest.raises(ValueError, match="dropout is 1"):
            kt_moe.MoELayer(experts, dropout=1.0)
