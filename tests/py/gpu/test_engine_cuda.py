"""Layers with hidden states on a CUDA device: numbers, streams, memory and faults."""

from __future__ import annotations

import itertools
import os
import random
import signal

import numpy as np
import pytest
import reference
import torch
from reference import Problem, relative_error
from strategies import make_problem
from test_layer import ALL

import kt_moe
from kt_moe import Gpu
from kt_moe.experts import FORMATS

CUDA = torch.device("cuda", 0)
PROBLEMS = {
    "even": lambda: make_problem(300, 256, 192, 8, 4, ALL),
    "odd": lambda: make_problem(
        100, 200, 333, 3, 2, {"gate": 5, "up": 64, "down": 1}, activation="gpt_oss",
        biased=("gate", "up", "down"),
    ),
    "no LoRA": lambda: make_problem(70, 64, 48, 9, 3, {}, routing="sparse"),
    "one LoRA": lambda: make_problem(33, 257, 65, 6, 3, {"down": 8}, biased=("up",)),
    "many rows": lambda: make_problem(1500, 512, 256, 16, 4, ALL, lora_dtype=torch.bfloat16),
    "one expert": lambda: make_problem(200, 128, 96, 4, 2, ALL, routing="one"),
    "no gate": lambda: make_problem(
        300, 256, 192, 8, 3, ALL, activation="relu2", biased=("up", "down"), gated=False
    ),
    "no gate, narrow": lambda: make_problem(
        64, 96, 24, 4, 2, {"up": 5}, activation="clamped_silu", biased=("up",), gated=False
    ),
    "nothing": lambda: make_problem(20, 64, 48, 4, 2, ALL, routing="none"),
}  # fmt: skip


def experts_of(problem: Problem, gpu: Gpu | str, format: str = "bf16", shards: int = 1) -> kt_moe.Experts:
    biases = {f"{p}_bias": b for p, b in zip(reference.PROJECTIONS, problem.biases, strict=True)}
    return kt_moe.Experts(
        *problem.weights, **biases, activation=problem.activation, format=format, gpu=gpu,
        runtime=kt_moe.Runtime(4, shards),
    )  # fmt: skip


def run(
    problem: Problem, experts: kt_moe.Experts, lora_device: str = "cuda", dropout: float = 0.0,
    seed: int | None = None, dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:  # fmt: skip
    leaves = {
        k: v.detach().to("cuda" if k in ("hidden_states", "topk_weights") else lora_device, copy=True)
        for k, v in problem.leaves().items()
    }
    leaves["hidden_states"] = leaves["hidden_states"].to(dtype)
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = kt_moe.moe(
        leaves["hidden_states"], problem.topk_ids.cuda(), leaves["topk_weights"], experts,
        {k: leaves[k] for k in problem.lora}, scaling=problem.scaling, dropout=dropout, seed=seed,
    )  # fmt: skip
    out.backward(problem.grad_out.to("cuda", out.dtype))
    for name, leaf in leaves.items():
        assert leaf.grad.device == leaf.device, name
        assert leaf.grad.dtype == leaf.dtype, name
    return {"out": out.detach().cpu(), **{k: v.grad.cpu() for k, v in leaves.items()}}


def same(a: dict, b: dict) -> None:
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def assert_formula(ours: dict, problem: Problem, masks=None, p_drop: float = 0.0) -> None:
    # Sums in another order than the reference flip a rounding here and there.
    truth = reference.run_rounded(problem, masks, p_drop)
    for name, value in ours.items():
        assert relative_error(value, truth[name]) <= (2e-3 if value.numel() >= 64 else 2**-7), name


@pytest.mark.parametrize("lora_device", ["cuda", "cpu"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_numbers_and_bits(name, share, lora_device):
    problem = PROBLEMS[name]()
    experts = experts_of(problem, Gpu(memory="256MiB", cpu_share=share))
    ours = run(problem, experts, lora_device)
    assert_formula(ours, problem)
    truth, eager = reference.run(problem, torch.float64), reference.run(problem, torch.bfloat16)
    for key, value in ours.items():
        assert relative_error(value, truth[key]) <= relative_error(eager[key], truth[key]), key
    same(run(problem, experts, lora_device), ours)
    # With hardly any room on the GPU: other chunks, the same bits.
    experts.gpu.memory = 2 * experts.gpu._layers.sizes()[0]
    same(run(problem, experts, lora_device), ours)


@pytest.mark.parametrize(("name", "shards"), [("even", 1), ("even", 3), ("no gate", 3)])
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, name, shards):
    problem = PROBLEMS[name]()
    experts = experts_of(problem, Gpu(cpu_share=0.3), format, shards)
    ours = run(problem, experts)
    assert experts.gpu._layers.stored(experts).pinned
    problem.weights = experts.dequantize()
    assert_formula(ours, problem)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_dropout(share):
    problem = PROBLEMS["even"]()
    ours = run(problem, experts_of(problem, Gpu(cpu_share=share)), dropout=0.3, seed=7)
    assert_formula(ours, problem, reference.dropout_masks(problem, 0.3, 7), 0.3)


def test_matrices_on_the_host_that_an_optimizer_changes_unnoticed():
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.0))
    lora = {k: v.clone() for k, v in problem.lora.items()}
    arguments = problem.hidden_states.cuda(), problem.topk_ids.cuda(), problem.topk_weights.cuda(), experts
    before = kt_moe.moe(*arguments, lora)
    for matrix in lora.values():
        matrix.data.mul_(2.0)  # does not count up its version
    changed = kt_moe.moe(*arguments, lora)
    assert not torch.equal(before, changed)
    assert torch.equal(changed, kt_moe.moe(*arguments, {k: v.cuda() for k, v in lora.items()}))


