"""PEFT's operations on several adapters, fused adapters of others, and what layers with LoRA are to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from tiny_models import (
    ALL_EXPERTS,
    PEFT_WARNINGS,
    error,
    load,
    lora_layers,
    save_tiny_checkpoint,
    tokens,
    with_lora,
)
from torch import Tensor

import kt_moe

pytestmark = PEFT_WARNINGS

WEIGHTS = "adapter_model.safetensors"
SIZES = {
    "qwen3_moe": ALL_EXPERTS,
    "qwen2_moe": ALL_EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_tiny_checkpoint(root / name, name, **sizes) for name, sizes in SIZES.items()}


def two(base: Path, **second: Any) -> Any:
    model = with_lora(base, ["q_proj", "experts"]).eval()
    torch.manual_seed(1)
    options = {
        "target_modules": ["q_proj", "experts"],
        "r": 4,
        "lora_alpha": 12,
        "init_lora_weights": False,
        **second,
    }
    model.add_adapter("second", LoraConfig(**options))
    return model


# Adapters that others trained on fused experts


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
        {
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.gate_up_proj": 6},
            "alpha_pattern": {"experts.gate_up_proj": 5},
            "use_rslora": True,
        },
    ],
    ids=["both", "gate_up", "one layer", "patterns"],
)
def test_fused_adapters_of_plain_peft(
    family: str, options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], r=3, lora_alpha=6, init_lora_weights=False, **options)
    theirs = get_peft_model(load(bases[family], kt=False), config)
    for name, parameter in theirs.named_parameters():
        if (
            "lora_" in name
        ):  # as nn.Linear starts, that of all experts is as small as that of one large matrix
            parameter.data.mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = kt_moe.load_adapter(load(bases[family]), tmp_path / "theirs")
    plain = theirs.eval()(tokens()).logits
    base = load(bases[family], kt=False)(tokens()).logits
    assert error(ours(tokens()).logits, plain) < 2e-2 < error(base, plain)

    low = PeftModel.from_pretrained(load(bases[family]), tmp_path / "theirs", low_cpu_mem_usage=True)
    assert torch.equal(low(tokens()).logits, ours(tokens()).logits)
    for layer in lora_layers(low):
        pointers = [a.data_ptr() for a in layer.lora_A["default"].values()]
        assert len(set(pointers)) == len(pointers)  # gate and up are trained apart

    ours.save_pretrained(tmp_path / "ours")  # with gate and up apart
    again = PeftModel.from_pretrained(load(bases[family], kt=False), tmp_path / "ours").eval()
    assert error(again(tokens()).logits, plain) < 1e-5
    twice = kt_moe.load_adapter(load(bases[family]), tmp_path / "ours")
    assert torch.equal(twice(tokens()).logits, ours(tokens()).logits)


def test_expert_major_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    """Columns of B as Unsloth orders them; A and B in each other's roles, as PEFT before 0.19 had them."""
    base = bases["qwen2_moe"]
    ours = with_lora(base).eval()
    wanted = ours(tokens()).logits
    for name, layout in (("unsloth", "expert-major"), ("old", "peft")):
        ours.save_pretrained(tmp_path / name)
        tensors = safetensors.torch.load_file(tmp_path / name / WEIGHTS)
        for key in [key for key in tensors if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            a, b = tensors[key], tensors[other]
            if layout == "expert-major":
                tensors[other] = b.view(len(b), -1, 4).mT.reshape(b.shape).contiguous()
            else:  # delta = (B A) of W transposed
                swapped = b.view(len(b), -1, 4).permute(2, 1, 0).reshape(-1, len(b))
                old_b = a.view(4, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)
                tensors[other] = old_b.contiguous()
                tensors[key] = swapped.contiguous()
        safetensors.torch.save_file(tensors, tmp_path / name / WEIGHTS)
        again = kt_moe.load_adapter(load(base), tmp_path / name, layout=layout)
        assert torch.equal(again(tokens()).logits, wanted), name
    other = kt_moe.load_adapter(load(base), tmp_path / "unsloth")
    assert error(other(tokens()).logits, wanted) > 1e-2
    with pytest.raises(ValueError, match=r"layout is 'x', wanted one of \['peft', 'expert-major'\]"):
        kt_moe.load_adapter(load(base), tmp_path / "old", layout="x")


# Several adapters


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "dare_linear", "magnitude_prune"])
def test_add_weighted_adapter(kind: str, bases: dict[str, Path]) -> None:
    """The same combination by plain PEFT of each expert as a linear layer of its own."""
    model = two(bases["qwen3_moe"])
    options: dict[str, Any] = {} if kind in ("cat", "svd", "linear") else {"density": 0.5}
    torch.manual_seed(5)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", kind, **options)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    layer = lora_layers(model)[1]
    linear = torch.nn.Module()
    linear.x = torch.nn.Linear(32, 24, bias=False)
    for projection in ("gate", "down"):
        into, out = (24, 32) if projection == "down" else (32, 24)
        one = torch.nn.Sequential(torch.nn.Linear(into, out, bias=False))
        reference = get_peft_model(one, LoraConfig(target_modules=["0"], r=4, lora_alpha=8))
        reference.add_adapter("second", LoraConfig(target_modules=["0"], r=4, lora_alpha=12))
        theirs = reference.base_model.model[0]
        for name in ("default", "second"):
            theirs.lora_A[name].weight.data = layer.lora_A[name][projection][2].detach().clone()
            theirs.lora_B[name].weight.data = layer.lora_B[name][projection][2].detach().clone()
        reference.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", kind, **options)
        mine = layer.lora_B["sum"][projection][2] @ layer.lora_A["sum"][projection][2]
        mine = mine * layer.scaling_of("sum", projection)
        if kind.startswith("dare"):  # random
            assert mine.shape == (out, into)
            assert mine.any()
        else:
            assert error(mine, theirs.get_delta_weight("sum")) < 1e-5, projection
    model.set_adapter("sum")
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("weights", "kind", "options", "message"),
    [
        ([float("nan"), 1.0], "cat", {}, r"weights is \[nan, 1.0\], wanted finite numbers"),
        (["a", 1.0], "linear", {}, r"weights is \['a', 1.0\], wanted finite numbers"),
        ([1.0, 1.0], "ties", {}, r"density is None, wanted a number in \[0, 1\] for combination_type='ties'"),
        ([1.0, 1.0], "dare_linear", {"density": 7}, "density is 7, wanted a number in"),
        ([1.0, 1.0], "ties", {"density": 0.5, "majority_sign_method": "q"}, "majority_sign_method is 'q'"),
    ],
)
def test_what_add_weighted_adapter_refuses(
    weights: Any, kind: str, options: dict[str, Any], message: str, bases: dict[str, Path]
) -> None:
    model = two(bases["qwen3_moe"])
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["default", "second"], weights, "sum", kind, **options)
    with pytest.raises(ValueError, match="wanted at least one name"):
        model.add_weighted_adapter([], [], "sum")
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("where", ["kt_moe.hf.tuner.combine", "torch.linalg.svd"])  # of experts, of layers
def test_an_interrupt_leaves_no_half_of_a_weighted_adapter(
    where: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two(bases["qwen3_moe"])
    before = [name for name, _ in model.named_modules()]
    place = lora_layers(model)[0].place
    numbers = place.numbers

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "svd")
    assert [name for name, _ in model.named_modules()] == before
    assert list(model.peft_config) == ["default", "second"]
    assert place.numbers == numbers


