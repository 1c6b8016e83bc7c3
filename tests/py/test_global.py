"""Models whose experts are divided over processes train as one process does, and are saved as by one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import global_training as ranks
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import tiny_family
from tiny_models import PEFT_WARNINGS, error, load, save_tiny_checkpoint, tiny_model
from torch import Tensor

import kt_moe

pytestmark = [*PEFT_WARNINGS, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
WORLDS = (2, 3, 4)
FILES = ("adapter_config.json", "adapter_model.safetensors")
EXPERTS = 5  # not divisible; the last of four ranks has none


def run(part: str, directory: Path, *worlds: int) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, *sys.path)))}
    command = [sys.executable, "-W", "ignore", str(HERE / "global_training.py"), part, directory]
    done = subprocess.run(
        [*map(str, (*command, *worlds))], env=environment, capture_output=True, text=True, timeout=500
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-6000:]
    return {w: [torch.load(directory / f"{part}-{w}-{rank}.pt") for rank in range(w)] for w in worlds}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("global")
    save_tiny_checkpoint(path / "base", num_experts=EXPERTS, num_experts_per_tok=2)
    skewed = tiny_model("glm4_moe", n_routed_experts=EXPERTS, first_k_dense_replace=0)
    for name, bias in skewed.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))  # the first rank's alone
    skewed.save_pretrained(path / "skewed")
    for name, base, targets in (
        ("both", "base", ["experts", "q_proj"]),
        ("experts", "base", ["experts"]),
        ("on skewed", "skewed", ["experts", "q_proj"]),
    ):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        kt_moe.save_adapter(peft.get_peft_model(load(path / base), config), path / name)
    torch.save(torch.randint(64, (ranks.STEPS, 8, 10)), path / "batches.pt")
    return path


@pytest.fixture(scope="module")
def trained(directory: Path) -> dict[int, list[dict[str, Any]]]:
    return run("results", directory, 1, *WORLDS)


@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name, case in ranks.CASES.items() for world in case.worlds]
)
def test_twenty_steps(trained: Any, directory: Path, name: str, world: int) -> None:
    one, found = trained[1][0][f"{name} of {world}"], [rank[name] for rank in trained[world]]
    assert all(rank[what] == found[0][what] for rank in found for what in ("losses", "norms"))
    assert found[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
    errors = []
    for what in ("gradients", "parameters"):
        for step, wanted in enumerate(one[what]):
            errors.append(0.0)
            for key, tensor in wanted.items():
                each = [rank[what][step][key] for rank in found]
                if ".experts." in key:
                    each = [torch.cat(each)]
                if tensor.any():
                    errors[-1] = max(errors[-1], *(error(one_of, tensor) for one_of in each))
    # Parts of a token's output are added in another order. In some steps that moves one of the numbers that
    # follow from it across a boundary of rounding to bf16.
    assert sorted(errors)[len(errors) // 2] < 1e-5
    assert max(errors) < 1e-2
    assert found[0]["norms"] == pytest.approx(one["norms"], rel=1e-3)
    case = ranks.CASES[name]
    before, after = (load_file(directory / d / FILES[1]) for d in (case.adapter, f"{case.name(world)}-1"))
    assert sum(error(tensor, before[key]) > 1e-2 for key, tensor in after.items()) > len(after) / 4


@pytest.fixture(scope="module")
def saved(directory: Path) -> dict[int, list[dict[str, Any]]]:
    return run("saving", directory, 2, 1, 3)


@pytest.mark.parametrize("world", [2, 3])
def test_files_are_those_of_one_process(saved: Any, directory: Path, world: int) -> None:
    starts = [f"start-{how}" for how in (True, "gaussian", "orthogonal", "olora")]
    for name in ("by-kt_moe", "by-peft", *starts):
        one, found = (directory / f"{name}-{n}" for n in (1, world))
        assert (found / FILES[0]).read_bytes() == (one / FILES[0]).read_bytes()
        same(load_file(found / FILES[1]), load_file(one / FILES[1]))
    same(load_file(directory / f"by-kt_moe-{world}" / FILES[1]), load_file(directory / "both" / FILES[1]))


@pytest.mark.parametrize(("world", "missing"), [(2, "rank 1"), (3, "ranks 1, 2")])
def test_a_rank_that_saves_alone_is_told_who_is_missing(saved: Any, world: int, missing: str) -> None:
    text = saved[world][0]["saving alone"]
    assert text.startswith("RuntimeError: rank 0 saves parameters that are divided over processes")
    assert f"waits for {missing}: all processes have to call save_adapter" in text


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("world", [2, 3])
def test_what_ranks_tell(saved: Any, world: int) -> None:
    for rank in saved[world]:
        assert rank["counts"] == saved[1][0]["counts"]
        assert rank["timeout"] == str(ranks.TIMEOUT)
        assert rank["Adafactor"].startswith("ValueError: the optimizer's exp_avg_sq_row has shape ")
        assert rank["accelerate"].startswith("ValueError: accelerate's save_state and save_model would ")
        assert (
            rank["shared outer"]
            == 'ValueError: SharedOuterLoraConfig does not work with expert_parallel="global"'
        )
        assert "ranks of this job do not have the same experts: format is " in rank["formats"]
    assert saved[1][0]["shared outer"] == saved[1][0]["formats"] == ""


@pytest.mark.parametrize("world", [1, 3])
def test_a_distributed_checkpoint_is_for_any_number_of_processes(
    saved: Any, directory: Path, world: int
) -> None:
    wanted, found = (load_file(directory / f"resumed-{n}" / FILES[1]) for n in (2, world))
    assert saved[world][0]["state"] == {"steps": {5.0}}
    before = load_file(directory / "both" / FILES[1])
    assert distance(found, wanted) < 0.03 * distance(before, wanted)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in b) ** 0.5


# Biases, no gate, groups of experts, layers that share experts, a norm of each expert's output, weights the
# other way, experts that are the identity, one expert a token.
FAMILIES = ["gpt_oss", "nemotron_h", "deepseek_v3", "diffusion_gemma", "muse_spark", "llama4"]
FAMILIES += ["longcat_flash", "zaya"]
VARIANTS = {"qwen3_moe": [*ranks.VARIANTS], "gpt_oss": ["wrap", "fp8", "pissa", "not reentrant"]}
CASES = {name: (name, "") for name in FAMILIES}
CASES |= {f"{base} {one}": (base, one) for base, variants in VARIANTS.items() for one in variants}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    path = tmp_path_factory.mktemp("families")
    for base in {base for base, _ in CASES.values()}:
        tiny_family(base).save_pretrained(path / base)
    torch.save(CASES, path / "families.pt")
    return path, run("families", path, 1, 3)  # the third process has none of the four experts


@pytest.mark.parametrize("name", CASES)
def test_families(families: Any, name: str) -> None:
    path, found = families
    outs, gradients, _ = found[1][0][name]
    each = [of_rank[name] for of_rank in found[3]]
    assert len(outs) == len(got := [out for of_rank, *_ in each for out in of_rank]) == 6
    # Where a difference of the last bit moves a number across a boundary of rounding to bf16, as above.
    assert max(map(error, got, outs)) < 1e-3
    errors = []
    for key, wanted in gradients.items():
        parts = [of_rank[key] for _, of_rank, _ in each]
        grad = torch.cat(parts) if key in each[0][2] else sum(parts)
        assert grad.shape == wanted.shape
        if wanted.any():
            errors.append(error(grad, wanted))
    assert each[0][2]
    assert sorted(errors)[len(errors) // 2] < 2e-3
    assert max(errors) < 1e-2
    one, of_three = (path / f"{name}-{world}" for world in (1, 3))
    assert (of_three / FILES[0]).read_bytes() == (one / FILES[0]).read_bytes()
    same(load_file(of_three / FILES[1]), load_file(one / FILES[1]))


@pytest.fixture(scope="module")
def by_trainers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where trainers of several numbers of processes wrote, and what they found."""
    path = tmp_path_factory.mktemp("trainers")
    return path, run("trainers", path, 2, 1, 4)


