"""An object in a process of its own, which is stopped between calls: its threads cannot spin on our cores."""

from __future__ import annotations

import ctypes
import io
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

_PATIENCE = 600.0  # seconds for one call; threads that hang end here
_PR_SET_PDEATHSIG = 1
_made: Any = None  # in its process


class RemoteError(Exception):
    """The object could not do what was asked; the message says why."""


class Remote:
    """What `make(*args)` gives in a new process, where its methods run. A context manager.

    Calls, and entering it, raise RemoteError where the object does or its process ends.
    """

    def __init__(self, make: Callable[..., object], *args: object) -> None:
        # Torch's threads that spin behind their loops take the cores of those that launch kernels.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self._pool, self._process = ProcessPoolExecutor(1, get_context("spawn")), 0
        self._make = make, args

    def __enter__(self) -> Remote:
        try:
            self._process = self._run(_begin)
            self._run(_construct, *self._make)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process:
            os.kill(self._process, signal.SIGKILL)  # reaches a stopped process too
        self._pool.shutdown()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self._run(_call, method, args)

    def _run(self, function: Callable[..., Any], *args: object) -> Any:
        try:
            if self._process:
                os.kill(self._process, signal.SIGCONT)
            answer = self._pool.submit(function, *args).result(_PATIENCE)
            if self._process:
                os.kill(self._process, signal.SIGSTOP)
        except (BrokenProcessPool, TimeoutError, ProcessLookupError) as error:
            raise RemoteError(f"its process ended or hangs: {error}") from None
        except Exception as error:  # whatever it raises is its answer
            raise RemoteError(f"{type(error).__name__}: {error}") from error
        return torch.load(io.BytesIO(answer), weights_only=False) if isinstance(answer, bytes) else answer


def _begin() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process too ends with its parent
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what it prints would stand in our table
    return os.getpid()


def _construct(make: Callable[..., object], args: tuple[object, ...]) -> None:
    global _made
    _made = make(*args)


def _call(method: str, args: tuple[object, ...]) -> bytes:
    """As bytes: the pipe would leave tensors in memory that a stopped process has to hand over."""
    torch.save(getattr(_made, method)(*args), buffer := io.BytesIO())
    return buffer.getvalue()
