"""The examples for large models, each with --tiny: on a generated model of the same architecture."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import kt_moe

EXAMPLES = Path(__file__).parents[2] / "examples"
FORMATS = {  # of the experts in memory
    "qwen3_30b_one_gpu": "bf16",
    "qwen3_235b": "int4",
    "deepseek_v31_fp8": "fp8",
    "gpt_oss_120b": "mxfp4",
    "kimi_k2_int4": "int4",
    "cpu_only": "int4",
    "dpo": "bf16",
}


@pytest.mark.filterwarnings("ignore")  # those of TRL and PEFT, as a user sees them
@pytest.mark.parametrize("name", FORMATS)
def test_tiny(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--output", str(tmp_path)])
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    logs = names["trainer"].state.log_history
    assert sum("loss" in log for log in logs) == 3
    experts = kt_moe.model_experts(names["model"]).values()
    assert {e.format for e in experts} == {FORMATS[name]}
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 1000


@pytest.mark.parametrize("name", FORMATS)
def test_docstring_has_command_memory_and_what_to_expect(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 60
    text = ast.get_docstring(ast.parse(source)) or ""
    for part in (f"python examples/{name}.py --data", "--tiny", "\nMemory: ", "\nWhat to expect: "):
        assert part in text


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [[], ["--global"]], ids=["host", "global"])
def test_several_processes(how: list[str], tmp_path: Path) -> None:
    example = str(EXAMPLES / "several_processes.py")
    # Gloo's group may end in a destructor that waits, with the GIL, for a thread that wants the GIL.
    (tmp_path / "run.py").write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"names = runpy.run_path({example!r}, run_name='__main__')\n"
        "os._exit(0)\n"
    )
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    program = [tmp_path / "run.py", "--tiny", "--output", tmp_path, *how]
    run = subprocess.run(
        [*start, "--nproc-per-node=2", *map(str, program)], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr[-4000:]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    tokens = [log["num_tokens"] for log in state["log_history"] if "num_tokens" in log]
    assert tokens == [28, 56, 88]  # of both processes
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "hosts", "kind"),
    [("one_host", 1, "MULTI_GPU"), ("two_hosts", 2, "MULTI_GPU"), ("fsdp2", 1, "FSDP")],
)
def test_accelerate_reads_the_configurations(name: str, hosts: int, kind: str) -> None:
    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (hosts, 4 * hosts)
    assert config.distributed_type.value == kind
    assert f"examples/accelerate/{name}.yaml" in (EXAMPLES / "several_processes.py").read_text()
