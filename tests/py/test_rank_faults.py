"""Processes of a job that do not fit together, and one that is killed: the others end, and it is said why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import PEFT_WARNINGS, load, save_tiny_checkpoint, tokens, with_lora

import kt_moe
from kt_moe import job

pytestmark = [*PEFT_WARNINGS, pytest.mark.timeout(300)]
PROGRAM = Path(__file__).with_name("rank_faults.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    save_tiny_checkpoint(path / "base")
    return path


def failing(directory: Path, what: str) -> str:
    """What a job of two processes says that fails."""
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*start, "--nproc-per-node=2", PROGRAM, directory, what], capture_output=True, text=True, timeout=200
    )
    assert run.returncode != 0
    return run.stderr


@pytest.mark.parametrize(
    ("what", "values"), [("format", {"as-stored", "int8"}), ("LoRA", {"8", "16"})], ids=["format", "LoRA"]
)
def test_other_settings_of_a_rank_are_named(directory: Path, what: str, values: set[str]) -> None:
    name = "lora_alpha" if what == "LoRA" else "format"
    found = re.search(
        rf"ValueError: the ranks of this job do not have the same (\w+): {name} is (\S+) on rank ([01]) and "
        r"(\S+) on rank ([01])$",
        failing(directory, what),
        re.MULTILINE,
    )
    assert found
    assert found[1] == ("LoRA" if what == "LoRA" else "experts")
    assert {found[2], found[4]} == values
    assert {found[3], found[5]} == {"0", "1"}


def test_a_rank_that_is_killed_while_it_saves_leaves_the_adapter_before(directory: Path) -> None:
    assert "Signal 9 (SIGKILL)" in failing(directory, "saving")
    model = peft.PeftModel.from_pretrained(load(directory / "base"), directory / "adapter")
    assert model(tokens()).logits.isfinite().all()


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process as one of a job, whose ranks it plays in turn."""
    store = dist.HashStore()
    monkeypatch.setattr(job, "_store", lambda: store)

    def become(rank: int) -> None:
        monkeypatch.setattr(job, "_compared", job.Counter())
        monkeypatch.setattr(job, "_rank", lambda: rank)

    return become


def test_settings_are_compared_in_the_order_of_calls(alone: Any) -> None:
    alone(1)
    job.check_alike("experts", {"format": "int8", "names": {"a", "b"}})
    job.check_alike("experts", {"format": "int4", "names": set()})
    alone(0)
    job.check_alike("experts", {"format": "int8", "names": {"b", "a"}})
    job.check_alike("LoRA", {"r": 4})
    job.check_told()
    with pytest.raises(ValueError, match="experts: format is int4 on rank 1 and int8 on rank 0; names is "):
        job.check_alike("experts", {"format": "int8", "names": {"c"}})
    with pytest.raises(ValueError, match="format is int4 on rank 1 and int8 on rank 0"):
        job.check_told()
    with pytest.raises(ValueError, match="format is int4 on rank 1 and int8 on rank 0"):
        job.check_alike("LoRA", {"r": 8})


def test_versions_and_files_are_compared(
    alone: Any, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(0)
    load(directory / "base")
    alone(1)
    load(directory / "base")
    other = save_tiny_checkpoint(tmp_path / "other", num_hidden_layers=1)
    alone(1)
    with pytest.raises(ValueError, match=r"files is 1 files of .* on rank 0 and 1 files of .* on rank 1"):
        load(other)
    load(other, quantization_config=kt_moe.KtMoeConfig(expert_parallel="off"))
    monkeypatch.setattr(torch, "__version__", "0.0")
    monkeypatch.setattr(job, "_DIFFER", "of the next test")
    alone(1)
    with pytest.raises(ValueError, match=r"version of torch is \S+ on rank 0 and 0.0 on rank 1"):
        load(directory / "base")


def test_data_parallel_is_refused_by_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Trainer wraps a model in a process that sees two GPUs."""
    arguments = transformers.TrainingArguments("unused", use_cpu=True, report_to="none")
    arguments._n_gpu = 2
    model = with_lora(directory / "base")
    wrapped = transformers.Trainer(model, arguments)._wrap_model(model)
    assert isinstance(wrapped, torch.nn.DataParallel)
    module = sys.modules["torch.nn.parallel.replicate"]  # whose devices are not there
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [tensors] * 2)
    with pytest.raises(
        RuntimeError, match=r"DataParallel does not work with kt_moe .*CUDA_VISIBLE_DEVICES=0"
    ):
        wrapped.replicate(wrapped.module, [0, 1])


def test_who_waits_is_told_what_ended_another_process() -> None:
    store = dist.HashStore()
    assert not job._is_set(store, "key", 0.02)
    store.set("failed", "rank 1 failed: ValueError: a row is empty")
    with pytest.raises(RuntimeError, match="rank 1 failed: ValueError: a row is empty"):
        job._is_set(store, "key", 60)
    store.set("key", "")
    assert job._is_set(store, "key", 60)
