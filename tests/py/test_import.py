"""What `import kt_moe` brings with it, and what it leaves to those who need it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """if True:
    import sys, torch
    before = set(sys.modules)
    import kt_moe
    assert "KtMoeConfig" in dir(kt_moe)
    print(*(name for name in set(sys.modules) - before if name.split(".")[0] not in ("kt_moe", "numpy")))
    weights = *torch.randn(2, 2, 64, 64), torch.randn(2, 64, 64)
    experts = kt_moe.Experts(*weights, runtime=kt_moe.Runtime(threads=1))
    x = torch.randn(3, 64, requires_grad=True)
    kt_moe.moe(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), experts).sum().backward()
    print(*(name for name in ("torch._dynamo", "transformers", "peft", "triton") if name in sys.modules))
"""


def test_only_torch_and_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("\n\n", "")


HELP = """if True:
    import sys
    from kt_moe.cli import main
    try:
        print(main(sys.argv[1:]))
    except SystemExit:
        pass
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "argv",
    [
        "--help", "--version", "bench --help", "bench --nothing", "bench --topk 999", "bench --format int5",
        "doctor --help", "doctor --sysfs /nowhere", "inspect --help", "pack --help", "merge --help",
        "models --help",
    ],
)  # fmt: skip
def test_help_and_wrong_options_need_no_torch(argv: str) -> None:
    command = [sys.executable, "-c", HELP, *argv.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr
