"""Experts that transformers does not let others compute, beyond what every family is tested for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from test_families import LOGITS, Family, expert_modules
from tiny_families import tiny_family
from tiny_models import PEFT_WARNINGS, error
from torch import Tensor, nn

import kt_moe
from kt_moe.architectures import architecture_of
from kt_moe.checkpoint import ExpertList
from kt_moe.conversion import stored_lists
from kt_moe.hf import KtMoeConfig

pytestmark = [*PEFT_WARNINGS, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]

BLOCKS = {"llama4": "feed_forward", "longcat_flash": "mlp"}


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def blocks(model: nn.Module) -> list[Any]:
    return [m for name, m in model.named_modules() if name.split(".")[-1] in BLOCKS.values()]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_fewer_experts_a_token_than_there_are(top_k: int, family: Family) -> None:
    if family.name == "longcat_flash" and top_k == 1:
        pytest.skip("transformers' own code wants two")
    # A whole model would choose others after rounding; here both blocks see the same hidden states.
    found = []
    for model in (family.eager(), family.by_config(), family.by_implementation()):
        block = blocks(model)[0]
        block.router.top_k = block.top_k = top_k
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = block(x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        assert x.grad is not None
        routers = [p.grad for n, p in block.router.named_parameters() if p.grad is not None]
        assert routers
        found.append([out.detach(), x.grad, *routers])
    for ours in found[1:]:
        for one, wanted in zip(ours, found[0], strict=True):
            assert one.shape == wanted.shape
            assert error(one, wanted) < 2 * LOGITS


def test_a_model_that_is_not_ours_is_as_it_was(family: Family) -> None:
    # The classes' forward asks whose the experts are: the blocks of another model are transformers' own.
    wanted, _ = family.run(family.eager())
    family.by_config(), family.by_implementation()
    found, _ = family.run(family.eager())
    assert torch.equal(found, wanted)
    assert not any(
        hasattr(module, "is_transposed") for module in family.eager().modules()
    )  # PEFT asks for it


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_adapters_trained_by_plain_peft_are_read(name: str, tmp_path: Path) -> None:
    # Fused ones, of an eager model in this process, where kt_moe knows its classes.
    family = Family(name, tmp_path / "base")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=8, target_parameters=names, init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(family.eager(), config).eval()
    with torch.no_grad():
        wanted = model(input_ids=family.ids)[0]
    model.save_pretrained(tmp_path / "adapter")
    ours = kt_moe.load_adapter(family.by_config(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert error(ours(input_ids=family.ids)[0], wanted) < 2 * LOGITS


def test_samples_with_adapters_of_their_own(family: Family) -> None:
    # Of Llama 4 a token's rows follow one another, so that a sample's do.
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["experts"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(family.by_config(), config).eval()
    with torch.no_grad():
        adapted = model(input_ids=family.ids)[0]
        with model.disable_adapter():
            plain = model(input_ids=family.ids)[0]
        mixed = model(input_ids=family.ids, adapter_names=["__base__", "default"])[0]
    assert torch.allclose(mixed[0], plain[0], atol=1e-3)
    assert torch.allclose(mixed[1], adapted[1], atol=1e-3)
    assert error(plain, adapted) > 0.05


def test_gradient_checkpointing(family: Family) -> None:
    config = peft.LoraConfig(r=2, target_modules=["experts"], init_lora_weights=False)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model = peft.get_peft_model(family.by_config(), config).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=family.ids)[0].square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    for name, gradient in found[0].items():
        assert gradient is not None
        assert torch.equal(gradient, found[1][name])


def test_longcat_flash_as_published_has_no_weights_for_the_identity(tmp_path: Path) -> None:
    family = Family("longcat_flash", tmp_path)
    with torch.no_grad():
        wanted = family.by_config()(input_ids=family.ids)[0]
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    beyond = [n for n in tensors if any(f".experts.{e}." in n for e in range(4, 8))]
    assert len(beyond) == 2 * 4 * 2  # gate and up, as transformers saves them
    kept = {name: tensor for name, tensor in tensors.items() if name not in beyond}
    safetensors.torch.save_file(kept, file, {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(family.by_config()(input_ids=family.ids)[0], wanted)


def test_llama4_with_tensors_for_each_expert() -> None:
    # As its FP8 checkpoints have them.
    model = tiny_family("llama4")
    prefix = "model.layers.1.feed_forward.experts"
    names = [
        f"{prefix.replace('1', str(layer))}.{e}.{word}.{tail}"
        for layer in range(2)
        for e in range(4)
        for word in ("gate_proj", "up_proj", "down_proj")
        for tail in ("weight", "weight_scale")
    ]
    found = stored_lists(model, architecture_of(model), names)
    assert found[1] == ExpertList(prefix, False, ("gate_proj", "up_proj", "down_proj"), 0, 4)


def test_parameters_are_counted_as_in_the_plain_model(family: Family) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj" if family.name == "llama4" else "o_proj"])
    counts = [
        peft.get_peft_model(model, config).get_nb_trainable_parameters()
        for model in (family.eager(), family.by_config())
    ]
    assert counts[0] == counts[1]


def test_one_expert_too_many_rows_is_cut(tmp_path: Path) -> None:
    family = Family("longcat_flash", tmp_path)
    module = next(iter(expert_modules(family.eager()).values()))
    assert len(module.gate_up_proj) == 8
    model = kt_moe.wrap(family.eager(), KtMoeConfig())
    experts: dict[str, Any] = kt_moe.model_experts(model)
    gate, up, down = next(iter(experts.values())).dequantize()
    whole: Tensor = torch.cat([gate, up], 1).float()
    assert torch.equal(whole, module.gate_up_proj[:4])
    assert torch.equal(down.float(), module.down_proj)
