"""Where LoRA of the experts goes when its model moves; "meta" stands for a GPU here."""

from __future__ import annotations

import copy
import gc
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from test_gpu_stored import Cuda, fake_cuda
from tiny_models import PEFT_WARNINGS, load, lora_layers, save_tiny_checkpoint, tokens, with_lora
from torch import nn

from kt_moe import lora_device
from kt_moe.hf import KtMoeConfig
from kt_moe.lora_device import LoraParameters, LoraPlace

pytestmark = PEFT_WARNINGS
TARGETS = ["q_proj", "experts"]
GPU = torch.device("meta")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(autouse=True)
def meta_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_device, "_NOT_ACCELERATORS", ("cpu",))


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(lora_device, "free_bytes", lambda device: nbytes)


def make(checkpoint: Path, choice: str, **options: Any) -> Any:
    base = load(checkpoint, quantization_config=KtMoeConfig(lora_device=choice))
    return with_lora(checkpoint, TARGETS, base=base, **options)


def of_experts(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in lora_layers(model) for p in layer.parameters()]


def devices(parameters: Any) -> set[torch.device]:
    return {p.device for p in parameters}


def test_on_the_cpu_it_stays_there(checkpoint: Path) -> None:
    model = make(checkpoint, "cpu")
    before = of_experts(model)
    values = [p.detach().clone() for p in before]
    for parameter in before:
        parameter.grad = torch.ones_like(parameter)
    model.to(GPU)
    model.model.to(device=GPU)
    lora_layers(model)[0].lora_A["default"].to(GPU)
    after = of_experts(model)
    assert devices(after) == devices(p.grad for p in after) == {torch.device("cpu")}
    assert all(p is q for p, q in zip(after, before, strict=True))  # an optimizer has them
    assert all(torch.equal(p, value) for p, value in zip(after, values, strict=True))
    own = {id(p) for p in after}
    assert devices(p for p in model.parameters() if id(p) not in own) == {GPU}


def test_dtypes_are_converted_all_the_same(checkpoint: Path) -> None:
    model = make(checkpoint, "cpu")
    model.to(GPU, torch.bfloat16)
    assert {p.dtype for p in of_experts(model)} == {torch.bfloat16}
    model.float()
    assert {(p.dtype, p.device.type) for p in of_experts(model)} == {(torch.float32, "cpu")}
    model.half()
    assert {(p.dtype, p.device.type) for p in of_experts(model)} == {(torch.float16, "cpu")}


def test_with_the_model(checkpoint: Path) -> None:
    model = make(checkpoint, "cuda")
    model.to(GPU)
    assert devices(of_experts(model)) == {GPU}


def test_empty_parameters_are_made_on_the_cpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_device, "_NOT_ACCELERATORS", ("cpu", "meta"))
    model = make(checkpoint, "cpu")
    model.to("meta")
    assert devices(of_experts(model)) == {torch.device("meta")}
    model.to_empty(device="cpu")
    assert devices(of_experts(model)) == {torch.device("cpu")}
    model.to("meta")
    monkeypatch.setattr(lora_device, "_NOT_ACCELERATORS", ("cpu",))
    model.to_empty(device=GPU)
    assert devices(of_experts(model)) == {torch.device("cpu")}


