"""A program for torchrun: some training steps of a tiny model, by one way of data parallelism.

    torchrun --nproc-per-node 2 distributed_training.py DIRECTORY ddp 20 cpu

DIRECTORY has the model in `base`, an adapter in `adapter` and the batches in `batches.pt` [steps, rows,
length]. Each process takes its rows of every batch, one after the other, so that shapes, and with them the
roundings of torch's products, are the same for any number of processes. The first writes what came of it to
`<wrapper>-<processes>-<device>.pt`. With `cuda` instead of `cpu` each process has a GPU of its own. `zero` is
DistributedDataParallel with torch's ZeroRedundancyOptimizer, `deepspeed-N` DeepSpeed's ZeRO of stage N.
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
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import kt_moe

MAX_NORM = 1.0


def synchronised(model: Any, wrapper: str, last: bool) -> Any:
    """Gradients are exchanged in the last backward of a step alone."""
    if wrapper == "fsdp":
        model.set_requires_gradient_sync(last)
    return model.no_sync() if wrapper in ("ddp", "zero") and not last else contextlib.nullcontext()


def deepspeed_engine(model: Any, optimizer: Any, stage: int, rows: int) -> Any:
    """DeepSpeed's engine, for steps of so many calls. It is optimizer and wrapper, and clips."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": rows,
        "gradient_clipping": MAX_NORM, "zero_allow_untested_optimizer": True,
        # As for large models: else ZeRO-3 leaves tiny parameters whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def gradient(parameter: Any, wrapper: str) -> Any:
    """Of the whole parameter."""
    if wrapper.startswith("deepspeed"):
        import deepspeed

        return deepspeed.utils.safe_get_full_grad(parameter)
    return parameter.grad.full_tensor() if wrapper == "fsdp" else parameter.grad.clone()


def main(directory: Path, wrapper: str, steps: int, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group({"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[device])
    rank, size = dist.get_rank(), dist.get_world_size()
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "base", dtype=torch.float32, quantization_config=kt_moe.KtMoeConfig()
    ).to(device)
    model: Any = peft.PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
    if wrapper in ("ddp", "zero"):
        call = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        mesh = init_device_mesh(device, (size,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        call = fully_shard(model, mesh=mesh)
    else:
        call = model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batches = torch.load(directory / "batches.pt")[:steps].to(device)
    optimizer: Any
    if wrapper == "zero":
        optimizer = ZeroRedundancyOptimizer(trained.values(), torch.optim.AdamW, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    if wrapper.startswith("deepspeed"):
        call = deepspeed_engine(model, optimizer, int(wrapper[-1]), batches.shape[1] // size)
    losses, norms = [], []
    for batch in batches:
        mean = torch.zeros((), device=device)
        own = batch.chunk(size)[rank].split(1)
        for number, row in enumerate(own):
            with synchronised(call, wrapper, number == len(own) - 1):
                loss = call(input_ids=row, labels=row).loss
                if wrapper.startswith("deepspeed"):
                    call.backward(loss)  # divides it by len(own)
                    if number < len(own) - 1:
                        call.step()  # which only counts
                else:
                    (loss / len(own)).backward()
            mean += loss.detach() / (size * len(own))
        if wrapper == "none":
            for p in trained.values():
                dist.all_reduce(p.grad)
                p.grad /= size
        if not norms:
            first = {name: gradient(p, wrapper).cpu() for name, p in trained.items()}
        if wrapper.startswith("deepspeed"):
            call.step()
            norms.append(float(call.get_global_grad_norm()))
        else:
            norm: Any = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM)
            norms.append(float(norm.full_tensor() if wrapper == "fsdp" else norm))
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(mean)
        losses.append(float(mean))
    name = f"{wrapper}-{size}-{device}"
    if rank == 0 or wrapper in ("fsdp", "deepspeed-3"):
        kt_moe.save_adapter(model, directory / f"trained-{name}")
    if rank == 0:
        torch.save({"losses": losses, "norms": norms, "gradients": first}, directory / f"{name}.pt")
    dist.barrier()
    # Gloo's group ends in DistributedDataParallel's destructor, which waits, with the GIL, for a thread that
    # may want the GIL: now and then a process would never end.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
