"""What each pass of an engine had where: the last of every layer for `Gpu.report`, all for a profile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_moe.gpu.plan import Cut, row_flops
from kt_moe.gpu.prefetch import Pass

if TYPE_CHECKING:
    from kt_moe.gpu.chunk import Layer
    from kt_moe.gpu.slots import Slots
    from kt_moe.gpu.spans import Mark
    from kt_moe.gpu.streams import Streams
    from kt_moe.profiler import Profile


@dataclass
class PassReport:
    """A forward or backward of a layer.

    Attributes:
        layer: its number, in the order of first calls.
        gpu_experts, cpu_experts, gpu_rows, cpu_rows: routed experts and their rows by place.
        bytes_moved: of experts that were sent over the link meanwhile, those for later passes too.
        seconds: of the link, the GPU and the CPU as `plan.cut` predicts them, of forward and backward
            together where the layer trains; None where the CPU's share was given.
    """

    layer: int
    backward: bool
    gpu_experts: int
    cpu_experts: int
    gpu_rows: int
    cpu_rows: int
    bytes_moved: int
    seconds: tuple[float, float, float] | None

    def line(self) -> str:
        """As text for people."""
        direction = "backward" if self.backward else "forward"
        text = (
            f"layer {self.layer:<3} {direction:<9} GPU {self.gpu_experts:,} experts, {self.gpu_rows:,} rows; "
            f"CPU {self.cpu_experts:,} experts, {self.cpu_rows:,} rows; {self.bytes_moved / 1e9:.3f} GB moved"
        )
        if self.seconds is not None:
            link, gpu, cpu = (1e3 * seconds for seconds in self.seconds)
            text += f"; predicted: link {link:.2f}, GPU {gpu:.2f}, CPU {cpu:.2f} ms"
        return text


class PassLog:
    """The passes of one engine. `watch`, `start`, `begin` and `end` follow each other in every pass.

    Attributes:
        last: the last of every layer and direction, the oldest first.
    """

    def __init__(self, streams: Streams) -> None:
        self.last: dict[Pass, PassReport] = {}
        self._streams = streams
        self._report: PassReport | None = None
        self._began: Mark | None = None

    def watch(self, profile: Profile | None) -> None:
        """Record for the profile of the layer's runtime, if there is one."""
        self._streams.recorder = None if profile is None else profile._recorder(self._streams)

    def start(self, layer: int) -> None:
        """A pass of a layer begins."""
        self._report = None
        if self._streams.recorder is not None:
            self._began = self._streams.recorder.begin_pass(layer)

    def begin(self, this: Pass, plan: Cut, slots: Slots | None) -> None:
        """Its plan is made."""
        moved = 0 if slots is None else slots.bytes_moved
        self._report = PassReport(
            this.layer, this.backward, len(plan.gpu), len(plan.cpu), *plan.rows, -moved, plan.seconds
        )

    def end(self, slots: Slots | None) -> None:
        """All its work has been given to the device."""
        report, recorder = self._report, self._streams.recorder
        if report is None:
            return
        report.bytes_moved += 0 if slots is None else slots.bytes_moved
        this = Pass(report.layer, report.backward)
        self.last.pop(this, None)
        self.last[this] = report
        if recorder is not None and self._began is not None:
            recorder.end_pass(self._began, report)

    def chunk(self, layer: Layer, experts: int, rows: int) -> AbstractContextManager[None]:
        """A span around a chunk of the pass."""
        recorder, report = self._streams.recorder, self._report
        if recorder is None or report is None:
            return _NOTHING
        name = "backward_chunk" if report.backward else "forward_chunk"
        stacks = [*layer.lora_in, *([] if layer.lora_down is None else [layer.lora_down])]
        rank = sum(len(stack.projections) * stack.a.shape[2] for stack in stacks if stack.a is not None)
        flops = row_flops(layer.hidden, layer.intermediate, rank, report.backward, True, layer.gated)
        return recorder.span("GPU", name, experts, rows, rows * flops)

    def forget(self, layer: int) -> None:
        """Drop a layer that is gone."""
        self.last = {this: report for this, report in self.last.items() if this.layer != layer}


_NOTHING = nullcontext()
