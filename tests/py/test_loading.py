"""Experts quantised, packed into files, paged from checkpoints, and loads that are broken off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import make_problem, run_ours
from torch import Tensor

import kt_moe
from kt_moe import cli
from kt_moe.experts import FORMATS

QUANTISED = [f for f in FORMATS if f != "bf16"]
# On normal weights. For 4-bit codes in groups of 32 no choice of scales gets below 0.081.
MOST_ERROR = {"int8": 0.0075, "int4": 0.083, "fp8": 0.027, "mxfp4": 0.125, "nvfp4": 0.1}
# Bits of a code, bytes of a scale and the columns that share it (fp8: and as many rows).
KEPT = {"int8": (8, 4, 128), "int4": (4, 2, 32), "fp8": (8, 4, 128), "mxfp4": (4, 1, 32), "nvfp4": (4, 1, 16)}

E, H, I = 3, 256, 192  # noqa: E741


def weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    gate, up, down = (torch.randn(s, generator=random).mul(0.05).bfloat16() for s in shapes)
    return gate, up, down


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {}
    for name, stack in zip(("gate_proj", "up_proj", "down_proj"), weights(), strict=True):
        for e in range(E):
            tensors[f"model.layers.0.mlp.experts.{e}.{name}.weight"] = stack[e].contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


def packed_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("format", ["bf16", "int4", "nvfp4"])
def test_experts_without_a_gate(checkpoint: Path, tmp_path: Path, format: str, shards: int) -> None:
    gated = load_file(checkpoint / "model.safetensors")
    tensors = {name: tensor for name, tensor in gated.items() if ".gate_proj." not in name}
    save_file(tensors, tmp_path / "up.safetensors")
    _, up, down = weights()
    runtime = kt_moe.Runtime(2, shards)
    made = kt_moe.Experts(None, up, down, activation="relu2", format=format, runtime=runtime)
    assert made.projections == ("up", "down")
    assert made.dequantize()[0] is None
    _, wanted_up, wanted_down = kt_moe.Experts(*weights(), format=format).dequantize()
    for options in ({}, {"cache_dir": tmp_path / "packed"}, {"cache_dir": tmp_path / "packed"}):
        loaded = kt_moe.Experts.from_checkpoint(
            tmp_path / "up.safetensors", 0, activation="relu2", format=format, runtime=runtime, **options
        )
        assert not loaded.gated
        assert loaded.nbytes == made.nbytes
        assert loaded.quantization_error == made.quantization_error
        assert same(loaded.dequantize()[1:], (wanted_up, wanted_down))
        assert loaded.verify()
    if format == "bf16":
        paged = kt_moe.Experts.from_checkpoint(tmp_path / "up.safetensors", 0, paged=True, runtime=runtime)
        assert same(paged.dequantize()[1:], (wanted_up, wanted_down))
        assert paged.page_nodes()


def test_a_gate_where_there_is_none_is_refused() -> None:
    _, up, down = weights()
    with pytest.raises(ValueError, match="gate_bias is given, but gate is None"):
        kt_moe.Experts(None, up, down, gate_bias=torch.zeros(E, I))
    with pytest.raises(ValueError, match=r"down has shape .*, wanted .*\[E, H, I\] of up's \[E, I, H\]"):
        kt_moe.Experts(None, up, up)
    experts = kt_moe.Experts(None, up, down, activation="relu2")
    with pytest.raises(ValueError, match=r"targets is \('gate', 'up'\), wanted some of \['up', 'down'\]"):
        kt_moe.MoELayer(experts, targets=("gate", "up"))
    assert kt_moe.MoELayer(experts).targets == ("up", "down")
    lora = {"gate_lora_a": torch.zeros(E, 1, H), "gate_lora_b": torch.zeros(E, I, 1)}
    hidden, ids, routing = torch.zeros(2, H), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match="gate_lora_a is given, but the experts have no gate"):
        kt_moe.moe(hidden, ids, routing, experts, lora)


@pytest.mark.parametrize("format", QUANTISED)
def test_quantised_when_made(format: str) -> None:
    experts = kt_moe.Experts(*weights(), format=format)
    assert experts.format == format
    assert experts.quantization_error is not None
    for name, w, q in zip(("gate", "up", "down"), weights(), experts.dequantize(), strict=True):
        error = float((w.double() - q.double()).norm() / w.double().norm())
        assert error <= MOST_ERROR[format]
        assert error == pytest.approx(experts.quantization_error[name], rel=1e-6)
    bits, scale, group = KEPT[format]
    scales = sum(
        -(-rows // (group if format == "fp8" else 1)) * -(-cols // group) * scale
        for rows, cols in ((I, H), (I, H), (H, I))
    )
    global_scales = 3 * 4 if format == "nvfp4" else 0
    assert experts.nbytes == E * (3 * H * I * bits // 8 + scales + global_scales)


def nvfp4_by_numpy(weight: Tensor) -> np.ndarray:
    """A matrix quantised and decoded by ModelOpt's rule: the peak of the matrix is 6 * 448 global scales,
    that of a group of 16 is 6 of its scales, in E4M3; codes are the nearest, of two as near the even one.
    """
    values = weight.float().numpy()
    rows, cols = values.shape
    groups = np.zeros((rows, -(-cols // 16) * 16), np.float32)
    groups[:, :cols] = values
    groups = groups.reshape(rows, -1, 16)
    e4m3 = np.sort(torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy())
    whole = np.float32(np.abs(values).max() / np.float32(2688))
    wanted = np.abs(groups).max(-1) / (np.float32(6) * whole)
    wanted = np.clip(np.where(wanted == 0, np.float32(1), wanted), np.float32(2**-9), np.float32(448))
    scales = nearest(e4m3, wanted) * whole
    numbers = nearest(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32), np.abs(groups) / scales[..., None])
    decoded = np.copysign(numbers, groups) * scales[..., None]
    return decoded.reshape(rows, -1)[:, :cols]


def nearest(ascending: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The closest of the numbers, of two as close the one with the even place."""
    above = np.clip(np.searchsorted(ascending, x), 1, len(ascending) - 1)
    to_above, to_below = ascending[above] - x.astype(np.float64), x.astype(np.float64) - ascending[above - 1]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return ascending[np.where(up, above, above - 1)]


