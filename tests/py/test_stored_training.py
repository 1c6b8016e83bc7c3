"""Layers of real shape and real files, loaded and trained: what a user does with a quantised checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stored_formats import mxfp4
from torch import Tensor
from torch.nn.functional import mse_loss

import kt_moe

DATA = Path(__file__).parent.parent / "data"


def train(experts: kt_moe.Experts, tokens: int = 24, topk: int = 2) -> None:
    """LoRA alone learns what the same layer with other weights of LoRA says, and the loss falls."""
    torch.manual_seed(0)
    layer = kt_moe.MoELayer(experts, rank=8, alpha=16)
    x = torch.randn(tokens, experts.hidden_size).bfloat16()
    ids = torch.stack([torch.randperm(experts.num_experts)[:topk] for _ in range(tokens)])
    weights = torch.rand(tokens, topk) + 0.5
    with torch.no_grad():
        start = layer(x, ids, weights).float()
    target = start + 0.3 * start.std() * torch.randn_like(start)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = mse_loss(layer(x, ids, weights).float(), target) / start.var()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert losses == sorted(losses, reverse=True)


def check_decoded(experts: kt_moe.Experts, values: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(ours, value) for ours, value in zip(experts.dequantize(), values, strict=True))


def test_deepseek_v3_shaped_fp8(tmp_path: Path) -> None:
    e, h, i = 2, 7168, 2048
    random = torch.Generator().manual_seed(3)
    tensors, values = {}, []
    for name, rows, cols in (("gate_proj", i, h), ("up_proj", i, h), ("down_proj", h, i)):
        decoded = []
        for expert in range(e):
            codes = torch.randn(rows, cols, generator=random).mul(16).to(torch.float8_e4m3fn)
            scales = (torch.rand(rows // 128, cols // 128, generator=random) + 0.5) / (16 * cols**0.5)
            key = f"model.layers.4.mlp.experts.{expert}.{name}.weight"
            tensors |= {key: codes, f"{key}_scale_inv": scales}
            wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            decoded.append((codes.float() * wide).bfloat16())
        values.append(torch.stack(decoded))
    save_file(tensors, tmp_path / "model.safetensors")
    experts = kt_moe.Experts.from_checkpoint(tmp_path, 4)
    assert experts.format == "fp8"
    check_decoded(experts, tuple(values))
    train(experts)


def test_gpt_oss_shaped_mxfp4(tmp_path: Path) -> None:
    e, h, i = 2, 2880, 2880
    root = "model.layers.0.mlp.experts"
    gate_up_blocks, gate_up_scales, _ = mxfp4(e, 2 * i, h, seed=1)
    down_blocks, down_scales, _ = mxfp4(e, h, i, seed=2)
    usual = {"gate_up": gate_up_scales, "down": down_scales}
    for scales in usual.values():  # of weights, not of any power of two
        scales.copy_(scales % 3 + 117)
    random = torch.Generator().manual_seed(5)
    save_file(
        {
            f"{root}.gate_up_proj_blocks": gate_up_blocks,
            f"{root}.gate_up_proj_scales": gate_up_scales,
            f"{root}.gate_up_proj_bias": torch.randn(e, 2 * i, generator=random).mul(0.1).bfloat16(),
            f"{root}.down_proj_blocks": down_blocks,
            f"{root}.down_proj_scales": down_scales,
            f"{root}.down_proj_bias": torch.randn(e, h, generator=random).mul(0.1).bfloat16(),
        },
        tmp_path / "model.safetensors",
    )
    experts = kt_moe.Experts.from_checkpoint(tmp_path, 0, activation="gpt_oss")
    assert experts.format == "mxfp4"
    train(experts)


@pytest.mark.parametrize("bits", [8, 4])
def test_files_of_kt_kernel(bits: int) -> None:
    folder = DATA / f"kt_int{bits}"
    experts = kt_moe.Experts.from_checkpoint(folder / f"kt-int{bits}.safetensors", 5)
    assert experts.format == f"int{bits}"
    train(experts, topk=min(2, experts.num_experts))
