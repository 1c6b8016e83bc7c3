"""`kt-moe numa`: what a layer moves between memory nodes, and how fast a machine with several will be."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kt_moe.cli.bench.layer import PRESETS, Shape
from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.numa import this_machine
from kt_moe.cli.numa.predict import Machine, Run, predict
from kt_moe.cli.numa.report import describe, to_dict
from kt_moe.cli.options import integer, list_of, number
from kt_moe.experts import PLACEMENTS

MOST_NODES = 16
_DIMENSIONS = {"hidden": "H", "intermediate": "I", "experts": "E", "topk": "K"}
_NODE: dict[str, tuple[Callable[[str], float], str, str, float]] = {
    "cores_per_node": (integer(1, 1 << 16), "N", "", 48),
    "local_gb_s": (number(0), "X", "a node's memory, 10^9 bytes/s; ", 285),
    "remote_gb_s": (number(0), "X", "a node's reads and writes of all others; ", 110),
    "tflops_per_core": (number(0), "X", "that products reach; ", 0.7),
    "cache_mb": (number(0), "X", "last cache of a node, 10^6 bytes; ", 256),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    layer = parser.add_argument_group("layer").add_argument
    layer("--preset", choices=PRESETS, help="shape of a model; default: qwen3-30b-a3b")
    layer("--config", type=Path, metavar="DIR_OR_CONFIG", help="that of a model directory or a config.json")
    for name, letter in _DIMENSIONS.items():
        layer(f"--{name}", type=integer(1), metavar=letter, help=f"{letter}, instead of the model's")
    layer("--layers", type=integer(1), metavar="N", help="with experts; default: the config's, or 1")
    layer("--format", choices=list(QUANTISED), default="bf16", help="of the weights; default: bf16")
    run = parser.add_argument_group("run").add_argument
    run("--tokens", type=list_of(integer(1)), default=[1, 64, 1024, 8192], metavar="T,..",
        help="of a pass; default: 1,64,1024,8192")  # fmt: skip
    run("--rank", type=integer(0), default=16, metavar="R", help="of LoRA on all three; default: 16")
    run("--recompute", action="store_true", help="backward computes G and U again")
    run("--skew", type=number(0), default=0.0, metavar="X",
        help="popularity of the n-th expert is n^-X; default: 0, all alike")  # fmt: skip
    run("--seed", type=integer(0), default=0, metavar="N", help="of the routes drawn; default: 0")
    machine = parser.add_argument_group("machine").add_argument
    machine("--nodes", type=list_of(integer(1, MOST_NODES)), metavar="N,..",
            help="default: 1,2,4,8,16, or this machine's")  # fmt: skip
    machine("--this-machine", action="store_true",
            help="what it has and reaches, measured in some seconds, in place of the next five")  # fmt: skip
    for name, (parse, metavar, help_, default) in _NODE.items():
        machine(_option(name), type=parse, metavar=metavar, help=f"{help_}default: {default}")
    machine("--placement", type=list_of(_placement), default=["tensor", "expert"], metavar="NAME,..",
            help=f"some of {', '.join(PLACEMENTS)}; default: tensor,expert")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as JSON, and what each node does")
    parser.epilog = "docs/numa.md says what the columns mean and where the default rates come from."


def run(args: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        UserError: a shape that cannot be, two models or machines at once, a rate of 0, or no such config.
    """
    shape, layers = _shape(args)
    machine, nodes_there = _machine(args)
    wanted = Run(layers, args.format, args.rank, args.recompute, args.skew, args.seed)
    rows = [
        predict(shape, wanted, machine, tokens, nodes, placement)
        for tokens in args.tokens
        for nodes in args.nodes or nodes_there
        for placement in args.placement
    ]
    if args.json:
        print(json.dumps(to_dict(shape, wanted, machine, rows), indent=2))
    else:
        print(describe(shape, wanted, machine, rows))
    return 0


def _shape(args: argparse.Namespace) -> tuple[Shape, int]:
    """The layer's shape, and how many layers there are."""
    layers = 1
    if args.config is not None:
        if args.preset is not None:
            raise UserError("--preset and --config exclude each other")
        shape, layers = _read_config(args.config)
    else:
        shape = PRESETS[args.preset or "qwen3-30b-a3b"]
    given = {name: getattr(args, name) for name in _DIMENSIONS if getattr(args, name) is not None}
    if given:
        shape = replace(shape, name="custom", **given)
    if shape.topk > shape.experts:
        raise UserError(f"--topk is {shape.topk}, more than the {shape.experts} experts there are")
    return shape, args.layers or layers


def _machine(args: argparse.Namespace) -> tuple[Machine, list[int]]:
    """A node, and how many of them, unless --nodes says it."""
    given = {name: getattr(args, name) for name in _NODE if getattr(args, name) is not None}
    cores, local, remote, tflops, cache = (given.get(name, row[-1]) for name, row in _NODE.items())
    if args.this_machine:
        if given:
            raise UserError(f"--this-machine and {_option(next(iter(given)))} exclude each other")
        try:
            machine, nodes = this_machine.read(remote * 1e9)
        except ValueError as error:  # KT_MOE_ISA and its kin
            raise UserError(str(error)) from error
        return machine, [nodes]
    for name, value in given.items():
        if value == 0 and name != "cache_mb":
            raise UserError(f"{_option(name)} is 0, wanted more")
    return Machine(cores, local * 1e9, remote * 1e9, tflops * 1e12, cache * 1e6), [1, 2, 4, 8, 16]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_config(path: Path) -> tuple[Shape, int]:
    """As `kt-moe plan` reads it; of layers that differ, the first."""
    try:
        from kt_moe.cli.plan.options import Run as Plan
        from kt_moe.cli.plan.outline import blamed_on, outline, read_config
        from kt_moe.cli.quiet import quiet
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'kt_moe[train]'") from error
    with quiet():
        config = read_config(path)
        with blamed_on(path):
            model = outline(config, Plan(1, 2, 1, ("gate",), (), None, "adamw", 4, False))
    first = model.layers[0]
    shape = Shape(model.model_type, first.hidden, first.intermediate, first.experts, first.topk)
    return shape, len(model.layers)


def _placement(name: str) -> str:
    if name not in PLACEMENTS:
        raise argparse.ArgumentTypeError(f"{name!r}, wanted some of {', '.join(PLACEMENTS)}")
    return name
