"""Layers that are not experts: quantised in the checkpoint or on loading, and spread over several GPUs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import ALL_EXPERTS, PEFT_WARNINGS, error, save_tiny_checkpoint, tokens
from torch import Tensor, nn

import kt_moe
from kt_moe.hf import KtExperts, KtMoeConfig
from kt_moe.hf import quantizer as quantizers

pytestmark = PEFT_WARNINGS
BLOCK = 128
# Most matrices of the second end within a block; 576 rows are kv_a_proj_with_mqa's of DeepSeek-V3.
WHOLE = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "q_lora_rank": 128,
         "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 128, "v_head_dim": 32,
         "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1}  # fmt: skip
CUT = WHOLE | {"hidden_size": 160, "moe_intermediate_size": 144, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
NOTE = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, a scale a block, and the values of these, as DeepSeek's checkpoints have them."""
    rows, cols = weight.shape
    grid = -(-rows // BLOCK), -(-cols // BLOCK)
    whole = nn.functional.pad(weight.float(), (0, grid[1] * BLOCK - cols, 0, grid[0] * BLOCK - rows))
    tiles = whole.view(grid[0], BLOCK, grid[1], BLOCK)
    scales = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).view_as(whole)[:rows, :cols].to(torch.float8_e4m3fn)
    factors = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :cols]
    return codes.contiguous(), scales, (codes.float() * factors).bfloat16()


class Quantised:
    """An FP8 checkpoint, and an ordinary one of the same values."""

    def __init__(self, path: Path, sizes: dict[str, Any]) -> None:
        self.path, self.plain = path / "fp8", path / "plain"
        save_tiny_checkpoint(self.plain, "deepseek_v3", dtype=torch.bfloat16, **sizes)
        save_tiny_checkpoint(self.path, "deepseek_v3", dtype=torch.bfloat16, **sizes)
        plain = load_file(self.plain / "model.safetensors")
        stored = dict(plain)
        for name, weight in plain.items():
            if name.endswith("proj.weight") or "_proj_" in name or name.endswith(("q_a_proj.weight",)):
                stored[name], stored[f"{name}_scale_inv"], plain[name] = fp8(weight)
        for directory, tensors in ((self.plain, plain), (self.path, stored)):
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((self.path / "config.json").read_text())
        (self.path / "config.json").write_text(json.dumps(config | {"quantization_config": NOTE}))

    def load(self, **options: Any) -> Any:
        return load(self.path, **options)


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.bfloat16, **options})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tokens()).logits.float()


