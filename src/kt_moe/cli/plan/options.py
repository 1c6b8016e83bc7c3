"""The options of `kt-moe plan`, and the run that they describe."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.options import integer
from kt_moe.functional import PROJECTIONS

OPTIMIZERS = ("adamw", "adamw-8bit", "sgd")
LORA_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Run:
    """The training run to plan.

    Attributes:
        batch, sequence: rows of a forward pass, and tokens of a row.
        rank: of every LoRA pair.
        projections: of the experts that get LoRA.
        modules: others that do, by the names `kt-moe finetune --targets` takes.
        format: of the experts in memory; None: as they are stored.
        lora_bytes: of a number of the experts' LoRA.
        checkpointing: gradient checkpointing: a layer's activations are computed again in backward.
    """

    batch: int
    sequence: int
    rank: int
    projections: tuple[str, ...]
    modules: tuple[str, ...]
    format: str | None
    optimizer: str
    lora_bytes: int
    checkpointing: bool

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.batch * self.sequence

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Run:
        """From parsed options.

        Raises:
            UserError: no targets.
        """
        names = [name.strip() for name in args.targets.split(",") if name.strip()]
        if not names:
            raise UserError("--targets is empty, wanted names separated by commas")
        projections = PROJECTIONS if "experts" in names else tuple(p for p in PROJECTIONS if p in names)
        modules = tuple(sorted(set(names) - {*PROJECTIONS, "experts"}))
        return cls(
            args.batch, args.sequence, args.rank, projections, modules, args.format,
            args.optimizer, LORA_BYTES[args.lora_dtype], args.gradient_checkpointing,
        )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    targets = (
        "gate,up,down of the experts (experts: all three), and modules beside them such as attention or "
        "q_proj, as in finetune; default: gate,up,down"
    )
    add("model", type=Path, metavar="DIR_OR_CONFIG", help="model directory, or a config.json alone")
    add("--batch", type=integer(1), default=4, metavar="N", help="rows a pass; default: 4")
    add("--sequence", type=integer(2), default=1024, metavar="N", help="tokens a row; default: 1024")
    add("--rank", type=integer(1), default=16, metavar="R", help="default: 16")
    add("--targets", default="gate,up,down", metavar="NAMES", help=targets)
    add("--format", choices=list(QUANTISED), help="of the experts in memory; default: as they are stored")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    add("--lora-dtype", choices=list(LORA_BYTES), default="fp32", help="of the experts' LoRA; default: fp32")
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--threads", type=integer(1, 4096), metavar="N", help="default: the cores this process may use")
    add("--no-measure", action="store_true", help="compute alone: no speed, scratch by its formula")
    add("--json", action="store_true", help="the same as JSON")
    parser.epilog = "Exit status: 0 it fits this machine, 1 it does not, 2 wrong usage."
