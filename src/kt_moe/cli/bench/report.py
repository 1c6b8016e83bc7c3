"""What a run leaves: a table whose lines are printed as they come, and all of it as JSON."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

import kt_moe
from kt_moe.cli.bench.cases import GIB
from kt_moe.cli.output import write_json

# Where a result has it, its unit, and its form with the width of the column.
_Column = tuple[str, float, str]
_TIMES: dict[str, _Column] = {
    "tokens": ("tokens", 1, "6.0f"),
    "who": ("who", 0, "21"),
    "ms": ("seconds.both.median", 1e-3, "9.2f"),
    "q1": ("seconds.both.q1", 1e-3, "9.2f"),
    "q3": ("seconds.both.q3", 1e-3, "9.2f"),
    "tokens/s": ("tokens_per_second", 1, "8.0f"),
    "over first": ("time_over_first", 1, "10.2f"),
}
_OF_LAYER: dict[str, _Column] = {
    "fwd ms": ("seconds.forward.median", 1e-3, "8.2f"),
    "bwd ms": ("seconds.backward.median", 1e-3, "8.2f"),
    "TFLOP/s": ("flops_per_second", 1e12, "7.3f"),
    "GB/s": ("bytes_per_second", 1e9, "6.1f"),
    "bound": ("bound", 0, "7"),
    "share": ("share_of_limit", 1, "5.0%"),
    "error": ("worst_error", 1, "7.1e"),
}
_OF_STEP: dict[str, _Column] = {
    "GPU GiB": ("gpu_bytes", GIB, "7.2f"),
    "first loss": ("losses.0", 1, "10.3f"),
}


class Record:
    """Everything that a run finds; `found` is what the JSON holds."""

    def __init__(self, settings: argparse.Namespace, runtime: kt_moe.Runtime) -> None:
        self._file, info = settings.json, kt_moe.cpu_info()
        self._columns = _TIMES | (_OF_STEP if settings.step else _OF_LAYER)
        versions = {"kt_moe": kt_moe.__version__, "python": platform.python_version()}
        versions |= {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        self.found: dict[str, Any] = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["kt-moe", *sys.argv[1:]]),
            "machine": {n: info[n] for n in ("model", "cores", "numa_nodes", "caches", "isa_features")},
            "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
            "load_average": os.getloadavg()[0],  # before we load it ourselves
            "versions": versions,
            "isa": runtime.isa,
            "threads": runtime.threads,
            "settings": {n: v for n, v in vars(settings).items() if n not in ("json", "shape")},
            "layer": asdict(settings.shape),
            "results": [],
            "notes": [],
            "ok": True,
        }
        self.write()  # a file that cannot be written is said before anything slow
        print(f"{self.found['command']}, {self.found['date']}")
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        on = f"{self.found['gpu']} beside " if self.found["gpu"] else ""
        print(f"{on}{info['model']}, load average: {self.found['load_average']:.1f}")
        threads = f"{runtime.isa}, {runtime.threads} threads"
        print(f"{threads}; {settings.shape}, LoRA rank {settings.rank}", flush=True)

    def write(self) -> None:
        """Write the JSON that was asked for. OSError: it cannot be written."""
        if self._file is not None:
            write_json(self._file, self.found)

    def note(self, text: str) -> None:
        """Say what the reader of the figures should know."""
        self.found["notes"].append(text)
        print(f"  note: {text}", flush=True)

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, and print its line, with its time over that of the first of as many tokens."""
        kept = self.found["results"]
        kept.append(result)
        first = next(one for one in kept if one["tokens"] == result["tokens"])
        ratio = result["seconds"]["both"]["median"] / first["seconds"]["both"]["median"]
        result["time_over_first"] = ratio
        self.write()
        if len(kept) == 1:
            print("\n" + _line([_aligned(name, column) for name, column in self._columns.items()]))
        print(_line([_cell(result, column) for column in self._columns.values()]), flush=True)


def _line(cells: list[str]) -> str:
    return "  ".join(cells).rstrip()


def _aligned(text: str, column: _Column) -> str:
    """As wide as the column; names to the left, numbers to the right."""
    _, unit, form = column
    width = int(form.partition(".")[0])
    return text.rjust(width) if unit else text.ljust(width)


def _cell(result: dict[str, Any], column: _Column) -> str:
    path, unit, form = column
    value: Any = result
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value.get(key)
    return _aligned("-", column) if value is None else format(value / unit if unit else value, form)
