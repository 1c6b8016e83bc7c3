"""`kt-moe plan`: its arithmetic, what it reads out of configs, its bytes against those of a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    CONFIGS,
    PEFT_WARNINGS,
    load,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tokens,
    with_lora,
)
from torch import Tensor
from user_errors import one_line_error

from kt_moe import checkpointing, host_memory
from kt_moe.architectures import architecture_of
from kt_moe.cli import main
from kt_moe.cli.plan import memory, speed
from kt_moe.cli.plan.options import Run
from kt_moe.cli.plan.outline import Outline, outline
from kt_moe.hf import KtMoeConfig
from kt_moe.token_exchange import Exchange, Routes, arrive, combine, exchange_bytes, leave, partition, start

pytestmark = PEFT_WARNINGS

RUN = Run(2, 12, 4, ("gate", "up", "down"), (), None, "adamw", False)
LAYER, TOPK = architecture_of(tiny_model()).modules[0], 2

# What glibc keeps of freed memory is its own heuristic: in the plan and in the run every tensor of 1 MiB
# is mapped by itself.
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_WAIT_POLICY": "passive"}
MEDIUM = {
    "vocab_size": 512, "hidden_size": 512, "moe_intermediate_size": 256, "intermediate_size": 512,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 6, "num_attention_heads": 4,
    "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip

# Loads the model, puts LoRA on its experts and trains three steps; the most it ever took beyond its imports.
REAL = """
import sys, torch, transformers, peft
from kt_moe.host_memory import resident
from kt_moe.cli.plan import process_bytes
from kt_moe.hf import KtMoeConfig

before = process_bytes()
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=KtMoeConfig(), dtype=torch.bfloat16
)
model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["experts"])).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
ids = torch.randint(3, 500, (4, 128))
most = 0
for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    most = max(most, resident())
    loss.backward()
    most = max(most, resident())
    optimizer.step()
    most = max(most, resident())
    optimizer.zero_grad()
print(most - before)
"""


def plan(path: Path, *more: str) -> int:
    return main(["plan", str(path), "--no-measure", *more])


def write_config(path: Path, config: Any) -> Path:
    path.write_text(config.to_json_string())
    return path


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_outline_is_the_model(model_type: str) -> None:
    found = outline(tiny_config(model_type), RUN)
    model = tiny_model(model_type, dtype=torch.bfloat16)
    experts = {n: m for n, m in model.named_modules() if n.endswith(".mlp.experts")}
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    # Buffers such as the router's bias are fp32 here and bf16 there, or the other way: a few numbers.
    rest = everything - sum(p.nbytes for m in experts.values() for p in m.parameters())
    assert abs(found.rest_bytes - rest) <= 64
    assert [layer.number for layer in found.layers] == [int(name.split(".")[2]) for name in experts]
    assert {memory.shape_of(layer) for layer in found.layers} == {(8, 32, 24, True)}
    assert {layer.has_bias for layer in found.layers} == {model_type == "gpt_oss"}
    assert found.topk == TOPK
    assert len(found.kept) == 2
    assert found.logits == RUN.tokens * 64 * 2


def test_lora_beside_the_experts_is_counted() -> None:
    found = outline(tiny_config(), replace(RUN, modules=("q_proj",)))
    assert found.rest_lora == 2 * RUN.rank * (32 + 32)
    assert outline(tiny_config(), RUN).rest_lora == 0
    alone = outline(tiny_config(), replace(RUN, projections=(), modules=("q_proj",)))
    assert alone.rest_lora == found.rest_lora


def test_activations_are_what_autograd_keeps() -> None:
    """Against the same count on a model with data; that one's experts keep G, U and P besides."""
    model = tiny_model(dtype=torch.bfloat16, num_hidden_layers=3).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no other gets the address of one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    for module in [m for n, m in model.named_modules() if n.endswith(".experts")]:
        module.forward = lambda x, ids, weights: x * 1.0  # type: ignore[method-assign]
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)  # so that gradients pass through every layer
    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=ids, labels=ids, use_cache=False)
    run = replace(RUN, batch=4, sequence=64, projections=("gate",))
    counted = outline(tiny_config(num_hidden_layers=3), run)
    ours = sum(counted.kept[1:]) * 3 / 2 + counted.outside  # the first layer has nothing to train before it
    assert ours == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.15)


def test_bytes_of_lora_and_of_its_optimizer() -> None:
    numbers = memory.lora_numbers(LAYER, RUN)
    assert numbers == 3 * 8 * 4 * (32 + 24)
    assert memory.lora_numbers(LAYER, replace(RUN, projections=("up",))) == numbers // 3
    model = outline(tiny_config(), RUN)
    for optimizer, state in (("adamw", 2 * 8 * numbers), ("adamw-8bit", 2 * 2 * numbers * 260 // 256)):
        assert parts_of(model, replace(RUN, optimizer=optimizer), None)[0]["its optimizer state"] == state
    assert "its optimizer state" not in parts_of(model, replace(RUN, optimizer="sgd"), None)[0]


def test_bytes_of_a_layer_call() -> None:
    routes = RUN.tokens * TOPK
    assert memory.saved_bytes(LAYER, RUN, TOPK) == routes * (2 * 24 + 3 * 4) * 2
    more = memory.scratch_bytes(LAYER, replace(RUN, batch=4), TOPK, 2) - memory.scratch_bytes(
        LAYER, RUN, TOPK, 2
    )
    assert more == routes * (10 * 24 + 4 * 3 * 4 + 3584) + 4 * RUN.tokens * 32 * 2
    more = memory.scratch_bytes(LAYER, RUN, TOPK, 3) - memory.scratch_bytes(LAYER, RUN, TOPK, 2)
    assert more == 512 * 32 * 2 + (512 << 10)
    assert memory.weights_bytes(LAYER, "bf16") == 8 * 3 * 32 * 24 * 2
    biased = replace(LAYER, has_bias=True)
    assert memory.weights_bytes(biased, "bf16") == 8 * 2 * (3 * 32 * 24 + 24 + 24 + 32)


@pytest.mark.parametrize(
    ("saved", "gradients", "checkpointing", "most"),
    [
        ([10, 10, 10], [1, 1, 1], False, 31),  # the last layer's gradients appear before anything goes
        ([10, 10, 10], [20, 20, 20], False, 70),  # at the first layer: its own saved, all gradients
        ([10, 10, 10], [1, 1, 1], True, 13),
        ([10, 30], [0, 0], True, 30),
        ([10, 10], [0, 0], False, 20),
    ],
)
def test_gradients_take_the_place_of_what_forward_saved(
    saved: list[int], gradients: list[int], checkpointing: bool, most: int
) -> None:
    assert memory.backward_bytes(saved, gradients, checkpointing) == most


def test_activations_with_and_without_checkpointing() -> None:
    a = Outline("x", (), 2, 0, 0, kept=(100, 120), outside=50, logits=10, boundary=7)
    assert memory.activation_bytes(a, checkpointing=False) == 220 + 50 + 40
    assert memory.activation_bytes(a, checkpointing=True) == 2 * 7 + 120 + 50 + 40


def test_the_slack_of_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = outline(tiny_config(), RUN)
    slack = memory.activation_bytes(model, False) - 4 * model.logits
    assert parts_of(model, RUN, None)[0]["slack of the heap"] == slack
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert "slack of the heap" not in parts_of(model, RUN, None)[0]


def parts_of(model: Any, run: Run, gpu: int | None) -> tuple[dict[str, int], dict[str, int]]:
    process, weights = memory.Part("process", 10_000), memory.Part("weights", 10_000)
    host, on_gpu = memory.make_plan(model, run, weights, process, 2, gpu)
    return {p.name: p.nbytes for p in host}, {p.name: p.nbytes for p in on_gpu}


def test_parts_on_a_gpu_and_without() -> None:
    model = outline(tiny_config(), replace(RUN, modules=("q_proj",)))
    host, nothing = parts_of(model, RUN, None)
    beside, on_gpu = parts_of(model, RUN, 1 << 40)
    assert nothing == {}
    assert {"the rest of the model", "LoRA of the experts"} <= set(on_gpu)
    assert not {"the rest of the model", "its activations"} & set(beside)
    assert sum(beside.values()) < sum(host.values())


def test_experts_that_are_retained() -> None:
    """All layers keep what without checkpointing they would, and their results."""
    model, checkpointed = outline(tiny_config(), RUN), replace(RUN, checkpointing=True)
    retained = replace(checkpointed, retain=True)
    name, result = "saved for backward, LoRA gradients", RUN.tokens * 32 * 2
    saved, gradients = memory.saved_bytes(LAYER, RUN, TOPK), 4 * memory.lora_numbers(LAYER, RUN)
    plain, again, kept = (parts_of(model, run, None)[0] for run in (RUN, checkpointed, retained))
    assert plain[name] == memory.backward_bytes([saved] * 2, [gradients] * 2, one_layer=False)
    assert again[name] == memory.backward_bytes([saved] * 2, [gradients] * 2, one_layer=True)
    assert kept[name] == memory.backward_bytes([saved + result] * 2, [gradients] * 2, one_layer=False)
    assert kept["its activations"] == again["its activations"] < plain["its activations"]
    host, gpu = parts_of(model, retained, 1 << 40)
    assert host[name] == 2 * saved  # gradients are on the GPU
    assert gpu["results of the experts"] == 2 * result
    assert "results of the experts" not in parts_of(model, checkpointed, 1 << 40)[1]


def test_what_retained_experts_keep_is_what_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    class Counted(checkpointing._Entry):
        def __init__(self, inputs: Any, found: checkpointing.Kept, version: int) -> None:
            super().__init__(inputs, found, version)
            kept.append(found.out.nbytes + sum(t.nbytes for t in found.state if isinstance(t, torch.Tensor)))

    monkeypatch.setattr(checkpointing, "_Entry", Counted)
    config = KtMoeConfig(checkpoint_experts="retain")
    base = load(save_tiny_checkpoint(tmp_path), quantization_config=config, dtype=torch.bfloat16)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model = with_lora(tmp_path, base=base).train()
    model(tokens(RUN.batch, RUN.sequence))
    retained = replace(RUN, checkpointing=True, retain=True)
    assert kept == [memory.saved_bytes(LAYER, RUN, TOPK) + memory.result_bytes(LAYER, retained)] * 2


def test_where_the_experts_lora_lies() -> None:
    model = outline(tiny_config(), RUN)
    numbers = 2 * memory.lora_numbers(LAYER, RUN)
    enough = model.rest_bytes + 4 * 16 * numbers
    for choice, free, there in (
        ("auto", enough, True), ("auto", enough - 4, False), ("cpu", 1 << 40, False), ("cuda", 0, True),
    ):  # fmt: skip
        host, gpu = parts_of(model, replace(RUN, lora_device=choice), free)
        assert ("LoRA of the experts" in gpu) == ("gradients of it" in gpu) == there
        assert ("LoRA of the experts" in host) == ("its optimizer state" in host) == (not there)
        saved = 2 * memory.saved_bytes(LAYER, RUN, TOPK)
        assert (host["saved for backward, LoRA gradients"] == saved) == there
        assert ("a layer's LoRA and gradients" in host) == there


def test_weights_on_the_gpu() -> None:
    model, name = outline(tiny_config(), RUN), "expert weights on the GPU"
    assert parts_of(model, RUN, 1 << 40)[1][name] == 10_000  # all of them
    assert parts_of(model, RUN, model.rest_bytes + 5000)[1][name] == 2500  # half of what is free
    gpu = parts_of(model, replace(RUN, gpu_memory=7000), 1 << 40)[1]
    assert gpu[name] == 7000
    assert gpu["computing experts"] == 1 << 30
    gpu = parts_of(model, replace(RUN, gpu_memory=0), 1 << 40)[1]
    assert not {name, "computing experts"} & set(gpu)


def test_a_config_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path / "some.json", tiny_config("deepseek_v3", num_hidden_layers=4))
    assert plan(file, "--format", "int8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["number"] for layer in found["model"]["layers"]] == [1, 2, 3]
    (weights,) = [p for p in found["host"]["parts"] if p["name"] == "expert weights"]
    assert weights["nbytes"] == 3 * 8 * (3 * 32 * 24 + 4 * (24 + 24 + 32))
    assert found["host"]["nbytes"] == sum(p["nbytes"] for p in found["host"]["parts"])
    assert found["fits"] is True


def test_options_of_the_gpu_and_of_checkpointing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path / "config.json", tiny_config())
    more = ["--gradient-checkpointing", "--checkpoint-experts", "retain", "--lora-device", "cpu"]
    assert plan(file, *more, "--plan_gpu", "24GiB", "--gpu-memory", "6GiB", "--json") == 0
    found = json.loads(capsys.readouterr().out)["run"]
    assert (found["checkpointing"], found["retain"], found["lora_device"]) == (True, True, "cpu")
    assert found["gpu_memory"] == 6 << 30
    for options in (["--gpu", "off"], ["--cpu-share", "1"], ["--cpu-share", "1.00"]):
        assert plan(file, "--plan_gpu", "24GiB", *options, "--json") == 0
        assert json.loads(capsys.readouterr().out)["run"]["gpu_memory"] == 0
    assert plan(file, *more) == 0
    assert "adamw, gradient checkpointing, experts retained" in capsys.readouterr().out


def test_dry_run_is_the_plan_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_config(tmp_path / "config.json", tiny_config(num_experts=64)))
    more = ["--per_device_train_batch_size", "2", "--max_length", "32", "--lora_r", "4", "--no_plan_measure"]
    given = ["--model_name_or_path", file, "--optim", "adamw_8bit", "--dry_run", *more, "--plan_json"]
    assert main(["sft", *given]) == 0
    found = json.loads(capsys.readouterr().out)["run"]
    assert (found["batch"], found["sequence"], found["rank"]) == (2, 32, 4)
    assert (found["optimizer"], found["checkpointing"]) == ("adamw-8bit", True)
    assert main(["sft", *given, "--plan_host_memory", "1MiB"]) == 1
    assert json.loads(capsys.readouterr().out)["host"]["available"] == 1 << 20
    assert main(["sft", *given, "--plan_gpu", "24GiB", "--experts_gpu_rates", "link=25e9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"]["available"] == 24 << 30
    assert found["speed"]["rates"]["link"] == 25e9
    assert main(["sft", *given[2:]]) == 2
    assert plan(Path(file), "--rates=link=25e9", "--json") == 0
    assert json.loads(capsys.readouterr().out)["speed"]["rates"]["link"] == 25e9


def test_pairs_are_twice_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_config(tmp_path / "config.json", tiny_config()))
    more = ["--max_length", "32", "--optim", "sgd", "--no_plan_measure", "--dry_run", "--plan_json"]
    given = ["--model_name_or_path", file, "--gradient_checkpointing", "false", *more]
    found: dict[tuple[str, int], dict[str, int]] = {}
    for command, batch in (("sft", 3), ("sft", 6), ("dpo", 3), ("reward", 3), ("kto", 3)):
        assert main([command, *given, "--per_device_train_batch_size", str(batch)]) == 0
        printed = json.loads(capsys.readouterr().out)
        parts = {p["name"]: p["nbytes"] for p in printed["host"]["parts"] if p["name"] != "process"}
        found[command, batch] = {
            **parts,
            "batch": printed["run"]["batch"],
        }
    assert found["dpo", 3]["batch"] == 6
    assert found["dpo", 3] == found["reward", 3] == found["sft", 6]
    assert found["kto", 3] == found["sft", 3]
    saved = "saved for backward, LoRA gradients"
    assert found["dpo", 3][saved] > found["sft", 3][saved]


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("grpo", [], "no plan is made for grpo, which also generates text"),
        ("rloo", [], "no plan is made for rloo, which also generates text"),
        ("sft", ["--use_peft", "false"], "no plan is made for --use_peft false"),
        ("sft", ["--load_in_4bit"], "no plan is made for --load_in_4bit"),
        ("dpo", ["--load_in_8bit"], "no plan is made for --load_in_8bit"),
    ],
)
def test_runs_that_no_plan_is_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, more: list[str], message: str
) -> None:
    file = str(write_config(tmp_path / "config.json", tiny_config()))
    given = ["--model_name_or_path", file, "--dry_run", "--no_plan_measure", *more]
    assert message in one_line_error(capsys, command, lambda: main([command, *given]))


