"""Adapters on the experts of every family, merged into its checkpoint: eager transformers gives the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from test_families import COMPUTED, Family
from test_family_adapters import output
from tiny_models import PEFT_WARNINGS, error
from torch import Tensor

import kt_moe
from kt_moe.hf.lora import experts_architecture, lora_layers

pytestmark = [*PEFT_WARNINGS, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]


SHARED = {"diffusion_gemma"}  # experts of encoder and decoder: one set of weights, two of LoRA


def with_adapter(family: Family, adapter: Path) -> Any:
    """A model of the family with LoRA on its experts, which is also saved."""
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["experts"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(family.by_config(), config).eval()
    kt_moe.save_adapter(model, adapter)
    return model


@pytest.mark.parametrize("name", sorted(set(COMPUTED) - SHARED))
def test_merged(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "base")
    model = with_adapter(family, tmp_path / "adapter")
    kt_moe.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before = output(family.eager(), family.ids)
    family.path = tmp_path / "merged"
    after = output(family.eager(), family.ids)
    assert error(output(model, family.ids), after) < 0.02
    assert error(before, after) > 0.05, "the adapter had no effect"


def fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales: one a matrix [out, in], smaller than a block; of [E, out, in] one a row."""
    scale = weight.float().abs().amax(-1 if weight.dim() == 3 else (0, 1), keepdim=True) / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def in_fp8(family: Family, directory: Path) -> None:
    """A copy of a family's checkpoint with its experts in FP8."""
    shutil.copytree(family.path, directory)
    (file,) = directory.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    architecture = experts_architecture(family.by_config())
    assert architecture is not None
    for saved in (module.saved for module in architecture.modules if module.saved is not None):
        numbers = range(saved.first_expert, saved.first_expert + saved.num_experts)
        words = dict.fromkeys(filter(None, saved.words))
        names = [f"{saved.prefix}.{word}" for word in words]
        if not saved.fused:
            names = [f"{saved.prefix}.{e}.{word}.weight" for e in numbers for word in words]
        for name in names:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensors[name])
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


# Whose fused tensors the core reads in floating point only: transposed ones, and those of other names.
WITHOUT_FP8 = {
    "aria",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "inkling2",
    "llama4",
    "openai_privacy_filter",
}


@pytest.mark.parametrize("name", sorted(set(COMPUTED) - SHARED - WITHOUT_FP8))
def test_merged_in_fp8(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "plain")
    in_fp8(family, tmp_path / "base")
    family.path = tmp_path / "base"
    before = output(family.by_config(), family.ids)
    wanted = output(with_adapter(family, tmp_path / "adapter"), family.ids)
    found = kt_moe.merge_checkpoint(family.path, tmp_path / "adapter", tmp_path / "merged")
    family.path = tmp_path / "merged"
    after = output(family.by_config(), family.ids)
    assert found.keys() == {"fp8"}
    assert found["fp8"].error < 0.03
    assert error(after, wanted) < 0.4 * error(before, wanted)
    assert error(before, wanted) > 0.05, "the adapter had no effect"


@pytest.mark.parametrize("name", sorted(SHARED))
def test_experts_with_shared_weights_are_refused(name: str, tmp_path: Path) -> None:
    with_adapter(Family(name, tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"which cannot be merged: \['model.decoder\..* share one set"):
        kt_moe.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_two_lists_of_a_layer_are_exported_under_their_own_numbers(tmp_path: Path) -> None:
    family = Family("ernie4_5_vl_moe", tmp_path / "base")
    model = with_adapter(family, tmp_path / "adapter")
    kt_moe.export_adapter(model, tmp_path / "out", target="vllm")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = dict(lora_layers(model, "default"))
    text, vision = layers.values()
    assert len(tensors) == 2 * 3 * 8
    place = "base_model.model.model.layers.1.mlp.experts"
    for e, layer in enumerate([text] * 4 + [vision] * 4):
        for projection in ("gate", "up", "down"):
            a = tensors[f"{place}.{e}.{projection}_proj.lora_A.weight"]
            assert torch.equal(a, layer.lora_A["default"][projection][e % 4])
    again = kt_moe.load_adapter(family.by_config(), tmp_path / "out")
    assert error(output(again, family.ids), output(model, family.ids)) < 1e-3
