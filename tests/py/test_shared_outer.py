"""LoRA whose outer matrices all experts of a layer share: A of gate and up, B of down."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from strategies import make_problem
from test_export import SGLANG
from test_plain_peft import in_plain_process
from tiny_models import ALL_EXPERTS, PEFT_WARNINGS, error, load, lora_layers, save_tiny_checkpoint, tokens
from torch import Tensor

import kt_moe
from kt_moe.experts import PROJECTIONS

pytestmark = PEFT_WARNINGS

RANKS = {"gate": 8, "up": 4, "down": 6}
SHARED = ("gate_lora_a", "up_lora_a", "down_lora_b")


@pytest.mark.parametrize("gpu", [None, kt_moe.Gpu("cpu", cpu_share=0.4)], ids=["core", "engine"])
def test_one_matrix_is_that_of_every_expert(gpu: kt_moe.Gpu | None) -> None:
    problem = make_problem(70, 96, 64, 6, 3, RANKS)
    experts = kt_moe.Experts(*problem.weights, gpu=gpu or "off")
    inputs = problem.hidden_states, problem.topk_ids, problem.topk_weights

    def run(lora: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: t.detach().clone().requires_grad_() for name, t in lora.items()}
        out = kt_moe.moe(*inputs, experts, leaves, scaling=problem.scaling)
        out.backward(problem.grad_out)
        return out, {name: t.grad for name, t in leaves.items() if t.grad is not None}

    one = {name: t[:1] if name in SHARED else t for name, t in problem.lora.items()}
    out, grads = run(one)
    expected, of_each = run({name: t.expand(6, -1, -1) for name, t in one.items()})
    assert torch.equal(out, expected)
    for name, grad in grads.items():
        wanted = of_each[name].sum(0, keepdim=True) if name in SHARED else of_each[name]
        assert torch.equal(grad, wanted), name
        assert grad.shape == one[name].shape
    again, same = run(one)
    assert torch.equal(again, out)
    assert all(torch.equal(grad, same[name]) for name, grad in grads.items())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    sizes = {"qwen3_moe": ALL_EXPERTS, "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4}}
    return {name: save_tiny_checkpoint(root / name, name, **s) for name, s in sizes.items()}


def with_shared(base: Path, *targets: str, **options: Any) -> Any:
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    config = kt_moe.SharedOuterLoraConfig(target_modules=list(targets or ["experts"]), **options)
    return peft.get_peft_model(load(base), config).eval()


def test_parameters_gradients_and_optimizer_state(bases: dict[str, Path]) -> None:
    model = with_shared(bases["qwen3_moe"])
    assert type(model.peft_config["default"]).__name__ == "KtLoraConfig"
    hidden, intermediate, rank, experts, layers = 32, 24, 4, 4, 2
    inner = experts * rank * intermediate * 3  # B of gate and up, A of down
    assert model.get_nb_trainable_parameters()[0] == layers * (inner + 3 * rank * hidden)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(tokens()).logits.sum().backward()
    optimizer.step()
    layer = lora_layers(model)[0]
    for projection in PROJECTIONS:
        one = layer.lora_B if projection == "down" else layer.lora_A
        parameter = one["default"][projection]
        state = optimizer.state[parameter]
        assert len(parameter) == len(parameter.grad) == len(state["exp_avg"]) == 1
        assert bool(parameter.grad.any())
    assert layer.place.numbers == layers * (inner + 3 * rank * hidden)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_files_are_what_plain_peft_reads(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[family]
    options = {"rank_pattern": {"experts.up_proj": 3}, "alpha_pattern": {"experts.up_proj": 6}}
    model = with_shared(base, "experts", "o_proj", **options)
    wanted = model(tokens()).logits
    kt_moe.save_adapter(model, tmp_path / "adapter")
    assert "shared_outer" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    ((before, after),) = in_plain_process(tmp_path, [(base, tmp_path / "adapter")]).values()
    assert error(wanted, after) < 2e-2 < error(before, after)
    # read with matrices of its own for each expert, with shared ones, and into the adapter that is there
    own = kt_moe.load_adapter(load(base), tmp_path / "adapter")
    assert torch.equal(own(tokens()).logits, wanted)
    assert {len(p) for p in lora_layers(own)[0].lora_A["default"].values()} == {4}
    with pytest.raises(ValueError, match="adapter 'default' has matrices of its own for each expert"):
        kt_moe.load_adapter(own, tmp_path / "adapter", shared_outer=True)
    shared = kt_moe.load_adapter(load(base), tmp_path / "adapter", shared_outer=True)
    assert torch.equal(shared(tokens()).logits, wanted)
    assert [len(p) for p in lora_layers(shared)[0].lora_A["default"].values()] == [1, 1, 4]
    for load_again in (model.load_adapter, lambda path, name: kt_moe.load_adapter(model, path)):
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
                parameter.zero_()
        load_again(tmp_path / "adapter", "default")
        assert torch.equal(model(tokens()).logits, wanted)


def test_an_adapter_that_shares_nothing_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["experts"], init_lora_weights=False)
    peft.get_peft_model(load(bases["qwen3_moe"]), config).save_pretrained(tmp_path)
    message = r"A of gate_proj differs between experts, the model's adapter 'default' shares it"
    model = with_shared(bases["qwen3_moe"])
    before = model(tokens()).logits
    for target, options in ((model, {}), (load(bases["qwen3_moe"]), {"shared_outer": True})):
        with pytest.raises(ValueError, match=message):
            kt_moe.load_adapter(target, tmp_path, **options)
    assert torch.equal(model(tokens()).logits, before)
    with pytest.raises(ValueError, match="is for models with kt_moe experts, this model has none"):
        peft.get_peft_model(load(bases["qwen3_moe"], kt=False), kt_moe.SharedOuterLoraConfig())


def test_beside_and_summed_with_others(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_shared(bases["qwen3_moe"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["experts"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both = model(tokens()).logits
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert error(model(tokens()).logits, both) < 1e-2
    assert {len(p) for p in lora_layers(model)[0].lora_A["sum"].values()} == {4}
    model.set_adapter("default")
    kt_moe.save_adapter(model, tmp_path / "adapter")
    kt_moe.merge_checkpoint(bases["qwen3_moe"], tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged", kt=False)
    assert error(merged(tokens()).logits, model(tokens()).logits) < 2e-2


def test_orthogonal_start_and_moe_layer(bases: dict[str, Path]) -> None:
    layer = lora_layers(with_shared(bases["qwen3_moe"], init_lora_weights="orthogonal"))[0]
    for projection in PROJECTIONS:
        a, b = layer.matrices("default", projection)
        assert a.shape[0] == b.shape[0] == 4
        assert float((b @ a).detach().abs().max()) < 1e-6 < float(b.detach().abs().max())
    experts = kt_moe.Experts(torch.randn(4, 24, 32), torch.randn(4, 24, 32), torch.randn(4, 32, 24))
    moe = kt_moe.MoELayer(experts, rank=2, shared_outer=True)
    shapes = {name: list(p.shape) for name, p in moe.named_parameters()}
    assert [shapes[f"{p}_lora_a"] for p in PROJECTIONS] == [[1, 2, 32], [1, 2, 32], [4, 2, 24]]
    assert [shapes[f"{p}_lora_b"] for p in PROJECTIONS] == [[4, 24, 2], [4, 24, 2], [1, 32, 2]]
    out = moe(torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2))
    out.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_servers(bases: dict[str, Path], tmp_path: Path) -> None:
    """SGLang has a form for it; others get the matrices once for each expert."""
    model = with_shared(bases["qwen3_moe"], "experts.gate_proj", "experts.down_proj")
    kt_moe.export_adapter(model, tmp_path / "vllm", target="vllm")
    again = kt_moe.load_adapter(load(bases["qwen3_moe"]), tmp_path / "vllm")
    assert error(again(tokens()).logits, model(tokens()).logits) < 1e-3
    kt_moe.export_adapter(model, tmp_path / "sglang", target="sglang")
    tensors = safetensors.torch.load_file(tmp_path / "sglang" / "adapter_model.safetensors")
    place = "base_model.model.model.layers.1.mlp.experts"
    shapes = {name.removeprefix(f"{place}."): list(t.shape) for name, t in tensors.items() if place in name}
    assert shapes == {
        "gate_proj.lora_A.weight": [1, 4, 32], "gate_proj.lora_B.weight": [4, 24, 4],
        "up_proj.lora_A.weight": [1, 4, 32], "up_proj.lora_B.weight": [4, 24, 4],
        "down_proj.lora_A.weight": [4, 4, 24], "down_proj.lora_B.weight": [1, 32, 4],
    }  # fmt: skip
    config = json.loads((tmp_path / "sglang" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"gate_proj", "up_proj", "down_proj"}
    # and that form is read, with matrices of its own for each expert or with shared ones
    for options, sizes in (({}, {4}), ({"shared_outer": True}, {1})):
        again = kt_moe.load_adapter(load(bases["qwen3_moe"]), tmp_path / "sglang", **options)
        assert error(again(tokens()).logits, model(tokens()).logits) < 1e-3
        assert {len(lora_layers(again)[0].lora_A["default"][p]) for p in ("gate", "up")} == sizes
    file = tmp_path / "sglang" / "adapter_model.safetensors"
    wrong = {
        n: t.repeat(2, 1, 1) if n == f"{place}.gate_proj.lora_A.weight" else t for n, t in tensors.items()
    }
    safetensors.torch.save_file(wrong, file)
    with pytest.raises(
        ValueError, match=r"gate_proj at .*experts is of \[2, 4\] experts, wanted 4, or 1 that all"
    ):
        kt_moe.load_adapter(load(bases["qwen3_moe"]), tmp_path / "sglang")


@pytest.mark.skipif("KT_MOE_SGLANG" not in os.environ, reason="KT_MOE_SGLANG is not set")
def test_sglang_reads_the_shared_form(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_shared(bases["qwen3_moe"], "experts", "q_proj")
    kt_moe.export_adapter(model, tmp_path / "adapter", target="sglang")
    arguments = [os.environ["KT_MOE_SGLANG"], str(tmp_path / "adapter"), "2", str(tmp_path / "t.pt")]
    environment = {**os.environ, "PYTHONPATH": os.environ["KT_MOE_SGLANG"]}
    subprocess.run([sys.executable, "-c", SGLANG, *arguments], check=True, env=environment)
    scaling, found = torch.load(tmp_path / "t.pt")
    layer = lora_layers(model)[0]
    place = "base_model.model.model.layers.0.mlp.experts"
    for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        a, b = (found[f"{place}.{name}.lora_{m}.weight"][1] for m in "AB")
        assert (len(a), len(b)) == ((4, 1) if name == "down_proj" else (1, 4))
        pieces = zip(parts, a.chunk(len(parts), 1), b.chunk(len(parts), 1), strict=True)
        for projection, own_a, own_b in pieces:
            mine = layer.matrices("default", projection)
            delta = layer.scaling_of("default", projection) * (mine[1] @ mine[0])
            assert error(scaling * own_b @ own_a, delta) < 1e-5


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [("gate_lora_a", (1, 2, 33), [1, 2, 32]), ("down_lora_b", (1, 32, 3), [1, 32, 2])],
)
def test_a_shared_matrix_is_refused_by_its_own_shape(
    name: str, shape: tuple[int, ...], wanted: list[int]
) -> None:
    problem = make_problem(3, 32, 24, 4, 2, {"gate": 2, "down": 2})
    experts = kt_moe.Experts(*problem.weights)
    lora = {**problem.lora, name: torch.zeros(shape)}
    message = f"{name} has shape {list(shape)}, wanted {wanted} of a matrix that all experts share"
    with pytest.raises(ValueError, match=re.escape(message)):
        kt_moe.moe(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts, lora)
