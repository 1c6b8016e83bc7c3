"""A program for torchrun: some training steps of a tiny model, by one of torch's data parallelisms.

    torchrun --nproc-per-node 2 distributed_training.py DIRECTORY ddp 20 cpu

DIRECTORY has the model in `base`, an adapter in `adapter` and the batches in `batches.pt` [steps, rows,
length]. Each process takes its rows of every batch, one after the other, so that shapes, and with them the
roundings of torch's products, are the same for any number of processes. The first writes what came of it to
`<wrapper>-<processes>-<device>.pt`. With `cuda` instead of `cpu` each process has a GPU of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kt_moe


def synchronised(model: Any, wrapper: str, last: bool) -> Any:
    """Gradients are exchanged in the last backward of a step alone."""
    if wrapper == "fsdp":
        model.set_requires_gradient_sync(last)
    return model.no_sync() if wrapper == "ddp" and not last else contextlib.nullcontext()


def main(directory: Path, wrapper: str, steps: int, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group({"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[device])
    rank, size = dist.get_rank(), dist.get_world_size()
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "base", dtype=torch.float32, quantization_config=kt_moe.KtMoeConfig()
    ).to(device)
    model: Any = peft.PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
    if wrapper == "ddp":
        call = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        mesh = init_device_mesh(device, (size,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        call = fully_shard(model, mesh=mesh)
    else:
        call = model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses, norms = [], []
    for batch in torch.load(directory / "batches.pt")[:steps].to(device):
        mean = torch.zeros((), device=device)
        own = batch.chunk(size)[rank].split(1)
        for number, row in enumerate(own):
            with synchronised(call, wrapper, number == len(own) - 1):
                loss = call(input_ids=row, labels=row).loss / len(own)
                loss.backward()
            mean += loss.detach() / size
        if wrapper == "none":
            for p in trained.values():
                dist.all_reduce(p.grad)
                p.grad /= size
        if not norms:
            first = {
                n: (p.grad.full_tensor() if wrapper == "fsdp" else p.grad.clone()).cpu()
                for n, p in trained.items()
            }
        norm: Any = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        norms.append(float(norm.full_tensor() if wrapper == "fsdp" else norm))
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean)
        losses.append(float(mean))
    name = f"{wrapper}-{size}-{device}"
    if rank == 0 or wrapper == "fsdp":
        kt_moe.save_adapter(model, directory / f"trained-{name}")
    if rank == 0:
        torch.save({"losses": losses, "norms": norms, "gradients": first}, directory / f"{name}.pt")
    dist.barrier()
    # Gloo's group ends in DistributedDataParallel's destructor, which waits, with the GIL, for a thread that
    # may want the GIL: now and then a process would never end.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
