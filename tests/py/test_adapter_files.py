"""Adapters as strangers write them, files that do not belong together, leftovers of killed runs, merges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ALL_EXPERTS, PEFT_WARNINGS, error, load, save_tiny_checkpoint, tokens, with_lora
from torch import Tensor

import kt_moe
from kt_moe.adapter_files import read_adapter, scratch
from kt_moe.patterns import check_patterns

pytestmark = PEFT_WARNINGS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), shards=2, **ALL_EXPERTS)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load(checkpoint)


def first(
    tensors: Tensors, change: Callable[[Tensor], Tensor], part: str = "experts.2.up_proj.lora_A"
) -> Tensors:
    key = next(key for key in tensors if part in key)
    return {**tensors, key: change(tensors[key])}


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "NaN": (lambda t: first(t, with_value(float("nan"))), r"experts\.2\.up_proj\.lora_A.*NaN or infinite"),
    "infinite": (
        lambda t: first(t, with_value(float("-inf")), "q_proj.lora_B"),
        r"q_proj\.lora_B.*NaN or infinite",
    ),
    "integers": (lambda t: first(t, lambda x: x.to(torch.int32)), r"2\.up_proj\.lora_A.*torch\.int32"),
    "complex": (lambda t: first(t, lambda x: x.to(torch.complex64)), r"up_proj\.lora_A.*torch\.complex64"),
    "no dimension": (lambda t: first(t, lambda x: x.sum()), r"up_proj\.lora_A.* has shape \[\]"),
    "no elements": (lambda t: first(t, lambda x: x[:0]), r"up_proj\.lora_A.* has shape \[0, 32\]"),
    "one of a pair": (
        lambda t: {k: v for k, v in t.items() if "experts.2.up_proj.lora_B" not in k},
        r"experts\.2\.up_proj\.lora_A.* has no .*experts\.2\.up_proj\.lora_B",
    ),
    "two ranks": (lambda t: first(t, lambda x: x[:2]), r"up_proj\.lora_A.*\[2, 32\] beside \[24, 4\]"),
    "three dimensions": (lambda t: first(t, lambda x: x[None]), "does not fit this model"),
}  # fmt: skip
SLOW = "([a-z.0-9_]*)*!"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN alpha": ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha '8'"),
    "alpha in a pattern": ({"alpha_pattern": {"q_proj": float("inf")}}, "lora_alpha inf for 'q_proj'"),
    "another rank": ({"r": 8}, r"another rank or number of experts|size mismatch for .*lora_A"),
    "a rank beyond its tensors": ({"r": 10**9}, "rank 1000000000, and no LoRA tensor has more than"),
    "a pattern's rank beyond them": ({"rank_pattern": {"q_proj": 10**30}}, "has rank 10+ for 'q_proj'"),
    "alpha beyond all": ({"lora_alpha": 10**400}, "lora_alpha 10+, wanted a finite number"),
    "dropout": ({"lora_dropout": "nan"}, "lora_dropout 'nan', wanted a probability"),
    "bias": ({"bias": "weird"}, "bias 'weird', wanted none"),
    "no rank": ({"r": 0}, "has rank 0, wanted an integer"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": 2.5}}, "rank 2.5 for 'q_proj'"),
    "a pattern's kind": ({"rank_pattern": [1]}, r"rank_pattern \[1\], wanted an object"),
    "layers": ({"layers_to_transform": ["1"]}, "layers_to_transform .* wanted integers"),
    "another method": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "no method": ({"peft_type": [1]}, r"peft_type \[1\]"),
    "targets": ({"target_modules": 3}, "target_modules 3, wanted names"),
    "broken pattern": ({"target_modules": "(q_proj"}, "no regular expression"),
    "slow targets": ({"target_modules": SLOW}, "takes more than"),
    "slow ranks": ({"rank_pattern": {SLOW: 4}}, "takes more than"),
    "slow exclusion": ({"exclude_modules": SLOW}, "takes more than"),
    "slow modules": ({"modules_to_save": [SLOW]}, "takes more than"),
}


def stranger(checkpoint: Path, directory: Path, tensors: Any = None, **options: Any) -> Path:
    """An adapter by PEFT's own writer, changed."""
    with_lora(checkpoint, ["q_proj", "experts"]).save_pretrained(directory)
    if tensors is not None:
        changed = tensors(safetensors.torch.load_file(directory / WEIGHTS))
        safetensors.torch.save_file({k: v.contiguous() for k, v in changed.items()}, directory / WEIGHTS)
    if options:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **options}))
    return directory


