"""How time grows with one thing at a time: tokens, experts, LoRA rank, threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import kt_moe
from kt_moe.cli.bench import ceilings
from kt_moe.cli.bench.ceilings import Ceilings
from kt_moe.cli.bench.contestants import KtMoe, time_steps
from kt_moe.cli.bench.data import Weights, make_inputs
from kt_moe.cli.bench.layer import GIB, PASSES, Case, variants_of
from kt_moe.cli.bench.options import Settings
from kt_moe.cli.bench.report import OURS, Result, mebibytes, milliseconds, percent
from kt_moe.cli.bench.trial import Notes, Trials
from kt_moe.host_memory import free_memory

_SECONDS, _QUICK_SECONDS = 1.0, 0.2  # of steps a point
_LEAST_STEPS = 2
_SHARE_OF_FREE = 0.8  # of free memory that a point may take


@dataclass(frozen=True)
class Point:
    """A case whose `axis` has this value, all else as in the base case."""

    axis: str
    value: int
    result: Result


class Growth:
    """Times the base case with one of its numbers changed.

    Args:
        weights: of the most experts that any point has; points with fewer take the first of them.
    """

    def __init__(self, settings: Settings, weights: Weights, runtime: kt_moe.Runtime, notes: Notes) -> None:
        self._settings, self._weights, self._notes = settings, weights, notes
        self._base, self._isa = base_case(settings, len(weights[0])), runtime.isa
        self._runtime, self._ceilings = runtime, ceilings.measure(runtime)
        self._layer: tuple[int, int, KtMoe] | None = None  # experts and threads of the one there is
        self.ceilings = [(runtime, self._ceilings)]

    def run(self) -> list[Point]:
        """Every axis in turn, each with its lines of the table."""
        self._check()
        points: list[Point] = []
        for axis, values in self._settings.grow.items():
            print(f"\n{_header(axis)}")
            last: Point | None = None
            for value in values:
                point = self._point(axis, value)
                if point is not None:
                    print(_row(point, last), flush=True)
                    points.append(point)
                    last = point
        self._notes.note_drift(self._ceilings, ceilings.measure(self._runtime))
        return points

    def _check(self) -> None:
        """The base case's outputs, against float64."""
        weights = self._first(self._base.shape.experts)
        ours = self._ours(self._base.shape.experts, self._runtime)
        Trials(self._settings, weights, self._notes).check(self._base, ours, [])

    def _point(self, axis: str, value: int) -> Point | None:
        case, runtime, roof = self._base, self._runtime, self._ceilings
        if axis == "threads":
            if value != runtime.threads:
                self._layer = None  # before the next one takes its memory
                runtime = kt_moe.Runtime(threads=value, isa=self._isa)
                roof = ceilings.measure(runtime)
                self.ceilings.append((runtime, roof))
        elif axis == "experts":
            if value > len(self._weights[0]):
                self._notes.note(f"experts {value}: more than memory holds")
                return None
            case = replace(case, shape=replace(case.shape, experts=value))
        elif axis == "tokens":
            case = replace(case, tokens=value)
        else:
            case = replace(case, rank=value)
        return self._time(axis, value, case, runtime, roof)

    def _time(
        self, axis: str, value: int, case: Case, runtime: kt_moe.Runtime, roof: Ceilings
    ) -> Point | None:
        ours = self._ours(case.shape.experts, runtime)
        if case.memory() > _SHARE_OF_FREE * free_memory():
            self._notes.note(f"{axis} {value}: needs {case.memory() / GIB:.1f} GiB beside the weights")
            return None
        l3 = kt_moe.cpu_info()["caches"]["l3"]
        case = replace(case, variants=variants_of(case.shape, case.tokens, l3))
        inputs = make_inputs(case, self._settings.seed)
        ours.prepare(inputs)
        scratch = ours.scratch()  # also wakes caches and threads
        steps = time_steps(
            ours, case.variants, _QUICK_SECONDS if self._settings.quick else _SECONDS, _LEAST_STEPS
        )
        self._notes.check_finite(f"{axis} {value}", ours.outputs())
        result = Result.of(
            steps, case=case, who=OURS, threads=runtime.threads, isa=runtime.isa, touched=inputs.touched,
            ceilings=roof, scratch=scratch,
        )  # fmt: skip
        return Point(axis, value, result)

    def _ours(self, experts: int, runtime: kt_moe.Runtime) -> KtMoe:
        """The layer with this many experts; one at a time, to hold one packed copy."""
        if self._layer is None or self._layer[:2] != (experts, runtime.threads):
            self._layer = None
            ours = KtMoe(self._first(experts), runtime, self._settings.recompute)
            self._layer = experts, runtime.threads, ours
        return self._layer[2]

    def _first(self, experts: int) -> Weights:
        gate, up, down = self._weights
        return gate[:experts], up[:experts], down[:experts]


def base_case(settings: Settings, most: int) -> Case:
    """The base case, with no more experts than there are."""
    shape = replace(settings.shape, experts=min(settings.shape.experts, most))
    return Case(shape, settings.tokens[0], settings.ranks[0], settings.routing, settings.lora_dtype)


def slope(name: str, point: Point, last: Point | None) -> float | None:
    """The power of the axis by which time grew since the last point: 1 is proportional, 0 is constant."""
    if last is None or last.value == 0:
        return None
    times = (p.result.seconds[name].median for p in (point, last))
    return math.log(next(times) / next(times)) / math.log(point.value / last.value)


def to_dicts(points: list[Point]) -> list[dict[str, Any]]:
    """As JSON takes them: each point with the powers by which it grew."""
    found = []
    for before, point in zip([None, *points], points, strict=False):
        last = before if before is not None and before.axis == point.axis else None
        powers = {name: slope(name, point, last) for name in PASSES}
        found.append({"axis": point.axis, "value": point.value, "slope": powers, **point.result.to_dict()})
    return found


def _header(axis: str) -> str:
    cells = "".join(
        f"{f'{name} ms':>13}{'IQR':>9}{'power':>7}{'share':>6}" for name in ("forward", "backward")
    )
    return f"{axis:>8}{cells}{'both ms':>10}{'tokens/s':>10}  {'bound':<7}{'scratch':>9}"


def _row(point: Point, last: Point | None) -> str:
    result = point.result
    line = f"{point.value:>8}"
    for name in ("forward", "backward"):
        spread, power = result.seconds[name], slope(name, point, last)
        line += f"{milliseconds(spread.median):>13}{milliseconds(spread.iqr):>9}"
        line += f"{'-' if power is None else f'{power:.2f}':>7}"
        line += f"{percent(result.figures(name)['share_of_bound']):>6}"
    both = result.figures("both")
    line += f"{milliseconds(result.seconds['both'].median):>10}{both['tokens_per_second']:>10.0f}"
    return f"{line}  {both['bound']:<7}{mebibytes(max(result.scratch.values())):>9}"
