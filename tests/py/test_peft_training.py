"""Training LoRA on kt_moe experts: gradient checkpointing, autocast, Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from tiny_models import (
    ALL_EXPERTS,
    PEFT_WARNINGS,
    error,
    gradients,
    load,
    lora_layers,
    plain_peft,
    save_tiny_checkpoint,
    tokens,
    with_lora,
)
from torch import Tensor

pytestmark = PEFT_WARNINGS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), **ALL_EXPERTS)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, checkpoint: Path) -> None:
    def run(checkpointing: bool) -> dict[str, Tensor]:
        base = load(checkpoint)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            base.enable_input_require_grads()
        model = with_lora(checkpoint, ["q_proj", "experts"], base=base, lora_dropout=0.1).train()
        torch.manual_seed(3)
        model(tokens(), labels=tokens()).loss.backward()
        return gradients(model)

    plain, checkpointed = run(False), run(True)
    assert all(torch.equal(g, checkpointed[name]) for name, g in plain.items())


def test_autocast(checkpoint: Path) -> None:
    model = with_lora(checkpoint, ["q_proj", "experts"]).eval()
    logits = model(tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert error(out.logits, logits) < 5e-2
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in gradients(model).values())


def arguments(directory: Path, cls: Any = transformers.TrainingArguments, **options: Any) -> Any:
    return cls(
        output_dir=str(directory), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        **options,
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_saves_and_resumes(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": t, "labels": t} for t in tokens(1).expand(8, -1)]

    def trainer(**options: Any) -> Any:
        model = with_lora(checkpoint, ["q_proj", "experts"], lora_dropout=0.1, **options)
        return transformers.Trainer(model, arguments(tmp_path, save_steps=2), train_dataset=rows)

    first = trainer(init_lora_weights=True)
    first.train()
    assert losses(first)[2] < losses(first)[0]
    resumed = trainer(seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-1] == losses(first)[2]
    trained, again = (t.model.eval()(tokens()).logits for t in (first, resumed))
    assert torch.equal(trained, again)


def test_trainer_checkpoint_in_plain_peft(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": t, "labels": t} for t in tokens(1).expand(8, -1)]
    trainer = transformers.Trainer(
        with_lora(checkpoint), arguments(tmp_path, save_steps=3), train_dataset=rows
    )
    trainer.train()
    plain = plain_peft(checkpoint, tmp_path / "checkpoint-3").eval()
    assert error(trainer.model.eval()(tokens()).logits, plain(tokens()).logits) < 1e-2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sft_trainer(checkpoint: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2"
    )
    text = " ".join(f"w{i}" for i in range(3, 15))
    trainer = SFTTrainer(
        load(checkpoint, dtype=torch.bfloat16),
        arguments(tmp_path, SFTConfig, max_length=16, bf16=True),
        train_dataset=Dataset.from_dict({"text": [text] * 8}),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "experts"], task_type="CAUSAL_LM"),
    )
    assert len(lora_layers(trainer.model)) == 2
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