def test_it_says_when_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt_moe.cli.plan.free_memory", lambda: 0)
    assert plan(write_config(tmp_path / "config.json", tiny_config(num_experts=4096))) == 1
    text = capsys.readouterr().out
    assert "IT DOES NOT FIT, by" in text
    assert "takes less: a smaller --batch-size, --seq-len or --rank, --format int4, --gradient_check" in text
    assert "a smaller --gpu-memory" not in text  # there is no GPU
    assert plan(tmp_path, "--plan_gpu", "1MiB", "--gpu-memory", "1MiB") == 1
    assert "a smaller --gpu-memory" in capsys.readouterr().out
    assert plan(tmp_path, "--json") == 1  # a directory with nothing but the config
    assert json.loads(capsys.readouterr().out)["host"]["spare"] < 0


def groups(kind: str, bits: int) -> dict[str, Any]:
    """What compressed-tensors says of weights of this type and bits."""
    weights = {"type": kind, "num_bits": bits, "group_size": 32}
    return {"config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}


@pytest.mark.parametrize(
    ("method", "options", "format", "assumed"),
    [
        ("fp8", {}, "fp8", False),
        ("mxfp4", {}, "mxfp4", False),
        ("gptq", {"bits": 4}, "int4", True),
        ("gptq", {"bits": 8}, "int8", True),
        ("awq", {"w_bit": 4}, "int4", True),
        ("compressed-tensors", groups("int", 4), "int4", True),
        ("compressed-tensors", groups("float", 8), "int8", True),
        ("modelopt", {"quant_algo": "NVFP4"}, "int4", True),
        ("modelopt", {"quant_algo": "FP8"}, "int8", True),
        ("torchao", {}, "bf16", True),
    ],
)
def test_the_format_of_a_config_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: dict[str, Any],
    format: str,
    assumed: bool,
) -> None:
    config = tiny_config(quantization_config={"quant_method": method, **options})
    assert plan(write_config(tmp_path / "config.json", config), "--json") == 0
    parts = json.loads(capsys.readouterr().out)["host"]["parts"]
    (weights,) = [p for p in parts if p["name"] == "expert weights"]
    assert weights["nbytes"] == 2 * memory.weights_bytes(LAYER, format)
    assert weights["note"].startswith(f"{format} (assumed" if assumed else f"{format}, of the config's")


