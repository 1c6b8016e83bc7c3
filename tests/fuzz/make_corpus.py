"""Write the seed corpora of the fuzz targets: small valid inputs, and ones that are wrong in one place.

The results are checked in under corpus/; run this after a change of what a target reads.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def tensor(begin: int, end: int, dtype: str = "U8", *shape: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or (end - begin,), "data_offsets": (begin, end)}


def header(data_size: int, members: Mapping[str, object]) -> bytes:
    return b"\0" + struct.pack("<H", data_size) + json.dumps(members).encode()


def model_index(weight_map: object) -> bytes:
    return b"\1" + json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def headers() -> dict[str, bytes]:
    return {
        "header-empty": header(0, {}),
        "header-metadata": header(4, {"__metadata__": {"format": "pt"}, "a": tensor(0, 4)}),
        "header-types": header(
            28, {"b": tensor(0, 12, "BF16", 2, 3), "a": tensor(12, 28, "F32", 4), "z": tensor(28, 28)}
        ),
        "header-half-bytes": header(3, {"a": tensor(0, 3, "F4", 6)}),
        "header-overlap": header(6, {"a": tensor(0, 4), "b": tensor(2, 6)}),
        "header-hole": header(9, {"a": tensor(0, 4), "b": tensor(5, 9)}),
        "header-overflow": header(0, {"a": tensor(0, 0, "F32", 2**32, 2**32)}),
        "index": model_index({"a": "one.safetensors", "b": "sub/two.safetensors"}),
        "index-escape": model_index({"a": "../one.safetensors"}),
        "index-array": model_index(["a"]),
    }


def per_expert(names: tuple[str, str, str], prefix: str, dtype: str = "BF16") -> list[str]:
    return [
        f"{prefix}.experts.{expert}.{name}.weight {dtype} {'4,3' if name == names[2] else '3,4'}"
        for expert in range(2)
        for name in names
    ]


def quantised(*tensors: str) -> list[str]:
    return [
        f"model.layers.3.mlp.experts.{expert}.{name}.{tensor}"
        for expert in range(2)
        for name in PROJECTIONS
        for tensor in tensors
    ]


def experts() -> dict[str, bytes]:
    root = "model.layers.3.mlp"
    fused = [f"{root}.experts.gate_up_proj BF16 2,6,4", f"{root}.experts.down_proj BF16 2,4,3"]
    qwen = per_expert(PROJECTIONS, root)
    files = {
        "qwen": qwen,
        "float32": per_expert(PROJECTIONS, root, "F32"),
        "mixtral": per_expert(("w1", "w3", "w2"), "model.layers.0.block_sparse_moe"),
        "fused": fused,
        "two-layouts": fused + qwen,
        "two-roots": qwen + per_expert(PROJECTIONS, "vision.layers.3.mlp"),
        "missing": qwen[:-1],
        "disagree": [*qwen[:-1], qwen[-1].replace("4,3", "3,4")],
        "odd": ["odd U8 1", *qwen],
        "far": [*qwen, f"{root}.experts.999999.up_proj.weight BF16 3,4"],
        "mtp": per_expert(PROJECTIONS, "mtp.layers.0.mlp"),
        "fp8": [
            line
            for e in qwen
            for line in (
                e.replace("BF16", "F8_E4M3"),
                e.replace("weight ", "weight_scale_inv ").replace("BF16", "F32")[: -len("3,4")] + "1,1",
            )
        ],
        "mxfp4": [
            f"{root}.experts.{name}_{part}"
            for name, rows in (("gate_up_proj", 64), ("down_proj", 32))
            for part in (f"blocks U8 2,{rows},1,16", f"scales U8 2,{rows},1", f"bias BF16 2,{rows}")
        ],
        "int4": quantised("weight_packed I32 32,4", "weight_scale BF16 32,1", "weight_zero_point I32 4,1"),
        "nvfp4": quantised(
            "weight_packed U8 32,16", "weight_scale F8_E4M3 32,2", "weight_global_scale F32 1"
        ),
        "nvfp4-modelopt": quantised("weight U8 32,16", "weight_scale F8_E4M3 32,2", "weight_scale_2 F32 1"),
        "gptq": quantised("qweight I32 4,32", "qzeros I32 1,4", "scales F16 1,32"),
        "awq": quantised("qweight I32 32,4", "qzeros I32 1,4", "scales F16 1,32"),
        "gpt-oss": [
            f"{root}.experts.{tensor}"
            for tensor in (
                "gate_up_proj F16 2,4,6",
                "gate_up_proj_bias F16 2,6",
                "down_proj F16 2,3,4",
                "down_proj_bias F16 2,4",
            )
        ],
        "kt": [
            f"blk.3.ffn_{name}_exps.{e}.numa.0.{part}"
            for e in range(2)
            for name in ("gate", "up", "down")
            for part in ("weight I8 4096", "scale F32 64")
        ],
    }
    return {name: "\n".join(lines).encode() for name, lines in files.items()}


def main() -> None:
    shutil.rmtree(CORPUS, ignore_errors=True)
    for target, seeds in (("headers", headers()), ("experts", experts())):
        folder = CORPUS / target
        folder.mkdir(parents=True)
        for name, content in seeds.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
