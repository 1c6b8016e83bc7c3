"""The layer against float64 PyTorch: values and gradients, for every kernel set this CPU runs."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Problem, relative_error
from strategies import ISAS, make_problem, problems, run_ours

import kt_moe

ALL = {"gate": 16, "up": 16, "down": 16}

# One flip of a bf16 rounding is 2^-8 of an element; a result of a few elements shows it undiluted.
ROUNDING_FLIP = 2.0**-8
FORMULA = 1e-3


@pytest.fixture(params=ISAS, scope="module")
def runtime(request) -> kt_moe.Runtime:
    return kt_moe.Runtime(threads=2, isa=request.param)


def assert_formula(ours: dict, problem: Problem, masks=None, p_drop: float = 0.0) -> None:
    """Against float64 that rounds where the core rounds: what remains is fp32 accumulation and rare flips."""
    truth = reference.run_rounded(problem, masks, p_drop)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        bound = FORMULA if value.numel() >= 64 else 2 * ROUNDING_FLIP
        assert relative_error(value, truth[name]) <= bound, name


def assert_as_good_as_eager(ours: dict, problem: Problem) -> None:
    truth, eager = reference.run(problem, torch.float64), reference.run(problem, torch.bfloat16)
    for name, value in ours.items():
        assert relative_error(value, truth[name]) <= relative_error(eager[name], truth[name]), name


@given(
    problem=problems(),
    isa=st.sampled_from(ISAS),
    shards=st.integers(1, 16),
    places=st.integers(1, 4),
    threads=st.integers(1, 5),
    recompute=st.booleans(),
)
def test_formula(problem, isa, shards, places, threads, recompute):
    runtime = kt_moe.Runtime(threads, shards, isa, nodes=[0] * places)
    assert_formula(run_ours(problem, runtime, recompute=recompute), problem)


@pytest.mark.parametrize(("shards", "places"), [(2, 1), (3, 3), (5, 2), (8, 8), (16, 4)])
def test_shards_are_as_good_as_bf16_eager_and_repeat_bit_for_bit(shards, places):
    problem = make_problem(100, 200, 333, 3, 2, {"gate": 5, "up": 64, "down": 1})
    ours = run_ours(problem, kt_moe.Runtime(2, shards, nodes=[0] * places))
    assert_as_good_as_eager(ours, problem)
    for threads in (1, 2, 7):
        again = run_ours(problem, kt_moe.Runtime(threads, shards, nodes=[0] * places))
        for name in ours:
            assert torch.equal(again[name], ours[name]), name


@pytest.mark.parametrize("routing", ["random", "one", "repeat", "sparse"])
@pytest.mark.parametrize(
    ("T", "H", "inner", "E", "K", "ranks"),
    [
        (64, 128, 96, 8, 4, ALL),
        (100, 200, 333, 3, 2, {"gate": 5, "up": 64, "down": 1}),
        (65, 96, 128, 4, 2, {}),
        (40, 257, 65, 6, 3, {"down": 8}),
        (700, 64, 48, 2, 1, ALL),  # more routes than one block
    ],
)
def test_error_is_no_larger_than_bf16_eager(runtime, T, H, inner, E, K, ranks, routing):
    problem = make_problem(T, H, inner, E, K, ranks, routing=routing)
    ours = run_ours(problem, runtime)
    assert_as_good_as_eager(ours, problem)
    assert_formula(ours, problem)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS.keys() - {"silu"}))
@pytest.mark.parametrize("T", [100, 700])
def test_a_layer_with_another_activation_and_biases(runtime, T, activation, recompute):
    # Not seed 0: a G of it lies so near a limit that the rounding of its LoRA product decides its gradient.
    problem = make_problem(T, 96, 80, 4, 2, ALL, seed=1, biased=reference.PROJECTIONS, activation=activation)
    ours = run_ours(problem, runtime, recompute=recompute)
    assert_as_good_as_eager(ours, problem)
    assert_formula(ours, problem)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("biased", [(), ("up", "down")])
def test_a_layer_without_a_gate(runtime, activation, biased, recompute):
    problem = make_problem(100, 96, 80, 4, 2, ALL, seed=1, biased=biased, activation=activation, gated=False)
    ours = run_ours(problem, runtime, recompute=recompute)
    assert "gate_lora_a" not in ours
    assert_as_good_as_eager(ours, problem)
    assert_formula(ours, problem)


def test_a_layer_that_is_cut_into_slices(runtime):
    """A quarter of any L2 cache holds fewer columns of these weights than there are: every product is cut."""
    problem = make_problem(24, 6000, 310, 2, 1, {"gate": 3, "up": 5, "down": 4})
    ours = run_ours(problem, runtime)
    assert_formula(ours, problem)
    for threads in (1, 5):
        again = run_ours(problem, kt_moe.Runtime(threads=threads, isa=runtime.isa))
        for name in ours:
            assert torch.equal(again[name], ours[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_input_dtypes(runtime, dtype):
    problem = make_problem(33, 64, 48, 4, 2, ALL)
    ours = run_ours(problem, runtime)
    problem.hidden_states, problem.grad_out = problem.hidden_states.to(dtype), problem.grad_out.to(dtype)
    other = run_ours(problem, runtime)
    for name in ours:
        assert other[name].dtype is (dtype if name in ("out", "hidden_states") else torch.float32)
        assert relative_error(other[name], ours[name]) < (0.004 if name in ("out", "hidden_states") else 1e-6)


def test_bf16_lora_gets_bf16_gradients_accumulated_in_fp32(runtime):
    problem = make_problem(600, 32, 32, 2, 2, ALL, routing="one", lora_dtype=torch.bfloat16)
    ours = run_ours(problem, runtime)
    truth = reference.run_rounded(problem)
    for name in problem.lora:
        assert ours[name].dtype is torch.bfloat16
        assert relative_error(ours[name], truth[name]) < 2.0**-8


def test_one_tensor_may_be_lora_a_of_gate_and_up(runtime):
    problem = make_problem(20, 32, 48, 4, 2, ALL)
    problem.lora["up_lora_a"] = problem.lora["gate_lora_a"]
    apart = run_ours(problem, runtime)
    experts = kt_moe.Experts(*problem.weights, runtime=runtime)
    lora = {k: v.clone().requires_grad_() for k, v in problem.lora.items() if k != "up_lora_a"}
    together = {**lora, "up_lora_a": lora["gate_lora_a"]}
    args = problem.hidden_states, problem.topk_ids, problem.topk_weights, experts, together
    kt_moe.moe(*args, scaling=problem.scaling).backward(problem.grad_out)
    assert torch.equal(lora["gate_lora_a"].grad, apart["gate_lora_a"] + apart["up_lora_a"])


def test_idle_experts_get_zero_gradients(runtime):
    problem = make_problem(9, 16, 16, 5, 1, ALL, routing="one")
    ours = run_ours(problem, runtime)
    for name in problem.lora:
        assert ours[name][0].any()
        assert not ours[name][1:].any()


def test_no_tokens_and_no_routes(runtime):
    for T, routing in ((0, "random"), (5, "none")):
        ours = run_ours(make_problem(T, 16, 24, 3, 2, ALL, routing=routing), runtime)
        assert ours["out"].shape == (T, 16)
        assert not any(v.any() for v in ours.values())


def test_only_what_needs_a_gradient_gets_one(runtime):
    problem = make_problem(12, 16, 24, 3, 2, ALL)
    everything = run_ours(problem, runtime)
    experts = kt_moe.Experts(*problem.weights, runtime=runtime)
    for wanted in problem.leaves():
        leaves = {k: v.clone().requires_grad_(k == wanted) for k, v in problem.leaves().items()}
        lora = {k: leaves[k] for k in problem.lora}
        x, w = leaves["hidden_states"], leaves["topk_weights"]
        kt_moe.moe(x, problem.topk_ids, w, experts, lora, scaling=problem.scaling).backward(problem.grad_out)
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name != wanted)
        assert torch.equal(leaves[wanted].grad, everything[wanted])
    with torch.no_grad():
        assert torch.equal(
            kt_moe.moe(x, problem.topk_ids, w, experts, lora, scaling=problem.scaling), everything["out"]
        )


def test_nan_passes_through_as_nan_and_stays_in_its_token(runtime):
    problem = make_problem(8, 32, 16, 4, 2, ALL)
    clean = run_ours(problem, runtime)
    problem.hidden_states[3, 7] = float("nan")
    dirty = run_ours(problem, runtime)
    others = [t for t in range(8) if t != 3]
    assert dirty["out"][3].isnan().all()
    assert torch.equal(dirty["out"][others], clean["out"][others])
    assert torch.equal(dirty["hidden_states"][others], clean["hidden_states"][others])
    problem.hidden_states[3, 7], problem.topk_weights[5, 0] = 0.0, float("nan")
    assert run_ours(problem, runtime)["out"][5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_id_dtypes_and_strided_inputs(runtime, dtype):
    problem = make_problem(10, 32, 16, 4, 2, ALL)
    plain = run_ours(problem, runtime)
    problem.topk_ids = problem.topk_ids.to(dtype).T.contiguous().T
    problem.hidden_states = problem.hidden_states.repeat(1, 2)[:, :32]
    problem.lora = {k: v.transpose(1, 2).contiguous().transpose(1, 2) for k, v in problem.lora.items()}
    strided = run_ours(problem, runtime)
    for name in plain:
        assert torch.equal(plain[name], strided[name])


class TestDropout:
    P_DROP = 0.25

    @pytest.mark.parametrize("ranks", [ALL, {"gate": 4}, {"up": 3, "down": 8}])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_formula_with_the_same_mask_in_backward(self, runtime, ranks, recompute):
        problem = make_problem(50, 64, 40, 4, 2, ranks, routing="repeat")
        masks = reference.dropout_masks(problem, self.P_DROP, seed=123)
        ours = run_ours(problem, runtime, dropout=self.P_DROP, seed=123, recompute=recompute)
        assert_formula(ours, problem, masks, self.P_DROP)

    def test_seed_comes_from_torch(self, runtime):
        problem = make_problem(8, 32, 16, 4, 2, ALL)
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(run_ours(problem, runtime, dropout=0.5))
        assert torch.equal(outs[0]["out"], outs[1]["out"])
        assert torch.equal(outs[0]["gate_lora_a"], outs[1]["gate_lora_a"])
        assert not torch.equal(outs[0]["out"], outs[2]["out"])

    def test_mean_over_masks_is_the_layer_without_dropout(self):
        """What torch's dropout promises. The LoRA of down alone is linear in its mask."""
        problem = make_problem(6, 32, 24, 2, 1, {"down": 16})
        runtime = kt_moe.Runtime(threads=1)
        problem.hidden_states, problem.grad_out = problem.hidden_states.float(), problem.grad_out.float()
        plain = run_ours(problem, runtime)["out"]
        outs = torch.stack([run_ours(problem, runtime, dropout=0.3, seed=s)["out"] for s in range(400)])
        error = (outs.mean(0) - plain) / (outs.std(0) / 20)
        assert error.abs().max() < 5
        assert error.std() < 1.3

    def test_off_in_eval(self, runtime):
        problem = make_problem(8, 32, 16, 4, 2, {})
        experts = kt_moe.Experts(*problem.weights, runtime=runtime)
        layer = kt_moe.MoELayer(experts, rank=4, dropout=0.5)
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        args = problem.hidden_states, problem.topk_ids, problem.topk_weights
        assert not torch.equal(layer(*args), layer(*args))
        layer.eval()
        assert torch.equal(layer(*args), layer(*args))


def test_backward_without_a_gate_reads_what_forward_saved():
    problem = make_problem(20, 64, 48, 4, 2, {}, activation="relu2", gated=False)
    experts = kt_moe.Experts(*problem.weights, activation="relu2")
    hidden, saved = problem.hidden_states.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = kt_moe.moe(hidden, problem.topk_ids, problem.topk_weights, experts)
    (up,) = (t for t in saved if t.shape == (problem.topk_ids.numel(), 48))
    up.zero_()  # whose derivative is 0 by relu2
    out.sum().backward()
    assert not hidden.grad.any()
