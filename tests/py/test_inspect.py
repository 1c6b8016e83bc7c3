"""`kt-moe inspect`: what it says of whole, gappy, odd and broken checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny_checkpoint
from torch import Tensor
from user_errors import one_line_error

from kt_moe.cli import main
from kt_moe.cli.formats import QUANTISED, projection_bytes
from kt_moe.cli.terminal import count_text, ranges_text, size_text, table

E, H, I = 4, 64, 32  # noqa: E741


def layer(number: int, **extra: Tensor) -> dict[str, Tensor]:
    root = f"model.layers.{number}.mlp.experts"
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    tensors = {
        f"{root}.{e}.{name}.weight": torch.zeros(shape, dtype=torch.bfloat16)
        for e in range(E)
        for name, shape in shapes.items()
    }
    return tensors | {f"{root}.{name}": tensor for name, tensor in extra.items()}


def save(path: Path, *layers: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file({name: t for tensors in layers for name, t in tensors.items()}, path / "model.safetensors")
    return path


def inspect(path: Path, *more: str) -> int:
    return main(["inspect", str(path), *more])


def test_equal_layers_are_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "m", *(layer(n) for n in (*range(3, 40), *range(42, 61))))
    assert inspect(path) == 0
    text = capsys.readouterr().out
    row = "3-39, 42-60 4 64 32 BF16, per-expert bf16 48.00 KiB yes"
    assert row in [" ".join(line.split()) for line in text.splitlines()]
    assert len(text.splitlines()) < 24


def test_what_cannot_be_read_is_a_line_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = layer(1)
    del broken["model.layers.1.mlp.experts.2.up_proj.weight"]
    odd = layer(2, odd_one=torch.zeros(1))
    path = save(tmp_path / "m", layer(0), broken, odd, layer(3), layer(4))
    assert inspect(path) == 1
    text = capsys.readouterr().out
    assert "0, 3-4 " in text
    (line,) = [x for x in text.splitlines() if x.startswith("layer 1 cannot be read")]
    assert 'experts.2.up_proj.weight" is missing' in line
    assert "layer 2 cannot be read: " in text


def test_biases_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(save_tiny_checkpoint(tmp_path / "m", "gpt_oss", dtype=torch.bfloat16)) == 0
    text = capsys.readouterr().out
    assert f" {size_text(2 * 8 * (3 * 32 * 24 + 24 + 24 + 32))} " in text


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    path = save(tmp_path / "m", layer(0))
    command = [sys.executable, "-m", "kt_moe.cli", "inspect", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert process.stderr.read() == b""  # type: ignore[union-attr]
    assert process.returncode == 128 + 13


def test_a_checkpoint_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(save(tmp_path / "m", {"lm_head.weight": torch.zeros(2)})) == 0
    assert "no layer has experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere"),
        ([__file__], "header"),
        (["--json", "."], "unrecognized arguments: --json"),
    ],
)
def test_user_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in one_line_error(capsys, "inspect", lambda: main(["inspect", *arguments]))


def test_bytes_of_a_layer_are_those_of_its_three_projections() -> None:
    found = projection_bytes(QUANTISED["int8"], E, H, I)
    assert found == {"gate": E * (H * I + 4 * I), "up": E * (H * I + 4 * I), "down": E * (H * I + 4 * H)}


def test_text() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 3 << 29)] == [
        "0 bytes",
        "1023 bytes",
        "1.00 KiB",
        "1.50 GiB",
    ]
    assert [count_text(1, "file"), count_text(1200, "file")] == ["1 file", "1,200 files"]
    assert [ranges_text(n) for n in ([], [4], [0, 3, 4, 5])] == ["", "4", "0, 3-5"]
    assert table([["a", "1"], ["bcd", "10"]], right=[1]) == "a     1\nbcd  10"
