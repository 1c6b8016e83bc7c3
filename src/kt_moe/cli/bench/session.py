"""The order of things: ceilings, cases, turns, checks, and what is written at the end."""

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
from kt_moe.cli.bench import ceilings, options, report
from kt_moe.cli.bench.contestants import KtMoe, Step, poisoned, reference, relative_errors, take_turn
from kt_moe.cli.bench.data import Inputs, Weights, digest, make_inputs, make_weights
from kt_moe.cli.bench.layer import GIB, Case, fit_experts, free_memory, variants_of
from kt_moe.cli.bench.peer_process import PeerError, PeerProcess
from kt_moe.cli.bench.peers import PEERS, Job
from kt_moe.cli.bench.report import OURS, Result
from kt_moe.cli.bench.roofline import plot_roofline
from kt_moe.cli.errors import UserError
from kt_moe.cli.output import write_json

SCHEMA = 1  # of the JSON; grows when a key changes its meaning or goes
_WORST_ERROR = 0.02  # relative L2; bf16 operands leave about 0.005


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
        self.peers: dict[str, str] = {}  # installed ones and their versions
        self.notes: list[str] = []  # what was left out or went wrong
        self.results: list[Result] = []
        self.comparisons: list[dict[str, Any]] = []
        self.ceilings: list[dict[str, Any]] = []
        self.memory: dict[str, float] = {}
        self.wrong = False
        self._truth: tuple[Case, dict[str, torch.Tensor]] | None = None

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
        return int(self.wrong)

    def _find_peers(self) -> None:
        for name in self.settings.peers:
            try:
                self.peers[name] = PEERS[name].version()
            except ValueError as error:
                self._note(f"{name}: {error}")

    def _fit(self) -> None:
        copies = 2 + sum(PEERS[name].copies for name in self.peers)  # ours: the original and the packed one
        free = free_memory()
        self.shape = fit_experts(self.settings.shape, copies, free)
        if self.shape.experts < self.settings.shape.experts:
            self._note(
                f"{self.shape.experts} experts instead of {self.settings.shape.experts}: what half of the "
                f"{free / GIB:.1f} GiB of free memory holds {copies} times; each gets more tokens so"
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

    def _measure(self, runtime: kt_moe.Runtime, weights: Weights) -> None:
        """All cases of one runtime."""
        found = ceilings.measure(runtime)
        place = {"isa": runtime.isa, "threads": runtime.threads}
        self.ceilings.append({**place, **asdict(found)})
        print(f"\n{runtime.isa}, {runtime.threads} threads; ceilings:")
        print(report.ceiling_lines(found, runtime.threads))
        ours = KtMoe(weights, runtime, self.settings.recompute)
        self.memory = {
            "weight_bytes": ours.experts.nbytes,
            "weight_ratio": ours.experts.nbytes / self.shape.weight_bytes,
        }
        cases = [
            Case(
                self.shape, tokens, rank, self.settings.routing, self.settings.lora_dtype,
                variants_of(self.shape, tokens, kt_moe.cpu_info()["caches"]["l3"]),
            )
            for rank, tokens in itertools.product(self.settings.ranks, self.settings.tokens)
        ]  # fmt: skip
        with ExitStack() as stack:
            rivals = self._start_rivals(stack, runtime)
            print(f"\n{report.header()}")
            for case in cases:
                self._run_case(case, ours, rivals, weights, {**place, "case": case, "ceilings": found})

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
                    self._note(f"{name} with {threads} threads: {error}")
        return rivals

    def _run_case(
        self, case: Case, ours: KtMoe, rivals: list[PeerProcess], weights: Weights, place: dict[str, Any]
    ) -> None:
        errors = self._check(case, ours, rivals, weights)
        inputs = make_inputs(case, self.settings.seed)
        marks = self._poisoned_step(ours, inputs)
        ready = [rival for rival in rivals if self._prepare(rival, case, inputs)]
        steps = self._turns(case, ours, ready)
        ours.step(0)
        if digest(ours.outputs()) != marks:
            self._fault(f"{_name(case)}: the last step's outputs are not the first one's")

        def result(who: str, rival: PeerProcess | None = None) -> Result:
            threads = rival.threads if rival else place["threads"]
            common = {**place, "threads": threads, "touched": inputs.touched, "errors": errors[rival]}
            return Result.of(steps[rival], who=who, **common)

        mine = result(OURS)
        others = _best([result(rival.name, rival) for rival in ready if rival in steps])
        self.results += [mine, *others]
        print("\n".join(report.rows(r) for r in (mine, *others)), flush=True)
        if others:
            ratios = report.ratios(mine, others)
            same = {"tokens": case.tokens, "rank": case.rank, "isa": mine.isa, "threads": mine.threads}
            self.comparisons.append({**same, "slower_than_kt_moe": ratios})
            print(report.ratio_lines(ratios, {other.who: other.threads for other in others}), flush=True)

    def _check(
        self, case: Case, ours: KtMoe, rivals: list[PeerProcess], weights: Weights
    ) -> dict[PeerProcess | None, dict[str, float]]:
        """Relative errors of everyone (None: ours), on the tokens that float32 has time for."""
        small = case.limited_to(2e10 if self.settings.quick else 1e11)
        inputs = make_inputs(small, self.settings.seed)
        if self._truth is None or self._truth[0] != small:
            self._truth = small, reference(weights, inputs)
        truth = self._truth[1]
        self._poisoned_step(ours, inputs)
        errors: dict[PeerProcess | None, dict[str, float]] = {None: relative_errors(ours.outputs(), truth)}
        if not all(error <= _WORST_ERROR for error in errors[None].values()):
            self._fault(f"{_name(small)}: an output is off: {errors[None]}")
        for rival in rivals:
            errors[rival] = {}
            if self._prepare(rival, small, inputs):
                rival.take_turn(0)
                errors[rival] = relative_errors(rival.outputs(), truth)
        return errors

    def _poisoned_step(self, ours: KtMoe, inputs: Inputs) -> list[int]:
        """A step into memory full of NaN; what its outputs are, as a digest."""
        ours.prepare(inputs)
        with poisoned():
            ours.step(0)
        outputs = ours.outputs()
        bad = [name for name, tensor in outputs.items() if not bool(tensor.isfinite().all())]
        if bad:
            self._fault(f"{len(inputs.hidden_states)} tokens: not finite: {', '.join(bad)}")
        return digest(outputs)

    def _prepare(self, rival: PeerProcess, case: Case, inputs: Inputs) -> bool:
        try:
            rival.prepare(case, inputs.digest())
        except PeerError as error:
            self._note(f"{rival.name}, {_name(case)}: {error}")
            return False
        return True

    def _turns(
        self, case: Case, ours: KtMoe, rivals: list[PeerProcess]
    ) -> dict[PeerProcess | None, list[Step]]:
        """A, B, A, B, ...: whatever else the machine does falls on everyone alike."""
        seconds = 0.05 if self.settings.quick else 0.15
        steps: dict[PeerProcess | None, list[Step]] = {who: [] for who in (None, *rivals)}
        for _ in range(self.settings.reps):
            steps[None] += take_turn(ours, case.variants, seconds)
            for rival in rivals:
                if rival in steps:
                    try:
                        steps[rival] += rival.take_turn(seconds)
                    except PeerError as error:
                        self._note(f"{rival.name}, {_name(case)}: {error}")
                        del steps[rival]
        return steps

    def _conclude(self) -> None:
        print("\nrelative L2 errors against float32, the largest of all cases:")
        for who in dict.fromkeys(result.who for result in self.results):
            mine = [result for result in self.results if result.who == who]
            names = dict.fromkeys(name for result in mine for name in result.errors)
            worst = {name: max(r.errors[name] for r in mine if name in r.errors) for name in names}
            print(report.error_line(replace(mine[0], errors=worst)))
        self.memory["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(report.memory_line(self.memory))

    def _to_dict(self, started: str) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "date": started,
            "command": self.command,
            "machine": self.machine,
            "versions": {**self.versions, **self.peers},
            "layer": asdict(self.shape),
            "settings": {
                k: v for k, v in asdict(self.settings).items() if k not in ("json", "plot", "shape")
            },
            "ceilings": self.ceilings,
            "results": [result.to_dict() for result in self.results],
            "comparisons": self.comparisons,
            "memory": self.memory,
            "notes": self.notes,
            "ok": not self.wrong,
        }

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            print(f"  note: {text}", flush=True)

    def _fault(self, text: str) -> None:
        self.wrong = True
        self._note(f"WRONG, {text}")


def _name(case: Case) -> str:
    return f"tokens {case.tokens}, rank {case.rank}"


def _best(results: list[Result]) -> list[Result]:
    """Of results under one name (thread counts that were tried), the one that took least."""
    best: dict[str, Result] = {}
    for result in results:
        last = list(result.seconds)[-1]
        if result.who not in best or result.seconds[last].median < best[result.who].seconds[last].median:
            best[result.who] = result
    return list(best.values())