def test_an_interrupt_leaves_no_adapter_without_its_values(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two(bases["qwen3_moe"])
    kt_moe.save_adapter(model, tmp_path)
    before = [name for name, _ in model.named_modules()]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kt_moe.adapters.set_peft_model_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kt_moe.load_adapter(model, tmp_path, adapter_name="third")
    assert [name for name, _ in model.named_modules()] == before
    assert list(model.peft_config) == ["default", "second"]


def test_weighted_sum_of_loaded_fused_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    model = two(bases["gpt_oss"], target_modules=["down_proj"])
    model.save_pretrained(tmp_path)
    model = kt_moe.load_adapter(load(bases["gpt_oss"]), tmp_path)
    kt_moe.load_adapter(model, tmp_path / "second", adapter_name="second")
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    mine = model(tokens()).logits
    model.base_model.set_adapter(["default", "second"])
    assert error(mine, model(tokens()).logits) < 1e-2
    for kind in ("ties_svd", "nothing"):
        with pytest.raises(ValueError, match=f"combination_type is '{kind}'"):
            model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "more", kind)
    with pytest.raises(ValueError, match="weights has 1 numbers for 2 adapters"):
        model.add_weighted_adapter(["default", "second"], [1.0], "more", "cat")
    with pytest.raises(ValueError, match=r"adapters has \['third'\], the model's adapters are"):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "more", "cat")
    assert "more" not in model.peft_config