@given(
    rows=st.integers(1, 5), cols=st.integers(1, 70), size=st.sampled_from([1e-20, 3e-3, 1.0, 1e25]),
    spread=st.sampled_from([0.0, 2.0, 6.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_nvfp4_by_its_own_rule(rows: int, cols: int, size: float, spread: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shapes = ((1, rows, cols), (1, rows, cols), (1, cols, rows))
    normal = [torch.randn(2, *s, generator=random) for s in shapes]
    made = [((w * torch.exp(spread * v)).clamp(-1e10, 1e10) * size).bfloat16() for w, v in normal]
    made[0][0, 0] = 0  # groups of zeros
    decoded = kt_moe.Experts(*made, format="nvfp4").dequantize()
    for got, want in zip(decoded, made, strict=True):
        if not want.any():
            assert not got.any()
            continue
        bits = torch.from_numpy(nvfp4_by_numpy(want[0])).bfloat16().view(torch.int16)
        assert torch.equal(got[0].view(torch.int16), bits)


def test_bf16_is_not_quantised() -> None:
    assert kt_moe.Experts(*weights()).quantization_error is None


@pytest.mark.parametrize("format", QUANTISED)
def test_gradients_are_those_of_the_decoded_weights(format: str) -> None:
    problem = make_problem(T=33, H=96, inner=72, E=4, K=2, ranks={"gate": 4, "up": 4, "down": 4})
    runtime = kt_moe.default_runtime()
    quantised = kt_moe.Experts(*problem.weights, format=format, runtime=runtime)
    decoded = kt_moe.Experts(*quantised.dequantize(), runtime=runtime)
    ours = run_ours(problem, runtime, experts=quantised)
    theirs = run_ours(problem, runtime, experts=decoded)
    for name, grad in theirs.items():
        assert torch.allclose(ours[name].double(), grad.double(), rtol=0, atol=1e-3 * float(grad.abs().max()))


def test_infinite_weights_are_not_quantised() -> None:
    gate, up, down = weights()
    up[1, 2, 3] = float("inf")
    kt_moe.Experts(gate, up, down)  # as they are
    with pytest.raises(ValueError, match=r"up: expert 1: .*row 2.*column 3"):
        kt_moe.Experts(gate, up, down, format="int4")


@pytest.mark.parametrize("format", ["as-stored", *FORMATS])
def test_quantised_when_loaded(checkpoint: Path, format: str) -> None:
    loaded = kt_moe.Experts.from_checkpoint(checkpoint, 0, format=format)
    made = kt_moe.Experts(*weights(), format="bf16" if format == "as-stored" else format)
    assert loaded.format == made.format
    assert same(loaded.dequantize(), made.dequantize())
    assert loaded.quantization_error == made.quantization_error


def fused(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    named = {f"model.layers.0.mlp.experts.{name}": tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / "model.safetensors")
    return folder


def down_bias(experts: kt_moe.Experts) -> Tensor | None:
    into = torch.empty(experts.num_experts, H, dtype=torch.bfloat16)
    return into if experts._core.bias("down", into) else None


@pytest.mark.parametrize(
    ("layout", "way"),
    [(layout, way) for layout in ("each", "fused", "biased") for way in ("own", "int4", "packed")]
    + [("each", "paged"), ("fused", "paged")],
)
def test_some_experts_of_a_layer(checkpoint: Path, tmp_path: Path, layout: str, way: str) -> None:
    gate, up, down = weights()
    path = checkpoint
    if layout == "fused":
        path = fused(tmp_path / "fused", gate_up_proj=torch.cat([gate, up], dim=1), down_proj=down)
    if layout == "biased":  # as gpt-oss
        path = fused(
            tmp_path / "biased",
            gate_up_proj=torch.stack([gate, up], dim=2).reshape(E, 2 * I, H).mT,
            down_proj=down.mT,
            gate_up_proj_bias=torch.randn(E, 2 * I).bfloat16(),
            down_proj_bias=torch.randn(E, H).bfloat16(),
        )
    options: dict[str, dict[str, Any]] = {
        "own": {},
        "int4": {"format": "int4"},
        "packed": {"cache_dir": tmp_path / "cache"},
        "paged": {"paged": True},
    }
    whole = kt_moe.Experts.from_checkpoint(path, 0, **options[way])
    bias = down_bias(whole)
    assert (bias is None) == (layout != "biased")
    nbytes = kt_moe.Checkpoint(path).layer(0).nbytes
    for part in (range(1, 3), range(1), range(E)):
        for _ in range(2 if way == "packed" else 1):
            seen: list[int] = []
            experts = kt_moe.Experts.from_checkpoint(
                path, 0, experts=part, progress=seen.append, **options[way]
            )
            assert experts.num_experts == len(part)
            assert experts.nbytes * E == whole.nbytes * len(part)
            assert sum(seen) * E == nbytes * len(part)
            assert same(experts.dequantize(), tuple(w[part.start : part.stop] for w in whole.dequantize()))
            assert experts.verify()
            if bias is not None:
                assert torch.equal(down_bias(experts), bias[part.start : part.stop])
    assert len(packed_files(tmp_path / "cache")) == (4 if way == "packed" else 0)


def test_only_the_experts_asked_for_are_read(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, file)
    kt_moe.Experts.from_checkpoint(checkpoint, 0, format="int4", experts=range(1, 3))
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layer 0: up of expert 2: .*row 3.*column 4"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, format="int4", experts=range(1, 3))


@pytest.mark.parametrize("experts", [range(0), range(2, E + 1), range(-1, 2), range(2, 1)])
def test_experts_that_a_layer_does_not_have(checkpoint: Path, experts: range) -> None:
    with pytest.raises(ValueError, match=rf"experts is range\({experts.start}, .*layer 0 has 3 experts"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, experts=experts)


def test_experts_are_a_range(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"experts is range\(0, 3, 2\), wanted a range without a step"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, experts=range(0, 3, 2))
    with pytest.raises(TypeError, match=r"experts is \[0\], wanted a range or None"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, experts=[0])


def test_progress_adds_up_to_the_bytes_of_the_layer(checkpoint: Path, tmp_path: Path) -> None:
    nbytes = kt_moe.Checkpoint(checkpoint).layer(0).nbytes
    for options in (
        {},
        {"format": "int4"},
        {"cache_dir": tmp_path / "cache"},
        {"cache_dir": tmp_path / "cache"},
    ):
        seen: list[int] = []
        kt_moe.Experts.from_checkpoint(checkpoint, 0, progress=seen.append, **options)
        assert sum(seen) == nbytes


@pytest.mark.parametrize("format", ["as-stored", "int4", "int8"])
def test_a_packed_layer_is_mapped_the_second_time(checkpoint: Path, tmp_path: Path, format: str) -> None:
    cache = tmp_path / "cache"
    plain = kt_moe.Experts.from_checkpoint(checkpoint, 0, format=format)
    for _ in range(2):
        experts = kt_moe.Experts.from_checkpoint(checkpoint, 0, format=format, cache_dir=cache)
        assert experts.mapped
        assert same(experts.dequantize(), plain.dequantize())
        assert experts.quantization_error == plain.quantization_error
        (path,) = packed_files(cache)
    before = path.stat()
    kt_moe.Experts.from_checkpoint(checkpoint, 0, format=format, cache_dir=cache)
    assert path.stat() == before


def test_two_formats_of_a_layer_lie_side_by_side(checkpoint: Path, tmp_path: Path) -> None:
    for format in ("int4", "int8"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, format=format, cache_dir=tmp_path / "cache")
    assert len(packed_files(tmp_path / "cache")) == 2


def test_a_changed_checkpoint_is_packed_again(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)
    os.utime(checkpoint / "model.safetensors", (1, 1))
    with pytest.warns(UserWarning, match="the checkpoint has changed since"):
        experts = kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)
    assert same(experts.dequantize(), weights())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "version", "header", "other file"])
def test_a_damaged_packed_layer_is_made_again(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)
    (path,) = packed_files(cache)
    good = path.read_bytes()
    bad = {
        "truncated": good[:-1],
        "longer": good + b"x",
        "empty": b"",
        "version": good[:8] + b"\x07" + good[9:],
        "header": good[:40] + bytes([good[40] ^ 1]) + good[41:],
        "other file": b"something else" * 1000,
    }
    path.unlink()  # its inode may be mapped still
    path.write_bytes(bad[damage])
    with pytest.warns(UserWarning, match="made again"):
        experts = kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)
    assert same(experts.dequantize(), weights())
    assert path.read_bytes() == good


def test_an_unusable_cache_directory(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OSError, match="file"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=tmp_path / "file")


def test_a_broken_off_load_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(_: int) -> None:
        raise StopError

    cache = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(StopError):
            kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache, progress=stop)
        assert packed_files(cache) == []
    kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)
    assert len(packed_files(cache)) == 1