def test_a_gradient_in_host_memory_is_the_one_that_was_written():
    problem = make_problem(60, 64, 48, 8, 2, ALL)
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    lora = {name: tensor.cpu().pin_memory().requires_grad_() for name, tensor in problem.lora.items()}
    hidden = problem.hidden_states.cuda()
    kt_moe.moe(hidden, problem.topk_ids.cuda(), problem.topk_weights.cuda(), experts, lora).sum().backward()
    # Autograd copies a gradient that something else refers to, into pageable memory.
    assert all(tensor.grad.is_pinned() for tensor in lora.values())


def test_off_is_the_cpu_bit_for_bit():
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, "off")
    ours = run(problem, experts, "cpu")
    leaves = {k: v.detach().clone().requires_grad_() for k, v in problem.leaves().items()}
    out = kt_moe.moe(
        leaves["hidden_states"], problem.topk_ids, leaves["topk_weights"], experts,
        {k: leaves[k] for k in problem.lora}, scaling=problem.scaling,
    )  # fmt: skip
    out.backward(problem.grad_out)
    same({"out": out.detach(), **{k: v.grad for k, v in leaves.items()}}, ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_of_hidden_states(dtype):
    problem = PROBLEMS["even"]()
    ours = run(problem, experts_of(problem, Gpu(cpu_share=0.3)), dtype=dtype)
    truth = reference.run(problem, torch.float64)
    for name, value in ours.items():
        assert relative_error(value, truth[name]) < 1e-2, name


def test_autocast_changes_nothing():
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    expected = run(problem, experts)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            same(run(problem, experts), expected)


def test_layers_on_several_streams():
    problems = [make_problem(400, 256, 192, 8, 4, ALL, seed=seed) for seed in range(6)]
    gpu = Gpu(memory="2MiB", cpu_share=0.3)
    experts = [experts_of(problem, gpu) for problem in problems]
    expected = [run(problem, layer) for problem, layer in zip(problems, experts, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs = []
    for i, (problem, layer) in enumerate(zip(problems, experts, strict=True)):
        with torch.cuda.stream(streams[i % 3]):
            x = problem.hidden_states.cuda()
            lora = {k: v.cuda() for k, v in problem.lora.items()}
            for _ in range(3):
                out = kt_moe.moe(
                    x,
                    problem.topk_ids.cuda(),
                    problem.topk_weights.cuda(),
                    layer,
                    lora,
                    scaling=problem.scaling,
                )
            outs.append(out)
    torch.cuda.synchronize()
    for out, truth in zip(outs, expected, strict=True):
        assert torch.equal(out.cpu(), truth["out"])


def test_compiled_around_it():
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    ids, weights = problem.topk_ids.cuda(), problem.topk_weights.cuda()

    def model(x):
        return kt_moe.moe(x * 2, ids, weights, experts) + 1

    x = problem.hidden_states.cuda()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(model, backend=count)(x), model(x))
    assert len(graphs) == 2  # one graph break


def test_memory_is_flat_and_within_the_budget():
    problem = make_problem(2000, 512, 256, 64, 4, ALL)
    gpu = Gpu(memory="12MiB", cpu_share=0.2)
    experts = [experts_of(problem, gpu) for _ in range(4)]
    used = []
    for step in range(60):
        gpu.cpu_share = random.Random(step).random()
        for layer in experts:
            run(problem, layer)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[5:])) == 1
    slots = gpu.engine(CUDA)._slots
    assert slots.memory.numel() <= 12 * 2**20


