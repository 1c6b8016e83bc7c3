"""Every way to store experts against a reference written from the format's description, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stored_formats as stored
import torch
from reference import PROJECTIONS, relative_error, run
from safetensors.torch import load_file, save_file
from strategies import make_problem
from torch import Tensor

from kt_moe import Checkpoint, Experts, Runtime, moe

E, H, I = 3, 256, 192  # noqa: E741
LAYER = 5
ROOT = f"model.layers.{LAYER}.mlp.experts"
DATA = Path(__file__).parents[1] / "data"
RUNTIMES = [Runtime(threads=2, shards=shards) for shards in (1, 2, 3, 16)]

Values = list[Tensor | None]  # gate or None, up [E, I, H], down [E, H, I]
Make = Callable[[int, int, int], stored.Matrix]


def per_expert(make: Make, hidden: int = H, intermediate: int = I) -> tuple[dict[str, Tensor], Values]:
    """A layer in which every expert has its own tensors."""
    tensors: dict[str, Tensor] = {}
    values = []
    for p, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        shape = (hidden, intermediate) if name == "down_proj" else (intermediate, hidden)
        made = [make(*shape, 100 * p + e) for e in range(E)]
        for e, (matrix, _) in enumerate(made):
            tensors |= {f"{ROOT}.{e}.{name}.{tail}": tensor for tail, tensor in matrix.items()}
        values.append(torch.stack([value for _, value in made]))
    return tensors, values


def floats(dtype: torch.dtype, seed: int = 0) -> Values:
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    return [torch.randn(s, generator=stored.rng(seed + n)).to(dtype) for n, s in enumerate(shapes)]


def alternate(gate: Tensor, up: Tensor, dim: int) -> Tensor:
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)


def save(tensors: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def check(path: Path, values: Values, layout: str, dtype: str) -> None:
    info = Checkpoint(path).layer(LAYER)
    assert info.gated == (values[0] is not None)
    found = (info.num_experts, info.hidden_size, info.intermediate_size, info.layout, info.dtype)
    assert found == (*values[2].shape, layout, dtype)
    for runtime in RUNTIMES:
        decoded = Experts.from_checkpoint(path, LAYER, runtime=runtime).dequantize()
        for name, got, want in zip(("gate", "up", "down"), decoded, values, strict=True):
            if want is None:
                assert got is None
                continue
            assert got.dtype == torch.bfloat16
            assert torch.equal(got.view(torch.int16), want.bfloat16().view(torch.int16)), name


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]
)
@pytest.mark.parametrize("words", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_floats_of_each_expert(
    tmp_path: Path, dtype: torch.dtype, name: str, words: tuple[str, str, str]
) -> None:
    values = floats(dtype)
    tensors = {
        f"{ROOT}.{e}.{word}.weight": value[e]
        for word, value in zip(words, values, strict=True)
        for e in range(E)
    }
    check(save(tensors, tmp_path), values, "per-expert", name)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")]
)
@pytest.mark.parametrize("layout", ["fused", "fused, transposed", "fused, transposed, interleaved"])
def test_floats_of_all_experts(tmp_path: Path, dtype: torch.dtype, name: str, layout: str) -> None:
    gate, up, down = floats(dtype)
    if layout == "fused":  # transformers 5
        tensors = {f"{ROOT}.gate_up_proj": torch.cat((gate, up), 1), f"{ROOT}.down_proj": down}
    elif layout == "fused, transposed":  # Llama 4
        gate_up = torch.cat((gate, up), 1).transpose(1, 2)
        tensors = {f"{ROOT}.gate_up_proj": gate_up, f"{ROOT}.down_proj": down.transpose(1, 2)}
    else:  # gpt-oss
        tensors = {
            f"{ROOT}.gate_up_proj": alternate(gate, up, 1).transpose(1, 2),
            f"{ROOT}.gate_up_proj_bias": torch.randn(E, 2 * I).to(dtype),
            f"{ROOT}.down_proj": down.transpose(1, 2),
            f"{ROOT}.down_proj_bias": torch.randn(E, H).to(dtype),
        }
    check(save(tensors, tmp_path), [gate, up, down], layout, name)


WITHOUT_GATE: dict[str, tuple[Make, str, str]] = {
    "fp8": (stored.fp8, "per-expert", "F8_E4M3"),
    "int8": (stored.int8_rows, "per-expert", "I8"),
    "compressed-tensors": (partial(stored.compressed_tensors, group=32), "compressed-tensors", "I32"),
    "gptq": (partial(stored.gptq, group=64, asymmetric=True), "gptq", "I32"),
    "awq": (partial(stored.awq, group=64), "awq", "I32"),
    "nvfp4": (stored.nvfp4, "nvfp4, compressed-tensors", "U8"),
}


@pytest.mark.parametrize("kind", WITHOUT_GATE)
def test_experts_without_a_gate(tmp_path: Path, kind: str) -> None:
    make, layout, dtype = WITHOUT_GATE[kind]
    tensors, values = per_expert(make)
    tensors = {name: tensor for name, tensor in tensors.items() if ".gate_proj." not in name}
    check(save(tensors, tmp_path), [None, *values[1:]], layout, dtype)


def test_square_experts_are_not_ambiguous(tmp_path: Path) -> None:
    """H = 2I: gate_up_proj is square, down_proj tells."""
    gate, up = torch.randn(2, E, 16, 32).bfloat16()
    down = torch.randn(E, 32, 16).bfloat16()
    both = torch.cat((gate, up), 1)
    natural = {f"{ROOT}.gate_up_proj": both, f"{ROOT}.down_proj": down}
    check(save(natural, tmp_path), [gate, up, down], "fused", "BF16")
    turned = {name: tensor.transpose(1, 2) for name, tensor in natural.items()}
    check(save(turned, tmp_path), [gate, up, down], "fused, transposed", "BF16")


FP8: dict[str, dict[str, Any]] = {
    "blocks": {},
    "bf16 scales": {"scale_dtype": torch.bfloat16},
    "e8m0 scales": {"scale_dtype": torch.float8_e8m0fnu},
    "f16 scales": {"scale_dtype": torch.float16},
}


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (200, 130), (48, 64)])
def test_fp8_blocks(tmp_path: Path, kind: str, hidden: int, intermediate: int) -> None:
    tensors, values = per_expert(lambda o, i, s: stored.fp8(o, i, s, **FP8[kind]), hidden, intermediate)
    check(save(tensors, tmp_path), values, "per-expert", "F8_E4M3")


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_rows(tmp_path: Path, ranks: int) -> None:
    def make(out: int, inp: int, seed: int) -> stored.Matrix:
        shape = (out, 1)[:ranks]
        return stored.fp8(out, inp, seed, block=(1, inp), scale_shape=shape, tail="weight_scale")

    tensors, values = per_expert(make)
    check(save(tensors, tmp_path), values, "per-expert", "F8_E4M3")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def make(out: int, inp: int, seed: int) -> stored.Matrix:
        tensors, value = stored.fp8(out, inp, seed, block=(out, inp), tail="weight_scale")
        # Scales of activations stand beside them; they are no business of the weights.
        tensors["weight_scale"] = tensors["weight_scale"].reshape(shape)
        return tensors | {"input_scale": torch.ones(())}, value

    tensors, values = per_expert(make)
    check(save(tensors, tmp_path), values, "per-expert", "F8_E4M3")


def test_fp8_of_all_experts(tmp_path: Path) -> None:
    hidden, intermediate = 200, 256
    made, values = per_expert(stored.fp8, hidden, intermediate)

    def stack(word: str, tail: str) -> Tensor:
        return torch.stack([made[f"{ROOT}.{e}.{word}.{tail}"] for e in range(E)])

    tensors = {}
    for tail, called in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
        gate_up = torch.cat((stack("gate_proj", tail), stack("up_proj", tail)), 1)
        tensors |= {
            f"{ROOT}.gate_up_proj{called}": gate_up,
            f"{ROOT}.down_proj{called}": stack("down_proj", tail),
        }
    check(save(tensors, tmp_path), values, "fused", "F8_E4M3")


def test_int8_rows(tmp_path: Path) -> None:
    tensors, values = per_expert(stored.int8_rows)
    check(save(tensors, tmp_path), values, "per-expert", "I8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_compressed_tensors(tmp_path: Path, dtype: torch.dtype, group: int | None, asymmetric: bool) -> None:
    tensors, values = per_expert(
        lambda o, i, s: stored.compressed_tensors(
            o, i, s, group=group or i, dtype=dtype, asymmetric=asymmetric
        )
    )
    check(save(tensors, tmp_path), values, "compressed-tensors", "I32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("g_idx", [False, True])
def test_gptq(tmp_path: Path, dtype: torch.dtype, group: int | None, asymmetric: bool, g_idx: bool) -> None:
    tensors, values = per_expert(
        lambda o, i, s: stored.gptq(
            o, i, s, group=group or i, dtype=dtype, asymmetric=asymmetric, g_idx=g_idx
        )
    )
    check(save(tensors, tmp_path), values, "gptq", "I32")


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_awq(tmp_path: Path, group: int | None, asymmetric: bool) -> None:
    tensors, values = per_expert(lambda o, i, s: stored.awq(o, i, s, group=group or i, asymmetric=asymmetric))
    check(save(tensors, tmp_path), values, "awq", "I32")


@pytest.mark.parametrize("biases", [False, True])
def test_mxfp4(tmp_path: Path, biases: bool) -> None:
    blocks, scales, both = stored.mxfp4(E, 2 * I, H, 0)
    down_blocks, down_scales, down = stored.mxfp4(E, H, I, 1)
    tensors = {
        f"{ROOT}.gate_up_proj_blocks": blocks,
        f"{ROOT}.gate_up_proj_scales": scales,
        f"{ROOT}.down_proj_blocks": down_blocks,
        f"{ROOT}.down_proj_scales": down_scales,
    }
    if biases:
        tensors[f"{ROOT}.gate_up_proj_bias"] = torch.randn(E, 2 * I).bfloat16()
        tensors[f"{ROOT}.down_proj_bias"] = torch.randn(E, H).bfloat16()
    check(save(tensors, tmp_path), [both[:, 0::2], both[:, 1::2], down], "mxfp4", "U8")


@pytest.mark.parametrize("modelopt", [False, True])
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 192), (48, 80)])
def test_nvfp4(tmp_path: Path, modelopt: bool, hidden: int, intermediate: int) -> None:
    tensors, values = per_expert(
        lambda o, i, s: stored.nvfp4(o, i, s, modelopt=modelopt), hidden, intermediate
    )
    layout = "nvfp4, modelopt" if modelopt else "nvfp4, compressed-tensors"
    path = save(tensors, tmp_path)
    check(path, values, layout, "U8")
    info = Checkpoint(path).layer(LAYER)
    assert (info.format, info.scale_type, info.scale_cols, info.global_scale) == ("nvfp4", "e4m3", 16, True)
    assert info.mappable
    paged = Experts.from_checkpoint(path, LAYER, paged=True)
    packed = [Experts.from_checkpoint(path, LAYER, cache_dir=tmp_path / "cache") for _ in range(2)]
    for experts in (paged, *packed):
        assert all(torch.equal(got, want) for got, want in zip(experts.dequantize(), values, strict=True))


def test_nvfp4_packed_of_one_layout_is_not_the_other(tmp_path: Path) -> None:
    """The same bytes stand for other numbers, which the header of a packed file says."""
    for modelopt in (False, True):
        tensors, values = per_expert(lambda o, i, s: stored.nvfp4(o, i, s, modelopt=modelopt))  # noqa: B023
        path = save(tensors, tmp_path)
        warned = pytest.warns(UserWarning, match="shape or format") if modelopt else nullcontext()
        with warned:
            experts = Experts.from_checkpoint(path, LAYER, cache_dir=tmp_path / "cache")
        assert all(torch.equal(got, want) for got, want in zip(experts.dequantize(), values, strict=True))


def test_biases_beside_mxfp4(tmp_path: Path) -> None:
    """As gpt-oss has them, those of gate and up alternating: what a layer computes with them."""
    problem = make_problem(9, H, I, E, 2, {}, biased=PROJECTIONS, activation="gpt_oss")
    gate_bias, up_bias, down_bias = problem.biases
    assert gate_bias is not None
    assert up_bias is not None
    tensors = {
        f"{ROOT}.gate_up_proj_bias": alternate(gate_bias, up_bias, 1),
        f"{ROOT}.down_proj_bias": down_bias,
    }
    for seed, (name, out, into) in enumerate((("gate_up_proj", 2 * I, H), ("down_proj", H, I))):
        blocks, scales, _ = stored.mxfp4(E, out, into, seed)
        small = scales % 3 + 119  # so that biases are seen beside the weights
        tensors |= {f"{ROOT}.{name}_blocks": blocks, f"{ROOT}.{name}_scales": small}
    experts = Experts.from_checkpoint(save(tensors, tmp_path), LAYER, activation="gpt_oss")
    problem.weights = experts.dequantize()
    ours = moe(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts)
    assert relative_error(ours, run(problem, torch.float64)["out"]) < 0.005


@pytest.mark.parametrize(
    ("bits", "parts", "hidden", "intermediate"),
    [
        (8, 1, 64, 64),
        (8, 2, 192, 256),
        (8, 3, 3712, 192),
        (4, 1, 128, 128),
        (4, 2, 384, 256),
        (4, 2, 3712, 512),
    ],
)
def test_kt(tmp_path: Path, bits: int, parts: int, hidden: int, intermediate: int) -> None:
    tensors: dict[str, Tensor] = {}
    values = []
    for p, name in enumerate(("gate", "up", "down")):
        down = name == "down"
        shape = (hidden, intermediate) if down else (intermediate, hidden)
        made = [stored.kt_matrix(*shape, 100 * p + e, bits=bits, parts=parts, down=down) for e in range(E)]
        for e, (matrix, _) in enumerate(made):
            for part, (part_tensors, _) in enumerate(matrix):
                key = f"blk.{LAYER}.ffn_{name}_exps.{e}.numa.{part}"
                tensors |= {f"{key}.{tail}": tensor for tail, tensor in part_tensors.items()}
        values.append(torch.stack([value for _, value in made]))
    check(save(tensors, tmp_path), values, "kt", "I8")


@pytest.mark.parametrize(("bits", "most"), [(8, 0.008), (4, 0.13)])
def test_kt_files_stand_for_what_they_were_made_from(bits: int, most: float) -> None:
    source = load_file(DATA / f"kt_int{bits}" / "source-bf16.safetensors")
    path = DATA / f"kt_int{bits}" / f"kt-int{bits}.safetensors"
    decoded = Experts.from_checkpoint(path, LAYER).dequantize()
    for name, got in zip(("gate", "up", "down"), decoded, strict=True):
        want = source[f"{name}_proj"].float()
        assert (got.float() - want).norm() / want.norm() < most


def damaged(kind: str) -> dict[str, Tensor]:
    """A layer of some format, whole."""
    return {
        "fp8": lambda: per_expert(stored.fp8)[0],
        "packed": lambda: per_expert(lambda o, i, s: stored.compressed_tensors(o, i, s, group=32))[0],
        "gptq": lambda: per_expert(lambda o, i, s: stored.gptq(o, i, s, group=32))[0],
        "nvfp4": lambda: per_expert(stored.nvfp4)[0],
        "modelopt": lambda: per_expert(lambda o, i, s: stored.nvfp4(o, i, s, modelopt=True))[0],
    }[kind]()


@pytest.mark.parametrize(("kind", "tail"), [("nvfp4", "weight_global_scale"), ("modelopt", "weight_scale_2")])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("paged", [False, True])
def test_global_scales_that_scale_nothing(
    tmp_path: Path, kind: str, tail: str, value: float, paged: bool
) -> None:
    tensors = damaged(kind)
    tensors[f"{ROOT}.2.down_proj.{tail}"].fill_(value)
    with pytest.raises(
        ValueError, match=rf"2\.down_proj\.{tail}\" of expert 2 is .*, wanted a positive and finite"
    ):
        Experts.from_checkpoint(save(tensors, tmp_path), LAYER, paged=paged)


@pytest.mark.parametrize(
    ("tail", "change", "says"),
    [
        ("weight_packed", lambda t: t.view(torch.int8), "is I8, wanted one of U8"),
        ("weight_packed", lambda t: t[:, ::2], r"has shape \[192, 64\], wanted \[192, 128\]"),
        ("weight_packed", lambda t: t[:-1], r"wanted \[I, H / 2\] and \[H, I / 2\], H and I multiples of 16"),
        ("weight_scale", lambda t: t.float(), "is F32, wanted one of F8_E4M3"),
        ("weight_scale", lambda t: t[:, 1:], r"has shape \[192, 15\], wanted \[192, 16\]"),
        ("weight_global_scale", lambda t: t.half(), "is F16, wanted one of F32"),
        ("weight_global_scale", lambda t: t.repeat(2), r"has shape \[2\], wanted one number: \[\] or \[1\]"),
    ],
)
def test_nvfp4_of_other_types_and_shapes(
    tmp_path: Path, tail: str, change: Callable[[Tensor], Tensor], says: str
) -> None:
    tensors = damaged("nvfp4")
    tensors = {name: change(t) if name.endswith(f".{tail}") else t for name, t in tensors.items()}
    with pytest.raises(ValueError, match=says):
        Checkpoint(save(tensors, tmp_path)).layer(LAYER)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nvfp4_scales_that_are_nan(tmp_path: Path, code: int) -> None:
    tensors = damaged("nvfp4")
    tensors[f"{ROOT}.1.up_proj.weight_scale"].view(torch.uint8)[7, 3] = code
    with pytest.raises(ValueError, match=r"1\.up_proj\.weight_scale\" has a scale that .* \[7, 3\] of"):
        Experts.from_checkpoint(save(tensors, tmp_path), LAYER)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
@pytest.mark.parametrize(
    ("kind", "tail", "place", "says"),
    [
        ("fp8", "weight_scale_inv", (1, 0), r"\[1, 0\]"),
        ("packed", "weight_scale", (7, 3), r"\[7, 3\]"),
        ("gptq", "scales", (2, 9), r"\[9, 2\]"),
    ],
)
def test_scales_that_scale_nothing(
    tmp_path: Path, value: float, kind: str, tail: str, place: tuple[int, int], says: str
) -> None:
    tensors = damaged(kind)
    tensors[f"{ROOT}.1.up_proj.{tail}"][place] = value
    with pytest.raises(
        ValueError, match=rf"1\.up_proj\.{tail}\" has a scale that .* block {says} of expert 1"
    ):
        Experts.from_checkpoint(save(tensors, tmp_path), LAYER)


@pytest.mark.parametrize(
    ("kind", "name", "change", "says"),
    [
        ("fp8", "2.up_proj.weight_scale_inv", None, r"2\.up_proj\.weight_scale_inv\" is missing"),
        ("fp8", "1.down_proj.weight", lambda t: t.view(torch.int8), "is I8, the layer's first is F8_E4M3"),
        ("fp8", "0.gate_proj.weight", lambda t: t[:, :-1], r"has shape \[192, 256\], wanted \[192, 255\]"),
        ("packed", "1.up_proj.weight_scale", lambda t: t.float(), "is F32, the layer's first is BF16"),
        ("packed", "1.up_proj.weight_shape", lambda t: t.flip(0), r"says \[256, 192\], but .* \[192, 256\]"),
        ("packed", "0.up_proj.weight_packed", lambda t: t[:, ::2], "wanted"),
        ("nvfp4", "1.up_proj.weight_global_scale", None, r"1\.up_proj\.weight_global_scale\" is missing"),
        ("modelopt", "1.up_proj.weight_scale", None, r"1\.up_proj\.weight_scale\" is missing"),
        (
            "gptq",
            "0.up_proj.g_idx",
            lambda t: t.flip(0),
            "puts column 0 into group 7, wanted 0: .*act-order",
        ),
        (
            "gptq",
            "2.up_proj.g_idx",
            lambda t: t.flip(0),
            "puts column 0 into group 7, wanted 0: .*act-order",
        ),
        ("gptq", "0.up_proj.qzeros", lambda t: t[:4], "has shape"),
        ("gptq", "0.up_proj.qzeros", lambda t: torch.full_like(t, 0x88888888 - (1 << 32)), "gptq_v2"),
    ],
)
def test_layers_that_do_not_fit_together(
    tmp_path: Path, kind: str, name: str, change: Callable[[Tensor], Tensor] | None, says: str
) -> None:
    tensors = damaged(kind)
    broken = tensors.pop(f"{ROOT}.{name}")
    if change is not None:
        tensors[f"{ROOT}.{name}"] = change(broken)
    with pytest.raises(ValueError, match=says):
        Experts.from_checkpoint(save(tensors, tmp_path), LAYER)
