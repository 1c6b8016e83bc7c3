"""`kt-moe sft` and its siblings on real small files: TRL's options, kinds of data, what we add."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import PEFT_WARNINGS
from user_errors import one_line_error

from kt_moe.cli import main
from kt_moe.cli.data import losses_by_length
from kt_moe.cli.experts_config import ExpertsConfig
from kt_moe.cli.job import Job
from kt_moe.cli.output import RunDirectory
from kt_moe.cli.terminal import UserError
from kt_moe.cli.train import _SHORT, parse
from kt_moe.cli.trainer import first_bad
from kt_moe.hf import KtMoeConfig

pytestmark = PEFT_WARNINGS[:1]

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3-moe"
SHORT = [
    *("--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--max_length", "64"),
    *("--learning_rate", "1e-3", "--lora_r", "4", "--gradient_checkpointing", "false"),
]


def arguments(data: Path | str, output: Path, *more: str) -> list[str]:
    files = ["--model_name_or_path", str(MODEL), "--dataset_name", str(data), "--output_dir", str(output)]
    return [*files, *SHORT, *more]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path, number: int = 8) -> Path:
    return write_rows(path, [{"text": f"def f{n}(x): return x + {n}"} for n in range(number)])


def adapter(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(output / "adapter_model.safetensors")
    return found


SAID = {"role": "user", "content": "What is two and two?"}
ANSWER = [{"role": "assistant", "content": "Four."}]
KINDS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": [SAID], "completion": ANSWER} for _ in range(4)],
    "dpo": [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": f" {n}"} for n in range(5, 9)],
    "kto": [{"prompt": "2 + 2 =", "completion": f" {n}", "label": n == 4} for n in range(4, 8)],
    "reward": [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": f" {n}"} for n in range(5, 9)],
    "grpo": [{"prompt": f"{n} + 2 ="} for n in range(4)],
    "rloo": [{"prompt": f"{n} + 2 ="} for n in range(4)],
}
GENERATED = [
    "--reward_funcs",
    "test_train.length_reward",
    "--max_completion_length",
    "4",
    "--num_generations",
    "2",
]
MORE = {"reward": ["--lora_task_type", "SEQ_CLS"], "grpo": GENERATED, "rloo": GENERATED}


def length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward function by its dotted name, as TRL's --reward_funcs takes it."""
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("command", KINDS)
def test_every_command_trains_the_experts(command: str, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "d.jsonl", KINDS[command]), tmp_path / "out"
    given = arguments(data, out, *MORE.get(command, []))
    if command in ("grpo", "rloo"):
        at = given.index("--max_length")
        del given[at : at + 2]
    assert main([command, *given]) == 0
    moved = [
        name for name, value in adapter(out).items() if "experts" in name and "lora_B" in name and value.any()
    ]
    assert moved


