"""transformers models with their experts computed by kt_moe, against transformers computing them."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from stored_formats import mxfp4
from tiny_models import ALL_EXPERTS, CONFIGS, error, load, save_tiny_checkpoint, tiny_model, tokens
from torch import Tensor

import kt_moe
from kt_moe.hf import KtExperts, KtMoeConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:transformers")

ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), shards=2)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'KtMoeConfg'"):
        kt_moe.KtMoeConfg  # noqa: B018


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@torch.no_grad()
def test_logits_of_every_family(model_type: str, tmp_path: Path) -> None:
    # One layer: its router sees what transformers' sees, so both route alike.
    save_tiny_checkpoint(tmp_path, model_type, **ONE_LAYER)
    reference = load(tmp_path, kt=False)(tokens()).logits
    assert error(load(tmp_path)(tokens()).logits, reference) < 5e-3
    ordinary = load(tmp_path, kt=False, experts_implementation="kt_moe")
    assert error(ordinary(tokens()).logits, reference) < 5e-3


@pytest.mark.parametrize("kt_config", [True, False], ids=["KtMoeConfig", "experts_implementation"])
def test_block_is_no_worse_than_eager_bf16(kt_config: bool, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, **ONE_LAYER, **ALL_EXPERTS)
    ours = load(tmp_path, kt=kt_config, dtype=torch.bfloat16)
    if not kt_config:
        ours.set_experts_implementation("kt_moe")
        ours.model.layers[0].mlp.experts.requires_grad_(False)
    eager = load(tmp_path, kt=False, dtype=torch.bfloat16, experts_implementation="eager")
    exact = load(tmp_path, kt=False, dtype=torch.float64, experts_implementation="eager")
    torch.manual_seed(1)
    x, grad = torch.randn(3, 40, 32).bfloat16(), torch.randn(3, 40, 32).bfloat16()

    def run(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        block, hidden = model.model.layers[0].mlp, x.to(dtype, copy=True).requires_grad_()
        out = block(hidden)
        out.backward(grad.to(dtype))
        return {"out": out.detach(), "hidden": hidden.grad, "router": block.gate.weight.grad}

    reference = run(exact, torch.float64)
    theirs = {name: error(t, reference[name]) for name, t in run(eager, torch.bfloat16).items()}
    for name, tensor in run(ours, torch.bfloat16).items():
        assert error(tensor, reference[name]) <= theirs[name], name


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_python", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_gradients_of_the_whole_model(hidden_act: str, activation: str, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, hidden_act=hidden_act, **ALL_EXPERTS)
    reference, ours = load(tmp_path, kt=False), load(tmp_path)
    assert {e.activation for e in kt_moe.model_experts(ours).values()} == {activation}
    for model in (reference, ours):
        model(tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in reference.named_parameters():
        if ".experts." not in name:
            assert error(gradients[name], parameter.grad) < 1e-2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_dtype(dtype: Any, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, dtype=torch.bfloat16, **ONE_LAYER, **ALL_EXPERTS)
    model = load(tmp_path, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert {p.dtype for p in model.parameters()} == {expected}
    out = model(tokens())
    assert out.logits.dtype is expected
    assert error(out.logits, load(tmp_path, kt=False)(tokens()).logits) < 3e-2


def test_experts_never_become_parameters(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    loading = transformers.core_model_loading
    materialize = loading._materialize_copy
    monkeypatch.setattr(
        loading,
        "_materialize_copy",
        lambda tensor, *a, **k: (read.append(tensor), materialize(tensor, *a, **k))[1],
    )
    ours = load(checkpoint)
    assert len(read) == len(list(ours.parameters()))

    plain = load(checkpoint, kt=False)
    experts = sum(p.numel() for name, p in plain.named_parameters() if ".experts." in name)
    assert ours.num_parameters() == plain.num_parameters() - experts
    assert ours.get_memory_footprint() == plain.get_memory_footprint() - 4 * experts
    assert not [name for name in ours.state_dict() if "experts" in name]
    modules = [m for m in ours.modules() if isinstance(m, KtExperts)]
    assert [m.layer for m in modules] == [0, 1]
    assert sum(m.experts.nbytes for m in modules) >= 2 * experts


def test_weights_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    plain = dict(load(checkpoint, kt=False).named_parameters())
    for module in load(checkpoint).modules():
        if isinstance(module, KtExperts):
            gate, up, down = module.experts.dequantize()
            path = f"model.layers.{module.layer}.mlp.experts"
            assert torch.equal(torch.cat([gate, up], dim=1).float(), plain[f"{path}.gate_up_proj"])
            assert torch.equal(down.float(), plain[f"{path}.down_proj"])


def test_no_warning_about_experts(checkpoint: Path) -> None:
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=KtMoeConfig(), output_loading_info=True
    )
    assert not any(info.values()), info


@torch.no_grad()
def test_generation(checkpoint: Path) -> None:
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    ours = load(checkpoint).generate(tokens(1), **kwargs)
    assert torch.equal(ours, load(checkpoint, kt=False).generate(tokens(1), **kwargs))


@torch.no_grad()
def test_device_map_and_moves(checkpoint: Path) -> None:
    model = load(checkpoint, device_map={"": "cpu"})
    logits = load(checkpoint)(tokens()).logits
    assert torch.equal(model(tokens()).logits, logits)
    assert torch.equal(model.to("cpu").eval()(tokens()).logits, logits)
    assert model.to(torch.bfloat16)(tokens()).logits.dtype is torch.bfloat16


def test_dense_layers_stay(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, mlp_only_layers=[0])
    ours = load(tmp_path)
    assert [m.layer for m in ours.modules() if isinstance(m, KtExperts)] == [1]
    assert error(ours(tokens()).logits, load(tmp_path, kt=False)(tokens()).logits) < 5e-3


# KtMoeConfig


def test_config_round_trip() -> None:
    config = KtMoeConfig(
        threads=1, isa="scalar", recompute=True, gpu="cuda:1", gpu_memory="6GiB", cpu_share=0.25,
        lora_device="cpu", checkpoint_experts="retain",
    )  # fmt: skip
    again = KtMoeConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.quant_method == "kt_moe"
    assert again.runtime().threads == 1
    assert again.runtime().isa == "scalar"
    assert KtMoeConfig().runtime() is kt_moe.default_runtime()
    gpu = again.make_gpu()
    assert (str(gpu.device), gpu.memory, gpu.cpu_share) == ("cuda:1", 6 << 30, 0.25)
    assert KtMoeConfig(gpu="off").make_gpu().cpu_share == 1.0
    rates = kt_moe.Rates(*(1e9 * i for i in range(1, 6)))
    for given in (rates, vars(rates)):
        again = KtMoeConfig(**json.loads(json.dumps(KtMoeConfig(gpu_rates=given).to_dict())))
        assert again.make_gpu().rates == rates


def test_config_takes_numbers_of_numpy() -> None:
    given = KtMoeConfig(
        gpu_memory=np.int64(5e9),  # type: ignore[arg-type]
        cpu_share=np.float32(0.5),
        gpu_rates=dict.fromkeys(vars(kt_moe.Rates(*[1] * 5)), np.float32(1e9)),
    )
    gpu = KtMoeConfig(**json.loads(given.to_json_string())).make_gpu()
    assert (gpu.memory, gpu.cpu_share, gpu.rates) == (5 * 10**9, 0.5, kt_moe.Rates(*[1e9] * 6))


def test_config_options_arrive(checkpoint: Path) -> None:
    model = load(checkpoint, quantization_config=KtMoeConfig(threads=1, isa="scalar", recompute=True))
    experts = [m.experts for m in model.modules() if isinstance(m, KtExperts)]
    assert {e.recompute for e in experts} == {True}
    assert {e.runtime.isa for e in experts} == {"scalar"}
    assert len({id(e.runtime) for e in experts}) == 1
    assert len({id(e.gpu) for e in experts}) == 1
    assert model.config.quantization_config.threads == 1
    json.dumps(model.config.to_dict()["quantization_config"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("options", [{"gpu_memory": "2GiB"}, {"gpu": "cuda:0"}, {"cpu_share": 0.5}], ids=str)
def test_options_of_a_gpu_that_is_not_there_are_warned_of(options: dict[str, Any], checkpoint: Path) -> None:
    message = f"KtMoeConfig has {next(iter(options))}=.*, which is for a GPU, and PyTorch .* finds none"
    with pytest.warns(UserWarning, match=message):
        load(checkpoint, quantization_config=KtMoeConfig(**options))
    with pytest.warns(UserWarning, match=message):
        kt_moe.wrap(load(checkpoint, kt=False), KtMoeConfig(**options))


@pytest.mark.filterwarnings("ignore:KtMoeConfig has .* which is for a GPU:UserWarning")
def test_options_of_the_gpu_arrive(checkpoint: Path) -> None:
    config = KtMoeConfig(gpu_memory=123456, cpu_share=0.5, lora_device="cpu", checkpoint_experts="retain")
    model = load(checkpoint, quantization_config=config)
    modules = [m for m in model.modules() if isinstance(m, KtExperts)]
    assert {m.lora_device for m in modules} == {"cpu"}
    assert {m.experts.checkpoint_experts for m in modules} == {"retain"}
    assert {(m.experts.gpu.memory, m.experts.gpu.cpu_share) for m in modules} == {(123456, 0.5)}
    other = load(checkpoint, quantization_config=config).model.layers[0].mlp.experts
    assert other.experts.gpu is not modules[0].experts.gpu
    assert copy.deepcopy(other).lora_device == "cpu"
    defaults = load(checkpoint).model.layers[0].mlp.experts
    assert (defaults.lora_device, defaults.experts.checkpoint_experts) == ("auto", "recompute")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 2}, r"KtMoeConfig has no option \['thread'\], only \['threads'"),
        ({"format": "int3"}, r"KtMoeConfig: format is 'int3', wanted one of \['as-stored'"),
        ({"gpu": "gpu0"}, "KtMoeConfig: gpu is 'gpu0', wanted "),
        ({"gpu": 0}, "KtMoeConfig: gpu is 0, wanted "),
        ({"gpu_memory": "6 apples"}, "KtMoeConfig: gpu_memory is '6 apples', wanted "),
        ({"gpu_memory": 0}, "KtMoeConfig: gpu_memory is 0, wanted "),
        ({"cpu_share": 1.5}, "KtMoeConfig: cpu_share is 1.5, wanted "),
        ({"gpu_rates": {"link": 5e10}}, "KtMoeConfig: gpu_rates is {'link': 50000000000.0}, wanted "),
        (
            {"gpu_rates": dict.fromkeys(vars(kt_moe.Rates(*[1] * 5)), 0)},
            "Rates: link is 0, wanted a positive number",
        ),
        ({"gpu": "off", "gpu_rates": {"link": 0}}, "KtMoeConfig: gpu_rates is {'link': 0}, wanted "),
        ({"gpu": "off", "cpu_share": 0.5}, 'KtMoeConfig has gpu="off" and gpu_memory or cpu_share'),
        (
            {"lora_device": "gpu"},
            r"KtMoeConfig: lora_device is 'gpu', wanted one of \['auto', 'cpu', 'cuda'\]",
        ),
        ({"checkpoint_experts": "keep"}, "KtMoeConfig: checkpoint_experts is 'keep', wanted one of "),
    ],
    ids=str,
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KtMoeConfig(**options)


# What does not work says so


def test_save_pretrained_says_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save the adapter with"):
        load(checkpoint).save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_copies(checkpoint: Path) -> None:
    model = load(checkpoint)
    twin = copy.deepcopy(model)
    theirs, ours = twin.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts
    assert theirs is not ours
    assert theirs.experts is ours.experts
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    """By both doors: nothing in it would be computed by kt_moe."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=4, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    for options in ({}, {"kt": False, "experts_implementation": "kt_moe"}):
        with pytest.raises(
            ValueError, match=r"model type 'llama' is not supported by kt_moe: Llama.* has no experts"
        ):
            load(tmp_path, **options)


