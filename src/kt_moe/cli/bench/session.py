"""The order of things: what is there, ceilings, cases, and what is written at the end."""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import resource
import shlex
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch

import kt_moe
from kt_moe.cli.bench import ceilings, options, report, summary
from kt_moe.cli.bench.contestants import KtMoe
from kt_moe.cli.bench.data import Weights, make_inputs, make_weights
from kt_moe.cli.bench.layer import GIB, Case, fit_experts, variants_of
from kt_moe.cli.bench.peer_process import PeerError, PeerProcess
from kt_moe.cli.bench.peers import PEERS, Job
from kt_moe.cli.bench.report import Result
from kt_moe.cli.bench.roofline import plot_roofline
from kt_moe.cli.bench.trial import Notes, Trials
from kt_moe.cli.errors import UserError
from kt_moe.cli.output import write_json
from kt_moe.host_memory import free_memory

SCHEMA = 3  # of the JSON; grows when a key changes its meaning or goes


def run(args: argparse.Namespace) -> int:
    """Time what the options ask for; exit status 1 if an output of ours was wrong."""
    return _Bench(options.read(args), args.command_line).run()


class _Bench:
    def __init__(self, settings: options.Settings, command_line: list[str]) -> None:
        self.settings, self.command = settings, shlex.join(["kt-moe", *command_line])
        self.shape = settings.shape
        self.versions = {"kt_moe": kt_moe.__version__, "torch": torch.__version__}
        self.versions["python"] = platform.python_version()
        self.machine = ceilings.machine()  # before we load it ourselves
        self.notes = Notes()
        self.peers: dict[str, str] = {}  # installed ones and their versions
        self.ceilings: list[dict[str, Any]] = []
        self.results: list[Result] = []
        self.comparisons: list[dict[str, Any]] = []
        self.lora_costs: list[dict[str, Any]] = []
        self.memory: dict[str, Any] = {}

    def run(self) -> int:
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        print(f"kt-moe bench, {started}")
        self._find_peers()
        self._fit()
        runtimes = [
            self._runtime(*pair) for pair in itertools.product(self.settings.threads, self.settings.isas)
        ]
        self._introduce()
        weights = make_weights(self.shape, self.settings.seed)
        for runtime in runtimes:
            self._measure(runtime, weights)
        self._conclude()
        if self.settings.json is not None:
            write_json(self.settings.json, self._to_dict(started))
        if self.settings.plot is not None:
            plot_roofline(self.results, self.settings.plot, f"{self.shape.name}, E = {self.shape.experts}")
        return int(self.notes.wrong)

    def _find_peers(self) -> None:
        for name in self.settings.peers:
            try:
                self.peers[name] = PEERS[name].version()
            except ValueError as error:
                self.notes.note(f"{name}: {error}")

    def _fit(self) -> None:
        """Fits the shape to memory."""
        copies = 2 + sum(PEERS[name].copies for name in self.peers)  # ours: the original and the packed one
        free, wanted = free_memory(), self.shape.experts
        self.shape = fit_experts(self.shape, copies, free)
        if self.shape.experts < wanted:
            self.notes.note(
                f"{self.shape.experts} experts instead of {wanted}: what half of the {free / GIB:.1f} GiB of "
                f"free memory holds {copies} times; each gets more tokens so"
            )

    @staticmethod
    def _runtime(threads: int | None, isa: str | None) -> kt_moe.Runtime:
        try:
            return kt_moe.Runtime(threads=threads, isa=isa)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _introduce(self) -> None:
        shape, machine = self.shape, self.machine
        print(", ".join(f"{name} {version}" for name, version in {**self.versions, **self.peers}.items()))
        print(
            f"{machine['model']}, CPUs: {machine['cores']}, memory nodes: {machine['numa_nodes']}, "
            f"load average: {machine['load_average']:.1f}"
        )
        print(
            f"{shape.name}: H {shape.hidden}, I {shape.intermediate}, E {shape.experts}, K {shape.topk}; "
            f"bf16 weights, {self.settings.lora_dtype} LoRA, {self.settings.routing} routing"
            + (", G and U recomputed" if self.settings.recompute else "")
        )

    def _add_ceilings(self, runtime: kt_moe.Runtime, found: ceilings.Ceilings) -> None:
        self.ceilings.append({"isa": runtime.isa, "threads": runtime.threads, **asdict(found)})

    def _measure(self, runtime: kt_moe.Runtime, weights: Weights) -> None:
        """All cases of one runtime."""
        found = ceilings.measure(runtime)
        self._add_ceilings(runtime, found)
        print(f"\n{runtime.isa}, {runtime.threads} threads; ceilings:")
        print(summary.ceiling_lines(found, runtime.threads))
        ours = KtMoe(weights, runtime, self.settings.recompute)
        self.memory["weight_bytes"] = ours.experts.nbytes
        self.memory["weight_ratio"] = ours.experts.nbytes / self.shape.weight_bytes
        trials = Trials(self.settings, weights, self.notes)
        place = {"isa": runtime.isa, "threads": runtime.threads, "ceilings": found}
        l3 = kt_moe.cpu_info()["caches"]["l3"]
        results: list[Result] = []
        with ExitStack() as stack:
            rivals = self._start_rivals(stack, runtime)
            print(f"\n{report.header()}")
            for rank, tokens in itertools.product(self.settings.ranks, self.settings.tokens):
                variants = variants_of(self.shape, tokens, l3)
                case = Case(
                    self.shape, tokens, rank, self.settings.routing, self.settings.lora_dtype, variants
                )
                mine, *others = trials.run(case, ours, rivals, place)
                results += [mine, *others]
                print("\n".join(report.rows(r) for r in (mine, *others)), flush=True)
                if others:
                    compared = summary.compare(mine, others)
                    self.comparisons += compared
                    print(summary.speed_lines(compared), flush=True)
        self.notes.note_drift(found, ceilings.measure(runtime))
        self.results += results
        if costs := summary.lora_costs(results):
            self.lora_costs += costs
            print(f"\nLoRA, time over that of rank 0:\n{summary.lora_lines(costs)}", flush=True)
        del ours  # before the next one takes its memory
        self._compare_scratch(results, runtime, weights)

    def _compare_scratch(self, results: list[Result], runtime: kt_moe.Runtime, weights: Weights) -> None:
        """The most scratch a case needs, and what it needs with as few experts as can be."""
        mine = [result for result in results if result.scratch]
        largest = max(mine, key=lambda result: max(result.scratch.values()))
        few, found = self.shape.topk, max(largest.scratch.values())
        scratch = {"bytes": found, "tokens": largest.case.tokens, "rank": largest.case.rank}
        if "scratch" in self.memory and self.memory["scratch"]["bytes"] >= found:
            return
        fewer: dict[str, int] | None = None
        if few < self.shape.experts:
            gate, up, down = weights
            ours = KtMoe((gate[:few], up[:few], down[:few]), runtime, self.settings.recompute)
            case = replace(largest.case, shape=replace(self.shape, experts=few), variants=1)
            ours.prepare(make_inputs(case, self.settings.seed))
            fewer = {"experts": few, "bytes": max(ours.scratch().values())}
        self.memory["scratch"] = {**scratch, "experts": self.shape.experts, "fewer_experts": fewer}

    def _start_rivals(self, stack: ExitStack, runtime: kt_moe.Runtime) -> list[PeerProcess]:
        """kt-kernel's calling thread spins beside its pool, so it is also tried with a thread less."""
        rivals = []
        for name in self.peers:
            fewer = (
                {runtime.threads, max(1, runtime.threads - 1)} if name == "kt-kernel" else {runtime.threads}
            )
            for threads in sorted(fewer):
                job = Job(
                    name, self.shape, self.settings.seed, threads, runtime.isa, max(self.settings.tokens)
                )
                try:
                    rivals.append(stack.enter_context(PeerProcess(job)))
                except PeerError as error:
                    self.notes.note(f"{name} with {threads} threads: {error}")
        return rivals

    def _conclude(self) -> None:
        print("\nrelative L2 errors against float64, the largest of all cases:")
        print(summary.error_lines(self.results, self.comparisons))
        self.memory["peak_resident_bytes"] = _peak_resident()
        print(summary.memory_line(self.memory))

    def _to_dict(self, started: str) -> dict[str, Any]:
        apart = ("json", "plot", "shape")
        return {
            "schema": SCHEMA,
            "date": started,
            "command": self.command,
            "machine": self.machine,
            "versions": {**self.versions, **self.peers},
            "layer": asdict(self.shape),
            "settings": {k: v for k, v in asdict(self.settings).items() if k not in apart},
            "ceilings": self.ceilings,
            "results": [result.to_dict() for result in self.results],
            "comparisons": self.comparisons,
            "lora_costs": self.lora_costs,
            "memory": self.memory,
            "notes": self.notes.texts,
            "ok": not self.notes.wrong,
        }


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
