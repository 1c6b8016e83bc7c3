"""Adapters on the experts of every family, merged into its checkpoint: eager transformers gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from test_families import COMPUTED, Family
from test_family_adapters import output
from tiny_models import PEFT_WARNINGS, error

import kt_moe
from kt_moe.hf.lora import lora_layers

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
