"""One case: everyone's outputs checked, then everyone timed in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kt_moe.cli.bench import report
from kt_moe.cli.bench.ceilings import Ceilings
from kt_moe.cli.bench.contestants import KtMoe, Step, take_turn
from kt_moe.cli.bench.data import Inputs, Weights, digest, make_inputs
from kt_moe.cli.bench.layer import Case
from kt_moe.cli.bench.options import Settings
from kt_moe.cli.bench.peer_process import PeerError, PeerProcess
from kt_moe.cli.bench.report import OURS, Result
from kt_moe.cli.bench.truth import poisoned, reference, relative_errors

_WORST_ERROR = 0.02  # relative L2; bf16 operands leave about 0.005


@dataclass
class Notes:
    """What was left out or went wrong, each said once, when it happens."""

    texts: list[str] = field(default_factory=list)
    wrong: bool = False

    def note(self, text: str) -> None:
        """Something the reader of the figures should know."""
        if text not in self.texts:
            self.texts.append(text)
            print(f"  note: {text}", flush=True)

    def note_drift(self, before: Ceilings, after: Ceilings) -> None:
        """Say if the machine was faster or slower at the end than when its ceilings were measured."""
        if drift := before.drift(after):
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in drift.items())
            self.note(f"ceilings at the end over those at the start: {ratios}; do not trust the shares")

    def check_finite(self, what: str, outputs: dict[str, Tensor]) -> None:
        """Outputs of ours that hold a NaN or an infinity are a fault."""
        bad = [name for name, tensor in outputs.items() if not bool(tensor.isfinite().all())]
        if bad:
            self.fault(f"{what}: not finite: {', '.join(bad)}")

    def fault(self, text: str) -> None:
        """An output of ours was wrong: the run ends in exit status 1."""
        self.wrong = True
        self.note(f"WRONG, {text}")


class Trials:
    """Runs cases on one set of weights."""

    def __init__(self, settings: Settings, weights: Weights, notes: Notes) -> None:
        self._settings, self._weights, self._notes = settings, weights, notes
        self._truth: tuple[Case, dict[str, Tensor]] | None = None

    def run(self, case: Case, ours: KtMoe, rivals: list[PeerProcess], place: dict[str, Any]) -> list[Result]:
        """Our result, then that of each rival that could run the case.

        Args:
            place: threads, isa and ceilings of ours, as `Result` has them.
        """
        errors = self.check(case, ours, rivals)
        inputs = make_inputs(case, self._settings.seed)
        marks = self._poisoned_step(ours, inputs)
        scratch = ours.scratch()
        ready = [rival for rival in rivals if self._prepare(rival, case, inputs)]
        steps = self._turns(case, ours, ready)
        ours.step(0)
        if digest(ours.outputs()) != marks:
            self._notes.fault(f"{case}: the last step's outputs are not the first one's")
        common = {**place, "case": case, "touched": inputs.touched}
        mine = Result.of(steps[None], who=OURS, errors=errors[None], scratch=scratch, **common)
        others = [
            Result.of(
                steps[rival], who=rival.name, errors=errors[rival], **{**common, "threads": rival.threads}
            )
            for rival in ready
            if rival in steps
        ]
        return [mine, *report.fastest(others)]

    def check(
        self, case: Case, ours: KtMoe, rivals: list[PeerProcess]
    ) -> dict[PeerProcess | None, dict[str, float]]:
        """Relative errors of everyone (None: ours), on the tokens that float64 has time for."""
        small = case.limited_to(2e10 if self._settings.quick else 1e11)
        inputs = make_inputs(small, self._settings.seed)
        if self._truth is None or self._truth[0] != small:
            self._truth = small, reference(self._weights, inputs)
        truth = self._truth[1]
        self._poisoned_step(ours, inputs)
        errors: dict[PeerProcess | None, dict[str, float]] = {None: relative_errors(ours.outputs(), truth)}
        if not all(error <= _WORST_ERROR for error in errors[None].values()):
            self._notes.fault(f"{small}: an output is off: {errors[None]}")
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
        self._notes.check_finite(f"{len(inputs.hidden_states)} tokens", outputs)
        return digest(outputs)

    def _prepare(self, rival: PeerProcess, case: Case, inputs: Inputs) -> bool:
        try:
            rival.prepare(case, inputs.digest())
        except PeerError as error:
            self._notes.note(f"{rival.name}, {case}: {error}")
            return False
        return True

    def _turns(
        self, case: Case, ours: KtMoe, rivals: list[PeerProcess]
    ) -> dict[PeerProcess | None, list[Step]]:
        """A, B, A, B, ...: whatever else the machine does falls on everyone alike."""
        seconds = 0.05 if self._settings.quick else 0.15
        steps: dict[PeerProcess | None, list[Step]] = {who: [] for who in (None, *rivals)}
        for _ in range(self._settings.reps):
            steps[None] += take_turn(ours, case.variants, seconds)
            for rival in rivals:
                if rival in steps:
                    try:
                        steps[rival] += rival.take_turn(seconds)
                    except PeerError as error:
                        self._notes.note(f"{rival.name}, {case}: {error}")
                        del steps[rival]
        return steps
