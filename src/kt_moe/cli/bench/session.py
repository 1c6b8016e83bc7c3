"""The order of things: ceilings, then everyone in turn at every case; and what a run leaves."""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import shlex
import sys
from dataclasses import asdict, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kt_moe
from kt_moe import _core
from kt_moe.cli.bench import plain
from kt_moe.cli.bench.cases import Case, Spread, ceilings_table, spread
from kt_moe.cli.bench.layers import SCALING, OneLayer, Step, make_experts, make_weights
from kt_moe.cli.formats import QUANTISED, projection_bytes
from kt_moe.cli.output import write_json
from kt_moe.cli.terminal import UserError, size_text
from kt_moe.host_memory import free_memory

_CHECKED_TOKENS = 64  # whose outputs are compared with float64
_TURN = 0.15  # seconds of a layer's turn
_CEILING = 0.2  # of the measurement of each ceiling


class Session:
    """One run of the command; `found` is what its JSON holds.

    Raises:
        ValueError: an override of threads or kernels that does not hold here.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        settings.device = "cuda" if settings.step and torch.cuda.is_available() else "cpu"
        self.settings, self.runtime, info = settings, kt_moe.default_runtime(), kt_moe.cpu_info()
        torch.set_num_threads(self.runtime.threads)
        self.truth: OneLayer | None = None
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        self.found: dict[str, Any] = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["kt-moe", *sys.argv[1:]]),
            "machine": {n: info[n] for n in ("model", "cores", "numa_nodes", "caches", "isa_features")},
            "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
            "load_average": os.getloadavg()[0],  # before we load it ourselves
            "versions": {"kt_moe": kt_moe.__version__, "python": platform.python_version(), **versions},
            "isa": self.runtime.isa,
            "threads": self.runtime.threads,
            "settings": {n: v for n, v in vars(settings).items() if n not in ("json", "shape")},
            "layer": asdict(settings.shape),
            "results": [],
        }
        self._write()  # a file that cannot be written is said before anything slow
        print(f"{self.found['command']}, {self.found['date']}")
        print(", ".join(f"{name} {version}" for name, version in self.found["versions"].items()))
        on = f"{self.found['gpu']} beside " if self.found["gpu"] else ""
        print(f"{on}{info['model']}, load average: {self.found['load_average']:.1f}")
        threads = f"{self.runtime.isa}, {self.runtime.threads} threads"
        print(f"{threads}; {settings.shape}, LoRA rank {settings.rank}", flush=True)

    def run(self) -> None:
        """Time everyone.

        Training steps one contestant after the other: few fit into a GPU beside another.

        Raises:
            UserError: too little memory.
        """
        settings = self.settings
        names = [*(f"kt_moe {format}" for format in settings.format), *settings.peers]
        self._check_memory()
        if not settings.step:
            layer = plain.loop_layer(make_weights(settings.shape))
            self.truth = OneLayer(layer, torch.float64, torch.float64)
            self.found["ceilings"] = ceilings_of(self.runtime)
            print(ceilings_table(self.found["ceilings"], self.runtime.threads), flush=True)
        for group in [[name] for name in names] if settings.step else [names]:
            made = {name: make(name, settings) for name in group}
            for tokens in settings.tokens:
                self._time(Case(settings.shape, tokens, settings.rank), made)
            del made
            gc.collect()
            torch.cuda.empty_cache()

    def _check_memory(self) -> None:
        """Refuse experts that the host cannot hold: everyone's, the original, and an expert being packed."""
        settings, shape, free = self.settings, self.settings.shape, free_memory()
        widths = (shape.experts, shape.hidden, shape.intermediate)
        held = [sum(projection_bytes(QUANTISED[name], *widths).values()) for name in settings.format]
        held += [shape.weight_bytes] * len(settings.peers)
        needed = 2 * shape.weight_bytes + (settings.layers * max(held) if settings.step else sum(held))
        if needed > free:
            said = f"the experts take {size_text(needed)} of memory, and {size_text(free)} are free"
            raise UserError(f"{said}: lower --experts or --layers, or time fewer --format and --peers")

    def _time(self, case: Case, contestants: dict[str, Any]) -> None:
        """Errors of some tokens, then times: A, B, A, B, ...

        Whatever else the machine does falls on everyone alike.
        """
        errors: dict[str, dict[str, float]] = {name: {} for name in contestants}
        if self.truth is not None:
            for one in (self.truth, *contestants.values()):
                one.prepare(replace(case, tokens=min(case.tokens, _CHECKED_TOKENS)))
            truth = self.truth.outputs()
            errors = {name: relative_errors(one.outputs(), truth) for name, one in contestants.items()}
        for one in contestants.values():
            one.prepare(case)
        turns = [[one.turn(_TURN) for one in contestants.values()] for _ in range(self.settings.reps)]
        for (name, one), taken in zip(contestants.items(), zip(*turns, strict=True), strict=True):
            steps = [step for turn in taken for step in turn]
            self._add(name, case, steps, errors[name], one.figures())

    def _add(
        self, name: str, case: Case, steps: list[Step], errors: dict[str, float], figures: dict[str, Any]
    ) -> None:
        """Keep a result, and print its line."""
        passes = zip(("forward", "backward"), zip(*steps, strict=True), strict=False) if errors else ()
        seconds = {"both": spread([*map(sum, steps)]), **{name: spread(s) for name, s in passes}}
        median = seconds["both"]["median"]
        result = {"who": name, "tokens": case.tokens, "seconds": seconds, **figures}
        result["tokens_per_second"] = case.tokens / median
        if errors:
            worst = float(np.max([*errors.values()]))  # not a number if one of them is not
            result |= {"errors": errors, "worst_error": worst}
            result |= case.limits(median, self.found["ceilings"])
        self.found["results"].append(result)
        self._write()
        cells = cells_of(result)
        for row in (cells, cells.values()) if len(self.found["results"]) == 1 else (cells.values(),):
            tokens, who, *others = row
            print(f"{tokens:>6}  {who:21}", *(f"{cell:>8}" for cell in others), flush=True)

    def _write(self) -> None:
        """Write the JSON that was asked for. OSError: it cannot be written."""
        if self.settings.json is not None:
            write_json(self.settings.json, self.found)


