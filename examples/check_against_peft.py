#!/usr/bin/env python3
"""The demo once more in plain PyTorch, transformers and PEFT: both loss curves must agree.

The same documents, order, seed and initial LoRA go through two models:

    kt_moe   `kt-moe finetune`, as in demo.py
    plain    transformers' model with every expert three `nn.Linear`, PEFT's own LoRA on each of them

Plain means that kt_moe's hooks are not even imported in this process. PEFT's usual form, one fused parameter
for all experts, would not do as a yardstick: it joins gate and up into one LoRA of twice the rank and trains
the blocks between them too, which is another parametrization with other losses.

Then the adapter that kt_moe wrote is loaded into the untouched model by plain PEFT and evaluated.

    python examples/check_against_peft.py      # exit status 1 if a final loss differs by more than 1 %
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

# Every expert gets another number of tokens at every step. oneDNN compiles a product for each shape and keeps
# 1024 of them; with room for all, the plain run is four times as fast. Read when torch is imported.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")

import demo
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from kt_moe.cli.data import cut, hold_out, load_data
from kt_moe.cli.report import Curves, losses_of, plot_losses

TOLERANCE = 0.01
OUT = Path("out/demo-check")
# PEFT takes modules called gate_proj for those that transformers 5 fuses, so these have names of their own.
NAMES = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}

Rows = tuple[Dataset, Dataset]

WRITE_INITIAL_LORA = """
import sys
from kt_moe.adapters import save_adapter
from kt_moe.cli import job, train

def built(self, trainer):
    save_adapter(trainer.model, sys.argv[1])
    sys.exit()

job.Job.built = built
train.run("finetune", sys.argv[2:])
"""


class Expert(nn.Module):
    """One expert: down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        weights = (*gate_up.chunk(2), down)
        for name, weight in zip(NAMES.values(), weights, strict=True):
            linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """[m, H] -> [m, H]."""
        return self.w_down(nn.functional.silu(self.w_gate(x)) * self.w_up(x))


class EagerExperts(nn.ModuleList):
    """The routed experts, one after the other."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, slot = torch.where(top_k_index == number)
            y = expert(hidden_states[token]) * top_k_weights[token, slot, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out


def plain_model(initial: Path) -> PeftModel:
    """transformers' model with eager experts and PEFT's LoRA, whose values are those of an adapter's file."""
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fused = layer.mlp.experts
        pairs = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        layer.mlp.experts = EagerExperts(Expert(gate_up, down) for gate_up, down in pairs)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", *NAMES.values()]
    theirs = json.loads((initial / "adapter_config.json").read_text())
    lora = LoraConfig(r=theirs["r"], lora_alpha=theirs["lora_alpha"], target_modules=targets)
    model = get_peft_model(model, lora)

    values = load_file(initial / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = name.replace(".default.", ".")
                for theirs, ours in NAMES.items():
                    key = key.replace(ours, theirs)
                parameter.copy_(values.pop(key))
    assert not values, f"not in the plain model: {sorted(values)[:3]}"
    return model


def run_kt_moe(data: Path) -> Curves:
    """`kt-moe finetune`, and beside it the LoRA that the same options start from."""
    arguments = [*demo.command(data, OUT / "kt_moe"), "--overwrite"]
    subprocess.run([sys.executable, "-m", "kt_moe.cli", *arguments], check=True)
    again = [*demo.command(data, OUT / "start")[1:], "--overwrite"]
    subprocess.run([sys.executable, "-c", WRITE_INITIAL_LORA, str(OUT / "initial"), *again], check=True)
    found = json.loads((OUT / "kt_moe" / "metrics.json").read_text())
    return {name: [tuple(point) for point in found[name]] for name in ("train", "held_out")}


def make_trainer(model: PeftModel, rows: Rows) -> SFTTrainer:
    """TRL's own trainer with the options of kt_moe's run."""
    theirs = torch.load(OUT / "kt_moe" / "training_args.bin", weights_only=False).to_dict()
    theirs = {name: value for name, value in theirs.items() if not name.endswith("_token")}  # which it hides
    options = SFTConfig(**theirs | {"output_dir": str(OUT / "plain"), "model_init_kwargs": None})
    parts = dict(zip(("train_dataset", "eval_dataset"), rows, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    return SFTTrainer(model, args=options, processing_class=tokenizer, **parts)


def read_rows(data: Path) -> Rows:
    """Training and held-out rows of kt_moe's run."""
    run = json.loads((OUT / "kt_moe" / "run.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    parts = hold_out(load_data(str(data))["train"], run["eval_fraction"], run["seed"])

    def pieces(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        documents = (tokenizer(text + tokenizer.eos_token)["input_ids"] for text in batch["text"])
        rows = (ids[part] for ids in documents for part in cut(len(ids), run["max_length"]))
        return {"input_ids": [row for row in rows if len(row) > 1]}

    training, held_out = (part.map(pieces, batched=True, remove_columns=part.column_names) for part in parts)
    return training, held_out


def run_plain(rows: Rows) -> Curves:
    """The same training in plain PyTorch."""
    trainer = make_trainer(plain_model(OUT / "initial"), rows)
    trainer.train()
    return losses_of(trainer.state.log_history)


def evaluate_adapter(rows: Rows) -> float:
    """Held-out loss of kt_moe's adapter on transformers' own, fused model."""
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        # PEFT makes these patterns itself, for fused parameters, and then looks for them among modules alone.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        model = PeftModel.from_pretrained(base, OUT / "kt_moe")
    loss: float = make_trainer(model, rows).evaluate()["eval_loss"]
    return loss


def final_losses(curves: Curves) -> dict[str, float]:
    """Held-out loss after the last step, training loss over the last tenth of the steps."""
    last = [loss for _, loss in curves["train"][-(len(curves["train"]) // 10) :]]
    return {"held-out": curves["held_out"][-1][1], "training": sum(last) / len(last)}


def main() -> int:
    """Run it; the exit status."""
    data = demo.write_topics(OUT / "topics.jsonl")
    print("--- kt_moe", flush=True)
    kt_moe = run_kt_moe(data)

    print("\n--- plain transformers + PEFT", flush=True)
    rows = read_rows(data)
    plain, adapter_loss = run_plain(rows), evaluate_adapter(rows)
    assert "kt_moe.hf" not in sys.modules

    curve = OUT / "loss.png"
    plot_losses({"kt_moe": kt_moe, "plain PEFT": plain}, curve, "The same fine-tuning twice")
    ours, theirs = final_losses(kt_moe), final_losses(plain)
    ours["adapter in PEFT"], theirs["adapter in PEFT"] = ours["held-out"], adapter_loss
    print("\nfinal loss           kt_moe    plain     difference")
    for name, loss in ours.items():
        print(f"{name:<20} {loss:.4f}    {theirs[name]:.4f}    {abs(loss - theirs[name]) / theirs[name]:.3%}")
    print(f"both curves          {curve}")
    return int(any(abs(loss - theirs[name]) > TOLERANCE * theirs[name] for name, loss in ours.items()))


if __name__ == "__main__":
    sys.exit(main())
