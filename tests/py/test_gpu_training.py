"""Training the example model while the CPU's share changes every step: the loss follows the CPU's alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny_models import PEFT_WARNINGS

import kt_moe
from kt_moe import Gpu

MODEL = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"
STEPS, BATCH, LENGTH = 300, 2, 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batches() -> list[torch.Tensor]:
    """Text of this file's neighbours, as the tokenizer has it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py"))[:20])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    found = ids[: len(ids) // (BATCH * LENGTH) * BATCH * LENGTH].view(-1, BATCH, LENGTH)
    return [found[i].to(DEVICE) for i in range(STEPS)]


def train(shares: Sequence[float]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step, and the LoRA parameters after the last."""
    gpu = Gpu(DEVICE, memory="1MiB", cpu_share=1.0)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.bfloat16, quantization_config=kt_moe.KtMoeConfig()
    )
    for experts in kt_moe.model_experts(base).values():
        experts.gpu = gpu
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["experts", "q_proj"], r=8, lora_alpha=16)
    model = peft.get_peft_model(base.to(DEVICE), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, fused=True)
    losses = []
    for ids, gpu.cpu_share in zip(batches(), shares, strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().cpu().clone() for name, p in trained.items()}


@pytest.mark.parametrize("marked", [pytest.param(None, marks=PEFT_WARNINGS)])
def test_random_shares_follow_the_cpu(marked: None) -> None:
    shares = [random.Random(step).random() for step in range(STEPS)]
    (some, parameters), (again, same) = train(shares[:60]), train(shares[:60])
    assert again == some
    assert all(torch.equal(parameters[name], same[name]) for name in parameters)
    (mixed, _), (alone, _) = train(shares), train([1.0] * STEPS)
    assert mixed[:60] == some
    assert sum(alone[-30:]) < 0.8 * sum(alone[:30])
    # Each loss is of a few tokens, and rounding in one step moves those of the next.
    for begin in range(0, STEPS, 50):
        ours, cpu = (sum(losses[begin : begin + 50]) for losses in (mixed, alone))
        assert ours == pytest.approx(cpu, rel=2e-3)
    assert mixed != alone  # other roundings: the shares had an effect