def test_biases_of_a_checkpoint_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_checkpoint(tmp_path, "gpt_oss", dtype=torch.bfloat16)
    assert plan(tmp_path, "--json") == 0
    parts = json.loads(capsys.readouterr().out)["host"]["parts"]
    (weights,) = [p for p in parts if p["name"] == "expert weights"]
    assert weights["nbytes"] == 2 * 2 * 8 * (3 * 32 * 24 + 24 + 24 + 32)


def test_a_measured_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_tiny_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    options = [
        "--batch-size",
        "2",
        "--seq-len",
        "16",
        "--threads",
        "1",
        "--targets",
        "experts.gate_proj,experts.down_proj,attention",
    ]
    assert main(["plan", str(path), *options]) == 0
    text = capsys.readouterr().out
    assert "qwen3_moe: layers 0-1 with 8 experts each, hidden 32, intermediate 24, 2 experts a token" in text
    assert "speed of the experts, predicted, on the CPU alone" in text
    assert "  measured: cpu_flops=" in text
    assert "it fits, with" in text


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, [], "there is no "),
        (transformers.LlamaConfig(), [], "model type 'llama' is not supported by kt_moe"),
        (tiny_config("deepseek_v3", first_k_dense_replace=2), [], "has no layer with routed experts"),
        (
            tiny_config(),
            ["--targets", "experts,nothing"],
            "targets ['nothing'], which match nothing in this model",
        ),
        (tiny_config(), ["--targets", "all-linear"], "for LoRA without --lora_target_modules by name"),
        (tiny_config(), ["x"], "specified arguments are not used by the HfArgumentParser: ['x']"),
        (tiny_config(), ["--rank", "0"], "has rank 0, wanted an integer of at least 1"),
        (tiny_config(), ["--gpu", "off", "--cpu-share", "0.5"], 'has gpu="off" and gpu_memory or cpu_share'),
        (tiny_config(), ["--gpu-memory", "six"], "gpu_memory is 'six', wanted a positive number of bytes"),
        (tiny_config(), ["--gpu_memory", "six"], "gpu_memory is 'six', wanted a positive number of bytes"),
        (tiny_config(), ["--plan_gpu", "big"], "--plan_gpu is 'big', wanted a positive number of bytes"),
    ],
)
def test_user_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, options: list[str], message: str
) -> None:
    file = tmp_path / "config.json"
    if config is not None:
        write_config(file, config)
    assert message in one_line_error(capsys, "plan", lambda: plan(file, *options))


