"""Optimizers that look at matrices, on LoRA of experts: the same as torch's and PEFT's on each matrix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import PEFT_WARNINGS, error, load, lora_layers, save_tiny_checkpoint, tokens, with_lora
from torch import Tensor, nn

from kt_moe.hf import LoraFA, Muon, create_lorafa_optimizer

pytestmark = PEFT_WARNINGS

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(count)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
@pytest.mark.parametrize("shape", [(3, 4, 20), (3, 20, 4), (8, 6)])
def test_muon_is_that_of_torch_on_every_matrix(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    ours = nn.Parameter(start.clone())
    theirs = [nn.Parameter(one.clone()) for one in start.reshape(-1, *shape[-2:])]
    optimizers = Muon([ours], lr=0.02), torch.optim.Muon(theirs, lr=0.02)
    for gradient in gradients(shape, 3):
        ours.grad = gradient
        for parameter, one in zip(theirs, gradient.reshape(-1, *shape[-2:]), strict=True):
            parameter.grad = one.clone()
        for optimizer in optimizers:
            optimizer.step()
    expected = torch.stack(list(theirs)).view(shape)
    assert error(ours, expected) < 2e-3  # bf16 products in another order
    assert error(ours, start) > 0.01


@pytest.mark.filterwarnings("ignore:.*scaling_factor.*:FutureWarning")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_fa_is_that_of_peft_on_every_matrix(
    weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # products in fp32
    a, b = gradients((3, 4, 20), 1)[0], torch.zeros(3, 12, 4)
    ours = nn.Parameter(b.clone())
    optimizer = LoraFA([(a, ours, 2.0)], lr=0.02, weight_decay=weight_decay)
    theirs = [nn.Parameter(one.clone()) for one in b]
    parameters = [p for one, own in zip(a, theirs, strict=True) for p in (nn.Parameter(one, False), own)]
    names = [f"layer{n // 2}.lora_{'AB'[n % 2]}.x.weight" for n in range(6)]
    group = {"params": parameters, "names": names, "scaling_factors": [2.0] * 6, "weight_decay": weight_decay}
    reference = peft.optimizers.lorafa.LoraFAOptimizer([group], lr=0.02)
    for gradient in gradients((3, 12, 4), 3):
        ours.grad = gradient
        for parameter, one in zip(theirs, gradient, strict=True):
            parameter.grad = one.clone()
        optimizer.step()
        reference.step()
    assert error(ours, torch.stack(list(theirs))) < 1e-4
    assert bool(ours.any())


def losses(model: Any, make: Any, steps: int = 8) -> list[float]:
    """Of a model that learns a few lines by heart, under Trainer."""
    text = torch.randint(3, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": line, "labels": line} for line in text]
    arguments = transformers.TrainingArguments(
        output_dir="unused", max_steps=steps, per_device_train_batch_size=4, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(make(model), None))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("which", ["muon", "lora-fa"])
def test_the_example_model_learns(which: str) -> None:
    model = with_lora(
        EXAMPLE, ["experts", "q_proj"], base=load(EXAMPLE, dtype=torch.bfloat16), init_lora_weights=True
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

    def make(model: Any) -> torch.optim.Optimizer:
        if which == "lora-fa":
            return create_lorafa_optimizer(model, lr=5e-3)
        return Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)

    found = losses(model, make)
    assert found[-1] < found[0] - 0.1, found
    changed = {
        name for name, p in model.named_parameters() if "lora_" in name and not torch.equal(p, before[name])
    }
    frozen = {name for name in before if which == "lora-fa" and "lora_A" in name}
    assert changed == before.keys() - frozen
    assert any(".experts." in name for name in changed)


def test_only_what_is_trained_goes_into_lora_fa(tmp_path: Path) -> None:
    model = with_lora(save_tiny_checkpoint(tmp_path), ["experts", "q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["experts"]))
    twin = copy.deepcopy(model)
    optimizer = create_lorafa_optimizer(model, lr=1e-3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".default")[0].rpartition(".")[2] for name in trained} == {
        "lora_B",
        "modules_to_save",
    }
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    layer = lora_layers(twin)[0]
    layer.scaling["default"] = 0.0
    with pytest.raises(ValueError, match=r"the scaling of LoRA on .*experts is 0"):
        create_lorafa_optimizer(twin, lr=1e-3)
    with pytest.raises(ValueError, match=r"a tensor of shape \[3\], wanted two or three"):
        Muon([nn.Parameter(torch.zeros(3))])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
