"""The order of things: what is there, yardsticks, contestants in turn, and what is written at the end."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import itertools
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor

import kt_moe
from kt_moe.cli.bench import cases, contestants, options, yardsticks
from kt_moe.cli.bench.cases import GIB, MIB, Case, Shape, Weights
from kt_moe.cli.bench.contestants import Contestant
from kt_moe.cli.bench.remote import Remote, RemoteError
from kt_moe.cli.bench.report import ceilings_table, results_table
from kt_moe.cli.errors import UserError
from kt_moe.cli.output import write_json
from kt_moe.host_memory import free_memory, resident

SCHEMA = 4  # of the JSON; grows when a key changes its meaning or goes
_PACKAGES = {  # that a rival needs: what to import, and what brings it
    "kt-kernel": ("kt_kernel", "kt-kernel==0.7.2"),
    "roundpipe": ("roundpipe", "roundpipe==0.1.1"),
}
_WORST_ERROR = {"layer": 0.02, "gpu": 0.05}  # relative L2, of bf16 experts; they leave about 0.005 a layer
_Made = TypeVar("_Made")


def run(args: argparse.Namespace) -> int:
    """Time what the options ask for; exit status 1 if an output of ours was wrong."""
    return _Session(options.read(args), args.command_line).run()


class _Session:
    """One run; `record` is what the JSON holds."""

    def __init__(self, settings: argparse.Namespace, command_line: list[str]) -> None:
        self.settings, self.shape, self.wrong = settings, settings.shape, False
        self.notes: list[str] = []
        self.device = torch.device("cpu" if settings.mode == "layer" else settings.device)
        versions = {"kt_moe": kt_moe.__version__, "python": platform.python_version()}
        for name in ("torch", "triton", "transformers", "peft", "kt-kernel", "roundpipe"):
            if importlib.util.find_spec(name.replace("-", "_")) is not None:
                versions[name] = metadata.version(name)
        info = kt_moe.cpu_info()
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["kt-moe", *command_line]),
            "machine": {n: info[n] for n in ("model", "cores", "numa_nodes", "caches", "isa_features")},
            "load_average": os.getloadavg()[0],  # before we load it ourselves
            "versions": versions,
            "settings": {k: v for k, v in vars(settings).items() if k not in ("json", "shape")},
            "results": [],
        }

    def run(self) -> int:
        record, settings = self.record, self.settings
        print(f"{record['command']}, {record['date']}")
        print(", ".join(f"{name} {version}" for name, version in record["versions"].items()))
        print(f"{record['machine']['model']}, load average: {record['load_average']:.1f}")
        self.peers = [name for name in settings.peers if self._installed(name)]
        if settings.mode == "layer":
            self._fit()
        else:
            record["link_bytes_per_second"] = yardsticks.link_rate(self.device)
            gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "no GPU"
            print(f"{gpu}, link {record['link_bytes_per_second'] / 1e9:.1f} GB/s, {settings.layers} layers")
        print(f"{self.shape}; {self.shape.weight_bytes / GIB:.2f} GiB a layer in bf16", flush=True)
        for threads, isa in itertools.product(settings.threads, settings.isa or [None]):
            try:
                runtime = kt_moe.Runtime(threads=threads, isa=isa)
            except ValueError as error:
                raise UserError(str(error)) from None
            self._time_steps(runtime) if settings.mode == "step" else self._time_layers(runtime)
        print(f"\npeak {resident('VmHWM') / MIB:.0f} MiB resident")
        self._write()
        return int(self.wrong)

    def note(self, text: str) -> None:
        """Say once what the reader of the figures should know."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"  note: {text}", flush=True)

    def fault(self, text: str) -> None:
        """An output of ours was wrong: the run ends in exit status 1."""
        self.wrong = True
        self.note(f"WRONG, {text}")

    def _attempt(self, name: str, call: Callable[..., _Made], *args: object) -> _Made | None:
        """What the call gives; None, with a note, where a rival's process or the memory fails."""
        try:
            return call(*args)
        except (RemoteError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "out of memory" not in str(error):
                raise
            self.note(f"{name} is left out: {' '.join(str(error).split())[:200] or type(error).__name__}")
            return None

    def _installed(self, peer: str) -> bool:
        module, requirement = _PACKAGES.get(peer, ("torch", ""))
        found = importlib.util.find_spec(module) is not None
        if not found:
            self.note(f"{peer}: not installed; try: pip install {requirement}")
        return found

    def _fit(self) -> None:
        """No more experts than memory holds: the original, a copy for each format, and those of rivals."""
        copies = 1 + len(self.settings.format) + sum(6 if peer == "kt-kernel" else 2 for peer in self.peers)
        free, wanted = free_memory(), self.shape.experts
        self.shape = cases.fit_experts(self.shape, copies, free)
        if self.shape.experts < wanted:
            self.note(
                f"{self.shape.experts} experts instead of {wanted}: what half of the {free / GIB:.1f} GiB of "
                f"free memory holds {copies} times; each gets more tokens so"
            )

    def _names(self) -> list[str]:
        return [*(f"kt_moe {format}" for format in self.settings.format), *self.peers]

    def _time_layers(self, runtime: kt_moe.Runtime) -> None:
        """All cases on one runtime: of a layer on the CPU, or of a stack of them on CPU and GPU."""
        settings, weights = self.settings, cases.make_weights(self.shape, 0)
        here = {"isa": runtime.isa, "threads": runtime.threads}
        ceilings, l3 = None, kt_moe.cpu_info()["caches"]["l3"]
        print(f"\n{runtime.isa}, {runtime.threads} threads")
        if settings.mode == "layer":
            ceilings = yardsticks.ceilings(runtime)
            self.record.setdefault("ceilings", []).append({**here, **ceilings})
            print(ceilings_table(ceilings, runtime.threads), flush=True)
        with ExitStack() as stack:
            made = self._contestants(stack, weights, runtime)
            for rank, tokens in itertools.product(settings.rank, settings.tokens):
                variants = cases.variants_of(self.shape, tokens, l3) if ceilings else 1
                case = Case(self.shape, tokens, rank, settings.routing, variants, settings.layers or 1)
                results = [{**found, **here} for found in self._time_case(case, made, weights, ceilings)]
                self.record["results"] += results
                self._show(results)
        if ceilings and (moved := yardsticks.drift(ceilings, yardsticks.ceilings(runtime))):
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in moved.items())
            self.note(f"ceilings at the end over those at the start: {ratios}; do not trust the shares")

    def _contestants(self, stack: ExitStack, weights: Weights, runtime: kt_moe.Runtime) -> dict[str, Any]:
        """Those that can be made: rivals on the CPU in processes of their own, all others here."""
        settings, made = self.settings, {}
        for name in self._names():
            if settings.mode == "layer" and name in self.peers:
                # kt-kernel's calling thread spins beside its pool, so it is also tried with a thread less.
                for threads in range(
                    runtime.threads, max(0, runtime.threads - 1 - (name == "kt-kernel")), -1
                ):
                    own = name if threads == runtime.threads else f"{name}, {threads} threads"
                    remote = Remote(make_peer, name, self.shape, threads, max(settings.tokens))
                    made[own] = self._attempt(own, stack.enter_context, remote)
            else:
                made[name] = self._attempt(name, self._make, name, weights, runtime)
        return {name: one for name, one in made.items() if one is not None}

    def _make(self, name: str, weights: Weights, runtime: kt_moe.Runtime) -> Contestant:
        """A contestant of this process, with a first step on a GPU behind it."""
        settings, layers, format = self.settings, self.settings.layers or 1, name.partition(" ")[2]
        if settings.mode == "layer":
            return self._kt_moe(weights, runtime, format, "off")
        gc.collect()
        before = contestants.allocated(self.device)
        place: dict[str, Any] = {"device": settings.device, "residual": True, "lora_device": settings.device}
        made: Contestant
        if name == "streamed":
            made = contestants.Grouped(contestants.Streamed(weights, layers, self.device), True, **place)
        elif name == "resident":
            base = [contestants.fuse(weights, device=self.device) for _ in range(layers)]
            made = contestants.Grouped(base, True, **place)
        else:
            memory, share = settings.gpu_memory, settings.cpu_share
            if name == "kt_moe-resident":
                memory, share = f"{layers * self.shape.weight_bytes / GIB * 1.1 + 1:.0f}GiB", 0.0
            gpu = "off" if name == "cpu" else kt_moe.Gpu(settings.device, memory, share)
            place["lora_device"] = "cpu" if name == "cpu" else settings.lora_device
            format = format or settings.format[0]
            made = self._kt_moe(weights, runtime, format, gpu, **place)
        made.prepare(Case(self.shape, min(settings.tokens), settings.rank[0], layers=layers))
        made.step(0)
        made.standing = contestants.allocated(self.device) - before
        return made

    def _kt_moe(
        self, weights: Weights, runtime: kt_moe.Runtime, format: str, gpu: Any, **place: Any
    ) -> Contestant:
        experts = [
            kt_moe.Experts(*weights, format=format, runtime=runtime, gpu=gpu)
            for _ in range(self.settings.layers or 1)
        ]
        for one in experts:
            one.recompute = self.settings.recompute
        return contestants.KtMoe(experts, gpu, **place)

    def _time_case(
        self, case: Case, made: dict[str, Any], weights: Weights, ceilings: yardsticks.Ceilings | None
    ) -> list[dict[str, Any]]:
        """Errors, on as many tokens as float64 has time for, then times: A, B, A, B, ...

        Whatever else the machine does falls on everyone alike.
        """
        small = case.limited_to(2e10 if self.settings.quick else 1e11)
        truth = contestants.Truth(weights, residual=ceilings is None)
        inputs, _ = truth.prepare(small), truth.step(0)
        wanted, errors, marks = truth.outputs(), {}, {}

        def begin(name: str, one: Any) -> None:
            if one.prepare(small) != inputs:
                raise RemoteError("made other inputs than kt_moe")
            self._outputs(name, small, one)
            errors[name] = relative_errors(one.outputs(), wanted)
            one.prepare(case)
            marks[name] = self._outputs(name, case, one)

        for name, one in made.items():
            self._attempt(f"{name}, {case}", begin, name, one)
        steps: dict[str, list[contestants.Step]] = {name: [] for name in marks}
        seconds = 0.0 if ceilings is None else 0.05 if self.settings.quick else 0.15
        for _ in range(self.settings.reps):
            for name in list(steps):
                more = self._attempt(f"{name}, {case}", made[name].turn, case.variants, seconds)
                steps[name] += more or []
                if more is None:
                    del steps[name]
        ours = "kt_moe bf16"
        if ceilings and ours in steps and self._outputs(ours, case, made[ours]) != marks[ours]:
            self.fault(f"{ours}, {case}: the last step's outputs are not the first one's")
        results = []
        for name in steps:
            forward, backward = (list(column) for column in zip(*steps[name], strict=True))
            seconds_of = {"forward": forward, "backward": backward, "both": list(map(sum, steps[name]))}
            found = {"errors": errors[name], "worst_error": max(errors[name].values())}
            results.append(_result(name, case, seconds_of, found | made[name].figures()))
        return self._with_limits(results, case, ceilings)

    def _outputs(self, name: str, case: Case, one: Any) -> list[int]:
        """Those of a step, as a digest; on the CPU it finds NaN in memory that it has not written."""
        with poisoned() if self.settings.mode == "layer" else nullcontext():
            one.step(0)
        outputs = one.outputs()
        bad = [name for name, tensor in outputs.items() if not bool(tensor.isfinite().all())]
        if bad and name.startswith("kt_moe"):
            self.fault(f"{name}, {case}: not finite: {', '.join(bad)}")
        return cases.digest(outputs)

    def _with_limits(
        self, results: list[dict[str, Any]], case: Case, ceilings: yardsticks.Ceilings | None
    ) -> list[dict[str, Any]]:
        """Faults of ours, and what the machine allows: by its ceilings, or by its link and the GPU alone."""
        resident = next((r["seconds"]["both"]["median"] for r in results if r["who"] == "resident"), 0.0)
        touched = cases.make_inputs(case).touched
        for found in results:
            ours = found["who"] == "kt_moe bf16"
            if ours and not found["worst_error"] <= _WORST_ERROR[self.settings.mode]:
                self.fault(f"{found['who']}, {case}: an output is off: {found['errors']}")
            took = {name: seconds["median"] for name, seconds in found["seconds"].items()}
            if ceilings is not None:
                found |= {"flops": case.flops(), "bytes": case.bytes(touched), "experts_touched": touched}
                found |= {f"{n}_per_second": found[n]["both"] / took["both"] for n in ("flops", "bytes")}
                found["bound"], found["limit_seconds"] = yardsticks.bound(case, touched, ceilings)
            elif "link_bytes" in found:
                found["link_bytes_per_second"] = found["link_bytes"] / took["both"]
                link = found["link_bytes"] / self.record["link_bytes_per_second"]
                found["limit_seconds"] = {"both": max(link, resident)}
            limits = found.get("limit_seconds", {})
            found["share_of_limit"] = {name: limit / took[name] for name, limit in limits.items()}
        return results

    def _time_steps(self, runtime: kt_moe.Runtime) -> None:
        """Each contestant in a process of its own, one after the other: few fit beside another."""
        from kt_moe.cli.bench.training import Trainer  # transformers and PEFT, which take seconds to import

        settings, results = self.settings, self.record["results"]
        for rank, name in itertools.product(settings.rank, self._names()):
            job = argparse.Namespace(**{**vars(settings), "rank": rank, "threads": runtime.threads})
            with ExitStack() as stack:
                trainer: Any = self._attempt(name, stack.enter_context, Remote(Trainer, name, job))
                for tokens in settings.tokens if trainer is not None else ():
                    found = self._attempt(f"{name}, {tokens} tokens", trainer.run, tokens)
                    if found is not None:
                        case = Case(self.shape, found["tokens"], rank, layers=settings.layers)
                        results.append(_result(name, case, {"both": found.pop("seconds")}, found))
                        print(results_table(results[-1:]), flush=True)
                        self._write()
        for tokens in dict.fromkeys(found["tokens"] for found in results):
            self._show([found for found in results if found["tokens"] == tokens])

    def _show(self, results: Sequence[dict[str, Any]]) -> None:
        """Print results of one case, in the order of the contestants, with their times over others'."""
        plain = {(r["who"], r["tokens"]): r for r in self.record["results"] if r["rank"] == 0}
        for found in results:
            others = {"first": results[0], "rank_0": plain.get((found["who"], found["tokens"]))}
            for name, other in others.items():
                if other is not None:
                    ratio = found["seconds"]["both"]["median"] / other["seconds"]["both"]["median"]
                    found[f"time_over_{name}"] = ratio
        self._write()
        if results:
            print(f"\n{results_table(results)}", flush=True)

    def _write(self) -> None:
        if self.settings.json is not None:
            found = {**self.record, "layer": asdict(self.shape), "notes": self.notes, "ok": not self.wrong}
            write_json(self.settings.json, found)


