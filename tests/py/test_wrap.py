"""`kt_moe.wrap`: a model that is in memory already becomes what `KtMoeConfig` would have made of its file."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import peft
import pytest
import torch
import transformers
from tiny_models import gradients
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

import kt_moe
from kt_moe.hf import loaded as loaded_models

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
             num_experts_per_tok=2)  # fmt: skip
CONFIGS = {
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=32, num_experts=8, intermediate_size=64, head_dim=16
    ),
    "mixtral": transformers.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=6),
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, intermediate_size=32, num_local_experts=6, head_dim=16, layer_types=["full_attention"] * 3
    ),
}
IDS = torch.arange(18).view(2, 9)


def build(family: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def about(found: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as two orders of rounding to bf16 are."""
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def trained(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of LoRA on attention and experts with fixed values."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "experts"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), gradients(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_the_model_that_a_checkpoint_gives(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    config = kt_moe.KtMoeConfig(threads=2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=config
    )

    assert kt_moe.wrap(model, kt_moe.KtMoeConfig(threads=2)) is model

    assert not [name for name, _ in model.named_parameters() if "experts" in name]
    ours, grads = trained(model)
    expected_logits, expected = trained(loaded)
    assert torch.equal(ours, expected_logits)
    assert grads.keys() == expected.keys()
    assert any("experts" in name for name in grads)
    for name, gradient in expected.items():
        assert torch.equal(grads[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_rounded(dtype):
    model, rounded = build(dtype=dtype), build(dtype=dtype)
    for name, parameter in rounded.named_parameters():
        if "experts" in name:
            parameter.data = parameter.data.bfloat16().to(dtype)
    expected = logits(rounded)
    got = logits(kt_moe.wrap(model))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_options_reach_the_experts():
    model = kt_moe.wrap(
        build(), kt_moe.KtMoeConfig(format="int8", recompute=True, checkpoint_experts="retain", gpu="off")
    )
    found = kt_moe.model_experts(model)
    assert list(found) == [f"model.layers.{n}.mlp.experts" for n in range(3)]
    for experts in found.values():
        assert (experts.format, experts.recompute, experts.checkpoint_experts) == ("int8", True, "retain")
        assert experts.gpu.cpu_share == 1.0


def test_a_model_in_peft_keeps_its_adapters():
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    expected = logits(model)
    assert kt_moe.wrap(model) is model
    out = model(input_ids=IDS, labels=IDS)
    about(out.logits.detach(), expected)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_adapters_elsewhere_and_later_ones_on_experts(tmp_path):
    """An adapter on attention that was there before, and one on experts too, each saved and read again."""
    names = {"before": ["q_proj", "v_proj"], "after": ["q_proj", "experts"]}
    model = peft.get_peft_model(
        build(dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=names["before"], init_lora_weights=False),
        adapter_name="before",
    )
    kt_moe.wrap(model)
    expected = {"before": logits(model)}
    model.add_adapter(
        "after", peft.LoraConfig(r=2, target_modules=names["after"], init_lora_weights=False, lora_alpha=4)
    )
    assert torch.equal(logits(model), expected["before"])
    model.set_adapter("after")
    expected["after"] = logits(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.add_weighted_adapter(["before", "after"], [1.0, 1.0], "both", combination_type="cat")
    model.save_pretrained(tmp_path)
    for name, found in expected.items():
        wrapped = kt_moe.wrap(build(dtype=torch.float32))
        assert torch.equal(logits(peft.PeftModel.from_pretrained(wrapped, tmp_path / name)), found)
        plain = peft.PeftModel.from_pretrained(build(dtype=torch.float32), tmp_path / name)
        about(logits(plain), found)


def test_a_model_with_a_device_map():
    """accelerate gives every module of one a forward of its own, which moves its inputs."""
    import accelerate

    model = build()
    expected = logits(model)
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {f"model.layers.{n}": "cpu" for n in range(3)}
    accelerate.dispatch_model(model, devices, force_hooks=True)
    about(logits(kt_moe.wrap(model)), expected)


def test_training_mode_and_copies():
    model = build().train()
    kt_moe.wrap(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(copy.deepcopy(model).eval()), logits(model.eval()))


def test_layers_that_share_experts_share_ours():
    model = build(dtype=torch.float32)  # in bf16 rounding changes the routing of this one
    layers = model.model.layers
    layers[2].mlp.experts = layers[0].mlp.experts
    expected = logits(model)
    kt_moe.wrap(model)
    assert layers[2].mlp.experts is layers[0].mlp.experts
    about(logits(model), expected)


def test_experts_that_are_in_memory_twice_are_then_once():
    model = build()
    model.set_experts_implementation("kt_moe")
    model.requires_grad_(False)
    expected = logits(model)
    packed = weakref.ref(kt_moe.model_experts(model)["model.layers.1.mlp.experts"])
    weight = weakref.ref(model.model.layers[1].mlp.experts.down_proj)
    assert torch.equal(logits(kt_moe.wrap(model)), expected)
    gc.collect()
    assert packed() is None
    assert weight() is None


def test_after_an_interrupt_the_model_works_and_can_be_wrapped(monkeypatch, tmp_path):
    model = build()
    expected = logits(model)
    pack, calls = loaded_models.pack, []

    def interrupted(module, **options):
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pack(module, **options)

    monkeypatch.setattr(loaded_models, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kt_moe.wrap(model)
    with pytest.raises(ValueError, match="without its experts"):
        model.save_pretrained(tmp_path)
    for _ in range(2):
        about(logits(model), expected)
        if len(calls) == 2:
            kt_moe.wrap(model)
    assert len(kt_moe.model_experts(model)) == 3


def _with_target_parameters(model):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    return peft.get_peft_model(model, config)


def _hooked(model):
    model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: None)
    return model


def _double(model):
    experts = model.model.layers[2].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().double())
    return model


def _trained_whole(model):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"])
    return peft.get_peft_model(model, config)


def _twice(model):
    return kt_moe.wrap(model)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda model: "model", {}, "model is a str, wanted a torch.nn.Module"),
        (lambda model: nn.Linear(2, 2), {}, "Linear is no transformers model"),
        (lambda model: model.to("meta"), {}, "gate_up_proj is on meta, wanted loaded weights"),
        (_with_target_parameters, {}, "adapter on the experts|parametrized"),
        (_twice, {}, "kt_moe's already"),
        (_hooked, {}, "has hooks or a forward of its own"),
        (_double, {}, "down_proj is torch.float64, wanted bfloat16"),
        (_trained_whole, {}, "is in modules_to_save"),
        (lambda model: nn.ModuleList([model, build()]), {}, "several transformers models"),
        (lambda model: model, {"lazy": True}, "config has lazy, which is for experts from a checkpoint"),
        (lambda model: model, {"paged": True}, "config has paged"),
        (lambda model: model, None, "config is a int"),
    ],
)
def test_refusals(change, options, says):
    model = change(build())
    before = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    with pytest.raises((TypeError, ValueError), match=says):
        kt_moe.wrap(model, 3 if options is None else kt_moe.KtMoeConfig(**options))
    if before:
        assert dict(model.named_modules()) == before