def test_code_of_a_checkpoint_is_run_only_where_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    code = (
        "from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\nclass Config(Qwen3MoeConfig): pass\n"
    )
    code += "class Model(Qwen3MoeForCausalLM): config_class = Config\n"
    (tmp_path / "code_of_it.py").write_text(code)
    of_it = {"AutoConfig": "code_of_it.Config", "AutoModelForCausalLM": "code_of_it.Model"}
    own = {**tiny_config().to_dict(), "model_type": "of_its_own", "auto_map": of_it}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert "trust_remote_code" in one_line_error(capsys, "plan", lambda: plan(tmp_path))
    assert plan(tmp_path, "--trust_remote_code") == 0


def test_weights_that_lack_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_tiny_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    write_config(path / "config.json", tiny_config(num_hidden_layers=3))
    assert plan(path) == 2
    assert "no experts in layer 2" in capsys.readouterr().err


def test_the_plan_is_what_a_run_takes(tmp_path: Path) -> None:
    """Weights, LoRA, optimizer and saved tensors are most of this run, and known to the byte.

    15 %: the arenas of malloc and of the core are larger than what is in use, scratch depends on the threads,
    and PyTorch loads more code while it trains; together some tens of MiB here.
    """
    path = save_tiny_checkpoint(tmp_path / "m", dtype=torch.bfloat16, **MEDIUM)
    environment = {**os.environ, **EXACT_HEAP}
    python = [sys.executable, "-W", "ignore"]
    command = [
        *python,
        "-m",
        "kt_moe.cli",
        "plan",
        str(path),
        "--batch-size",
        "4",
        "--seq-len",
        "128",
        "--json",
    ]
    planned = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    parts = {p["name"]: p["nbytes"] for p in json.loads(planned.stdout)["host"]["parts"]}
    process = parts.pop("process")
    assert process > 50 << 20
    done = subprocess.run([*python, "-c", REAL, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert sum(parts.values()) == pytest.approx(int(done.stdout), rel=0.15), parts


def test_the_tightest_cgroup_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8000000 kB\n",
        "/proc/self/cgroup": "0::/outer/inner\n",
        "/sys/fs/cgroup/outer/memory.max": "5000000\n",
        "/sys/fs/cgroup/outer/memory.current": "4000000\n",
        "/sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 500000\n",
        "/sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "/sys/fs/cgroup/outer/inner/memory.current": "3000000\n",
    }
    monkeypatch.setattr(host_memory, "read_text", lambda path: files.get(str(path), ""))
    assert host_memory.free_memory() == 1_500_000
    files["/sys/fs/cgroup/outer/memory.max"] = "max\n"
    assert host_memory.free_memory() == 8_000_000 * 1024
    assert host_memory.resident() == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None), ("hidden_size", 0), ("hidden_size", -1), ("num_attention_heads", 0),
        ("vocab_size", 0), ("head_dim", None), ("rope_parameters", {"rope_type": "nosuch"}),
        ("dtype", "float99"), ("quantization_config", 5),
        ("num_experts_per_tok", 99),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_model(
    tmp_path: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(tmp_path / "config.json", "--no-measure") == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_exchange_of_expert_parallel_ranks_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes, and how many ranks tokens go to."""
    sent = 0

    def swap(got: Tensor, rows: Tensor, *_: Any, **__: Any) -> Any:
        nonlocal sent
        sent += rows.nbytes
        got.copy_(rows)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(torch.distributed, "all_to_all_single", swap)
    tokens, hidden, topk, size = 4000, 32, 3, 5
    ids = torch.rand(tokens, 16).topk(topk).indices
    routes = Routes.of(ids, partition(16, size))
    model = outline(tiny_config(num_experts=16, num_experts_per_tok=topk), RUN)
    pairs = sum(routes.sizes) / tokens / size
    assert speed._pairs(model, size) == pytest.approx(pairs, rel=0.02)
    widths = hidden, hidden + topk
    exchange = Exchange(None, lambda *_: None, [routes.sizes], [routes.sizes], widths, torch.device("cpu"))
    x, weights = torch.randn(tokens, hidden, requires_grad=True), torch.rand(tokens, topk, requires_grad=True)
    rows, _, w = arrive(start(x, weights, None, [routes], exchange), exchange, 0, topk)
    handle = leave(rows * w.sum(1, keepdim=True), None, exchange, 0)
    combine([handle], [routes], x, exchange).sum().backward()
    assert sent == sum(exchange_bytes(hidden, topk)) * sum(routes.sizes)


def test_several_hosts_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path / "config.json", tiny_config(**MEDIUM))
    given = ["--plan_gpu", "24GiB", "--gpu-memory", "1GiB", "--hosts", "3", "--ranks", "2", "--json"]
    assert plan(file, *given, "--network", "25") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["job"] == {"hosts": 3, "ranks": 2, "network": 25e9}
    host, part = found["modes"]
    assert (host["name"], part["name"]) == ("host", "global")
    alone = {p["name"]: p["nbytes"] for p in found["host"]["parts"]}
    assert host["host"] < 2 * sum(alone.values()) - alone["expert weights"] + 1
    lora = 6 * 64 * 3 * 16 * (512 + 256) * 4
    of_rest = host["network"] - lora * 2 * 5 / 6
    # A token goes to nearly all ranks; 4 of 6 are on other hosts, and a host has two.
    most = 6 * found["run"]["batch"] * found["run"]["sequence"] * sum(exchange_bytes(512, 8)) * 4 * 2
    assert 0.6 * most < part["network"] - of_rest < most
    assert part["exchange"] == pytest.approx(part["network"] / 25e9)
    assert plan(file, *given[:-1], "--plan_host_memory", "1MiB") == 1
    assert '"global": DOES NOT FIT' in capsys.readouterr().out
    error = one_line_error(capsys, "plan", lambda: plan(file, "--ranks", "0"))
    assert "--plan_ranks is 0, wanted a positive number" in error
