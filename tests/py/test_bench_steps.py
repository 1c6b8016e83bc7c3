"""`kt-moe bench --step`: training steps of a model made on the spot."""

from __future__ import annotations

import argparse
import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from tiny_models import PEFT_WARNINGS
from torch import nn

from kt_moe.cli import bench, main
from kt_moe.cli.bench import training
from kt_moe.cli.bench.cases import Case

TINY = ["--hidden", "64", "--intermediate", "32", "--experts", "6", "--topk", "2"]
STEP = [*TINY, "--step", "--layers", "2", "--tokens", "16", "--sequence", "8", "--rank", "8", "--reps", "1"]

pytestmark = PEFT_WARNINGS


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("experts", ["recompute", "retain"])
def test_everyone_trains_the_same_model(experts: str, tmp_path: Path) -> None:
    file, argv = tmp_path / "bench.json", ["bench", *STEP, "--checkpoint-experts", experts]
    argv[argv.index("16")] = "17"  # rows of eight: the last token is left out
    assert main([*argv, "--peers", "resident", "--json", str(file)]) == 0
    ours, other = json.loads(file.read_text())["results"]
    assert [r["who"] for r in (ours, other)] == ["kt_moe bf16", "resident"]
    assert ours["seconds"]["both"]["count"] == 1
    assert ours["losses"][-1] < ours["losses"][0] + 0.5
    assert other["tokens"] == 16
    assert other["losses"] == pytest.approx(ours["losses"], rel=2e-3)


def losses_of(*more: str) -> list[float]:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    settings = parser.parse_args([*STEP, *more])
    bench.check(settings)
    settings.device = "cpu"
    trainer = training.trainer("kt_moe bf16", settings)
    trainer.prepare(Case(settings.shape, 16, 8))
    trainer.turn()
    found: list[float] = trainer.figures()["losses"]
    return found


# torch.compile looks at the gradients of the tensors that it is given. torch 2.11 scripts functions as it
# starts, which is deprecated on later Pythons, and asks what the GPU is only then, where there is one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_compiled_attention_is_one_graph_beside_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
    )
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for more in ([], ["--compile"]):
        for experts in ("recompute", "retain"):
            losses.append(losses_of(*more, "--checkpoint-experts", experts))
    assert losses == [losses[0]] * 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_loss_in_parts_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_LOSS_ROWS", 4)
    head, ids = torch.randn(11, 6), torch.randint(11, (3, 5))
    hidden = torch.randn(3, 5, 6, requires_grad=True)
    loss = training.next_token_loss(hidden, head, ids) * 2
    (found,) = torch.autograd.grad(loss, hidden)
    logits = torch.nn.functional.linear(hidden[:, :-1].flatten(0, 1), head)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()) * 2
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, hidden)[0])
