"""The options of `kt-moe bench --gpu`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kt_moe
from kt_moe.checkpointing import CHOICES
from kt_moe.cli.bench.layer import Shape
from kt_moe.cli.bench.options import check_writable, number_from, one_of, shape_of
from kt_moe.cli.errors import UserError
from kt_moe.cli.options import cpu_share, list_of, memory_size
from kt_moe.experts import FORMATS

STACK_PEERS = ("streamed", "resident", "cpu", "kt_moe-resident")
STEP_PEERS = ("resident", "roundpipe", "cpu")
STEP_PRESETS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "custom")
_OURS = (
    "layers", "format", "gpu_memory", "cpu_share", "lora_device", "sequence", "checkpoint_experts",
    "new_routes", "step", "compile",
)  # fmt: skip
_REFUSED = ("plot", "isa", "quick")


@dataclass(frozen=True)
class GpuSettings:
    """What to time.

    Attributes:
        rank: of the LoRA pairs of every projection, and of attention in a training step.
        formats: of kt_moe's experts; each is a contestant.
        gpu_memory, cpu_share: as `kt_moe.Gpu` takes them.
        lora_device: where kt_moe's LoRA tensors of the experts lie.
        checkpoint_experts: of kt_moe's experts in a training step, see `kt_moe.Experts`.
        new_routes: whether every step of a stack has other routes.
        step: time training steps instead of a stack of layers.
        sequence: tokens a row of a training step.
        device: "cuda", or "cpu" in tests.
        peers: the other contestants.
    """

    shape: Shape
    layers: int
    tokens: list[int]
    rank: int
    lora_dtype: str
    formats: list[str]
    gpu_memory: int | str
    cpu_share: float | str
    lora_device: str
    routing: str
    new_routes: bool
    step: bool
    compile: bool
    sequence: int
    recompute: bool
    checkpoint_experts: str
    reps: int
    threads: int | None
    seed: int
    device: str
    peers: list[str]
    json: Path | None

    def gpu(self, memory: int | str | None = None, cpu_share: float | None = None) -> kt_moe.Gpu:
        """As the options ask for it, save what is given here."""
        share = self.cpu_share if cpu_share is None else cpu_share
        return kt_moe.Gpu(self.device, memory or self.gpu_memory, share)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model of a training step knows."""
        return 1024 if self.shape.name == "custom" else 151936

    def runtime(self) -> kt_moe.Runtime:
        """The runtime of every contestant of kt_moe."""
        return kt_moe.default_runtime() if self.threads is None else kt_moe.Runtime(threads=self.threads)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them; those of a layer, --tokens, --rank, --dtype, --reps, --peers and --json are shared."""
    gpu = parser.add_argument_group("with a GPU")
    gpu.add_argument(
        "--gpu",
        action="store_true",
        help=f"time layers on CPU and GPU together; --peers: {', '.join(STACK_PEERS)}",
    )
    gpu.add_argument(
        "--step",
        action="store_true",
        help=f"time training steps of a model instead; --peers: {', '.join(STEP_PEERS)}",
    )
    gpu.add_argument("--layers", type=number_from(1), metavar="L", help="(6; with --step 48)")
    formats = list_of(one_of(FORMATS))
    gpu.add_argument("--format", type=formats, metavar="NAME,..", help="of kt_moe's experts (bf16)")
    gpu.add_argument("--gpu-memory", type=memory_size, metavar="SIZE", help="such as 2.5GiB (auto)")
    gpu.add_argument("--cpu-share", type=cpu_share, metavar="X", help="of the work, 0 to 1 (auto)")
    gpu.add_argument("--lora-device", choices=["cuda", "cpu"], help="of the experts' LoRA (cuda)")
    gpu.add_argument("--checkpoint-experts", choices=CHOICES, help="in a --step (recompute)")
    gpu.add_argument("--new-routes", action="store_true", help="other routes in every step")
    gpu.add_argument("--sequence", type=number_from(2), metavar="S", help="tokens a row of a --step (1024)")
    gpu.add_argument("--compile", action="store_true", help="torch.compile attention in a --step")
    gpu.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)


def refuse_gpu_options(args: argparse.Namespace) -> None:
    """UserError where an option was given that only --gpu uses."""
    for name in _OURS:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for --gpu")


def read(args: argparse.Namespace) -> GpuSettings:
    """Settings from the parsed arguments.

    Raises:
        UserError: options that do not go together, an unknown contestant, no GPU.
    """
    for name in _REFUSED:
        if getattr(args, name):
            raise UserError(f"--{name} is not for --gpu")
    known = STEP_PEERS if args.step else STACK_PEERS
    unknown = [name for name in args.peers if name not in known]
    if unknown:
        raise UserError(f"--peers has {', '.join(unknown)}, wanted some of {', '.join(known)}")
    check_writable("--json", args.json)
    shape = shape_of({n: v for n, v in vars(args).items() if v is not None})
    if args.step and shape.name not in STEP_PRESETS:
        raise UserError(f"--step makes Qwen3-MoE models, not {shape.name}: time a stack of its layers")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--gpu needs a CUDA device, and torch {torch.__version__} finds none")
    rank = _one("--rank", args.rank, 16)
    if rank == 0 or rank % 8:
        raise UserError(f"--rank is {rank}, wanted a multiple of 8, as torch's grouped_mm does")
    return GpuSettings(
        shape=shape,
        layers=args.layers or (48 if args.step else 6),
        tokens=args.tokens or ([2048, 8192, 16384] if args.step else [512, 2048, 8192, 16384]),
        rank=rank,
        lora_dtype=args.dtype,
        formats=args.format or ["bf16"],
        gpu_memory=args.gpu_memory or "auto",
        cpu_share="auto" if args.cpu_share is None else args.cpu_share,
        lora_device="cpu" if "cpu" in (args.lora_device, args.device) else "cuda",
        routing=args.routing,
        new_routes=args.new_routes,
        step=args.step,
        compile=args.compile,
        sequence=args.sequence or 1024,
        recompute=args.recompute,
        checkpoint_experts=args.checkpoint_experts or "recompute",
        reps=args.reps or 5,
        threads=_one("--threads", args.threads, None),
        seed=args.seed,
        device=args.device,
        peers=list(dict.fromkeys(args.peers)) or list(known),
        json=args.json,
    )


def _one(option: str, values: list[Any] | None, default: Any) -> Any:
    if values is not None and len(values) > 1:
        raise UserError(f"{option} has {len(values)} values, --gpu takes one")
    return values[0] if values else default
