"""Adapters in another process that never imports kt_moe: plain transformers and PEFT, the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import PEFT_WARNINGS, error, load, save_tiny_checkpoint, tokens, with_lora
from torch import Tensor

import kt_moe

pytestmark = PEFT_WARNINGS

# Every expert is chosen, so that no rounding changes the routing.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 4},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4},
}
PER_EXPERT = {"qwen3_moe", "mixtral", "deepseek_v3"}  # by PEFT 0.21's table
ALL = ["gate_proj", "up_proj", "down_proj"]

CASES: dict[str, dict[str, Any]] = {
    "experts": {"targets": ["experts"]},
    "names": {"targets": [*ALL, "o_proj"]},
    "gate": {"targets": ["experts.gate_proj"]},
    "gate and up": {"targets": ["experts.gate_proj", "experts.up_proj", "o_proj"]},
    "down": {"targets": ["experts.down_proj"]},
    "one layer": {"targets": ["layers.1.mlp.experts", "o_proj"]},
    "layers_to_transform": {"targets": ["experts", "o_proj"], "layers_to_transform": [1]},
    "all-linear": {"targets": "all-linear", "lora_dropout": 0.1},
    "rslora": {"targets": ["experts", "o_proj"], "use_rslora": True},
    "patterns": {
        "targets": ["experts", "o_proj"],
        "rank_pattern": {"experts.down_proj": 3, "layers.1.mlp.experts": 5, "o_proj": 2},
        "alpha_pattern": {"experts.up_proj": 7, "o_proj": 1},
    },
    "gate without effect": {"targets": ["experts"], "alpha_pattern": {"experts.gate_proj": 0}},
    "router": {"targets": ["experts", "mlp.gate"], "lora_dropout": 0.1},
    "router of another rank": {"targets": ["experts", "o_proj", "mlp.gate"], "rank_pattern": {"mlp.gate": 2}},
    "shared alone": {"targets": ["shared_experts.gate_proj", "shared_experts.down_proj"]},
    "shared": {"targets": ["experts.down_proj", "shared_experts.up_proj"], "rank_pattern": {"up_proj": 3}},
}  # fmt: skip
WITHOUT = {
    "router": {"qwen2_moe", "mixtral", "gpt_oss"},  # the rule is the same, names differ
    "router of another rank": {"qwen2_moe", "mixtral", "gpt_oss"},
    "shared alone": {"qwen3_moe", "mixtral", "gpt_oss"},
    "shared": {"qwen3_moe", "mixtral", "gpt_oss"},
}

PLAIN = """
import sys, torch, transformers, peft
out, tokens = sys.argv[1], torch.load(sys.argv[1])
result = {}
for pair in sys.argv[2:]:
    base, adapter = pair.split("|")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = model(tokens).logits
    model = peft.PeftModel.from_pretrained(model, adapter)
    again = model.load_adapter(adapter, "again")
    assert not again.missing_keys and not again.unexpected_keys, (adapter, again)
    with torch.no_grad():
        result[adapter] = before, model.eval()(tokens).logits
assert "kt_moe" not in sys.modules
torch.save(result, out)
"""


def in_plain_process(work: Path, pairs: list[tuple[Path, Path]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits without and with each adapter, by the adapter's path."""
    out = work / "logits.pt"
    torch.save(tokens(), out)
    arguments = [f"{base}|{adapter}" for base, adapter in pairs]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, str(out), *arguments]
    subprocess.run(command, check=True, env=environment)
    result: dict[str, tuple[Tensor, Tensor]] = torch.load(out)
    return result


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_tiny_checkpoint(root / name, name, **sizes) for name, sizes in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_in_plain_peft(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[family]
    ours, saved = {}, []
    for name, options in CASES.items():
        if family in WITHOUT.get(name, ()):
            continue
        options = dict(options)
        targets = options.pop("targets")
        if family == "qwen2_moe" and not isinstance(targets, str):
            targets = [target.replace("shared_experts", "shared_expert") for target in targets]
        model = with_lora(base, targets, **options).eval()
        for how in ("save_adapter", "save_pretrained"):
            directory = tmp_path / f"{name} {how}"
            (kt_moe.save_adapter if how == "save_adapter" else type(model).save_pretrained)(model, directory)
            ours[str(directory)] = model(tokens()).logits
            saved.append((base, directory))
        again = kt_moe.load_adapter(load(base), directory)(tokens()).logits
        if name == "patterns":  # up's B is written with gate's scaling, and rounded to bf16 after that
            assert error(again, ours[str(directory)]) < 1e-2
        else:
            assert torch.equal(again, ours[str(directory)]), name
        tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
        per_expert = any(".experts.0." in key for key in tensors)
        partly = ("gate", "gate and up", "gate without effect", "shared alone", "patterns")
        assert per_expert == (family in PER_EXPERT and name not in partly)
        if family in PER_EXPERT and name in ("experts", "rslora"):  # as servers want it
            config = json.loads((directory / "adapter_config.json").read_text())
            options = (config[key] for key in ("rank_pattern", "alpha_pattern", "target_parameters"))
            assert list(options) == [{}, {}, None]
    plain = in_plain_process(tmp_path, saved)
    for directory, (before, after) in plain.items():
        assert error(ours[directory], after) < 2e-2 < error(before, after), directory


def test_fused_keys_have_the_path_that_peft_leads_back(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a family in PEFT's table, where different alphas of gate and up make the form fused."""
    model = with_lora(bases["qwen3_moe"], alpha_pattern={"experts.up_proj": 3})
    monkeypatch.setattr("kt_moe.hf.tuner.path_to_save", lambda model, path, module: f"{path}.there")
    kt_moe.save_adapter(model, tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    places = {key.partition(".layers.")[2].partition(".lora_")[0] for key in keys}
    assert places == {f"{n}.mlp.experts.there{end}" for n in range(2) for end in ("", ".base_layer")}


def test_trainer_writes_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"input_ids": t, "labels": t} for t in tokens(1).expand(8, -1)]
    ours, saved = {}, []
    for family, base in bases.items():
        model = with_lora(base, ["o_proj", "experts"], lora_dropout=0.1)
        out = tmp_path / family
        arguments = transformers.TrainingArguments(
            output_dir=str(out), max_steps=2, save_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model(str(out / "saved"))
        for directory in (out / "saved", out / "checkpoint-2"):
            ours[str(directory)] = model.eval()(tokens()).logits
            saved.append((base, directory))
    for directory, (before, after) in in_plain_process(tmp_path, saved).items():
        assert error(ours[directory], after) < 2e-2 < error(before, after), directory
