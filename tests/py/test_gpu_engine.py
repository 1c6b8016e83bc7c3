"""Layers through the GPU engine, on CPU tensors: every mix of places gives the numbers of the layer."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import sys
import threading
import time
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Problem
from strategies import make_problem, problems, run_ours
from test_layer import ALL, assert_as_good_as_eager, assert_formula
from torch.utils.checkpoint import checkpoint

import kt_moe
from kt_moe.experts import FORMATS
from kt_moe.gpu import Gpu, Rates, torch_products
from kt_moe.gpu import lora as lora_transfer
from kt_moe.gpu.cpu_part import Worker
from kt_moe.gpu.streams import Streams, _Done

SHARES = (0.0, 0.3, 0.7, 1.0)
RATES = Rates(link=50e9, gpu_flops=1e13, gpu_bytes=1e12, cpu_flops=1e12, cpu_bytes=5e10)


def experts_of(problem: Problem, gpu: Gpu | str, format: str = "bf16", shards: int = 1) -> kt_moe.Experts:
    biases = {f"{p}_bias": b for p, b in zip(reference.PROJECTIONS, problem.biases, strict=True)}
    return kt_moe.Experts(
        *problem.weights, **biases, activation=problem.activation, format=format, gpu=gpu,
        runtime=kt_moe.Runtime(2, shards),
    )  # fmt: skip


def run(problem: Problem, gpu: Gpu | str, format: str = "bf16", shards: int = 1, **options) -> dict:
    experts = experts_of(problem, gpu, format, shards)
    return run_ours(problem, experts.runtime, experts=experts, **options)


def few_slots(problem: Problem, number: int) -> int:
    """Memory for a number of bf16 experts."""
    H, inner = problem.weights[1].shape[2], problem.weights[1].shape[1]
    return number * 3 * math.ceil(2 * H * inner / 64) * 64


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@given(
    problem=problems(),
    share=st.sampled_from(SHARES),
    slots=st.sampled_from([1, 2, 3, 100]),
    recompute=st.booleans(),
    shards=st.integers(1, 3),
)
def test_formula(problem, share, slots, recompute, shards):
    gpu = Gpu("cpu", few_slots(problem, slots) + 64 * 9 * slots * shards, share)
    assert_formula(run(problem, gpu, shards=shards, recompute=recompute), problem)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_bf16_eager(share, activation, lora_dtype):
    problem = make_problem(
        90, 128, 96, 8, 4, ALL, activation=activation, lora_dtype=lora_dtype,
        biased=() if activation == "silu" else ("gate", "up", "down"),
    )  # fmt: skip
    assert_as_good_as_eager(run(problem, Gpu("cpu", cpu_share=share)), problem)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("activation", ["relu2", "gelu", "clamped_silu"])
def test_experts_without_a_gate(share, activation):
    problem = make_problem(90, 128, 96, 8, 4, ALL, activation=activation, biased=("up",), gated=False)
    ours = run(problem, Gpu("cpu", cpu_share=share))
    assert_as_good_as_eager(ours, problem)
    assert_formula(ours, problem)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("shards", "gated"), [(1, True), (3, True), (3, False)])
def test_stored_weights_are_decoded_exactly(format, shards, gated):
    problem = make_problem(40, 128, 192, 6, 3, ALL, gated=gated)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.4), format, shards)
    ours = run_ours(problem, experts.runtime, experts=experts)
    problem.weights = experts.dequantize()
    assert_formula(ours, problem)


@pytest.mark.parametrize("share", SHARES)
def test_dropout_is_the_same_in_every_place(share):
    problem = make_problem(50, 64, 48, 6, 2, ALL, routing="sparse")
    ours = run(problem, Gpu("cpu", cpu_share=share), dropout=0.3, seed=11)
    assert_formula(ours, problem, reference.dropout_masks(problem, 0.3, 11), 0.3)


def test_bits_do_not_depend_on_slots_or_what_lies_in_them():
    problem = make_problem(80, 64, 48, 12, 4, ALL)
    first = run(problem, Gpu("cpu", few_slots(problem, 1), 0.25))
    for slots in (2, 3, 5, 12):
        experts = experts_of(problem, Gpu("cpu", few_slots(problem, slots), 0.25))
        for _ in range(3):
            same(run_ours(problem, experts.runtime, experts=experts), first)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_that_crosses_gives_the_same_bits(share, dropout, monkeypatch):
    problem = make_problem(50, 64, 48, 6, 2, ALL)
    expected = run(problem, Gpu("cpu", cpu_share=share), dropout=dropout, seed=5)
    monkeypatch.setattr(Streams, "has", lambda self, tensor: False)  # as if it were on the host
    same(run(problem, Gpu("cpu", cpu_share=share), dropout=dropout, seed=5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_that_is_locked_no_more_crosses_by_a_copy(dtype, monkeypatch):
    """As where its model is gone before backward: a GPU that read it where it lies would fail for good."""
    problem = make_problem(50, 64, 48, 6, 2, ALL, lora_dtype=dtype)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.4))
    expected = run_ours(problem, experts.runtime, experts=experts)
    monkeypatch.setattr(Streams, "has", lambda self, tensor: False)
    copy_from_host = torch_products.copy_from_host
    read: set[int] = set()

    def noted(to, source, index=None):
        read.add(source.data_ptr())
        copy_from_host(to, source, index)

    monkeypatch.setattr(torch_products, "copy_from_host", noted)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in problem.leaves().items()}
    lora = {k: leaves[k] for k in problem.lora}
    inputs = leaves["hidden_states"], problem.topk_ids, leaves["topk_weights"]
    out = kt_moe.moe(*inputs, experts, lora, scaling=problem.scaling)
    places = {tensor.data_ptr() for tensor in lora.values()}
    assert places <= read
    read.clear()
    monkeypatch.setattr(Streams, "reads", lambda self, tensor: tensor.data_ptr() not in places)
    out.backward(problem.grad_out)
    assert read
    assert not places & read
    same({"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}, expected)


def test_backward_has_the_lora_that_its_forward_sent(monkeypatch):
    """Where the device cannot read the matrices, the copies that the forward made serve its backward."""
    monkeypatch.setattr(Streams, "has", lambda self, tensor: False)
    monkeypatch.setattr(Streams, "reads", lambda self, tensor: False)
    problem = make_problem(50, 64, 48, 6, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.0))
    expected = run_ours(problem, experts.runtime, experts=experts)
    leaves = {k: v.clone().requires_grad_() for k, v in problem.leaves().items()}
    lora = {k: leaves[k] for k in problem.lora}
    out = kt_moe.moe(
        leaves["hidden_states"], problem.topk_ids, leaves["topk_weights"], experts, lora,
        scaling=problem.scaling,
    )  # fmt: skip
    for leaf in lora.values():
        leaf.data.fill_(1.0)
    out.backward(problem.grad_out)
    same({name: leaf.grad for name, leaf in leaves.items()}, {k: expected[k] for k in leaves})


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_ends_when_its_lora_has_been_read(fails, monkeypatch):
    problem = make_problem(20, 64, 48, 6, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.0))
    waited = []
    monkeypatch.setattr(_Done, "synchronize", lambda event: waited.append(event))
    read = _Done()

    def to_device(*arguments):
        return sent(*arguments)[0], read

    sent = lora_transfer.to_device
    monkeypatch.setattr(lora_transfer, "to_device", to_device)
    if fails:
        monkeypatch.setattr("kt_moe.gpu.engine.forward_chunk", None)
    with pytest.raises(TypeError) if fails else nullcontext():
        kt_moe.moe(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts, problem.lora)
    assert read in waited


def test_layers_prefetch_and_repeat_bit_for_bit():
    gpu = Gpu("cpu", rates=RATES)
    layers = [make_problem(60, 64, 48, 8, 2, ALL, seed=seed) for seed in range(4)]
    experts = [experts_of(problem, gpu) for problem in layers]
    gpu.memory = few_slots(layers[0], 11)  # less than two layers of eight

    def step() -> list[torch.Tensor]:
        x = layers[0].hidden_states.clone().requires_grad_()
        leaves = [{k: v.clone().requires_grad_() for k, v in p.lora.items()} for p in layers]
        y = x
        for problem, layer, lora in zip(layers, experts, leaves, strict=True):
            y = y + kt_moe.moe(y, problem.topk_ids, problem.topk_weights, layer, lora)
        y.backward(layers[0].grad_out)
        return [y.detach(), x.grad, *(v.grad for lora in leaves for v in lora.values())]

    first = step()
    engine = gpu.engine(torch.device("cpu"))
    moved = engine._slots.bytes_moved
    for _ in range(2):
        assert all(map(torch.equal, step(), first))
    # Two steps of two passes through four layers, less what was still there at the turning points.
    whole = sum(e.nbytes for e in experts)
    assert moved < 2 * whole
    assert engine._slots.bytes_moved - moved < 2 * (2 * whole - moved // 4)


@pytest.mark.parametrize("slots", [4, 6, 8, 10, 12, 16])
@pytest.mark.parametrize("mode", ["recompute", "retain"])
def test_checkpointing_moves_experts_once_in_each_direction(slots, mode):
    problem = make_problem(60, 64, 48, 4, 2, ALL)
    gpu = Gpu("cpu", few_slots(problem, slots), 0.0)
    layers = [experts_of(problem, gpu) for _ in range(4)]
    lora = {name: tensor.requires_grad_() for name, tensor in problem.lora.items()}

    def forward(x: torch.Tensor, experts: kt_moe.Experts) -> torch.Tensor:
        return kt_moe.moe(x, problem.topk_ids, problem.topk_weights, experts, lora)

    moved = []
    for _ in range(3):
        x = problem.hidden_states.clone().requires_grad_()
        for experts in layers:
            experts.checkpoint_experts = mode
            x = checkpoint(forward, x, experts, use_reentrant=False)
        x.sum().backward()
        moved.append(gpu.engine(torch.device("cpu"))._slots.bytes_moved)
    # Four experts of four layers forward and back, less what is still there where the direction turns.
    assert (moved[2] - moved[1]) // (layers[0].nbytes // 4) <= 2 * (16 - slots) + 4


def test_everything_crosses_once_where_it_fits():
    problem = make_problem(60, 64, 48, 8, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.0))
    for _ in range(3):
        run_ours(problem, experts.runtime, experts=experts)
    engine = experts.gpu.engine(torch.device("cpu"))
    routed = len(set(problem.topk_ids.flatten().tolist()))
    assert engine._slots.bytes_moved == routed * experts.nbytes // 8


def test_a_forward_that_is_computed_again_is_divided_as_the_first_time():
    problem = make_problem(60, 64, 48, 8, 2, ALL, routing="sparse")
    lora = {name: tensor.requires_grad_() for name, tensor in problem.lora.items()}
    device = torch.device("cpu")
    changed = 0
    for link in 10.0 ** np.arange(6.0, 10.0, 0.25):
        # Another layer that is given the same Gpu leaves fewer slots for this one, which the cut counts.
        rates = Rates(link=link, gpu_flops=1e13, gpu_bytes=1e12, cpu_flops=1e10, cpu_bytes=1e9)
        gpu = Gpu("cpu", few_slots(problem, 6), rates=rates)
        experts, others = experts_of(problem, gpu), []

        def forward(x, experts=experts):
            return kt_moe.moe(x, problem.topk_ids, problem.topk_weights, experts, lora)

        rows = []
        for _ in range(2):
            hidden = problem.hidden_states.clone().requires_grad_()
            out = checkpoint(forward, hidden, use_reentrant=False)
            (first,) = gpu.engine(device).log.last.values()
            others += [experts_of(problem, gpu) for _ in range(3)]
            out.sum().backward()  # torch raises if what is saved has other shapes than the first time
            again, back = gpu.engine(device).log.last.values()
            assert first.gpu_rows == again.gpu_rows == back.gpu_rows
            rows.append(first.gpu_rows)
            gpu.engine(device).log.last.clear()
        changed += rows[0] != rows[1]
    assert changed > 0


def test_several_forwards_before_any_backward():
    problems_ = [make_problem(30, 64, 48, 6, 2, ALL, seed=seed) for seed in (1, 2, 3)]
    experts = experts_of(problems_[0], Gpu("cpu", few_slots(problems_[0], 4), 0.3))
    expected, outs, leaves = [], [], []
    for p in problems_:
        p.weights = problems_[0].weights
        expected.append(run_ours(p, experts.runtime, experts=experts))
    for p in problems_:
        leaf = {k: v.clone().requires_grad_() for k, v in p.leaves().items()}
        lora = {k: leaf[k] for k in p.lora}
        leaves.append(leaf)
        outs.append(
            kt_moe.moe(
                leaf["hidden_states"], p.topk_ids, leaf["topk_weights"], experts, lora, scaling=p.scaling
            )
        )
    for p, out in zip(reversed(problems_), reversed(outs), strict=True):
        out.backward(p.grad_out)
    for leaf, truth, out in zip(leaves, expected, outs, strict=True):
        same({"out": out.detach(), **{k: v.grad for k, v in leaf.items()}}, truth)


def test_only_wanted_gradients():
    problem = make_problem(30, 64, 48, 6, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.4))
    names = list(problem.leaves())
    for wanted in itertools.chain([()], itertools.combinations(names, 1), [tuple(names)]):
        leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in problem.leaves().items()}
        lora = {k: leaves[k] for k in problem.lora}
        out = kt_moe.moe(
            leaves["hidden_states"], problem.topk_ids, leaves["topk_weights"], experts, lora,
            scaling=problem.scaling,
        )  # fmt: skip
        if wanted:
            out.backward(problem.grad_out)
        else:
            assert not out.requires_grad
        full = run_ours(problem, experts.runtime, experts=experts)
        for name, leaf in leaves.items():
            if name in wanted:
                assert torch.equal(leaf.grad, full[name]), name
            else:
                assert leaf.grad is None


def test_routes_are_counted_wherever_they_are_computed():
    problem = make_problem(50, 64, 48, 6, 3, ALL, routing="sparse")
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.5))
    run_ours(problem, experts.runtime, experts=experts)
    counts = torch.bincount(problem.topk_ids.flatten(), minlength=7)[:6]
    assert torch.equal(experts.routed, counts)
    experts.reset_routed()
    assert not experts.routed.any()


def test_threads_share_an_engine():
    problem = make_problem(40, 64, 48, 8, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", few_slots(problem, 3), 0.3))
    expected = run_ours(problem, experts.runtime, experts=experts)
    results: list[dict] = []
    threads = [
        threading.Thread(target=lambda: results.append(run_ours(problem, experts.runtime, experts=experts)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        same(result, expected)


def test_a_layer_that_goes_leaves_its_slots():
    gpu = Gpu("cpu", cpu_share=0.0)
    problem = make_problem(20, 64, 48, 4, 2, ALL)
    keep = experts_of(problem, gpu)
    gone = experts_of(problem, gpu)
    expected = run_ours(problem, keep.runtime, experts=keep)
    run_ours(problem, gone.runtime, experts=gone)
    del gone
    other = make_problem(20, 64, 48, 4, 2, ALL, seed=5)
    new = experts_of(other, gpu)
    same(run_ours(problem, keep.runtime, experts=keep), expected)
    assert_formula(run_ours(other, new.runtime, experts=new), other)


@pytest.mark.parametrize("way", ["backward", "copy", "prefetch", "replaced"])
def test_a_layer_that_is_given_another_gpu(way):
    """What the first one knows of it goes, and comes back with a pass that still needs it."""
    large, small = make_problem(20, 64, 48, 4, 2, ALL), make_problem(20, 16, 16, 4, 2, ALL, routing="one")
    gpu = Gpu("cpu", cpu_share=0.0)
    experts, other = experts_of(large, gpu), experts_of(small, gpu)
    expected, of_other = (run_ours(p, e.runtime, experts=e) for p, e in ((large, experts), (small, other)))
    run_ours(large, experts.runtime, experts=experts)
    if way == "backward":
        hidden = large.hidden_states.clone().requires_grad_()
        lora = {name: tensor.clone().requires_grad_() for name, tensor in large.lora.items()}
        out = kt_moe.moe(hidden, large.topk_ids, large.topk_weights, experts, lora, scaling=large.scaling)
        del other
        experts.gpu = "off"
        out.backward(large.grad_out)
        assert torch.equal(hidden.grad, expected["hidden_states"])
    elif way == "copy":
        copied = copy.deepcopy(experts)
        del other
        copied.gpu = "off"
        same(run_ours(large, experts.runtime, experts=experts), expected)
    elif way == "prefetch":  # of an expert that is larger than slots are now
        experts.gpu = "off"
        same(run_ours(small, other.runtime, experts=other), of_other)
        numbers = {layer for layer, _ in gpu.engine(torch.device("cpu"))._slots._slot_of}
        assert numbers == {1}
    else:  # by one of as many experts, which find its slots
        experts.gpu = "off"
        new = experts_of(large, gpu)
        same(run_ours(large, new.runtime, experts=new), expected)


def test_a_layer_that_goes_in_the_pass_of_one_that_replaces_it(monkeypatch):
    gpu = Gpu("cpu", cpu_share=0.0)
    problem = make_problem(20, 64, 48, 4, 2, ALL)
    old = [experts_of(problem, gpu)]
    expected = run_ours(problem, old[0].runtime, experts=old[0])
    new = experts_of(problem, gpu)
    to_device = lora_transfer.to_device

    def and_collect(*arguments):
        old.clear()
        return to_device(*arguments)

    monkeypatch.setattr(lora_transfer, "to_device", and_collect)
    same(run_ours(problem, new.runtime, experts=new), expected)


@pytest.mark.parametrize("place", ["weakref.finalize", "PassOrder.forget", "Slots.forget"])
def test_an_interrupt_as_a_layer_comes_or_goes(place, monkeypatch):
    """Its slots are another one's later."""
    gpu, problem = Gpu("cpu", cpu_share=0.0), make_problem(20, 64, 48, 4, 2, ALL)
    experts = experts_of(problem, gpu)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "weakref.finalize":
            patch.setattr(f"kt_moe.gpu.engine.{place}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_ours(problem, experts.runtime, experts=experts)
    expected = run_ours(problem, experts.runtime, experts=experts)
    del experts
    with monkeypatch.context() as patch:
        if place != "weakref.finalize":
            patch.setattr(f"kt_moe.gpu.engine.{place}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                gpu.report()
    new = experts_of(problem, gpu)
    same(run_ours(problem, new.runtime, experts=new), expected)


def test_layers_come_and_go_beside_a_pass():
    gpu, problem = Gpu("cpu"), make_problem(0, 16, 16, 2, 1, {})
    stays, *others = (experts_of(problem, gpu) for _ in range(9))
    one = gpu._layers.stored(stays)
    threads, ends = [], time.monotonic() + 0.5
    interval = sys.getswitchinterval()

    def come_and_go(experts: kt_moe.Experts) -> None:
        while time.monotonic() < ends:
            for choice in ("off", gpu):
                experts.gpu = choice

    sys.setswitchinterval(1e-6)
    try:
        for experts in others:
            threads.append(threading.Thread(target=come_and_go, args=(experts,)))
            threads[-1].start()
        while time.monotonic() < ends:
            slot_bytes, number = gpu._layers.sizes()
            assert slot_bytes == one.slot_bytes
            assert 2 <= number <= 18
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert gpu._layers.sizes() == (one.slot_bytes, 18)


def test_measured_rates_serve_the_cut():
    problem = make_problem(40, 64, 48, 8, 2, ALL)
    gpu = Gpu("cpu")
    assert gpu.rates is None
    experts = experts_of(problem, gpu)
    ours = run_ours(problem, experts.runtime, experts=experts)
    assert isinstance(gpu.rates, Rates)
    assert_formula(ours, problem)
    counts = torch.bincount(problem.topk_ids.flatten(), minlength=8)
    assert torch.equal(experts.routed, counts)  # measuring counts no routes


@pytest.mark.parametrize("rates", [None, RATES])
def test_the_rest_of_the_model_is_measured_unless_rates_are_given(rates):
    problem = make_problem(8, 64, 48, 8, 2, ALL)
    gpu = Gpu("cpu", rates=rates)
    layers = [experts_of(problem, gpu) for _ in range(3)]
    lora = {name: tensor.requires_grad_() for name, tensor in problem.lora.items()}
    found = []
    for _ in range(4):
        hidden = problem.hidden_states.clone().requires_grad_()
        for experts in layers:
            time.sleep(0.02)  # in the place of attention
            hidden = kt_moe.moe(hidden, problem.topk_ids, problem.topk_weights, experts, lora)
        hidden.sum().backward()
        found.append(gpu.rates.rest_seconds)
    assert found[:2] == [0.0, 0.0]
    if rates is None:
        assert (
            0.02 * 2 / 3 * 0.9 < found[2] == found[3]
        )  # forward alone, as nothing is behind the first layer
    else:
        assert gpu.rates == RATES


@pytest.mark.parametrize("share", [0.0, 0.5, "auto"])
def test_first_called_in_inference_mode(share):
    problem = make_problem(30, 64, 48, 6, 2, ALL)
    with torch.inference_mode():
        experts = experts_of(problem, Gpu("cpu", few_slots(problem, 3), share, RATES))
        first = kt_moe.moe(
            problem.hidden_states, problem.topk_ids, problem.topk_weights, experts, problem.lora
        )
    assert_formula(run_ours(problem, experts.runtime, experts=experts), problem)
    again = kt_moe.moe(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts, problem.lora)
    assert torch.equal(first, again) or share == "auto"  # a forward alone may be divided in another way
    experts.reset_routed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_measuring_under_another_default_dtype_leaves_torch_as_it_was(dtype):
    problem = make_problem(30, 64, 48, 6, 2, ALL)
    state = torch.get_rng_state()
    torch.set_default_dtype(dtype)
    try:
        ours = run(problem, Gpu("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_formula(ours, problem)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fork_beside_a_pass():
    problem = make_problem(30, 64, 48, 6, 2, ALL)
    gpu = Gpu("cpu", cpu_share=0.5)
    experts = experts_of(problem, gpu)
    expected = run_ours(problem, experts.runtime, experts=experts)
    engine = gpu.engine(torch.device("cpu"))
    held = threading.Thread(target=lambda: engine.lock.acquire())
    held.start()
    held.join()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            again = kt_moe.moe(
                problem.hidden_states[:0], problem.topk_ids[:0], problem.topk_weights[:0], experts
            )
            os._exit(0 if len(again) == 0 and gpu.report() else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert expected


def test_worker_does_jobs_in_order_and_hands_on_exceptions():
    worker, done = Worker(), []
    jobs = [worker.submit(lambda i=i: done.append(i)) for i in range(20)]

    def fail():
        raise KeyError("a job's own")

    bad = worker.submit(fail)
    for job in jobs:
        job.wait()
    assert done == list(range(20))
    for _ in range(2):
        with pytest.raises(KeyError, match="a job's own"):
            bad.wait()
    thread = worker._thread
    worker.finish()
    assert not thread.is_alive()
    worker.submit(lambda: done.append("again")).wait()
    assert done[-1] == "again"
    thread = worker._thread
    del worker
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("started", [False, True])
def test_a_worker_whose_start_is_interrupted(started, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        if started:
            start(thread)
        raise KeyboardInterrupt

    worker, done = Worker(), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.submit(lambda: done.append("lost"))
    job = worker.submit(lambda: done.append("done"))
    deadline = time.monotonic() + 10
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == ["done"]
    job.wait()
    worker.finish()


def test_a_gpu_is_not_pickled():
    with pytest.raises(TypeError, match=r"cannot pickle a kt_moe\.Gpu"):
        pickle.dumps(Gpu())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": 10**400}, "memory is 1000"),
        ({"device": "cuda:999999"}, "device is 'cuda:999999'"),
        ({"device": b"cuda"}, "device is b'cuda'"),
        ({"device": 10**30}, "device is 1000"),
        ({"memory": np.ones(2)}, "memory is array"),
        ({"cpu_share": np.ones(2)}, "cpu_share is array"),
        ({"memory": "8"}, "memory is '8', wanted a positive number of bytes"),
        ({"memory": "lots"}, "memory is 'lots', wanted a positive number of bytes"),
        ({"memory": 0}, "memory is 0"),
        ({"memory": True}, "memory is True"),
        ({"memory": float("nan")}, "memory is nan"),
        ({"cpu_share": 1.5}, r"cpu_share is 1.5, wanted \"auto\" or a number from 0.0 to 1.0"),
        ({"cpu_share": "most"}, "cpu_share is 'most'"),
        ({"cpu_share": float("nan")}, "cpu_share is nan"),
        ({"device": "mps"}, "device is 'mps'"),
        ({"device": "cuda:x"}, "device is 'cuda:x'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        Gpu(**options)


def test_numbers_of_other_libraries():
    gpu = Gpu(
        "cpu:0", np.int64(1 << 20), np.float32(0.5), Rates(*map(np.float64, (1e9, 1e12, 1e11, 1e11, 1e10)))
    )
    assert (gpu.device, gpu.memory, gpu.cpu_share) == (torch.device("cpu"), 1 << 20, 0.5)
    assert copy.copy(gpu) is gpu


def test_rates_are_floats_whatever_they_were():
    for number in (np.int8(100), np.float16(100), Fraction(100)):
        rates = Rates(*[number] * 6)
        assert all(type(value) is float and value == 100.0 for value in vars(rates).values())


@pytest.mark.parametrize("bad", [True, 10**400, "1e9", float("nan"), float("inf"), 1e-300])
def test_rates_out_of_range(bad):
    with pytest.raises(ValueError, match="Rates: link is "):
        Rates(bad, 1, 1, 1, 1)


def test_bad_rates():
    with pytest.raises(ValueError, match="Rates: link is 0"):
        Rates(0, 1, 1, 1, 1)
    with pytest.raises(TypeError, match="rates is a dict"):
        Gpu(rates={})


def test_memory_as_people_write_it():
    assert Gpu(memory="6GiB").memory == 6 * 2**30
    assert Gpu(memory="1.5 GB").memory == 1_500_000_000
    assert Gpu(memory=1e9).memory == 10**9
    assert Gpu(memory="512MiB").memory == 2**29


def test_a_budget_below_one_expert_is_refused_and_a_larger_one_works():
    problem = make_problem(20, 64, 48, 4, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", 1000, 0.0))
    with pytest.raises(ValueError, match="GPU memory for experts is 1000 bytes, wanted at least 18432"):
        run_ours(problem, experts.runtime, experts=experts)
    experts.gpu.memory = 40_000
    assert_formula(run_ours(problem, experts.runtime, experts=experts), problem)


@pytest.mark.parametrize("bad", [-1, 9])
def test_ids_out_of_range(bad):
    problem = make_problem(20, 64, 48, 8, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.3))
    expected = run_ours(problem, experts.runtime, experts=experts)
    ids = problem.topk_ids.clone()
    ids[3, 1] = bad
    with pytest.raises(ValueError, match=rf"topk_ids\[3, 1\] is {bad}, wanted an expert in \[0, 8\)"):
        kt_moe.moe(problem.hidden_states, ids, problem.topk_weights, experts)
    same(run_ours(problem, experts.runtime, experts=experts), expected)


def test_bad_arguments_are_named():
    problem = make_problem(20, 64, 48, 8, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", cpu_share=0.3))
    x, ids, w, lora = problem.hidden_states, problem.topk_ids, problem.topk_weights, problem.lora
    for arguments, says in (
        ((x[:, :60], ids, w, lora), r"hidden_states has shape \[20, 60\], wanted \[T, 64\]"),
        ((x, ids[:10], w, lora), r"topk_ids has shape \[10, 2\], wanted \[20, K\]"),
        ((x, ids.short(), w, lora), "topk_ids is torch.int16, wanted int64 or int32"),
        ((x, ids, w[:, :1], lora), r"topk_weights has shape \[20, 1\]"),
        ((x, ids, w, {"gate_lora_a": lora["gate_lora_a"]}), "gate_lora_a is given without gate_lora_b"),
        ((x, ids, w, lora | {"up_lora_b": lora["up_lora_b"][:, :-1]}), r"up_lora_b has shape \[8, 47, 16\]"),
        ((x, ids, w, lora | {"down_lora_a": lora["down_lora_a"].half()}), "down_lora_a is torch.float16"),
    ):
        given_x, given_ids, given_w, given_lora = arguments
        with pytest.raises(ValueError, match=says):
            kt_moe.moe(given_x, given_ids, given_w, experts, given_lora)


def test_a_fault_in_the_middle_leaves_a_working_engine(monkeypatch):
    problem = make_problem(40, 64, 48, 8, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", few_slots(problem, 3), 0.3))
    expected = run_ours(problem, experts.runtime, experts=experts)
    from kt_moe.gpu import engine as module

    calls = itertools.count()

    def out_of_memory(*args):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward_chunk(*args)

    forward_chunk = module.forward_chunk
    with monkeypatch.context() as patch:
        patch.setattr(module, "forward_chunk", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="less of it"):
            run_ours(problem, experts.runtime, experts=experts)
    same(run_ours(problem, experts.runtime, experts=experts), expected)


def test_memory_that_is_not_page_locked_is_staged():
    problem = make_problem(40, 64, 48, 8, 2, ALL)
    experts = experts_of(problem, Gpu("cpu", few_slots(problem, 5), 0.0))
    assert_formula(run_ours(problem, experts.runtime, experts=experts), problem)
    assert not experts.gpu._layers.stored(experts).pinned  # there is no CUDA device


def test_off_and_devices():
    problem = make_problem(20, 64, 48, 4, 2, ALL)
    experts = experts_of(problem, "off")
    assert experts.gpu.cpu_share == 1.0
    assert experts.gpu.engine(torch.device("cpu")) is None
    with pytest.raises(TypeError, match="gpu is a int"):
        experts.gpu = 3
    experts.gpu = "cuda:1"
    with pytest.raises(ValueError, match="hidden_states is on cuda:0, the experts are for cuda:1"):
        experts.gpu.engine(torch.device("cuda:0"))