@pytest.fixture(scope="module", params=[WHOLE, CUT], ids=["whole blocks", "blocks cut off"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    return Quantised(tmp_path_factory.mktemp("fp8"), request.param)


def test_fp8_attention_is_decoded_beside_fp8_experts(quantised: Quantised) -> None:
    config = KtMoeConfig()
    model = quantised.load(quantization_config=config)
    plain = load(quantised.plain, quantization_config=KtMoeConfig())
    assert {m.experts.format for m in model.modules() if isinstance(m, KtExperts)} == {"fp8"}
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name
    assert torch.equal(logits(model), logits(plain))
    assert config.stored is None  # the caller's stays as it was
    json.dumps(model.config.to_dict())


def test_lora_trains_on_it_and_is_saved(quantised: Quantised, tmp_path: Path) -> None:
    def trained(path: Path) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_b_proj", "experts"], init_lora_weights=False)
        model = peft.get_peft_model(load(path, quantization_config=KtMoeConfig()), config)
        model(tokens(), labels=tokens()).loss.backward()
        return model

    model, plain = trained(quantised.path), trained(quantised.plain)
    found = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, found[name].grad), name
    kt_moe.save_adapter(model, tmp_path)
    again = kt_moe.load_adapter(load(quantised.path, quantization_config=KtMoeConfig()), tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_the_other_door(tmp_path: Path) -> None:
    quantised = Quantised(tmp_path, WHOLE)  # transformers reads no others
    model = quantised.load(experts_implementation="kt_moe").requires_grad_(False)
    assert error(logits(model), logits(load(quantised.plain, experts_implementation="eager"))) < 1e-2
    assert kt_moe.model_experts(model)


def test_without_the_note_it_is_refused(quantised: Quantised) -> None:
    config = transformers.AutoConfig.from_pretrained(quantised.path)
    del config.quantization_config
    with pytest.raises(ValueError, match=r"weight is F8_E4M3 in the checkpoint, .* Leave it there"):
        quantised.load(config=config, quantization_config=KtMoeConfig())


def test_layers_beside_the_experts_by_quanto(tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    plain = load(save_tiny_checkpoint(tmp_path, **ALL_EXPERTS))
    ours = load(tmp_path, quantization_config=KtMoeConfig(rest=transformers.QuantoConfig(weights="int8")))
    assert isinstance(ours.model.layers[0].self_attn.q_proj, quanto.QLinear)
    assert len(kt_moe.model_experts(ours)) == 2
    assert 0 < error(logits(ours), logits(plain)) < 5e-2
    model = peft.get_peft_model(ours, peft.LoraConfig(target_modules=["experts"], init_lora_weights=False))
    model(tokens()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_another_quantiser_than_the_stored_one_is_refused(quantised: Quantised) -> None:
    config = KtMoeConfig(rest=transformers.QuantoConfig(weights="int8"))
    with pytest.raises((ValueError, ImportError), match=r"quantised already \(fp8\)|optimum-quanto"):
        quantised.load(quantization_config=config)


def test_options_of_the_stored_one(quantised: Quantised) -> None:
    config = KtMoeConfig(rest=transformers.FineGrainedFP8Config(dequantize=True))
    assert KtMoeConfig.from_dict(json.loads(config.to_json_string())).rest.dequantize
    model = quantised.load(quantization_config=config)
    assert torch.equal(logits(model), logits(quantised.load(quantization_config=KtMoeConfig())))


def test_rest_must_be_a_config() -> None:
    with pytest.raises(ValueError, match="rest is 4, wanted one of transformers' quantization configs"):
        KtMoeConfig(rest=4)
    with pytest.raises(ValueError, match="rest is KtMoeConfig"):
        KtMoeConfig(rest=KtMoeConfig())
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=9, num_experts=2, moe_intermediate_size=8,
        num_attention_heads=2, head_dim=16, num_key_value_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match="config has rest, which is for experts from a checkpoint"):
        kt_moe.wrap(model, KtMoeConfig(rest=transformers.FineGrainedFP8Config(dequantize=True)))


def test_experts_of_transformers_own_fp8_are_refused(quantised: Quantised, monkeypatch: Any) -> None:
    # As on a GPU that computes FP8, where transformers keeps the codes.
    monkeypatch.setattr(
        transformers.quantizers.quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer,
        "validate_environment",
        lambda self, *args, **kwargs: None,
    )
    with pytest.raises(ValueError, match="FP8Experts"):
        quantised.load(experts_implementation="kt_moe")
    model = quantised.load(quantization_config=KtMoeConfig())
    linear = model.model.layers[0].self_attn.q_b_proj
    assert linear.weight.dtype == torch.float8_e4m3fn  # it has all layers but the experts
    assert all(isinstance(layer.mlp.experts, KtExperts) for layer in model.model.layers[1:])
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_bitsandbytes_beside_ours(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save_tiny_checkpoint(tmp_path, hidden_size=64, dtype=torch.bfloat16)
    rest = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = load(tmp_path, quantization_config=KtMoeConfig(rest=rest))
    plain = load(tmp_path, quantization_config=rest, experts_implementation="eager")
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, bitsandbytes.nn.Linear4bit)
    assert model.is_loaded_in_4bit
    assert model.quantization_method == "bitsandbytes"
    assert torch.equal(attention.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight)
    assert error(logits(model), logits(plain)) < 2e-2
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "experts"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, peft.tuners.lora.Linear4bit)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="would write this model without its experts"):
        model.get_base_model().save_pretrained(tmp_path / "out")

    taken = kt_moe.wrap(load(tmp_path, quantization_config=rest))  # of a model that has a quantizer already
    assert taken.is_loaded_in_4bit
    assert taken.quantization_method == "bitsandbytes"
    with pytest.raises(ValueError, match="would write this model without its experts"):
        taken.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_load_model_is_from_pretrained(model_type: str, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, model_type, dtype=torch.bfloat16)
    model = kt_moe.load_model(tmp_path, KtMoeConfig(threads=1), attn_implementation="eager")
    assert type(model) is type(load(tmp_path))
    assert model.config._attn_implementation == "eager"
    assert {m.experts.runtime.threads for m in model.modules() if isinstance(m, KtExperts)} == {1}
    same = load(tmp_path, quantization_config=KtMoeConfig(), attn_implementation="eager")
    assert torch.equal(logits(model), logits(same))
    assert kt_moe.load_model(tmp_path, dtype=torch.float32, device_map=None).dtype == torch.float32
    with pytest.raises(TypeError, match="config is a dict, wanted"):
        kt_moe.load_model(tmp_path, {})
    with pytest.raises(TypeError, match="dtype is 'bfloat16', wanted a torch"):
        kt_moe.device_map(tmp_path, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"config\.json|model identifier|Repo id"):
        kt_moe.load_model(tmp_path / "nowhere")


def many_layers(path: Path) -> int:
    """A checkpoint of 8 layers, and the bytes of its largest one without its experts."""
    save_tiny_checkpoint(path, num_hidden_layers=8, dtype=torch.bfloat16)
    model = load(path, quantization_config=KtMoeConfig())
    return sum(p.nbytes for p in model.model.layers[0].parameters())


def spread(path: Path, config: KtMoeConfig | None = None, **memory: int) -> dict[str, Any]:
    limits = {int(name.removeprefix("gpu")): size for name, size in memory.items() if name != "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate sees no such GPUs here
        return kt_moe.device_map(path, config, max_memory=limits | {"cpu": memory.get("cpu", 2**30)})


def test_the_rest_is_spread_over_the_gpus(tmp_path: Path) -> None:
    layer = many_layers(tmp_path)
    assert kt_moe.device_map(tmp_path) == {"": "cpu"}
    assert spread(tmp_path, gpu0=2**30) == {"": 0}
    found = spread(tmp_path, gpu0=2**30, gpu1=2**30)
    assert set(found.values()) == {0, 1}
    counts = [sum(device == n for name, device in found.items() if ".layers." in name) for n in (0, 1)]
    assert min(counts) >= 3
    assert not any(".experts" in name for name in found)
    with pytest.raises(ValueError, match=r"do not fit the GPUs: .* less gpu_memory"):
        spread(tmp_path, gpu0=5 * layer)


def test_experts_keep_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = many_layers(tmp_path)
    monkeypatch.setattr(quantizers, "get_max_memory", lambda: {0: 100 * layer, 1: 100 * layer, "cpu": 2**30})
    limits = {"gpu0": 100 * layer, "gpu1": 100 * layer}
    assert set(spread(tmp_path, KtMoeConfig(gpu_memory=50 * layer), **limits).values()) == {0, 1}
    with pytest.raises(ValueError, match="do not fit the GPUs"):
        spread(tmp_path, KtMoeConfig(gpu_memory=98 * layer), **limits)
    found = spread(tmp_path, KtMoeConfig(gpu="cuda:0", gpu_memory=100 * layer), **limits)
    assert set(found.values()) == {1}
    assert set(spread(tmp_path, KtMoeConfig(gpu="off"), **limits).values()) == {0, 1}


@pytest.mark.parametrize("call", [kt_moe.load_model, kt_moe.device_map])
@pytest.mark.parametrize(("path", "error"), [(3, TypeError), (None, TypeError), ("", ValueError)])
def test_a_path_that_is_none_is_refused_before_the_hub_is_asked(
    call: Any, path: Any, error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kt_moe.hf.loading, "AutoConfig", None)
    with pytest.raises(error, match=r"^path is "):
        call(path)
