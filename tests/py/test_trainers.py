"""TRL's trainers and their options on the example model, each against plain transformers + PEFT.

LoRA is on attention alone here, so that both models have the same parameters and, by the seed, the same
values of them; gradients reach it through the frozen experts, which kt_moe computes in one of the two.
`python tests/py/test_trainers.py` prints the table of docs/trainers.md.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)
from trl.models.activation_offloading import get_act_offloading_ctx_manager

import kt_moe

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3-moe"
STEPS = 3
TOLERANCE = 0.02  # of a loss, after up to three steps, and of the first gradient; all but the experts is fp32

SAID = {"role": "user", "content": "Add two numbers."}
TEXTS = [{"text": f"def add{n}(a, b):\n    return a + b + {n}"} for n in range(12)]
CHATS = [
    {"messages": [SAID, {"role": "assistant", "content": f"def add(a, b): return a + b + {n}"}]}
    for n in range(12)
]
PROMPTS = [{"prompt": "def add(a, b):", "completion": f" return a + b + {n}"} for n in range(12)]
PAIRS = [
    {"prompt": "def f(x):", "chosen": f" return x + {n}", "rejected": f" pass  # {n}"} for n in range(12)
]
MARKED = [{"prompt": "def f(x):", "completion": f" return x + {n}", "label": n % 2 == 0} for n in range(12)]
ASKED = [{"prompt": f"def f{n}(x):"} for n in range(12)]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        compared: losses of all steps and the gradient of the first agree with plain transformers + PEFT; else
            the run is only finite and moves the adapter, as its losses follow from tokens that are drawn.
        package: without it the test is skipped.
    """

    what: str
    trainer: str
    rows: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    compared: bool = True
    rank: int = 4  # of LoRA
    package: str | None = None
    generates: bool = False  # in every evaluation, with the same text from both


CHECKPOINTING = {"gradient_checkpointing": True}
CASES = [
    Case("SFT, texts", "SFT", TEXTS),
    Case("SFT, prompts and completions, loss on completions", "SFT", PROMPTS),
    Case("SFT, conversations, loss on the assistant alone", "SFT", CHATS, {"assistant_only_loss": True}),
    Case("SFT, packing", "SFT", TEXTS, {"packing": True, "max_length": 64}),
    Case("SFT, padding-free", "SFT", TEXTS, {"padding_free": True, "max_length": None}),
    Case("gradient accumulation", "SFT", TEXTS, {"gradient_accumulation_steps": 2}),
    Case("gradient checkpointing", "SFT", TEXTS, CHECKPOINTING),
    Case(
        "gradient checkpointing, re-entrant", "SFT", TEXTS,
        {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    Case("bf16 autocast", "SFT", TEXTS, {"bf16": True, "use_cpu": True}),
    Case("load-balancing loss", "SFT", TEXTS, {"router_aux_loss_coef": 0.01}),
    Case("Adafactor", "SFT", TEXTS, {"optim": "adafactor"}),
    Case("AdamW, not fused", "SFT", TEXTS, {"optim": "adamw_torch"}),
    *(
        # Tensors of less than 4,096 numbers keep fp32 state: LoRA of a higher rank is larger.
        Case(f"{name} of bitsandbytes", "SFT", TEXTS, {"optim": optim}, rank=128, package="bitsandbytes")
        for name, optim in (("8-bit AdamW", "adamw_8bit"), ("paged 8-bit AdamW", "paged_adamw_8bit"))
    ),
    Case(
        "evaluation and load_best_model_at_end", "SFT", TEXTS,
        {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True},
    ),
    Case(
        "evaluation with generation (LogCompletionsCallback)", "SFT", PROMPTS,
        {"eval_strategy": "steps", "eval_steps": 1}, generates=True,
    ),
    Case("activation offloading", "SFT", TEXTS, {"activation_offloading": True}),
    Case(
        "torch.compile", "SFT", TEXTS, {"torch_compile": True, "torch_compile_backend": "eager"},
    ),
    Case("DPO, reference by the disabled adapter", "DPO", PAIRS),
    Case("KTO", "KTO", MARKED),
    Case("ORPO (trl.experimental)", "ORPO", PAIRS),
    Case("reward model", "Reward", PAIRS),
    Case("GRPO", "GRPO", ASKED, {"max_completion_length": 4, "num_generations": 2}, compared=False),
    Case("RLOO", "RLOO", ASKED, {"max_completion_length": 4, "num_generations": 2}, compared=False),
]  # fmt: skip


def length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def classes(name: str) -> tuple[Any, Any]:
    """A trainer and its config."""
    if name == "ORPO":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def load(case: Case, ours: bool) -> Any:
    """The example model with LoRA on attention."""
    auto, more = AutoModelForCausalLM, {}
    if case.trainer == "Reward":
        auto, more = AutoModelForSequenceClassification, {"num_labels": 1}
    if ours:
        more["quantization_config"] = kt_moe.KtMoeConfig()
    model = auto.from_pretrained(MODEL, dtype=torch.float32, **more)
    if case.trainer == "Reward":  # the head is new, and drawn
        with torch.random.fork_rng():
            torch.manual_seed(1)
            torch.nn.init.normal_(model.score.weight, std=0.1)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=case.rank, target_modules=["q_proj", "v_proj"]))


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step, of all parameters one after the other."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.value is None:
            grads = [p.grad.flatten() for p in kwargs["model"].parameters() if p.grad is not None]
            self.value = torch.cat(grads).float()


