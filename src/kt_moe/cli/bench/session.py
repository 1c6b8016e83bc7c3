"""The order of things: ceilings, then everyone in turn at every case."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

import kt_moe
from kt_moe.cli.bench import ceilings
from kt_moe.cli.bench.cases import GIB, Case, spread, variants_of
from kt_moe.cli.bench.contestants import Stack, Step, make
from kt_moe.cli.bench.inputs import make_inputs, make_weights
from kt_moe.cli.bench.remote import Remote, RemoteError
from kt_moe.cli.bench.report import Record
from kt_moe.cli.bench.rivals import loop_layer
from kt_moe.cli.errors import UserError
from kt_moe.gpu.rates import link_rate
from kt_moe.host_memory import free_memory

_INSTALL = {"kt-kernel": "; pip install kt-kernel==0.7.2", "roundpipe": "; pip install roundpipe==0.1.1"}
_COPIES = {"kt-kernel": 6}  # of a layer's weights, in both of its processes; others have one
_WORST_ERROR = {"layer": 0.02, "gpu": 0.05}  # relative L2, of bf16 experts; they leave about 0.005 a layer
_Made = TypeVar("_Made")


class Session:
    """One run of the command.

    Raises:
        UserError: no GPU for what is asked.
    """

    def __init__(self, settings: argparse.Namespace, command_line: list[str]) -> None:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--gpu needs a CUDA device, and torch {torch.__version__} finds none")
        self.settings, self.record = settings, Record(settings, command_line)

    def run(self) -> int:
        """Time everyone; 1 if an output of ours was wrong.

        Raises:
            UserError: threads or kernels that this machine does not have, or too little memory.
        """
        settings, found = self.settings, self.record.found
        names = [*(f"kt_moe {format}" for format in settings.format), *settings.peers]
        if settings.mode == "layer":
            self._fit(2 + sum(_COPIES.get(name, 1) for name in names))
        else:
            found["link_bytes_per_second"] = link_rate(torch.device(settings.device))
            gpu = torch.cuda.get_device_name() if settings.device == "cuda" else "no GPU"
            print(f"{gpu}, link {found['link_bytes_per_second'] / 1e9:.1f} GB/s, {settings.layers} layers")
        print(f"{settings.shape}; {settings.shape.weight_bytes / GIB:.2f} GiB a layer in bf16", flush=True)
        for threads, isa in itertools.product(settings.threads, settings.isa or [None]):
            try:
                runtime = kt_moe.Runtime(threads=threads, isa=isa)
            except ValueError as error:
                raise UserError(str(error)) from None
            self._time(names, runtime)
        self.record.write()
        return 0 if found["ok"] else 1

    def _fit(self, copies: int) -> None:
        """No more experts than half of the free memory holds: the original, one being packed, everyone's."""
        shape, free = self.settings.shape, free_memory()
        most = free // 2 // (copies * shape.expert_bytes)
        half = f"half of the {free / GIB:.1f} GiB of free memory holds {copies} times"
        if most < shape.topk:
            raise UserError(f"a token needs {shape.topk} experts, and {half} no more than {most}")
        if most < shape.experts:
            self.settings.shape = replace(shape, experts=most)
            text = f"{most} experts instead of {shape.experts}: what {half}; each gets more tokens so"
            self.record.note(text)

    def _attempt(self, name: str, call: Callable[..., _Made], *args: object) -> _Made | None:
        """What the call gives; None, with a note, where a rival fails, or ours for want of memory."""
        try:
            return call(*args)
        except RemoteError as error:
            if name.startswith("kt_moe") and not re.search("MemoryError|out of memory", str(error)):
                raise
            said = " ".join(str(error).split())[:200]
            if said.startswith("ModuleNotFoundError"):
                said += _INSTALL.get(name, "")
            self.record.note(f"{name} is left out: {said}")
            return None

    def _time(self, names: list[str], runtime: kt_moe.Runtime) -> None:
        """All cases on one runtime. Training steps one contestant after the other: few fit beside another."""
        settings, where = self.settings, {"isa": runtime.isa, "threads": runtime.threads}
        roof, l3 = None, kt_moe.cpu_info()["caches"]["l3"]
        print(f"\n{runtime.isa}, {runtime.threads} threads")
        if settings.mode == "layer":
            roof = ceilings.measure(runtime)
            self.record.found.setdefault("ceilings", []).append({**where, **roof})
            print(ceilings.ceilings_table(roof, runtime.threads), flush=True)
        groups, truth = [(names, settings.rank)], None
        if settings.mode == "step":
            groups = [([name], [rank]) for rank in settings.rank for name in names]
        else:
            layers = [loop_layer(make_weights(settings.shape, 0))] * settings.layers
            wide, residual = torch.float64, settings.mode == "gpu"
            truth = Stack(layers, lora_dtype=wide, dtype=wide, residual=residual)
        for group, ranks in groups:
            job = argparse.Namespace(**{**vars(settings), **where, "rank": ranks[0]})
            with ExitStack() as stack:
                made = self._make(stack, group, job)
                for rank, tokens in itertools.product(ranks, settings.tokens):
                    variants = variants_of(settings.shape, tokens, l3) if roof else 1
                    case = Case(settings.shape, tokens, rank, settings.routing, variants, settings.layers)
                    results = self._time_case(case, made, truth)
                    self._limit(results, case, roof)
                    self.record.add([{**found, **where} for found in results])
        if roof and (moved := ceilings.drift(roof, ceilings.measure(runtime))):
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in moved.items())
            self.record.note(f"ceilings at the end over those at first: {ratios}; do not trust the shares")

    def _make(self, stack: ExitStack, names: list[str], job: argparse.Namespace) -> dict[str, Any]:
        """Those that can be made, each in a process of its own."""
        made: dict[str, Any] = {}
        for name in names:
            for fewer in (0, 1) if name == "kt-kernel" and job.threads > 1 else (0,):
                own = f"{name}, {job.threads - 1} threads" if fewer else name  # its calling thread spins too
                settings = argparse.Namespace(**{**vars(job), "threads": job.threads - fewer})
                one = self._attempt(own, stack.enter_context, Remote(make, own, settings))
                if one is None:
                    break
                made[own] = one
        return made

    def _time_case(self, case: Case, made: dict[str, Any], truth: Stack | None) -> list[dict[str, Any]]:
        """Errors, on as many tokens as float64 has time for, then times: A, B, A, B, ...

        Whatever else the machine does falls on everyone alike.
        """
        settings, results = self.settings, []
        small, errors = case.limited_to(2e10 if settings.quick else 1e11), {}
        if truth is not None:
            truth.prepare(small)
            wanted = truth.outputs()

        def begin(name: str, one: Any) -> list[Step]:
            if truth is not None:
                one.prepare(small)
                errors[name] = relative_errors(one.outputs(), wanted)
            one.prepare(case)
            return []

        steps = {name: self._attempt(f"{name}, {case}", begin, name, one) for name, one in made.items()}
        seconds = 0.0 if settings.mode != "layer" else 0.05 if settings.quick else 0.15
        for _ in range(settings.reps):
            for name in (name for name, taken in steps.items() if taken is not None):
                more = self._attempt(f"{name}, {case}", made[name].turn, case.variants, seconds)
                steps[name] = None if more is None else (steps[name] or []) + more
        for name, taken in steps.items():
            if taken is None:
                continue
            found: dict[str, Any] = {"who": name, "tokens": case.tokens, "rank": case.rank}
            passes = ("forward", "backward") if len(taken[0]) == 2 else ()
            columns = zip(passes, zip(*taken, strict=True), strict=False)
            found["seconds"] = {"both": spread(list(map(sum, taken))), **{n: spread(c) for n, c in columns}}
            found["tokens_per_second"] = case.tokens / found["seconds"]["both"]["median"]
            found |= made[name].figures()
            if name in errors:
                worst = float(np.max([*errors[name].values()]))  # not a number if one of them is not
                found |= {"errors": errors[name], "worst_error": worst}
                limit = _WORST_ERROR[settings.mode] if name == "kt_moe bf16" else np.inf
                if name.startswith("kt_moe") and not worst <= limit:
                    self.record.fault(f"{name}, {case}: an output is off: {errors[name]}")
            results.append(found)
        return results

    def _limit(self, results: list[dict[str, Any]], case: Case, roof: ceilings.Ceilings | None) -> None:
        """What the machine allows: by its ceilings, or by its link and the GPU alone."""
        resident = next((r["seconds"]["both"]["median"] for r in results if r["who"] == "resident"), 0.0)
        touched = make_inputs(replace(case, rank=0)).touched if roof else 0.0
        for found in results:
            took = {name: seconds["median"] for name, seconds in found["seconds"].items()}
            limits: dict[str, float] = {}
            if roof is not None:
                found |= {"flops": case.flops(), "bytes": case.bytes(touched), "experts_touched": touched}
                found |= {f"{n}_per_second": found[n]["both"] / took["both"] for n in ("flops", "bytes")}
                found["bound"], limits = ceilings.bound(case, touched, roof)
            elif "link_bytes" in found:
                found["link_bytes_per_second"] = found["link_bytes"] / took["both"]
                link = found["link_bytes"] / self.record.found["link_bytes_per_second"]
                limits = {"both": max(link, resident)}
            if limits:
                found["limit_seconds"] = limits
                found["share_of_limit"] = {name: limit / took[name] for name, limit in limits.items()}


def relative_errors(outputs: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of each output there is; not a number where an output is not finite."""
    norm = np.linalg.norm
    return {n: float(norm(x - truth[n]) / max(norm(truth[n]), 1e-30)) for n, x in outputs.items()}
