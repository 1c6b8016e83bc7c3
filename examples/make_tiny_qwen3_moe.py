#!/usr/bin/env python3
"""Pre-train the small Qwen3-MoE checkpoint that the examples fine-tune.

The corpus is the Python source of a CPython standard library, so any CPython can make a checkpoint like it
and nothing has to be fetched. `pydoc_data` is left out: the demo fine-tunes on its prose, which must be new
to the model. Whole files are held out by a checksum of their path: the same ones under every Python version.

    python make_tiny_qwen3_moe.py --output tiny-qwen3-moe --steps 1800       # two minutes on a large GPU
    python make_tiny_qwen3_moe.py --output /tmp/short --minutes 30           # what a CPU does in that time

It trains on a GPU when there is one. The output is what `save_pretrained` writes: bf16 safetensors with one
tensor per expert and projection, in two shards, and the tokenizer. Needs torch and transformers 5.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB_SIZE = 4096
WINDOW = 1024  # tokens a training example; also the model's longest context
BATCH = 32
PEAK_LR = 3e-3
WARMUP_STEPS = 200
BALANCE = 0.01  # weight of the router's load-balancing loss
END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

# The generation block lets trainers find the assistant's tokens (assistant_only_loss).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def standard_library(root: Path) -> Iterator[tuple[str, str]]:
    """(path below root, text) of every distinct source file, in path order.

    Besides installed packages and `pydoc_data`, tables that a program wrote (code pages, this build's own
    configuration) are left out.
    """
    skipped = ("site-packages", "dist-packages", "pydoc_data", "encodings")
    seen = set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if name.startswith(("config-", "_sysconfigdata")) or any(part in skipped for part in name.split("/")):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a few of the library's tests are in other encodings on purpose
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            yield name, text


def is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 20 == 0


def train_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen's own byte-level BPE pipeline with merges learned from `texts`."""
    bpe = Tokenizer.from_str(Qwen2Tokenizer().backend_tokenizer.to_str())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[TURN, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Qwen2Tokenizer, texts: list[str], device: str) -> torch.Tensor:
    """One int64 stream [n] of all texts, each followed by the end token."""
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        stream += encoding.ids
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream, device=device)


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,  # of a dense layer; there is none
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Not .to(bfloat16) afterwards: that would round the rotary frequencies too.
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model


def losses(
    model: Qwen3MoeForCausalLM, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict window[:, 1:], window [B, n + 1]. -> (summed nats, balance loss, expert load [layers, E]).

    The balance loss is E * sum_e load_e * mean probability_e (Switch Transformer, equation 4), 1 at best. It
    is taken layer by layer: an average over all layers would let one expert's idling in a layer be made up
    for in another.
    """
    output = model.model(window[:, :-1], output_router_logits=True, use_cache=False)
    logits = model.lm_head(output.last_hidden_state).float()
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
    probability = torch.stack(output.router_logits).float().softmax(-1)  # [layers, tokens, E]
    chosen = probability.topk(model.config.num_experts_per_tok).indices.flatten(1)
    load = nn.functional.one_hot(chosen, model.config.num_experts).float().mean(1)
    balance = model.config.num_experts * (load * probability.mean(1)).sum(-1).mean()
    return nats, balance, load


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, stream: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(nats a token, expert load [layers, E]) over disjoint windows of a token stream [n]."""
    total, load = 0.0, torch.zeros((), device=stream.device)
    for start in range(0, len(stream) - 1, WINDOW):
        window = stream[None, start : start + WINDOW + 1]
        nats, _, window_load = losses(model, window)
        total += nats.item()
        load = load + window_load * (window.shape[1] - 1)
    return total / (len(stream) - 1), load / (len(stream) - 1)


def train(model: Qwen3MoeForCausalLM, stream: torch.Tensor, steps: int, seconds: float) -> int:
    """AdamW on fp32 masters of the bf16 weights, cosine over `steps` or `seconds`. -> steps done."""
    parameters = list(model.parameters())
    masters = [parameter.detach().float() for parameter in parameters]
    groups = [
        {"params": [p for p in masters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in masters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    offsets = torch.arange(WINDOW + 1, device=stream.device)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        starts = torch.randint(len(stream) - WINDOW, (BATCH, 1)).to(stream.device)
        nats, balance, load = losses(model, stream[starts + offsets])
        (nats / (BATCH * WINDOW) + BALANCE * balance).backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            warmup = min(1.0, (step + 1) / WARMUP_STEPS)
            group["lr"] = PEAK_LR * warmup * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        optimizer.step()
        torch._foreach_copy_([parameter.data for parameter in parameters], masters)
        step += 1
        elapsed = time.monotonic() - started
        progress = step / steps if steps else elapsed / seconds
        if step % 100 == 0 or progress >= 1:
            print(
                f"step {step}  {elapsed:.0f} s  loss {nats.item() / (BATCH * WINDOW):.3f}  "
                f"balance {balance.item():.3f}  load {load.min().item():.3f}-{load.max().item():.3f}",
                flush=True,
            )
    return step


def unigram_loss(train_stream: torch.Tensor, held_out: torch.Tensor) -> float:
    """Nats a token of the training set's token frequencies (add-one) on the held-out tokens."""
    counts = torch.bincount(train_stream, minlength=VOCAB_SIZE).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write the checkpoint to")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30.0, help="how long to train (default: 30)")
    length.add_argument("--steps", type=int, default=0, help=f"or how many steps of {BATCH * WINDOW} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", type=Path, default=sysconfig.get_path("stdlib"), help="Lib of a CPython")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = list(standard_library(args.stdlib))
    train_texts = [text for name, text in files if not is_held_out(name)]
    held_out_texts = [text for name, text in files if is_held_out(name)]
    if not train_texts or not held_out_texts:
        parser.error(f"--stdlib {args.stdlib} holds too few Python files: {len(files)}")
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    digest = hashlib.sha256("\0".join(train_texts).encode()).hexdigest()
    print(f"{len(train_texts)} files to train on (sha256 {digest}), {len(held_out_texts)} held out")

    tokenizer = train_tokenizer(train_texts)
    stream = encode(tokenizer, train_texts, device)
    held_out = encode(tokenizer, held_out_texts, device)
    print(f"{len(stream)} training tokens, {len(held_out)} held out ({held_out_bytes} bytes)", flush=True)
    print(f"unigram held-out loss {unigram_loss(stream, held_out):.4f} nats a token", flush=True)

    model = build_model(tokenizer).to(device)
    done = train(model, stream, args.steps, args.minutes * 60)
    loss, load = evaluate(model, held_out)
    bits = loss * (len(held_out) - 1) / math.log(2) / held_out_bytes
    print(f"{done} steps, {done * BATCH * WINDOW} tokens seen")
    print(f"held-out loss {loss:.4f} nats a token, {bits:.4f} bits a byte")
    for layer, shares in enumerate(load.tolist()):
        print(f"layer {layer} expert load, %:", " ".join(f"{100 * share:.1f}" for share in shares))

    # A little over half, so that filling shards in order ends with two.
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(args.output, max_shard_size=int(size * 0.55))
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
