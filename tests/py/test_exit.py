"""The interpreter exits while daemon threads load, pack and compute: the process ends as if they had not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

# Each exit is that of a forked child: they are quick, and end as any interpreter does. Threads call the core:
# what torch computes in a daemon thread ends the process itself.
CODE = """if True:
    import os, sys, threading, torch, kt_moe

    work, path, cache, exits = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    started = threading.Semaphore(0)

    def load():
        kt_moe.Experts.from_checkpoint(path, 0, runtime=runtime, progress=lambda n: started.release())

    def pack():
        folder = f"{cache}/{threading.get_ident()}-{os.getpid()}"
        kt_moe.Experts.from_checkpoint(path, 0, runtime=runtime, format="int8", cache_dir=folder,
                                       progress=lambda n: started.release())

    x, out, w = torch.randn(64, 256).bfloat16(), torch.empty(64, 256), torch.rand(64, 2)
    ids = torch.randint(0, 8, (64, 2))
    options = (None,) * 6, (1.0,) * 3, 0.0, 0

    def compute():
        kt_moe._core.forward(experts._core, x, ids, w, *options, None, out)
        kt_moe._core.backward(experts._core, x, ids, w, *options, None, x, out, w, (None,) * 6)
        started.release()

    def profile():
        recording = kt_moe._core.Profile(runtime._core, 1000)
        compute()
        recording.stop()

    def forever(f):
        while True:
            f()

    for number in range(exits):
        child = os.fork()
        if child == 0:
            break
        status = os.waitpid(child, 0)[1]
        if status != 0:
            sys.exit(f"exit {number}: status {status}")
    else:
        os._exit(0)
    runtime = kt_moe.Runtime(threads=3)
    experts = kt_moe.Experts.from_checkpoint(path, 0, runtime=runtime)
    for _ in range(3):
        threading.Thread(target=forever, args=(globals()[work],), daemon=True).start()
    for _ in range(3 + number % 5):
        started.acquire()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exit") / "model.safetensors"
    save_file(
        {
            f"model.layers.0.mlp.experts.{e}.{name}_proj.weight": torch.randn(shape).mul(0.05).bfloat16()
            for e in range(8)
            for name, shape in (("gate", (128, 256)), ("up", (128, 256)), ("down", (256, 128)))
        },
        path,
    )
    return path


@pytest.mark.parametrize("work", ["load", "pack", "profile"])
def test_exits_beside_daemon_threads(checkpoint: Path, tmp_path: Path, work: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CODE, work, str(checkpoint), str(tmp_path), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
