"""`kt-moe bench`: time a layer or training steps, against the machine's ceilings and other libraries."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from kt_moe.cli.bench.cases import PRESETS
from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.terminal import UserError, integer, list_of

# Who there is besides kt_moe, without and with --step.
_PEERS = {False: ("torch", "grouped_mm"), True: ("resident",)}
_TOKENS = {False: [1, 8, 64, 1024], True: [2048, 8192, 16384]}
_SIZES = ("hidden", "intermediate", "experts", "topk")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    names: dict[str, Any] = {"type": list_of(str), "metavar": "NAME,.."}
    add = parser.add_argument
    model = "time training steps of a Qwen3-MoE model, on the GPU if there is one, instead of a layer"
    add("--step", action="store_true", help=model)
    add("--preset", choices=PRESETS, default="qwen3-30b-a3b", help="shape of a model (qwen3-30b-a3b)")
    for name in _SIZES:
        add(f"--{name}", type=integer(1), metavar="N", help="instead of the preset's")
    shown = "; with --step ".join(",".join(map(str, tokens)) for tokens in _TOKENS.values())
    add("--tokens", type=list_of(integer(1)), metavar="N,..", help=f"in a batch ({shown})")
    add("--rank", type=integer(0), default=16, metavar="N", help="of LoRA, 0 for none (16)")
    add("--format", **names, default=["bf16"], help="of kt_moe's experts, each timed (bf16)")
    peers = "; with --step ".join(", ".join(some) for some in _PEERS.values())
    add("--peers", **names, default=[], help=f"others to time: {peers}; or FILE.py:NAME")
    add("--reps", type=integer(1), default=5, metavar="N", help="turns that each one takes at a case (5)")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    step = parser.add_argument_group("with --step").add_argument
    step("--layers", type=integer(1), default=48, metavar="N", help="of the model (48)")
    step("--sequence", type=integer(1), default=1024, metavar="N", help="tokens of a row (1024)")
    step("--gpu-memory", default="auto", metavar="SIZE", help="for experts, such as 2.5GiB (auto)")
    step("--lora-device", choices=["cuda", "cpu"], help="of the experts' LoRA (the model's)")
    step("--checkpoint-experts", choices=["recompute", "retain"], default="recompute", help="(recompute)")
    step("--compile", action="store_true", help="torch.compile attention")


def check(args: argparse.Namespace) -> None:
    """Put in `shape`, and `tokens` if they are not given.

    Raises:
        UserError: options that do not go together, or an unknown name.
    """
    args.tokens = args.tokens or _TOKENS[args.step]
    if args.step:  # whole rows
        args.tokens = [tokens - tokens % min(tokens, args.sequence) for tokens in args.tokens]
    own = [name for name in args.peers if ".py:" in name]
    for option, known in (("peers", (*_PEERS[args.step], *own)), ("format", tuple(QUANTISED))):
        if unknown := [name for name in getattr(args, option) if name not in known]:
            raise UserError(f"--{option} has {', '.join(unknown)}, wanted some of {', '.join(known)}")
    given = {name: getattr(args, name) for name in _SIZES if getattr(args, name)}
    args.shape = replace(PRESETS[args.preset], **given)
    if args.shape.topk > args.shape.experts:
        raise UserError(f"--topk is {args.shape.topk}, more than the {args.shape.experts} experts there are")


def run(args: argparse.Namespace) -> int:
    """Time what the options ask for."""
    check(args)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or torch's threads take cores of those that compute
    from kt_moe.cli.bench.session import Session  # which imports torch

    Session(args).run()
    return 0