def refused(checkpoint: Path, adapter: Path, message: str, model: Any) -> None:
    """By load and by merge, and nothing is left of the attempt."""
    with pytest.raises(ValueError, match=message):
        kt_moe.load_adapter(model, adapter)
    assert not any("lora" in name for name, _ in model.named_modules())
    output = adapter.parent / "merged"
    with pytest.raises(ValueError, match=message):
        kt_moe.merge_checkpoint(checkpoint, adapter, output)
    assert sorted(p.name for p in adapter.parent.iterdir()) == [adapter.name]


@pytest.mark.parametrize("what", TENSORS)
def test_refused_tensors(what: str, checkpoint: Path, model: Any, tmp_path: Path) -> None:
    change, message = TENSORS[what]
    refused(checkpoint, stranger(checkpoint, tmp_path / "a", change), message, model)


@pytest.mark.parametrize("what", CONFIGS)
def test_refused_configs(
    what: str, checkpoint: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt_moe.patterns._SECONDS", 1.0)
    options, message = CONFIGS[what]
    adapter = stranger(checkpoint, tmp_path / "a", **options)
    start = time.monotonic()
    refused(checkpoint, adapter, message, model)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff", "null"])
def test_a_config_that_is_none(text: str, checkpoint: Path, model: Any, tmp_path: Path) -> None:
    adapter = stranger(checkpoint, tmp_path / "a")
    (adapter / CONFIG).write_bytes(text.encode("latin-1"))
    refused(checkpoint, adapter, f"{CONFIG} in ", model)


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "], ids=len)
def test_weights_that_are_none(data: bytes, checkpoint: Path, model: Any, tmp_path: Path) -> None:
    adapter = stranger(checkpoint, tmp_path / "a")
    (adapter / WEIGHTS).write_bytes(data)
    refused(checkpoint, adapter, "cannot be read|has no|lacks", model)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(checkpoint, adapter, "cannot be read|has no|lacks", model)


# Two files that belong together


def test_readers_see_no_mixed_pair(checkpoint: Path, tmp_path: Path) -> None:
    """Two adapters that differ in alpha alone but for one value, written in turn."""
    models = [with_lora(checkpoint, ["v_proj"], lora_alpha=alpha) for alpha in (1, 2)]
    for alpha, one in zip((1, 2), models, strict=True):
        for name, parameter in one.named_parameters():
            if "lora_A" in name:
                parameter.data.fill_(alpha)
    kt_moe.save_adapter(models[0], tmp_path / "a")
    stop, seen = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            for one in models:
                kt_moe.save_adapter(one, tmp_path / "a")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            config, tensors = read_adapter(tmp_path / "a")
            seen.append(
                (config.lora_alpha, next(float(t.max()) for k, t in tensors.items() if "lora_A" in k))
            )
    finally:
        stop.set()
        writer.join()
    assert set(seen) == {(1, 1.0), (2, 2.0)}


def test_a_process_killed_between_the_files(
    checkpoint: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "a"
    kt_moe.save_adapter(with_lora(checkpoint, ["v_proj"]), adapter)
    other = with_lora(checkpoint, ["v_proj"], lora_alpha=16)
    replace = os.replace

    def once(source: Any, target: Any) -> None:
        replace(source, target)
        monkeypatch.setattr(os, "replace", killed)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        kt_moe.save_adapter(other, adapter)
    monkeypatch.setattr(os, "replace", replace)
    refused(
        checkpoint,
        adapter,
        f"{CONFIG} in .* is not the one that {WEIGHTS} was saved with: lora_alpha is 8",
        model,
    )
    kt_moe.save_adapter(other, adapter)
    assert read_adapter(adapter)[0].lora_alpha == 16


def test_lora_that_kt_kernel_keeps_apart_is_not_lost(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    kt_moe.save_adapter(with_lora(checkpoint, ["q_proj"]), adapter)
    _, tensors = read_adapter(adapter)
    safetensors.torch.save_file(tensors, adapter / WEIGHTS)  # as PEFT writes it
    fused = adapter / "fused_expert_lora.safetensors"
    safetensors.torch.save_file({"layers.0.experts.up_lora_a": torch.zeros(4, 2, 8)}, fused)
    refused(checkpoint, adapter, f"LoRA of experts in {fused.name}.*convert_kt_to_sglang_adapter", model)
    kt_moe.save_adapter(with_lora(checkpoint, ["q_proj"]), adapter)  # the other file is an old one now
    assert read_adapter(adapter)[1].keys() == tensors.keys()


def test_a_changed_base_model_is_no_other_config(checkpoint: Path, tmp_path: Path) -> None:
    kt_moe.save_adapter(with_lora(checkpoint), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(
        json.dumps({**config, "base_model_name_or_path": "other", "task_type": "CAUSAL_LM"})
    )
    assert read_adapter(tmp_path)[0].base_model_name_or_path == "other"


def test_patterns_that_stand_alone_pass() -> None:
    check_patterns(["(?i).*q_proj", r".*\.[0-3]\..*"], ["layers.0.q_proj"] * 3)


def test_leftovers_of_killed_processes(checkpoint: Path, tmp_path: Path) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "out"
    code = """
import os, sys
from pathlib import Path
from kt_moe.adapter_files import scratch
first, second = Path(sys.argv[1]), Path(sys.argv[2])
with scratch(first, "new") as new, scratch(second, "out") as other:
    for directory in (new, other):
        (directory / "half").write_bytes(b"x" * 1000)
    os._exit(9)
"""
    adapter.mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(adapter), str(tmp_path)], check=False)
    assert done.returncode == 9
    assert list(adapter.glob(".kt_moe-new-*/half"))
    assert list(tmp_path.glob(".kt_moe-out-*/half"))
    with scratch(adapter, "new") as in_use:  # of another writer, which is alive
        kt_moe.save_adapter(with_lora(checkpoint), adapter)
        assert sorted(p.name for p in adapter.iterdir()) == sorted([in_use.name, CONFIG, WEIGHTS])
    (tmp_path / ".out-backup").mkdir()  # the user's own
    kt_moe.merge_checkpoint(checkpoint, adapter, output)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out-backup", "adapter", "out"]


# Merges


def test_links_out_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """They are not copied, but for a snapshot of the hub's cache, which is made of links."""
    (tmp_path / "secret").write_text("key")
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    base = tmp_path / "hub" / "snapshots" / "1234"
    base.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (tmp_path / "hub" / "blobs" / file.name).write_bytes(file.read_bytes())
        (base / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    (base / "secret.txt").symlink_to(tmp_path / "secret")
    (base / "folder").symlink_to(tmp_path)
    (base / "inside.json").symlink_to("config.json")
    kt_moe.save_adapter(with_lora(checkpoint), tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"secret\.txt leads out of .* and is not copied"):
        kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in checkpoint.iterdir()} | {"inside.json"}
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("qwen3_moe", ["experts", "mlp.gate", "embed_tokens"], {"modules_to_save": ["lm_head", "norm"]}),
        ("qwen2_moe", ["experts", "shared_expert.up_proj", "q_proj"], {"use_rslora": True}),
        ("mixtral", ["experts", "q_proj"], {"rank_pattern": {"layers.1.mlp.experts": 3}}),
        ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"], {"alpha_pattern": {"experts.up_proj": 3}}),
        ("gpt_oss", ["experts", "o_proj"], {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_merged_families(family: str, targets: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_tiny_checkpoint(base, family, shards=2)
    model = with_lora(base, targets, **options)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    kt_moe.save_adapter(model, adapter)
    kt_moe.merge_checkpoint(base, adapter, out)
    plain = PeftModel.from_pretrained(load(base, kt=False), adapter)(tokens()).logits
    assert error(load(out, kt=False)(tokens()).logits, plain) < 1e-4
    assert error(load(base, kt=False)(tokens()).logits, plain) > 2e-2


def test_a_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    theirs = get_peft_model(load(tmp_path / "base", kt=False), LoraConfig(init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter")
    kt_moe.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load(tmp_path / "out", kt=False)
    assert error(merged(tokens()).logits, theirs.eval()(tokens()).logits) < 1e-5
    monkeypatch.setattr("kt_moe.patterns._SECONDS", 1.0)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**config, "target_modules": SLOW}))
    with pytest.raises(ValueError, match="takes more than"):
        kt_moe.load_adapter(merged, tmp_path / "adapter")