def train(case: Case, ours: bool, output: Path) -> tuple[list[float], Tensor, Any]:
    """Losses of the steps, the gradient of the first one, and the trainer."""
    trainer_class, config_class = classes(case.trainer)
    options: dict[str, Any] = {
        "output_dir": str(output), "max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": 2,
        "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0,
        **({"router_aux_loss_coef": 0.0} if case.trainer not in ("ORPO", "Reward") else {}),
    } | case.options  # fmt: skip
    if options.get("load_best_model_at_end"):
        options["save_strategy"] = "steps"
    more: dict[str, Any] = {"eval_dataset": Dataset.from_list(case.rows)} if "eval_steps" in options else {}
    if case.trainer in ("GRPO", "RLOO"):
        more["reward_funcs"] = length_reward
    gradient = FirstGradient()
    trainer = trainer_class(
        load(case, ours), args=config_class(**options), train_dataset=Dataset.from_list(case.rows),
        processing_class=AutoTokenizer.from_pretrained(MODEL), callbacks=[gradient], **more,
    )  # fmt: skip
    if case.generates:
        greedy = GenerationConfig(max_new_tokens=4, do_sample=False)
        trainer.add_callback(trl.LogCompletionsCallback(trainer, greedy, num_prompts=2))
    trainer.train()
    assert gradient.value is not None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, gradient.value, trainer


def completions(trainer: Any) -> list[Any]:
    """(step, prompt, completion) of all evaluations that generate."""
    found = [one.table for one in trainer.callback_handler.callbacks if hasattr(one, "table")]
    assert all(found)
    return found


def offload_from_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Without a GPU the CPU is what TRL offloads activations from: without streams and page-locked memory."""
    if torch.accelerator.current_accelerator() is None:
        offloading = partial(get_act_offloading_ctx_manager, use_streams=False, use_pin_memory=False)
        patch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", offloading)
        patch.setattr("torch.accelerator.current_accelerator", lambda *_, **__: torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_losses_are_those_of_plain_peft(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.package is not None:
        pytest.importorskip(case.package)
    if "activation_offloading" in case.options:
        offload_from_the_cpu(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, our_gradient, trainer = train(case, True, tmp_path / "ours")
        assert len(ours) == STEPS
        assert torch.isfinite(torch.tensor(ours)).all()
        moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()]
        assert moved
        if case.compared:
            theirs, gradient, plain = train(case, False, tmp_path / "theirs")
            assert completions(trainer) == completions(plain)
            assert ours == pytest.approx(theirs, rel=TOLERANCE)
            assert (our_gradient - gradient).norm() <= TOLERANCE * gradient.norm()


def table() -> str:
    """The rows of docs/trainers.md."""
    lines = [
        "| TRL | options beside the defaults | against plain transformers + PEFT |",
        "| --- | --- | --- |",
    ]
    for case in CASES:
        options = ", ".join(f"`{name}={value!r}`" for name, value in case.options.items())
        found = (
            f"losses and gradient agree within {TOLERANCE:.0%}"
            if case.compared
            else "trains; its tokens are drawn"
        )
        lines.append(f"| {case.what} | {options} | {found} |")
    return "\n".join(lines)


def test_the_table_of_the_docs_is_that_of_these_tests() -> None:
    assert table() in (ROOT / "docs" / "trainers.md").read_text()


if __name__ == "__main__":
    print(table())
