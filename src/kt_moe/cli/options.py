"""Types of options for argparse, and options that several commands have."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from kt_moe.checkpointing import CHOICES as CHECKPOINT_EXPERTS
from kt_moe.cli.errors import UserError
from kt_moe.gpu import parse_bytes
from kt_moe.lora_device import CHOICES as LORA_DEVICES


def add_gpu(add: Callable[..., Any]) -> None:
    """Declare the options of a GPU, those of `KtMoeConfig`."""
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
