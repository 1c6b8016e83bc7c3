"""A rival in a process of its own.

It is stopped (SIGSTOP) while others are timed: its idle threads cannot spin on our cores, and a crash of it
is a line in the report.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from kt_moe.cli.bench.contestants import Step, take_turn
from kt_moe.cli.bench.data import Inputs, make_inputs, make_weights
from kt_moe.cli.bench.layer import Case
from kt_moe.cli.bench.peers import PEERS, Job

_PATIENCE = 600.0  # seconds for one request; a pool that hangs ends here
_PR_SET_PDEATHSIG = 1
# Without the current directory, which -c puts first: a file there may have the name of a module.
_CODE = """
import sys
sys.path[:] = filter(None, sys.path)
from kt_moe.cli.bench.peer_process import serve
serve(int(sys.argv[1]))
"""


class PeerError(Exception):
    """A rival could not do what was asked; the message says why."""


class PeerProcess:
    """A rival in a process of its own, running only while it is asked something.

    A context manager: entering it builds the rival's layer and raises PeerError where that cannot be done.
    """

    def __init__(self, job: Job) -> None:
        self.name, self.threads, self._job = job.name, job.threads, job
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        theirs.close()

    def __enter__(self) -> PeerProcess:
        try:
            self._ask(self._job)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # reaches a stopped process too
        self._process.wait()
        self._pipe.close()
        self._log.close()

    def prepare(self, case: Case, digest: list[int]) -> None:
        """Get ready for a case; `digest` is that of our inputs.

        Raises:
            PeerError: it cannot run the case, or made other inputs.
        """
        if self._ask(("prepare", case)) != digest:
            raise PeerError("made other inputs than kt_moe's")

    def take_turn(self, seconds: float) -> list[Step]:
        """See `contestants.take_turn`."""
        steps: list[Step] = self._ask(("turn", seconds))
        return steps

    def outputs(self) -> dict[str, Tensor]:
        """Outputs of the last step."""
        found: dict[str, Tensor] = torch.load(io.BytesIO(self._ask(("outputs", None))))
        return found

    def _ask(self, request: object) -> Any:
        self._process.send_signal(signal.SIGCONT)
        try:
            self._pipe.send(request)
            if not self._pipe.poll(_PATIENCE):
                self._process.kill()
                raise PeerError(f"gave no answer in {_PATIENCE:.0f} s")
            ok, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise PeerError(f"its process ended: {self._last_words()}") from None
        self._process.send_signal(signal.SIGSTOP)
        if not ok:
            raise PeerError(answer)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        if status < 0:
            return signal.Signals(-status).name
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}")


class _Server:
    """The rival's side: builds the layer once, then answers requests."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._contestant = PEERS[job.name].make(make_weights(job.shape, job.seed), job)
        self._inputs: Inputs | None = None

    def prepare(self, case: Case) -> list[int]:
        self._inputs = make_inputs(case, self._job.seed)
        self._contestant.prepare(self._inputs)
        return self._inputs.digest()

    def turn(self, seconds: float) -> list[Step]:
        assert self._inputs is not None
        return take_turn(self._contestant, len(self._inputs.topk_ids), seconds)

    def outputs(self, _: None) -> bytes:
        buffer = io.BytesIO()
        torch.save(self._contestant.outputs(), buffer)
        return buffer.getvalue()


def serve(descriptor: int) -> None:
    """Answer requests on this pipe until its other end is closed; the rival's process runs this."""
    pipe = Connection(descriptor)
    # Also a stopped process must not outlive the one that started it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server: _Server | None = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if server is None:
                server = _Server(request)
                answer = None
            else:
                method, argument = request
                answer = getattr(server, method)(argument)
        except Exception as error:  # whatever a rival raises is its result
            pipe.send((False, " ".join(f"{error}".split())[:200] or type(error).__name__))
        else:
            pipe.send((True, answer))
