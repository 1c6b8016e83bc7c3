"""Qwen3-30B-A3B without a GPU: experts in int4, LoRA on attention and experts.

    python examples/cpu_only.py --data train.jsonl
    python examples/cpu_only.py --tiny

Memory: 37.2 GiB of the host, 15.19 of them experts, by `kt-moe plan` with two rows of 1,024 tokens a step
and gradient checkpointing.

What to expect: the experts of one of the 48 layers, with 2,048 tokens in bf16, forward and backward, took
435 ms on two cores of Zen 5 and 78 ms on 16 CPUs with AMX (docs/performance.md). Attention comes on top.
"""

from common import options
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import kt_moe

args = options(__doc__, "Qwen/Qwen3-30B-A3B", "qwen3_moe")

config = kt_moe.KtMoeConfig(format="int4", checkpoint_experts="retain")
model = kt_moe.load_model(args.model, config, dtype="bfloat16")
lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
model = get_peft_model(model, lora)

trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir=str(args.output),
        max_length=1024,
        per_device_train_batch_size=2,
        max_steps=args.steps,
        learning_rate=1e-4,
        logging_steps=1,
        bf16=False,  # no autocast: the weights are bf16 already
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(args.model),
)
trainer.train()
kt_moe.save_adapter(model, args.output)
