"""Adapters on disk: what plain PEFT reads, what a full disk leaves, what a merge writes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ALL_EXPERTS, PEFT_WARNINGS, error, load, save_tiny_checkpoint, tokens, with_lora
from torch import Tensor

import kt_moe
from kt_moe import cli
from kt_moe.hf import KtLoraExperts

pytestmark = PEFT_WARNINGS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), shards=3, **ALL_EXPERTS)


PLAIN = """
import sys, torch, transformers, peft
base, out, *adapters = sys.argv[1:]
tokens = torch.load(out)
result = {}
for adapter in adapters:
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            result[adapter, dtype] = model(tokens).logits
assert "kt_moe" not in sys.modules
torch.save(result, out)
"""


def test_plain_transformers_and_peft_read_it(checkpoint: Path, tmp_path: Path) -> None:
    """In a process that never imports kt_moe: the same logits, in float32 and in bf16."""
    logits: dict[tuple[str, torch.dtype], Tensor] = {}
    for name, targets in (("experts", ["experts"]), ("mixed", ["q_proj", "v_proj", "experts"])):
        model = with_lora(checkpoint, targets, lora_dropout=0.1, use_rslora=name == "mixed").eval()
        adapter = str(tmp_path / name)
        kt_moe.save_adapter(model, adapter)
        for dtype in (torch.float32, torch.bfloat16):
            ours = kt_moe.load_adapter(load(checkpoint, dtype=dtype), adapter)
            logits[adapter, dtype] = ours(tokens()).logits
        assert torch.equal(logits[adapter, torch.float32], model(tokens()).logits)

    out = tmp_path / "logits.pt"
    torch.save(tokens(), out)
    adapters = list(dict.fromkeys(adapter for adapter, _ in logits))
    subprocess.run([sys.executable, "-c", PLAIN, str(checkpoint), str(out), *adapters], check=True)
    plain = torch.load(out)
    for adapter in adapters:
        reference = plain[adapter, torch.float32]
        allowed = error(plain[adapter, torch.bfloat16], reference)
        assert error(logits[adapter, torch.float32], reference) <= allowed < 0.05
        assert error(logits[adapter, torch.bfloat16], reference) <= 1.2 * allowed  # attention rounds in both


def test_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    kt_moe.save_adapter(with_lora(checkpoint, ["q_proj", "experts"]), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == str(checkpoint)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2 * 2 + 2 * 4 * 3 * 2
    prefix = "base_model.model.model.layers.1.mlp.experts.3"
    assert tensors[f"{prefix}.gate_proj.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{prefix}.down_proj.lora_B.weight"].shape == (32, 4)
    assert {(tmp_path / name).stat().st_mode & 0o044 for name in (WEIGHTS, CONFIG)} == {
        0o044
    }  # others may read


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_the_config_is_the_one_that_peft_writes(task: str | None, checkpoint: Path, tmp_path: Path) -> None:
    model = with_lora(checkpoint, ["q_proj", "experts"], task_type=task)
    model.save_pretrained(tmp_path / "peft")
    kt_moe.save_adapter(model, tmp_path / "ours")
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("peft", "ours")]
    assert json.loads(texts[0]) == json.loads(texts[1])


def test_mixtral_names(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "base", "mixtral")
    kt_moe.save_adapter(with_lora(tmp_path / "base"), tmp_path / "adapter")
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / WEIGHTS)
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.7.w2.lora_A.weight" in tensors
    plain = PeftModel.from_pretrained(load(tmp_path / "base", kt=False), tmp_path / "adapter")
    ours = kt_moe.load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    by_token = (plain(tokens()).logits - ours(tokens()).logits).norm(dim=-1)
    assert by_token.median() < 1e-2 * plain(tokens()).logits.norm(dim=-1).median()


def test_a_named_adapter(checkpoint: Path, tmp_path: Path) -> None:
    model = with_lora(checkpoint)
    model.add_adapter("b", LoraConfig(target_modules=["experts"], r=2, init_lora_weights=False))
    kt_moe.save_adapter(model, tmp_path, adapter_name="b")
    again = kt_moe.load_adapter(with_lora(checkpoint), tmp_path, adapter_name="c", is_trainable=True)
    assert again.active_adapters == ["default"]
    layers = [[m for m in x.modules() if isinstance(m, KtLoraExperts)] for x in (model, again)]
    for old, new in zip(*layers, strict=True):
        for a, b in zip(old.lora_B["b"].values(), new.lora_B["c"].values(), strict=True):
            assert torch.equal(a, b)
            assert b.requires_grad
    with pytest.raises(ValueError, match=r"adapter_name is 'x', the model's adapters are \['b', 'default'\]"):
        kt_moe.save_adapter(model, tmp_path, adapter_name="x")
    with pytest.raises(ValueError, match=r"the model's adapters are \[\]"):
        kt_moe.save_adapter(load(checkpoint), tmp_path)


def test_old_adapter_with_one_key_an_expert(checkpoint: Path, tmp_path: Path) -> None:
    """As PEFT wrote them when experts were lists of nn.Linear: arithmetic by hand on the base weights."""
    generator = torch.Generator().manual_seed(0)
    reference = load(checkpoint, kt=False)
    tensors = {}
    for layer, e in ((layer, e) for layer in range(2) for e in range(4)):
        experts = reference.model.layers[layer].mlp.experts
        for name, (out, into) in {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}.items():
            a, b = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator) / 8
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{name}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
            weight = experts.down_proj.data if name == "down_proj" else experts.gate_up_proj.data
            rows = slice(24, 48) if name == "up_proj" else slice(0, out)
            weight[e, rows] += 6 / 2 * b @ a
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    LoraConfig(r=2, lora_alpha=6, target_modules=["gate_proj", "up_proj", "down_proj"]).save_pretrained(
        tmp_path
    )
    ours = kt_moe.load_adapter(load(checkpoint), tmp_path)
    assert error(ours(tokens()).logits, reference(tokens()).logits) < 2e-2
    assert error(load(checkpoint)(tokens()).logits, reference(tokens()).logits) > 0.1


# What is wrong is said


def edit(directory: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    safetensors.torch.save_file(change(tensors), directory / WEIGHTS)


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "up_proj"), r"has no LoRA of up_proj of the experts at .*layers\.0\.mlp"),
        (lambda t: without(t, "down_proj"), r"no LoRA of down_proj of .*, only of gate_proj, up_proj"),
        (lambda t: without(t, "layers.1"), r"lacks 6 keys .*layers\.1\.mlp\.experts"),
        (
            lambda t: {**t, **{f"base_model.model.model.x.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}},
            r"has unknown 2 keys",
        ),
        (lambda t: without(t, "experts.3"), r"another rank or number of experts .* A \[24, 32\]"),
    ],
    ids=["up", "down", "missing", "unknown", "experts"],
)
def test_adapter_that_does_not_fit(change: Any, message: str, checkpoint: Path, tmp_path: Path) -> None:
    kt_moe.save_adapter(with_lora(checkpoint), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        kt_moe.load_adapter(load(checkpoint), tmp_path)


def test_no_adapter(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no {CONFIG} in {tmp_path}"):
        kt_moe.load_adapter(load(checkpoint), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["experts"]}))
    with pytest.raises(FileNotFoundError, match=rf"no {WEIGHTS} in {tmp_path}"):
        kt_moe.load_adapter(load(checkpoint), tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {CONFIG} in {tmp_path}"):
        kt_moe.merge_adapter(checkpoint, tmp_path, tmp_path / "out")


def test_an_adapter_has_the_same_bytes_each_time(checkpoint: Path, tmp_path: Path) -> None:
    model = with_lora(checkpoint)
    written = set()
    for n in range(12):
        kt_moe.save_adapter(model, tmp_path / str(n))
        written.add((tmp_path / str(n) / WEIGHTS).read_bytes())
    assert len(written) == 1


def half_written(tensors: Any, path: Path, **_: Any) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_adapter(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kt_moe.save_adapter(with_lora(checkpoint), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = with_lora(checkpoint, seed=1, r=2)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half_written)
        with pytest.raises(OSError, match="No space left"):
            kt_moe.save_adapter(other, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            LoraConfig, "save_pretrained", lambda self, path: half_written(None, Path(path) / CONFIG)
        )
        with pytest.raises(OSError, match="No space left"):
            kt_moe.save_adapter(other, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    kt_moe.save_adapter(other, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(before)
    assert (tmp_path / WEIGHTS).read_bytes() != before[WEIGHTS]


def test_a_file_that_cannot_grow_is_an_os_error(checkpoint: Path, tmp_path: Path) -> None:
    model = with_lora(checkpoint)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # the system's own refusal, not a stand-in
    try:
        with pytest.raises(OSError, match=f"cannot write .*{WEIGHTS}.*File too large"):
            kt_moe.save_adapter(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


# Merging


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    kt_moe.save_adapter(with_lora(checkpoint, ["q_proj", "experts"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merged_checkpoint(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    kt_moe.merge_adapter(checkpoint, adapter, out)
    assert {p.name for p in out.iterdir()} == {p.name for p in checkpoint.iterdir()}
    plain = PeftModel.from_pretrained(load(checkpoint, kt=False), adapter)(tokens()).logits
    assert error(load(out, kt=False)(tokens()).logits, plain) < 1e-5
    assert error(load(out)(tokens()).logits, plain) < 2e-2
    assert error(load(checkpoint, kt=False)(tokens()).logits, plain) > 0.1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "merged"]


@pytest.mark.parametrize("there", [True, False], ids=["empty directory", "nothing yet"])
def test_merged_where_a_link_leads(there: bool, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "disk" / "merged"
    link.symlink_to(target)
    if there:
        target.mkdir(parents=True)
    kt_moe.merge_checkpoint(checkpoint, adapter, link)
    assert link.is_symlink()
    assert {p.name for p in target.iterdir()} == {p.name for p in checkpoint.iterdir()}


def test_the_merge_command(
    checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert cli.main(["merge", str(checkpoint), str(adapter), str(out)]) == 0
    assert f"in {out}" in capsys.readouterr().out
    kt_moe.merge_checkpoint(checkpoint, adapter, tmp_path / "same")
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes()
    assert cli.main(["merge", str(checkpoint), str(adapter), str(out)]) == 2
    assert f"output is {out}, which exists already" in capsys.readouterr().err
    assert cli.main(["merge", str(tmp_path / "nowhere"), str(adapter), str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_merge_with_patterns_and_rslora(checkpoint: Path, tmp_path: Path) -> None:
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    kt_moe.save_adapter(with_lora(checkpoint, ["q_proj", "v_proj"], **options), tmp_path / "a")
    kt_moe.merge_adapter(checkpoint, tmp_path / "a", tmp_path / "out")
    plain = PeftModel.from_pretrained(load(checkpoint, kt=False), tmp_path / "a")(tokens()).logits
    assert error(load(tmp_path / "out", kt=False)(tokens()).logits, plain) < 1e-5


def test_merge_refuses(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output is .*, which exists already"):
        kt_moe.merge_adapter(checkpoint, adapter, adapter)
    with pytest.raises(FileNotFoundError, match=r"base is .*nowhere, wanted the directory"):
        kt_moe.merge_adapter(tmp_path / "nowhere", adapter, tmp_path / "out")
    other = save_tiny_checkpoint(
        tmp_path / "other", **{**ALL_EXPERTS, "num_experts": 3, "num_experts_per_tok": 2}
    )
    with pytest.raises(ValueError, match="has another rank or number of experts"):
        kt_moe.merge_adapter(other, adapter, tmp_path / "out")
    narrow = save_tiny_checkpoint(tmp_path / "narrow", moe_intermediate_size=16, **ALL_EXPERTS)
    with pytest.raises(ValueError, match="another rank or number of experts"):
        kt_moe.merge_adapter(narrow, adapter, tmp_path / "out")
    with_lora(checkpoint).save_pretrained(tmp_path / "dora")
    config = json.loads((tmp_path / "dora" / CONFIG).read_text())
    (tmp_path / "dora" / CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="has use_dora, which merge_checkpoint does not know"):
        kt_moe.merge_adapter(checkpoint, tmp_path / "dora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_merge_refuses_tied_embeddings(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    kt_moe.save_adapter(with_lora(base, ["embed_tokens", "experts"]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight alone, to which the model ties lm_head"):
        kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_refuses_what_overflows(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", dtype=torch.float16)
    model = with_lora(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e7)
    kt_moe.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"merged is beyond what torch\.float16 holds"):
        kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["flipped", "full"])
def test_merge_checks_what_it_wrote(
    fault: str, checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = safetensors.torch.save_file

    def flipped(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        save_file(tensors, path, **kwargs)
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(safetensors.torch, "save_file", flipped if fault == "flipped" else half_written)
    with pytest.raises(OSError, match="reads back from .* differently" if fault == "flipped" else "No space"):
        kt_moe.merge_adapter(checkpoint, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_tied_layers_are_saved(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True, **ALL_EXPERTS)
    options = {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    model = get_peft_model(
        load(base), LoraConfig(target_modules=["experts"], init_lora_weights=False, **options)
    )
    kt_moe.save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert ours.keys() >= theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = kt_moe.load_adapter(load(base), tmp_path / "ours")
    assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)