def test_auto_asks_what_is_free(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = sum(p.numel() for p in of_experts(make(checkpoint, "auto")))
    for nbytes, device in ((4 * 16 * numbers, GPU), (4 * 16 * numbers - 1, torch.device("cpu"))):
        model = make(checkpoint, "auto")
        assert model.base_model.model.model.layers[0].mlp.experts.place.numbers == numbers
        free(monkeypatch, nbytes)
        model.to(GPU)
        assert devices(of_experts(model)) == {device}
        free(monkeypatch, 0 if device == GPU else 1 << 40)
        model.to(GPU)  # by what was free at the first move
        assert devices(of_experts(model)) == {device}


def test_auto_counts_fixed_parts(checkpoint: Path) -> None:
    model = with_lora(checkpoint, init_lora_weights="olora")
    place = lora_layers(model)[0].place
    assert place.fixed == place.numbers > 0
    assert lora_device.auto_moves(place.numbers, 80 * place.numbers, place.fixed)
    assert not lora_device.auto_moves(place.numbers, 79 * place.numbers, place.fixed)
    model.delete_adapter("default")
    assert place.fixed == place.numbers == 0


def test_auto_of_an_ordinarily_loaded_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nbytes, device in ((1 << 40, GPU), (0, torch.device("cpu"))):
        base = load(checkpoint, kt=False, experts_implementation="kt_moe")
        model = with_lora(checkpoint, TARGETS, base=base)
        free(monkeypatch, nbytes)
        model.to(GPU)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert devices(p for p in of_experts(model) if id(p) in trained) == {device}
        assert devices(p for p in model.parameters() if id(p) not in trained) == {GPU}


def test_layers_and_adapters_of_a_model_decide_together(checkpoint: Path) -> None:
    model = make(checkpoint, "cpu")
    config = LoraConfig(r=2, target_modules=["experts"])
    model.add_adapter("other", config)
    places = {id(layer.place): layer.place for layer in lora_layers(model)}
    (place,) = places.values()
    assert place.numbers == sum(p.numel() for p in of_experts(model))
    model.to(GPU)
    assert devices(of_experts(model)) == {torch.device("cpu")}
    twin = make(checkpoint, "cpu")
    copied = copy.deepcopy(twin)
    assert len({id(layer.place) for layer in lora_layers(copied)}) == 1
    assert lora_layers(copied)[0].place is not lora_layers(twin)[0].place
    copied.to(GPU)
    assert devices(of_experts(copied)) == {torch.device("cpu")}


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_saving_and_loading(low: bool, checkpoint: Path, tmp_path: Path) -> None:
    model = make(checkpoint, "cpu").eval()
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path)
    base = load(checkpoint, quantization_config=KtMoeConfig(lora_device="cpu"))
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(again(tokens()).logits, logits)
    again.to(GPU)
    assert devices(of_experts(again)) == {torch.device("cpu")}


def test_optimizer_keeps_its_parameters(checkpoint: Path) -> None:
    model = make(checkpoint, "cpu").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    before = [p.detach().clone() for p in of_experts(model)]
    model.to("cpu")
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(of_experts(model), before, strict=True))


def test_a_place_remembers_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    place, memory = LoraPlace("auto", numbers=100), {"cuda:0": 1600 * 4, "cuda:1": 1600 * 4 - 1}
    monkeypatch.setattr(lora_device, "free_bytes", lambda device: memory[str(device)])
    assert not place.stays(torch.device("cuda:0"))
    assert place.stays(torch.device("cuda:1"))
    assert not place.stays(torch.device("cpu"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return fake_cuda(monkeypatch)


def small_parameters() -> LoraParameters:
    lora = LoraParameters(LoraPlace("cpu"))
    for projection in ("gate", "up", "down"):
        lora[projection] = nn.Parameter(torch.randn(8, 4, 96))
    return lora


def test_what_is_page_locked_shares_no_page(cuda: Cuda) -> None:
    """CUDA refuses copies of memory that is locked in part: those of tensors beside it, too."""
    lora = small_parameters()
    before = {name: (p, p.detach().clone()) for name, p in lora.items()}
    lora.to(GPU)
    for name, (parameter, value) in before.items():
        assert lora[name] is parameter
        assert torch.equal(parameter, value)
        end = parameter.data_ptr() + parameter.nbytes
        assert cuda.locked[parameter.data_ptr()] == -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    places = dict(cuda.locked)
    lora.to(GPU)
    assert places == cuda.locked == {p.data_ptr(): places[p.data_ptr()] for p in lora.values()}
    lora.to("cpu")
    assert not cuda.locked
    assert all(torch.equal(p, value) for p, value in before.values())


def test_page_locks_follow_the_parameters(cuda: Cuda) -> None:
    lora = small_parameters()
    lora.to(GPU, torch.bfloat16)
    lora["gate"].data = torch.zeros(8, 4, 96)
    lora["up"].share_memory_()  # in other memory
    twin = copy.deepcopy(lora)
    lora.to(GPU)
    twin.to(GPU)
    assert set(cuda.locked) == {p.data_ptr() for p in (*lora.values(), *twin.values())}
    assert {p.dtype for p in lora.values()} == {torch.bfloat16, torch.float32}
    del lora
    gc.collect()
    assert set(cuda.locked) == {p.data_ptr() for p in twin.values()}
    cuda.refuse_from = len(cuda.calls)
    other = small_parameters()
    value = other["gate"].detach().clone()
    other.to(GPU)
    assert torch.equal(other["gate"], value)
    assert len(cuda.locked) == 3
    del twin
    gc.collect()
    assert not cuda.locked
