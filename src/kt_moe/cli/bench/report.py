"""Results: as lines of a table for people, as JSON for programs."""

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
    ("TFLOP/s", 7), ("of L1", 5), ("of L2", 5), ("GB/s", 6), ("of read", 7), ("bound", 7), ("share", 5),
)  # fmt: skip
_LEFT = {"who", "pass", "bound"}


@dataclass(frozen=True)
class Result:
    """Times of one contestant at one case, in seconds by pass, against the ceilings they were taken with.

    Attributes:
        touched: experts that had tokens (mean over the variants).
        errors: relative L2 error by output, against float32.
    """

    case: Case
    who: str
    threads: int
    isa: str
    seconds: dict[str, Spread]
    touched: float
    ceilings: Ceilings
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: Sequence[Step], **rest: Any) -> Result:
        """From the steps timed; those without a backward have a forward only."""
        samples = {"forward": [forward for forward, _ in steps]}
        pairs = [(forward, backward) for forward, backward in steps if backward is not None]
        if pairs:
            samples["backward"] = [backward for _, backward in pairs]
            samples["both"] = [forward + backward for forward, backward in pairs]
        return cls(seconds={name: Spread.of(values) for name, values in samples.items()}, **rest)

    def figures(self, name: str) -> dict[str, Any]:
        """Rates of one pass and their share of the ceilings: of each, and of the one that binds."""
        seconds = self.seconds[name].median
        flops, moved = self.case.flops()[name], self.case.bytes(self.touched)[name]
        bound, least = self.ceilings.bound(flops, moved)
        return {
            "tokens_per_second": self.case.tokens / seconds,
            "flops_per_second": flops / seconds,
            "bytes_per_second": moved / seconds,
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
            "tokens": self.case.tokens,
            "rank": self.case.rank,
            "threads": self.threads,
            "isa": self.isa,
            "experts_touched": self.touched,
            "passes": passes,
            "errors": self.errors,
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
        cells = {
            "tokens": str(result.case.tokens),
            "rank": str(result.case.rank),
            "who": result.who,
            "pass": name,
            "ms": _milliseconds(spread.median),
            "IQR": _milliseconds(spread.iqr) if spread.count > 1 else "-",
            "tokens/s": f"{figures['tokens_per_second']:.0f}",
            "TFLOP/s": f"{figures['flops_per_second'] / 1e12:.3f}",
            "of L1": _percent(figures["share_of_l1_peak"]),
            "of L2": _percent(figures["share_of_l2_peak"]),
            "GB/s": f"{figures['bytes_per_second'] / 1e9:.1f}",
            "of read": _percent(figures["share_of_read_bandwidth"]),
            "bound": figures["bound"],
            "share": _percent(figures["share_of_bound"]),
        }
        lines.append(_row(cells))
    return "\n".join(lines)


def ratios(ours: Result, others: Sequence[Result]) -> dict[str, dict[str, float]]:
    """How many times as long as ours each other's median is, by contestant and pass."""
    return {
        other.who: {name: spread.median / ours.seconds[name].median for name, spread in other.seconds.items()}
        for other in others
    }


def ratio_lines(found: dict[str, dict[str, float]], threads: dict[str, int]) -> str:
    """`ratios` for people, with the number of threads each contestant had."""
    return "\n".join(
        f"  kt_moe has {', '.join(f'{ratio:.2f}x ({name})' for name, ratio in passes.items())} "
        f"the speed of {who} on {threads[who]} threads"
        for who, passes in found.items()
    )


def error_line(result: Result) -> str:
    """Relative L2 errors of one contestant; of the LoRA gradients, the largest."""
    named = {"out": "out", "hidden_states": "dX", "topk_weights": "dw"}
    parts = [f"{short} {result.errors[name]:.1e}" for name, short in named.items() if name in result.errors]
    lora = [error for name, error in result.errors.items() if name not in named]
    return f"  {result.who:<14} {', '.join(parts + ([f'LoRA {max(lora):.1e}'] if lora else []))}"


def ceiling_lines(ceilings: Ceilings, threads: int) -> str:
    """The ceilings as aligned lines."""

    def line(label: str, spread: Spread, scale: float, unit: str) -> str:
        return f"  {label:<46} {spread.median / scale:8.3f} {unit:<8} IQR {spread.iqr / scale:.3f}"

    c, all_threads = ceilings, "1 thread" if threads == 1 else f"{threads} threads"
    return "\n".join(
        (
            line("micro-kernel, operands in L1, 1 thread", c.l1_one, 1e12, "TFLOP/s"),
            line(f"micro-kernel, operands in L1, {all_threads}", c.l1_all, 1e12, "TFLOP/s"),
            line("micro-kernel, A from L2, 1 thread", c.l2_one, 1e12, "TFLOP/s"),
            line(f"micro-kernel, A from L2, {all_threads}", c.l2_all, 1e12, "TFLOP/s"),
            line(f"memory read, {all_threads}", c.read_all, 1e9, "GB/s"),
        )
    )


def memory_line(memory: dict[str, float]) -> str:
    """Bytes of the packed weights, as such and over their bf16 size, and the process's peak."""
    weights, peak = memory["weight_bytes"] / MIB, memory["peak_resident_bytes"] / MIB
    ratio = memory["weight_ratio"]
    return f"memory: weights {weights:.0f} MiB ({ratio:.3f}x bf16), peak {peak:.0f} MiB resident"


def _row(cells: dict[str, str]) -> str:
    return "  ".join(
        f"{cells[name]:<{width}}" if name in _LEFT else f"{cells[name]:>{width}}" for name, width in _COLUMNS
    ).rstrip()


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def _percent(share: float) -> str:
    return f"{share * 100:.0f}%"