def test_processes_that_pack_the_same_layer_at_once(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys, kt_moe\n"
        "e = kt_moe.Experts.from_checkpoint(sys.argv[1], 0, format='int8', cache_dir=sys.argv[2])\n"
        "print(sum(t.double().sum().item() for t in e.dequantize()))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(checkpoint), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(sums) == 1
    assert len(packed_files(tmp_path / "cache")) == 1


def test_paged_experts_lie_in_the_checkpoint(checkpoint: Path) -> None:
    paged = kt_moe.Experts.from_checkpoint(checkpoint, 0, paged=True)
    assert paged.mapped
    assert same(paged.dequantize(), weights())
    problem = make_problem(T=9, H=H, inner=I, E=E, K=2, ranks={"gate": 4, "down": 4})
    problem.weights = weights()
    runtime = paged.runtime
    mapped, plain = run_ours(problem, runtime, experts=paged), run_ours(problem, runtime)
    assert all(torch.equal(mapped[name], plain[name]) for name in plain)


def test_what_paged_cannot_have(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='format is "int8", paged needs the one in the files: "bf16"'):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, format="int8", paged=True)
    with pytest.raises(ValueError, match="wanted one of them"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=tmp_path, paged=True)


def test_a_file_changed_between_index_and_load(checkpoint: Path) -> None:
    index = kt_moe.Checkpoint(checkpoint)
    path = checkpoint / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        kt_moe.Experts.from_checkpoint(index, 0)


