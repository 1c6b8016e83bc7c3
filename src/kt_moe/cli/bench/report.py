"""What a run leaves: lines and tables as they come, and all of it as JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import kt_moe
from kt_moe.cli.bench.cases import GIB, MIB
from kt_moe.cli.errors import UserError
from kt_moe.cli.output import write_json
from kt_moe.cli.text import table

SCHEMA = 5  # of the JSON; grows when a key changes its meaning or goes
# Where a result has it, its unit, and its form.
_COLUMNS: dict[str, tuple[str, float, str]] = {
    "tokens": ("tokens", 1, ".0f"),
    "rank": ("rank", 1, ".0f"),
    "who": ("who", 0, ""),
    "fwd ms": ("seconds.forward.median", 1e-3, ".2f"),
    "bwd ms": ("seconds.backward.median", 1e-3, ".2f"),
    "ms": ("seconds.both.median", 1e-3, ".2f"),
    "q1": ("seconds.both.q1", 1e-3, ".2f"),
    "q3": ("seconds.both.q3", 1e-3, ".2f"),
    "tokens/s": ("tokens_per_second", 1, ".0f"),
    "over first": ("time_over_first", 1, ".2f"),
    "TFLOP/s": ("flops_per_second", 1e12, ".3f"),
    "GB/s": ("bytes_per_second", 1e9, ".1f"),
    "CPU rows": ("cpu_rows", 1, ".0%"),
    "link GB/s": ("link_bytes_per_second", 1e9, ".1f"),
    "bound": ("bound", 0, ""),
    "fwd share": ("share_of_limit.forward", 1, ".0%"),
    "bwd share": ("share_of_limit.backward", 1, ".0%"),
    "share": ("share_of_limit.both", 1, ".0%"),
    "scratch MiB": ("scratch_bytes", MIB, ".1f"),
    "GPU GiB": ("gpu_bytes", GIB, ".2f"),
    "host GiB": ("host_bytes", GIB, ".1f"),
    "made in s": ("build_seconds", 1, ".0f"),
    "first loss": ("losses.0", 1, ".3f"),
    "error": ("worst_error", 1, ".1e"),
}


class Record:
    """Everything that a run finds; `found` is what the JSON holds."""

    def __init__(self, settings: argparse.Namespace, command_line: list[str]) -> None:
        self._file, info = settings.json, kt_moe.cpu_info()
        versions = {"kt_moe": kt_moe.__version__, "python": platform.python_version()}
        for name in ("torch", "triton", "transformers", "peft", "kt-kernel", "roundpipe"):
            if importlib.util.find_spec(name.replace("-", "_")) is not None:
                versions[name] = metadata.version(name)
        self.found: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["kt-moe", *command_line]),
            "machine": {n: info[n] for n in ("model", "cores", "numa_nodes", "caches", "isa_features")},
            "load_average": os.getloadavg()[0],  # before we load it ourselves
            "versions": versions,
            "settings": {k: v for k, v in vars(settings).items() if k not in ("json", "shape")},
            "layer": asdict(settings.shape),
            "results": [],
            "notes": [],
            "ok": True,
        }
        self.write()  # a file that cannot be written is said before anything slow
        print(f"{self.found['command']}, {self.found['date']}")
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        print(f"{info['model']}, load average: {self.found['load_average']:.1f}", flush=True)

    def write(self) -> None:
        """Write the JSON that was asked for. UserError: it cannot be written."""
        try:
            if self._file is not None:
                write_json(self._file, self.found)
        except OSError as error:
            raise UserError(f"--json {self._file}: {error.strerror}") from error

    def note(self, text: str) -> None:
        """Say once what the reader of the figures should know."""
        if text not in self.found["notes"]:
            self.found["notes"].append(text)
            print(f"  note: {text}", flush=True)

    def fault(self, text: str) -> None:
        """An output of ours was wrong: the run ends in exit status 1."""
        self.found["ok"] = False
        self.note(f"WRONG, {text}")

    def add(self, results: Sequence[dict[str, Any]]) -> None:
        """Keep results of one case; print all that there are of it, with their times over the first's."""
        kept, keys = self.found["results"], ("isa", "threads", "tokens", "rank")
        kept += results
        same = [r for r in kept if results and all(r[key] == results[0][key] for key in keys)]
        for found in same:
            found["time_over_first"] = (
                found["seconds"]["both"]["median"] / same[0]["seconds"]["both"]["median"]
            )
        self.write()
        if same:
            print(f"\n{results_table(same)}", flush=True)


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each result; columns that none of them has are left out."""
    columns = {name: [_cell(result, *column) for result in results] for name, column in _COLUMNS.items()}
    shown = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    rows = zip(*([name, *cells] for name, cells in shown.items()), strict=True)
    return table(list(rows), right=[i for i, name in enumerate(shown) if _COLUMNS[name][1]])


def _cell(result: dict[str, Any], path: str, unit: float, form: str) -> str:
    value: Any = result
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else (value or {}).get(key)
    return "-" if value is None else format(value / unit if unit else value, form)
