"""KT_MOE_PROFILE: every runtime is watched until the interpreter exits, which prints the table too."""

from __future__ import annotations

import atexit
import os
import sys

from kt_moe.profiler import Profile
from kt_moe.runtime import Runtime

_until_exit: list[Profile] = []  # in this process


def profile_until_exit(path: str, runtime: Runtime) -> None:
    """What KT_MOE_PROFILE asks for.

    Raises:
        OSError: the file could not be written there.
    """
    recording = Profile(path, runtime, 1_000_000)
    recording.__enter__()
    if not _until_exit:
        atexit.register(_write_at_exit, os.getpid())
    _until_exit.append(recording)


def _write_at_exit(process: int) -> None:
    written = 0
    for recording in _until_exit if process == os.getpid() else ():
        path, recording.path = recording.path, None
        try:
            recording.__exit__(None, None, None)
            if (recording.calls or recording.passes) and path is not None:
                written += 1
                to = path if written == 1 else path.with_stem(f"{path.stem}-{written}")
                recording.write(to)
                print(f"KT_MOE_PROFILE: {to}\n{recording.table()}", file=sys.stderr)
        except (OSError, RuntimeError) as error:
            print(f"KT_MOE_PROFILE: {error}", file=sys.stderr)
    if process == os.getpid() and written == 0:
        print("KT_MOE_PROFILE: no layer was computed, so nothing was written", file=sys.stderr)