def test_a_batch_of_several_adapters(bases: dict[str, Path]) -> None:
    model = two(bases["qwen3_moe"])
    x = tokens(4)
    names = ["second", "__base__", "default", "second"]
    mixed = model(x, adapter_names=names).logits
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(x[i : i + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(x[i : i + 1]).logits
        assert error(mixed[i : i + 1], alone) < 1e-5, name
    with pytest.raises(ValueError, match="adapter_names has 3 names for 8 tokens"):
        lora_layers(model)[0](torch.ones(8, 32), *[torch.zeros(8, 2, dtype=t) for t in (torch.int64, None)],
                              adapter_names=["default"] * 3)  # fmt: skip


def test_active_adapters_on_different_devices(bases: dict[str, Path]) -> None:
    """The sum is where the first is; the meta device stands for a GPU here."""
    layer = lora_layers(two(bases["qwen3_moe"]))[0]
    layer.lora_A["default"].to("meta")
    layer.lora_B["default"].to(device="meta", dtype=torch.bfloat16)
    _, tensors = layer._combined(["default", "second"])
    for name, tensor in tensors.items():
        is_a = name.endswith("a")
        assert tensor.is_meta
        assert tensor.dtype is (torch.float32 if is_a else torch.bfloat16)
        assert tensor.shape[1 if is_a else 2] == 4 + 4


def test_values_replaced_by_those_of_a_directory(bases: dict[str, Path], tmp_path: Path) -> None:
    other = with_lora(bases["qwen3_moe"], ["q_proj", "experts"], seed=3).eval()
    other.save_pretrained(tmp_path / "other")
    with_lora(bases["qwen3_moe"], ["q_proj", "experts"], lora_alpha=9).save_pretrained(tmp_path / "alpha")
    model = with_lora(bases["qwen3_moe"], ["q_proj", "experts"]).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="unexpected keys found"):  # PEFT's own: nothing was changed
        hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"has rank 4 and scaling 2 on .*, the one to be loaded 4 and 2.25"):
        kt_moe.load_adapter(model, tmp_path / "alpha")
    kt_moe.load_adapter(model, tmp_path / "other")
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


