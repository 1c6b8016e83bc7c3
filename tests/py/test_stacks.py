"""docs/stacks.py: everyone computes the same, on one rank and on several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "docs" / "stacks.py"
SMALL = [
    "--device", "cpu", "--layers", "3", "--hidden", "64", "--intermediate", "32", "--experts", "5",
    "--topk", "2", "--rank", "8", "--reps", "1", "--tokens", "12,24",
]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
def test_everyone_computes_the_same(ranks: int) -> None:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    who = "kt_moe,streamed,resident" + ",divided" * (ranks > 1)
    command = [sys.executable, "-W", "ignore", *start, str(PROGRAM), *SMALL, "--who", who]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr[-2000:]
    _, _, *lines = run.stdout.splitlines()
    names = [line.split()[1] for line in lines]
    assert names == [name for name in who.split(",") for _ in range(2)]
    for tokens in ("12", "24"):
        norms = [float(line.split()[-1]) for line in lines if line.split()[0] == tokens]
        assert len(norms) == len(names) // 2
        assert norms == pytest.approx([norms[0]] * len(norms), rel=2e-3)
