"""The options of `kt-moe bench`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kt_moe.cli.bench.layer import PRESETS, Shape
from kt_moe.cli.bench.peers import PEERS
from kt_moe.cli.errors import UserError
from kt_moe.cli.options import list_of

_DEFAULTS: dict[str, Any] = {
    "preset": "qwen3-30b-a3b",
    "tokens": [1, 8, 64, 1024],
    "rank": [0, 16],
    "reps": 7,
}
_QUICK: dict[str, Any] = {"most_experts": 32, "reps": 3}


@dataclass(frozen=True)
class Settings:
    """What to time; threads and isas None mean what a default runtime takes."""

    shape: Shape
    tokens: list[int]
    ranks: list[int]
    threads: list[int | None]
    isas: list[str | None]
    lora_dtype: str
    routing: str
    recompute: bool
    reps: int
    quick: bool
    seed: int
    peers: list[str]
    json: Path | None
    plot: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those that --quick changes have no default here."""
    count, counts = number_from(1), list_of(number_from(1))
    layer = parser.add_argument_group("layer")
    layer.add_argument("--preset", choices=PRESETS, help=f"shape of a model ({_DEFAULTS['preset']})")
    for name, letter in (("hidden", "H"), ("intermediate", "I"), ("experts", "E"), ("topk", "K")):
        layer.add_argument(f"--{name}", type=count, metavar=letter, help=f"{letter}, instead of the preset's")
    cases = parser.add_argument_group("cases, every combination of them")
    cases.add_argument("--tokens", type=counts, metavar="T,..", help="tokens in the batch (1,8,64,1024)")
    cases.add_argument(
        "--rank", type=list_of(number_from(0)), metavar="R,..", help="LoRA rank, 0 for none (0,16)"
    )
    cases.add_argument("--threads", type=counts, metavar="N,..", help="(the cores this process may use)")
    cases.add_argument("--isa", type=list_of(str), metavar="NAME,..", help="kernel set (the best there is)")
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the LoRA tensors")
    how.add_argument("--routing", choices=["uniform", "skewed"], default="uniform", help="tokens to experts")
    how.add_argument("--recompute", action="store_true", help="backward computes G and U again")
    how.add_argument("--reps", type=count, metavar="N", help="turns each one takes at a case (7)")
    how.add_argument("--seed", type=number_from(0), default=0, help="of weights, inputs and routes (0)")
    how.add_argument("--quick", action="store_true", help="32 experts, fewer turns: half a minute")
    how.add_argument(
        "--peers",
        type=list_of(str),
        default=[],
        metavar="NAME,..",
        help=f"time these too: {', '.join(PEERS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a roofline as PNG")


def read(args: argparse.Namespace) -> Settings:
    """Settings from the parsed arguments.

    Raises:
        UserError: options that do not go together, an unknown peer, a file that cannot be written.
    """
    chosen = {**_DEFAULTS, **(_QUICK if args.quick else {})}
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen |= given
    unknown = [name for name in args.peers if name not in PEERS]
    if unknown:
        raise UserError(f"--peers has {', '.join(unknown)}, wanted some of {', '.join(PEERS)}")
    check_writable("--json", args.json)
    check_writable("--plot", args.plot)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'kt_moe[train]'")
    return Settings(
        shape=shape_of(chosen),
        tokens=chosen["tokens"],
        ranks=chosen["rank"],
        threads=chosen.get("threads") or [None],
        isas=args.isa or [None],
        lora_dtype=args.dtype,
        routing=args.routing,
        recompute=args.recompute,
        reps=chosen["reps"],
        quick=args.quick,
        seed=args.seed,
        peers=list(dict.fromkeys(args.peers)),
        json=args.json,
        plot=args.plot,
    )


def check_writable(option: str, path: Path | None) -> None:
    """UserError where no file can be written at the path that an option gives."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise UserError(f"{option} {path}: no file can be written there")


def shape_of(chosen: dict[str, Any]) -> Shape:
    """The shape that the options of these names and values ask for."""
    shape = PRESETS[chosen.get("preset", _DEFAULTS["preset"])]
    given = {n: chosen[n] for n in ("hidden", "intermediate", "experts", "topk") if n in chosen}
    if any(given.get(n, getattr(shape, n)) != getattr(shape, n) for n in ("hidden", "intermediate", "topk")):
        shape = replace(shape, name="custom")
    shape = replace(shape, experts=min(shape.experts, chosen.get("most_experts", shape.experts)))
    shape = replace(shape, **given)
    if shape.topk > shape.experts:
        raise UserError(f"--topk is {shape.topk}, more than the {shape.experts} experts there are")
    return shape


def number_from(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least`."""

    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"is {text!r}, wanted a whole number from {least}")
        return value

    return parse


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of these."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"has {text!r}, wanted some of {', '.join(names)}")
        return text

    return parse
