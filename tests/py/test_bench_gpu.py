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
from tiny_models import PEFT_WARNINGS
from torch import Tensor, nn

from kt_moe.cli import bench, main
from kt_moe.cli.bench import gpu, gpu_model, gpu_options, gpu_stack, gpu_step
from kt_moe.cli.bench.data import make_lora, make_weights
from kt_moe.cli.bench.gpu_options import GpuSettings
from kt_moe.cli.bench.gpu_stack import KtStack, Resident, Stack, StackInputs, Streamed, TorchStack
from kt_moe.cli.bench.gpu_step import StepJob
from kt_moe.cli.bench.peer_process import PeerError

TINY = ["--hidden", "64", "--intermediate", "32", "--experts", "6", "--topk", "2"]
RUN = ["--gpu", "--device", "cpu", *TINY, "--threads", "1", "--rank", "8", "--reps", "1"]
CPU = torch.device("cpu")
# torch.compile looks at the gradients of the tensors that it is given.
COMPILING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def settings_of(*more: str) -> GpuSettings:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return gpu_options.read(parser.parse_args([*RUN, *more]))


def stacks_of(settings: GpuSettings) -> list[Stack]:
    """kt_moe's engine, kt_moe on the CPU, streamed, resident; B of LoRA is not zero."""
    weights, lora = make_weights(settings.shape, 1), make_lora(settings.shape, settings.rank, 1)
    bases = (Streamed(weights, settings.layers, CPU), Resident(weights, settings.layers, CPU))
    return [
        KtStack("kt_moe bf16", weights, lora, settings, "bf16", settings.gpu(cpu_share=0.5)),
        KtStack("cpu", weights, lora, settings, "bf16", "off"),
        *(TorchStack(type(base).__name__, base, lora, settings) for base in bases),
    ]


def inputs_of(settings: GpuSettings, tokens: int) -> StackInputs:
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(tokens, settings.shape.hidden, generator=generator).bfloat16() for _ in range(2))
    scores = [
        torch.randn(tokens, settings.shape.experts, generator=generator) for _ in range(settings.layers)
    ]
    top = [s.softmax(-1).topk(settings.shape.topk) for s in scores]
    return StackInputs(
        x.requires_grad_(), [t.indices for t in top], [t.values.requires_grad_() for t in top], grad
    )


def distance(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None
    assert wanted is not None
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def test_every_stack_computes_the_same() -> None:
    settings = settings_of("--layers", "3")
    found = []
    for stack in stacks_of(settings):
        inputs = inputs_of(settings, 20)
        seconds = stack.step(inputs)
        assert min(seconds) > 0
        grads = {name: tensor.grad for name, tensor in stack.lora[1].items() if tensor.grad is not None}
        if isinstance(stack, KtStack):
            grads = gpu_stack.fuse_lora(grads)
        assert len(grads) == 5
        found.append({"out": stack.out, "x": inputs.x.grad, "weights": inputs.weights[0].grad, **grads})
    for other in found[1:]:
        assert {name: distance(found[0][name], other[name]) for name in other if
                distance(found[0][name], other[name]) > 0.03} == {}  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_streamed_layers_cross_the_link_once_a_pass_save_those_in_a_slot(layers: int) -> None:
    settings = settings_of("--layers", str(layers))
    weights, lora = make_weights(settings.shape, 1), make_lora(settings.shape, 8, 1)
    stack = TorchStack("streamed", Streamed(weights, layers, CPU), lora, settings)
    kept, size = min(layers, 2), settings.shape.weight_bytes
    stack.step(inputs_of(settings, 4))
    assert stack.moved == (2 * layers - kept) * size
    stack.step(inputs_of(settings, 4))
    assert stack.moved == (2 * layers - kept + 2 * (layers - kept)) * size


def run_stack(tmp_path: Path, *more: str, status: int = 0) -> dict[str, Any]:
    file = tmp_path / "bench.json"
    assert main(["bench", *RUN, "--layers", "3", *more, "--json", str(file)]) == status
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_stack_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_stack(tmp_path, "--tokens", "3,9", "--format", "bf16,int4", "--new-routes")
    everyone = ["kt_moe bf16", "kt_moe int4", "streamed", "resident", "cpu", "kt_moe-resident"]
    assert [(r["tokens"], r["who"]) for r in found["results"]] == [(t, w) for t in (3, 9) for w in everyone]
    assert found["ok"]
    assert found["notes"] == []
    for result in found["results"]:
        both = result["seconds"]["both"]["median"]
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / both)
        if result["who"] == "resident":
            assert (result["link_bytes"], result["share_of_limit"]) == (0, 1)
        if result["who"] == "streamed":
            assert result["link_bytes"] == 2 * settings_of().shape.weight_bytes
            assert result["limit_seconds"] >= result["link_bytes"] / found["link_bytes_per_second"]
        if result["who"] == "cpu":
            assert result["limit_seconds"] is None
        assert (result["cpu_rows"] is not None) == result["who"].startswith("kt_moe")
        if result["who"] == "kt_moe-resident":
            assert result["cpu_rows"] == 0
    assert "share" in capsys.readouterr().out


