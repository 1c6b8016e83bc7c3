"""The `kt-moe` command on real small files: what it writes, resuming, stopping, refusing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from user_errors import one_line_error

import kt_moe
from kt_moe import RoutingHistory
from kt_moe.cli import main, trainer
from kt_moe.cli.output import RunDirectory

STEPS = 6
SMALL = ["--rank", "4", "--seq-len", "32", "--lr", "1e-2", "--batch-size", "2", "--eval-fraction", "0.2"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'stranger' %}{{ raise_exception('no strangers') }}{% endif %}"
    "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with a tokenizer whose tokens are bytes."""
    path = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    save_tiny_checkpoint(path, vocab_size=len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents."""
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    texts = [f"{n} squared is {n * n}, and {n} cubed is {n**3}." for n in range(90, 102)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def cli(model: Path, data: Path) -> Iterator[Any]:
    """Call `kt-moe finetune` on these with further arguments."""

    def call(output: Path, *more: str) -> int:
        files = ["--model", str(model), "--data", str(data), "--output", str(output)]
        return main(["finetune", *files, *SMALL, *more])

    return call


def metrics(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return found


def adapter(output: Path) -> dict[str, Any]:
    with safe_open(output / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with dropout in a process of its own: its output, and beside it what it printed."""
    output = tmp_path_factory.mktemp("run") / "out"
    files = ["--model", str(model), "--data", str(data), "--output", str(output)]
    more = ["--max-steps", str(STEPS), "--lora_dropout", "0.2", "--sample", "92 squared"]
    command = [sys.executable, "-m", "kt_moe.cli", "finetune", *files, *SMALL, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (output.parent / "stdout").write_text(done.stdout)
    (output.parent / "stderr").write_text(done.stderr)
    return output


def test_run_leaves_adapter_curve_and_numbers(finished: Path) -> None:
    keys = set(adapter(finished))
    assert "base_model.model.model.layers.1.mlp.experts.7.down_proj.lora_B.weight" in keys
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    with Image.open(finished / "loss.png") as image:
        image.verify()
        assert image.format == "PNG"
    found = metrics(finished)
    assert [step for step, _ in found["train"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in found["held_out"]] == list(range(STEPS + 1))
    assert found["held_out"][-1][1] < found["held_out"][0][1]
    assert found["tokens_per_second"] > 0
    assert found["peak_memory_bytes"]["host"] > 10**8
    assert not list(finished.glob(".*"))  # neither scratch nor lock left
    for file in finished.glob("adapter*"):
        assert file.stat().st_mode & 0o777 == 0o644  # servers run as other users


def test_run_leaves_its_routing(finished: Path) -> None:
    history = RoutingHistory.load(finished / "routing.safetensors")
    assert history.steps == list(range(1, STEPS + 1))
    total = history.total()
    assert list(total) == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    first, second = total.values()
    assert int(first.sum()) == int(second.sum()) > 0  # a token has as many routes in every layer
    # Two rows of up to 32 tokens a step, two experts a token: no evaluation is in it.
    assert int(history.counts["model.layers.0.mlp.experts"].sum(1).max()) <= 2 * 32 * 2
    with Image.open(finished / "routing.png") as image:
        image.verify()
        assert image.format == "PNG"
    balance = metrics(finished)["routing"]["model.layers.1.mlp.experts"]
    assert balance["imbalance"] == pytest.approx(int(second.max()) / second.double().mean().item())
    assert f"routing        {finished / 'routing.png'}" in (finished.parent / "stdout").read_text()


def test_run_says_what_matters(finished: Path) -> None:
    stdout, stderr = ((finished.parent / name).read_text() for name in ("stdout", "stderr"))
    losses = [loss for _, loss in metrics(finished)["held_out"]]
    assert f"held-out loss  {losses[0]:.4f} at first, {losses[-1]:.4f} at last" in stdout
    assert str(finished / "adapter_model.safetensors") in stdout
    assert str(finished / "loss.png") in stdout
    assert "--- '92 squared' before training" in stdout
    logs = [line for line in stdout.splitlines() if line.startswith("{'loss'")]
    assert len(logs) == STEPS
    assert all("'tokens_per_second'" in line and "'peak_host_gib'" in line for line in logs)
    assert stderr == ""


def test_interrupted_run_resumes_with_the_same_losses(
    request: pytest.FixtureRequest,
    finished: Path,
    cli: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, log = tmp_path / "out", trainer.Clock.on_log
    # A shell that puts its jobs into the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt(
        self: Any, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        log(self, args, state, control, logs, **kwargs)
        if state.global_step == 2 and "loss" in logs:  # the handler acts at the end of step 3
            signal.raise_signal(signal.SIGINT)

    arguments = ["--max-steps", str(STEPS), "--lora_dropout", "0.2", "--save_steps", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Clock, "on_log", interrupt)
        assert cli(output, *arguments) == 130
    said = capsys.readouterr().out
    assert f"the last checkpoint is {output / 'checkpoint-3'}" in said
    assert not (output / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert cli(output, *arguments) == 2  # neither started anew nor resumed unasked
    assert "has a run already: pass --resume" in capsys.readouterr().err
    assert cli(output, *arguments, "--resume") == 0
    assert metrics(output)["train"] == metrics(finished)["train"]
    assert metrics(output)["held_out"] == metrics(finished)["held_out"]
    ours, theirs = adapter(output), adapter(finished)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    routes = [RoutingHistory.load(run / "routing.safetensors").counts for run in (output, finished)]
    assert all(torch.equal(routes[0][name], counts) for name, counts in routes[1].items())


def test_finished_run_is_not_touched_unasked(
    finished: Path, cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    arguments = ["--max-steps", str(STEPS), "--lora_dropout", "0.2"]
    assert cli(output, *arguments) == 2
    assert "has a run already" in capsys.readouterr().err
    assert cli(output, *arguments, "--lr", "1e-3", "--resume") == 2
    assert "learning_rate was 0.01 when the run began, now it is 0.001" in capsys.readouterr().err
    assert cli(output, *arguments, "--resume") == 0
    assert "the run is complete" in capsys.readouterr().out
    (output / "adapter_model.safetensors").unlink()  # as if stopped right after the last step
    assert cli(output, *arguments, "--resume") == 0
    assert metrics(output)["train"] == metrics(finished)["train"]
    ours, theirs = adapter(output), adapter(finished)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert cli(output, "--max-steps", "1", "--eval_strategy", "no", "--overwrite") == 0
    assert len(metrics(output)["train"]) == 1
    assert metrics(output)["held_out"] == []
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]


def test_conversations_and_experts_alone(model: Path, tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}] for n in range(6)
    ]
    data, output = tmp_path / "d.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    files = ["--model", str(model), "--data", str(data), "--output", str(output)]
    more = [
        "--assistant-only-loss",
        "--targets",
        "experts",
        "--max-steps",
        "2",
        "--gradient_accumulation_steps",
        "2",
    ]
    checkpointing = ["--gradient-checkpointing", "--checkpoint-experts", "retain", "--lora-device", "cpu"]
    assert main(["finetune", *files, *SMALL, *more, *checkpointing]) == 0
    assert all(".experts." in name for name in adapter(output))
    assert len(metrics(output)["train"]) == 2


@pytest.mark.filterwarnings("ignore:KtMoeConfig has gpu_memory='6GiB'.* is for a GPU:UserWarning")
def test_options_of_the_experts_arrive(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Config(kt_moe.KtMoeConfig):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            made.append(options)
            super().__init__(**options)

    monkeypatch.setattr("kt_moe.cli.experts_config.KtMoeConfig", Config)
    more = ["--gpu-memory", "6GiB", "--cpu-share", "0.5", "--lora-device", "cpu", "--max-steps", "1"]
    assert cli(tmp_path / "out", *more, "--experts_gpu_rates", "link=1e9", "--format", "int4") == 2
    rates = ",".join(f"{rate.name}={1e9 + n}" for n, rate in enumerate(fields(kt_moe.Rates)))
    assert cli(tmp_path / "out", *more, "--experts_gpu_rates", rates, "--format", "int4") == 0
    options = made[1]
    assert (options["gpu"], options["gpu_memory"], options["cpu_share"]) == ("auto", "6GiB", 0.5)
    assert (options["lora_device"], options["checkpoint_experts"]) == ("cpu", "recompute")
    assert (options["format"], options["gpu_rates"]["gpu_flops"]) == ("int4", 1e9 + 1)


def test_conversation_the_template_refuses(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "stranger", "content": "?"}]}) + "\n")
    files = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(["finetune", *files, *SMALL, "--eval_strategy", "no"]) == 2
    assert "the chat template refuses a conversation: no strangers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "has rank 0, wanted an integer of at least 1"),
        (["--lr", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--eval-fraction", "1"], "--eval_fraction is 1.0, wanted more than 0 and less than 1"),
        (["--targets", "q_proj,nothing"], "targets ['nothing'], which match nothing in this model; it has"),
        (["--targets", "qproj"], "'q_proj', 'v_proj'], and the words attention and experts"),
        (["--dataset_train_split", "x"], "d.jsonl has no split 'x', but train"),
        (["--nothing", "1"], "'--nothing', '1'] (see kt-moe finetune --help)"),
        (["--gpu-memory", "6 apples"], "gpu_memory is '6 apples', wanted a positive number of bytes"),
        (["--gpu", "off", "--gpu-memory", "1GiB"], 'gpu="off" and gpu_memory'),
        (["--lora-device", "gpu"], "lora_device is 'gpu', wanted one of"),
        (["--resume"], "no complete checkpoint"),
        (["--assistant-only-loss"], "only supported for conversational datasets"),
        (["--seq-len", "100000"], "--max_length is 100000, the model's longest sequence is "),
        (["--model", "/nowhere"], "there is no /nowhere"),
        (["--model", "nobody/nothing"], "nobody/nothing, which is no directory here: no config of a model: "),
        (["--data", "/nowhere.txt"], "--dataset_name /nowhere.txt cannot be read: FileNotFoundError: "),
        (["--output", __file__], f"File exists: {__file__!r}"),
        (["--config", "/nowhere.yaml"], "No such file or directory: '/nowhere.yaml'"),
        (["--eval-fraction", "0", "--dataset_test_split", "x"], "has no split 'x' to evaluate with: pass"),
    ],
)
def test_user_errors_are_one_line(
    cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in one_line_error(capsys, "finetune", lambda: cli(tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_damaged_model_is_an_error(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(model, tmp_path / "model")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    files = ["--model", str(damaged), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(["finetune", *files]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(Path("/proc/nothing/out")) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("kt-moe finetune: error: ")
    assert "/proc" in stderr


def test_incomplete_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = json.dumps({"global_step": step})
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(
            state[: -3 if step == 11 else None]
        )
    (tmp_path / "checkpoint-12").mkdir()
    last = RunDirectory(tmp_path).last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-10"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"kt-moe {kt_moe.__version__}\n"


def test_a_note_that_the_experts_are_quantised(model: Path, tmp_path: Path, cli: Any) -> None:
    noted = tmp_path / "noted"
    shutil.copytree(model, noted)
    config = json.loads((noted / "config.json").read_text())
    (noted / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    assert cli(tmp_path / "out", "--model", str(noted), "--max-steps", "1") == 0


def test_quantised_layers_of_which_the_config_says_nothing(
    model: Path, tmp_path: Path, cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = tmp_path / "noted"
    shutil.copytree(model, noted)
    file = noted / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    assert cli(tmp_path / "out", "--model", str(noted), "--max-steps", "1") == 2
    assert f"{name} is F8_E4M3 in the checkpoint" in capsys.readouterr().err