def test_other_activation(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, hidden_act="relu")
    with pytest.raises(ValueError, match=r"'qwen3_moe' .*: it lacks the activation ReLU"):
        load(tmp_path)


def test_checkpoint_must_be_safetensors(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"safetensors checkpoints, this one is .*pytorch_model\.bin"):
        load(tmp_path)


def test_missing_expert_is_named(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.5\.up_proj"):
        load(tmp_path)


def test_config_and_checkpoint_disagree(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 16}))
    with pytest.raises(ValueError, match=r"layer 0 have .*\(8, 32, 24\), the config says \(8, 32, 16\)"):
        load(tmp_path, quantization_config=KtMoeConfig(cache_dir=tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()  # nothing was loaded


# experts_implementation="kt_moe"


@torch.no_grad()
def test_packing_follows_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**ONE_LAYER)
    other = tiny_model(seed=1, **ONE_LAYER)
    packed: list[int] = []
    init = kt_moe.Experts.__init__
    monkeypatch.setattr(
        kt_moe.Experts, "__init__", lambda self, *a, **k: (packed.append(1), init(self, *a, **k))[1]
    )

    def check() -> int:
        model.set_experts_implementation("eager")
        reference = model(tokens()).logits
        model.set_experts_implementation("kt_moe")
        assert error(model(tokens()).logits, reference) < 5e-3
        return len(packed)

    assert check() == 1
    assert check() == 1
    model.load_state_dict(other.state_dict())
    assert check() == 2
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.mul_(2)
    assert check() == 3
    experts.gate_up_proj.data = experts.gate_up_proj.data.clone().mul_(-1)
    assert check() == 4


@torch.no_grad()
def test_repack_after_changes_that_torch_does_not_count() -> None:
    model = tiny_model(**ONE_LAYER)
    experts = model.model.layers[0].mlp.experts
    model.set_experts_implementation("kt_moe")
    before = model(tokens()).logits
    experts.down_proj.data.mul_(2)
    assert torch.equal(model(tokens()).logits, before)  # nobody can tell
    assert kt_moe.repack(model) == 1
    assert kt_moe.repack(model) == 0
    after = model(tokens()).logits
    model.set_experts_implementation("eager")
    assert error(after, model(tokens()).logits) < 5e-3 < error(before, after)


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny_model(**ONE_LAYER).requires_grad_(False)
        reference = model(tokens()).logits
        model.set_experts_implementation("kt_moe")
        assert error(model(tokens()).logits, reference) < 5e-3
    with torch.no_grad():
        assert error(model(tokens()).logits, reference) < 5e-3


def test_trainable_experts_are_refused() -> None:
    model = tiny_model(**ONE_LAYER)
    model.set_experts_implementation("kt_moe")
    with pytest.raises(
        ValueError, match=r"kt_moe computes frozen experts only: call requires_grad_\(False\)"
    ):
        model(tokens())
    with torch.no_grad():
        model(tokens())


def test_parametrized_experts_are_refused() -> None:
    model = tiny_model(**ONE_LAYER).requires_grad_(False)
    model.set_experts_implementation("kt_moe")

    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(
        model.model.layers[0].mlp.experts, "down_proj", Twice()
    )
    with pytest.raises(ValueError, match=r'LoraConfig\(target_modules=\["experts"\]\)'):
        model(tokens())


def test_experts_switched_to_kt_moe_later_are_refused_when_they_are_called() -> None:
    model = tiny_model(hidden_act="relu").requires_grad_(False)
    model.set_experts_implementation("kt_moe")
    with pytest.raises(ValueError, match=r"'qwen3_moe' .*: it lacks the activation ReLU"):
        model(tokens())


@pytest.mark.parametrize("options", [{"cache_dir": "packed"}, {"paged": True}, {"lazy": True}, {}], ids=str)
@torch.no_grad()
def test_every_way_to_hold_experts_gives_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path / "bf16")  # stored as memory holds it
    checkpoint = tmp_path / "bf16"
    if "cache_dir" in options:
        options = {"cache_dir": tmp_path / options["cache_dir"]}
    expected = load(checkpoint)(tokens()).logits
    for _ in range(2):
        model = load(checkpoint, quantization_config=KtMoeConfig(**options))
        assert torch.equal(model(tokens()).logits, expected)
    experts = [m.experts for m in model.modules() if isinstance(m, KtExperts)]
    assert all(e.mapped == ("cache_dir" in options or "paged" in options) for e in experts)


