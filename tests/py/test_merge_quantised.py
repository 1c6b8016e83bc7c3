"""Adapters merged into quantised checkpoints: every stored format, outputs before and after.

Experts are quantised here by the formats' plainest rules, and packed by `stored_formats`, which shares
nothing with the library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from stored_formats import E2M1, pack_nibbles
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
from kt_moe.experts import PROJECTIONS

pytestmark = PEFT_WARNINGS

WEIGHTS = "model.safetensors"
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
SIZES = {"hidden_size": 64, "moe_intermediate_size": 96, "num_attention_heads": 4}
Tails = dict[str, Tensor]


def fp8(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tails:
    scale = (weight.float().abs().max() / 448).to(scale_dtype)
    codes = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale.view(1, 1)}


def fp8_rows(weight: Tensor) -> Tails:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def int8(weight: Tensor) -> Tails:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return {"weight": (weight.float() / scale).round().to(torch.int8), "weight_scale": scale}


def groups(weight: Tensor, levels: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [out, in / 32] bf16, and weights and scales by element."""
    scale = (weight.float().unflatten(1, (-1, 32)).abs().amax(2) / levels).bfloat16()
    return scale, weight.float(), scale.float().repeat_interleave(32, 1)


def compressed_tensors(weight: Tensor) -> Tails:
    scale, values, wide = groups(weight, 7)
    codes = (values / wide).round().clamp(-8, 7).long()
    shape = torch.tensor(weight.shape)
    return {"weight_packed": pack_nibbles(codes + 8, 1), "weight_scale": scale, "weight_shape": shape}