@pytest.mark.parametrize("kt", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_values_replaced_by_those_of_an_adapter_in_other_words(
    family: str, kt: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Patterns spelled in another way, rsLoRA instead of an alpha, full names instead of short ones."""
    fused = ["experts.gate_up_proj", "experts.down_proj"]
    options: dict[str, Any] = {"r": 4, "target_parameters": fused, "init_lora_weights": False}
    first = {
        "target_modules": ["q_proj", "v_proj"],
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 9, "experts.gate_up_proj": 8, "experts.down_proj": 3},
        "alpha_pattern": {r".*\.q_proj": 6, "v_proj": 2, "gate_up_proj": 16, "down_proj": 6},
    }
    again = {
        "target_modules": r".*\.(q|v)_proj",
        "use_rslora": True,
        "lora_alpha": 4,
        "rank_pattern": {"(q|self_attn.q)_proj": 9, "mlp.experts.gate_up_proj": 8, r"[\w.]*down_proj": 3},
        "alpha_pattern": {
            "self_attn.q_proj": 2, "self_attn.v_proj": 1, "experts.gate_up_proj": 4 * 2**0.5,
            "experts.down_proj": 2 * 3**0.5,
        },
    }  # fmt: skip
    for seed, (name, words) in enumerate({"first": first, "again": again}.items()):
        torch.manual_seed(seed)
        theirs = get_peft_model(load(bases[family], kt=False), LoraConfig(**options, **words))
        theirs.save_pretrained(tmp_path / name)
    model = kt_moe.load_adapter(load(bases[family], kt=kt), tmp_path / "first")
    assert error(model(tokens()).logits, theirs.eval()(tokens()).logits) > 0.02
    kt_moe.load_adapter(model, tmp_path / "again")
    assert error(model(tokens()).logits, theirs(tokens()).logits) < (0.02 if kt else 1e-6)
    wrong = {**again, "alpha_pattern": {**again["alpha_pattern"], "experts.down_proj": 3}}
    get_peft_model(load(bases[family], kt=False), LoraConfig(**options, **wrong)).save_pretrained(
        tmp_path / "w"
    )
    where = r"experts\.down_proj, the one to be loaded 3 and 1.73"
    with pytest.raises(ValueError, match=rf"has rank 3 and scaling 2 on model\.layers\.0\.mlp\.{where}"):
        kt_moe.load_adapter(model, tmp_path / "w")


def test_its_own_values_loaded_into_an_adapter_whose_gate_and_up_have_other_alphas(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """As Trainer does when it resumes: what up's B was multiplied by in the file is undone."""
    model = with_lora(bases["qwen3_moe"], alpha_pattern={"experts.up_proj": 7, "experts.down_proj": 3}).eval()
    wanted = model(tokens()).logits
    model.save_pretrained(tmp_path)
    for load_again in (model.load_adapter, lambda path, name: kt_moe.load_adapter(model, path)):
        with torch.no_grad():
            for parameters in (p for n, p in model.named_parameters() if "lora_" in n):
                parameters.zero_()
        load_again(tmp_path, "default")
        assert error(model(tokens()).logits, wanted) < 1e-4


def state_of(model: Any) -> Any:
    layers = [(layer.r["default"], layer.lora_alpha["default"], layer.place.numbers, layer.pairs["default"])
              for layer in lora_layers(model)]  # fmt: skip
    parameters = {n: (p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    return layers, parameters, model.peft_config["default"].kt_moe_saved.to_dict()


def check_same_state(model: Any, before: Any) -> None:
    layers, parameters, saved = state_of(model)
    assert (layers, saved) == (before[0], before[2])
    assert parameters.keys() == before[1].keys()
    for name, (pointer, value, trained) in parameters.items():
        old_pointer, old, old_trained = before[1][name]
        assert pointer == old_pointer, name
        assert torch.equal(value, old), name
        assert trained == old_trained, name


def without_layer_1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}


def with_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {f"base_model.model.model.x.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}
    return {**tensors, **more}


def of_another_size(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    return {**tensors, key: tensors[key][:, 1:].contiguous()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without_layer_1,
            r"lacks 8 keys for this model: \['model.layers.1.mlp.experts.lora_A.\w+', .* It may be of",
        ),
        (with_more, r"has unknown 2 keys for this model"),
        (of_another_size, r"does not fit this model: .*q_proj.* is \[3, 31\], wanted \[3, 32\]"),
    ],
)
def test_values_that_do_not_fit_leave_the_adapter_as_it_was(
    change: Any, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Also its ranks, which those of a fused adapter may raise."""
    options = {
        "r": 3,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"gate_up_proj": 6},
    }
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options)
    get_peft_model(load(bases["qwen3_moe"], kt=False), config).save_pretrained(tmp_path)
    model = get_peft_model(load(bases["qwen3_moe"]), config)
    before = state_of(model)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    safetensors.torch.save_file(change(tensors), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        kt_moe.load_adapter(model, tmp_path)
    check_same_state(model, before)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    kt_moe.load_adapter(model, tmp_path)
    assert lora_layers(model)[0].r["default"] == 6


def test_values_go_into_one_adapter_and_are_trained_or_not(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_lora(bases["qwen3_moe"], ["q_proj", "experts"])
    model.save_pretrained(tmp_path)
    model.add_adapter("default2", LoraConfig(target_modules=["q_proj", "experts"], init_lora_weights=False))
    others = {n: p.detach().clone() for n, p in model.named_parameters() if ".default2" in n}
    for trained in (False, True):
        kt_moe.load_adapter(model, tmp_path, is_trainable=trained)
        own = [p for n, p in model.named_parameters() if ".default." in n]
        assert own
        assert all(p.requires_grad is trained for p in own)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


def scaled(layer: Any, factor: float) -> Tensor:
    layer.scale_layer(factor)
    x, ids, weights = torch.ones(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    out: Tensor = layer(x, ids, weights)
    layer.unscale_layer(factor)
    return out


def test_scaling_by_peft(bases: dict[str, Path]) -> None:
    model = with_lora(bases["qwen3_moe"], alpha_pattern={"experts.down_proj": 4}).eval()
    layer = lora_layers(model)[0]
    once, twice = scaled(layer, 1), scaled(layer, 2)
    assert error(twice, once) > 1e-2
    assert (layer.scaling_of("default", "gate"), layer.scaling_of("default", "down")) == (2.0, 1.0)