def test_lazy_experts_are_loaded_when_they_are_used(checkpoint: Path) -> None:
    model = load(checkpoint, quantization_config=KtMoeConfig(lazy=True, format="int4"))
    modules = [m for m in model.modules() if isinstance(m, KtExperts)]
    assert all("None" in repr(m) for m in modules)
    assert all("None" in repr(m) for m in copy.deepcopy(modules))
    with torch.no_grad():
        model(tokens())
    assert all("format='int4'" in repr(m) for m in modules)


def test_copies_that_wake_lazy_experts_load_them_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deep copies, each in a thread of its own."""
    expected = load(checkpoint)(tokens()).logits
    loaded: list[int] = []
    of_files = kt_moe.Experts.from_checkpoint
    monkeypatch.setattr(
        kt_moe.Experts, "from_checkpoint", lambda *a, **k: (loaded.append(1), of_files(*a, **k))[1]
    )
    model = load(checkpoint, quantization_config=KtMoeConfig(lazy=True))
    copies = [model, copy.deepcopy(model), copy.deepcopy(model)]
    experts = [m for each in copies for m in each.modules() if isinstance(m, KtExperts)]
    threads = [threading.Thread(target=lambda m=m: m.experts) for m in experts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    layers = sum(isinstance(m, KtExperts) for m in model.modules())
    assert len(loaded) == layers
    assert len({id(m.experts) for m in experts}) == layers < len(experts)
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_while_another_thread_loads(checkpoint: Path) -> None:
    model = load(checkpoint, quantization_config=KtMoeConfig(lazy=True))
    first, second = [m for m in model.modules() if isinstance(m, KtExperts)][:2]
    loads, go = threading.Event(), threading.Event()
    plain = first._held.load
    assert plain is not None

    def slowly(module: KtExperts, progress: Any) -> kt_moe.Experts:
        loads.set()
        go.wait()
        return plain(module, progress)

    first.load_with(slowly)
    thread = threading.Thread(target=lambda: first.experts)
    thread.start()
    loads.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang ends the child, not the test
        os._exit(0 if second.experts.num_experts > 0 else 1)
    status = os.waitpid(child, 0)[1]
    go.set()
    thread.join()
    assert status == 0


def test_a_checkpoint_is_let_go_once_all_is_loaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[kt_moe.Checkpoint]] = []

    with_lists = kt_moe.Checkpoint.with_lists

    def remember(*args: Any) -> kt_moe.Checkpoint:
        made = with_lists(*args)
        opened.append(weakref.ref(made))
        return made

    monkeypatch.setattr(kt_moe.Checkpoint, "with_lists", remember)
    model = load(checkpoint)
    gc.collect()
    assert opened[0]() is None
    lazy = load(checkpoint, quantization_config=KtMoeConfig(lazy=True))
    twin = copy.deepcopy(lazy)
    expected = model(tokens()).logits
    assert torch.equal(lazy(tokens()).logits, expected)
    lazy.model.layers[0].mlp.experts.load()  # nothing to do
    gc.collect()
    assert opened[1]() is None  # copies have what the first loaded
    assert torch.equal(twin(tokens()).logits, expected)


def test_paged_and_cache_dir_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="paged and cache_dir, wanted one of them"):
        KtMoeConfig(paged=True, cache_dir=tmp_path)


def test_quantised_experts_beside_ordinary_weights(tmp_path: Path) -> None:
    # As gpt-oss is published: the config says mxfp4, which the experts alone are.
    save_tiny_checkpoint(tmp_path, "gpt_oss", intermediate_size=32)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, into, out = tensors.pop(key).shape
        blocks, scales, _ = mxfp4(experts, out, into, seed=1)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales % 3 + 119}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    ours = transformers.AutoConfig.from_pretrained(tmp_path)
    del ours.quantization_config
    logits = []
    for options in ({}, {"config": ours}):
        model = load(tmp_path, **options)
        assert {m.experts.format for m in model.modules() if isinstance(m, KtExperts)} == {"mxfp4"}
        assert model.quantization_method == "kt_moe"
        logits.append(model(tokens()).logits)
    assert logits[0].isfinite().all()
    assert torch.equal(*logits)