def make(name: str, settings: argparse.Namespace) -> Any:
    """The contestant of that name: one of kt_moe's or torch's, or what a function makes, "FILE.py:NAME"."""
    file, _, function = name.rpartition(":")
    if file:
        sys.path.insert(0, str(Path(file).parent))
        return getattr(import_module(Path(file).stem), function)(settings)
    if settings.step:
        from kt_moe.cli.bench.training import trainer  # transformers and PEFT, which take seconds to import

        return trainer(name, settings)
    if name.startswith("kt_moe"):
        (experts,) = make_experts(name.partition(" ")[2], settings)
        return OneLayer(lambda x, ids, w, lora: kt_moe.moe(x, ids, w, experts, lora, scaling=SCALING))
    weights = make_weights(settings.shape)
    layer = plain.loop_layer(weights) if name == "torch" else plain.grouped_layer(plain.fuse(weights))
    return OneLayer(layer, torch.bfloat16)


def ceilings_of(runtime: kt_moe.Runtime) -> dict[str, Spread]:
    """What the machine can do, by the names of `_core.measure_ceilings`."""
    l3 = kt_moe.cpu_info()["caches"]["l3"]
    # Where groups of cores have an L3 each, l3 is one group's: half of it a thread is more than all of them.
    size = min(4 << 30, max(256 << 20, 4 * l3, runtime.threads * l3 // 2), free_memory() // 4)
    lists = _core.measure_ceilings(runtime._core, _CEILING, size)
    return {name: spread(samples) for name, samples in lists.items()}


def cells_of(result: dict[str, Any]) -> dict[str, str]:
    """A line of the table: what stands in each column."""
    seconds = result["seconds"]
    both = seconds["both"]
    cells = {"tokens": str(result["tokens"]), "who": result["who"]}
    cells |= {name: f"{1e3 * both[key]:.2f}" for name, key in (("ms", "median"), ("q1", "q1"), ("q3", "q3"))}
    cells["tokens/s"] = f"{result['tokens_per_second']:.0f}"
    if "bound" in result:
        for name, one in (("fwd ms", "forward"), ("bwd ms", "backward")):
            cells[name] = f"{1e3 * seconds[one]['median']:.2f}"
        cells["TFLOP/s"] = f"{result['flops'] / both['median'] / 1e12:.3f}"
        cells["GB/s"] = f"{result['bytes'] / both['median'] / 1e9:.1f}"
        cells |= {"bound": result["bound"], "share": f"{result['share_of_limit']:.0%}"}
        cells["error"] = f"{result['worst_error']:.1e}"
    else:
        cells["GPU GiB"] = f"{result['gpu_bytes'] / 2**30:.2f}" if "gpu_bytes" in result else "-"
        cells["loss"] = f"{result['losses'][0]:.3f}"
    return cells


def relative_errors(outputs: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of each output there is; not a number where an output is not finite."""
    norm = np.linalg.norm
    return {n: float(norm(x - truth[n]) / max(norm(truth[n]), 1e-30)) for n, x in outputs.items()}