def test_tools_and_empty_contents_arrive_in_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{{ m.content or '' }}{{ m.reasoning_content or '' }}{% for c in m.tool_calls or [] %}"
        "({{ c.function.name }}:{{ c.function.arguments | tojson }}){% endfor %}{% endfor %}"
    )
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "say", "arguments": {"what": "yes"}}}
    rows = [
        {
            "messages": [SAID, {"role": "assistant", "content": None, "tool_calls": [c]}],
            "tools": [{"name": "add"}],
        }
        for c in (call, other)
    ]
    rows.append(
        {"messages": [SAID, {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}], "tools": []}
    )
    data, out = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "out"
    seen: list[str] = []

    def look(job: Any, trainer: Any) -> None:
        seen.extend(trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kt_moe.cli.job.Job.report", look)
        assert main(["sft", *arguments(data, out, "--chat_template_path", str(template))]) == 0
    assert seen == [
        '[add]<user>What is two and two?<assistant>(add:{"a": 1})',  # and no "what" of the other row
        '[add]<user>What is two and two?<assistant>(say:{"what": "yes"})',
        "<user>What is two and two?<assistant>42 + 2",
    ]


def test_a_yaml_file_has_the_options_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 0.5\nexperts_format: int8\nlora_r: 3\nlora_target_modules: [experts]\n")
    found = parse("sft", ["--config", str(file), "--lora_r", "5", "--output_dir", "o"])
    assert (found.training.learning_rate, found.model.lora_r) == (0.5, 5)
    assert found.experts.to_config().format == "int8"
    assert found.model.lora_target_modules == "experts"
    assert (found.model.use_peft, found.training.bf16) == (True, False)
    file.write_text("experts_formt: int8\n")
    with pytest.raises(UserError, match=r"arguments from config file: \['--experts_formt', 'int8'\]"):
        parse("sft", ["--config", str(file), "--output_dir", "o"])


def test_experts_config_has_the_options_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    ours = set(KtMoeConfig().to_dict()) - {"quant_method", "rest"}
    assert {f"experts_{name}" for name in ours} == set(vars(ExpertsConfig()))
    assert ExpertsConfig().to_config().to_dict() == KtMoeConfig().to_dict()
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--experts_gpu_memory" in text
    assert "GPU memory for expert weights: bytes" in text
    assert "(default: ['attention', 'experts'])" in text


def test_rates_are_those_that_kt_moe_takes() -> None:
    def rates(given: Any) -> Any:
        return ExpertsConfig(experts_gpu_rates=given).rates()

    assert rates(None) is None
    assert rates("link=55e9, rest_seconds=5e-3") == {"link": 55e9, "rest_seconds": 5e-3}
    assert rates({"rest_seconds": 0, "gpu_flops": "4e14"}) == {"rest_seconds": 0.0, "gpu_flops": 4e14}
    for wrong in ("link=0", "link=1.2.3", "link=-1", "link=nan", "link", "speed=1", {"link": "fast"}):
        with pytest.raises(ValueError, match=r"--experts_gpu_rates .*; wanted link=55e9"):
            rates(wrong)


def test_killed_run_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    data = texts(tmp_path / "d.jsonl")
    more = ["--max_steps", "4", "--save_steps", "2", "--lora_dropout", "0.1"]
    kill = (
        "import os, signal, sys\n"
        "from kt_moe.cli import main, trainer\n"
        "def die(self, args, state, control, **_):\n"
        "    if state.global_step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "trainer.StopOnSignal.on_step_end = die\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    killed = [sys.executable, "-c", kill, "sft", *arguments(data, tmp_path / "killed", *more)]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    again = [sys.executable, "-m", "kt_moe.cli", "sft"]
    for output, rest in (("killed", ["--resume_from_checkpoint", "last"]), ("whole", [])):
        done = subprocess.run(
            [*again, *arguments(data, tmp_path / output, *more, *rest)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    ours, theirs = (
        (tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("killed", "whole")
    )
    assert ours == theirs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_a_checkpoint(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = texts(tmp_path / "d.jsonl"), tmp_path / "out"
    monkeypatch.setattr(
        "kt_moe.cli.trainer.Clock.on_step_begin", lambda *_, **__: os.kill(os.getpid(), number)
    )
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert main(["sft", *arguments(data, out, "--max_steps", "9")]) == 128 + number
    finally:
        signal.signal(number, before)
    assert RunDirectory(out).last_checkpoint() == out / "checkpoint-1"
    said = capsys.readouterr().out
    assert f"stopped; the last checkpoint is {out / 'checkpoint-1'}" in said
    assert not (out / "adapter_model.safetensors").exists()


def test_a_run_that_stops_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kt_moe.cli.trainer.Clock.on_step_begin", Mock(side_effect=KeyboardInterrupt))
    command = ["sft", *arguments(texts(tmp_path / "d.jsonl"), tmp_path / "out", "--max_steps", "1")]
    assert main(command) == 128 + signal.SIGINT
    said = "stopped before the first checkpoint; the same command with --overwrite starts anew"
    assert capsys.readouterr().out.endswith(f"{said}\n")
    monkeypatch.undo()
    assert main([*command, "--overwrite"]) == 0


def test_an_ignored_signal_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = texts(tmp_path / "d.jsonl"), tmp_path / "out"
    monkeypatch.setattr(
        "kt_moe.cli.trainer.Clock.on_step_begin", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP)
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert main(["sft", *arguments(data, out)]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = texts(tmp_path / "d.jsonl"), tmp_path / "out"

    def spoil(self: Any, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 1:
            model.get_base_model().model.layers[2].post_attention_layernorm.weight.data.fill_(float("nan"))

    monkeypatch.setattr("kt_moe.cli.trainer.Clock.on_step_begin", spoil)
    error = one_line_error(capsys, "sft", lambda: main(["sft", *arguments(data, out)]))
    assert "step 2: the loss is nan, the first layer with such numbers is base_model.model.model." in error
    assert "layers.2.post_attention" in error
    assert not (out / "adapter_model.safetensors").exists()


def test_first_bad_names_parameters_before_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].bias.data[0] = float("inf")
    assert "1 trained tensors are not finite, the first is 1.bias" in first_bad(model, {})


def test_two_runs_do_not_share_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = texts(tmp_path / "d.jsonl"), tmp_path / "out"
    with RunDirectory(out).locked():
        error = one_line_error(capsys, "sft", lambda: main(["sft", *arguments(data, out)]))
    assert f"another run is writing to --output_dir {out}" in error
    assert not out.exists()


def test_an_adapter_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = texts(tmp_path / "d.jsonl"), tmp_path / "out"
    assert main(["sft", *arguments(data, out)]) == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    assert not list(out.glob(".*"))

    def fail(self: Any, *args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    more = ["--overwrite", "--save_strategy", "no", "--learning_rate", "1"]
    assert main(["sft", *arguments(data, out, *more)]) == 2
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert not list(out.glob(".*"))


def test_a_full_disk_and_no_tokenizer_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = texts(tmp_path / "d.jsonl"), tmp_path / "out"

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError(
            "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file"
        )

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fail)
        error = one_line_error(capsys, "sft", lambda: main(["sft", *arguments(data, out)]))
    assert f"the disk of --output_dir {out} is full" in error
    bare = tmp_path / "model"
    bare.mkdir()
    for file in MODEL.iterdir():
        if "token" not in file.name:
            (bare / file.name).symlink_to(file)
    given = arguments(data, tmp_path / "other", "--model_name_or_path", str(bare))
    error = one_line_error(capsys, "sft", lambda: main(["sft", *given]))
    assert f"{bare} has no tokenizer" in error
    assert not (tmp_path / "other").exists()


def test_documents_that_the_length_cuts_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "word " * 70, "completion": "end"}, {"prompt": "a", "completion": "b " * 90}]
    rows += [{"prompt": "short", "completion": f"{n}"} for n in range(4)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    assert main(["sft", *arguments(data, tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "train     6 documents, 2 of them longer than 64 tokens: they lose" in said
    assert "tokens, and 1 of them all that is to be learnt" in said
    assert "train     5 rows" in said


def test_losses_by_length_counts_tokens() -> None:
    from datasets import Dataset

    learned = {"input_ids": [[1, 2, 3, 4, 5], [1, 2]], "labels": [[-100, -100, -100, 4, 5], [1, 2]]}
    rows = Dataset.from_dict(learned)
    said = losses_by_length(rows, 3, "keep_start")
    assert "1 of them longer than 3 tokens: they lose 2 tokens, and 1 of them all" in said
    assert "and 0 of them all" in losses_by_length(rows, 3, "keep_end")
    assert losses_by_length(rows, 5, "keep_start") == ""


def test_packing_keeps_what_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"text": "word " * 100}, {"text": "short"}])
    more = ["--packing", "--packing_strategy", "wrapped", "--per_device_train_batch_size", "1"]
    assert main(["sft", *arguments(data, tmp_path / "out", *more)]) == 0
    assert "longer than" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "row", "message"),
    [
        (
            "sft",
            {"prompt": "a"},
            "columns prompt; sft wants text or messages or conversations or prompt+",
        ),
        ("dpo", {"text": "a", "chosen": "b"}, "columns chosen, text; dpo wants chosen+rejected"),
        (
            "kto",
            {"prompt": "a", "completion": "b"},
            "columns completion, prompt; kto wants prompt+comp",
        ),
        ("grpo", {"text": "a"}, "has the columns text; grpo wants prompt"),
    ],
)
def test_columns_that_a_command_cannot_use(
    command: str, row: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(write_rows(tmp_path / "d.jsonl", [row] * 4), tmp_path / "out", *MORE.get(command, []))
    if command == "grpo":
        del given[(at := given.index("--max_length")) : at + 2]
    error = one_line_error(capsys, command, lambda: main([command, *given]))
    assert f"{tmp_path / 'd.jsonl'} has the columns" in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_key_error_is_not_blamed_on_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Mock(side_effect=KeyError("text")))
    with pytest.raises(KeyError, match="text"):
        main(["sft", *arguments(texts(tmp_path / "d.jsonl"), tmp_path / "out")])


def test_a_test_split_of_the_data_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    texts(folder / "train.jsonl", 8)
    write_rows(folder / "test.jsonl", [{"text": "held out"}, {"text": "by the user"}, {"text": "alone"}])
    given = arguments(folder, tmp_path / "out", "--max_steps", "1")
    assert main(["finetune", *given]) == 0  # its default holds out a part of the data
    said = capsys.readouterr().out
    assert "train     8 rows" in said
    assert "held out  3 rows" in said
    more = ["--eval-fraction", "0.5", "--dataset_test_split", "more", "--max_steps", "1"]
    assert main(["finetune", *arguments(folder, tmp_path / "other", *more)]) == 0
    assert "held out  4 rows" in capsys.readouterr().out


def test_a_stream_is_cut_into_rows(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"text": "word " * 200} for _ in range(4)])
    seen: list[int] = []

    def look(job: Any, trainer: Any) -> None:
        seen.extend(len(row["input_ids"]) for row in trainer.train_dataset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kt_moe.cli.job.Job.report", look)
        more = ["--dataset_streaming", "--eval_strategy", "no", "--max_steps", "1"]
        assert main(["finetune", *arguments(data, tmp_path / "out", *more)]) == 0
    assert len(seen) > 4
    assert max(seen) - min(seen) <= 1


def test_finetune_evaluates_with_the_batches_of_training() -> None:
    def batch(*argv: str) -> int:
        found: int = parse("finetune", ["--output", "o", *argv]).training.per_device_eval_batch_size
        return found

    assert batch("--batch-size", "3") == 3
    assert batch("--batch-size", "3", "--per_device_eval_batch_size=2") == 2


def test_short_names_stand_for_options_of_every_script() -> None:
    """And none is the name of one of TRL's."""
    for command in KINDS:
        parser = importlib.import_module(f"trl.scripts.{command}").make_parser()
        assert not set(parser._option_string_actions) & {f"--{name}" for name in _SHORT}
        found = parse(command, ["--output=o", "--lr", "0.5", "--gpu_memory", "6GiB", "--resume"])
        assert (found.training.output_dir, found.training.learning_rate) == ("o", 0.5)
        assert found.training.resume_from_checkpoint == "last"
        assert found.experts.experts_gpu_memory == "6GiB"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset_streaming", "--max_steps", "1"], "has no split 'test' to evaluate with: pass --eval_"),
        (["--eval_fraction", "0"], "has no split 'test' to evaluate with: pass --eval_strategy no"),
    ],
)
def test_evaluation_that_cannot_be(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(texts(tmp_path / "d.jsonl"), tmp_path / "out", *more)
    assert message in one_line_error(capsys, "finetune", lambda: main(["finetune", *given]))


def test_what_changes_losses_is_recorded() -> None:
    record = Job(parse("sft", arguments("nobody/nothing", Path("o"))))._record()

    def recorded(kind: str) -> set[str]:
        return {name.removeprefix(kind) for name in record if name.startswith(kind)}

    assert recorded("dataloader_") == {"drop_last", "in_order"}
    assert recorded("experts_") == {"format", "placement", "shards", "isa", "nodes"}
    assert {"learning_rate", "lora_r", "eval_fraction", "long_text", "dataset_name"} <= set(record)
    assert not {"output_dir", "report", "report_to", "sample", "overwrite"} & set(record)
