"""Times stacks of expert layers, x = x + moe(x), forward and backward, on the GPUs of a machine.

    python docs/stacks.py --tokens 512,2048 --format bf16,int4 --who kt_moe,streamed,resident
    torchrun --nproc-per-node 2 docs/stacks.py --who kt_moe,divided

Each rank has a GPU, which hidden states and LoRA are on, and its part of the tokens. Every layer has routes
of its own, a random softmax's top K, which stay the same. Printed are medians and quartiles of --reps steps
behind five that are not timed; a step begins and ends on all ranks together. `norm` is that of all ranks'
outputs, which tells whether two contestants computed the same.

kt_moe: this library; several ranks share one copy of the experts.
divided: this library, experts divided over the ranks (`kt_moe.ExpertParallel`).
streamed: plain torch; bf16 experts in page-locked memory, two slots for a layer each on the GPU, copies one
    layer ahead, grouped_mm; backward computes a layer again. A layer that is still in its slot is not copied.
resident: the same with all layers on the GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kt_moe
from kt_moe.cli.bench import plain
from kt_moe.cli.bench.cases import PRESETS, Shape
from kt_moe.cli.bench.layers import SCALING, Layer, make_lora, make_weights
from kt_moe.cli.terminal import integer, list_of
from kt_moe.gpu.streams import Event, streams_of

_WARM = 5


def main() -> None:
    args = _options()
    rank, size = kt_moe.distributed.local_ranks()
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:  # started without torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    shape = Shape(*(getattr(args, n) for n in ("hidden", "intermediate", "experts", "topk")))
    if rank == 0:
        print(f"{args.layers} layers of {shape}, {size} ranks", flush=True)
        print(f"{'tokens':>6}  {'who':<14} {'ms':>8} {'q1':>8} {'q3':>8} {'tokens/s':>9}  norm", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        path = [str(_save(shape, Path(directory))) if rank == 0 else ""]
        dist.broadcast_object_list(path)
        for who in args.who:
            for format in args.format if who in ("kt_moe", "divided") else ["bf16"]:
                layers = _layers(who, format, path[0], shape, args, device)
                for tokens in args.tokens:
                    _time(f"{who} {format}", layers, tokens // size, shape, args, device)
        dist.barrier()
    # Gloo's group ends in a destructor that now and then waits for a thread which wants the GIL.
    os._exit(0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preset = PRESETS["qwen3-30b-a3b"]
    names: dict[str, Any] = {"type": list_of(str), "metavar": "NAME,.."}
    parser.add_argument("--who", **names, default=["kt_moe"])
    parser.add_argument("--tokens", type=list_of(integer(1)), default=[2048], help="of all ranks together")
    parser.add_argument("--format", **names, default=["bf16"], help="of kt_moe's experts")
    parser.add_argument("--gpu-memory", default="auto", help="of kt_moe's experts")
    for name, default in (("layers", 6), ("rank", 16), ("reps", 9)):
        parser.add_argument(f"--{name}", type=integer(1), default=default)
    for name in ("hidden", "intermediate", "experts", "topk"):
        parser.add_argument(f"--{name}", type=integer(1), default=getattr(preset, name))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def _save(shape: Shape, directory: Path) -> Path:
    """A checkpoint of one layer, which all layers are read from."""
    names = ("gate_proj", "up_proj", "down_proj")
    save_file(
        {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": matrix
            for name, weights in zip(names, make_weights(shape), strict=True)
            for expert, matrix in enumerate(weights.unbind())
        },
        directory / "model.safetensors",
    )
    return directory


def _layers(
    who: str, format: str, path: str, shape: Shape, args: argparse.Namespace, device: torch.device
) -> list[Layer]:
    if who in ("kt_moe", "divided"):
        gpu = kt_moe.Gpu(device, args.gpu_memory)
        several = dist.get_world_size() > 1
        part = kt_moe.local_experts(shape.experts) if who == "divided" else None
        load = {"format": format, "gpu": gpu, "experts": part, "shared": several and part is None}
        experts = [kt_moe.Experts.from_checkpoint(path, 0, **load) for _ in range(args.layers)]
        return [_ours(e, shape.experts, divided=part is not None) for e in experts]
    weights = make_weights(shape)
    if who == "resident":
        return [plain.grouped_layer(plain.fuse(weights, device=device)) for _ in range(args.layers)]
    if who != "streamed":
        raise SystemExit(f"--who has {who}, wanted some of kt_moe, divided, streamed, resident")
    slots = _Slots(
        [plain.fuse(weights, pin_memory=device.type == "cuda") for _ in range(args.layers)], device
    )
    return [_streamed(slots, number) for number in range(args.layers)]


def _ours(experts: kt_moe.Experts, number: int, divided: bool) -> Layer:
    if divided:
        parallel = kt_moe.ExpertParallel(experts, number)
        return lambda x, ids, w, lora: parallel(x, ids, w, lora, scaling=SCALING)
    return lambda x, ids, w, lora: kt_moe.moe(x, ids, w, experts, lora, scaling=SCALING)


def _streamed(slots: _Slots, number: int) -> Layer:
    def layer(x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        return plain.grouped_layer(slots[number])(x, ids, weights, lora)

    def again(*args: Any) -> Tensor:
        found: Tensor = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
        return found

    return again


class _Slots:
    """Two on the device, for layers in turn: one is filled while the other one is used."""

    def __init__(self, host: list[plain.Fused], device: torch.device) -> None:
        self._host = host
        self._slots = [[torch.empty_like(t, device=device) for t in host[0]] for _ in range(2)]
        self._holds, self._last = [-1, -1], -1
        self._streams = streams_of(device)
        self._filled: list[Event] = [self._streams.record() for _ in range(2)]

    def __getitem__(self, number: int) -> plain.Fused:
        """A layer on the device. All work on the one before has been launched, so its slot gets the next."""
        for wanted in (number, number + (1 if number > self._last else -1)):
            if 0 <= wanted < len(self._host) and self._holds[wanted % 2] != wanted:
                self._fill(wanted)
        self._last = number
        self._streams.wait(self._filled[number % 2])
        gate_up, down = self._slots[number % 2]
        return gate_up, down

    def _fill(self, number: int) -> None:
        """Copy a layer into its slot, behind what the device still does with it."""
        self._streams.wait(self._streams.record(), "link")
        with self._streams.on("link"):
            for there, here in zip(self._slots[number % 2], self._host[number], strict=True):
                there.copy_(here, non_blocking=True)
        self._filled[number % 2], self._holds[number % 2] = self._streams.record("link"), number


def _time(
    who: str, layers: list[Layer], tokens: int, shape: Shape, args: argparse.Namespace, device: torch.device
) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, shape.hidden, generator=random).bfloat16().to(device)
    scores = torch.randn(len(layers), tokens, shape.experts, generator=random).softmax(-1).topk(shape.topk)
    weights, ids = (tensor.to(device) for tensor in scores)
    part = kt_moe.local_experts(shape.experts) if who.startswith("divided") else range(shape.experts)
    lora = [
        {n: t[part.start : part.stop].to(device, copy=True).requires_grad_() for n, t in every.items()}
        for every in [make_lora(shape, args.rank)] * len(layers)
    ]

    def step() -> Tensor:
        y = x
        for number, layer in enumerate(layers):
            for tensor in lora[number].values():
                tensor.grad = None
            y = y + layer(y, ids[number], weights[number], lora[number])
        torch.autograd.backward(y.float().square().mean())
        return y.detach()

    seconds = sorted([_seconds(step, device) for _ in range(_WARM + args.reps)][_WARM:])
    norm = step().float().square().sum()
    dist.all_reduce(norm)
    if rank == 0:
        q1, median, q3 = statistics.quantiles([*seconds, *seconds], n=4, method="inclusive")
        times = " ".join(f"{1e3 * s:8.2f}" for s in (median, q1, q3))
        print(
            f"{tokens * size:6}  {who:<14} {times} {tokens * size / median:9.0f}  {float(norm.sqrt()):.5g}",
            flush=True,
        )


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
