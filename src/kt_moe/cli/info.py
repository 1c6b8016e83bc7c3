"""`kt-moe info`: what this machine offers and what will run on it."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from kt_moe.cli.errors import UserError
from kt_moe.cli.nodes import node_lines
from kt_moe.cli.text import cache_text, size_text

OVERRIDES = (
    "KT_MOE_ISA",
    "KT_MOE_THREADS",
    "KT_MOE_SHARDS",
    "KT_MOE_NODES",
    "KT_MOE_PROFILE",
)
_LABELS = {
    "threads_per_core": "CPUs a core",
    "cgroup_cpu_limit": "CPU limit",
    "cgroup_memory_limit": "memory limit",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Print `kt_moe.cpu_info()`, versions, GPUs and the environment's overrides.

    Raises:
        UserError: an override that does not hold on this machine.
    """
    import torch

    import kt_moe

    try:
        info = kt_moe.cpu_info()
        info["threads"] = kt_moe.Runtime().threads
    except ValueError as error:  # KT_MOE_ISA and its kin
        raise UserError(str(error)) from error
    info["overrides"] = {name: os.environ[name] for name in OVERRIDES if name in os.environ}
    info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    info["versions"] = {"kt_moe": kt_moe.__version__, "torch": torch.__version__}
    print(json.dumps(info, indent=2, default=str) if args.json else describe(info))
    return 0


def describe(info: dict[str, Any]) -> str:
    """`kt_moe.cpu_info()` as aligned lines for people; lists are joined, tables get a line a row."""
    lines = []
    for key, value in info.items():
        name = _LABELS.get(key, key.replace("_", " "))
        rows = _rows(key, value)
        lines += [f"{'' if index else name:<14} {row}" for index, row in enumerate(rows)]
    return "\n".join(lines)


def _rows(key: str, value: Any) -> list[str]:
    if key == "nodes":
        return node_lines(value)
    if key == "caches":
        return [f"{name}: {cache_text(size)}" for name, size in value.items()]
    if isinstance(value, dict):
        return [f"{name}: {row}" for name, row in value.items()] or ["none"]
    if isinstance(value, (list, tuple, set)):
        return [" ".join(map(str, value)) or "none"]
    if key == "cgroup_memory_limit" and value is not None:
        return [size_text(value)]
    return ["none" if value is None else str(value)]
