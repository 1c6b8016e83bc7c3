"""What the examples share: their options, and for `--tiny` a generated model and data.

A tiny model has the architecture of the large one, random weights that are stored in the same way, and the
tokenizer of `tiny-qwen3-moe`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 64, "head_dim": 16},
    "deepseek_v3": {
        **{"n_routed_experts": 8, "moe_intermediate_size": 128, "first_k_dense_replace": 1, "n_group": 1},
        **{"topk_group": 1, "q_lora_rank": 128, "kv_lora_rank": 128, "num_key_value_heads": 4},
        **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 128, "v_head_dim": 32},
    },
}
COMMON = {
    **{"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 4},
    **{"max_position_embeddings": 1024, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0},
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # values of mxfp4's codes, without their sign


def options(
    description: str,
    model: str,
    architecture: str,
    *,
    stored: str = "bf16",
    pairs: bool = False,
    arguments: list[str] | None = None,
) -> Any:
    """The options of an example; with --tiny `model` and `data` are generated ones.

    Args:
        model: name of the large model on the hub.
        architecture: a name of `SIZES`.
        stored: how the checkpoint has its experts: "bf16", "fp8", "mxfp4" or "int4".
        pairs: whether the data are preference pairs instead of texts.
        arguments: what is parsed; None: the command line.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=model, help="a directory, or a name on the hub (%(default)s)")
    parser.add_argument("--data", default="train.jsonl", help="a row a line (default: %(default)s)")
    output = Path("out") / Path(sys.argv[0]).stem
    parser.add_argument(
        "--output", type=Path, default=output, help="directory of the adapter (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer (default: %(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="a generated model and three steps, on any machine"
    )
    args = parser.parse_args(arguments)
    if args.tiny:
        args.output.mkdir(parents=True, exist_ok=True)
        args.model = str(tiny_model(args.output / f"tiny-{architecture}-{stored}", architecture, stored))
        args.data = str(tiny_data(args.output / "tiny.jsonl", pairs))
        args.steps = 3
    return args


def tiny_data(path: Path, pairs: bool) -> Path:
    """Sixteen rows, of texts or of preference pairs."""
    texts = [f"def add_{n}(x):\n    return x + {n}\n" for n in range(16)]
    rows: list[dict[str, str]] = [{"text": text} for text in texts]
    if pairs:
        rows = [{"prompt": t[:12], "chosen": t[12:], "rejected": "    pass\n"} for t in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_model(path: Path, architecture: str, stored: str) -> Path:
    """A random model of an architecture, its experts stored as `options` says; kept if it is there."""
    if (path / "whole").exists():
        return path
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**COMMON, **SIZES[architecture]})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(HERE / "tiny-qwen3-moe" / file, path)
    store, note = STORED[stored]
    weights = load_file(path / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors |= store(name, weight)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | note))
    (path / "whole").touch()
    return path


def as_bf16(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The weight as it is."""
    return {name: weight}


def as_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek's FP8: E4M3 and a scale for 128 x 128, of all matrices in layers but the router."""
    if weight.dim() < 2 or "layers" not in name or name.endswith("gate.weight"):
        return {name: weight}
    rows, cols = (-(-size // 128) * 128 for size in weight.shape)
    whole = torch.zeros(rows, cols)
    whole[: weight.shape[0], : weight.shape[1]] = weight.float()
    tiles = whole.view(rows // 128, 128, cols // 128, 128)
    scales = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).view(rows, cols)[: weight.shape[0], : weight.shape[1]]
    return {name: codes.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scales}


def as_mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """gpt-oss's MXFP4: E2M1, two a byte, and a power of two for 32 inputs; stored by output, not by input."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: weight}
    groups = weight.float().mT.unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-9))) - 2
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": (exponents + 127).to(torch.uint8)}


def as_int4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Kimi-K2's INT4 (compressed-tensors): eight codes a word, value + 8, a bf16 scale for 32 inputs."""
    if ".experts." not in name:
        return {name: weight}
    groups = weight.float().unflatten(-1, (-1, 32))
    scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).flatten(-2).to(torch.int64) + 8
    words = (codes.unflatten(-1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    return {
        f"{name}_packed": words.sub(2**32 * (words >= 2**31)).to(torch.int32),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor(weight.shape),
    }


def _note(method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **more}}


# How experts are stored, and what config.json says of it.
STORED: dict[str, tuple[Any, dict[str, Any]]] = {
    "bf16": (as_bf16, {}),
    "fp8": (as_fp8, _note("fp8", weight_block_size=[128, 128], activation_scheme="dynamic")),
    "mxfp4": (as_mxfp4, _note("mxfp4")),
    "int4": (as_int4, {"model_type": "kimi_k2"} | _note("compressed-tensors", format="pack-quantized")),
}
