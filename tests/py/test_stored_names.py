"""Checkpoints whose experts have other names than those under which transformers would save the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from stored_formats import fp8
from tiny_families import tiny_family
from tiny_models import error, load, save_tiny_checkpoint, tiny_model, tokens
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kt_moe
from kt_moe.architectures import architecture_of
from kt_moe.checkpoint import Checkpoint, ExpertList
from kt_moe.computation import is_experts
from kt_moe.conversion import saved_lists, stored_lists
from kt_moe.families import model_class
from kt_moe.hf import KtExperts, KtMoeConfig

GATED = ("gate_proj", "up_proj", "down_proj")


def experts_of(model: Any) -> list[KtExperts]:
    return [m for m in model.modules() if isinstance(m, KtExperts)]


def check_logits(path: Path, made: Any) -> Any:
    """The model of `path` in a class, with kt_moe and without."""
    options = {"dtype": torch.float32}
    reference = made.from_pretrained(path, **options).eval()
    ours = made.from_pretrained(path, quantization_config=KtMoeConfig(), **options).eval()
    with torch.no_grad():
        assert error(ours(tokens())[0], reference(tokens())[0]) < 1e-2
    return ours


@pytest.mark.parametrize(
    ("family", "model_type"),
    [("aria", "aria"), ("minimax_m3_vl", "minimax_m3_vl"), ("qwen3_5_moe", "qwen3_5_moe")],
)
def test_whole_models(family: str, model_type: str, tmp_path: Path) -> None:
    model = tiny_family(family, model_type)
    model.save_pretrained(tmp_path)
    check_logits(tmp_path, type(model))


def test_the_text_model_of_a_whole_model(tmp_path: Path) -> None:
    tiny_family("qwen3_5_moe", "qwen3_5_moe").save_pretrained(tmp_path)
    ours = check_logits(tmp_path, transformers.Qwen3_5MoeForCausalLM)
    assert [m.expert_module.path for m in experts_of(ours)] == [
        "model.layers.0.mlp.experts", "model.layers.1.mlp.experts",
    ]  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe", "aria_text"])
def test_names_of_the_modules_themselves(model_type: str, tmp_path: Path) -> None:
    model = tiny_family(model_type.removesuffix("_text"))
    model.save_pretrained(tmp_path, save_original_format=False)
    names = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    check_logits(tmp_path, type(model))


def test_a_bare_model_in_a_checkpoint_of_one_with_a_head_and_the_other_way_round(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "head", "mixtral")
    check_logits(tmp_path / "head", transformers.MixtralModel)
    tiny_model("mixtral").model.save_pretrained(tmp_path / "bare")
    assert len(experts_of(load(tmp_path / "bare"))) == 2


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_quantised_experts(model_type: str, tmp_path: Path) -> None:
    # DeepSeek's FP8: no pattern of the conversion mapping is for these tails.
    save_tiny_checkpoint(tmp_path, model_type)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    wanted: dict[str, Tensor] = {}
    for name in [n for n in tensors if ".experts." in n]:
        rows, columns = tensors.pop(name).shape
        stored, wanted[name] = fp8(rows, columns, seed=len(wanted))
        tensors |= {name.removesuffix(".weight") + f".{tail}": t for tail, t in stored.items()}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    words = GATED if model_type == "qwen3_moe" else ("w1", "w3", "w2")
    block = "mlp" if model_type == "qwen3_moe" else "block_sparse_moe"
    for module in experts_of(load(tmp_path)):
        assert module.experts.format == "fp8"
        for word, found in zip(words, module.experts.dequantize(), strict=True):
            for e in range(module.num_experts):
                name = f"model.layers.{module.layer}.{block}.experts.{e}.{word}.weight"
                assert torch.equal(found[e], wanted[name].bfloat16())


def test_two_lists_in_a_layer(tmp_path: Path) -> None:
    model = tiny_family("ernie4_5_vl_moe")
    model.save_pretrained(tmp_path)
    ours = check_logits(tmp_path, type(model))
    text, vision = experts_of(ours)
    assert (text.layer, vision.layer) == (1, 2)  # the second beyond all layers
    assert (text.intermediate_dim, vision.intermediate_dim) == (24, 16)
    assert (text.expert_module.saved.first_expert, vision.expert_module.saved.first_expert) == (0, 4)
    theirs = dict(model.named_modules())
    for module in (text, vision):
        gate, up, down = module.experts.dequantize()
        plain = theirs[module.expert_module.path]
        assert torch.equal(torch.cat([gate, up], dim=1).float(), plain.gate_up_proj)
        assert torch.equal(down.float(), plain.down_proj)


def test_lists_of_different_lengths_in_a_layer() -> None:
    model = tiny_family("ernie4_5_vl_moe")
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    text, vision = modules.values()
    text.down_proj = torch.nn.Parameter(text.down_proj[:3])
    vision.down_proj = torch.nn.Parameter(torch.empty(5, *vision.down_proj.shape[1:]))
    found = [(one.first_expert, one.num_experts) for one in saved_lists(model, modules).values() if one]
    assert found == [(0, 3), (3, 5)]


def test_packed_lists_of_one_layer_are_told_apart(tmp_path: Path) -> None:
    # Two lists of the same shape under the number of one layer, in one cache.
    tensors = {
        f"{root}.layers.0.mlp.experts.{e}.{word}.weight": torch.randn(24, 32).bfloat16()
        if word != "down_proj"
        else torch.randn(32, 24).bfloat16()
        for root in ("thinker", "talker")
        for e in range(2)
        for word in GATED
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    for _ in range(2):
        for root in ("thinker", "talker"):
            one = ExpertList(f"{root}.layers.0.mlp.experts", False, GATED, 0, 2)
            checkpoint = Checkpoint(tmp_path).with_lists({0: one})
            experts = kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=tmp_path / "packed")
            for word, found in zip(GATED, experts.dequantize(), strict=True):
                for e in range(2):
                    assert torch.equal(found[e], tensors[f"{one.prefix}.{e}.{word}.weight"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_fused_layouts(transposed: bool, interleaved: bool, biases: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gate, up, down = (torch.randn(s).bfloat16() for s in ((3, 24, 32), (3, 24, 32), (3, 32, 24)))
    bias_gate, bias_up, bias_down = (torch.randn(s).bfloat16() for s in ((3, 24), (3, 24), (3, 32)))

    def together(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], 2).flatten(1, 2) if interleaved else torch.cat([first, second], 1)

    tensors = {"w13_weight": together(gate, up), "w2_weight": down}
    if transposed:
        tensors = {name: t.mT.contiguous() for name, t in tensors.items()}
    if biases:
        tensors |= {"w13_weight_bias": together(bias_gate, bias_up), "w2_weight_bias": bias_down}
    names = {f"model.layers.5.block.{name}": t for name, t in tensors.items()}
    safetensors.torch.save_file(
        names | {"model.layers.5.block.gate": down.clone()}, tmp_path / "model.safetensors"
    )
    words = ("w13_weight", "w13_weight", "w2_weight")
    one = ExpertList("model.layers.5.block", True, words, 0, 3, interleaved)
    experts = kt_moe.Experts.from_checkpoint(Checkpoint(tmp_path).with_lists({5: one}), 5)
    for found, wanted in zip(experts.dequantize(), (gate, up, down), strict=True):
        assert torch.equal(found, wanted)
    options = {"gate_bias": bias_gate, "up_bias": bias_up, "down_bias": bias_down} if biases else {}
    same = kt_moe.Experts(gate, up, down, **options)
    x, ids, weights = torch.randn(7, 32).bfloat16(), torch.randint(3, (7, 2)), torch.rand(7, 2)
    assert torch.equal(kt_moe.moe(x, ids, weights, experts), kt_moe.moe(x, ids, weights, same))


def test_names_of_inkling_as_it_is_published() -> None:
    config = CONFIG_MAPPING["inkling_mm_model"]()
    with torch.device("meta"):
        model = model_class(config)(config)
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    path, saved = next(iter(saved_lists(model, modules).items()))
    assert path.startswith("model.language_model.layers.")
    words = ("w13_weight", "w13_weight", "w2_weight")
    prefix = path.replace("language_model", "llm")
    assert saved == ExpertList(prefix, True, words, 0, config.text_config.n_routed_experts, True)


def test_refused_checkpoints() -> None:
    model = tiny_model()
    architecture = architecture_of(model)
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{word}.weight"
        for n in range(2)
        for e in range(8)
        for word in GATED
    ]
    assert set(stored_lists(model, architecture, names)) == {0, 1}
    assert stored_lists(model, architecture, ["blk.0.ffn_gate_exps.0.numa.0.weight"]) == {}
    with pytest.raises(ValueError, match=r"has no tensors for the experts at model\.layers\.1\.mlp\.experts"):
        stored_lists(model, architecture, [name for name in names if ".layers.0." in name])
    with pytest.raises(ValueError, match=r"has the experts at model\.layers\.0\.mlp\.experts twice"):
        stored_lists(model, architecture, [*names, "model.layers.0.mlp.experts.gate_up_proj"])


def test_unknown_tensors_among_the_experts_are_named(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.experts.3.up_proj.pre_quant_scale"] = torch.ones(1)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.3\.up_proj\.pre_quant_scale.*unknown"):
        load(tmp_path)
