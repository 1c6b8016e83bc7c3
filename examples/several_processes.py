"""Qwen3-235B-A22B by several processes, one for each GPU.

    torchrun --nproc-per-node 4 examples/several_processes.py --data train.jsonl
    accelerate launch --config_file examples/accelerate/one_host.yaml examples/several_processes.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/several_processes.py
    torchrun --nproc-per-node 2 examples/several_processes.py --tiny

On two hosts, on the first with 0 and on the second with 1 for N, where host0 is the name of the first:

    torchrun --nnodes 2 --node-rank N --nproc-per-node 4 --master-addr host0 examples/several_processes.py
    accelerate launch --config_file examples/accelerate/two_hosts.yaml --machine_rank N \
        --main_process_ip host0 examples/several_processes.py

Each host has one copy of the experts; with --global they are divided over all processes instead, for experts
that no host can hold. `kt-moe plan --hosts 2 --ranks 4` says what each way takes; docs/distributed.md, which
to choose.
"""

import argparse

import torch
from accelerate import PartialState
from common import options
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import kt_moe

parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--global", action="store_const", const="global", default="host", dest="how")
how, rest = parser.parse_known_args()
state = PartialState(cpu=not torch.cuda.is_available())
with state.main_process_first():  # with --tiny it makes model and data, which all hosts have to see
    args = options(__doc__, "Qwen/Qwen3-235B-A22B", "qwen3_moe", arguments=rest)

config = kt_moe.KtMoeConfig(expert_parallel=how.how, checkpoint_experts="retain")
model = kt_moe.load_model(args.model, config, dtype="bfloat16", device_map=state.device)
lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
trainer = SFTTrainer(
    get_peft_model(model, lora),
    args=SFTConfig(
        output_dir=str(args.output),
        max_length=2048,
        per_device_train_batch_size=1,
        max_steps=args.steps,
        learning_rate=1e-4,
        logging_steps=1,
        bf16=False,  # no autocast: the weights are bf16 already
        use_cpu=state.device.type == "cpu",
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(args.model),
)
trainer.train()
trainer.save_model()  # by all processes, of which the first writes
