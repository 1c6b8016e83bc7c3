"""The options of `kt-moe plan`, and the run that they describe."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED
from kt_moe.cli.options import add_checkpointing, add_gpu, check_together, integer
from kt_moe.functional import PROJECTIONS
from kt_moe.gpu.plan import Rates

OPTIMIZERS = ("adamw", "adamw-8bit", "sgd")
LORA_BYTES = {"fp32": 4, "bf16": 2}
RATES = tuple(field.name for field in fields(Rates))


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
        retain: not its experts: what they save and their results are kept from forward.
        gpu_memory: bytes of the GPU for expert weights; "auto": what the run will take; 0: none.
        lora_device: where the experts' LoRA lies: "auto", "cpu" or "cuda".
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
    retain: bool = False
    gpu_memory: int | str = "auto"
    lora_device: str = "auto"

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.batch * self.sequence

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Run:
        """From parsed options.

        Raises:
            UserError: no targets, or options that exclude each other.
        """
        check_together(args)
        cpu_alone = args.gpu == "off" or args.cpu_share == 1.0
        names = [name.strip() for name in args.targets.split(",") if name.strip()]
        if not names:
            raise UserError("--targets is empty, wanted names separated by commas")
        projections = PROJECTIONS if "experts" in names else tuple(p for p in PROJECTIONS if p in names)
        modules = tuple(sorted(set(names) - {*PROJECTIONS, "experts"}))
        return cls(
            args.batch, args.sequence, args.rank, projections, modules, args.format,
            args.optimizer, LORA_BYTES[args.lora_dtype], args.gradient_checkpointing,
            args.checkpoint_experts == "retain", 0 if cpu_alone else args.gpu_memory, args.lora_device,
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
    add_checkpointing(add)
    add_gpu(add)
    rates = (
        f"of a machine with a GPU: {', '.join(RATES)} (bytes and FLOPs a second, elsewhere in seconds); "
        "predicts a step there; those left out are measured, or assumed where there is no GPU; kt-moe doctor "
        "prints a machine's"
    )
    add("--rates", type=parse_rates, metavar="link=55e9,...", help=rates)
    add("--threads", type=integer(1, 4096), metavar="N", help="default: the cores this process may use")
    add("--no-measure", action="store_true", help="compute alone: no speed, scratch by its formula")
    add("--json", action="store_true", help="the same as JSON")
    parser.epilog = "Exit status: 0 it fits this machine, 1 it does not, 2 wrong usage."


def parse_rates(text: str) -> dict[str, float]:
    """An argparse type: "link=55e9,gpu_flops=4e14", any of the fields of `kt_moe.Rates`."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in RATES or not 0.0 < number < float("inf"):
            wanted = f"one of {', '.join(RATES)}, = and a number"
            raise argparse.ArgumentTypeError(f"{part.strip()!r}, wanted {wanted}")
        found[name] = number
    return found