def test_trainers(by_trainers: Any) -> None:
    tmp_path, found = by_trainers
    two, one, four = (found[world][0] for world in (2, 1, 4))

    def adapter(name: str) -> dict[str, Tensor]:
        return load_file(tmp_path / name / FILES[1])

    for kind in ("SFT", "DPO"):
        for what, wanted in one[kind].items():
            assert len(wanted) == (2 if what == "eval_loss" else 4)
            assert two[kind][what] == pytest.approx(wanted, rel=1e-2), (kind, what)
        last, name = adapter(f"{kind.lower()}-1/last"), kind.lower()
        moved = distance(adapter(f"{name}-1/checkpoint-2"), last)
        assert distance(adapter(f"{name}-2/last"), last) < 0.2 * moved
        # The first process alone wrote and removed.
        assert {c.name for c in (tmp_path / f"{name}-2").glob("checkpoint-*")} == {
            f"checkpoint-{n}" for n in (2, 3, 4)
        }
    assert four["SFT"]["loss"] == pytest.approx(one["SFT"]["loss"], rel=1e-2)
    for what, wanted in two["SFT"].items():  # from the second step on, by one process and by four
        for rank in (one, four):
            assert rank["resumed"][what] == pytest.approx(wanted, rel=1e-2), what
    states = [torch.load(tmp_path / f"sft-{n}" / "checkpoint-2" / "optimizer.pt") for n in (1, 2)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key, values in states[0]["state"].items():
        for name, value in values.items():
            assert error(states[1]["state"][key][name], value) < 0.05, (key, name)


def test_twenty_steps_of_dpo(tmp_path: Path) -> None:
    two, one = (ranks_of[0] for ranks_of in run("dpo", tmp_path, 2, 1).values())
    wanted = one["off"]
    assert len(wanted["loss"]) == ranks.STEPS
    before, last = (load_file(tmp_path / "dpo-off" / n / FILES[1]) for n in ("checkpoint-15", "last"))
    for how in ("host", "global"):
        for what, values in wanted.items():
            assert two[how][what] == pytest.approx(values, rel=2e-2), (how, what)
        ours = load_file(tmp_path / f"dpo-{how}" / "last" / FILES[1])
        assert distance(ours, last) < 0.2 * distance(before, last)


def test_fsdp2_by_trainer(by_trainers: Any, tmp_path: Path) -> None:
    directory, found = by_trainers
    wrapped = run("fsdp2", tmp_path, 2)[2][0]
    for how in ("host", "global"):
        trained_as_by_one(wrapped[how], tmp_path / f"fsdp2-{how}", found[1][0]["SFT"], directory / "sft-1")
        for what, values in wrapped[f"{how}, resumed"].items():  # from the second step on
            assert values == pytest.approx(wrapped[how][what], rel=1e-6), (how, what)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed")
def test_deepspeed_by_trainer(by_trainers: Any, tmp_path: Path) -> None:
    directory, found = by_trainers
    wrapped = run("deepspeed", tmp_path, 2)[2]
    for stage in "123":
        out = tmp_path / f"deepspeed-{stage}"
        trained_as_by_one(wrapped[0][stage], out, found[1][0]["SFT"], directory / "sft-1")
        for rank in wrapped:
            assert rank[f"{stage}, global"].startswith(
                "ValueError: DeepSpeed does not work with LoRA on experts and KtMoeConfig("
            )


def trained_as_by_one(found: dict[str, Any], out: Path, one: dict[str, Any], directory: Path) -> None:
    for what, wanted in one.items():
        assert found[what] == pytest.approx(wanted, rel=1e-2), what
    before, last, ours = (
        load_file(path / FILES[1]) for path in (directory / "checkpoint-2", directory / "last", out / "last")
    )
    assert distance(ours, last) < 0.2 * distance(before, last)
