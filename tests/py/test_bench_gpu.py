"""`kt-moe bench --gpu` on the CPU in the GPU's place: what it computes, counts and writes."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import InProcess
from tiny_models import PEFT_WARNINGS
from torch import Tensor, nn

import kt_moe
from kt_moe.cli import bench, main
from kt_moe.cli.bench import contestants, options, session, training
from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.remote import Remote, RemoteError
from kt_moe.cli.bench.rivals import Streamed
from kt_moe.cli.bench.training import Trainer

TINY = ["--hidden", "64", "--intermediate", "32", "--experts", "6", "--topk", "2"]
RUN = ["--gpu", "--device", "cpu", *TINY, "--threads", "1", "--rank", "8", "--reps", "1"]
# torch.compile looks at the gradients of the tensors that it is given.
COMPILING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Remote", InProcess)


def settings_of(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return options.read(parser.parse_args([*RUN, *more]))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_streamed_layers_cross_the_link_once_a_pass_save_those_in_a_slot(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, fetched = Streamed.fetch, []
    monkeypatch.setattr(Streamed, "fetch", lambda self, index: fetched.append(index) or fetch(self, index))
    settings = settings_of("--layers", str(layers), "--threads", "1")
    settings.threads = 1
    stack = contestants.make("streamed", settings)
    stack.prepare(Case(settings.shape, 4, 8, layers=layers))
    kept = min(layers, 2)
    for wanted in (2 * layers - kept, 2 * (layers - kept)):
        fetched.clear()
        stack.step(0)
        assert len(fetched) == wanted
    assert stack.figures()["link_bytes"] == wanted * settings.shape.weight_bytes


def run_stack(tmp_path: Path, *more: str, status: int = 0) -> dict[str, Any]:
    file = tmp_path / "bench.json"
    assert main(["bench", *RUN, "--layers", "3", *more, "--json", str(file)]) == status
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_stack_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_stack(tmp_path, "--tokens", "3,9", "--format", "bf16,int4")
    everyone = ["kt_moe bf16", "kt_moe int4", "streamed", "resident", "cpu", "kt_moe-resident"]
    assert [(r["tokens"], r["who"]) for r in found["results"]] == [(t, w) for t in (3, 9) for w in everyone]
    assert found["ok"]
    assert found["notes"] == []
    for result in found["results"]:
        both, who = result["seconds"]["both"]["median"], result["who"]
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / both)
        assert len(result["errors"]) == 9  # of the stack's output, and of gradients of its first layer
        assert result["worst_error"] < (0.5 if who == "kt_moe int4" else 0.03)
        if who == "resident":
            assert (result["link_bytes"], result["share_of_limit"]["both"]) == (0, 1)
        if who == "streamed":
            assert result["link_bytes"] == 2 * settings_of().shape.weight_bytes
            least = result["link_bytes"] / found["link_bytes_per_second"]
            assert result["limit_seconds"]["both"] >= least
        assert ("limit_seconds" in result) == (who != "cpu")
        assert ("cpu_rows" in result) == who.startswith("kt_moe")
        if who == "kt_moe-resident":
            assert result["cpu_rows"] == 0
    assert "share" in capsys.readouterr().out


def test_who_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Streamed, "__getitem__", fail)
    found = run_stack(tmp_path, "--tokens", "3", "--peers", "streamed,cpu")
    assert [r["who"] for r in found["results"]] == ["kt_moe bf16", "cpu"]
    assert found["notes"] == [
        "streamed, tokens 3, rank 8 is left out: OutOfMemoryError: CUDA out of memory",
    ]


def test_a_fault_of_ours_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(kt_moe, "moe", fail)
    with pytest.raises(RemoteError, match="a bug"):
        main(["bench", *RUN, "--tokens", "3", "--peers", "cpu"])


def test_a_wrong_output_is_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kt_moe.moe
    monkeypatch.setattr(kt_moe, "moe", lambda *args, **kwargs: right(*args, **kwargs) * 1.5)
    assert not run_stack(tmp_path, "--tokens", "3", "--peers", "cpu", status=1)["ok"]


STEP = ["--step", "--layers", "2", "--tokens", "16", "--sequence", "8"]


def losses_of(name: str, *more: str) -> list[float]:
    settings = job(*more)
    trainer = Trainer(name, settings)
    trainer.prepare(Case(settings.shape, 16, 8, layers=2))
    trainer.turn(1, 0.0)
    found: list[float] = trainer.figures()["losses"]
    return found


def job(*more: str) -> argparse.Namespace:
    settings = settings_of(*STEP, *more)
    settings.rank, settings.threads = 8, 1
    return settings


class TestStep:
    pytestmark = PEFT_WARNINGS

    @pytest.mark.parametrize("experts", ["recompute", "retain"])
    def test_everyone_trains_the_same_model(self, experts: str, tmp_path: Path) -> None:
        file, argv = tmp_path / "bench.json", ["bench", *RUN, *STEP, "--checkpoint-experts", experts]
        argv[argv.index("16")] = "17"  # rows of eight: the last token is left out
        assert main([*argv, "--peers", "resident,cpu", "--json", str(file)]) == 0
        ours, *others = json.loads(file.read_text())["results"]
        assert [r["who"] for r in (ours, *others)] == ["kt_moe bf16", "resident", "cpu"]
        assert ours["seconds"]["both"]["count"] == 1
        assert ours["losses"][-1] < ours["losses"][0] + 0.5
        for other in others:
            assert (other["tokens"], other["rank"]) == (16, 8)
            ratio = other["seconds"]["both"]["median"] / ours["seconds"]["both"]["median"]
            assert other["time_over_first"] == pytest.approx(ratio)
            assert other["losses"] == pytest.approx(ours["losses"], rel=2e-3)

    @COMPILING
    @pytest.mark.parametrize("options", [[], ["--compile"]])
    def test_roundpipes_layers_are_the_model(
        self, options: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "roundpipe", fake_roundpipe())
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
        theirs, ours = (losses_of(name, *options) for name in ("roundpipe", "resident"))
        assert theirs[0] == pytest.approx(ours[0], rel=1e-3)

    @COMPILING
    def test_compiled_attention_is_one_graph_beside_experts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
        )
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        losses = []
        for more in ([], ["--compile"]):
            for experts in ("recompute", "retain"):
                losses.append(losses_of("kt_moe bf16", *more, "--checkpoint-experts", experts))
        assert losses == [losses[0]] * 4
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def fake_roundpipe() -> Any:
    """What the trainer uses of the package, which cannot be imported without a GPU."""

    class Pipe:
        def __init__(self, model: nn.Sequential, optim_dtype: torch.dtype, name: str) -> None:
            self.model = model

        def optim_parameters(self) -> list[nn.Parameter]:
            return [p for p in self.model.parameters() if p.requires_grad]

        def forward_backward(self, input_args: tuple[Tensor], run_config: Any) -> Tensor:
            loss: Tensor = self.model(*input_args)
            loss.backward()
            return loss.detach()

        def step(self, step_fn: Callable[[], None]) -> None:
            step_fn()

    def adam(parameters: Any, lr: float, weight_decay: float, decoupled_weight_decay: bool) -> Any:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)

    module = types.ModuleType("roundpipe")
    module.RoundPipe = Pipe
    module.RoundPipeRunConfig = dict
    module.optim = types.ModuleType("roundpipe.optim")
    module.optim.Adam = adam
    return module


def test_a_trainer_that_fails_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "Remote", Remote)
    assert main(["bench", *RUN, *STEP, "--format", "int4", "--peers", "roundpipe"]) == 0
    printed = capsys.readouterr().out
    assert "roundpipe is left out: ModuleNotFoundError: No module named 'roundpipe'; pip install" in printed
    assert "kt_moe int4" in printed


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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "2"], "--layers is not for a layer on the CPU"),
        (["--step"], "--step is not for a layer on the CPU"),
        (["--gpu", "--device", "cpu", "--quick"], "--quick is not for a stack of layers (--gpu)"),
        (["--gpu", "--device", "cpu", "--rank", "8,12"], "--rank is [8, 12], wanted multiples of 8"),
        (
            ["--gpu", "--device", "cpu", "--peers", "roundpipe"],
            "--peers has roundpipe, wanted some of streamed",
        ),
        (["--gpu", "--device", "cpu", "--json", "no/folder/x.json"], "--json no/folder/x.json: No such file"),
    ],
)
def test_options_that_cannot_be_met(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--gpu"]) == 2
    assert "--gpu needs a CUDA device" in capsys.readouterr().err


def test_defaults() -> None:
    stack, step = settings_of(), settings_of("--step")
    assert (stack.layers, step.layers) == (6, 48)
    assert stack.tokens == [512, 2048, 8192, 16384]
    assert (step.sequence, step.checkpoint_experts) == (1024, "recompute")
    assert (stack.gpu_memory, stack.cpu_share, stack.format) == ("auto", "auto", ["bf16"])
