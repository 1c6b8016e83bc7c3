"""Adapters for servers: what they require of keys, ranks and alphas, and the same function in plain PEFT.

With KT_MOE_LLAMA_CPP, the directory of llama.cpp with convert_lora_to_gguf.py, its converter reads them too;
with KT_MOE_SGLANG, a directory in which SGLang's wheel was unpacked, its loading code does.
"""

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
from peft import LoraConfig, PeftModel, get_peft_model
from test_families import Family
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

import kt_moe
from kt_moe import cli

pytestmark = PEFT_WARNINGS

CASES: dict[str, dict[str, Any]] = {
    "all": {"targets": ["experts", "q_proj"]},
    "down": {"targets": ["experts.down_proj", "o_proj"]},
    "gate, ranks and alphas": {
        "targets": ["experts.gate_proj", "experts.down_proj", "q_proj"],
        "rank_pattern": {"experts.down_proj": 3, "q_proj": 6},
        "alpha_pattern": {"experts.down_proj": 9, "q_proj": 1},
        "use_rslora": True,
    },
    "one layer": {"targets": ["layers.0.mlp.experts"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    sizes = {
        "qwen3_moe": ALL_EXPERTS,
        "qwen2_moe": ALL_EXPERTS,
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4},
    }
    return {name: save_tiny_checkpoint(root / name, name, **s) for name, s in sizes.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", ["vllm", "sglang", "llamacpp"])
def test_per_expert(target: str, case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    options = dict(CASES[case])
    model = with_lora(bases["qwen3_moe"], options.pop("targets"), **options).eval()
    kt_moe.export_adapter(model, tmp_path, target=target)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["lora_dropout"] == 0
    assert {t.shape[0 if "lora_A" in key else 1] for key, t in tensors.items()} == {config["r"]}
    experts = {key for key in tensors if ".experts." in key}
    layers = (0,) if case == "one layer" else (0, 1)
    assert experts == {
        f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{p}_proj.lora_{m}.weight"
        for layer in layers for e in range(4) for p in ("gate", "up", "down") for m in "AB"
    }  # fmt: skip
    if case != "one layer":  # PEFT would want the other layer too
        plain = PeftModel.from_pretrained(load(bases["qwen3_moe"], kt=False), tmp_path)
        assert error(model(tokens()).logits, plain(tokens()).logits) < 1e-2


def test_sglang_gets_all_layers_of_those_it_makes_one_of(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_lora(bases["qwen2_moe"], ["experts", "v_proj", "shared_expert.up_proj", "o_proj"]).eval()
    for target, more in {"vllm": set(), "sglang": {"q_proj", "k_proj", "gate_proj"}}.items():
        kt_moe.export_adapter(model, tmp_path / target, target=target)
        tensors = safetensors.torch.load_file(tmp_path / target / "adapter_model.safetensors")
        layers = {key.rpartition(".lora_")[0] for key in tensors if ".experts." not in key}
        names = {"v_proj", "o_proj", "up_proj", *more}
        assert {name.rpartition(".")[2] for name in layers} == names
        assert len(layers) == 2 * len(names)
        again = kt_moe.load_adapter(load(bases["qwen2_moe"]), tmp_path / target)
        assert error(again(tokens()).logits, model(tokens()).logits) < 1e-3


SGLANG = """
import enum, json, sys, types, torch, safetensors.torch
root, adapter, layers, out = sys.argv[1:]

def stub(name, **members):
    module = types.ModuleType(name)
    module.__path__ = [f"{root}/{name.replace('.', '/')}"]
    vars(module).update(members)
    sys.modules[name] = module

def get_layer_id(name):  # sglang/srt/layers/utils/common.py: the number after "layers."
    import re
    found = re.search(r"layers\\.(\\d+)\\.", name)
    return int(found[1]) if found else None

for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.lora.backend"):
    stub(name)
stub("sglang.srt.configs.load_config", LoadConfig=object)
stub("sglang.srt.layers.utils", get_layer_id=get_layer_id)
stub("sglang.srt.lora.backend.base_backend", BaseLoRABackend=object)
stub("sglang.srt.model_loader.loader", DefaultModelLoader=object)
stub("sglang.srt.utils.hf_transformers_utils", AutoConfig=object)
stub("sglang.srt.model_executor.forward_batch_info", ForwardBatch=object)
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.utils import get_normalized_target_modules, get_target_module_name

config = LoRAConfig(adapter)
base = types.SimpleNamespace(num_hidden_layers=int(layers), architectures=[], model_type="")
loaded = LoRAAdapter("x", config, base, None, None)
loaded.initialize_weights_from_tensors(safetensors.torch.load_file(f"{adapter}/adapter_model.safetensors"))
targets = get_normalized_target_modules(config.target_modules)
found = {name: (get_target_module_name(name, targets), tensor)  # ValueError for what it would skip
         for layer in loaded.layers for name, tensor in layer.weights.items()}
torch.save((loaded.scaling, found), out)
"""


@pytest.mark.skipif("KT_MOE_SGLANG" not in os.environ, reason="KT_MOE_SGLANG is not set")
@pytest.mark.parametrize("case", [*CASES, "v alone"])
def test_sglang_names_and_stacks_it(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """SGLang's own loading code, with its imports of what needs a GPU replaced."""
    options = dict(CASES.get(case, {"targets": ["experts", "v_proj"]}))
    model = with_lora(bases["qwen3_moe"], options.pop("targets"), **options)
    kt_moe.export_adapter(model, tmp_path / "adapter", target="sglang")
    arguments = [os.environ["KT_MOE_SGLANG"], str(tmp_path / "adapter"), "2", str(tmp_path / "t.pt")]
    environment = {**os.environ, "PYTHONPATH": os.environ["KT_MOE_SGLANG"]}
    subprocess.run([sys.executable, "-c", SGLANG, *arguments], check=True, env=environment)
    scaling, found = torch.load(tmp_path / "t.pt")
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in found}
    assert names <= {"gate_up_proj", "down_proj", "qkv_proj", "o_proj"}  # as its layers are called
    for name, layer in model.named_modules():
        if not isinstance(layer, kt_moe.hf.KtLoraExperts):
            continue
        for e in range(4):
            stacked = {}
            for projection, own in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                key = f"{name}.{e}.{projection}.lora_"
                (target, a), (_, b) = (found[f"{key}{m}.weight"] for m in "AB")
                assert target == projection
                stacked |= dict(zip(own, zip(a.chunk(len(own)), b.chunk(len(own)), strict=True), strict=True))
            for projection, (a, b) in stacked.items():
                if projection not in layer.lora_A["default"]:
                    assert not b.any()
                    continue
                mine = layer.lora_B["default"][projection][e] @ layer.lora_A["default"][projection][e]
                assert error(scaling * b @ a, mine * layer.scaling_of("default", projection)) < 1e-5
    attention = model.get_base_model().model.layers[1].self_attn
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        if "default" not in getattr(getattr(attention, name), "lora_A", {}):
            continue
        key = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
        a, b = found[f"{key}A.weight"][1].chunk(3)[part], found[f"{key}B.weight"][1].split([32, 16, 16])[part]
        delta = getattr(attention, name).get_delta_weight("default").detach()
        assert error(scaling * b @ a, delta) < 1e-5


def test_families(bases: dict[str, Path], tmp_path: Path) -> None:
    ours = with_lora(bases["qwen2_moe"], ["experts.down_proj", "shared_expert.up_proj"]).eval()
    kt_moe.export_adapter(ours, tmp_path / "qwen2", target="vllm")
    keys = safetensors.torch.load_file(tmp_path / "qwen2" / "adapter_model.safetensors").keys()
    assert sum(".experts.3.gate_proj." in key for key in keys) == 2 * 2
    config = json.loads((tmp_path / "qwen2" / "adapter_config.json").read_text())
    # gate and down of routed experts alone, up of shared ones too
    assert sorted(config["target_modules"]) == ["experts.down_proj", "experts.gate_proj", "up_proj"]
    kt_moe.export_adapter(ours, tmp_path / "peft", target="peft")
    for directory, bound in {"peft": 0, "qwen2": 1e-3}.items():
        again = kt_moe.load_adapter(load(bases["qwen2_moe"]), tmp_path / directory)
        assert error(again(tokens()).logits, ours(tokens()).logits) <= bound
    one = with_lora(
        bases["qwen2_moe"], ["layers.1.mlp.experts", "layers.0.mlp.shared_expert.down_proj"]
    ).eval()
    kt_moe.export_adapter(one, tmp_path / "one", target="sglang")
    again = kt_moe.load_adapter(load(bases["qwen2_moe"]), tmp_path / "one")
    assert error(again(tokens()).logits, one(tokens()).logits) < 1e-3

    oss = with_lora(bases["gpt_oss"], ["experts.down_proj", "q_proj"]).eval()
    kt_moe.export_adapter(oss, tmp_path / "oss", target="vllm")
    tensors = safetensors.torch.load_file(tmp_path / "oss" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.experts"
    assert tensors[f"{prefix}.base_layer.lora_A.weight"].shape == (4 * 8, 32)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (32, 4 * 4)
    config = json.loads((tmp_path / "oss" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {"gate_up_proj": 8}
    plain = PeftModel.from_pretrained(load(bases["gpt_oss"], kt=False), tmp_path / "oss")
    wanted = oss(tokens()).logits
    assert (
        error(plain(tokens()).logits, wanted) < 1e-2 < error(load(bases["gpt_oss"])(tokens()).logits, wanted)
    )
    one = with_lora(bases["gpt_oss"], ["layers.1.mlp.experts"]).eval()
    kt_moe.export_adapter(one, tmp_path / "one", target="vllm")
    plain = PeftModel.from_pretrained(load(bases["gpt_oss"], kt=False), tmp_path / "one")
    assert error(plain(tokens()).logits, one(tokens()).logits) < 1e-2
    for target in ("sglang", "llamacpp"):
        with pytest.raises(ValueError, match=f"{target} reads no LoRA on experts of gpt_oss"):
            kt_moe.export_adapter(oss, tmp_path / "x", target=target)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_experts_without_a_gate(target: str, tmp_path: Path) -> None:
    """Of Nemotron-H: up and down of each expert, both, under the names of its checkpoints.

    vLLM packs (up, down, nothing) of an expert and asserts the first two; SGLang stacks up alone.
    """
    family = Family("nemotron_h", tmp_path / "base")
    model = with_lora(tmp_path, ["experts.down_proj"], base=family.by_config()).eval()
    kt_moe.export_adapter(model, tmp_path / "out", target=target)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    place = "base_model.model.backbone.layers"
    assert tensors.keys() == {
        f"{place}.{layer}.mixer.experts.{e}.{p}_proj.lora_{m}.weight"
        for layer in (1, 3) for e in range(4) for p in ("up", "down") for m in "AB"
    }  # fmt: skip
    assert all(bool(t.any()) == ("up_proj.lora" not in key) for key, t in tensors.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(name.rpartition(".")[2] for name in config["target_modules"]) == ["down_proj", "up_proj"]
    again = kt_moe.load_adapter(family.by_config(), tmp_path / "out")
    with torch.no_grad():
        assert error(again(family.ids)[0], model(family.ids)[0]) < 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_rank_of_fused_adapters_that_plain_peft_trained(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Gate and up share one A of twice the config's rank: none of it is lost."""
    theirs = get_peft_model(
        load(bases[family], kt=False),
        LoraConfig(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.gate_up_proj": 6},
            r=3,
            lora_alpha=6,
            init_lora_weights=False,
        ),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = kt_moe.load_adapter(load(bases[family]), tmp_path / "theirs")
    layer = lora_layers(ours)[0]
    ranks = {p: a.shape[1] for p, a in layer.lora_A["default"].items()}
    assert ranks == {"gate": 6, "up": 6, "down": 3}
    assert layer.r["default"] == 6
    assert layer.lora_alpha["default"] == layer.scaling["default"] * 6
    kt_moe.export_adapter(ours, tmp_path / "out", target="vllm")
    again = PeftModel.from_pretrained(load(bases[family], kt=False), tmp_path / "out")
    assert error(again(tokens()).logits, theirs.eval()(tokens()).logits) < 1e-4


def test_the_command(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, saved, out = (str(path) for path in (bases["qwen3_moe"], tmp_path / "saved", tmp_path / "out"))
    model = with_lora(bases["qwen3_moe"], ["experts", "q_proj"])
    kt_moe.save_adapter(model, saved)
    kt_moe.export_adapter(model, tmp_path / "wanted", target="vllm")
    assert cli.main(["export", base, saved, out, "--target", "vllm"]) == 0
    files = (Path(folder) / "adapter_model.safetensors" for folder in (out, tmp_path / "wanted"))
    ours, theirs = map(safetensors.torch.load_file, files)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert cli.main(["export", base, saved, saved, "--target", "vllm"]) == 2
    assert f"kt-moe export: error: OUTPUT is {saved}, which exists already" in capsys.readouterr().err
    assert cli.main(["export", base, str(tmp_path / "nowhere"), out + "2", "--target", "vllm"]) == 2
    assert "kt-moe export: error: no adapter_config.json in" in capsys.readouterr().err


def test_routers_for_llama_cpp(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_lora(bases["qwen3_moe"], ["experts", "mlp.gate"])
    kt_moe.export_adapter(model, tmp_path, target="llamacpp")
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith(".mlp.gate.lora_A.weight") for key in tensors) == 2


def test_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = with_lora(bases["qwen3_moe"], ["experts", "mlp.gate"])
    with pytest.raises(
        ValueError, match=r"LoRA on model\.layers\.0\.mlp\.gate, a ParamWrapper, which vllm lacks"
    ):
        kt_moe.export_adapter(model, tmp_path, target="vllm")
    with pytest.raises(ValueError, match="a ParamWrapper, which sglang lacks"):
        kt_moe.export_adapter(model, tmp_path, target="sglang")
    with pytest.raises(ValueError, match="target is 'x', wanted one of"):
        kt_moe.export_adapter(model, tmp_path, target="x")
    with pytest.raises(ValueError, match="adapter_name is 'x'"):
        kt_moe.export_adapter(model, tmp_path, target="vllm", adapter_name="x")
    saved = with_lora(bases["qwen3_moe"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save or trainable tokens, which sglang"):
        kt_moe.export_adapter(saved, tmp_path, target="sglang")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("KT_MOE_LLAMA_CPP" not in os.environ, reason="KT_MOE_LLAMA_CPP is not set")
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_converts_it(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    options = dict(CASES[case])
    model = with_lora(bases["qwen3_moe"], options.pop("targets"), **options)
    kt_moe.export_adapter(model, tmp_path / "adapter", target="llamacpp")
    llama = Path(os.environ["KT_MOE_LLAMA_CPP"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(llama / "gguf-py"), str(llama)])}
    command = [
        str(llama / "convert_lora_to_gguf.py"),
        "--base",
        str(bases["qwen3_moe"]),
        str(tmp_path / "adapter"),
    ]
    subprocess.run(
        [sys.executable, *command, "--outfile", str(tmp_path / "out.gguf")], check=True, env=environment
    )
    code = (
        "import gguf, sys, torch; r = gguf.GGUFReader(sys.argv[1])\n"
        "alpha = float(r.fields['adapter.lora.alpha'].contents())\n"
        "torch.save((alpha, {t.name: torch.from_numpy(t.data.copy()) for t in r.tensors}), sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out.gguf"), str(tmp_path / "t.pt")],
        check=True,
        env=environment,
    )
    alpha, tensors = torch.load(tmp_path / "t.pt")
    layer = next(m for m in model.modules() if isinstance(m, kt_moe.hf.KtLoraExperts))
    for projection in ("gate", "up", "down"):
        a, b = (tensors[f"blk.0.ffn_{projection}_exps.weight.lora_{m}"] for m in "ab")
        delta = alpha / a.shape[1] * b @ a  # as llama.cpp scales it
        if projection not in layer.lora_A["default"]:
            assert not delta.any()
            continue
        mine = layer.lora_B["default"][projection] @ layer.lora_A["default"][projection]
        assert error(delta, mine * layer.scaling_of("default", projection)) < 1e-5


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "use_dora=True, which vllm does not read"),
        ({"lora_bias": True}, "lora_bias=True, which vllm does not read"),
        ({"bias": "all"}, "bias='all', which vllm does not read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which may have changed"),
    ],
)
def test_what_servers_lack_is_refused(
    options: dict[str, Any], says: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = with_lora(bases["qwen3_moe"], ["q_proj"], **options)
    with pytest.raises(ValueError, match=says):
        kt_moe.export_adapter(model, tmp_path / "out", target="vllm")
    assert not (tmp_path / "out").exists()