def gptq(weight: Tensor) -> Tails:
    scale, values, wide = groups(weight, 7)
    codes = ((values / wide).round().clamp(-8, 7) + 8).long()
    zeros = pack_nibbles(torch.full((scale.shape[1], len(scale)), 7), 1)
    order = (torch.arange(weight.shape[1]) // 32).to(torch.int32)
    packed = pack_nibbles(codes.T, 0)
    return {"qweight": packed, "qzeros": zeros, "scales": scale.T.half().contiguous(), "g_idx": order}


def awq(weight: Tensor) -> Tails:
    """Asymmetric: zero points of their own."""
    parts = weight.float().unflatten(1, (-1, 32))
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half()
    zeros = (-low / scale.float()).round().clamp(0, 15)
    codes = (parts / scale.float()[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1).long()
    packed = pack_nibbles(codes.T, 1, AWQ), pack_nibbles(zeros.long().T, 1, AWQ)
    return {"qweight": packed[0], "qzeros": packed[1], "scales": scale.T.contiguous()}


def nvfp4(weight: Tensor, modelopt: bool = False) -> Tails:
    """With one number a matrix that leaves the largest scale no room to grow."""
    parts = weight.float().unflatten(1, (-1, 16))
    whole = parts.abs().max() / (6 * 448)
    scale = (parts.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    levels = parts / (scale.float() * whole)[..., None]
    codes = (levels.abs()[..., None] - E2M1[:8]).abs().argmin(-1) | (levels < 0).long() << 3
    codes = codes.flatten(1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    if modelopt:
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole}
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": (1 / whole).view(1)}


FORMATS: dict[str, tuple[Callable[[Tensor], Tails], str, float]] = {  # with the bound of the error
    "fp8": (fp8, "fp8", 0.05),
    "fp8, bf16 scales": (lambda weight: fp8(weight, torch.bfloat16), "fp8", 0.05),
    "fp8, a scale a row": (fp8_rows, "fp8", 0.05),
    "int8": (int8, "int8", 0.015),
    "compressed-tensors": (compressed_tensors, "int4", 0.15),
    "gptq": (gptq, "gptq", 0.15),
    "awq": (awq, "awq", 0.15),
    "nvfp4, compressed-tensors": (nvfp4, "nvfp4", 0.15),
    "nvfp4, modelopt": (lambda weight: nvfp4(weight, modelopt=True), "nvfp4", 0.15),
}


def quantised(base: Path, directory: Path, quantise: Callable[[Tensor], Tails]) -> Path:
    """A copy of a checkpoint with its routed experts quantised, and a config that says so."""
    directory.mkdir()
    for file in base.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, Tensor] = {}
    for name, tensor in safetensors.torch.load_file(base / WEIGHTS).items():
        if ".mlp.experts." in name:
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{tail}": t for tail, t in quantise(tensor).items()}
        else:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "some"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load_quantised(path: Path) -> Any:
    """With the experts as they are stored."""
    config = transformers.AutoConfig.from_pretrained(path)
    del config.quantization_config
    return load(path, config=config)


def experts_of(model: Any) -> list[tuple[Tensor, ...]]:
    """What the experts of each layer multiply by."""
    return [one.dequantize() for one in kt_moe.model_experts(model).values()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base"), **ALL_EXPERTS, **SIZES)


@pytest.mark.parametrize("format", FORMATS)
def test_merged(format: str, checkpoint: Path, tmp_path: Path) -> None:
    quantise, name, bound = FORMATS[format]
    base = quantised(checkpoint, tmp_path / "base", quantise)
    model = with_lora(base, ["experts", "q_proj"], base=load_quantised(base)).eval()
    kt_moe.save_adapter(model, tmp_path / "adapter")
    found = kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = load_quantised(tmp_path / "out")
    wanted, before = model(tokens()).logits, load_quantised(base)(tokens()).logits
    assert error(merged(tokens()).logits, wanted) < bound
    assert error(before, wanted) > 2 * bound
    old, new = (safetensors.torch.load_file(path / WEIGHTS) for path in (base, tmp_path / "out"))
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    # the report, against what the core decodes, which is rounded to bf16
    difference = whole = change = 0.0
    for layer, was, now in zip(
        lora_layers(model), experts_of(load_quantised(base)), experts_of(merged), strict=True
    ):
        for p, b, a in zip(PROJECTIONS, was, now, strict=True):
            delta = 2 * (layer.lora_B["default"][p] @ layer.lora_A["default"][p]).detach()
            difference += float((a.float() - b.float() - delta).square().sum())
            whole += float((b.float() + delta).square().sum())
            change += float(delta.square().sum())
    assert found.keys() == {name}
    assert found[name].matrices == 2 * 3 * 4
    assert 0 < found[name].of_change < 1
    assert found[name].error == pytest.approx((difference / whole) ** 0.5, rel=0.1)
    assert found[name].of_change == pytest.approx((difference / change) ** 0.5, rel=0.1)


@pytest.mark.parametrize("format", FORMATS)
def test_where_nothing_changes_the_bytes_stay(format: str, checkpoint: Path, tmp_path: Path) -> None:
    base = quantised(checkpoint, tmp_path / "base", FORMATS[format][0])
    model = with_lora(base, base=load_quantised(base), init_lora_weights=True)  # B is zero
    kt_moe.save_adapter(model, tmp_path / "adapter")
    (found,) = kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out").values()
    assert (found.error, found.of_change) == (0, 0)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()


def test_a_scale_in_another_shard_than_its_codes(checkpoint: Path, tmp_path: Path) -> None:
    base = quantised(checkpoint, tmp_path / "base", fp8)
    model = with_lora(base, base=load_quantised(base))
    kt_moe.save_adapter(model, tmp_path / "adapter")
    whole = kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "whole")
    tensors = safetensors.torch.load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    names = {n: f"model-0000{1 + n.endswith('_inv')}-of-00002.safetensors" for n in tensors}
    for file in set(names.values()):
        safetensors.torch.save_file({n: t for n, t in tensors.items() if names[n] == file}, base / file)
    (base / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    apart = kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "apart")
    assert apart == whole
    wanted = safetensors.torch.load_file(tmp_path / "whole" / WEIGHTS)
    for file in set(names.values()):
        found = safetensors.torch.load_file(tmp_path / "apart" / file)
        assert found.keys() == {n for n in names if names[n] == file}
        for n, tensor in found.items():
            assert torch.equal(tensor.view(torch.uint8), wanted[n].view(torch.uint8)), n


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [E, out, in / 32, 16] and scales [E, out, in / 32] of [E, out, in]."""
    parts = weight.float().unflatten(2, (-1, 32))
    exponents = torch.floor(torch.log2(parts.abs().amax(3))) - 2
    levels = parts / torch.exp2(exponents)[..., None]
    codes = (levels[..., None] - E2M1).abs().argmin(-1)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


def test_gpt_oss(tmp_path: Path) -> None:
    """Experts together, gate and up alternating, in mxfp4."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 4, "hidden_size": 64, "intermediate_size": 96}
    plain = save_tiny_checkpoint(tmp_path / "plain", "gpt_oss", **sizes)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((plain / "config.json").read_bytes())
    tensors: dict[str, Tensor] = {}
    for name, tensor in safetensors.torch.load_file(plain / WEIGHTS).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensor.mT)
        else:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    model = with_lora(base, ["experts"]).eval()
    kt_moe.save_adapter(model, tmp_path / "adapter")
    found = kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    wanted = model(tokens()).logits
    assert (
        error(load(tmp_path / "out")(tokens()).logits, wanted)
        < 0.2
        < error(load(base)(tokens()).logits, wanted)
    )
    assert found.keys() == {"mxfp4"}
    assert found["mxfp4"].matrices == 2 * 2 * 4
    assert 0.05 < found["mxfp4"].error < 0.15


def test_attention_that_is_quantised_too(checkpoint: Path, tmp_path: Path) -> None:
    adapter = with_lora(checkpoint, ["q_proj", "experts"])
    kt_moe.save_adapter(adapter, tmp_path / "adapter")
    base = quantised(checkpoint, tmp_path / "base", fp8)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = safetensors.torch.load_file(base / WEIGHTS)
    weight = tensors.pop(name)
    tails = fp8(weight)
    tails["weight_scale_inv"] = tails["weight_scale_inv"].reshape(())
    tensors |= {f"{name.removesuffix('weight')}{tail}": t for tail, t in tails.items()}
    tensors["model.layers.1.self_attn.q_proj.input_scale"] = torch.tensor(0.5)
    safetensors.torch.save_file(tensors, base / WEIGHTS)
    kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)
    layer = adapter.base_model.model.model.layers[1].self_attn.q_proj
    delta = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    value = merged[name].float() * merged[f"{name}_scale_inv"]
    assert error(value, weight.float() + delta.detach()) < 0.04
    assert float(merged["model.layers.1.self_attn.q_proj.input_scale"]) == 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda tails: tails.pop("weight_scale_inv"),
        lambda tails: tails.update(weight=tails["weight"].view(torch.uint8)),
    ],
    ids=["no scale", "another dtype"],
)
def test_refused(change: Callable[[Tails], object], checkpoint: Path, tmp_path: Path) -> None:
    kt_moe.save_adapter(with_lora(checkpoint, ["q_proj"]), tmp_path / "adapter")
    base = quantised(checkpoint, tmp_path / "base", fp8)
    name = "model.layers.1.self_attn.q_proj"
    tensors = safetensors.torch.load_file(base / WEIGHTS)
    tails = fp8(tensors.pop(f"{name}.weight"))
    change(tails)
    safetensors.torch.save_file({**tensors, **{f"{name}.{k}": t for k, t in tails.items()}}, base / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"q_proj\.weight is .*, stored in a way that merge_checkpoint does not"
    ):
        kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def gptq_v2(weight: Tensor) -> Tails:
    """GPTQ's second format: zero points as they are."""
    tails = gptq(weight)
    return tails | {"qzeros": tails["qzeros"] + 0x11111111}  # 7 in each nibble


