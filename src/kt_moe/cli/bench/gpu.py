"""`kt-moe bench --gpu`: everyone in turn in one run, a table, and what was measured as JSON."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import platform
import shlex
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import kt_moe
from kt_moe.cli.bench import ceilings, gpu_options
from kt_moe.cli.bench.ceilings import Spread
from kt_moe.cli.bench.data import Weights, draw_routes, make_lora, make_weights
from kt_moe.cli.bench.gpu_options import GpuSettings
from kt_moe.cli.bench.gpu_stack import (
    KtStack,
    Resident,
    Stack,
    StackInputs,
    Streamed,
    TorchStack,
    synchronize,
)
from kt_moe.cli.bench.gpu_step import StepJob, run_in_child
from kt_moe.cli.bench.layer import GIB, Case
from kt_moe.cli.bench.peer_process import PeerError
from kt_moe.cli.bench.report import OURS, milliseconds, percent
from kt_moe.cli.bench.trial import Notes
from kt_moe.cli.output import write_json
from kt_moe.cli.text import table

SCHEMA = 1  # of the JSON; grows when a key changes its meaning or goes
_LINK_BYTES = 512 << 20
_FAILURES = (MemoryError, RuntimeError)  # torch's memory errors are RuntimeErrors
_WORST_DISTANCE = 0.05  # relative L2, of two bf16 results after some layers


def run(args: argparse.Namespace) -> int:
    """Time what the options ask for; exit status 1 if an output of ours was wrong."""
    return _Bench(gpu_options.read(args), args.command_line).run()


@dataclass
class _Contestant:
    """A stack, what it takes on the GPU between steps, and what its turns at a case gave."""

    stack: Stack
    standing: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    moved: list[int] = field(default_factory=list)
    gpu_bytes: int = 0


class _Bench:
    def __init__(self, settings: GpuSettings, command_line: list[str]) -> None:
        self.settings, self.shape = settings, settings.shape
        self.device = torch.device(settings.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.notes = Notes()
        self.link = link_rate(self.device)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "no GPU"
        versions = {"kt_moe": kt_moe.__version__, "python": platform.python_version()}
        for package in ("torch", "triton", *(["transformers", "peft", "roundpipe"] if settings.step else [])):
            if importlib.util.find_spec(package) is not None:
                versions[package] = metadata.version(package)
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["kt-moe", *command_line]),
            "machine": {**ceilings.machine(), "gpu": name},
            "versions": versions,
            "settings": {k: v for k, v in asdict(settings).items() if k != "json"},
            "link_bytes_per_second": self.link,
            "results": [],
        }

    def run(self) -> int:
        shape, machine = self.shape, self.record["machine"]
        print(f"kt-moe bench --gpu, {self.record['date']}")
        print(", ".join(f"{name} {version}" for name, version in self.record["versions"].items()))
        print(
            f"{machine['gpu']}, link {self.link / 1e9:.1f} GB/s; {machine['model']}, {machine['cores']} CPUs"
        )
        print(
            f"{shape.name}: H {shape.hidden}, I {shape.intermediate}, E {shape.experts}, K {shape.topk}; "
            f"{self.settings.layers} layers of {shape.weight_bytes / GIB:.2f} GiB in bf16, LoRA r "
            f"{self.settings.rank}",
            flush=True,
        )
        if self.settings.step:
            self._time_steps()
        else:
            self._time_stacks()
        self._write()
        return int(self.notes.wrong)

    def _write(self) -> None:
        if self.settings.json is not None:
            found = {**self.record, "notes": self.notes.texts, "ok": not self.notes.wrong}
            write_json(self.settings.json, found)

    def _time_stacks(self) -> None:
        contestants = self._build()
        for tokens in self.settings.tokens:
            for contestant in contestants:
                contestant.seconds, contestant.moved, contestant.gpu_bytes = {}, [], 0
            inputs = [self._inputs(tokens)]
            for _ in range(self.settings.reps):
                if self.settings.new_routes:
                    inputs = [self._inputs(tokens), self._inputs(tokens)]
                for contestant in list(contestants):
                    try:
                        self._turn(contestant, inputs)
                    except _FAILURES as error:
                        self._leave_out(contestant.stack.name, error)
                        contestants.remove(contestant)
            self._check(contestants, tokens)
            results = self._results(contestants, tokens)
            self.record["results"] += results
            _print_table([_stack_row(found, results[0]) for found in results])
            self._write()

    def _build(self) -> list[_Contestant]:
        """Everyone asked for that fits, after a first step."""
        weights = make_weights(self.shape, self.settings.seed)
        lora = make_lora(self.shape, self.settings.rank, self.settings.seed)
        built = []
        for name in [f"{OURS} {format}" for format in self.settings.formats] + self.settings.peers:
            begin, before = time.perf_counter(), self._allocated()
            try:
                stack = self._make(name, weights, lora)
                stack.step(self._inputs(min(self.settings.tokens)))
            except _FAILURES as error:
                self._leave_out(name, error)
                continue
            print(f"  {name}: made in {time.perf_counter() - begin:.0f} s", flush=True)
            built.append(_Contestant(stack, self._allocated() - before))
        return built

    def _make(self, name: str, weights: Weights, lora: dict[str, Tensor]) -> Stack:
        settings, layers, first = self.settings, self.settings.layers, self.settings.formats[0]
        ours = partial(KtStack, name, weights, lora, settings)
        if name == "streamed":
            return TorchStack(name, Streamed(weights, layers, self.device), lora, settings)
        if name == "resident":
            return TorchStack(name, Resident(weights, layers, self.device), lora, settings)
        if name == "cpu":
            return ours(first, "off")
        if name == f"{OURS}-resident":
            whole = f"{layers * self.shape.weight_bytes / GIB * 1.1 + 1:.0f}GiB"
            return ours(first, settings.gpu(whole, 0.0))
        return ours(name.removeprefix(f"{OURS} "), settings.gpu())

    def _leave_out(self, name: str, error: Exception) -> None:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise error
        self.notes.note(f"{name} is left out: {' '.join(str(error).split())[:200] or type(error).__name__}")

    def _inputs(self, tokens: int) -> StackInputs:
        case = Case(self.shape, tokens, self.settings.rank, self.settings.routing)
        x = torch.randn(tokens, self.shape.hidden, generator=self.generator).bfloat16()
        routes = [draw_routes(case, self.generator) for _ in range(self.settings.layers)]
        return StackInputs(
            x.to(self.device).requires_grad_(),
            [ids.to(self.device) for ids, _ in routes],
            [weights.to(self.device).requires_grad_() for _, weights in routes],
            (x * 0.1).to(self.device),
        )

    def _turn(self, contestant: _Contestant, inputs: list[StackInputs]) -> None:
        """An untimed step, which wakes caches, clocks and threads, and a timed one."""
        stack = contestant.stack
        stack.step(inputs[-1])
        before, moved = self._allocated(), stack.moved
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        forward, backward = stack.step(inputs[0])
        for name, seconds in (("forward", forward), ("backward", backward), ("both", forward + backward)):
            contestant.seconds.setdefault(name, []).append(seconds)
        if moved is not None and stack.moved is not None:
            contestant.moved.append(stack.moved - moved)
        taken = self._allocated(peak=True) - before + contestant.standing
        contestant.gpu_bytes = max(contestant.gpu_bytes, taken)

    def _allocated(self, peak: bool = False) -> int:
        """Bytes of tensors on the device now, or the most since the peak was reset."""
        if self.device.type != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated(self.device)
        gc.collect()
        return torch.cuda.memory_allocated(self.device)

    def _check(self, contestants: list[_Contestant], tokens: int) -> None:
        """Outputs of the last step are finite, and those of bf16 experts about the same."""
        outs = {c.stack.name: c.stack.out for c in contestants if c.stack.out is not None}
        self.notes.check_finite(f"{tokens} tokens", outs)
        theirs = next((outs[name].float() for name in ("resident", "streamed") if name in outs), None)
        ours = {f"{OURS} bf16", *([f"{OURS}-resident"] if self.settings.formats[0] == "bf16" else [])}
        if theirs is None:
            return
        for name in ours & set(outs):
            distance = float((outs[name].float() - theirs).norm() / theirs.norm())
            if not distance < _WORST_DISTANCE:
                self.notes.fault(f"{name}, {tokens} tokens: {distance:.3f} from plain torch")

    def _results(self, contestants: list[_Contestant], tokens: int) -> list[dict[str, Any]]:
        """As JSON takes them.

        `limit_seconds` is what the link needs for the bytes that were moved, or the GPU with everything
        resident, whichever is longer; None where neither is known.
        """
        spreads = {c.stack.name: {n: Spread.of(s) for n, s in c.seconds.items()} for c in contestants}
        resident = spreads["resident"]["both"].median if "resident" in spreads else 0.0
        results = []
        for contestant in contestants:
            seconds = spreads[contestant.stack.name]
            both, moved = seconds["both"].median, None
            if contestant.moved:
                moved = sum(contestant.moved) / len(contestant.moved)
            limit = None if moved is None else max(moved / self.link, resident) or None
            results.append({
                "who": contestant.stack.name,
                "tokens": tokens,
                "seconds": {name: asdict(spread) for name, spread in seconds.items()},
                "tokens_per_second": tokens / both,
                "link_bytes": moved,
                "link_bytes_per_second": None if moved is None else moved / both,
                "cpu_rows": contestant.stack.cpu_rows,
                "gpu_bytes": contestant.gpu_bytes,
                "limit_seconds": limit,
                "share_of_limit": None if limit is None else limit / both,
            })  # fmt: skip
        return results

    def _time_steps(self) -> None:
        settings = replace(self.settings, json=None)
        jobs = [StepJob(OURS, format, settings) for format in settings.formats]
        jobs += [StepJob(peer, settings.formats[0], settings) for peer in settings.peers]
        for job in jobs:
            if job.who == "roundpipe" and job.who not in self.record["versions"]:
                self.notes.note(f"{job.who}: not installed; try: pip install roundpipe==0.1.1")
                continue
            print(f"  {job.name} ...", flush=True)
            try:
                found = run_in_child(job)
            except PeerError as error:
                self.notes.note(f"{job.name}: {error}")
                continue
            self.record["results"] += found
            self._write()
            _print_table([_step_row(one) for one in found])
        print("\nby tokens:")
        _print_table(
            [_step_row(one) for one in sorted(self.record["results"], key=lambda one: one["tokens"])]
        )


def _stack_row(found: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    seconds = found["seconds"]
    both, limit, rate = seconds["both"], found["limit_seconds"], found["link_bytes_per_second"]
    return {
        "tokens": str(found["tokens"]),
        "who": found["who"],
        **{f"{name} ms": milliseconds(spread["median"]) for name, spread in seconds.items()},
        "IQR": milliseconds(both["q3"] - both["q1"]),
        "tokens/s": f"{found['tokens_per_second']:.0f}",
        "over first": f"{both['median'] / first['seconds']['both']['median']:.2f}x",
        "CPU rows": "-" if found["cpu_rows"] is None else percent(found["cpu_rows"]),
        "link GB/s": "-" if rate is None else f"{rate / 1e9:.1f}",
        "GPU GiB": f"{found['gpu_bytes'] / GIB:.2f}",
        "limit ms": "-" if limit is None else milliseconds(limit),
        "share": "-" if limit is None else percent(found["share_of_limit"]),
    }


def _step_row(found: dict[str, Any]) -> dict[str, str]:
    spread = Spread.of(found["seconds"])
    return {
        "tokens": str(found["tokens"]),
        "who": found["who"],
        "s/step": f"{spread.median:.3f}",
        "IQR": f"{spread.iqr:.3f}",
        "tokens/s": f"{found['tokens'] / spread.median:.0f}",
        "GPU GiB": f"{found['gpu_bytes'] / GIB:.1f}",
        "host GiB": f"{found['host_bytes'] / GIB:.1f}",
        "made in s": f"{found['build_seconds']:.0f}",
        "loss": f"{found['losses'][-1]:.3f}",
    }


def _print_table(rows: list[dict[str, str]]) -> None:
    if rows:
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        print("\n" + table(cells, right=(0, *range(2, len(rows[0])))), flush=True)


def link_rate(device: torch.device) -> float:
    """Bytes a second from page-locked memory to the device, the median of five copies of 512 MiB."""
    cuda = device.type == "cuda"
    size = _LINK_BYTES if cuda else 1 << 20
    host = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(6):
        synchronize(device)
        begin = time.perf_counter()
        there.copy_(host, non_blocking=True)
        synchronize(device)
        rates.append(size / (time.perf_counter() - begin))
    return Spread.of(rates[1:]).median
