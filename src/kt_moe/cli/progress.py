"""What a run tells while it trains: progress bar, loss, tokens a second, memory; and how Ctrl-C stops it."""

from __future__ import annotations

import resource
import signal
import sys
import time
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]
    """Progress bar on a terminal, about twenty lines elsewhere; times the training steps alone.

    Attributes:
        tokens: trained on so far by this process, padding not counted.
        seconds: spent in training steps; evaluation and saving are not in it.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._began, self._loss, self._bar = 0.0, float("nan"), None

    @property
    def tokens_per_second(self) -> float:
        """Training throughput of this process; 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain = not sys.stderr.isatty()
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=plain)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "eval_loss" in logs:
            self._say(f"step {state.global_step}/{state.max_steps}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.tokens, self._loss = int(logs["num_tokens"]), logs["loss"]
        status = f"loss {self._loss:.4f}, {self.tokens_per_second:.0f} tokens/s, {memory_line()}"
        assert self._bar is not None
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update()
        every = max(1, state.max_steps // 20)
        if self._bar.disable and state.global_step % every == 0:
            self._say(f"step {state.global_step}/{state.max_steps}: {status}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands; also when training ended by an exception."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Within `with`: the first SIGINT or SIGTERM ends training after the step in progress, with a checkpoint.

    A second one raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("stopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def peak_memory() -> dict[str, int]:
    """Most bytes in use so far: "host" (resident set of this process), "cuda" (allocated) if there is one."""
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux gives KiB
    if torch.cuda.is_available():
        peaks["cuda"] = torch.cuda.max_memory_allocated()
    return peaks


def memory_line() -> str:
    """`peak_memory` for people."""
    return "peak " + ", ".join(f"{size / 2**30:.2f} GiB {where}" for where, size in peak_memory().items())