def pack(*arguments: object) -> int:
    return cli.main(["pack", *map(str, arguments)])


def test_pack_and_verify(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert pack(checkpoint, "--cache-dir", cache, "--format", "int4") == 0
    (path,) = packed_files(cache)
    before = path.stat()
    experts = kt_moe.Experts.from_checkpoint(checkpoint, 0, format="int4", cache_dir=cache)
    assert experts.verify()
    assert path.stat() == before
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    assert not kt_moe.Experts.from_checkpoint(checkpoint, 0, format="int4", cache_dir=cache).verify()
    path.unlink()
    assert pack(checkpoint, "--cache-dir", cache, "--format", "int4") == 0
    assert kt_moe.Experts.from_checkpoint(checkpoint, 0, format="int4", cache_dir=cache).verify()


def test_pack_refuses(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    assert pack(tmp_path / "nothing", "--cache-dir", cache) == 2
    assert not cache.exists()


def test_ctrl_c_ends_a_load(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, kt_moe\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a shell's background
        "kill = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "try:\n"
        "    kt_moe.Experts.from_checkpoint(sys.argv[1], 0, cache_dir=sys.argv[2], progress=kill)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "cache")]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert out.stdout == "interrupted\n"
    assert packed_files(tmp_path / "cache") == []


def test_progress_must_not_use_the_runtime(checkpoint: Path) -> None:
    experts = kt_moe.Experts(*weights())
    with pytest.raises(RuntimeError, match="busy with this thread's own call"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, progress=lambda _: experts.dequantize())
    assert same(experts.dequantize(), weights())


@pytest.mark.parametrize("how", [{}, {"paged": True}], ids=["read", "paged"])
@pytest.mark.parametrize("what", ["scale", "shape", "order"])
def test_the_same_is_refused_however_it_is_held(tmp_path: Path, what: str, how: dict[str, bool]) -> None:
    tensors = {}
    for name, rows, cols in (("gate_proj", 32, 64), ("up_proj", 32, 64), ("down_proj", 64, 32)):
        codes = {
            "weight_packed": torch.zeros(rows, cols // 8, dtype=torch.int32),
            "weight_scale": torch.ones(rows, cols // 32, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([rows, cols]),
            "weight_g_idx": torch.arange(cols, dtype=torch.int32) // 32,
        }
        if name == "up_proj":
            codes["weight_scale"][3, 1] = float("nan") if what == "scale" else 1
            codes["weight_shape"][0] += int(what == "shape")
            codes["weight_g_idx"][40] -= int(what == "order")
        tensors |= {f"model.layers.0.mlp.experts.0.{name}.{tail}": t for tail, t in codes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"up_proj.weight_{'g_idx' if what == 'order' else what}"):
        kt_moe.Experts.from_checkpoint(tmp_path, 0, **how)


def test_a_killed_writer_leaves_no_trace(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, kt_moe\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a shell's background
        "kill = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "kt_moe.Experts.from_checkpoint(sys.argv[1], 0, cache_dir=sys.argv[2], progress=kill)\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "cache")]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    (left,) = packed_files(tmp_path / "cache")
    assert left.suffix == ".part"
    experts = kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=tmp_path / "cache")
    assert same(experts.dequantize(), weights())
    (path,) = packed_files(tmp_path / "cache")
    assert path.suffix == ".ktmoe"
    assert experts.verify()


def test_another_index_is_another_checkpoint(tmp_path: Path) -> None:
    def tensors(seed: int) -> dict[str, Tensor]:
        return {
            f"model.layers.0.mlp.experts.{e}.{name}_proj.weight": stack[e].contiguous()
            for name, stack in zip(("gate", "up", "down"), weights(seed), strict=True)
            for e in range(E)
        }

    for seed in (0, 1):
        save_file(tensors(seed), tmp_path / f"model-{seed}.safetensors")
    index, cache = tmp_path / "model.safetensors.index.json", tmp_path / "cache"
    for first in (0, 1):  # the same files, and who holds expert 0 changes
        files = {
            name: f"model-{first if '.0.' in name[20:] else 1 - first}.safetensors" for name in tensors(0)
        }
        index.write_text(json.dumps({"weight_map": files}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed = kt_moe.Experts.from_checkpoint(tmp_path, 0, cache_dir=cache)
        assert same(packed.dequantize(), kt_moe.Experts.from_checkpoint(tmp_path, 0).dequantize())


@pytest.mark.parametrize("how", ["memory", "packed", "paged"])
def test_a_file_changed_in_place(checkpoint: Path, tmp_path: Path, how: str) -> None:
    options = {"memory": {}, "packed": {"cache_dir": tmp_path / "cache"}, "paged": {"paged": True}}[how]
    index = kt_moe.Checkpoint(checkpoint)
    kt_moe.Experts.from_checkpoint(index, 0, **options)
    os.utime(checkpoint / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match=r"model\.safetensors.*has changed"):
        kt_moe.Experts.from_checkpoint(index, 0, **options)


def test_a_file_changed_during_a_load(checkpoint: Path, tmp_path: Path) -> None:
    def change(_: int) -> None:
        os.utime(checkpoint / "model.safetensors", (1, 1))

    with pytest.raises(ValueError, match="has changed"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=tmp_path / "cache", progress=change)
    assert packed_files(tmp_path / "cache") == []


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_other_file_is_overwritten(checkpoint: Path, tmp_path: Path, link: Any) -> None:
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)
    (path,) = packed_files(cache)
    path.unlink()
    victim.write_text("precious")
    link(victim, f"{path}.part")
    with pytest.raises(OSError, match=r"layer-0\.bf16\.ktmoe\.part"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=cache)
    assert victim.read_text() == "precious"


def test_weights_that_cannot_be_quantised_are_named(tmp_path: Path) -> None:
    gate, up, down = weights()
    up[1, 2, 3] = float("nan")
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{name}_proj.weight": stack[e].contiguous()
        for name, stack in (("gate", gate), ("up", up), ("down", down))
        for e in range(E)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer 0: up of expert 1: the weight in row 2, column 3 is nan"):
        kt_moe.Experts.from_checkpoint(tmp_path, 0, format="int8")


def test_arguments_of_the_wrong_type(checkpoint: Path) -> None:
    for wrong in (True, "0", None, 0.0):
        with pytest.raises(TypeError, match=r"layer is .*, wanted an int"):
            kt_moe.Experts.from_checkpoint(checkpoint, wrong)
    for number in (-1, 2**40):
        with pytest.raises(ValueError, match=r"layer is .*, wanted a number"):
            kt_moe.Experts.from_checkpoint(checkpoint, number)
    with pytest.raises(TypeError, match="paged is 'yes'"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, paged="yes")
    with pytest.raises(TypeError, match="progress is 5"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, progress=5)
    with pytest.raises(TypeError, match="cache_dir is a int"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir=5)
    with pytest.raises(ValueError, match="cache_dir is ''"):
        kt_moe.Experts.from_checkpoint(checkpoint, 0, cache_dir="")
