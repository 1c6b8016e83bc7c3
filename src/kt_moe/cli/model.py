"""The model of a run: loaded with its experts on our core, LoRA put on, one sample of its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from kt_moe.cli.errors import UserError

EXPERTS = "experts"
ATTENTION = "attention"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        UserError: not a model directory, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    if not (path / "config.json").is_file():
        advice = "" if path.exists() else " (a model on the hub: hf download NAME --local-dir DIR)"
        raise UserError(f"--model {path} is not a model directory: it has no config.json{advice}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: no tokenizer that loads: {error}") from error


def load_base_model(path: Path, **how: Any) -> Any:
    """The model in bf16, its experts computed by our core, the rest on the GPUs where there are any.

    how: arguments of `KtMoeConfig`.

    Raises:
        UserError: files missing or malformed, or an architecture whose experts the core cannot compute.
    """
    from kt_moe.hf import KtMoeConfig, load_model

    config = KtMoeConfig(**how)
    try:
        config.runtime()
    except ValueError as error:  # KT_MOE_ISA and its kin
        raise UserError(str(error)) from error
    try:
        return load_model(path, config, dtype=torch.bfloat16)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model {path}: {error}") from error


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    seed: int,
    shared_outer: bool = False,
) -> Any:
    """Put trainable fp32 LoRA on the modules `resolve_targets` finds; `seed` decides its initial values.

    shared_outer: as `kt_moe.SharedOuterLoraConfig` has it.
    """
    from peft import LoraConfig, get_peft_model

    from kt_moe.hf import SharedOuterLoraConfig

    modules = resolve_targets(model, targets)
    config = (SharedOuterLoraConfig if shared_outer else LoraConfig)(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def resolve_targets(model: nn.Module, targets: list[str]) -> list[str]:
    """Last parts of the names of the modules that get LoRA.

    "attention" stands for every linear layer inside a module whose name contains "attn" or "attention".

    Raises:
        UserError: a name that no linear layer and no experts module has; lists those there are.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    attention = {n.rpartition(".")[2] for n in linear if "attn" in n or "attention" in n}
    known = {n.rpartition(".")[2] for n in linear} - {"lm_head"}
    known |= {EXPERTS for name, _ in model.named_modules() if name.rpartition(".")[2] == EXPERTS}
    known |= {ATTENTION} if attention else set()
    resolved: set[str] = set()
    for target in targets:
        if target not in known:
            raise UserError(f"--targets: the model has no {target!r}, wanted some of {sorted(known)}")
        resolved |= attention if target == ATTENTION else {target}
    return sorted(resolved)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, *, chat: bool, tokens: int, seed: int) -> str:
    """What the model writes after `prompt`: sampled at temperature 0.8, the same for the same seed.

    chat: put the prompt into the chat template as a user's message. Torch's random state is left as it was.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
            out = model.generate(**inputs, **sampling, max_new_tokens=tokens, pad_token_id=pad)
    finally:
        model.train(was_training)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
