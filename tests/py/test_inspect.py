"""`kt-moe inspect`: what it says of whole, gappy, odd and broken checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny_checkpoint
from torch import Tensor
from user_errors import one_line_error

from kt_moe import Experts
from kt_moe.cli import main
from kt_moe.cli.formats import QUANTISED, kept_as, projection_bytes
from kt_moe.cli.text import count_text, ranges_text, size_text, table

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
    assert "layers 3-39, 42-60 (56): 4 experts, hidden 64, intermediate 32" in text
    assert "BF16, per-expert, no biases" in text
    assert ["bf16", *size_text(56 * E * 3 * H * I * 2).split()] in [x.split() for x in text.splitlines()]
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
    assert "layers 0, 3-4 (3): 4 experts" in text
    (line,) = [x for x in text.splitlines() if x.startswith("layer 1: cannot be read")]
    assert 'experts.2.up_proj.weight" is missing' in line
    assert "layer 2: cannot be read: " in text


def test_quantisation_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: dict[int, Any] = {0: {"gate": 0.1, "up": 0.2, "down": 0.3}, 1: None}

    class Loaded:
        def __init__(self, layer: int) -> None:
            self.quantization_error = errors[layer]

    def load(checkpoint: Any, layer: int, *, format: str) -> Loaded:
        assert format == "int4"
        if layer == 2:
            raise ValueError("a weight is\nnot finite")
        return Loaded(layer)

    monkeypatch.setattr(Experts, "from_checkpoint", load)
    path = save(tmp_path / "m", layer(0), layer(1), layer(2))
    assert inspect(path, "--quant", "int4") == 1
    text = capsys.readouterr().out
    assert ["0", "1.00e-01", "2.00e-01", "3.00e-01"] in [x.split() for x in text.splitlines()]
    assert "layer 1: kept as stored, nothing was quantised" in text
    assert "layer 2: cannot be read: a weight is not finite" in text
    assert "layers 0-1 (2): 4 experts" in text  # and layer 2 is not among those that can be read
    assert "these experts in memory (2 layers)" in text


def test_a_weight_that_cannot_be_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = layer(1)
    bad["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = float("nan")
    path = save(tmp_path / "m", layer(0), bad)
    assert inspect(path, "--quant", "int8") == 1
    text = capsys.readouterr().out
    (line,) = [x for x in text.splitlines() if x.startswith("layer 1")]
    assert line.startswith("layer 1: cannot be read: ")
    assert "row 3, column 4 is nan" in line
    assert str(path) not in line


def test_the_same_fault_in_several_layers_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [layer(n) for n in range(4)]
    for n in (1, 3):
        del layers[n][f"model.layers.{n}.mlp.experts.{n}.up_proj.weight"]
    assert inspect(save(tmp_path / "m", *layers)) == 1
    text = capsys.readouterr().out
    (line,) = [x for x in text.splitlines() if "cannot be read" in x]
    assert line.startswith('layers 1, 3 (2): cannot be read; layer 1: tensor "model.layers.1.')


def test_biases_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(save_tiny_checkpoint(tmp_path / "m", "gpt_oss", dtype=torch.bfloat16)) == 0
    text = capsys.readouterr().out
    assert f"biases {size_text(2 * 8 * (24 + 24 + 32))}" in text
    whole = size_text(2 * 2 * 8 * (3 * 32 * 24 + 24 + 24 + 32))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert {f"as stored {whole}", f"bf16 {whole}"} <= set(rows)


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
        (["--quant", "int3", "."], "argument --quant: invalid choice: 'int3'"),
    ],
)
def test_user_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in one_line_error(capsys, "inspect", lambda: main(["inspect", *arguments]))


def test_bytes_of_a_layer_are_those_of_its_three_projections() -> None:
    found = projection_bytes(QUANTISED["int8"], E, H, I)
    assert found == {"gate": E * (H * I + 4 * I), "up": E * (H * I + 4 * I), "down": E * (H * I + 4 * H)}


def test_how_weights_are_kept() -> None:
    plain = {
        "scale_type": "none",
        "scale_rows": 1,
        "scale_cols": 0,
        "zero_points": False,
        "global_scale": False,
    }
    for changed, wanted in (
        ({"format": "bf16"}, "bf16"),
        ({"format": "int8", "scale_type": "f32"}, "int8, f32 scales per row"),
        (
            {"format": "fp8", "scale_type": "f32", "scale_rows": 128, "scale_cols": 64},
            "fp8, f32 scales per 128 x 64",
        ),
        (
            {"format": "int4", "scale_type": "bf16", "scale_cols": 32, "zero_points": True},
            "int4, bf16 scales and zero points per 32",
        ),
        (
            {"format": "nvfp4", "scale_type": "e4m3", "scale_cols": 16, "global_scale": True},
            "nvfp4, e4m3 scales per 16, an f32 scale per matrix",
        ),
    ):
        assert kept_as(SimpleNamespace(**{**plain, **changed})) == wanted  # type: ignore[arg-type]


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