def test_gptq_v2_is_merged_and_loaded_by_others(checkpoint: Path, tmp_path: Path) -> None:
    """The same values as GPTQ's first format gives, and what our doors refuse by name."""
    kt_moe.save_adapter(with_lora(checkpoint), tmp_path / "adapter")
    merged = {}
    for name, how in (("gptq", gptq), ("gptq_v2", gptq_v2)):
        base = quantised(checkpoint, tmp_path / name, how)
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "checkpoint_format": name}
        (base / "config.json").write_text(json.dumps(config))
        found = kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / f"{name}, merged")
        merged[name] = found[name], safetensors.torch.load_file(tmp_path / f"{name}, merged" / WEIGHTS)
    assert merged["gptq"][0] == merged["gptq_v2"][0]
    first, second = merged["gptq"][1], merged["gptq_v2"][1]
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor + 0x11111111 if name.endswith(".qzeros") else tensor), name
    with pytest.raises(ValueError, match="the zero points of a symmetric gptq_v2 file"):
        load(base)
    unsaid = {**config, "quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(unsaid))
    with pytest.raises(ValueError, match=r"qzeros holds nothing but 8, .* no checkpoint_format gptq_v2"):
        kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))  # only the config tells
    with pytest.raises(ValueError, match="has checkpoint_format gptq_v2, wanted gptq for experts"):
        load(tmp_path / "gptq")


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_smaller_than_the_steps_of_the_format_does_not_arrive(
    format: str, checkpoint: Path, tmp_path: Path
) -> None:
    """And the result says so: nothing is stored that is further from W + sBA than W is."""
    base = quantised(checkpoint, tmp_path / "base", FORMATS[format][0])
    model = with_lora(base, base=load_quantised(base), lora_alpha=1e-4)
    kt_moe.save_adapter(model, tmp_path / "adapter")
    (found,) = kt_moe.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out").values()
    assert found.error < 1e-3
    assert 0.5 < found.of_change <= 1
