"""The order of things: ceilings, then everyone in turn at every case."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

import kt_moe
from kt_moe.cli.bench import ceilings
from kt_moe.cli.bench.cases import Case, spread, variants_of
from kt_moe.cli.bench.contestants import OneLayer, Step, make
from kt_moe.cli.bench.inputs import make_inputs, make_weights
from kt_moe.cli.bench.plain import loop_layer
from kt_moe.cli.bench.report import Record
from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED, projection_bytes
from kt_moe.cli.text import size_text
from kt_moe.host_memory import free_memory

_WORST_ERROR = 0.05  # relative L2, of bf16 experts; they leave about 0.005
_CHECKED_FLOPS = 1e11  # of the tokens whose outputs are compared with float64
_TURN = 0.15  # seconds of a layer's turn
_Made = TypeVar("_Made")


class Session:
    """One run of the command.

    Raises:
        ValueError: an override of threads or kernels that does not hold here.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        settings.device = "cuda" if settings.step and torch.cuda.is_available() else "cpu"
        self.settings, self.runtime = settings, kt_moe.default_runtime()
        torch.set_num_threads(self.runtime.threads)
        self.record = Record(settings, self.runtime)
        self.roof: ceilings.Ceilings | None = None
        self.truth: OneLayer | None = None

    def run(self) -> int:
        """Time everyone; 1 if an output of ours was wrong.

        Training steps one contestant after the other: few fit into a GPU beside another.

        Raises:
            UserError: too little memory.
        """
        settings = self.settings
        names = [*(f"kt_moe {format}" for format in settings.format), *settings.peers]
        groups = [[name] for name in names] if settings.step else [names]
        self._check_memory()
        if not settings.step:
            self.truth = OneLayer(loop_layer(make_weights(settings.shape, 0)), torch.float64, torch.float64)
            self.roof = self.record.found["ceilings"] = ceilings.measure(self.runtime)
            print(ceilings.ceilings_table(self.roof, self.runtime.threads), flush=True)
        l3 = kt_moe.cpu_info()["caches"]["l3"]
        for group in groups:
            tried = {name: self._attempt(name, make, name, settings) for name in group}
            made = {name: one for name, one in tried.items() if one is not None}
            for tokens in settings.tokens:
                variants = 1 if settings.step else variants_of(settings.shape, tokens, l3)
                self._time(Case(settings.shape, tokens, settings.rank, variants), made)
            tried = made = {}
            gc.collect()
            torch.cuda.empty_cache()
        self.record.write()
        return 0 if self.record.found["ok"] else 1

    def _check_memory(self) -> None:
        """Refuse experts that the host cannot hold: everyone's, the original, and an expert being packed."""
        settings, shape, free = self.settings, self.settings.shape, free_memory()
        bf16, widths = shape.weight_bytes, (shape.experts, shape.hidden, shape.intermediate)
        ours = [sum(projection_bytes(QUANTISED[name], *widths).values()) for name in settings.format]
        needed = 2 * bf16 + sum(ours) + bf16 * len(settings.peers)
        if settings.step:
            on_host = "resident" in settings.peers and settings.device == "cpu"
            needed = 2 * bf16 + settings.layers * max(*ours, bf16 * on_host)
        if needed > free:
            raise UserError(
                f"the experts take {size_text(needed)} of memory, and {size_text(free)} are free: lower "
                "--experts or --layers, or time fewer --format and --peers"
            )

    def _attempt(self, name: str, call: Callable[..., _Made], *args: object) -> _Made | None:
        """What the call gives; None, with a note, where a rival fails, or ours for want of memory."""
        try:
            return call(*args)
        except Exception as error:
            if name.startswith("kt_moe") and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            said = " ".join(str(error).split())[:200]
            self.record.note(f"{name} is left out: {type(error).__name__}: {said}")
            return None

    def _time(self, case: Case, made: dict[str, Any]) -> None:
        """Errors, on as many tokens as float64 has time for, then times: A, B, A, B, ...

        Whatever else the machine does falls on everyone alike.
        """
        small, errors = case.limited_to(_CHECKED_FLOPS), {}
        if self.truth is not None:
            self.truth.prepare(small)
            wanted = self.truth.outputs()

        def begin(name: str, one: Any) -> list[Step]:
            if self.truth is not None:
                one.prepare(small)
                errors[name] = relative_errors(one.outputs(), wanted)
            one.prepare(case)
            return []

        steps = {
            name: self._attempt(f"{name}, tokens {case.tokens}", begin, name, one)
            for name, one in made.items()
        }
        for _ in range(self.settings.reps):
            for name in (name for name, taken in steps.items() if taken is not None):
                more = self._attempt(f"{name}, tokens {case.tokens}", made[name].turn, case.variants, _TURN)
                steps[name] = None if more is None else (steps[name] or []) + more
        for name, taken in steps.items():
            if taken is None:
                continue
            found: dict[str, Any] = {"who": name, "tokens": case.tokens}
            passes = ("forward", "backward") if len(taken[0]) == 2 else ()
            columns = zip(passes, zip(*taken, strict=True), strict=False)
            found["seconds"] = {"both": spread(list(map(sum, taken))), **{n: spread(c) for n, c in columns}}
            found |= made[name].figures()
            if name in errors:
                worst = float(np.max([*errors[name].values()]))  # not a number if one of them is not
                found |= {"errors": errors[name], "worst_error": worst}
                limit = _WORST_ERROR if name == "kt_moe bf16" else np.inf
                if name.startswith("kt_moe") and not worst <= limit:
                    self.record.found["ok"] = False
                    self.record.note(f"WRONG, {name}, tokens {case.tokens}: an output is off: {errors[name]}")
            self.record.add(found | self._rates(case, found["seconds"]["both"]["median"]))

    def _rates(self, case: Case, seconds: float) -> dict[str, Any]:
        """What was done a second, and how near that is to what the machine allows."""
        found: dict[str, Any] = {"tokens_per_second": case.tokens / seconds}
        if self.roof is not None:
            touched = make_inputs(replace(case, rank=0)).touched
            found |= {"flops": case.flops(), "bytes": case.bytes(touched), "experts_touched": touched}
            found |= {f"{name}_per_second": found[name] / seconds for name in ("flops", "bytes")}
            found["limit_seconds"], found["bound"] = ceilings.bound(case, touched, self.roof)
            found["share_of_limit"] = found["limit_seconds"] / seconds
        return found


def relative_errors(outputs: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of each output there is; not a number where an output is not finite."""
    norm = np.linalg.norm
    return {n: float(norm(x - truth[n]) / max(norm(truth[n]), 1e-30)) for n, x in outputs.items()}