def make_peer(name: str, shape: Shape, threads: int, max_tokens: int) -> Contestant:
    """A rival of a layer on the CPU, in its process."""
    torch.set_num_threads(threads)
    weights = cases.make_weights(shape, 0)
    if name == "kt-kernel":
        return contestants.KtKernel(weights, threads, max_tokens)
    if name == "torch":
        return contestants.TorchLoop(weights)
    made = contestants.Grouped([contestants.fuse(weights)], recompute=False)
    made.lora_dtype = torch.bfloat16
    return made


def relative_errors(outputs: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each output there is; not a number where an output is not finite."""
    return {
        name: float((tensor.cpu().double() - truth[name]).norm() / truth[name].norm().clamp(min=1e-30))
        for name, tensor in outputs.items()
    }


@contextmanager
def poisoned() -> Iterator[None]:
    """Within `with`, fresh tensors hold NaN until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what makes torch fill memory it has just taken
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _result(who: str, case: Case, seconds: dict[str, list[float]], more: dict[str, Any]) -> dict[str, Any]:
    spreads = {name: yardsticks.spread(samples) for name, samples in seconds.items()}
    found = {"who": who, "tokens": case.tokens, "rank": case.rank, "seconds": spreads}
    return {**found, "tokens_per_second": case.tokens / spreads["both"]["median"], **more}
