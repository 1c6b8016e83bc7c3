"""The options of `kt-moe bench`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from kt_moe.cli.bench.cases import PRESETS
from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.options import integer, list_of, memory_size

# Who there is besides kt_moe, without and with --step.
_PEERS = {False: ("torch", "grouped_mm"), True: ("resident", "cpu")}
_TOKENS = {False: [1, 8, 64, 1024], True: [2048, 8192, 16384]}
# Options of --step: what argparse takes, and the default.
_OF_STEPS: dict[str, tuple[dict[str, Any], Any]] = {
    "layers": ({"type": integer(1), "metavar": "N", "help": "of the model (48)"}, 48),
    "sequence": ({"type": integer(1), "metavar": "N", "help": "tokens of a row (1024)"}, 1024),
    "gpu-memory": ({"type": memory_size, "metavar": "SIZE", "help": "for experts, such as 2.5GiB"}, "auto"),
    "lora-device": ({"choices": ["cuda", "cpu"], "help": "of the experts' LoRA (the model's)"}, None),
    "checkpoint-experts": (
        {"choices": ["recompute", "retain"], "help": "as KtMoeConfig has it (recompute)"},
        "recompute",
    ),
    "compile": ({"action": "store_true", "default": None, "help": "torch.compile attention"}, False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; `check` puts in the defaults that depend on what is timed."""
    names: dict[str, Any] = {"type": list_of(str), "metavar": "NAME,.."}
    add = parser.add_argument
    model = "time training steps of a Qwen3-MoE model, on the GPU if there is one, instead of a layer"
    add("--step", action="store_true", help=model)
    add("--preset", choices=PRESETS, default="qwen3-30b-a3b", help="shape of a model (qwen3-30b-a3b)")
    for name in ("hidden", "intermediate", "experts", "topk"):
        add(f"--{name}", type=integer(1), metavar="N", help="instead of the preset's")
    shown = "; with --step ".join(",".join(map(str, tokens)) for tokens in _TOKENS.values())
    add("--tokens", type=list_of(integer(1)), metavar="N,..", help=f"in a batch ({shown})")
    add("--rank", type=integer(0), default=16, metavar="N", help="of LoRA, 0 for none (16)")
    add("--format", **names, default=["bf16"], help="of kt_moe's experts, each timed (bf16)")
    peers = "; with --step ".join(", ".join(some) for some in _PEERS.values())
    add("--peers", **names, default=[], help=f"others to time: {peers}; or FILE.py:NAME")
    add("--reps", type=integer(1), default=5, metavar="N", help="turns that each one takes at a case (5)")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    group = parser.add_argument_group("with --step")
    for name, (how, _) in _OF_STEPS.items():
        group.add_argument(f"--{name}", **how)


def check(args: argparse.Namespace) -> None:
    """Put in what is not given, and `shape`.

    Raises:
        UserError: options that do not go together, or an unknown name.
    """
    for option, (_, default) in _OF_STEPS.items():
        name = option.replace("-", "_")
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.step:
            raise UserError(f"--{option} is for --step")
    args.tokens = args.tokens or _TOKENS[args.step]
    own = [name for name in args.peers if ".py:" in name]
    for option, known in (("peers", (*_PEERS[args.step], *own)), ("format", tuple(QUANTISED))):
        if unknown := [name for name in getattr(args, option) if name not in known]:
            raise UserError(f"--{option} has {', '.join(unknown)}, wanted some of {', '.join(known)}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no directory {args.json.parent}")
    if args.step:  # whole rows
        args.tokens = [tokens - tokens % min(tokens, args.sequence) for tokens in args.tokens]
    given = {n: getattr(args, n) for n in ("hidden", "intermediate", "experts", "topk") if getattr(args, n)}
    args.shape = replace(PRESETS[args.preset], **given)
    if args.shape.topk > args.shape.experts:
        raise UserError(f"--topk is {args.shape.topk}, more than the {args.shape.experts} experts there are")
