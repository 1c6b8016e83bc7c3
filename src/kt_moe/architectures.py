"""Which models have experts we can compute, one row a family.

A row says how the family's experts are called in the module tree and in its checkpoints. Every family listed
routes with its own code. All but gpt-oss have experts of one kind: `down(silu(gate(x)) * up(x))`, no biases,
no clamps, held by transformers as `gate_up_proj` [E, 2I, H] (gate first) and `down_proj` [E, H, I]. gpt-oss
has biases and an activation of its own, and is held as [E, H, 2I] (gate and up alternating) and [E, I, H].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Args:
        model_type: as in config.json.
        module: path of the experts module inside a decoder layer.
        on_disk: the same path in checkpoints and in portable adapters.
        projections: names of gate, up and down of one expert on disk.
        activation: name of the activation, as `kt_moe.Experts` takes it.
        fused_on_disk: its checkpoints have no key an expert, so that PEFT does not know one either.
        fixed: options of the config, and the only values with which it is that activation.
    """

    model_type: str
    module: str = "mlp.experts"
    on_disk: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    activation: str = "silu"
    fused_on_disk: bool = False
    fixed: tuple[tuple[str, Any], ...] = (("hidden_act", "silu"),)

    def disk_path(self, module_path: str) -> str:
        """`...layers.0.mlp.experts` of the module tree, as checkpoints call it."""
        return module_path.removesuffix(self.module) + self.on_disk

    def layer_of(self, module_path: str) -> int | None:
        """Number of the layer whose routed experts live at this path; None when none do."""
        found = re.search(rf"(?:^|\.)layers\.(\d+)\.{re.escape(self.module)}$", module_path)
        return int(found[1]) if found else None


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("qwen3_moe"),
        Architecture("qwen2_moe"),
        Architecture("olmoe"),
        Architecture("deepseek_v2"),
        Architecture("deepseek_v3"),
        Architecture("glm4_moe"),
        Architecture("dots1"),
        Architecture("mixtral", on_disk="block_sparse_moe.experts", projections=("w1", "w3", "w2")),
        Architecture(
            "gpt_oss",
            activation="gpt_oss",
            fused_on_disk=True,
            fixed=(("hidden_act", "silu"), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)),
        ),
    )
}


def architecture_of(config: Any) -> Architecture:
    """The row of a transformers config.

    Raises:
        ValueError: no row for this model type, or another activation; the message names what was found.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = getattr(text, "model_type", None)
    row = ARCHITECTURES.get(model_type or "")
    if row is None:
        raise ValueError(
            f"model type {model_type!r} is not supported by kt_moe, only {sorted(ARCHITECTURES)}"
        )
    for option, wanted in row.fixed:
        found = getattr(text, option, wanted)
        if found != wanted:
            raise ValueError(f"{option} is {found!r}, kt_moe computes {wanted!r} for {model_type}")
    return row
