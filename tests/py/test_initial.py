"""LoRA that starts with a part of the base weights: PiSSA and OLoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_peft_training import arguments, losses
from test_plain_peft import in_plain_process
from tiny_models import (
    PEFT_WARNINGS,
    error,
    load,
    lora_layers,
    plain_peft,
    save_tiny_checkpoint,
    tokens,
    with_lora,
)
from torch import nn

import kt_moe
from kt_moe.hf import KtMoeConfig
from kt_moe.hf.initial import starting_pair

pytestmark = PEFT_WARNINGS

HOW = ["pissa", "pissa_niter_4", "olora"]
TARGETS = ["q_proj", "o_proj", "experts"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    sizes: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 4}  # no rounding changes the routing
    return {name: save_tiny_checkpoint(root / name, name, **sizes) for name in ("qwen3_moe", "qwen2_moe")}


def trained(model: Any) -> Any:
    """A few steps of gradient descent from where it started."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_the_pair_is_pefts(how: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32, bias=False))
    weight = base[0].weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["0"], init_lora_weights=how)
    layer = peft.get_peft_model(base, config).base_model.model[0]
    a, b = starting_pair(weight, 4, 2.5, how, "w")
    theirs = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert error(b @ a, theirs[1] @ theirs[0]) < 1e-5
    assert error(b.norm(dim=0), theirs[1].norm(dim=0)) < 1e-5
    if how == "pissa":
        near = starting_pair(weight, 4, 2.5, "pissa_niter_16", "w")
        left = [(weight - 2.5 * (y @ x)).norm() for x, y in ((a, b), near)]
        assert left[0] <= left[1] < 1.01 * left[0]


@pytest.mark.parametrize("format", ["as-stored", "int4"])
@pytest.mark.parametrize("how", HOW)
def test_the_model_computes_at_first_what_it_did(how: str, format: str, bases: dict[str, Path]) -> None:
    def base() -> Any:
        return load(bases["qwen3_moe"], quantization_config=KtMoeConfig(format=format))

    model = with_lora(bases["qwen3_moe"], TARGETS, base=base(), init_lora_weights=how).eval()
    plain = base()
    assert error(model(tokens()).logits, plain(tokens()).logits) < 1e-2
    q = model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(q.base_layer.weight, plain.model.layers[0].self_attn.q_proj.weight)
    assert float(q.lora_B["default"].weight.detach().norm()) > 0.1
    layer = lora_layers(model)[1]
    weights = dict(zip(("gate", "up", "down"), layer.base_layer.experts.dequantize(), strict=True))
    for projection, weight in weights.items():
        a, b = layer.lora_A["default"][projection], layer.lora_B["default"][projection]
        assert (a.shape[1], b.shape[2]) == (4, 4)
        left = weight[2].float() - 2.0 * (b[2] @ a[2]).detach()
        best = float(torch.linalg.svdvals(weight[2].float())[4:].norm())
        if how == "olora":
            assert error(b[2].T @ b[2], torch.eye(4)) < 1e-5
        else:
            assert float(left.norm()) < best * 1.05
    assert not any(p.requires_grad for n, p in model.named_parameters() if "fixed" in n)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])  # keys per expert, and fused ones
