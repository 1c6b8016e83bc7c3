"""Training by several processes, started as users do: the losses and the adapter of one process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ALL_EXPERTS, PEFT_WARNINGS, error, load, save_tiny_checkpoint
from torch import Tensor

import kt_moe

pytestmark = [*PEFT_WARNINGS, pytest.mark.timeout(600)]
PROGRAM = Path(__file__).with_name("distributed_training.py")
STEPS = 20
FILE = "adapter_model.safetensors"
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter on attention and experts, batches, and what one process makes of them."""
    path = tmp_path_factory.mktemp("distributed")
    base = save_tiny_checkpoint(path / "base", **ALL_EXPERTS)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["experts", "q_proj"], init_lora_weights=False)
    kt_moe.save_adapter(peft.get_peft_model(load(base), config), path / "adapter")
    torch.save(torch.randint(64, (STEPS, 12, 10)), path / "batches.pt")
    train(path, "none", 1, "cpu")
    return path


def torchrun(processes: int, *command: object) -> None:
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*start, f"--nproc-per-node={processes}", *map(str, command)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]


def train(directory: Path, wrapper: str, processes: int, device: str) -> dict[str, Any]:
    torchrun(processes, PROGRAM, directory, wrapper, STEPS, device)
    found: dict[str, Any] = torch.load(directory / f"{wrapper}-{processes}-{device}.pt")
    return found


def adapter(directory: Path, wrapper: str, processes: int, device: str) -> dict[str, Tensor]:
    return load_file(directory / f"trained-{wrapper}-{processes}-{device}" / FILE)


@pytest.mark.parametrize(
    ("wrapper", "processes", "device"),
    [
        ("none", 2, "cpu"),
        ("ddp", 3, "cpu"),
        ("ddp", 4, "cpu"),
        ("fsdp", 2, "cpu"),
        ("zero", 2, "cpu"),
        *(pytest.param(f"deepspeed-{stage}", 2, "cpu", marks=DEEPSPEED) for stage in (1, 2, 3)),
        pytest.param("ddp", 2, "cuda", marks=TWO_GPUS),
        pytest.param("fsdp", 2, "cuda", marks=TWO_GPUS),
    ],
)
def test_training_is_that_of_one_process(directory: Path, wrapper: str, processes: int, device: str) -> None:
    # dOut is bf16: a third of it is rounded otherwise, and so are a GPU's products and what ZeRO-3 gathers.
    least = 1e-2 if processes == 3 or device == "cuda" or wrapper == "deepspeed-3" else 1e-6
    one: dict[str, Any] = torch.load(directory / "none-1-cpu.pt")
    found = train(directory, wrapper, processes, device)
    assert found["losses"][0] == pytest.approx(one["losses"][0], rel=1e-3 if device == "cuda" else 1e-6)
    assert found["gradients"].keys() == one["gradients"].keys()
    for name, wanted in one["gradients"].items():
        assert error(found["gradients"][name], wanted) < least, name
    # Then sums of gradients in another order move the roundings of LoRA and X to bf16, one here and there.
    for name in ("losses", "norms"):
        assert found[name] == pytest.approx(one[name], rel=5e-3), name
    before, after = load_file(directory / "adapter" / FILE), adapter(directory, "none", 1, "cpu")
    trained = adapter(directory, wrapper, processes, device)
    assert trained.keys() == after.keys() == before.keys()
    off, moved = (distance(tensors, after) for tensors in (trained, before))
    assert off < (0.1 if device == "cuda" else 0.03) * moved


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in b) ** 0.5


def test_the_command_line_by_torchrun(tmp_path: Path) -> None:
    model = PROGRAM.parents[2] / "examples" / "tiny-qwen3-moe"
    lines = (json.dumps({"text": f"{i} comes before {i + 1}. " * 16}) for i in range(20))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    torchrun(
        2, "-m", "kt_moe.cli", "sft", "--model_name_or_path", model,
        "--dataset_name", tmp_path / "texts.jsonl", "--output_dir", out, "--max_length", 64,
        "--per_device_train_batch_size", 1, "--max_steps", 3, "--logging_steps", 1, "--use_cpu",
    )  # fmt: skip
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    tokens = [log["num_tokens"] for log in state["log_history"] if "num_tokens" in log]
    assert tokens == [128, 256, 384]  # of both processes
    trained = load_file(out / FILE)
    assert any(
        bool(tensor.any()) for name, tensor in trained.items() if "experts" in name and "lora_B" in name
    )
