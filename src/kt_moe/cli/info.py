"""`kt-moe info`: what this machine offers and what will run on it."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from kt_moe.cli.errors import UserError

_OVERRIDES = ("KT_MOE_ISA", "KT_MOE_THREADS", "KT_MOE_SHARDS", "KT_MOE_INDEX_CACHE")


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
    info["overrides"] = {name: os.environ[name] for name in _OVERRIDES if name in os.environ}
    info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    info["versions"] = {"kt_moe": kt_moe.__version__, "torch": torch.__version__}
    print(json.dumps(info, indent=2, default=str) if args.json else describe(info))
    return 0


def describe(info: dict[str, Any]) -> str:
    """`kt_moe.cpu_info()` as aligned lines for people; lists are joined, tables get a line a row."""
    lines = []
    for key, value in info.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            rows = [f"{k}: {_amount(key, v)}" for k, v in value.items()] or ["none"]
            lines += [f"{'' if index else name:<14} {row}" for index, row in enumerate(rows)]
        elif isinstance(value, (list, tuple, set)):
            lines.append(f"{name:<14} {' '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{name:<14} {value}")
    return "\n".join(lines)


def _amount(key: str, value: Any) -> str:
    if key == "caches" and isinstance(value, int):
        return f"{value // 1024} KiB" if value < 2**20 else f"{value / 2**20:g} MiB"
    return str(value)
