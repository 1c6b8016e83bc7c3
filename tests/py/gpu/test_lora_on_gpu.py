"""LoRA of the experts in host memory, its model on a GPU: Trainer, clipping, fused AdamW, resuming."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
sys.path.append(str(Path(__file__).parents[1]))  # the tests' own modules

TARGETS = ["q_proj", "experts"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import ALL_EXPERTS, save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), **ALL_EXPERTS)


def make(checkpoint: Path, choice: str, *, on_gpu: bool = False, **options: Any) -> Any:
    from tiny_models import load, with_lora

    from kt_moe.hf import KtMoeConfig

    config = KtMoeConfig(lora_device=choice, **options)
    where = {"device_map": {"": "cuda:0"}} if on_gpu else {}
    return with_lora(checkpoint, TARGETS, base=load(checkpoint, quantization_config=config, **where))


def experts_lora(model: Any) -> list[torch.Tensor]:
    from tiny_models import lora_layers

    return [p for layer in lora_layers(model) for p in layer.parameters()]


def devices_of_experts_lora(model: Any) -> set[str]:
    return {p.device.type for p in experts_lora(model)}


@pytest.mark.parametrize(("choice", "device"), [("cpu", "cpu"), ("cuda", "cuda"), ("auto", "cuda")])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["moved later", "loaded onto the GPU"])
def test_where_it_lies(choice: str, device: str, on_gpu: bool, checkpoint: Path) -> None:
    model = make(checkpoint, choice, on_gpu=on_gpu)
    if not on_gpu:
        model.cuda()
    assert devices_of_experts_lora(model) == {device}
    assert {p.is_pinned() for p in experts_lora(model)} == {device == "cpu"}  # the GPU reads them in place
    assert {p.device.type for p in model.parameters() if not p.requires_grad} == {"cuda"}
    model.to("cpu")
    assert devices_of_experts_lora(model) == {"cpu"}
    assert not any(p.is_pinned() for p in experts_lora(model))


def test_auto_without_room(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_moe import lora_device

    monkeypatch.setattr(lora_device, "free_bytes", lambda device: 0)
    model = make(checkpoint, "auto")
    model.cuda()
    assert devices_of_experts_lora(model) == {"cpu"}


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
@pytest.mark.parametrize("checkpointing", [None, "recompute", "retain"])
def test_trainer(
    choice: str, checkpointing: str | None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from tiny_models import gradients, tokens

    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 1)  # else DataParallel takes all there are
    rows = [{"input_ids": t, "labels": t} for t in tokens(1).expand(8, -1)]

    def trainer() -> Any:
        model = make(checkpoint, choice, checkpoint_experts=checkpointing or "recompute")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, save_steps=2, report_to=[], disable_tqdm=True, optim="adamw_torch_fused",
            max_grad_norm=0.1, gradient_checkpointing=checkpointing is not None,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows)

    def losses(trainer: Any) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    first = trainer()
    first.train()
    assert devices_of_experts_lora(first.model) == {choice}
    assert losses(first)[-1] < losses(first)[0]
    for state in first.optimizer.state.values():
        assert state["exp_avg"].device.type in ("cpu", "cuda")
    for parameter in (p for p in first.model.parameters() if p.requires_grad):
        assert first.optimizer.state[parameter]["exp_avg"].device == parameter.device
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-1] == pytest.approx(losses(first)[-1], rel=1e-4)

    model = first.model
    model.zero_grad()
    model(tokens().cuda(), labels=tokens().cuda()).loss.backward()
    found = gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    total = sum(float(g.square().sum()) for g in found.values()) ** 0.5
    assert total == pytest.approx(1e-3, rel=1e-2)
    assert float(norm) > 1e-3


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_retained_experts_on_a_gpu(reentrant: bool, choice: str, checkpoint: Path) -> None:
    """Bitwise what no checkpointing gives: the cut is the same, and attention is deterministic here."""
    from tiny_models import gradients, tokens

    def run(mode: str | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = make(checkpoint, choice, checkpoint_experts=mode or "recompute", cpu_share=0.5)
        base = model.base_model.model
        if mode is not None:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        model.cuda().train()
        torch.manual_seed(3)
        loss = model(tokens().cuda(), labels=tokens().cuda()).loss
        loss.backward()
        return loss.detach(), gradients(model)

    loss, expected = run(None)
    for mode in ("retain", "recompute"):
        again, ours = run(mode)
        assert torch.equal(again, loss)
        for name, gradient in expected.items():
            assert torch.equal(ours[name], gradient), (mode, name)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_in_host_memory_are_there_when_they_are_read(steps: int) -> None:
    """By sums with other uses of a parameter, by accumulation, by hooks: all in backward, none of ours."""
    import kt_moe

    E, H, inner, T, r = 16, 512, 256, 600, 16
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(*shape, generator=random)

    weights = [normal(E, inner, H), normal(E, inner, H), normal(E, H, inner)]
    layers = [kt_moe.Experts(*(w.bfloat16() for w in weights), gpu=kt_moe.Gpu(cpu_share=0.3)) for _ in "ab"]
    sizes = {"gate": (H, inner), "up": (H, inner), "down": (inner, H)}
    lora = {}
    for name, (into, out) in sizes.items():
        lora[f"{name}_lora_a"], lora[f"{name}_lora_b"] = normal(E, r, into), normal(E, out, r)
    inputs = [normal(T, H) for _ in range(steps)]
    ids = torch.stack([torch.randperm(E, generator=random)[:4] for _ in range(T)]).cuda()
    scores = torch.rand(T, 4, generator=random).cuda()

    def run(device: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        leaves = {k: v.clone().to(device).requires_grad_() for k, v in lora.items()}
        seen: dict[str, torch.Tensor] = {}
        for name, leaf in leaves.items():
            leaf.register_hook(lambda grad, name=name: seen.__setitem__(name, grad.clone().cpu()))
        for x in inputs:
            y = x.cuda().requires_grad_()
            for experts in layers:
                y = y + kt_moe.moe(y, ids, scores, experts, leaves)
            penalty = sum((leaf * leaf).sum().to("cuda") for leaf in leaves.values())
            (y.square().sum() + penalty).backward()
        return {k: v.grad.cpu() for k, v in leaves.items()}, seen

    truth, truth_seen = run("cuda")
    for _ in range(3):
        grads, seen = run("cpu")
        for name in lora:
            torch.testing.assert_close(grads[name], truth[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(seen[name], truth_seen[name], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_a_model_over_two_gpus(choice: str, checkpoint: Path) -> None:
    """Layers that `device_map` spreads over GPUs train as they do on one: the same bits of every gradient."""
    from tiny_models import gradients, load, lora_layers, tokens, with_lora

    from kt_moe.hf import KtMoeConfig

    half = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
    other = {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    found = []
    for device_map in ({"": 0}, half | other):
        config = KtMoeConfig(lora_device=choice, cpu_share=0.3)
        base = load(checkpoint, quantization_config=config, device_map=device_map)
        model = with_lora(checkpoint, TARGETS, base=base)
        lora = [{p.device for p in layer.parameters()} for layer in lora_layers(model)]
        last = max(device_map.values())
        assert lora[-1] == {torch.device("cuda", last) if choice == "cuda" else torch.device("cpu")}
        for _ in range(3):  # the engines' slots and guesses, cold and warm
            model.zero_grad()
            loss = model(tokens().cuda(), labels=tokens().cuda()).loss
            loss.backward()
        found.append({"loss": loss.detach().cpu(), **{k: g.cpu() for k, g in gradients(model).items()}})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
