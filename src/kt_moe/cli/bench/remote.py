"""An object in a process of its own, which is stopped between calls: its threads cannot spin on our cores."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

_PATIENCE = 600.0  # seconds for one call; threads that hang end here
_PR_SET_PDEATHSIG = 1


class RemoteError(Exception):
    """The object could not do what was asked; the message says why."""


class Remote:
    """What `make(*args)` gives in a new process, where its methods run. A context manager.

    Arguments and results are pickled; tensors must not be among them, because their memory would have to be
    handed over by a process that is stopped.

    Calls, and entering it, raise RemoteError where the object does or its process ends.
    """

    def __init__(self, make: Callable[..., object], *args: object) -> None:
        # Torch's threads that spin behind their loops take the cores of those that launch kernels.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process, self._make = context.Process(target=_serve, args=(there,), daemon=True), (make, *args)

    def __enter__(self) -> Remote:
        self._process.start()
        try:
            self._ask(None, *self._make)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # reaches a stopped process too
        self._process.join()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self._ask(method, *args)

    def _ask(self, method: str | None, *args: object) -> Any:
        assert self._process.pid is not None
        try:
            os.kill(self._process.pid, signal.SIGCONT)
            self._here.send((method, args))
            if not self._here.poll(_PATIENCE):
                raise TimeoutError(f"no answer for {_PATIENCE:g} s")
            failed, answer = self._here.recv()
            os.kill(self._process.pid, signal.SIGSTOP)
        except (EOFError, OSError) as error:
            raise RemoteError(f"its process ended or hangs: {error}") from None
        if failed:
            raise RemoteError(answer)
        return answer


def _serve(pipe: Connection) -> None:
    """In its process: make the object, then call its methods."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process too ends with its parent
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what it prints would stand in our table
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that waits for us
    made: Any = None
    while True:
        method, args = pipe.recv()
        try:
            if method is None:
                made, answer = args[0](*args[1:]), None
            else:
                answer = getattr(made, method)(*args)
            pipe.send((False, answer))
        except Exception as error:  # whatever it raises is its answer
            pipe.send((True, f"{type(error).__name__}: {error}"))
