"""Which models have experts we can compute, one row a family.

A row says how the family's experts are called in the module tree and in its checkpoints. Every family listed
routes with its own code and has experts of one kind: `down(silu(gate(x)) * up(x))`, no biases, no clamps,
held by transformers as `gate_up_proj` [E, 2I, H] (gate first) and `down_proj` [E, H, I].
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
    """

    model_type: str
    module: str = "mlp.experts"
    on_disk: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    activation: str = "silu"

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
    )
}


def architecture_of(config: Any) -> Architecture:
    """The row of a transformers config.

    Raises:
        ValueError: no row for this model type; the message names it and those there are.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = getattr(text, "model_type", None)
    row = ARCHITECTURES.get(model_type or "")
    if row is None:
        raise ValueError(
            f"model type {model_type!r} is not supported by kt_moe, only {sorted(ARCHITECTURES)}"
        )
    activation = getattr(text, "hidden_act", row.activation)
    if activation != row.activation:
        raise ValueError(f"hidden_act is {activation!r}, kt_moe computes {row.activation!r} for {model_type}")
    return row