def test_who_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Resident, "__init__", fail)
    monkeypatch.setattr(Streamed, "done", fail)
    found = run_stack(tmp_path, "--tokens", "3", "--peers", "resident,streamed,cpu")
    assert [r["who"] for r in found["results"]] == ["kt_moe bf16", "cpu"]
    assert found["notes"] == [f"{name} is left out: CUDA out of memory" for name in ("resident", "streamed")]


def test_an_output_unlike_plain_torchs_is_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = KtStack.layer
    monkeypatch.setattr(KtStack, "layer", lambda *args: right(*args) * 1.5)
    assert not run_stack(tmp_path, "--tokens", "3", "--peers", "resident", status=1)["ok"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_in_child", gpu_step.run_job)


STEP = ["--step", "--layers", "2", "--tokens", "16", "--sequence", "8"]


@pytest.mark.usefixtures("in_this_process")
class TestStep:
    pytestmark = PEFT_WARNINGS

    @pytest.mark.parametrize("experts", ["recompute", "retain"])
    def test_everyone_trains_the_same_model(self, experts: str, tmp_path: Path) -> None:
        file, argv = tmp_path / "bench.json", ["bench", *RUN, *STEP, "--checkpoint-experts", experts]
        assert main([*argv, "--peers", "resident,cpu", "--json", str(file)]) == 0
        ours, *others = json.loads(file.read_text())["results"]
        assert [r["who"] for r in (ours, *others)] == ["kt_moe bf16", "resident", "cpu"]
        assert len(ours["seconds"]) == 1
        for other in others:
            assert other["tokens"] == 16
            assert other["losses"] == pytest.approx(ours["losses"], rel=1e-3)

    @COMPILING
    @pytest.mark.parametrize("options", [[], ["--compile"]])
    def test_roundpipes_layers_are_the_model(
        self, options: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "roundpipe", fake_roundpipe())
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
        settings = settings_of(*STEP, *options)
        (theirs,) = gpu_step.run_job(StepJob("roundpipe", "bf16", settings))
        (ours,) = gpu_step.run_job(StepJob("resident", "bf16", settings))
        assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-3)

    @COMPILING
    def test_compiled_attention_is_one_graph_beside_experts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
        )
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        losses = []
        for options in ([], ["--compile"]):
            for experts in ("recompute", "retain"):
                settings = settings_of(*STEP, *options, "--checkpoint-experts", experts)
                losses.append(gpu_step.run_job(StepJob("kt_moe", "bf16", settings))[0]["losses"])
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


def test_a_rival_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "run_in_child", lambda job: [])
    assert main(["bench", *RUN, *STEP, "--peers", "roundpipe"]) == 0
    assert "roundpipe: not installed; try: pip install roundpipe==0.1.1" in capsys.readouterr().out


def test_what_a_child_raises_is_its_answer() -> None:
    with pytest.raises(PeerError, match="No module named 'roundpipe'"):
        gpu_step.run_in_child(StepJob("roundpipe", "bf16", settings_of(*STEP)))


def test_the_loss_in_parts_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "_LOSS_ROWS", 4)
    head, ids = torch.randn(11, 6), torch.randint(11, (3, 5))
    hidden = torch.randn(3, 5, 6, requires_grad=True)
    loss = gpu_model.next_token_loss(hidden, head, ids) * 2
    (found,) = torch.autograd.grad(loss, hidden)
    logits = torch.nn.functional.linear(hidden[:, :-1].flatten(0, 1), head)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()) * 2
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, hidden)[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "2"], "--layers is for --gpu"),
        (["--step"], "--step is for --gpu"),
        (["--gpu", "--device", "cpu", "--quick"], "--quick is not for --gpu"),
        (["--gpu", "--device", "cpu", "--rank", "12"], "--rank is 12, wanted a multiple of 8"),
        (["--gpu", "--device", "cpu", "--rank", "8,16"], "--rank has 2 values, --gpu takes one"),
        (
            ["--gpu", "--device", "cpu", "--peers", "roundpipe"],
            "--peers has roundpipe, wanted some of streamed",
        ),
        (
            ["--gpu", "--device", "cpu", "--step", "--preset", "kimi-k2"],
            "--step makes Qwen3-MoE models, not kimi",
        ),
        (["--gpu", "--json", "no/such/folder/x.json"], "no file can be written there"),
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
    assert stack.peers == list(gpu_options.STACK_PEERS)
    assert (stack.gpu_memory, stack.cpu_share, stack.formats) == ("auto", "auto", ["bf16"])
