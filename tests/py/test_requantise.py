"""Quantised matrices decoded and encoded again: every format, against tensors made from descriptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import stored_formats as stored
import torch
from torch import Tensor

import kt_moe
from kt_moe.checkpoint import TensorInfo
from kt_moe.gpu.stored import StoredExperts
from kt_moe.quantised_formats import FORMATS
from kt_moe.requantise import Stored, _from_blocks, _in_blocks, _quantised, stored_as

CASES = {
    "fp8": partial(stored.fp8, 300, 200),
    "fp8, bf16 scales": partial(stored.fp8, 256, 130, scale_dtype=torch.bfloat16),
    "fp8, a scale a row": partial(
        stored.fp8, 30, 200, block=(1, 200), scale_shape=(30, 1), tail="weight_scale"
    ),
    "fp8, one scale": partial(stored.fp8, 30, 200, block=(30, 200), scale_shape=(), tail="weight_scale"),
    "int8": partial(stored.int8_rows, 40, 64),
    "compressed-tensors": partial(stored.compressed_tensors, 44, 96, group=32),
    "compressed-tensors, zero points": partial(stored.compressed_tensors, 44, 96, group=32, asymmetric=True),
    "gptq": partial(stored.gptq, 48, 96, group=32),
    "gptq, zero points": partial(stored.gptq, 48, 96, group=32, asymmetric=True, g_idx=False),
    "awq": partial(stored.awq, 48, 96, group=32),
    "nvfp4, compressed-tensors": partial(stored.nvfp4, 44, 96),
    "nvfp4, modelopt": partial(stored.nvfp4, 44, 96, modelopt=True),
    "awq, symmetric": partial(stored.awq, 48, 96, group=32, asymmetric=False),
}
if hasattr(torch, "float8_e8m0fnu"):
    CASES["fp8, e8m0 scales"] = partial(stored.fp8, 300, 200, scale_dtype=torch.float8_e8m0fnu)
ERRORS = {"fp8": 0.03, "int8": 0.01, "int4": 0.1, "gptq": 0.1, "awq": 0.1, "mxfp4": 0.13, "nvfp4": 0.13}
_DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.int32: "I32", torch.float32: "F32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
    getattr(torch, "float8_e8m0fnu", None): "F8_E8M0",
}  # fmt: skip


def found(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> tuple[Stored, dict[str, Tensor]]:
    infos = {
        key: TensorInfo(_DTYPES.get(t.dtype, "other"), tuple(t.shape), t.nbytes, Path("file"))
        for key, t in tensors.items()
    }
    one = stored_as(name, infos, shape)
    assert one is not None
    return one, {role: tensors[key] for role, key in one.names.items()}


def check(one: Stored, old: dict[str, Tensor], value: Tensor) -> None:
    decoded = one.decode(old)
    assert torch.equal(decoded.bfloat16(), value)
    same = one.encode(decoded, old)
    assert same.keys() == old.keys()
    for role, tensor in old.items():  # bytes, so that -0 is not 0
        assert torch.equal(same[role].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), role
    for scale in (0.01, 1.0, 30.0):  # smaller, like and larger than what was there
        torch.manual_seed(1)
        wanted = torch.randn(decoded.shape) * decoded.std() * scale
        new = one.encode(wanted, old)
        for role, tensor in old.items():
            assert (new[role].dtype, new[role].shape) == (tensor.dtype, tensor.shape)
        error = float((one.decode(new) - wanted).norm() / wanted.norm())
        assert error < ERRORS[one.format], scale
    with pytest.raises(ValueError, match="merged is not finite"):
        one.encode(torch.full_like(decoded, torch.inf), old)


@pytest.mark.parametrize("case", CASES)
def test_matrices(case: str) -> None:
    tails, value = CASES[case](seed=3)
    one, old = found({f"x.{tail}": tensor for tail, tensor in tails.items()}, "x.weight", tuple(value.shape))
    assert one.format in ERRORS
    check(one, old, value)


def test_mxfp4() -> None:
    blocks, scales, value = stored.mxfp4(2, 48, 64, seed=3)
    one, old = found({"x_blocks": blocks, "x_scales": scales}, "x", tuple(value.shape))
    check(one, {role: tensor[1] for role, tensor in old.items()}, value[1])


OF_CORE = {  # tensors by role, of the parts that the core keeps of a matrix
    "int8": ("int8", torch.int8),
    "fp8": ("fp8", torch.float8_e4m3fn),
    "int4": ("int4", torch.uint8),
    "mxfp4": ("mxfp4", torch.uint8),
    "nvfp4": ("nvfp4", torch.uint8),
}
SCALES = {"f32": torch.float32, "bf16": torch.bfloat16, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


def kept_by_core(weight: Tensor, format: str) -> tuple[Stored, dict[str, Tensor], Tensor]:
    """A matrix [out, in] quantised by the core: as a checkpoint would store it, and what the core decodes."""
    out, into = weight.shape
    experts = kt_moe.Experts(None, weight[None], weight.T[None], activation="relu2", format=format)
    kept = StoredExperts(experts)
    part, slot = kept.parts[0], torch.empty(kept.slot_bytes, dtype=torch.uint8)
    kept.copy_expert(0, slot)

    def read(at: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return slot[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    grid = -(-out // part.scale_rows), -(-into // part.scale_cols)
    dtype = OF_CORE[format][1]
    codes = read(part.codes, dtype, out, into // 2 if dtype is torch.uint8 else into)
    tensors = {"codes": codes, "scales": read(part.scales, SCALES[part.scale], *grid)}
    if format == "int4":
        levels = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()
        tensors["codes"] = stored.pack_nibbles(levels, 1)
    if format == "mxfp4":
        tensors["codes"] = codes.view(out, into // 32, 16)
    if format == "nvfp4":
        tensors["divisor" if part.divides else "factor"] = read(part.global_scale, torch.float32, 1)
    one = Stored(OF_CORE[format][0], dict.fromkeys(tensors, "x"), (out, into))
    return one, tensors, experts.dequantize()[1][0]


@pytest.mark.parametrize("format", OF_CORE)
def test_codes_are_rounded_as_the_core_rounds_them(format: str) -> None:
    weight = torch.randn(130, 256, generator=stored.rng(5)).bfloat16()
    one, tensors, decoded = kept_by_core(weight, format)
    assert torch.equal(one.decode(tensors).bfloat16(), decoded)
    again = one.encode(weight.float(), tensors)
    same = again["scales"].view(torch.uint8) == tensors["scales"].view(torch.uint8)
    assert same.any()
    errors = [float((one.decode(t) - weight.float()).norm()) for t in (again, tensors)]
    assert errors[0] <= errors[1] * (1 + 1e-6)
    if bool(same.all()):  # the core's scales are the best: then its codes are the nearest
        assert torch.equal(again["codes"].view(torch.uint8), tensors["codes"].view(torch.uint8))
    kept = one._blocks(tensors)
    rows = _in_blocks(weight.float(), kept.block)
    nearest = _quantised(rows, kept.scales, kept.zeros, FORMATS[one.format].nearest)
    assert torch.equal(_from_blocks(nearest.codes, kept.block, weight.shape), kept.codes)


def test_a_block_of_zeros_and_scales_that_would_be_none() -> None:
    tails, value = stored.compressed_tensors(8, 64, 3, group=32)
    one, old = found({f"x.{tail}": tensor for tail, tensor in tails.items()}, "x.weight", tuple(value.shape))
    wanted = one.decode(old)
    wanted[:4] = 0
    wanted[4:] = 1e-44  # so small that its scale is 0
    new = one.encode(wanted, old)
    assert bool((new["scales"] > 0).all())
    assert float((one.decode(new) - wanted).abs().max()) < 1e-40


def test_refused() -> None:
    tails, value = stored.gptq(48, 96, 3, group=32)
    tails["g_idx"] = tails["g_idx"].flip(0)
    one, old = found({f"x.{tail}": tensor for tail, tensor in tails.items()}, "x.weight", tuple(value.shape))
    with pytest.raises(ValueError, match=r"x\.g_idx: columns in act-order"):
        one.decode(old)
    with pytest.raises(ValueError, match=r"x\.qweight is \[12, 48\], wanted \[64, 6\] for \[48, 64\]"):
        found({f"x.{tail}": tensor for tail, tensor in tails.items()}, "x.weight", (48, 64))
    with pytest.raises(ValueError, match=r"the checkpoint lacks x\.scales"):
        found({"x.qweight": tails["qweight"]}, "x.weight", (48, 96))
    with pytest.raises(KeyError):
        found({}, "x.weight", (48, 96))


@pytest.mark.parametrize(
    ("case", "tail", "change", "message"),
    [
        ("fp8", "weight_scale_inv", lambda t: t.int(), r"weight_scale_inv is I32, wanted one of BF16, F16"),
        ("compressed-tensors", "weight_scale", lambda t: t[:22], r"is \[22, 3\], wanted \[44, 3\]"),
        ("compressed-tensors", "weight_scale", lambda t: t.flatten(), r"is \[132\], wanted \[44, 1\]"),
        (
            "compressed-tensors, zero points",
            "weight_zero_point",
            lambda t: t[:, :1],
            r"is \[6, 1\], wanted \[6, 3\]",
        ),
        ("gptq", "scales", lambda t: t[:, :5], r"is \[3, 5\], wanted \[3, 48\]"),
        ("gptq", "scales", lambda t: t[:0], r"is \[0, 48\], wanted \[1, 48\]"),
        ("gptq", "g_idx", lambda t: t[:7], r"is \[7\], wanted \[96\]"),
        ("awq", "scales", lambda t: t[:1], r"qzeros is \[3, 6\], wanted \[1, 6\]"),
        ("awq", "qzeros", lambda t: t[:, :2], r"is \[3, 2\], wanted \[3, 6\]"),
        ("awq", "qzeros", lambda t: t.float(), r"qzeros is F32, wanted one of I32"),
        ("gptq", "qweight", lambda t: t.view(torch.float32), r"qweight is F32, wanted one of I32"),
        (
            "gptq",
            "scales",
            lambda t: t.to(torch.float8_e4m3fn),
            r"scales is F8_E4M3, wanted one of BF16, F16",
        ),
        # Of 96 columns two scales are of 48, or of 64 and the rest.
        ("compressed-tensors", "weight_scale", lambda t: t[:, :2], r"is \[44, 2\], wanted \[44, 1\]"),
        ("gptq", "scales", lambda t: t[:2], r"scales is \[2, 48\], wanted \[1, 48\]"),
        ("nvfp4, modelopt", "weight_scale", lambda t: t[:, :5], r"is \[44, 5\], wanted \[44, 6\]"),
        ("nvfp4, modelopt", "weight_scale", lambda t: t.float(), r"is F32, wanted one of F8_E4M3"),
    ],
)
def test_what_is_beside_the_codes_fits_them(
    case: str, tail: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    tails, value = CASES[case](seed=3)
    tails[tail] = change(tails[tail])
    with pytest.raises(ValueError, match=message):
        found({f"x.{name}": tensor for name, tensor in tails.items()}, "x.weight", tuple(value.shape))


def test_scales_of_mxfp4_fit_its_blocks() -> None:
    blocks, scales, value = stored.mxfp4(2, 48, 64, seed=3)
    with pytest.raises(ValueError, match=r"x_scales is \[2, 48, 1\], wanted \[2, 48, 2\]"):
        found({"x_blocks": blocks, "x_scales": scales[..., :1]}, "x", tuple(value.shape))


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch 2.7")
def test_scales_of_mxfp4_in_either_dtype() -> None:
    """Exponents are the same bytes."""
    blocks, scales, value = stored.mxfp4(2, 48, 64, seed=3)
    torch.manual_seed(0)
    wanted = value.float() + torch.randn(value.shape)
    made = []
    for dtype in (torch.uint8, torch.float8_e8m0fnu):
        one, old = found({"x_blocks": blocks, "x_scales": scales.view(dtype)}, "x", tuple(value.shape))
        first = {role: tensor[0] for role, tensor in old.items()}
        assert torch.equal(one.decode(first).bfloat16(), value[0])
        made.append(one.encode(wanted[0], first))
        assert made[-1]["scales"].dtype is dtype
    assert torch.equal(made[0]["codes"], made[1]["codes"])
    assert torch.equal(made[0]["scales"], made[1]["scales"].view(torch.uint8))