def test_out_of_memory_in_the_middle_and_on():
    problem = make_problem(4000, 1024, 512, 8, 4, ALL)
    gpu = Gpu(memory="64MiB", cpu_share=0.3)
    experts = experts_of(problem, gpu)
    expected = run(problem, experts)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (80 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="Nothing is lost"):
            run(problem, experts)
        gpu.memory = "8MiB"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    same(run(problem, experts), expected)


def test_interrupts():
    problem = PROBLEMS["many rows"]()
    experts = experts_of(problem, Gpu(memory="1MiB", cpu_share=0.3))
    expected = run(problem, experts)
    interrupted = 0
    for i in range(60):
        signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0002 * i)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            run(problem, experts)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert interrupted
    same(run(problem, experts), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_on_the_cpu():
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    run(problem, experts)
    expected = kt_moe.moe(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts)
    child = os.fork()
    if child == 0:
        try:
            again = kt_moe.moe(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts)
            # By numpy: torch.equal waits for OpenMP's threads, which a forked child lacks.
            os._exit(0 if np.array_equal(*(t.view(torch.int16).numpy() for t in (again, expected))) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    run(problem, experts)


def test_nan_weights_reach_their_tokens_alone():
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    weights = problem.topk_weights.clone()
    weights[5, 2] = float("nan")
    out = kt_moe.moe(problem.hidden_states.cuda(), problem.topk_ids.cuda(), weights.cuda(), experts)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_ids_out_of_range(bad):
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    ids = problem.topk_ids.clone()
    ids[7, 1] = bad
    with pytest.raises(ValueError, match=rf"topk_ids\[7, 1\] is {bad}"):
        kt_moe.moe(problem.hidden_states.cuda(), ids.cuda(), problem.topk_weights.cuda(), experts)
    run(problem, experts)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    expected = run(problem, experts)
    leaves = {k: v.detach().cuda().requires_grad_() for k, v in problem.leaves().items()}

    def layer(x, w):
        lora = {k: leaves[k] for k in problem.lora}
        return kt_moe.moe(x, problem.topk_ids.cuda(), w, experts, lora, scaling=problem.scaling)

    out = torch.utils.checkpoint.checkpoint(
        layer, leaves["hidden_states"], leaves["topk_weights"], use_reentrant=reentrant
    )
    out.backward(problem.grad_out.cuda())
    same({"out": out.detach().cpu(), **{k: v.grad.cpu() for k, v in leaves.items()}}, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_layers_on_several_devices():
    problem = PROBLEMS["even"]()
    experts = experts_of(problem, Gpu(cpu_share=0.3))
    expected = run(problem, experts)["out"]
    for device in range(torch.cuda.device_count()):
        x, ids, w = (
            t.to(f"cuda:{device}") for t in (problem.hidden_states, problem.topk_ids, problem.topk_weights)
        )
        lora = {k: v.to(x.device) for k, v in problem.lora.items()}
        out = kt_moe.moe(x, ids, w, experts, lora, scaling=problem.scaling)
        assert out.device == x.device
        assert torch.equal(out.cpu(), expected)
    experts.gpu = "cuda:1"
    with pytest.raises(ValueError, match="hidden_states is on cuda:0, the experts are for cuda:1"):
        run(problem, experts)


def test_random_shares_follow_the_cpu():
    """Fifty steps of a small stack: the loss follows that of the CPU alone, and repeats bit for bit."""
    problems = [make_problem(256, 128, 96, 16, 4, ALL, seed=seed) for seed in range(3)]
    target = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)).cuda()

    def train(shares) -> list[float]:
        gpu = Gpu(memory="3MiB", cpu_share=1.0)
        experts = [experts_of(problem, gpu) for problem in problems]
        loras = [{k: (0.1 * v).cuda().requires_grad_() for k, v in p.lora.items()} for p in problems]
        optimizer = torch.optim.AdamW([v for lora in loras for v in lora.values()], lr=1e-3, fused=True)
        losses = []
        for share in shares:
            gpu.cpu_share = share
            x = problems[0].hidden_states.cuda()
            for problem, layer, lora in zip(problems, experts, loras, strict=True):
                out = kt_moe.moe(x, problem.topk_ids.cuda(), problem.topk_weights.cuda(), layer, lora)
                x = torch.nn.functional.layer_norm(x + out, (128,))
            loss = torch.nn.functional.mse_loss(x.float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    chosen = [random.Random(step).random() for step in range(50)]
    mixed = train(chosen)
    assert train(chosen) == mixed
    alone = train(itertools.repeat(1.0, 50))
    assert alone[-1] < 0.9 * alone[0]
    assert mixed == pytest.approx(alone, rel=2e-3)