def test_a_model_without_experts_is_refused():
    config = transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if "expert" not in k})
    with pytest.raises(ValueError, match="'llama' is not supported by kt_moe"):
        kt_moe.wrap(transformers.AutoModelForCausalLM.from_config(config))


def test_saving_without_experts_is_refused(tmp_path):
    model = kt_moe.wrap(build())
    with pytest.raises(ValueError, match="without its experts"):
        model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="load_adapter"):
        model.load_adapter(str(tmp_path))


_MEMORY = """
import torch, transformers, kt_moe
from kt_moe.host_memory import resident
config = transformers.Qwen3MoeConfig(
    hidden_size=1024, moe_intermediate_size=1024, num_experts=16, num_experts_per_tok=2, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=2, vocab_size=99, intermediate_size=64)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model(torch.zeros(1, 2, dtype=torch.long))
layer = 16 * 3 * 1024 * 1024 * 2
kt_moe.default_runtime()
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM begins anew
kt_moe.wrap(model)
print((resident("VmHWM") - before) / layer, (resident("VmRSS") - before) / layer)
"""


def test_one_layer_at_a_time_is_in_memory_twice():
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak, after = map(float, run.stdout.split())
    assert peak < 2.0, "layers of experts beyond what there was"
    assert after < 0.6


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard needs it on the CPU")
def test_models_that_fully_shard_shards(mesh):
    expected = logits(kt_moe.wrap(build()))

    model = sharded(kt_moe.wrap(build()), mesh)
    out = model(input_ids=IDS).logits
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    model = sharded(build(), mesh)
    with pytest.raises(ValueError, match=r"gate_up_proj is sharded by fully_shard, wanted it whole"):
        kt_moe.wrap(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    assert torch.equal(logits(kt_moe.wrap(model)), expected)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_flat_parameters_are_refused(mesh):
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel, .* call kt_moe\.wrap before"):
        kt_moe.wrap(FullyShardedDataParallel(build(), device_id=torch.device("cpu")))


def test_partitioned_parameters_are_refused():
    model = build()
    weight = model.model.layers[1].mlp.experts.down_proj
    weight.data, weight.ds_id = torch.empty(0, dtype=weight.dtype), 7  # as ZeRO-3 leaves them
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj is partitioned by ZeRO-3"):
        kt_moe.wrap(model)


def test_adapters_on_experts_are_taken_along(tmp_path):
    """As the refusal says."""
    config = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    torch.manual_seed(2)
    config.init_lora_weights = False
    model = peft.get_peft_model(build(dtype=torch.float32), config)
    expected = logits(model)
    with pytest.raises(ValueError, match="adapter on the experts"):
        kt_moe.wrap(model)
    model.save_pretrained(tmp_path)
    about(logits(kt_moe.load_adapter(kt_moe.wrap(build(dtype=torch.float32)), tmp_path)), expected)
