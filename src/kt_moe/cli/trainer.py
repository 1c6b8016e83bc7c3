"""TRL's SFTTrainer, set up for a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from kt_moe.cli.options import Settings


@dataclass(frozen=True)
class Rows:
    """What `kt_moe.cli.data.to_rows` made of the training and of the held-out documents."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def build_trainer(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    settings: Settings,
    checkpoints: Path,
    *,
    save_every: int | None = None,
    gradient_checkpointing: bool = False,
    resumed: bool = False,
    callbacks: list[Any] | None = None,
) -> Any:
    """An SFTTrainer for a PEFT model; `train()` runs it and leaves the losses in its `state.log_history`.

    save_every: steps; None means a tenth of the run. resumed: leave out the evaluation before step 1.
    """
    config = SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        gradient_checkpointing=gradient_checkpointing,
        learning_rate=settings.lr,
        optim="adamw_torch_fused",  # experts' LoRA is often in host memory: there it takes half the time
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        max_length=settings.seq_len,
        assistant_only_loss=settings.assistant_only_loss,
        bf16=False,  # the weights are bf16 already, and autocast would round LoRA's fp32 products
        router_aux_loss_coef=_no_aux_loss(model),
        seed=settings.seed,
        logging_nan_inf_filter=False,  # a loss that is not a number is shown as it is
        logging_steps=1,  # a loss a step: a resumed run's log is the uninterrupted run's
        eval_strategy="steps" if rows.held_out else "no",
        eval_on_start=bool(rows.held_out) and not resumed,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,  # our callback draws the bar
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows.train),
        eval_dataset=Dataset.from_list(rows.held_out) if rows.held_out else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    # TRL may have dropped rows, so a tenth of the run is known only now.
    steps_per_epoch = math.ceil(len(trainer.train_dataset) / (settings.batch_size * settings.grad_accum))
    steps = settings.max_steps if settings.max_steps > 0 else settings.epochs * steps_per_epoch
    config.eval_steps = settings.eval_every or math.ceil(steps / 10)
    config.save_steps = save_every or math.ceil(steps / 10)
    return trainer


def _no_aux_loss(model: Any) -> float | None:
    """0 for a model with a load-balancing loss: the router is frozen, the loss shown is the text's alone."""
    return 0.0 if hasattr(model.config.get_text_config(), "output_router_logits") else None