def test_saved_as_plain_lora(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, ours = bases[family], {}
    for how in HOW:
        adapter, merged = tmp_path / how, tmp_path / f"{how}, merged"
        options = {"init_lora_weights": how, "use_rslora": how == "olora"}
        model = trained(with_lora(base, [*TARGETS, "mlp.gate"], **options))
        logits = ours[str(adapter)] = model(tokens()).logits
        model.save_pretrained(adapter)
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True
        assert config["r"] == 8
        again = kt_moe.load_adapter(load(base), adapter)
        assert error(again(tokens()).logits, logits) < 1e-2
        assert kt_moe.load_adapter(model, adapter) is model
        assert torch.equal(model(tokens()).logits, logits)
        kt_moe.merge_checkpoint(base, adapter, merged)
        assert error(load(merged, kt=False)(tokens()).logits, logits) < 2e-2
    plain = in_plain_process(tmp_path, [(base, tmp_path / how) for how in HOW])
    for directory, (before, after) in plain.items():
        assert error(ours[directory], after) < 2e-2 < error(before, after), directory


def test_only_experts_have_the_config_that_servers_want(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_lora(bases["qwen3_moe"], TARGETS, init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert (config["rank_pattern"], config["alpha_pattern"], config["target_parameters"]) == ({}, {}, None)
    model = trained(model)
    kt_moe.export_adapter(model, tmp_path / "vllm", target="vllm")
    plain = plain_peft(bases["qwen3_moe"], tmp_path / "vllm").eval()
    assert error(model(tokens()).logits, plain(tokens()).logits) < 2e-2


def test_gradients_are_those_of_the_trained_half(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(with_lora(bases["qwen3_moe"], TARGETS, init_lora_weights="pissa"))
    model.zero_grad()
    model.save_pretrained(tmp_path)
    again = kt_moe.load_adapter(load(bases["qwen3_moe"]), tmp_path, is_trainable=True)
    for one in (model, again):
        one(tokens(), labels=tokens()).loss.backward()
    whole = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        dim = parameter.dim() - (2 if "lora_A" in name else 1)
        theirs = whole[name].grad
        assert theirs is not None
        assert parameter.grad is not None
        assert error(parameter.grad, theirs.narrow(dim, 0, 4)) < 1e-2, name


def test_trainer_resumes(bases: dict[str, Path], tmp_path: Path) -> None:
    """Where the start is random, the one of the checkpoint is what is taken away."""
    rows = [{"input_ids": t, "labels": t} for t in tokens(1).expand(8, -1)]

    def trainer(seed: int) -> Any:
        model = with_lora(bases["qwen3_moe"], TARGETS, init_lora_weights="pissa_niter_1", seed=seed)
        return transformers.Trainer(model, arguments(tmp_path, save_steps=2), train_dataset=rows)

    first, resumed = trainer(0), trainer(5)
    first.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-1] == losses(first)[2]
    one, other = (t.model.eval()(tokens()).logits for t in (first, resumed))
    assert torch.equal(one, other)


def test_beside_other_adapters(bases: dict[str, Path]) -> None:
    model = trained(with_lora(bases["qwen3_moe"], TARGETS, init_lora_weights="pissa"))
    alone = model(tokens()).logits
    with model.disable_adapter():
        plain = model(tokens()).logits
    assert torch.equal(plain, load(bases["qwen3_moe"])(tokens()).logits)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="olora")
    model.add_adapter("second", config)
    mixed = model(tokens(), adapter_names=["default", "second"]).logits
    assert error(mixed[:1], alone[:1]) < 1e-2
    assert error(mixed[1:], plain[1:]) < 1e-2
    model.base_model.set_adapter(["default", "second"])
    assert error(model(tokens()).logits, alone) < 1e-2  # the second does nothing yet
    with pytest.raises(ValueError, match=r"\['default'\] started with a part of the base weights"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not any("default" in name for name in model.state_dict())
    assert error(model(tokens()).logits, plain) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "does not work with lora_dropout on kt_moe experts"),
        ({"r": 40}, r"has rank 40 on gate_proj of expert 0 at .*, a weight \[24, 32\]"),
        ({"lora_alpha": 0}, "has scaling 0, wanted more than 0"),
    ],
)
def test_what_does_not_work(options: dict[str, Any], message: str, bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        with_lora(bases["qwen3_moe"], init_lora_weights="pissa", **options)


def test_what_does_not_go_together(bases: dict[str, Path], tmp_path: Path) -> None:
    config = kt_moe.SharedOuterLoraConfig(target_modules=["experts"], init_lora_weights="pissa")
    with pytest.raises(
        ValueError, match="SharedOuterLoraConfig does not work with init_lora_weights='pissa'"
    ):
        peft.get_peft_model(load(bases["qwen3_moe"]), config)
    model = with_lora(bases["qwen3_moe"], init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="which are saved as plain LoRA"):
        model.save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    other = with_lora(bases["qwen3_moe"], r=6)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has rank 8 and scaling 2 on .*, the one to be loaded 6"):
        kt_moe.load_adapter(model, tmp_path / "other")


def test_weights_that_are_not_finite_are_named(bases: dict[str, Path]) -> None:
    """They are found in the second layer, and the model is left as it was."""
    model = load(bases["qwen3_moe"], kt=False)
    model.model.layers[1].mlp.experts.gate_up_proj.data[2, 3, 4] = float("nan")
    kt_moe.wrap(model)
    before = [name for name, _ in model.named_modules()]
    message = "gate_proj of expert 2 at model.layers.1.mlp.experts has some that are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        with_lora(Path(), ["q_proj", "experts"], base=model, init_lora_weights="pissa")
    assert [name for name, _ in model.named_modules()] == before


def test_one_layer_merges_both_parts(bases: dict[str, Path]) -> None:
    model = with_lora(bases["qwen3_moe"], ["q_proj", "experts"], init_lora_weights="pissa")
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    weight = layer.base_layer.weight.clone()
    assert not layer.get_delta_weight("default").any()
    with torch.no_grad():
        layer.lora_B["default"].weight += 0.1
    x = torch.randn(3, layer.in_features)
    wanted = layer(x)
    layer.merge()
    assert error(layer.base_layer.weight, weight) > 0.01
    assert error(layer(x), wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_without_experts_it_is_pefts_own(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_lora(bases["qwen3_moe"], ["q_proj"], init_lora_weights="pissa")
    q = model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(
        q.base_layer.weight, load(bases["qwen3_moe"]).model.layers[0].self_attn.q_proj.weight
    )
    assert q.r["default"] == 4
    model.save_pretrained(tmp_path / "start")
    model = trained(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    plain = plain_peft(bases["qwen3_moe"], tmp_path / "plain").eval()
    assert error(model(tokens()).logits, plain(tokens()).logits) < 2e-2
