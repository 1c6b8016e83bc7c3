"""The options of `kt-moe bench`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from kt_moe.cli.bench.cases import PRESETS, Shape
from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.options import cpu_share, integer, list_of, memory_size

# What is timed: its name, and who there is besides kt_moe.
_MODES = {
    "layer": ("a layer on the CPU", ("torch", "grouped_mm", "kt-kernel")),
    "gpu": ("a stack of layers (--gpu)", ("streamed", "resident", "cpu", "kt_moe-resident")),
    "step": ("training steps (--step)", ("resident", "roundpipe", "cpu")),
}
_COUNT: dict[str, Any] = {"type": integer(1), "metavar": "N"}
_COUNTS: dict[str, Any] = {"type": list_of(integer(1)), "metavar": "N,.."}
_NAMES: dict[str, Any] = {"type": list_of(str), "metavar": "NAME,.."}
_FLAG: dict[str, Any] = {"action": "store_true", "default": None}
_OTHERS = "others to time: " + "; ".join(f"{m}: {', '.join(names)}" for m, (_, names) in _MODES.items())
_OWN = "instead of the preset's"
# By name: what argparse takes, the help, and the defaults of a layer, a stack and a step; ... for none.
_OPTIONS: dict[str, tuple[dict[str, Any], str, tuple[Any, Any, Any]]] = {
    "gpu": (_FLAG, "time a stack of layers on CPU and GPU together", (False, True, True)),
    "step": (_FLAG, "with --gpu: time training steps of a Qwen3-MoE model", (..., False, True)),
    "preset": ({"choices": PRESETS}, "shape of a model", ("qwen3-30b-a3b",) * 3),
    "hidden": (_COUNT, _OWN, (None,) * 3),
    "intermediate": (_COUNT, _OWN, (None,) * 3),
    "experts": (_COUNT, _OWN, (None,) * 3),
    "topk": (_COUNT, _OWN, (None,) * 3),
    "tokens": (_COUNTS, "in a batch", ([1, 8, 64, 1024], [512, 2048, 8192, 16384], [2048, 8192, 16384])),
    "rank": ({**_COUNTS, "type": list_of(integer(0))}, "of LoRA, 0 for none", ([0, 16], [16], [16])),
    "format": (_NAMES, "of kt_moe's experts, each timed", (["bf16"],) * 3),
    "threads": (_COUNTS, "(the cores that this process may use)", ([None],) * 3),
    "isa": (_NAMES, "kernel sets of a layer (the best there is)", ([None], ..., ...)),
    "routing": ({"choices": ["uniform", "skewed"]}, "tokens to experts", ("uniform", "uniform", ...)),
    "recompute": (_FLAG, "backward computes G and U again", (False,) * 3),
    "quick": (_FLAG, "of a layer 32 experts, 3 short turns: half a minute", (False, ..., ...)),
    "reps": (_COUNT, "turns that each one takes at a case", (7, 5, 5)),
    "peers": (_NAMES, _OTHERS, ([], _MODES["gpu"][1], _MODES["step"][1])),
    "layers": (_COUNT, "of the stack or the model", (..., 6, 48)),
    "gpu-memory": ({"type": memory_size, "metavar": "SIZE"}, "such as 2.5GiB", (..., "auto", "auto")),
    "cpu-share": ({"type": cpu_share, "metavar": "X"}, "of the rows, 0 to 1", (..., "auto", "auto")),
    "lora-device": ({"choices": ["cuda", "cpu"]}, "of the experts' LoRA", (..., "cuda", "cuda")),
    "checkpoint-experts": (
        {"choices": ["recompute", "retain"]}, "as KtMoeConfig has it", (..., ..., "recompute")
    ),
    "sequence": (_COUNT, "tokens of a row", (..., ..., 1024)),
    "compile": (_FLAG, "torch.compile attention", (..., ..., False)),
    "device": ({"choices": ["cuda", "cpu"]}, argparse.SUPPRESS, (..., "cuda", "cuda")),
    "json": ({"type": Path, "metavar": "FILE"}, "write everything measured", (None,) * 3),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; `read` puts the defaults in, which depend on what is timed."""
    titles = ("what is timed (defaults of a layer; a stack; a step)", "with --gpu", "with --gpu --step")
    groups = [parser.add_argument_group(title) for title in titles]
    for name, (how, text, defaults) in _OPTIONS.items():
        shown = [
            ",".join(map(str, d)) if isinstance(d, list) else str(d) for d in defaults if d and d is not ...
        ]
        if not ("(" in text or how is _FLAG or text in (_OTHERS, argparse.SUPPRESS)) and shown:
            text += f" ({'; '.join(dict.fromkeys(shown))})"
        group = groups[next(i for i, default in enumerate(defaults) if default is not ...)]
        group.add_argument(f"--{name}", help=text, **how)


def read(args: argparse.Namespace) -> argparse.Namespace:
    """The same, checked, with the defaults, and with `mode` and `shape`.

    Raises:
        UserError: options that do not go together, or an unknown name.
    """
    mode = "layer" if not args.gpu else "step" if args.step else "gpu"
    title, peers = _MODES[mode]
    found = argparse.Namespace(mode=mode)
    for name, (_, _, defaults) in _OPTIONS.items():
        key, default = name.replace("-", "_"), defaults[list(_MODES).index(mode)]
        value = getattr(args, key)
        if value is not None and default is ...:
            raise UserError(f"--{name} is not for {title}")
        setattr(found, key, value if value is not None else None if default is ... else default)
    for option, known in (("peers", peers), ("format", tuple(QUANTISED))):
        if unknown := [name for name in getattr(found, option) if name not in known]:
            raise UserError(f"--{option} has {', '.join(unknown)}, wanted some of {', '.join(known)}")
    if mode != "layer" and any(rank % 8 or rank == 0 for rank in found.rank):
        raise UserError(f"--rank is {found.rank}, wanted multiples of 8, as torch's grouped_mm does")
    if found.quick and args.reps is None:
        found.reps = 3
    if mode == "layer":
        found.layers, found.device = 1, "cpu"
    if found.device == "cpu":
        found.lora_device = "cpu"
    if mode == "step":  # whole rows
        found.tokens = [tokens - tokens % min(tokens, found.sequence) for tokens in found.tokens]
    found.shape = _shape(found)
    return found


def _shape(args: argparse.Namespace) -> Shape:
    """The preset with what the options change."""
    shape = PRESETS[args.preset]
    if args.quick:
        shape = replace(shape, experts=min(32, shape.experts))
    given = {n: getattr(args, n) for n in ("hidden", "intermediate", "experts", "topk") if getattr(args, n)}
    shape = replace(shape, name=shape.name if set(given) <= {"experts"} else "custom", **given)
    if shape.topk > shape.experts:
        raise UserError(f"--topk is {shape.topk}, more than the {shape.experts} experts there are")
    return shape
