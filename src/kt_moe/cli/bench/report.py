"""Results: as lines of the table for people, as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kt_moe.cli.bench.ceilings import Ceilings, Spread
from kt_moe.cli.bench.contestants import Step
from kt_moe.cli.bench.layer import MIB, PASSES, Case

OURS = "kt_moe"
_COLUMNS = (
    ("tokens", 6), ("rank", 4), ("who", 14), ("pass", 8), ("ms", 9), ("IQR", 7), ("tokens/s", 9),
    ("TFLOP/s", 7), ("of reg", 6), ("of L2", 5), ("GB/s", 6), ("of read", 7), ("bound", 7), ("share", 5),
    ("scratch", 7),
)  # fmt: skip
_LEFT = {"who", "pass", "bound"}


@dataclass(frozen=True)
class Result:
    """Times of one contestant at one case, in seconds by pass, against the ceilings they were taken with.

    Attributes:
        touched: experts that had tokens (mean over the variants).
        errors: relative L2 error by output, against float64.
        scratch: bytes of scratch memory by pass, "forward" and "backward"; ours only.
    """

    case: Case
    who: str
    threads: int
    isa: str
    seconds: dict[str, Spread]
    touched: float
    ceilings: Ceilings
    errors: dict[str, float] = field(default_factory=dict)
    scratch: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: Sequence[Step], **rest: Any) -> Result:
        """From the steps timed; those without a backward have a forward only."""
        samples = {"forward": [forward for forward, _ in steps]}
        pairs = [(forward, backward) for forward, backward in steps if backward is not None]
        if pairs:
            samples["backward"] = [backward for _, backward in pairs]
            samples["both"] = [forward + backward for forward, backward in pairs]
        return cls(seconds={name: Spread.of(values) for name, values in samples.items()}, **rest)

    def least_seconds(self, name: str) -> float:
        """What the ceilings allow for one pass."""
        return self.ceilings.bound(self.case.flops()[name], self.case.bytes(self.touched)[name])[1]

    def figures(self, name: str) -> dict[str, Any]:
        """Rates of one pass and their share of the ceilings: of each, and of the one that binds."""
        seconds = self.seconds[name].median
        flops, moved = self.case.flops()[name], self.case.bytes(self.touched)[name]
        bound, least = self.ceilings.bound(flops, moved)
        return {
            "tokens_per_second": self.case.tokens / seconds,
            "flops_per_second": flops / seconds,
            "bytes_per_second": moved / seconds,
            "share_of_register_peak": flops / seconds / self.ceilings.registers_all.median,
            "share_of_l1_peak": flops / seconds / self.ceilings.l1_all.median,
            "share_of_l2_peak": flops / seconds / self.ceilings.l2_all.median,
            "share_of_read_bandwidth": moved / seconds / self.ceilings.read_all.median,
            "bound": bound,
            "share_of_bound": least / seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; without the ceilings, which stand apart."""
        passes = {
            name: {
                "seconds": asdict(spread),
                "flops": self.case.flops()[name],
                "bytes": self.case.bytes(self.touched)[name],
                **self.figures(name),
            }
            for name, spread in self.seconds.items()
        }
        return {
            "who": self.who,
            "experts": self.case.shape.experts,
            "tokens": self.case.tokens,
            "rank": self.case.rank,
            "threads": self.threads,
            "isa": self.isa,
            "experts_touched": self.touched,
            "passes": passes,
            "errors": self.errors,
            "scratch_bytes": self.scratch,
        }


def header() -> str:
    """Names of the table's columns."""
    return _row({name: name for name, _ in _COLUMNS})


def rows(result: Result) -> str:
    """A line for each pass."""
    lines = []
    for name in PASSES:
        if name not in result.seconds:
            continue
        spread, figures = result.seconds[name], result.figures(name)
        taken = [p for p in result.scratch if name in (p, "both")]
        cells = {
            "tokens": str(result.case.tokens),
            "rank": str(result.case.rank),
            "who": result.who,
            "pass": name,
            "ms": milliseconds(spread.median),
            "IQR": milliseconds(spread.iqr) if spread.count > 1 else "-",
            "tokens/s": f"{figures['tokens_per_second']:.0f}",
            "TFLOP/s": f"{figures['flops_per_second'] / 1e12:.3f}",
            "of reg": percent(figures["share_of_register_peak"]),
            "of L2": percent(figures["share_of_l2_peak"]),
            "GB/s": f"{figures['bytes_per_second'] / 1e9:.1f}",
            "of read": percent(figures["share_of_read_bandwidth"]),
            "bound": figures["bound"],
            "share": percent(figures["share_of_bound"]),
            "scratch": mebibytes(max(result.scratch[p] for p in taken)) if taken else "-",
        }
        lines.append(_row(cells))
    return "\n".join(lines)


def fastest(results: Sequence[Result]) -> list[Result]:
    """Of results under one name (thread counts that were tried), the one that took least."""
    best: dict[str, Result] = {}
    for result in results:
        last = list(result.seconds)[-1]
        if result.who not in best or result.seconds[last].median < best[result.who].seconds[last].median:
            best[result.who] = result
    return list(best.values())


def _row(cells: dict[str, str]) -> str:
    return "  ".join(
        f"{cells[name]:<{width}}" if name in _LEFT else f"{cells[name]:>{width}}" for name, width in _COLUMNS
    ).rstrip()


def milliseconds(seconds: float) -> str:
    """Of a time, with as many digits as it is worth."""
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def mebibytes(count: float) -> str:
    """MiB of a number of bytes."""
    return f"{count / MIB:.1f}M"


def percent(share: float) -> str:
    """Of a share of 1."""
    return f"{share * 100:.0f}%"
