"""docs/rivals.py: other libraries' processes, and the model that RoundPipe gets."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PEFT_WARNINGS
from torch import Tensor, nn

from kt_moe.cli import bench, main
from kt_moe.cli.bench import session
from kt_moe.cli.bench.cases import Case
from kt_moe.cli.bench.training import trainer
from kt_moe.functional import LORA_NAMES

DOCS = Path(__file__).parents[2] / "docs"
SIZES = [
    "--hidden",
    "64",
    "--intermediate",
    "32",
    "--experts",
    "6",
    "--topk",
    "2",
    "--rank",
    "8",
    "--reps",
    "1",
]
pytestmark = PEFT_WARNINGS
STEP = ["--step", "--layers", "2", "--tokens", "16", "--sequence", "8"]


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("rivals")


def settings_of(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    settings = parser.parse_args([*SIZES, *more])
    bench.check(settings)
    settings.device = "cpu"
    return settings


def test_a_rivals_process_stands_still_between_calls(rivals: Any) -> None:
    settings = settings_of()
    case = Case(settings.shape, 12, 8)
    rival = rivals.Remote(session.make, "torch", settings)
    rival.prepare(case)
    assert len(rival.turn(0.0)) == 1
    assert set(rival.outputs()) == {"out", "hidden_states", "topk_weights", *LORA_NAMES}
    until = time.monotonic() + 30  # a signal takes effect soon, not at once
    while Path(f"/proc/{rival._process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until
    with pytest.raises(rivals.RemoteError, match=r"AttributeError: .*'nothing'"):
        rival.nothing()
    with pytest.raises(rivals.RemoteError, match="its process ended or hangs"):
        rival.step(Unpickled(os._exit, 3))


@dataclass
class Unpickled:
    """Calls something in the process that unpickles it."""

    call: Any
    argument: float

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


KT_KERNEL = """
import ctypes, math, types
import torch
from kt_moe.cli.bench.plain import loop_layer
from kt_moe.functional import LORA_NAMES

def at(pointer, *size, dtype=torch.bfloat16):
    memory = (ctypes.c_char * (math.prod(size) * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).view(size)

class Config:
    def __init__(self, *sizes):
        self.sizes = sizes

class Layer:
    def __init__(self, config):
        (e, self.k, self.h, i), r = config.sizes, config.lora_rank
        sizes = (e, i, self.h), (e, i, self.h), (e, self.h, i)
        base = [at(p, *s) for p, s in zip((config.gate_proj, config.up_proj, config.down_proj), sizes)]
        self.layer, self.lora = loop_layer(base), {}
        for name in LORA_NAMES:
            into, out = (i, self.h) if name.startswith("down") else (self.h, i)
            size = (e, r, into) if name.endswith("a") else (e, out, r)
            self.lora[name] = at(getattr(config, name), *size).requires_grad_()

    def load_weights(self):
        pass

    def forward_sft(self, tokens, topk, ids, weights, x, out, save):
        n = at(tokens, 1, dtype=torch.int32).item()
        self.x = at(x, n, self.h).detach().requires_grad_()
        self.weights = at(weights, n, topk, dtype=torch.float32).detach().requires_grad_()
        self.out = self.layer(self.x, at(ids, n, topk, dtype=torch.int64), self.weights, self.lora)
        at(out, n, self.h).copy_(self.out.detach())

    def backward(self, grad_out, grad_x, *pointers):
        leaves = [self.x, *self.lora.values(), self.weights]
        found = torch.autograd.grad(self.out, leaves, at(grad_out, *self.out.shape))
        for pointer, grad in zip((grad_x, *pointers), found):
            at(pointer, *grad.shape, dtype=grad.dtype).copy_(grad)

def initialize():
    moe = types.SimpleNamespace(MOESFTConfig=Config, AMXBF16_SFT_MOE=Layer)
    pool = types.SimpleNamespace(backend_=None)
    return types.SimpleNamespace(
        moe=moe, WorkerPoolConfig=types.SimpleNamespace, CPUInfer=lambda config: pool
    ), "no variant"
"""


def test_kt_kernels_layer_takes_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for its extension that takes the same pointers; the remote process finds it too."""
    package, file = tmp_path / "kt_kernel", tmp_path / "bench.json"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_cpu_detect.py").write_text(KT_KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(session, "_CEILING", 0.002)
    more = ["--tokens", "2,12", "--peers", f"torch,{DOCS}/rivals.py:kt_kernel", "--json", str(file)]
    assert main(["bench", *SIZES, *more]) == 0
    results = json.loads(file.read_text())["results"]
    assert [result["who"].rpartition(":")[2] for result in results] == [
        "kt_moe bf16",
        "torch",
        "kt_kernel",
    ] * 2
    for _, plain, theirs in (results[:3], results[3:]):
        assert theirs["seconds"]["both"]["count"] > 1
        assert theirs["errors"] == pytest.approx(plain["errors"])  # the same arithmetic


def test_a_rivals_process_that_hangs_is_given_up(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = rivals.Remote(Fraction, 1)
    assert rival.limit_denominator(5) == 1
    monkeypatch.setattr(rivals, "_PATIENCE", 0.5)
    with pytest.raises(rivals.RemoteError, match="its process ended or hangs"):
        rival.limit_denominator(Unpickled(time.sleep, 600))


@pytest.mark.parametrize("name", ["kt_kernel", "roundpipe"])
def test_a_rival_that_is_not_installed(name: str, rivals: Any) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    more = STEP if name == "roundpipe" else ["--tokens", "2"]
    with pytest.raises(Exception, match=f"ModuleNotFoundError: No module named '{name}'") as caught:
        main(["bench", *SIZES, *more, "--peers", f"{DOCS}/rivals.py:{name}"])
    assert type(caught.value).__name__ == "RemoteError"


def test_roundpipes_layers_are_the_model(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "roundpipe", fake_roundpipe())
    settings, losses = settings_of(*STEP), []
    for one in (rivals.round_pipe(settings), trainer("resident", settings)):
        one.prepare(Case(settings.shape, 16, 8))
        losses.append(one.figures()["losses"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def fake_roundpipe() -> Any:
    """What the trainer uses of the package, which cannot be imported without a GPU."""

    class Pipe:
        def __init__(self, model: nn.Sequential, optim_dtype: torch.dtype, name: str) -> None:
            self.model = model

        def optim_parameters(self) -> list[nn.Parameter]:
            return [p for p in self.model.parameters() if p.requires_grad]

        def forward_backward(self, input_args: tuple[Tensor], run_config: Any) -> Tensor:
            total = torch.zeros(())
            for part in input_args[0].chunk(run_config["num_microbatch"]):
                loss: Tensor = self.model(part)
                loss.backward()
                total += loss.detach()
            return total

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
