"""The options of `kt-moe finetune`, and the part of them that decides a run's losses."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kt_moe.checkpointing import CHOICES as CHECKPOINT_EXPERTS
from kt_moe.cli.errors import UserError
from kt_moe.cli.formats import QUANTISED
from kt_moe.experts import PLACEMENTS
from kt_moe.gpu import parse_bytes
from kt_moe.lora_device import CHOICES as LORA_DEVICES

GPU_OPTIONS = ("gpu", "gpu_memory", "cpu_share", "lora_device")  # of `KtMoeConfig`, by their names here


@dataclass(frozen=True)
class Settings:
    """What decides a run's losses, beside its documents; a resumed run must have the same.

    The fields are the options of the same names; max_steps is -1 where `epochs` decides.
    """

    model: str
    format: str
    placement: str
    popularity: str | None
    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    lr: float
    warmup: float
    epochs: float
    max_steps: int
    batch_size: int
    grad_accum: int
    seq_len: int
    eval_fraction: float
    eval_every: int | None
    assistant_only_loss: bool
    seed: int
    shared_outer: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """From parsed options.

        Raises:
            UserError: no targets, or popularity that nothing would use.
        """
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        targets = sorted({name.strip() for name in args.targets.split(",") if name.strip()})
        if not targets:
            raise UserError("--targets is empty, wanted names separated by commas")
        if args.popularity is not None:
            if args.placement == "tensor":
                raise UserError("--popularity is for --placement expert")
            values["popularity"] = str(args.popularity.resolve())
        return cls(**{**values, "model": str(args.model.resolve()), "targets": targets})

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    _add_files(parser.add_argument_group("files").add_argument)
    _add_experts(parser.add_argument_group("experts").add_argument)
    add_gpu(parser.add_argument_group("GPU").add_argument)
    _add_lora(parser.add_argument_group("LoRA").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)
    _add_watching(parser.add_argument_group("watching").add_argument)


def _add_files(add: Callable[..., Any]) -> None:
    data = (
        '.jsonl with "text" or "messages" in every line, or .txt whose documents end in a form feed '
        "(in a file without form feeds: in two or more blank lines)"
    )
    add("--model", type=Path, required=True, metavar="DIR", help="model directory (safetensors)")
    add("--data", type=Path, required=True, metavar="FILE", help=data)
    add("--output", type=Path, required=True, metavar="DIR", help="gets adapter, loss curve, checkpoints")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--overwrite", action="store_true", help="start anew where an adapter or a run already is")


def _add_experts(add: Callable[..., Any]) -> None:
    formats = ["as-stored", *QUANTISED]
    add(
        "--format",
        choices=formats,
        default="as-stored",
        help="of their weights in memory; default: as-stored",
    )
    add(
        "--placement",
        choices=PLACEMENTS,
        default="tensor",
        help="on several memory nodes: a slice of every expert on each, or whole experts; default: tensor",
    )
    routing = "routing.safetensors of an earlier run: whole experts are shared out by it"
    add("--popularity", type=Path, metavar="FILE", help=routing)
    cache = "keep packed layers there: the next run maps them, and starts at once"
    add("--cache-dir", type=Path, metavar="DIR", help=cache)


def add_gpu(add: Callable[..., Any]) -> None:
    """Declare `GPU_OPTIONS`."""
    gpu = "that computes experts beside the CPU: auto (the model's), cuda:0 and so on, or off; default: auto"
    memory = "of the GPU, for experts, such as 6GiB; default: auto, up to half of what is free"
    share = "part of the experts' rows that the CPU computes, 0 to 1; default: auto, what ends soonest"
    lora = (
        "where LoRA of the experts lies, with gradients and optimizer state; auto: on the GPU if it takes up "
        "to a quarter of the memory that is free; default: auto"
    )
    add("--gpu", type=_gpu, default="auto", metavar="NAME", help=gpu)
    add("--gpu-memory", type=memory_size, default="auto", metavar="SIZE", help=memory)
    add("--cpu-share", type=cpu_share, default="auto", metavar="P", help=share)
    add("--lora-device", choices=LORA_DEVICES, default="auto", help=lora)


def add_checkpointing(add: Callable[..., Any]) -> None:
    """Declare gradient checkpointing and what it does with experts."""
    experts = (
        "in gradient checkpointing: computed again in backward, or kept from forward, for their memory "
        "(kt-moe plan has it); default: recompute"
    )
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--checkpoint-experts", choices=CHECKPOINT_EXPERTS, default="recompute", help=experts)


def check_together(args: argparse.Namespace) -> None:
    """Refuse options of `add_gpu` and `add_checkpointing` that do not go together.

    Raises:
        UserError: names them; or a GPU that is not there.
    """
    if args.gpu == "off" and (args.gpu_memory, args.cpu_share) != ("auto", "auto"):
        raise UserError("--gpu off excludes --gpu-memory and --cpu-share")
    if args.checkpoint_experts == "retain" and not args.gradient_checkpointing:
        raise UserError("--checkpoint-experts retain is for --gradient-checkpointing")
    if args.gpu.startswith("cuda"):
        import torch

        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(args.gpu.partition(":")[2] or 0) >= number:
            raise UserError(f"--gpu {args.gpu}: there are {number} GPUs that PyTorch can use")


def refuse_without_gpu(args: argparse.Namespace) -> None:
    """Refuse options that only a GPU has a use for, where PyTorch finds none: training would be on the CPU.

    Raises:
        UserError: names the option.
    """
    import torch

    given = [name for name in ("gpu_memory", "cpu_share") if getattr(args, name) != "auto"]
    if args.lora_device == "cuda":
        given.append("lora_device")
    if given and not torch.cuda.is_available():
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option} is for a GPU, and PyTorch {torch.__version__} finds none")


def _add_lora(add: Callable[..., Any]) -> None:
    targets = (
        "names of modules, comma-separated, such as q_proj,v_proj,experts; attention stands for all linear "
        "layers in attention; default: attention,experts"
    )
    add("--rank", type=integer(1), default=16, metavar="R", help="default: 16")
    add("--alpha", type=number(0), default=32.0, metavar="A", help="scaling is A / R; default: 32")
    add("--dropout", type=number(0, 1), default=0.0, metavar="P", help="default: 0")
    add("--targets", default="attention,experts", metavar="NAMES", help=targets)
    shared = "one A of gate and up, and one B of down, for all experts of a layer"
    add("--shared-outer", action="store_true", help=shared)


def _add_training(add: Callable[..., Any]) -> None:
    add("--lr", type=number(0), default=2e-4, metavar="X", help="peak learning rate; default: 2e-4")
    add("--warmup", type=number(0, 1), default=0.03, metavar="P", help="part of a run; default: 0.03")
    add("--epochs", type=number(0), default=1.0, metavar="X", help="default: 1")
    add("--max-steps", type=integer(1), default=-1, metavar="N", help="overrides --epochs")
    add("--batch-size", type=integer(1), default=4, metavar="N", help="rows a pass; default: 4")
    add("--grad-accum", type=integer(1), default=1, metavar="N", help="passes a step; default: 1")
    add("--seq-len", type=integer(2), default=1024, metavar="N", help="tokens a row; default: 1024")
    add("--assistant-only-loss", action="store_true", help='of "messages", learn the replies alone')
    add_checkpointing(add)
    add("--threads", type=integer(1, 4096), metavar="N", help="default: the cores this process may use")
    seed = "of split, order, LoRA; default: 0"
    add("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help=seed)


def _add_watching(add: Callable[..., Any]) -> None:
    fraction = "documents to hold out; default: 0.05; 0: none"
    add("--eval-fraction", type=number(0, 1), default=0.05, metavar="P", help=fraction)
    add("--eval-every", type=integer(1), metavar="N", help="steps; default: a tenth of the run")
    add("--save-every", type=integer(1), metavar="N", help="steps; default: a tenth of the run")
    add("--sample", metavar="PROMPT", help="show what the model writes after it, before and after")
    add("--sample-tokens", type=integer(1), default=80, metavar="N", help="default: 80")


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: least <= integer <= most."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r}, wanted an integer {wanted}")
        return value

    return parse


def number(least: float, below: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: least <= number < below."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < below:
            wanted = f"a number from {least:g}" + (f" to below {below:g}" if below < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r}, wanted {wanted}")
        return value

    return parse


def _gpu(text: str) -> str:
    if not re.fullmatch(r"auto|off|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}, wanted auto, off, cuda:0 or the like")
    return text


def memory_size(text: str) -> int | str:
    """An argparse type: a number of bytes for `kt_moe.Gpu`, or "auto"."""
    try:
        return text if text == "auto" else parse_bytes("", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted auto or a size such as 6GiB") from None


def cpu_share(text: str) -> float | str:
    """An argparse type: a part of the rows for `kt_moe.Gpu`, or "auto"."""
    try:
        value = text if text == "auto" else float(text)
    except ValueError:
        value = -1.0
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted auto or a number from 0 to 1")
    return value


def list_of(item: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An argparse type: values separated by commas, each once."""

    def parse(text: str) -> list[object]:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    return parse
