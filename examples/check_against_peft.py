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

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

# Every expert gets another number of tokens at every step. oneDNN compiles a product for each shape and keeps
# 1024 of them; with room for all, the plain run is four times as fast. Read when torch is imported.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")

import demo
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kt_moe.cli import options
from kt_moe.cli.data import read_documents, split_documents, to_rows
from kt_moe.cli.options import Settings
from kt_moe.cli.plot import History, plot_losses
from kt_moe.cli.progress import Progress
from kt_moe.cli.quiet import quiet
from kt_moe.cli.trainer import Rows, build_trainer

TOLERANCE = 0.01
OUT = Path("out/demo-check")
# PEFT takes modules called gate_proj for those that transformers 5 fuses, so these have names of their own.
NAMES = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}

WRITE_INITIAL_LORA = """
import json, sys
from pathlib import Path
from kt_moe.adapters import save_adapter
from kt_moe.cli.model import add_lora, load_base_model
from kt_moe.cli.quiet import quiet
s = json.loads(sys.argv[1])
lora = {name: s[name] for name in ("rank", "alpha", "dropout", "targets", "seed")}
with quiet():
    save_adapter(add_lora(load_base_model(Path(s["model"])), **lora), sys.argv[2])
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


def plain_model(settings: Settings, initial: Path) -> PeftModel:
    """transformers' model with eager experts and PEFT's LoRA, whose values are those of an adapter's file."""
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fused = layer.mlp.experts
        pairs = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        layer.mlp.experts = EagerExperts(Expert(gate_up, down) for gate_up, down in pairs)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", *NAMES.values()]
    model = get_peft_model(
        model, LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    )

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


def run_kt_moe(settings: Settings, data: Path) -> History:
    """`kt-moe finetune`, and beside it the LoRA that the same settings start from."""
    arguments = [*demo.command(data, OUT / "kt_moe"), "--overwrite"]
    subprocess.run([sys.executable, "-m", "kt_moe.cli", *arguments], check=True)
    initial = [sys.executable, "-c", WRITE_INITIAL_LORA, json.dumps(settings.to_dict()), str(OUT / "initial")]
    subprocess.run(initial, check=True)
    found = json.loads((OUT / "kt_moe" / "metrics.json").read_text())
    return History([tuple(p) for p in found["train"]], [tuple(p) for p in found["held_out"]])


def run_plain(settings: Settings, tokenizer: Any, rows: Rows) -> History:
    """The same training in plain PyTorch."""
    model = plain_model(settings, OUT / "initial")
    trainer = build_trainer(model, tokenizer, rows, settings, OUT / "plain", callbacks=[Progress()])
    trainer.train()
    return History.from_log(trainer.state.log_history)


def evaluate_adapter(settings: Settings, tokenizer: Any, rows: Rows) -> float:
    """Held-out loss of kt_moe's adapter on transformers' own, fused model."""
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        # PEFT makes these patterns itself, for fused parameters, and then looks for them among modules alone.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        model = PeftModel.from_pretrained(base, OUT / "kt_moe")
    loss: float = build_trainer(model, tokenizer, rows, settings, OUT / "plain").evaluate()["eval_loss"]
    return loss


def final_losses(history: History) -> dict[str, float]:
    """Held-out loss after the last step, training loss over the last tenth of the steps."""
    last = [loss for _, loss in history.train[-(len(history.train) // 10) :]]
    return {"held-out": history.held_out[-1][1], "training": sum(last) / len(last)}


def main() -> int:
    """Run it; the exit status."""
    data = demo.write_topics(OUT / "topics.jsonl")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    settings = Settings.from_args(parser.parse_args(demo.command(data, OUT / "kt_moe")[1:]))
    print("--- kt_moe", flush=True)
    kt_moe = run_kt_moe(settings, data)

    print("\n--- plain transformers + PEFT", flush=True)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        parts = split_documents(read_documents(data), settings.eval_fraction, settings.seed)
        rows = Rows(*(to_rows(part, tokenizer, settings.seq_len) for part in parts))
        plain = run_plain(settings, tokenizer, rows)
        adapter_loss = evaluate_adapter(settings, tokenizer, rows)
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
