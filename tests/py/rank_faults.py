"""A program for torchrun in which rank 1 has other settings, or rank 0 is killed while it saves.

torchrun --nproc-per-node 2 rank_faults.py DIRECTORY format|LoRA|saving
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers

import kt_moe


def main(directory: Path, what: str) -> None:
    rank = int(os.environ["RANK"])
    other = rank == 1
    config = kt_moe.KtMoeConfig(format="int8" if other and what == "format" else "as-stored")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "base", dtype=torch.float32, quantization_config=config
    )
    alpha = 16 if other and what == "LoRA" else 8
    lora = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["experts", "q_proj"])
    model = peft.get_peft_model(model, lora)
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 0:
        kt_moe.save_adapter(model, directory / "adapter")
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        kt_moe.save_adapter(model, directory / "adapter")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)
